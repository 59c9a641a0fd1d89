//! Likelihood beyond the trained window, without training: the larger base with and without the scale on the scores.

use serde_json::json;

use crate::repro::{
    Claim, Judgement, Lab, LabError, Outcome, Passages, Repro, SMOLLM2, Scale, Stretch, Verdict, row,
};

/// The claim.
pub static REPRO: Repro = Repro {
    claim: Claim {
        slug: "entropy_abf",
        says: "A larger rotary base and scores that sharpen with the number of keys carry a model beyond its window (4K to 16K with 100 samples of \
                fine-tuning), and better than the larger base alone.",
        source: "Zhang et al., abstract and section 4; here without the fine-tuning.",
        rule: "Two parts: beyond the window the loss is at most 0.3 nats over that of the second half of the window; it is below that of the larger base alone. Both: \
               reproduced; one: partly. Where the model as it is loses less than 0.3 nats there is nothing to mend.",
        model: SMOLLM2,
        fast_model: SMOLLM2,
    },
    run,
};

const HOLDS: f64 = 0.3;
const WAYS: [&[&str]; 5] = [
    &[],
    &["entropy_abf"],
    &["entropy_abf,parts=base_only"],
    &["yarn"],
    &["ntk_aware"],
];

fn run(lab: &mut dyn Lab, scale: Scale) -> Result<Outcome, LabError> {
    let window = lab.facts().context;
    let text = Passages {
        texts: scale.pick(1, 2),
        length: scale.pick(window / 8 * 13, 2 * window),
        step: window / 8,
        seed: 1,
    };
    let ways = scale.pick(&WAYS[..3], &WAYS[..]);
    let found = lab.likelihood(&text, ways)?;
    let near = over(&found[0], window / 2, window);
    let far: Vec<f64> = found.iter().map(|s| over(s, window, text.length)).collect();
    if far[0] - near < HOLDS {
        return Err(LabError::Model(format!(
            "the model as it is loses {:.2} nats beyond its window",
            far[0] - near
        )));
    }
    let mut rows = Vec::new();
    for (stretches, way) in found.iter().zip(ways) {
        let name = way.first().unwrap_or(&"dense");
        rows.extend(stretches.iter().map(|s| row(json!({"method": name}), s)));
    }
    Ok(Outcome {
        unit: "loss beyond the window, nats a token (baseline: the model as it is)",
        measured: far[1],
        baseline: far[0],
        scale: format!("{} texts of {} tokens, window {window}", text.texts, text.length),
        judgement: judge(near, &far),
        rows,
    })
}

/// Mean loss of the positions from `from` to `to`.
fn over(stretches: &[Stretch], from: usize, to: usize) -> f64 {
    let inside = stretches
        .iter()
        .filter(|s| s.positions.start >= from && s.positions.end <= to);
    let (sum, n) = inside.fold((0.0, 0), |(sum, n), s| (sum + s.nll * s.n as f64, n + s.n));
    sum / n.max(1) as f64
}

/// Losses: inside the window as it is; beyond it as it is, with the method, with the base alone, with others.
fn judge(near: f64, far: &[f64]) -> Judgement {
    let others: Vec<String> = far[3..]
        .iter()
        .map(|x| format!(", {x:.2} with another scaling"))
        .collect();
    Judgement {
        verdict: Verdict::of(&[far[1] - near <= HOLDS, far[1] < far[2]]),
        why: format!(
            "loss {near:.2} inside the window; beyond it {:.2} as it is, {:.2} with the method, {:.2} with the base alone{others}",
            far[0],
            far[1],
            far[2],
            others = others.concat()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holding_and_beating_the_base_are_the_two_parts() {
        let verdict = |method, base| judge(2.0, &[5.0, method, base, 2.5]).verdict;
        assert_eq!(verdict(2.25, 2.26), Verdict::Reproduced);
        assert_eq!(verdict(2.25, 2.25), Verdict::Partly);
        assert_eq!(verdict(2.35, 2.36), Verdict::Partly);
        assert_eq!(verdict(2.35, 2.35), Verdict::Not);
    }

    #[test]
    fn stretches_are_weighed_by_their_tokens() {
        let stretch = |from: usize, n: usize, nll: f64| Stretch {
            positions: from..from + 10,
            n,
            nll,
        };
        let all = [stretch(0, 10, 9.0), stretch(10, 30, 1.0), stretch(20, 10, 5.0)];
        assert!((over(&all, 10, 30) - 2.0).abs() < 1e-12);
        assert!((over(&all, 0, 10) - 9.0).abs() < 1e-12);
    }
}
