//! Documents once and twice, with the whole cache and with a small one.

use serde_json::json;

use crate::repro::{
    Claim, Judgement, Lab, LabError, Outcome, Quiz, Recall, Repro, SMOLLM2, Scale, Verdict, mean, row,
};

/// The claim.
pub static REPRO: Repro = Repro {
    claim: Claim {
        slug: "jrt",
        says: "Writing the context twice gains 11.0 (± 1.3) points of recall, mean of 16 recurrent models on six tasks.",
        source: "Arora et al., abstract. Recurrent models have a memory of fixed size; ours is a cache cut to 128 rows a head.",
        rule: "Mean over the tasks, documents twice against once: reproduced from 0.11 on with the small cache; partly from 0.03 on with the small cache, or from \
               0.11 on with the whole cache only.",
        model: SMOLLM2,
        fast_model: SMOLLM2,
    },
    run,
};

const PAPER: f64 = 0.11;
const LEAST: f64 = 0.03;
const CUT: &str = "snapkv,budget=128,window=8";
const TASKS: [&str; 3] = ["needle-keys", "lookup", "two-hop"];
const WAYS: [&[&str]; 6] = [
    &[CUT],
    &["jrt", CUT],
    &[],
    &["jrt"],
    &["jrt,times=1,question_first=true", CUT],
    &["jrt,times=1,question_first=true"],
];

fn run(lab: &mut dyn Lab, scale: Scale) -> Result<Outcome, LabError> {
    let mut rows = Vec::new();
    let mut found: Vec<Vec<Recall>> = Vec::new();
    let (length, samples) = scale.pick((512, 3), (1024, 16));
    for task in TASKS {
        let quiz = Quiz {
            task,
            length,
            depths: &[0.3, 0.7],
            samples,
            digits: 3,
            seed: 1,
            question_after_cut: false,
            reuse_prompts: false,
        };
        let recalls = lab.recall(&quiz, &WAYS)?;
        for (recall, way) in recalls.iter().zip(WAYS) {
            rows.push(row(json!({"task": task, "method": way.join(" + ")}), recall));
        }
        found.push(recalls);
    }
    let of = |way: usize| mean(found.iter().map(|task| task[way].accuracy));
    let times = mean(found.iter().map(|task| task[3].ttft_s / task[2].ttft_s));
    let mut judgement = judge([of(0), of(1)], [of(2), of(3)]);
    judgement.why += &format!(
        "; once with the question in front {:.2} and {:.2}; twice costs {times:.1} times the time to the first token",
        of(4),
        of(5)
    );
    Ok(Outcome {
        unit: "recall with the small cache, documents twice (baseline: once)",
        measured: of(1),
        baseline: of(0),
        scale: format!("{TASKS:?}, {samples} samples a place, {length} tokens"),
        judgement,
        rows,
    })
}

/// Recall once and twice, with the small cache and with the whole.
fn judge(small: [f64; 2], whole: [f64; 2]) -> Judgement {
    let gain = |[once, twice]: [f64; 2]| twice - once;
    let verdict = match [gain(small), gain(whole)] {
        [small, _] if small >= PAPER => Verdict::Reproduced,
        [small, whole] if small >= LEAST || whole >= PAPER => Verdict::Partly,
        _ => Verdict::Not,
    };
    Judgement {
        verdict,
        why: format!(
            "recall once and twice: {:.2} and {:.2} with the small cache, {:.2} and {:.2} with the whole",
            small[0], small[1], whole[0], whole[1]
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_follows_the_gains() {
        let verdict = |small, whole| judge([0.25, small], [0.25, whole]).verdict;
        assert_eq!(verdict(0.375, 0.25), Verdict::Reproduced);
        assert_eq!(verdict(0.35, 0.25), Verdict::Partly);
        assert_eq!(verdict(0.29, 0.25), Verdict::Partly);
        assert_eq!(verdict(0.27, 0.35), Verdict::Not);
        assert_eq!(verdict(0.1, 0.375), Verdict::Partly);
    }
}
