use std::sync::Arc;

use antefix_attention::hooks::{HookPlan, HookSpec, Observer, Positions, Probe, Sources};
use antefix_attention::readout::Reads;
use antefix_conformance::tiny;
use antefix_engine::Session;
use antefix_kernels::cpu::Cpu;
use antefix_models::spec::Arch;
use antefix_papers::heads::HeadTest;
use antefix_papers::retrieval_heads::mask::Mask;

use super::*;

fn subject(arch: Arch) -> Subject {
    let (model, tokenizer) = tiny(arch, Cpu::best(), 2);
    Subject {
        model,
        tokenizer,
        name: "tiny".into(),
        sha256: String::new(),
    }
}

/// Attention rows `[L][Hq][T]` of all tokens, dense, by probes that keep the weights.
fn dense(subject: &Subject, tokens: &[u32]) -> Vec<Vec<Vec<Vec<f32>>>> {
    let spec = HookSpec {
        probes: vec![Probe {
            id: String::new(),
            layers: None,
            heads: None,
            positions: Positions::All,
            read: Reads {
                weights: true,
                ..Reads::default()
            },
        }],
        ..HookSpec::default()
    };
    let plan = HookPlan::compile(&spec, subject.model.hook_shape(), &Sources::default()).expect("it runs");
    let observer = Arc::new(Observer::new(Arc::new(plan), tokens.len(), 1 << 30));
    let mut session = Session::new(Arc::clone(&subject.model), tokens.len(), 64);
    session.observe(Some(Arc::clone(&observer)));
    session.feed(tokens, 0, &mut Vec::new()).expect("it runs");
    let model = subject.model.spec();
    let mut all = vec![vec![Vec::new(); model.heads]; model.layers];
    for reading in observer.take_readings().remove(0).1 {
        let row = |r: &antefix_attention::readout::RowReading| {
            let (first, weights) = r.weights.clone().expect("it runs");
            [vec![0.0; first as usize], weights].concat()
        };
        all[reading.layer][reading.head] = reading.rows.iter().map(row).collect();
    }
    all
}

