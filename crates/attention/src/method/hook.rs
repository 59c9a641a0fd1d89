//! The seam of hooks: what a method reads and changes while a sequence runs.

use std::fmt::Debug;

use crate::hooks::Hook;

/// Makes the code that follows one sequence, for methods that a [`crate::hooks::HookSpec`] cannot describe.
pub trait HookMaker: Send + Sync + Debug {
    /// A hook for a sequence whose prompt has `prompt` tokens. It starts as if nothing had been computed.
    fn make(&self, prompt: usize) -> Box<dyn Hook>;

    /// Whether it must see every token, so that nothing comes out of the cache of prefixes.
    fn sees_all(&self) -> bool;
}
