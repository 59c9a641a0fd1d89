//! What a sequence brings to attention beyond its own pages.

use antefix_kv::{Context, SeqState};

use crate::angles::Angles;
use crate::hooks::Observer;
use crate::sparse::Planning;

/// What is special about the rows of one sequence. The default is ordinary dense attention and costs nothing.
#[derive(Clone, Copy, Default)]
pub struct Extra<'a> {
    /// Position of the first row in the sequence's own pages. Row `i` of them stands at position `pos_base + i`: behind a
    /// compressed or reused context, positions go on where the original text ended, not where the rows do.
    pub pos_base: u32,
    /// What the rows attend besides those pages.
    pub context: Option<&'a Context>,
    /// Who observes or edits its activations.
    pub hooks: Option<&'a Observer>,
    /// Angles and scales instead of the model's own.
    pub angles: Option<&'a Angles>,
    /// What chooses the keys that its rows read.
    pub planning: Option<&'a Planning>,
}

impl<'a> Extra<'a> {
    /// Whether all that the rows attend is in the sequence's own pages, which begin at position 0.
    pub fn is_bare(&self) -> bool {
        self.pos_base == 0 && self.context.is_none_or(Context::is_empty)
    }

    /// That of a whole sequence.
    pub fn of(state: &'a SeqState) -> Self {
        Self {
            pos_base: state.base,
            context: Some(&state.context),
            ..Self::default()
        }
    }
}
