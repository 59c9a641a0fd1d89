//! Why a [`super::HookSpec`] does not fit a model.

use super::site::Site;

/// Why a specification does not fit a model.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum HookError {
    /// A layer that the model does not have.
    #[error("hooks: `{site}` in layer {layer}, the model has {layers} layers (0 to {})", .layers - 1)]
    Layer {
        /// Where.
        site: Site,
        /// What was asked.
        layer: usize,
        /// What there is.
        layers: usize,
    },
    /// Layers for a site that exists once.
    #[error("hooks: `{site}` exists once a model\nhint: leave out `layers`")]
    NoLayers {
        /// Where.
        site: Site,
    },
    /// A head that the model does not have.
    #[error("hooks: head {head} of `{site}`, which has {heads} heads (0 to {})", .heads - 1)]
    Head {
        /// Where.
        site: Site,
        /// What was asked.
        head: usize,
        /// What there is.
        heads: usize,
    },
    /// Heads of a site that has none.
    #[error("hooks: `{site}` is not made of heads\nhint: leave out `heads`")]
    NoHeads {
        /// Where.
        site: Site,
    },
    /// A row of the wrong length.
    #[error("hooks: a row for `{site}` has {got} values, {want} are needed")]
    Width {
        /// Where.
        site: Site,
        /// Its length.
        got: usize,
        /// The right length.
        want: usize,
    },
    /// A number that is none.
    #[error("hooks: an edit of `{site}` has a value that is not finite")]
    NotFinite {
        /// Where.
        site: Site,
    },
    /// Rows of a run that were not given.
    #[error("hooks: no capture `{capture}` of {name} was given to take values from")]
    Source {
        /// Its id.
        capture: String,
        /// The full name of the activation.
        name: String,
    },
    /// Rows of a run that have other heads or another width.
    #[error("hooks: capture `{capture}` of {name} has rows of {got} values, the edit needs {want}")]
    SourceWidth {
        /// Its id.
        capture: String,
        /// The full name of the activation.
        name: String,
        /// Its width.
        got: usize,
        /// The width of the edited cells.
        want: usize,
    },
    /// Two edits that replace the same values.
    #[error("hooks: edits {first} and {second} both set {name}\nhint: keep one of them")]
    Conflict {
        /// Index of the earlier edit.
        first: usize,
        /// Index of the later one.
        second: usize,
        /// The full name of the activation.
        name: String,
    },
    /// Two captures whose tensors would have the same name.
    #[error("hooks: {name} is captured twice\nhint: give one of them an `id`")]
    Twice {
        /// The name of the tensor.
        name: String,
    },
    /// The prompt alone would fill the memory for captures.
    #[error(
        "hooks: capturing {tokens} tokens takes {need} bytes, the limit is {cap}\nhint: fewer sites, layers or positions, or dtype bf16"
    )]
    Cap {
        /// Tokens of the prompt.
        tokens: usize,
        /// Bytes that they need.
        need: usize,
        /// Bytes allowed.
        cap: usize,
    },
}
