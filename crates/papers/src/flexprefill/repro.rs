//! The paper's faster prefill without loss, measured again: prompts of two lengths, and fixed budgets and a window at equal density.

use crate::repro::{
    Claim, Judgement, Lab, LabError, Outcome, Prefill, QWEN, Repro, SMOLLM2, Scale, Verdict, between,
    prefill, rows, speedup,
};

/// The claim.
pub static REPRO: Repro = Repro {
    claim: Claim {
        slug: "flexprefill",
        says: "Attention of a prompt of 128K tokens takes 271 instead of 659 ms with gamma = 0.95 (2.43 times faster), 186 ms with 0.9, and the longer the prompt \
                the more is gained; nothing is lost (RULER 89.2, dense 88.7), unlike with MInference's fixed budgets (85.4) or StreamingLLM (61.6).",
        source: "Lai et al., tables of latency and of RULER for Llama-3.1-8B, read in digests of the paper.",
        rule: "Three parts, gamma = 0.95, prompts of two lengths of real text: at the longer one attention with planning is at least twice as fast as dense, and more \
               so than at the shorter one; there the predictions at the last 256 positions are within 0.05 nats (KL) of dense ones; and nearer than \
               MInference's and a window's at as many pairs, on the lines between measured points. All: reproduced; some: partly.",
        model: QWEN,
        fast_model: SMOLLM2,
    },
    run,
};

const SPEEDUP: f64 = 2.0;
const KL: f64 = 0.05;
/// Settings of each baseline, as shares of the keys, and of the blocks.
const SHARES: [f64; 3] = [0.03, 0.06, 0.125];
const KEPT: [f64; 3] = [0.08, 0.16, 0.3];

fn run(lab: &mut dyn Lab, scale: Scale) -> Result<Outcome, LabError> {
    let length = scale.pick(3072, 16384).min(lab.facts().context);
    let base = scale.pick("flexprefill,min_budget=256", "flexprefill");
    let part = |share: f64| (share * length as f64) as usize;
    let ours = [0.95, 0.9].map(|gamma| format!("{base},gamma={gamma}"));
    let minference = SHARES.map(|share| format!("minference,share={share}"));
    let window = KEPT.map(|share| format!("a_shape,window={}", part(share)));
    let kept = scale.pick(&[][..], &KEPT);
    let blocks: Vec<_> = kept
        .iter()
        .map(|&share| format!("block_topk,keep={}", (part(share) / 64).max(2)))
        .collect();
    let short = prefill(lab, length / 2, &ours[..1])?;
    let long = prefill(lab, length, &[&ours[..], &minference, &window, &blocks].concat())?;
    let baselines: Vec<&[Prefill]> = long[1 + ours.len()..].chunks(SHARES.len()).collect();
    let mut judgement = judge([&short, &long[..2]], [baselines[0], baselines[1]]);
    if let Some(blocks) = baselines.get(2) {
        let kl = at(blocks, long[1].density).map_or("-".into(), |kl| format!("{kl:.4}"));
        judgement.why += &format!("; best blocks by means {kl}");
    }
    judgement.why += &format!(
        "; gamma 0.9: {:.2} times, KL {:.4}",
        speedup(&long[0], &long[2]),
        long[2].kl
    );
    Ok(Outcome {
        unit: "seconds of attention at the longer length, planning included (baseline: dense)",
        measured: long[1].attn_s,
        baseline: long[0].attn_s,
        scale: format!("prompts of {} and {length} tokens", length / 2),
        judgement,
        rows: [rows(&short), rows(&long)].concat(),
    })
}

/// The KL divergence of a swept baseline at this density; that of its sparsest setting if all read more. Nothing if all read less.
fn at(sweep: &[Prefill], density: f64) -> Option<f64> {
    let least = sweep.iter().map(|p| p.density).fold(f64::INFINITY, f64::min);
    between(sweep.iter().map(|p| (p.density, p.kl)), density.max(least))
}

/// Of each length: dense, and the method. Baselines: MInference, a window.
fn judge(lengths: [&[Prefill]; 2], baselines: [&[Prefill]; 2]) -> Judgement {
    let [before, after] = lengths.map(|found| speedup(&found[0], &found[1]));
    let ours = &lengths[1][1];
    let others = baselines.map(|sweep| at(sweep, ours.density));
    let fast = after >= SPEEDUP && after > before;
    let near = ours.kl <= KL;
    let nearer = others.iter().all(|kl| kl.is_some_and(|kl| ours.kl < kl));
    let [minference, window] = others.map(|kl| kl.map_or("-".into(), |kl| format!("{kl:.4}")));
    Judgement {
        verdict: Verdict::of(&[fast, near, nearer]),
        why: format!(
            "attention {after:.2} times as fast at {}, {before:.2} at {} ({SPEEDUP} is asked); KL {:.4} ({KL} is asked), the same token at {:.3} of the positions, \
             with {:.3} of the pairs; at as many MInference {minference}, a window {window}",
            ours.length, lengths[0][0].length, ours.kl, ours.top1, ours.density
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repro::made;

    fn verdict(before: f64, after: f64, kl: f64, window: [f64; 2]) -> Verdict {
        let dense = made(1.0, 1.0, 1.0, 0.0);
        let ours = |faster: f64| made(1.0 / faster, 0.3, 0.9, kl);
        let minference = [made(0.5, 0.2, 0.9, 0.09), made(0.5, 0.4, 0.9, 0.05)];
        let window = [made(0.5, window[0], 0.5, window[1])];
        let lengths = [[dense.clone(), ours(before)], [dense, ours(after)]];
        judge([&lengths[0], &lengths[1]], [&minference, &window]).verdict
    }

    #[test]
    fn faster_near_and_nearer_than_others_are_the_three_parts() {
        assert_eq!(verdict(1.5, 2.01, 0.05, [0.3, 0.2]), Verdict::Reproduced);
        assert_eq!(verdict(1.5, 1.99, 0.05, [0.3, 0.2]), Verdict::Partly);
        assert_eq!(verdict(2.1, 2.05, 0.05, [0.3, 0.2]), Verdict::Partly);
        assert_eq!(verdict(1.5, 2.01, 0.06, [0.3, 0.2]), Verdict::Partly);
        assert_eq!(verdict(1.5, 2.01, 0.05, [0.3, 0.04]), Verdict::Partly);
        // MInference has 0.07 between its points.
        assert_eq!(verdict(1.5, 1.9, 0.071, [0.3, 0.2]), Verdict::Not);
        assert_eq!(verdict(1.5, 1.9, 0.069, [0.3, 0.2]), Verdict::Partly);
    }

    #[test]
    fn a_baseline_that_reads_less_proves_nothing_and_one_that_reads_more_does() {
        assert_eq!(verdict(1.5, 1.9, 0.06, [0.29, 0.2]), Verdict::Not);
        assert_eq!(verdict(1.5, 1.9, 0.06, [0.5, 0.2]), Verdict::Partly);
    }
}
