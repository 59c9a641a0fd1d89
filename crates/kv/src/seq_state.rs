//! A whole sequence: its context, its own tail, and what a cache policy does to them.

use antefix_state::PAGE_ROWS;

use crate::context::{Context, Group, Rule, SegRef};
use crate::pool::{KvError, KvShape, PageId, Pool, SeqKv};
use crate::segment::{Kind, Policy, SegmentBuilder, read_row};

/// A sequence's keys and values: shared segments, and a private tail that grows.
///
/// It must be given back with [`SeqState::release`].
#[derive(Debug)]
#[must_use = "pages are only freed by SeqState::release"]
pub struct SeqState {
    /// Rows that are appended to. Row `i` stands at position `base + i`.
    pub tail: SeqKv,
    /// Position of the tail's first row.
    pub base: u32,
    /// Tokens that stand before the tail's first; differs from `base` where positions are used more than once.
    pub before: usize,
    /// What it attends besides the tail.
    pub context: Context,
}

/// A row that a policy may keep or fold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OwnRow {
    /// Its position in the sequence.
    pub position: u32,
    /// Its log-weight; 0 for a row that stands for one token.
    pub bias: f32,
    /// Its page, and its row there.
    pub place: (PageId, usize),
}

/// What becomes of the rows of a head that are not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fold {
    /// They are dropped.
    #[default]
    Drop,
    /// Their mean stays, counting as one row.
    Mean,
    /// Their mean stays and counts as often as there were rows: log-weight `ln n` (paper `razor_attention`, 3.2).
    LnCount,
}

/// What becomes of one head's rows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HeadEdit {
    /// Rows kept: strictly ascending indices into [`SeqState::own_rows`].
    pub keep: Vec<u32>,
    /// What becomes of the others.
    pub fold: Fold,
}

/// What becomes of a layer's rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerEdit {
    /// Nothing.
    KeepAll,
    /// The same rows stay in every head; the others are dropped.
    Rows(Vec<u32>),
    /// Each head for itself, `[Hk]`.
    Heads(Vec<HeadEdit>),
}

/// What a cache policy does to one sequence. Data: [`SeqState::apply`] is the only code that moves rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit {
    /// Whose decision this is; the rows left are approximate in its name.
    pub policy: Policy,
    /// `[L]`.
    pub layers: Vec<LayerEdit>,
}

impl Edit {
    fn is_nothing(&self) -> bool {
        self.layers.iter().all(|l| *l == LayerEdit::KeepAll)
    }
}

/// Bytes of pages before and after, as the accountant counts them: whole pages, not rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compacted {
    /// Bytes in use in the pool before.
    pub bytes_before: usize,
    /// Bytes in use in the pool after.
    pub bytes_after: usize,
}

/// Why an edit cannot be applied; the sequence is unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EditError {
    /// No room for the rows that stay, which are written before the others are freed.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// The edit is for another number of layers or heads.
    #[error("an edit for {got} {what} was given, the model has {want}")]
    Shape {
        /// Layers or heads.
        what: &'static str,
        /// How many it has entries for.
        got: usize,
        /// How many there are.
        want: usize,
    },
    /// Rows are named that do not exist or do not ascend.
    #[error("layer {layer}, head {head}: kept rows must ascend and be below {rows}")]
    Rows {
        /// The layer.
        layer: usize,
        /// The KV head.
        head: usize,
        /// Its rows.
        rows: usize,
    },
}

impl SeqState {
    /// An empty sequence.
    pub fn new(shape: KvShape) -> Self {
        Self {
            tail: SeqKv::new(shape),
            base: 0,
            before: 0,
            context: Context::default(),
        }
    }

    /// Tokens whose rows are computed, kept or not.
    pub fn done(&self) -> usize {
        self.before + self.tail.len()
    }

    /// The position that the next token gets.
    pub fn next_pos(&self) -> u32 {
        self.base + self.tail.len() as u32
    }

    /// The tail, if it is the whole sequence and exact: only then may its pages enter the tree of prefixes.
    pub fn exact(&self) -> Option<&SeqKv> {
        (self.base == 0 && self.context.is_empty()).then_some(&self.tail)
    }

