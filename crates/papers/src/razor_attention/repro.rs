//! Needles after 70 % of the cache is gone, when the question was not known: the paper's heads against recent rows and random rows.

use serde_json::json;

use crate::repro::{
    Claim, HeadSearch, Judgement, Lab, LabError, Outcome, PROFILE, Quiz, Recall, Repro, SMOLLM2, Scale,
    Verdict, Way, alone, enough, row,
};

/// The claim.
pub static REPRO: Repro = Repro {
    claim: Claim {
        slug: "razor_attention",
        says: "More than 70 % of the cache goes without noticeable loss (LongBench 35.87 of 36.03 for Qwen1.5-7B), better than StreamingLLM at the same \
                size, and what stays does not depend on the question.",
        source: "Tang et al., abstract and section 4.",
        rule: "Three parts, the question asked after the cut: at most 35 % of the bytes are kept; recall is within 0.05 of dense; recall is at least 0.1 over \
               StreamingLLM's at no fewer bytes. All: reproduced; the last and another: partly; else not. A dense recall below 0.5 says nothing.",
        model: SMOLLM2,
        fast_model: SMOLLM2,
    },
    run,
};

const KEPT: f64 = 0.35;
const LOSS: f64 = 0.05;
const OVER: f64 = 0.1;

fn run(lab: &mut dyn Lab, scale: Scale) -> Result<Outcome, LabError> {
    let length = scale.pick(2048, 4096);
    for kind in ["induction", "echo"] {
        lab.heads(&HeadSearch {
            kind,
            runs: scale.pick(2, 3),
            lengths: &[256],
            seed: 1,
        })?;
    }
    let quiz = Quiz {
        task: "needle",
        length,
        depths: &[0.1, 0.3, 0.5, 0.7],
        samples: scale.pick(2, 4),
        digits: 3,
        seed: 1,
        question_after_cut: true,
        reuse_prompts: true,
    };
    let razor = |heads: &str| format!("razor_attention,buffer=64,fraction=0.2,{heads}profile={PROFILE}");
    let rows_kept = (length as f64 * KEPT) as usize;
    let names = [
        "dense".to_string(),
        razor(""),
        format!("streaming_llm,budget={rows_kept}"),
        format!("snapkv,budget={rows_kept}"),
        format!("random_kv,budget={rows_kept}"),
        razor("compensation=none,"),
        razor("induction=0.3,"),
        razor("induction=0.5,"),
    ];
    let ways = alone(&names);
    let ways: Vec<Way<'_>> = ways.iter().map(Option::as_slice).collect();
    let found = lab.recall(&quiz, &ways)?;
    let (dense, ours, streaming) = (&found[0], &found[1], &found[2]);
    enough("dense recall", dense.accuracy)?;
    let mut judgement = judge(dense, ours, streaming);
    judgement.why += &format!(
        "; snapkv {:.2}, random {:.2}; with more heads {:.2} at {:.2} of the bytes, {:.2} at {:.2}",
        found[3].accuracy,
        found[4].accuracy,
        found[6].accuracy,
        found[6].kept,
        found[7].accuracy,
        found[7].kept
    );
    Ok(Outcome {
        unit: "needle recall, question after the cut (baseline: StreamingLLM)",
        measured: ours.accuracy,
        baseline: streaming.accuracy,
        scale: format!("{} needles of 3 digits in {length} tokens", ours.n),
        judgement,
        rows: found
            .iter()
            .zip(&names)
            .map(|(r, name)| row(json!({"method": name}), r))
            .collect(),
    })
}

fn judge(dense: &Recall, ours: &Recall, streaming: &Recall) -> Judgement {
    let small = ours.kept <= KEPT;
    let same = ours.accuracy >= dense.accuracy - LOSS;
    let better = ours.accuracy >= streaming.accuracy + OVER && streaming.kept >= ours.kept - 0.01;
    let verdict = match [small, same, better] {
        [true, true, true] => Verdict::Reproduced,
        [true, _, true] | [_, true, true] => Verdict::Partly,
        _ => Verdict::Not,
    };
    Judgement {
        verdict,
        why: format!(
            "recall {:.2} with {:.2} of the bytes, dense {:.2}, StreamingLLM {:.2} with {:.2}",
            ours.accuracy, ours.kept, dense.accuracy, streaming.accuracy, streaming.kept
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recall(accuracy: f64, kept: f64) -> Recall {
        Recall {
            n: 16,
            accuracy,
            kept,
            ttft_s: 1.0,
        }
    }

    #[test]
    fn small_same_and_better_are_the_three_parts() {
        let verdict = |accuracy, kept, streaming| {
            judge(
                &recall(0.9, 1.0),
                &recall(accuracy, kept),
                &recall(streaming, 0.36),
            )
            .verdict
        };
        assert_eq!(verdict(0.85, 0.35, 0.7), Verdict::Reproduced);
        assert_eq!(verdict(0.84, 0.35, 0.7), Verdict::Partly);
        assert_eq!(verdict(0.85, 0.36, 0.7), Verdict::Partly);
        assert_eq!(verdict(0.84, 0.36, 0.7), Verdict::Not);
        assert_eq!(verdict(0.85, 0.35, 0.76), Verdict::Not);
    }

    #[test]
    fn a_baseline_with_fewer_bytes_proves_nothing() {
        let found = judge(&recall(0.9, 1.0), &recall(0.9, 0.3), &recall(0.1, 0.2));
        assert_eq!(found.verdict, Verdict::Not);
    }
}
