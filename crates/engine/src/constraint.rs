//! The seam for what may come next in an answer: a grammar, a schema, a choice.

use std::fmt;

/// A constraint that cannot go on: its limits are used up, or the sequence and it disagree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the constraint cannot go on: {0}")]
pub struct ConstraintFailed(pub String);

/// Says which tokens may come next. One value follows one sequence.
pub trait Constraint: Send + Sync {
    /// Sets the logits `[vocab]` of the tokens that must not come next to minus infinity. At least one is left: where the answer may
    /// end, that is an end token.
    ///
    /// # Errors
    /// When it cannot say.
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), ConstraintFailed>;

    /// A token was drawn; end tokens are not told.
    ///
    /// # Errors
    /// When that token was not allowed.
    fn commit(&mut self, token: u32) -> Result<(), ConstraintFailed>;

    /// Whether nothing may follow but the end.
    fn is_done(&self) -> bool;

    /// Tokens of which each is the only one that may come next; they are committed.
    fn forced(&mut self) -> Vec<u32>;

    /// The same state for another sequence.
    fn fork(&self) -> Box<dyn Constraint>;
}

/// A [`Constraint`] that requests carry: cloning forks it.
pub struct BoxedConstraint(pub Box<dyn Constraint>);

impl Clone for BoxedConstraint {
    fn clone(&self) -> Self {
        Self(self.0.fork())
    }
}

impl fmt::Debug for BoxedConstraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BoxedConstraint")
    }
}
