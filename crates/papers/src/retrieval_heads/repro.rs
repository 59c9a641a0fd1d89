//! Few heads retrieve, and without them needles are lost: detection and the masking experiment of the paper.

use serde_json::json;

use crate::repro::{
    Claim, HeadSearch, Judgement, Lab, LabError, Masked, Outcome, QWEN, Repro, Scale, Verdict, enough, row,
};

/// The claim.
pub static REPRO: Repro = Repro {
    claim: Claim {
        slug: "retrieval_heads",
        says: "Less than 5 % of the heads retrieve (score 0.1 or more); with the best 3 % of all heads switched off needles are lost, with as many random \
                heads they are not.",
        source: "Wu et al., sections 2 and 4 (Llama-2-7B and others; the best 30 of 1,024 heads).",
        rule: "Three parts: at most 5 % of the heads score 0.1 or more; the best heads' absence costs at least half of the recall; that of as many random heads \
               costs at most a quarter of it. All: reproduced; some: partly. A recall below 0.5 with all heads says nothing.",
        model: QWEN,
        fast_model: QWEN,
    },
    run,
};

const SPARSE: f64 = 0.05;
const SCORE: f32 = 0.1;
const LOST: f64 = 0.5;
const HARDLY: f64 = 0.25;
/// The paper's best 30 of 1,024.
const SHARE: f64 = 0.03;

fn run(lab: &mut dyn Lab, scale: Scale) -> Result<Outcome, LabError> {
    let search = HeadSearch {
        kind: "retrieval",
        runs: scale.pick(18, 60),
        lengths: scale.pick(&[256, 512], &[512, 1024, 2048]),
        seed: 1,
    };
    let test = lab.heads(&search)?;
    let ranking = test.ranking();
    let all = ranking.len();
    let over = ranking.iter().filter(|r| r.score >= SCORE).count() as f64 / all as f64;
    let count = ((all as f64 * SHARE).round() as usize).max(1);
    let counts: Vec<usize> = [0, 1, 2, 4, 8, 16, 32]
        .into_iter()
        .filter(|&n| n < count)
        .chain([count])
        .collect();
    let counts = scale.pick(vec![0, count], counts);
    let prompts = HeadSearch {
        runs: scale.pick(8, 18),
        // Not the prompts that the heads were found with.
        seed: 7919,
        ..search.clone()
    };
    let found = lab.mask(&test, &prompts, &counts, scale.pick(2, 5))?;
    let recall = |which: &str, heads: usize| {
        found
            .iter()
            .find(|m| m.which == which && m.heads == heads)
            .map(|m: &Masked| m.recall)
            .ok_or_else(|| LabError::Failed(format!("{which} {heads} was not measured")))
    };
    let (dense, top, random) = (recall("top", 0)?, recall("top", count)?, recall("random", count)?);
    enough("with all heads its recall", dense)?;
    let names = json!({"accepted": test.accepted, "runs": test.runs, "over_0.1": over, "half_spearman": test.half_spearman});
    let mut rows = vec![names];
    rows.extend(found.iter().map(|m| row(json!({}), m)));
    Ok(Outcome {
        unit: "needle recall with the best 3 % of the heads switched off (baseline: as many random heads)",
        measured: top,
        baseline: random,
        scale: format!(
            "{} detection runs and {} masking prompts of {:?} tokens, {count} of {all} heads off",
            search.runs, prompts.runs, search.lengths
        ),
        judgement: judge(over, dense, top, random),
        rows,
    })
}

/// `over`: share of heads over the score; recalls with all heads, without the best, without random ones.
fn judge(over: f64, dense: f64, top: f64, random: f64) -> Judgement {
    let parts = [
        over <= SPARSE,
        dense - top >= LOST * dense,
        dense - random <= HARDLY * dense,
    ];
    Judgement {
        verdict: Verdict::of(&parts),
        why: format!(
            "{:.1} % of the heads score {SCORE} or more; recall {dense:.2} with all heads, {top:.2} without the best, {random:.2} without random ones",
            over * 100.0
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_causal_and_specific_are_the_three_parts() {
        let verdict = |over, top, random| judge(over, 1.0, top, random).verdict;
        assert_eq!(verdict(0.05, 0.5, 0.75), Verdict::Reproduced);
        assert_eq!(verdict(0.06, 0.5, 0.75), Verdict::Partly);
        assert_eq!(verdict(0.05, 0.51, 0.75), Verdict::Partly);
        assert_eq!(verdict(0.05, 0.5, 0.74), Verdict::Partly);
        assert_eq!(verdict(0.06, 0.51, 0.74), Verdict::Not);
    }
}
