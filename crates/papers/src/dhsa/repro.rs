//! The paper's gain over blocks of equal size, measured again with boundaries that need no training.

use crate::repro::{
    Claim, Judgement, Lab, LabError, Outcome, Prefill, QWEN, Repro, SMOLLM2, Scale, Verdict, between,
    prefill, rows,
};

/// The claim.
pub static REPRO: Repro = Repro {
    claim: Claim {
        slug: "dhsa",
        says: "Chunks that follow the text, by a trained predictor, are 6 to 18 % better on needles and LongBench than block-sparse attention at comparable cost, as \
                good as dense on needles, and bring the first token 20 to 60 % earlier than dense attention (Gemma-2-2B).",
        source: "Xiong et al., abstracts of both versions, and the needle heat map.",
        rule: "No predictor is published and none is trained here: chunks by the angle between keys (boundaries=cosine) can show a part of the claim at most. Two \
               parts, on one prompt of real text: the first token comes at least 20 % earlier than with dense attention; the KL divergence from dense \
               predictions is at most 0.94 of that of blocks of equal size (block_topk) with as many pairs, on the line between measured points. Both: partly; \
               else: not.",
        model: QWEN,
        fast_model: SMOLLM2,
    },
    run,
};

const EARLIER: f64 = 0.2;
const NEARER: f64 = 0.94;
/// Kept blocks of the baseline, as shares of all.
const KEPT: [f64; 3] = [0.04, 0.12, 0.3];

fn run(lab: &mut dyn Lab, scale: Scale) -> Result<Outcome, LabError> {
    let length = scale.pick(3072, 16384).min(lab.facts().context);
    let blocks = KEPT.map(|share| {
        format!(
            "block_topk,keep={}",
            ((share * length as f64) as usize / 64).max(2)
        )
    });
    let ours = ["dhsa", "dhsa,boundaries=fixed", "dhsa,norm=mean", "dhsa,rule=vs"].map(str::to_string);
    let found = prefill(lab, length, &[&ours[..], &blocks].concat())?;
    let (dense, ours, blocks) = (&found[0], &found[1..=ours.len()], &found[1 + ours.len()..]);
    let at = |density| between(blocks.iter().map(|p| (p.density, p.kl)), density);
    let mut judgement = judge(dense, &ours[0], at(ours[0].density));
    let others = ["chunks of equal length", "means not scaled by length", "rule=vs"];
    for (name, p) in others.iter().zip(&ours[1..]) {
        judgement.why += &format!("; {name}: KL {:.4} with {:.3} of the pairs", p.kl, p.density);
    }
    Ok(Outcome {
        unit: "KL divergence from dense predictions, nats (baseline: blocks of equal size)",
        measured: ours[0].kl,
        baseline: at(ours[0].density).unwrap_or(f64::NAN),
        scale: format!("one prompt of {length} tokens"),
        judgement,
        rows: rows(&found),
    })
}

/// `blocks`: the KL divergence of blocks with as many pairs as `ours`, if they were measured around there.
fn judge(dense: &Prefill, ours: &Prefill, blocks: Option<f64>) -> Judgement {
    let earlier = 1.0 - ours.ttft_s / dense.ttft_s;
    let nearer = blocks.is_some_and(|kl| ours.kl <= NEARER * kl);
    let verdict = match earlier >= EARLIER && nearer {
        true => Verdict::Partly,
        false => Verdict::Not,
    };
    Judgement {
        verdict,
        why: format!(
            "no trained predictor; first token {:.0} % earlier ({:.0} is asked); with {:.3} of the pairs KL {:.4}, blocks of equal size {} ({NEARER} of it is \
             asked); the same token as dense at {:.3} of the positions, recall {:.3}",
            100.0 * earlier,
            100.0 * EARLIER,
            ours.density,
            ours.kl,
            blocks.map_or("-".into(), |kl| format!("{kl:.4}")),
            ours.top1,
            ours.recall
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repro::made;

    fn verdict(ttft_s: f64, kl: f64, blocks: Option<f64>) -> Verdict {
        let dense = made(1.0, 1.0, 1.0, 0.0);
        let ours = Prefill {
            ttft_s,
            ..made(0.5, 0.2, 0.9, kl)
        };
        judge(&dense, &ours, blocks).verdict
    }

    #[test]
    fn earlier_and_nearer_than_blocks_prove_a_part_and_nothing_proves_more() {
        // Dense attention takes 2 s.
        assert_eq!(verdict(1.59, 0.093, Some(0.1)), Verdict::Partly);
        assert_eq!(verdict(0.1, 0.0, Some(0.1)), Verdict::Partly);
        assert_eq!(verdict(1.61, 0.093, Some(0.1)), Verdict::Not);
        assert_eq!(verdict(1.59, 0.095, Some(0.1)), Verdict::Not);
        assert_eq!(verdict(1.59, 0.093, None), Verdict::Not);
    }
}
