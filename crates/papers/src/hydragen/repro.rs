//! The paper's throughput at batch 32, measured again: many sequences behind one prompt, shared and unshared.

use serde_json::json;

use crate::repro::{Claim, Judgement, Lab, LabError, Outcome, Repro, SMOLLM2, Scale, Together, Verdict, row};

/// The claim.
pub static REPRO: Repro = Repro {
    claim: Claim {
        slug: "hydragen",
        says: "Batch 32 behind a shared prefix of 1K, 2K and 4K tokens decodes 1.18, 1.36 and 1.73 times as fast as with attention that \
                reads the prefix for every sequence, with the same output (CodeLlama-13B: 2.0, 1.9, 1.9 against 1.7, 1.4, 1.1 thousand tokens/s).",
        source: "Juravsky et al., table of throughputs at batch 32, Hydragen against FlashAttention.",
        rule: "Reproduced if both ways write the same tokens and the longest prefix gains at least what the paper gains there; partly if the \
               tokens are the same and the gain is at least 1.05.",
        model: SMOLLM2,
        fast_model: SMOLLM2,
    },
    run,
};

/// Gains of the paper by prefix.
const PAPER: [(usize, f64); 3] = [(1024, 1.18), (2048, 1.36), (4096, 1.73)];
/// A gain below this is noise.
const LEAST: f64 = 1.05;
const BATCH: usize = 32;

fn run(lab: &mut dyn Lab, scale: Scale) -> Result<Outcome, LabError> {
    let (prefixes, steps) = scale.pick((&[256, 1024][..], 16), (&[1024, 2048, 4096][..], 48));
    let found = prefixes
        .iter()
        .map(|&prefix| lab.together(prefix, BATCH, steps))
        .collect::<Result<Vec<_>, _>>()?;
    let longest = &found[found.len() - 1];
    Ok(Outcome {
        unit: "decoded tokens a second of all sequences at the longest prefix",
        measured: longest.shared_tok_s,
        baseline: longest.unshared_tok_s,
        scale: format!("prefixes of {prefixes:?} tokens, batch {BATCH}, {steps} steps in turns"),
        judgement: judge(&found),
        rows: found.iter().map(|t| row(json!({}), t)).collect(),
    })
}

/// `found`: by prefix, ascending; at least one.
fn judge(found: &[Together]) -> Judgement {
    let longest = &found[found.len() - 1];
    // The paper's gain at the longest of its prefixes that is not longer than ours.
    let at = PAPER.iter().rev().find(|p| p.0 <= longest.prefix);
    let want = at.map_or(PAPER[0].1, |p| p.1);
    let same = found.iter().all(|t| t.same_tokens);
    let verdict = match longest.ratio {
        _ if !same => Verdict::Not,
        ratio if ratio >= want => Verdict::Reproduced,
        ratio if ratio >= LEAST => Verdict::Partly,
        _ => Verdict::Not,
    };
    let gains: Vec<String> = found
        .iter()
        .map(|t| format!("{:.2} at {}", t.ratio, t.prefix))
        .collect();
    let tokens = if same { "the same tokens" } else { "other tokens" };
    Judgement {
        verdict,
        why: format!(
            "a step is {} tokens times as fast, {want} is asked at {}; {tokens}",
            gains.join(", "),
            longest.prefix
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(prefix: usize, ratio: f64, same_tokens: bool) -> Together {
        Together {
            prefix,
            batch: BATCH,
            shared_tok_s: 100.0 * ratio,
            unshared_tok_s: 100.0,
            ratio,
            same_tokens,
        }
    }

    #[test]
    fn the_verdict_follows_the_gain_at_the_longest_prefix() {
        let verdict = |ratio, same| judge(&[found(1024, 1.0, true), found(4096, ratio, same)]).verdict;
        assert_eq!(verdict(1.73, true), Verdict::Reproduced);
        assert_eq!(verdict(1.72, true), Verdict::Partly);
        assert_eq!(verdict(1.05, true), Verdict::Partly);
        assert_eq!(verdict(1.04, true), Verdict::Not);
        assert_eq!(verdict(9.0, false), Verdict::Not);
    }

    #[test]
    fn a_short_prefix_is_held_to_the_paper_s_shortest() {
        assert_eq!(judge(&[found(256, 1.18, true)]).verdict, Verdict::Reproduced);
        assert_eq!(judge(&[found(256, 1.17, true)]).verdict, Verdict::Partly);
    }
}
