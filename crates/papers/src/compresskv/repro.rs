//! Needles at a small budget: rows chosen by semantic retrieval heads against SnapKV and the other baselines.

use serde_json::json;

use crate::repro::{
    Belief, Claim, HeadSearch, Judgement, Lab, LabError, Outcome, PROFILE, Quiz, Recall, Repro, SMOLLM2,
    Scale, Verdict, Way, alone, enough, mean, mean_and_error, row,
};

/// The claim.
pub static REPRO: Repro = Repro {
    claim: Claim {
        slug: "compresskv",
        says: "With 256 rows a layer it keeps 95 % of the full cache's quality (46.71 of 49.08 on LongBench, Llama-3.1-8B), more than SnapKV (45.21), \
                PyramidKV (44.36) and StreamingLLM (33.92); needles are found as with the full cache.",
        source: "Lin et al., table of LongBench averages and needle figures.",
        rule: "Three parts at equal budgets: recall at least 0.95 of dense; the log-probability of the right answers above SnapKV's by more than twice the \
               standard error of the pairs; recall at least 0.1 over StreamingLLM's. All: reproduced; some: partly. A dense recall below 0.5 says nothing.",
        model: SMOLLM2,
        fast_model: SMOLLM2,
    },
    run,
};

const OF_DENSE: f64 = 0.95;
const OVER_STREAMING: f64 = 0.1;
const ERRORS: f64 = 2.0;

fn run(lab: &mut dyn Lab, scale: Scale) -> Result<Outcome, LabError> {
    let search = HeadSearch {
        kind: "semantic",
        // The runs of `retrieval_heads`: one detection serves both.
        runs: scale.pick(18, 60),
        lengths: scale.pick(&[256, 512], &[512, 1024, 2048]),
        seed: 1,
    };
    let heads = lab.heads(&search)?;
    let (length, budget) = scale.pick((1024, 64), (2048, 128));
    let quiz = Quiz {
        task: "needle",
        length,
        depths: &[0.1, 0.3, 0.5, 0.7],
        samples: scale.pick(3, 6),
        digits: 3,
        seed: 1,
        question_after_cut: false,
        reuse_prompts: true,
    };
    let names = [
        "dense".to_string(),
        format!("compresskv,budget={budget},profile={PROFILE}"),
        // The same window: half of a small budget would go into SnapKV's own of 32 rows.
        format!("snapkv,budget={budget},window=8"),
        format!("streaming_llm,budget={budget}"),
        format!("pyramidkv,budget={budget},window=8"),
        format!("random_kv,budget={budget},window=8"),
        format!("snapkv,budget={budget}"),
        format!("h2o,budget={budget}"),
    ];
    let ways = alone(&names);
    let ways: Vec<Way<'_>> = ways.iter().map(Option::as_slice).collect();
    let found = lab.recall(&quiz, &ways)?;
    enough("dense recall", found[0].accuracy)?;
    let beliefs = lab.beliefs(&quiz, &ways[..4])?;
    let mut rows: Vec<_> = found
        .iter()
        .zip(&names)
        .map(|(r, name)| row(json!({"method": name}), r))
        .collect();
    for (beliefs, name) in beliefs.iter().zip(&names) {
        rows.push(json!({
            "method": name, "log_p": mean(beliefs.iter().map(|b| b.log_p)), "kl": mean(beliefs.iter().map(|b| b.kl)),
            "top1": mean(beliefs.iter().map(|b| b.top1)),
        }));
    }
    rows.push(json!({"accepted": heads.accepted, "runs": heads.runs}));
    Ok(Outcome {
        unit: "needle recall (baseline: SnapKV at the same budget)",
        measured: found[1].accuracy,
        baseline: found[2].accuracy,
        scale: format!(
            "{} needles of 3 digits in {length} tokens, {budget} rows a layer",
            found[1].n
        ),
        judgement: judge(&found, &beliefs[1], &beliefs[2]),
        rows,
    })
}

/// `found`: dense, compresskv, snapkv, streaming, and others; beliefs of the second and the third.
fn judge(found: &[Recall], ours: &[Belief], snapkv: &[Belief]) -> Judgement {
    let pairs: Vec<f64> = ours.iter().zip(snapkv).map(|(a, b)| a.log_p - b.log_p).collect();
    let (gain, error) = mean_and_error(&pairs);
    let parts = [
        found[1].accuracy >= OF_DENSE * found[0].accuracy,
        gain > ERRORS * error,
        found[1].accuracy >= found[3].accuracy + OVER_STREAMING,
    ];
    Judgement {
        verdict: Verdict::of(&parts),
        why: format!(
            "recall {:.2} with {:.2} of the bytes, dense {:.2}, SnapKV {:.2}, StreamingLLM {:.2}; log-probability of the answers {gain:+.3} ± {error:.3} \
             against SnapKV",
            found[1].accuracy, found[1].kept, found[0].accuracy, found[2].accuracy, found[3].accuracy
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recalls(ours: f64, streaming: f64) -> Vec<Recall> {
        [1.0, ours, 0.5, streaming]
            .map(|accuracy| Recall {
                n: 8,
                accuracy,
                kept: 0.1,
                ttft_s: 1.0,
            })
            .to_vec()
    }

    fn beliefs(log_p: [f64; 4]) -> Vec<Belief> {
        log_p
            .map(|log_p| Belief {
                log_p,
                kl: 0.1,
                top1: 1.0,
                kept: 0.1,
            })
            .to_vec()
    }

    #[test]
    fn quality_and_two_baselines_are_the_three_parts() {
        let snapkv = beliefs([-1.0; 4]);
        let verdict =
            |ours, streaming, log_p| judge(&recalls(ours, streaming), &beliefs(log_p), &snapkv).verdict;
        let (clear, unclear) = ([-0.5, -0.6, -0.5, -0.6], [-0.5, -1.4, -0.6, -1.3]);
        assert_eq!(verdict(0.95, 0.85, clear), Verdict::Reproduced);
        assert_eq!(verdict(0.94, 0.84, clear), Verdict::Partly);
        assert_eq!(verdict(0.95, 0.85, unclear), Verdict::Partly);
        assert_eq!(verdict(0.95, 0.86, clear), Verdict::Partly);
        assert_eq!(verdict(0.5, 0.5, unclear), Verdict::Not);
    }
}
