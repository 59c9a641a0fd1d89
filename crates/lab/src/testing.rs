//! What tests of several modules begin with.

use std::sync::Arc;

use antefix_attention::method::{Profiles, Program, RawMethods, Rig, Trust};
use antefix_models::decoder::Model;
use antefix_papers::ALL;

/// `text` as the command line has it, installed on `model`.
pub(crate) fn program(model: &Model, text: &str) -> Arc<Program> {
    let mut raw = RawMethods::default();
    raw.add(ALL, text).expect("well written");
    let chosen = raw.resolve(ALL, Trust::Local).expect("in range");
    Arc::new(Rig::assemble(&model.facts(), &Profiles::default(), &chosen).expect("it goes"))
}