#[test]
fn patterns_are_means_over_the_dense_rows() {
    const SEGMENT: usize = 40;
    for arch in [Arch::Qwen2, Arch::Gemma3] {
        let subject = subject(arch);
        let random = patterns::random_tokens(&subject, SEGMENT, 3);
        let bos = subject.tokenizer.bos().or(subject.tokenizer.eos()).unwrap();
        let tokens: Vec<u32> = std::iter::once(bos)
            .chain((0..4).flat_map(|_| random.clone()))
            .collect();
        let rows = dense(&subject, &tokens);
        let weight = |row: &[f32], j: usize| f64::from(row.get(j).copied().unwrap_or(0.0));
        for kind in [
            Pattern::Induction,
            Pattern::Echo,
            Pattern::Sink,
            Pattern::Previous,
        ] {
            let test = pattern(&subject, kind, SEGMENT, 3..4).unwrap();
            for (l, layer) in rows.iter().enumerate() {
                for (h, head) in layer.iter().enumerate() {
                    let mut sum = 0.0;
                    for i in SEGMENT..4 * SEGMENT {
                        let row = &head[i + 1];
                        sum += match kind {
                            Pattern::Sink => (0..4).map(|j| weight(row, j)).sum::<f64>(),
                            Pattern::Previous => weight(row, i),
                            Pattern::Echo => {
                                (1..=i / SEGMENT).map(|m| weight(row, i - m * SEGMENT + 1)).sum()
                            }
                            Pattern::Induction => {
                                (1..=i / SEGMENT).map(|m| weight(row, i - m * SEGMENT + 2)).sum()
                            }
                        };
                    }
                    let want = sum / (3 * SEGMENT) as f64;
                    assert!(
                        (f64::from(test.score[l][h]) - want).abs() < 1e-5,
                        "{arch:?} {kind:?} {l} {h}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_model_that_does_not_answer_gives_an_error_and_no_table() {
    let subject = subject(Arch::Llama);
    let runs = NeedleRuns {
        lengths: vec![400],
        depths: vec![0.5],
        runs: 2,
        seed: 1,
    };
    let mut seen = Vec::new();
    let error = retrieval(&subject, &runs, Vec::new(), &mut |run| seen.push(run.clone())).unwrap_err();
    assert!(
        matches!(error, HeadsError::NoRuns(_)),
        "random weights answer nothing: {error}"
    );
    assert_eq!(seen.len(), 2);
    assert!(
        seen.iter()
            .all(|r| !r.accepted && r.tokens <= 400 && r.tokens > 300)
    );
    // The same seed makes the same runs.
    let mut again = Vec::new();
    let _ = retrieval(&subject, &runs, Vec::new(), &mut |run| again.push(run.clone()));
    assert_eq!(seen, again);
    // What is done is not made again, and rows of other settings are refused.
    let mut rest = Vec::new();
    let _ = retrieval(&subject, &runs, seen[..1].to_vec(), &mut |run| {
        rest.push(run.clone())
    });
    assert_eq!(rest, seen[1..]);
    let other = NeedleRuns { seed: 2, ..runs };
    let error = retrieval(&subject, &other, seen, &mut |_| ()).unwrap_err();
    assert!(matches!(error, HeadsError::OtherRuns { run: 0 }), "{error}");
}

#[test]
fn impossible_lengths_are_refused() {
    let subject = subject(Arch::Llama);
    for length in [100, 1 << 20] {
        let runs = NeedleRuns {
            lengths: vec![length],
            depths: vec![0.5],
            runs: 1,
            seed: 1,
        };
        assert!(matches!(
            retrieval(&subject, &runs, Vec::new(), &mut |_| ()),
            Err(HeadsError::Length { .. })
        ));
    }
}

#[test]
fn masks_name_their_heads_and_random_ones_leave_the_best_out() {
    let subject = subject(Arch::Llama);
    let spec = subject.model.spec();
    let test = HeadTest {
        name: "retrieval".into(),
        what: String::new(),
        runs: 1,
        accepted: 1,
        tokens: [0, 0],
        seed: 0,
        score: (0..spec.layers)
            .map(|l| (0..spec.heads).map(|h| (l * spec.heads + h) as f32).collect())
            .collect(),
        active: None,
        half_spearman: None,
    };
    let curve = MaskCurve {
        runs: NeedleRuns {
            lengths: vec![400],
            depths: vec![0.0],
            runs: 1,
            seed: 2,
        },
        counts: vec![0, 1],
        draws: 2,
        mode: Mask::Zero,
    };
    let points = masking(&subject, &test, &curve, &mut |_| ()).unwrap();
    let shape: Vec<_> = points
        .iter()
        .map(|p| (p.which, p.draw, p.heads, p.prompts))
        .collect();
    assert_eq!(
        shape,
        [
            ("top", 0, 0, 1),
            ("top", 0, 1, 1),
            ("random", 0, 1, 1),
            ("random", 1, 1, 1)
        ]
    );
}

/// A measurement that ranks the heads of every layer from the last to the first.
fn semantic(subject: &Subject) -> HeadTest {
    let spec = subject.model.spec();
    HeadTest {
        name: "semantic".into(),
        what: "made up".into(),
        runs: 1,
        accepted: 1,
        tokens: [1, 1],
        seed: 0,
        score: vec![(0..spec.heads).map(|h| h as f32).collect(); spec.layers],
        active: None,
        half_spearman: None,
    }
}

#[test]
fn eviction_keeps_the_rows_of_the_reference_and_costs_nothing_where_all_stay() {
    use antefix_papers::compresskv::reference;
    let subject = subject(Arch::Llama);
    let prompt = patterns::random_tokens(&subject, 200, 5);
    let heads = subject.model.spec().heads;
    let layers = subject.model.spec().layers;
    let voters = vec![vec![heads - 1, 0]; layers];
    let found = eviction::one(&subject, &prompt, Cut::PAPER, &voters).unwrap();
    assert!(found.rows > 0 && found.sums.iter().all(|e| *e > 0.0), "{found:?}");
    let rows = dense(&subject, &prompt);
    for (layer, kept) in found.kept.iter().enumerate() {
        // The last 8 rows of the two voters.
        let window = |head: usize| -> Vec<Vec<f64>> {
            let whole = |row: &Vec<f32>| {
                let mut row: Vec<f64> = row.iter().map(|w| f64::from(*w)).collect();
                row.resize(200, 0.0);
                row
            };
            rows[layer][head][192..].iter().map(whole).collect()
        };
        let want = reference::keep(&[window(heads - 1), window(0)], 32, 5);
        let got: Vec<usize> = kept.iter().map(|&r| r as usize).collect();
        assert_eq!(got, want, "layer {layer}");
    }
    let all = Cut {
        budget: 200,
        ..Cut::PAPER
    };
    let none = eviction::one(&subject, &prompt, all, &voters).unwrap();
    assert_eq!(none.rows, found.rows, "the answer is that of the whole cache");
    for (none, some) in none.sums.iter().zip(&found.sums) {
        // What is left is rounding: weights are computed again, in another order.
        assert!(none * 20.0 < *some, "{none} beside {some}");
    }
}

#[test]
fn eviction_is_a_share_of_each_layer_and_layers_with_a_window_have_none() {
    let subject = subject(Arch::Gemma3);
    let runs = NeedleRuns {
        lengths: vec![400],
        depths: vec![0.5],
        runs: 2,
        seed: 1,
    };
    let mut seen = 0;
    let test = eviction(&subject, &runs, &semantic(&subject), Cut::PAPER, &mut |n| {
        seen = n
    })
    .unwrap();
    assert_eq!((seen, test.runs, test.name.as_str()), (2, 2, "eviction"));
    let spec = subject.model.spec();
    let mut sum = 0.0;
    for (layer, row) in test.score.iter().enumerate() {
        assert!(row.iter().all(|e| *e == row[0]), "one value a layer");
        assert_eq!(
            row[0] > 0.0,
            spec.layer_kinds[layer].window.is_none(),
            "layer {layer}: {row:?}"
        );
        sum += row[0];
    }
    assert!((sum - 1.0).abs() < 1e-5, "{sum}");
    let again = eviction(&subject, &runs, &semantic(&subject), Cut::PAPER, &mut |_| ()).unwrap();
    assert_eq!(again, test, "the same seed, the same figures");
}
