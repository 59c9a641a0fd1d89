//! What a sequence brings to attention beyond its own pages.

/// What is special about the rows of one sequence. The default is ordinary dense attention and costs nothing.
#[derive(Clone, Copy, Default)]
pub struct Extra<'a> {
    /// Position of the first row in the sequence's own pages. Row `i` of them stands at position `pos_base + i`: behind a
    /// compressed or reused context, positions go on where the original text ended, not where the rows do.
    pub pos_base: u32,
    /// Keeps the lifetime of the parts to come in the type.
    #[doc(hidden)]
    pub lifetime: std::marker::PhantomData<&'a ()>,
}
