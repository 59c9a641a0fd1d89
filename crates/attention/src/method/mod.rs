//! Methods: how one is described, chosen and checked.
//!
//! A method is a value that hangs data on the seams of a [`Rig`]; it never touches a running model. Its [`Card`] says all that others
//! need to know of it, so that help texts, `/v1/methods`, the pages under `docs/methods/` and the tests are made from cards.

mod bands;
mod card;
mod choice;
mod dial;
mod facts;
mod hook;
mod host;
mod knobs;
mod page;
mod planner;
mod policy;
mod program;
mod prompt;
mod rig;
mod rotation;
#[cfg(test)]
mod tests;

pub use bands::{Band, BandError, Bands};
pub use card::{Axis, Card, Kind, Knob, Need, Paper, Preset};
pub use choice::{Chosen, DENSE, RawChoice, RawMethods, find};
pub use dial::Dial;
pub use facts::{Facts, LayerFacts};
pub use hook::HookMaker;
pub use host::{Answer, Ask, Host, HostError, Told};
pub use knobs::{ChoiceError, Knobs, Value};
pub use page::{HEADINGS, card_json, index, page};
pub use planner::{
    Builder, Cover, DecodePlanner, DecodeSteps, Plan, PlanView, Planner, Scope, Summary, Unit,
};
pub use policy::{CachePolicy, Fold, HeadEdit, LayerEdit, LayerView, Sight};
pub use program::Program;
pub use prompt::{Prompt, PromptPass, Words};
pub use rig::{Profiles, Rig, RigError};
pub use rotation::{Freq, Rotation, ScoreScale, Stretch};

/// A way to compute attention that a request can ask for.
pub trait Method: Send + Sync {
    /// What it is.
    fn card(&self) -> &'static Card;

    /// Hangs its parts on the rig.
    ///
    /// # Errors
    /// When it does not fit the model, its settings do not fit each other, or another method has the seam.
    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError>;

    /// The knobs by which it is tuned, the most telling first; none for methods that leave that to whoever tunes them.
    fn dials(&self) -> &'static [Dial] {
        &[]
    }
}

impl std::fmt::Debug for dyn Method + '_ {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.card().name)
    }
}

/// Where a choice comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// The person who started the process: may name files.
    Local,
    /// Somebody at the other end of a wire: may name profiles, not files.
    Remote,
}

impl Trust {
    fn check(self, knobs: &Knobs) -> Result<(), ChoiceError> {
        let card = knobs.card();
        for knob in card
            .knobs
            .iter()
            .filter(|k| k.kind == Kind::Profile && self == Self::Remote)
        {
            let name = knobs.text(knob.name);
            if !name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
                || name.contains("..")
            {
                return Err(ChoiceError::Value {
                    method: card.name,
                    knob: knob.name,
                    got: name.to_string(),
                    kind: "profile",
                    range: "a name of letters, digits, `-`, `_` and `.`".into(),
                });
            }
        }
        Ok(())
    }
}
