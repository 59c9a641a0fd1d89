//! How methods read profiles: the knobs that name heads, and what they give.

use antefix_attention::method::{Kind, Knob, Knobs, Preset, Rig, RigError};

use super::{HeadProfile, HeadTest, ProfileError};

/// The kind of profile, as its folder is called.
pub const KIND: &str = "heads";

/// The knob that names a profile; `help` says which measurements it must hold.
pub const fn profile_knob(help: &'static str, source: &'static str) -> Knob {
    Knob {
        name: "profile",
        kind: Kind::Profile,
        default: Preset::Text("default"),
        unit: "",
        help,
        source,
    }
}

/// The knob that names heads instead.
pub const HEADS: Knob = Knob {
    name: "heads",
    kind: Kind::Text,
    default: Preset::Text(""),
    unit: "",
    help: "These heads instead of the profile's: LAYER:HEAD+LAYER:HEAD",
    source: "ours",
};

/// The profile of a request, which fits its model.
#[derive(Debug)]
pub struct Measured<'r, 'm> {
    profile: HeadProfile,
    rig: &'r Rig<'m>,
}

/// The profile that the knob `profile` names; `test` is a measurement that is wanted of it, for the hint if there is none.
///
/// # Errors
/// When there is no such profile, or it is none of this model: [`RigError::Profile`].
pub fn load<'r, 'm>(knobs: &Knobs, rig: &'r Rig<'m>, test: &str) -> Result<Measured<'r, 'm>, RigError> {
    let facts = rig.facts();
    let text = rig.profile(KIND, knobs.text("profile"), &hint(test))?;
    let profile = HeadProfile::parse(&text, [facts.layers.len(), facts.heads, facts.kv_heads])
        .map_err(|e| refuse(rig, &e, test))?;
    Ok(Measured { profile, rig })
}

impl Measured<'_, '_> {
    /// The measurement of this name.
    ///
    /// # Errors
    /// When the profile does not hold it: [`RigError::Profile`].
    pub fn test(&self, name: &str) -> Result<&HeadTest, RigError> {
        self.profile.test(name).map_err(|e| refuse(self.rig, &e, name))
    }

    /// The measurement of this name, if the profile holds it.
    pub fn find(&self, name: &str) -> Option<&HeadTest> {
        self.profile.test(name).ok()
    }
}

fn refuse(rig: &Rig<'_>, why: &ProfileError, test: &str) -> RigError {
    rig.unusable(KIND, why.to_string(), hint(test))
}

fn hint(test: &str) -> String {
    format!("antefix analyse heads --kind {test} --out FILE measures it; then profile=FILE")
}

/// Heads written as `LAYER:HEAD`, joined by `+`.
///
/// # Errors
/// In words, when it is none or the model has no such head.
pub fn parse_heads(text: &str, layers: usize, heads: usize) -> Result<Vec<(usize, usize)>, String> {
    let one = |word: &str| {
        let pair = word
            .split_once(':')
            .and_then(|(l, h)| Some((l.parse().ok()?, h.parse().ok()?)));
        match pair {
            Some((l, h)) if l < layers && h < heads => Ok((l, h)),
            Some(_) => Err(format!(
                "there is no head `{word}`: layers 0 to {}, heads 0 to {}",
                layers - 1,
                heads - 1
            )),
            None => Err(format!("`{word}` is no head: write LAYER:HEAD, joined by `+`")),
        }
    };
    text.split('+').map(one).collect()
}

/// The heads that a request names: those of the knob `heads`, or else the `top` best of measurement `test` in the profile that the
/// knob `profile` names.
///
/// # Errors
/// When a head does not exist or there is no such profile.
pub fn choose(
    knobs: &Knobs,
    rig: &Rig<'_>,
    test: &'static str,
    top: usize,
) -> Result<Vec<(usize, usize)>, RigError> {
    let named = knobs.text(HEADS.name);
    if !named.is_empty() {
        let facts = rig.facts();
        return parse_heads(named, facts.layers.len(), facts.heads).map_err(|why| rig.senseless(why));
    }
    if top == 0 {
        return Ok(Vec::new());
    }
    let profile = load(knobs, rig, test)?;
    let best = profile.test(test)?.ranking().into_iter().take(top);
    Ok(best
        .filter(|r| r.score > 0.0)
        .map(|r| (r.layer, r.head))
        .collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use antefix_attention::method::{Chosen, Facts, Need, Profiles};

    use super::*;

    #[test]
    fn heads_are_named_by_layer_and_number() {
        assert_eq!(parse_heads("0:1+3:2", 4, 4), Ok(vec![(0, 1), (3, 2)]));
        for wrong in ["", "1", "a:b", "1:2+", "4:0", "0:4", "1:-1"] {
            assert!(parse_heads(wrong, 4, 4).is_err(), "{wrong}");
        }
    }

    /// What every method that needs heads says to a profile of this text.
    fn says(text: &str) -> Vec<RigError> {
        let dir = tempfile::TempDir::new().expect("a folder for tests");
        std::fs::create_dir(dir.path().join(KIND)).expect("a folder for tests");
        std::fs::write(dir.path().join(KIND).join("default.json"), text).expect("a file for tests");
        let profiles = Profiles::named_in(vec![dir.path().to_owned()]);
        let in_need = crate::ALL
            .iter()
            .filter(|m| m.card().needs.contains(&Need::Profile(KIND)));
        in_need
            .map(|&method| {
                let knobs = Knobs::new(method.card(), &BTreeMap::new()).expect("presets");
                let chosen = Chosen { method, knobs };
                Rig::assemble(&Facts::example(), &profiles, &[chosen]).expect_err("no such profile")
            })
            .collect()
    }

    #[test]
    fn a_profile_that_cannot_be_used_is_refused_by_all_alike() {
        let facts = Facts::example();
        let empty = |layers: usize| {
            format!(
                r#"{{"format":"{}","model":"m","sha256":"","engine":"","layers":{layers},"heads":{},"kv_heads":{},
                    "local_layers":[],"tests":[]}}"#,
                super::super::FORMAT,
                facts.heads,
                facts.kv_heads
            )
        };
        let right = facts.layers.len();
        for (text, part) in [
            ("{}".to_string(), "not a profile"),
            (empty(right + 1), "the model has"),
            (empty(right), "has no"),
        ] {
            let all = says(&text);
            assert!(all.len() >= 4, "{all:?}");
            for error in all {
                assert!(matches!(error, RigError::Profile { kind: KIND, .. }), "{error:?}");
                let told = error.to_string();
                assert!(
                    told.contains(part) && told.contains("antefix analyse heads --kind"),
                    "{told}"
                );
            }
        }
    }
}
