//! A claim of the paper, measured again at our scale.

use crate::repro::{Claim, Judgement, Lab, LabError, Outcome, Repro, Scale, Verdict, SMOLLM2};

/// The claim.
pub static REPRO: Repro = Repro {
    claim: Claim {
        slug: "{{slug}}",
        says: "",
        source: "",
        rule: "",
        model: SMOLLM2,
        fast_model: SMOLLM2,
    },
    run,
};

fn run(_lab: &mut dyn Lab, _scale: Scale) -> Result<Outcome, LabError> {
    // Measure the method and its baseline through `lab`, then hand their figures to `judge`.
    Err(LabError::Failed("it is not written yet".into()))
}

/// The verdict by the rule, out of the method's figure and the baseline's.
#[expect(dead_code, reason = "until `run` measures something")]
fn judge(measured: f64, baseline: f64) -> Judgement {
    Judgement {
        verdict: Verdict::of(&[measured >= baseline]),
        why: format!("{measured:.3} against {baseline:.3}"),
    }
}
