//! A sequence of random queries, keys and values, for tests of cache policies against their references.

use antefix_attention::Geometry;
use antefix_attention::method::{LayerEdit, LayerView};
use antefix_conformance::method::Profile;
use antefix_kv::{KvDtype, KvShape, Pool, SeqState};

use crate::heads::{HeadProfile, KIND};

/// A profile of heads for the conformance suite, made up for each model.
pub(crate) const MADE_UP: Profile<'static> = Profile {
    kind: KIND,
    file: "default.json",
    bytes: &|facts| serde_json::to_vec(&HeadProfile::made_up(facts, 5)).expect("plain data"),
};

/// `rows` rows of every layer and head, and the last `queries` queries.
pub(crate) struct Case {
    pub(crate) geometry: Geometry,
    pub(crate) layers: usize,
    pub(crate) rows: usize,
    pub(crate) queries: usize,
    pool: Pool,
    state: SeqState,
    /// A layer: `[queries, Hq, D]`.
    q: Vec<Vec<f32>>,
    /// A layer: `[rows, Hk, D]`.
    k: Vec<Vec<f32>>,
}

/// Shapes of a case.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) rows: usize,
    pub(crate) queries: usize,
}

const DIM: usize = 8;

impl Case {
    /// Values are -2 to 2, so that weights differ by orders of magnitude.
    pub(crate) fn random(seed: u64, shape: Shape) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut table = |n: usize| -> Vec<f32> { (0..n * DIM).map(|_| rng.f32() * 4.0 - 2.0).collect() };
        let q = (0..shape.layers)
            .map(|_| table(shape.queries * shape.heads))
            .collect();
        let k: Vec<Vec<f32>> = (0..shape.layers)
            .map(|_| table(shape.rows * shape.kv_heads))
            .collect();
        let kv = KvShape {
            layers: shape.layers,
            kv_heads: shape.kv_heads,
            dim: DIM,
            dtype: KvDtype::F32,
        };
        let mut pool = Pool::new(kv, 64 << 20);
        let mut state = SeqState::new(kv);
        pool.reserve(&mut state.tail, shape.rows).expect("enough memory");
        let width = shape.kv_heads * DIM;
        for (layer, k) in k.iter().enumerate() {
            for (pos, row) in k.chunks_exact(width).enumerate() {
                pool.write(&state.tail, layer, pos, row, row);
            }
        }
        state.tail.commit(shape.rows);
        Self {
            geometry: Geometry {
                heads: shape.heads,
                kv_heads: shape.kv_heads,
                dim: DIM,
                scale: (DIM as f32).powf(-0.5),
                softcap: None,
                window: None,
            },
            layers: shape.layers,
            rows: shape.rows,
            queries: shape.queries,
            pool,
            state,
            q,
            k,
        }
    }

    /// What a policy sees of a layer.
    pub(crate) fn view(&self, layer: usize) -> LayerView<'_> {
        LayerView {
            layer,
            geometry: &self.geometry,
            first_cut: true,
            next: self.rows as u32,
            queries: &self.q[layer],
            state: &self.state,
            pool: &self.pool,
        }
    }

    /// Scores before the softmax of a query head of a layer, `[queries][rows]`, in f64; `None` behind the query.
    pub(crate) fn scores(&self, layer: usize, head: usize) -> Vec<Vec<Option<f64>>> {
        let g = self.geometry;
        let kv_head = head / (g.heads / g.kv_heads);
        let q = |w: usize| &self.q[layer][(w * g.heads + head) * DIM..][..DIM];
        let k = |t: usize| &self.k[layer][(t * g.kv_heads + kv_head) * DIM..][..DIM];
        let dot = |w: usize, t: usize| {
            let products = q(w).iter().zip(k(t)).map(|(a, b)| f64::from(*a) * f64::from(*b));
            products.sum::<f64>() * f64::from(g.scale)
        };
        (0..self.queries)
            .map(|w| {
                let pos = self.rows - self.queries + w;
                (0..self.rows).map(|t| (t <= pos).then(|| dot(w, t))).collect()
            })
            .collect()
    }
}

/// Rows that each KV head keeps.
pub(crate) fn kept(edit: LayerEdit, rows: usize, kv_heads: usize) -> Vec<Vec<usize>> {
    let wide = |rows: Vec<u32>| rows.into_iter().map(|r| r as usize).collect::<Vec<_>>();
    match edit {
        LayerEdit::KeepAll => vec![(0..rows).collect(); kv_heads],
        LayerEdit::Rows(rows) => vec![wide(rows); kv_heads],
        LayerEdit::Heads(heads) => heads.into_iter().map(|h| wide(h.keep)).collect(),
    }
}
