//! The paper's two figures, measured again: time to the first token, and what computing 15 % of the rows again mends.

use serde_json::json;

use crate::repro::{
    Claim, Judgement, Lab, LabError, Library, Outcome, Repro, Reuse, SMOLLM2, Scale, Verdict, row,
};

/// The claim.
pub static REPRO: Repro = Repro {
    claim: Claim {
        slug: "cacheblend",
        says: "Computing 15 % of the rows again brings the first token 2.2 to 3.3 times earlier than full prefill, and closes the gap in \
                quality to it that full reuse leaves (0.15 to 0.35 F1 or Rouge-L) to 0.02.",
        source: "Yao et al., evaluation on four data sets with three models, read in digests of the paper.",
        rule: "Two parts: at least 2.2 times faster than full prefill; at most half of full reuse's KL divergence from full prefill. Both: \
               reproduced; one: partly.",
        model: SMOLLM2,
        fast_model: SMOLLM2,
    },
    run,
};

const FASTER: f64 = 2.2;
const OF_REUSE: f64 = 0.5;
/// Shares of rows that are computed again: full reuse, the paper's, and two that tell where quality comes back.
const WAYS: [&str; 4] = [
    "cacheblend,ratio=0",
    "cacheblend",
    "cacheblend,ratio=0.5",
    "cacheblend,ratio=1",
];

fn run(lab: &mut dyn Lab, scale: Scale) -> Result<Outcome, LabError> {
    let library = Library {
        documents: 4,
        tokens: scale.pick(256, 512),
        question: 64,
        answer: 1,
        prompts: scale.pick(3, 10),
        seed: 1,
    };
    let found = lab.reuse(&library, &WAYS)?;
    let of = |way: &str| {
        found
            .iter()
            .find(|r| r.way == way)
            .cloned()
            .ok_or_else(|| LabError::Failed(format!("`{way}` was not measured")))
    };
    let (full, blend) = (of("full")?, of("cacheblend")?);
    let others = [of(WAYS[0])?, of(WAYS[2])?, of(WAYS[3])?];
    Ok(Outcome {
        unit: "seconds to the first token (baseline: full prefill)",
        measured: blend.ttft_s,
        baseline: full.ttft_s,
        scale: format!(
            "{} prompts of {} documents of {} tokens and a question of {}",
            library.prompts, library.documents, library.tokens, library.question
        ),
        judgement: judge(&blend, &others),
        rows: found.iter().map(|r| row(json!({}), r)).collect(),
    })
}

/// `others`: full reuse, half of the rows, all rows.
fn judge(blend: &Reuse, [reuse, half, all]: &[Reuse; 3]) -> Judgement {
    let fast = blend.speedup >= FASTER;
    let mended = blend.kl <= OF_REUSE * reuse.kl;
    Judgement {
        verdict: Verdict::of(&[fast, mended]),
        why: format!(
            "{:.1} times faster ({FASTER} is asked); KL {:.3} against {:.3} of full reuse (half is asked), {:.3} with half of the rows, {:.3} \
             with all",
            blend.speedup, blend.kl, reuse.kl, half.kl, all.kl
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speed_and_quality_are_the_two_parts() {
        let others = [
            Reuse::made_up(100, 9.0, 0.4),
            Reuse::made_up(100, 1.5, 0.1),
            Reuse::made_up(100, 1.0, 0.0),
        ];
        let verdict = |speedup, kl| judge(&Reuse::made_up(100, speedup, kl), &others).verdict;
        assert_eq!(verdict(2.2, 0.2), Verdict::Reproduced);
        assert_eq!(verdict(2.19, 0.2), Verdict::Partly);
        assert_eq!(verdict(2.2, 0.21), Verdict::Partly);
        assert_eq!(verdict(2.19, 0.21), Verdict::Not);
    }
}