    /// References whose rows count as the sequence's own: plain group, own positions, nothing hidden.
    fn own_refs(&self) -> impl Iterator<Item = &SegRef> {
        let own = |r: &&SegRef| r.delta == 0 && r.rule == Rule::ByPosition && r.hidden.is_none();
        self.context
            .groups
            .iter()
            .filter(|g| g.is_plain())
            .flat_map(|g| &g.refs)
            .filter(own)
    }

    /// The rows of one (layer, KV head) that a policy may keep, in ascending position: those of plain references and the tail's.
    /// Rows under a temperature, moved or partly hidden are other people's and are never edited.
    pub fn own_rows(&self, layer: usize, head: usize) -> Vec<OwnRow> {
        let mut rows = Vec::new();
        for r in self.own_refs() {
            let run = r.segment.run(layer, head);
            rows.extend((0..run.len()).map(|row| OwnRow {
                position: run.positions().at(row),
                bias: run.bias(row),
                place: (run.page_ids()[row / PAGE_ROWS], row % PAGE_ROWS),
            }));
        }
        let pages = self.tail.pages(layer, head);
        rows.extend((0..self.tail.len()).map(|row| OwnRow {
            position: self.base + row as u32,
            bias: 0.0,
            place: (pages[row / PAGE_ROWS], row % PAGE_ROWS),
        }));
        rows.sort_by_key(|r| r.position);
        rows
    }

    /// Bytes of pages that it holds, shared ones included.
    pub fn bytes(&self, pool: &Pool) -> usize {
        self.context.page_count() * pool.shape().page_bytes() + pool.bytes_for(self.tail.room())
    }

    /// Does what `edit` says: the rows that stay move to a segment of their own, the pages of all others are freed unless
    /// somebody shares them, and the sequence goes on with an empty tail at the same next position.
    ///
    /// An edit that keeps everything changes nothing.
    ///
    /// # Errors
    /// When it does not fit the sequence or there is no room; then the sequence is as it was.
    pub fn apply(&mut self, pool: &mut Pool, edit: &Edit) -> Result<Compacted, EditError> {
        let bytes_before = pool.stats().bytes_used;
        self.check(pool.shape(), edit)?;
        if edit.is_nothing() {
            return Ok(Compacted {
                bytes_before,
                bytes_after: bytes_before,
            });
        }
        let mut builder = SegmentBuilder::new(pool.shape());
        for (layer, what) in edit.layers.iter().enumerate() {
            if let Err(error) = self.rewrite(pool, &mut builder, layer, what) {
                builder.abandon(pool);
                return Err(error.into());
            }
        }
        let segment = builder.seal(pool, Vec::new(), Kind::Approx(edit.policy.clone()));
        let (next, done) = (self.next_pos(), self.done());
        self.drop_own(pool);
        self.context
            .groups
            .insert(0, Group::plain(vec![SegRef::new(segment)]));
        (self.base, self.before) = (next, done);
        Ok(Compacted {
            bytes_before,
            bytes_after: pool.stats().bytes_used,
        })
    }

    fn check(&self, shape: KvShape, edit: &Edit) -> Result<(), EditError> {
        let fits = |what, got, want| match got == want {
            true => Ok(()),
            false => Err(EditError::Shape { what, got, want }),
        };
        fits("layers", edit.layers.len(), shape.layers)?;
        for (layer, what) in edit.layers.iter().enumerate() {
            let keeps: Vec<&[u32]> = match what {
                LayerEdit::KeepAll => continue,
                LayerEdit::Rows(keep) => vec![keep; shape.kv_heads],
                LayerEdit::Heads(heads) => {
                    fits("KV heads", heads.len(), shape.kv_heads)?;
                    heads.iter().map(|h| h.keep.as_slice()).collect()
                }
            };
            for (head, keep) in keeps.into_iter().enumerate() {
                let own: usize = self.own_refs().map(|r| r.segment.run(layer, head).len()).sum();
                let rows = own + self.tail.len();
                let ascend = keep.windows(2).all(|w| w[0] < w[1]);
                if !ascend || keep.last().is_some_and(|&last| last as usize >= rows) {
                    return Err(EditError::Rows { layer, head, rows });
                }
            }
        }
        Ok(())
    }

