//! razor_attention: which heads retrieve, and what the others keep.

use super::*;

#[test]
fn it_conforms() {
    antefix_conformance::method::check(&RazorAttention);
}

#[test]
fn shares_are_rounded_and_ties_count() {
    // Layer 1 has a window and takes no part.
    let score = vec![vec![0.1, 0.9], vec![1.0, 1.0], vec![0.5, 0.5]];
    let full = [0, 2];
    assert_eq!(retrieval_heads(&score, &full, 0.25), [(0, 1)]);
    assert_eq!(
        retrieval_heads(&score, &full, 0.5),
        [(0, 1), (2, 0), (2, 1)],
        "both tie with the last"
    );
    assert_eq!(retrieval_heads(&score, &full, 0.01), [(0, 1)], "at least one");
    assert_eq!(retrieval_heads(&score, &full, 0.0), []);
    assert_eq!(retrieval_heads(&score, &full, 1.0).len(), 4);
}

fn razor(buffer: usize, fraction: f64) -> Razor {
    Razor {
        retrieval: Vec::new(),
        sinks: 4,
        buffer,
        fraction,
        fold: Fold::LnCount,
        every: None,
    }
}

#[test]
fn others_keep_sinks_and_a_buffer_that_grows_with_the_prompt() {
    let r = razor(100, 0.2);
    assert_eq!((r.recent(300), r.recent(1000)), (100, 200));
    assert_eq!(r.keep(105, 105), None, "the row between would be its own mean");
    let keep = r.keep(106, 106).expect("two rows between");
    assert_eq!((keep.len(), keep[3], keep[4]), (104, 3, 6));
    let keep = r.keep(1000, 1000).expect("cut");
    assert_eq!((keep.len(), keep[4], keep[203]), (204, 800, 999));
}
