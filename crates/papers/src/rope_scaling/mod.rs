//! Other ways to use a model beyond its trained window: what `entropy_abf` is compared with. One file each.

pub mod llama3;
pub mod ntk;
pub mod parts;
pub mod pi;
pub mod yarn;

use antefix_attention::method::{Facts, Kind, Knob, Knobs, Preset, Rig, RigError, Rotation, Stretch};
use antefix_kernels::ops::MAX_POSITIONS;

/// How far to stretch.
pub(crate) const FACTOR: Knob = Knob {
    name: "factor",
    kind: Kind::float(1.0, 16.0),
    default: Preset::Float(4.0),
    unit: "trained windows",
    help: "Longest request, in trained windows; the smallest of 2, 4, 8 ... that holds a request is used for it",
    source: "ours",
};

/// Whether short requests are changed, too.
pub(crate) const ALWAYS: Knob = Knob {
    name: "always",
    kind: Kind::Bool,
    default: Preset::Bool(false),
    unit: "",
    help: "Stretch requests that fit the trained window, too, by the whole factor: for measurements",
    source: "ours",
};

/// Installs `rotation(s)`, the rotation for requests of up to `s` trained windows.
///
/// Requests inside the trained window keep the model's own angles, bit for bit; longer ones get the smallest step of 2, 4, 8 ... up to the
/// knob `factor` that holds them, prompt and answer together, once and for all.
pub(crate) fn install(
    knobs: &Knobs,
    rig: &mut Rig<'_>,
    rotation: impl Fn(&Facts, f64) -> Rotation,
) -> Result<(), RigError> {
    let facts = rig.facts();
    let factor = knobs.float("factor");
    let positions = |s: f64| (facts.context as f64 * s) as usize;
    if positions(factor) > MAX_POSITIONS {
        return Err(rig.senseless(format!(
            "{factor} windows of {} tokens are more than the {MAX_POSITIONS} positions that there are",
            facts.context
        )));
    }
    if facts.full_layers().next().is_none() {
        return Err(rig.misfit("every layer has a window, no key is ever far away"));
    }
    let step = |s: f64| (positions(s), rotation(facts, s));
    let steps = if knobs.bool("always") {
        vec![step(factor)]
    } else {
        let doubled = std::iter::successors(Some(2.0), |s| Some(s * 2.0)).take_while(|s| *s < factor);
        let last = (factor > 1.0).then_some(factor);
        let plain = (facts.context, Rotation::default());
        std::iter::once(plain)
            .chain(doubled.chain(last).map(step))
            .collect()
    };
    rig.set_stretch(Stretch { steps })
}

/// The base of the layers that see far keys.
pub(crate) fn base(facts: &Facts) -> f64 {
    let layer = facts.full_layers().next().unwrap_or(0);
    f64::from(facts.layers[layer].rope_base)
}

/// Their rotated dimensions.
pub(crate) fn dims(facts: &Facts) -> f64 {
    let layer = facts.full_layers().next().unwrap_or(0);
    facts.layers[layer].rope_dims as f64
}

#[cfg(test)]
mod tests {
    #[test]
    fn they_conform() {
        for method in [
            &super::pi::PositionInterpolation as &'static dyn antefix_attention::method::Method,
            &super::ntk::NtkAware,
            &super::parts::NtkByParts,
            &super::yarn::Yarn,
            &super::llama3::Llama3,
        ] {
            antefix_conformance::method::check(method);
        }
    }
}