    /// Writes what stays of one layer.
    fn rewrite(
        &self,
        pool: &mut Pool,
        builder: &mut SegmentBuilder,
        layer: usize,
        what: &LayerEdit,
    ) -> Result<(), KvError> {
        let heads = pool.shape().kv_heads;
        let only_tail = self
            .own_refs()
            .all(|r| (0..heads).all(|h| r.segment.run(layer, h).is_empty()));
        if *what == LayerEdit::KeepAll && only_tail {
            for head in 0..heads {
                builder.share(
                    pool,
                    (layer, head),
                    self.tail.pages(layer, head),
                    self.tail.len(),
                    self.base,
                );
            }
            return Ok(());
        }
        let rows: Vec<Vec<OwnRow>> = (0..heads).map(|head| self.own_rows(layer, head)).collect();
        let edits: Vec<HeadEdit> = match what {
            LayerEdit::KeepAll => rows.iter().map(|r| keep((0..r.len() as u32).collect())).collect(),
            LayerEdit::Rows(kept) => vec![keep(kept.clone()); heads],
            LayerEdit::Heads(heads) => heads.clone(),
        };
        let sizes: Vec<usize> = edits
            .iter()
            .zip(&rows)
            .map(|(e, rows)| e.keep.len() + usize::from(folds(e, rows.len())))
            .collect();
        builder.reserve_heads(pool, layer, &sizes)?;
        for (head, (edit, rows)) in edits.iter().zip(&rows).enumerate() {
            write_head(pool, builder, (layer, head), edit, rows);
        }
        Ok(())
    }

    /// Frees the tail and the references that count as the sequence's own.
    fn drop_own(&mut self, pool: &mut Pool) {
        pool.truncate(&mut self.tail, 0);
        let mut gone = Vec::new();
        for group in self.context.groups.iter_mut().filter(|g| g.is_plain()) {
            let own = |r: &mut SegRef| r.delta == 0 && r.rule == Rule::ByPosition && r.hidden.is_none();
            gone.extend(group.refs.extract_if(.., own));
        }
        self.context.groups.retain(|g| !g.refs.is_empty());
        for r in gone {
            r.segment.release(pool);
        }
    }

    /// Forgets the tokens from position `pos` on. Returns how far back it could go: never behind the context, whose rows may stand
    /// for several tokens.
    pub fn truncate(&mut self, pool: &mut Pool, pos: u32) -> u32 {
        let rows = pos.saturating_sub(self.base) as usize;
        pool.truncate(&mut self.tail, rows);
        self.next_pos()
    }

    /// A second sequence with the same past: the context and full pages are shared.
    ///
    /// # Errors
    /// When there is no room for the copy of a partly filled page.
    pub fn fork(&self, pool: &mut Pool) -> Result<Self, KvError> {
        Ok(Self {
            tail: pool.fork(&self.tail)?,
            base: self.base,
            before: self.before,
            context: self.context.clone(),
        })
    }

    /// Gives its pages and handles back.
    pub fn release(self, pool: &mut Pool) {
        pool.release(self.tail);
        self.context.release(pool);
    }
}

fn keep(keep: Vec<u32>) -> HeadEdit {
    HeadEdit {
        keep,
        fold: Fold::Drop,
    }
}

/// Whether a folded row will stand for the rows that go.
fn folds(edit: &HeadEdit, rows: usize) -> bool {
    edit.fold != Fold::Drop && edit.keep.len() < rows
}

/// Copies the kept rows of one head, and the mean of the others at the position of the first of them.
fn write_head(
    pool: &mut Pool,
    builder: &mut SegmentBuilder,
    place: (usize, usize),
    edit: &HeadEdit,
    rows: &[OwnRow],
) {
    let mut kept = vec![false; rows.len()];
    edit.keep.iter().for_each(|&k| kept[k as usize] = true);
    let mut folded = folds(edit, rows.len()).then(|| mean(pool, rows, &kept));
    for (row, &stays) in rows.iter().zip(&kept) {
        if stays {
            builder.copy(pool, place, (row.position, row.bias), row.place);
        } else if let Some((weight, key, value)) = folded.take() {
            let bias = match edit.fold {
                Fold::LnCount => weight.ln() as f32,
                Fold::Mean | Fold::Drop => 0.0,
            };
            builder.push(pool, place, (row.position, bias), &key, &value);
        }
    }
}

