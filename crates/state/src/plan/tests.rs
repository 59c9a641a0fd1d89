use super::*;
use proptest::prelude::*;

fn plan(cover: Cover) -> Plan {
    Plan {
        unit: Unit::KvGroup,
        scope: Scope::Causal,
        units: vec![cover],
    }
}

fn rows(cover: Cover) -> Rows {
    match cover {
        Cover::Sparse(rows) => rows,
        Cover::Dense => panic!("everything is kept"),
    }
}

/// What the blocks of `queries` keep under `sets`, from the definition.
fn kept(block: u32, queries: &Range<u32>, sets: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let first = queries.start / block;
    let one = |(i, set): (usize, &Vec<u32>)| {
        let start = ((first + i as u32) * block).max(queries.start);
        let end = ((first + i as u32 + 1) * block).min(queries.end);
        let mut keys: Vec<u32> = set
            .iter()
            .copied()
            .filter(|&k| k < start)
            .chain(start..end)
            .collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    };
    sets.iter().enumerate().map(one).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn covers_keep_exactly_their_sets_and_stay_in_normal_form(
        p0 in 0u32..70, n in 1u32..90, many in prop::bool::ANY,
        seed in prop::collection::vec(prop::collection::vec(0u32..200, 0..60), 12)
    ) {
        let queries = p0..p0 + n;
        let blocks = (p0 + n).div_ceil(16) - p0 / 16;
        let sets: Vec<Vec<u32>> = (0..blocks)
            .map(|i| if many { (0..200).filter(|k| k % 7 != i % 7).collect() } else { seed[i as usize % 12].clone() })
            .collect();
        let cover = Cover::from_sets(16, queries.clone(), &sets);
        plan(cover.clone()).validate(queries.clone()).unwrap();
        prop_assert_eq!(&cover.coalesce(queries.clone()), &cover);
        let want = kept(16, &queries, &sets);
        let causal = |keys: &[u32], at: Range<u32>| -> u64 {
            at.map(|q| keys.iter().filter(|&&k| k <= q).count() as u64).sum()
        };
        match &cover {
            Cover::Dense => prop_assert!(want.iter().all(|keys| keys.len() as u32 == keys[keys.len() - 1] + 1)),
            Cover::Sparse(rows) => {
                for (i, want) in want.iter().enumerate() {
                    prop_assert_eq!(&rows.keys(i), want);
                    let bits = rows.page_bits(i);
                    let from_bits: Vec<u32> = (0..bits.len() as u32 * 32).filter(|&k| bits[k as usize / 32] >> (k % 32) & 1 == 1).collect();
                    prop_assert_eq!(&from_bits, want);
                }
                let pairs: u64 = (0..rows.blocks()).map(|i| causal(&want[i], rows.queries_of(i, &queries))).sum();
                prop_assert_eq!(rows.pairs(queries.clone()), pairs);
            }
        }
        let other = Cover::from_sets(16, queries.clone(), &sets.iter().rev().cloned().collect::<Vec<_>>());
        let both: Vec<Vec<u32>> = sets.iter().zip(sets.iter().rev()).map(|(a, b)| [a.clone(), b.clone()].concat()).collect();
        prop_assert_eq!(cover.union(&other, queries.clone()), Cover::from_sets(16, queries, &both));
    }
}

#[test]
fn everything_is_dense() {
    let all: Vec<Vec<u32>> = vec![(0..64).collect(); 4];
    assert_eq!(Cover::from_sets(16, 0..64, &all), Cover::Dense);
    assert_eq!(
        Cover::from_blocks(16, 32..64, 32, &[vec![0], vec![0, 1]]),
        Cover::Dense
    );
    assert!((Plan::dense(Unit::KvGroup, 3).density(0..64) - 1.0).abs() < 1e-12);
    // Without the first key of the last block, 16 of 64 * 65 / 2 pairs are missing.
    let sets = [vec![], (0..16).collect(), (0..32).collect(), (1..48).collect()];
    let plan = plan(Cover::from_sets(16, 0..64, &sets));
    assert_eq!(plan.pairs(0..64), (2080 - 16, 2080));
}

#[test]
fn the_a_shape_keeps_sinks_window_and_diagonal() {
    let rows = rows(Cover::a_shape(16, 64..80, 4, 8));
    assert_eq!(rows.keys(0), (0..4).chain(56..80).collect::<Vec<_>>());
    assert!(matches!(
        rows.segs[..],
        [
            Seg::Gather { len: 4, .. },
            Seg::Span {
                start: 56,
                end: 80,
                edge: Edge::Causal
            }
        ]
    ));
}

#[test]
fn each_broken_rule_is_named() {
    let good = rows(Cover::a_shape(16, 64..80, 4, 8));
    let rule = |rows: &Rows, queries: Range<u32>| {
        let error = plan(Cover::Sparse(rows.clone())).validate(queries).unwrap_err();
        assert!(error.to_string().starts_with("unit 0, block"), "{error}");
        error.rule
    };
    let mut bad = good.clone();
    bad.idx[1] = 0;
    assert!(rule(&bad, 64..80).contains("strictly ascending"));
    let mut bad = good.clone();
    bad.segs[1] = Seg::Span {
        start: 70,
        end: 80,
        edge: Edge::Causal,
    };
    assert!(rule(&bad, 64..80).contains("whole diagonal"));
    let mut bad = good.clone();
    bad.segs.pop();
    bad.offsets[1] = 1;
    assert!(rule(&bad, 64..80).contains("its own key"));
    let mut bad = good.clone();
    bad.segs[0] = Seg::Gather { at: u32::MAX, len: 2 };
    assert!(rule(&bad, 64..80).contains("inside the index list"));
    let mut bad = good.clone();
    bad.segs[0] = Seg::Span {
        start: 60,
        end: 64,
        edge: Edge::Full,
    };
    assert!(rule(&bad, 64..80).contains("disjoint"));
    assert!(rule(&good, 64..97).contains("every block"));
    assert!(rule(&good, 80..96).contains("first query"));
    let two = Plan {
        units: vec![Cover::Dense; 3],
        ..plan(Cover::Dense)
    };
    assert!(two.fits(6, 3).is_ok() && two.fits(6, 2).is_err());
}
