//! The paper's speed and its gain over plain parallel encoding, measured again on passages that were computed before.

use serde_json::json;

use crate::repro::{
    Claim, Judgement, Lab, LabError, Library, Outcome, Repro, Reuse, SMOLLM2, Scale, Verdict, row,
};

/// The claim.
pub static REPRO: Repro = Repro {
    claim: Claim {
        slug: "ape",
        says: "Passages that were computed once cut prefill by up to 28 times and the time to the end by up to 4.5 times (128K tokens, H100), and temperature and scale win back quality that \
                plain parallel encoding loses (3.6 points on retrieval, 7.9 on examples), up to 98 % of sequential encoding.",
        source: "Yang et al., abstract and section 5.",
        rule: "Three parts: with 8,000 tokens the first token comes 28 times earlier, and an answer of 32 tokens is there 4.5 times earlier, both in proportion \
               with fewer; the KL divergence from sequential encoding is at most 0.9 of plain parallel encoding's. All: reproduced; some: partly.",
        model: SMOLLM2,
        fast_model: SMOLLM2,
    },
    run,
};

/// The paper's figures; at 128K tokens there, asked here from this length on.
const FASTEST: f64 = 28.0;
const FASTER_END: f64 = 4.5;
const AT: f64 = 8000.0;
const ANSWER: usize = 32;
const OF_PLAIN: f64 = 0.9;
const QUESTION: usize = 64;
const PLAIN: &str = "ape,T=1,S=1";

fn run(lab: &mut dyn Lab, scale: Scale) -> Result<Outcome, LabError> {
    let library = Library {
        documents: scale.pick(4, 8),
        // Eight of 1,000 and an answer are just inside the window of SmolLM2.
        tokens: scale.pick(512, 1000),
        question: QUESTION,
        answer: ANSWER,
        prompts: scale.pick(2, 5),
        seed: 1,
    };
    let found = lab.reuse(&library, &[PLAIN, "ape"])?;
    let of = |way: &str| {
        found
            .iter()
            .find(|r| r.way == way)
            .cloned()
            .ok_or_else(|| LabError::Failed(format!("`{way}` was not measured")))
    };
    let (full, plain, ape) = (of("full")?, of(PLAIN)?, of("ape")?);
    Ok(Outcome {
        unit: "seconds to the first token (baseline: sequential encoding)",
        measured: ape.ttft_s,
        baseline: full.ttft_s,
        scale: format!(
            "{} prompts of {} passages of {} tokens, a question of {QUESTION} and an answer of {ANSWER}",
            library.prompts, library.documents, library.tokens
        ),
        judgement: judge(&ape, &plain),
        rows: found.iter().map(|r| row(json!({}), r)).collect(),
    })
}

fn judge(ape: &Reuse, plain: &Reuse) -> Judgement {
    let share = (ape.tokens as f64 / AT).min(1.0);
    let (asked, end) = (FASTEST * share, FASTER_END * share);
    let fast = ape.speedup >= asked;
    let soon = ape.end_speedup >= end;
    let better = ape.kl <= OF_PLAIN * plain.kl;
    Judgement {
        verdict: Verdict::of(&[fast, soon, better]),
        why: format!(
            "first token {:.1} times earlier ({asked:.1} is asked of {} tokens), {ANSWER} tokens {:.1} times ({end:.1}); KL {:.3} against {:.3} of plain \
             parallel encoding ({OF_PLAIN} of it is asked)",
            ape.speedup, ape.tokens, ape.end_speedup, ape.kl, plain.kl
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_times_and_quality_are_the_three_parts() {
        let plain = Reuse::made_up(2000, 9.9, 1.0);
        let verdict = |speedup, end_speedup, kl| {
            let ape = Reuse {
                end_speedup,
                ..Reuse::made_up(2000, speedup, kl)
            };
            judge(&ape, &plain).verdict
        };
        assert_eq!(verdict(7.0, 1.125, 0.9), Verdict::Reproduced);
        assert_eq!(verdict(6.9, 1.125, 0.9), Verdict::Partly);
        assert_eq!(verdict(7.0, 1.12, 0.9), Verdict::Partly);
        assert_eq!(verdict(7.0, 1.125, 0.91), Verdict::Partly);
        assert_eq!(verdict(6.9, 1.12, 0.91), Verdict::Not);
    }

    #[test]
    fn long_prompts_are_held_to_the_paper_s_figure() {
        let plain = Reuse::made_up(64_000, 30.0, 1.0);
        assert_eq!(
            judge(&Reuse::made_up(64_000, 28.0, 0.5), &plain).verdict,
            Verdict::Reproduced
        );
        assert_eq!(
            judge(&Reuse::made_up(64_000, 27.9, 0.5), &plain).verdict,
            Verdict::Partly
        );
    }
}