/// Summed weight, mean key and mean value of the rows that are not `kept`. A row of log-weight `b` counts `e^b` times, so folding
/// what was folded before goes on with the same mean.
fn mean(pool: &Pool, rows: &[OwnRow], kept: &[bool]) -> (f64, Vec<f32>, Vec<f32>) {
    let dim = pool.shape().dim;
    let (mut weight, mut sums) = (0.0f64, vec![0.0f64; 2 * dim]);
    let (mut key, mut value) = (Vec::new(), Vec::new());
    for row in rows.iter().zip(kept).filter(|(_, kept)| !**kept).map(|(r, _)| r) {
        let w = f64::from(row.bias).exp();
        read_row(pool, row.place.0, row.place.1, &mut key, &mut value);
        weight += w;
        for (sum, x) in sums.iter_mut().zip(key.iter().chain(&value)) {
            *sum += w * f64::from(*x);
        }
    }
    let mean: Vec<f32> = sums.iter().map(|s| (s / weight) as f32).collect();
    (weight, mean[..dim].to_vec(), mean[dim..].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KvDtype;
    use proptest::prelude::*;

    const SHAPE: KvShape = KvShape {
        layers: 2,
        kv_heads: 2,
        dim: 16,
        dtype: KvDtype::F32,
    };

    /// Appends `n` tokens whose keys are their position (times 10, plus the layer) in every dimension.
    fn append(pool: &mut Pool, state: &mut SeqState, n: usize) {
        pool.reserve(&mut state.tail, n).unwrap();
        for _ in 0..n {
            for layer in 0..SHAPE.layers {
                let row = vec![(state.next_pos() * 10 + layer as u32) as f32; SHAPE.kv_heads * SHAPE.dim];
                pool.write(&state.tail, layer, state.tail.len(), &row, &row);
            }
            state.tail.commit(1);
        }
    }

    /// `(position, bias, first value of the key)` of every row of a head.
    fn rows(pool: &Pool, state: &SeqState, layer: usize, head: usize) -> Vec<(u32, f32, f32)> {
        let row = |r: &OwnRow| {
            let key = pool.page(r.place.0).key(SHAPE.dim, r.place.1, 0);
            (r.position, r.bias, key)
        };
        state.own_rows(layer, head).iter().map(row).collect()
    }

    fn edit(layers: [LayerEdit; 2]) -> Edit {
        Edit {
            policy: Policy::new("test"),
            layers: layers.into(),
        }
    }

    fn fold(keep: Vec<u32>, fold: Fold) -> HeadEdit {
        HeadEdit { keep, fold }
    }

    #[test]
    fn kept_rows_keep_their_positions_and_the_rest_is_freed() {
        let mut pool = Pool::new(SHAPE, 1 << 20);
        let mut state = SeqState::new(SHAPE);
        append(&mut pool, &mut state, 100);
        let page = SHAPE.page_bytes();
        let heads = vec![fold(vec![0, 50], Fold::Drop), fold((0..40).collect(), Fold::Drop)];
        let done = state
            .apply(
                &mut pool,
                &edit([LayerEdit::Rows(vec![1, 3, 99]), LayerEdit::Heads(heads)]),
            )
            .unwrap();
        assert_eq!(
            (done.bytes_before, done.bytes_after),
            (16 * page, (2 + 1 + 2) * page)
        );
        assert_eq!(state.bytes(&pool), done.bytes_after);
        assert_eq!((state.next_pos(), state.done(), state.tail.len()), (100, 100, 0));
        assert!(state.exact().is_none(), "what was dropped from is not exact");
        append(&mut pool, &mut state, 2);
        let want = [1, 3, 99, 100, 101].map(|p| (p, 0.0, (p * 10) as f32));
        assert_eq!(rows(&pool, &state, 0, 1), want);
        assert_eq!(rows(&pool, &state, 1, 0)[..2], [(0, 0.0, 1.0), (50, 0.0, 501.0)]);
        state.release(&mut pool);
        assert_eq!(pool.stats().bytes_used, 0);
    }

    #[test]
    fn keeping_everything_changes_nothing() {
        let mut pool = Pool::new(SHAPE, 1 << 20);
        let mut state = SeqState::new(SHAPE);
        append(&mut pool, &mut state, 45);
        let pages = state.tail.pages(1, 1).to_vec();
        let done = state
            .apply(&mut pool, &edit([LayerEdit::KeepAll, LayerEdit::KeepAll]))
            .unwrap();
        assert_eq!(done.bytes_before, done.bytes_after);
        assert_eq!((state.tail.pages(1, 1), state.tail.len()), (&pages[..], 45));
        assert!(state.exact().is_some());
        state.release(&mut pool);
    }

    #[test]
    fn a_layer_that_keeps_all_is_not_copied() {
        let mut pool = Pool::new(SHAPE, 1 << 20);
        let mut state = SeqState::new(SHAPE);
        append(&mut pool, &mut state, 45);
        let pages = state.tail.pages(1, 1).to_vec();
        state
            .apply(&mut pool, &edit([LayerEdit::Rows(vec![7]), LayerEdit::KeepAll]))
            .unwrap();
        let segment = &state.context.groups[0].refs[0].segment;
        assert_eq!(segment.run(1, 1).page_ids(), pages);
        assert_eq!(rows(&pool, &state, 1, 1).len(), 45);
        state.release(&mut pool);
        assert_eq!(pool.stats().bytes_used, 0);
    }

    #[test]
    fn an_edit_that_does_not_fit_leaves_the_sequence_alone() {
        let mut pool = Pool::new(SHAPE, 17 * SHAPE.page_bytes());
        let mut state = SeqState::new(SHAPE);
        append(&mut pool, &mut state, 100);
        let used = pool.stats().bytes_used;
        let before = rows(&pool, &state, 0, 0);
        let bad = [
            edit([LayerEdit::Rows(vec![3, 3]), LayerEdit::KeepAll]),
            edit([LayerEdit::Rows(vec![100]), LayerEdit::KeepAll]),
            edit([LayerEdit::Heads(Vec::new()), LayerEdit::KeepAll]),
            // Fits, but there is no room to write it.
            edit([LayerEdit::Rows((0..99).collect()), LayerEdit::KeepAll]),
        ];
        for bad in bad {
            state.apply(&mut pool, &bad).unwrap_err();
            assert_eq!(pool.stats().bytes_used, used);
            assert_eq!(rows(&pool, &state, 0, 0), before);
        }
        state.release(&mut pool);
    }

    #[test]
    fn folding_in_two_steps_is_folding_at_once() {
        let mut pool = Pool::new(SHAPE, 1 << 20);
        let mut steps = SeqState::new(SHAPE);
        append(&mut pool, &mut steps, 90);
        let mut once = steps.fork(&mut pool).unwrap();
        let heads = |keep: Vec<u32>| LayerEdit::Heads(vec![fold(keep, Fold::LnCount); 2]);
        let both = |keep: Vec<u32>| edit([heads(keep.clone()), heads(keep)]);
        // Rows 2..50 first; then the folded row, which now is row 2, and rows 50..70.
        steps
            .apply(&mut pool, &both([0, 1].into_iter().chain(50..90).collect()))
            .unwrap();
        assert_eq!(rows(&pool, &steps, 0, 0)[2], (2, 48f32.ln(), 255.0));
        steps
            .apply(&mut pool, &both([0, 1].into_iter().chain(23..43).collect()))
            .unwrap();
        once.apply(&mut pool, &both([0, 1].into_iter().chain(70..90).collect()))
            .unwrap();
        for (a, b) in rows(&pool, &steps, 1, 1).iter().zip(rows(&pool, &once, 1, 1)) {
            assert!(
                (a.1 - b.1).abs() < 1e-5 && (a.2 - b.2).abs() < 1e-3 && a.0 == b.0,
                "{a:?} {b:?}"
            );
        }
        steps.release(&mut pool);
        once.release(&mut pool);
        assert_eq!(pool.stats().bytes_used, 0);
    }

    #[test]
    fn rows_may_be_folded_in_any_order() {
        let mut pool = Pool::new(SHAPE, 1 << 20);
        let mut whole = SeqState::new(SHAPE);
        append(&mut pool, &mut whole, 90);
        let heads = |keep: Vec<u32>| LayerEdit::Heads(vec![fold(keep, Fold::LnCount); 2]);
        // Positions that go in each step; the row of those before goes with them.
        let orders: [&[&[u32]]; 4] = [
            &[&[2, 40], &[40, 60]],
            &[&[40, 60], &[2, 40]],
            &[&[20, 40], &[40, 60], &[2, 20]],
            &[&[2, 60]],
        ];
        for order in orders {
            let mut state = whole.fork(&mut pool).unwrap();
            let mut folded = None;
            for span in order {
                let rows = state.own_rows(0, 0).into_iter().enumerate();
                let stays =
                    |r: &OwnRow| !(span[0]..span[1]).contains(&r.position) && Some(r.position) != folded;
                let keep: Vec<u32> = rows.filter(|(_, r)| stays(r)).map(|(i, _)| i as u32).collect();
                state
                    .apply(&mut pool, &edit([heads(keep.clone()), heads(keep)]))
                    .unwrap();
                folded = Some(folded.map_or(span[0], |at: u32| at.min(span[0])));
            }
            let rows = rows(&pool, &state, 1, 0);
            assert_eq!(rows.len(), 90 - 58 + 1);
            // 58 rows, whose keys are 10 times their positions, and 1.
            let (position, bias, key) = rows[2];
            assert_eq!(position, 2);
            assert!(
                (bias - 58f32.ln()).abs() < 1e-5 && (key - 306.0).abs() < 1e-2,
                "{bias} {key}"
            );
            state.release(&mut pool);
        }
        whole.release(&mut pool);
        assert_eq!(pool.stats().bytes_used, 0);
    }

    #[test]
    fn truncation_stops_at_the_context_and_forks_share_it() {
        let mut pool = Pool::new(SHAPE, 1 << 20);
        let mut state = SeqState::new(SHAPE);
        append(&mut pool, &mut state, 40);
        state
            .apply(
                &mut pool,
                &edit([LayerEdit::Rows(vec![0]), LayerEdit::Rows(vec![0])]),
            )
            .unwrap();
        append(&mut pool, &mut state, 10);
        let twin = state.fork(&mut pool).unwrap();
        assert_eq!(state.truncate(&mut pool, 45), 45);
        assert_eq!(
            state.truncate(&mut pool, 7),
            40,
            "no further back than the context"
        );
        state.release(&mut pool);
        assert_eq!(rows(&pool, &twin, 0, 0).len(), 11);
        twin.release(&mut pool);
        assert_eq!(pool.stats().bytes_used, 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        /// Any sequence of appends, edits and rollbacks leaves the rows that a plain list would have, and no page behind.
        #[test]
        fn edits_do_to_pages_what_they_do_to_a_list(steps in prop::collection::vec((0usize..40, any::<u64>()), 1..8)) {
            let mut pool = Pool::new(SHAPE, 1 << 22);
            let mut state = SeqState::new(SHAPE);
            let mut model: Vec<Vec<u32>> = vec![Vec::new(); 4];
            for (n, bits) in steps {
                let from = state.next_pos();
                append(&mut pool, &mut state, n);
                model.iter_mut().for_each(|m| m.extend(from..from + n as u32));
                let keep = |at: usize| -> Vec<u32> {
                    let rows = 0..model[at].len() as u32;
                    rows.filter(|r| (bits.rotate_left(at as u32 * 7) >> (r % 61)) & 1 == 1).collect()
                };
                let keeps: Vec<Vec<u32>> = (0..4).map(keep).collect();
                let layer = |l: usize| match bits >> (60 + l) & 1 {
                    0 => LayerEdit::KeepAll,
                    _ => LayerEdit::Heads((0..2).map(|h| fold(keeps[l * 2 + h].clone(), Fold::Drop)).collect()),
                };
                let edit = edit([layer(0), layer(1)]);
                for (at, model) in model.iter_mut().enumerate() {
                    if matches!(edit.layers[at / 2], LayerEdit::Heads(_)) {
                        *model = keeps[at].iter().map(|&r| model[r as usize]).collect();
                    }
                }
                state.apply(&mut pool, &edit).unwrap();
                for (at, model) in model.iter().enumerate() {
                    let got: Vec<u32> = rows(&pool, &state, at / 2, at % 2).iter().map(|r| r.0).collect();
                    prop_assert_eq!(&got, model);
                }
            }
            state.release(&mut pool);
            prop_assert_eq!(pool.stats().bytes_used, 0);
        }
    }
}
