//! The text of prompts that planners and decoding are measured on.
//!
//! Planners live on what real text looks like: sentences made of a few templates scatter attention over look-alikes, and every planner seems
//! worse than it is. So where nobody gave a text, these are this repository's own pages. They change, and figures with them.

use antefix_models::tokenizer::{Specials, Tokenizer};

use crate::tasks::Prose;

/// Pages about one subject stand together; the ones that change most stand last. `docs/reproductions.md` is made of the figures and is none.
const PAGES: &[&str] = &[
    include_str!("../../../../docs/server.md"),
    include_str!("../../../../docs/cache.md"),
    include_str!("../../../../docs/documents.md"),
    include_str!("../../../../docs/hooks.md"),
    include_str!("../../../../docs/sparse.md"),
    include_str!("../../../../docs/deploy.md"),
    include_str!("../../../../ARCHITECTURE.md"),
    include_str!("../../../../CONTRIBUTING.md"),
    include_str!("../../../../README.md"),
    include_str!("../../../../LOG.md"),
    include_str!("../../../../docs/results.md"),
    include_str!("../../../../CHANGELOG.md"),
];

/// The texts of `prose`, or this repository's pages where that is generated.
pub fn words(prose: &Prose) -> Vec<&str> {
    match prose {
        Prose::Text(text) => vec![text],
        Prose::Generated => PAGES.to_vec(),
    }
}

/// The first `length` tokens of the text of `prose`, or of this repository's pages where that is generated; behind the begin-of-text token
/// where the model has one.
///
/// # Errors
/// In words, when the text is shorter.
pub(super) fn text(tokenizer: &Tokenizer, prose: &Prose, length: usize) -> Result<Vec<u32>, String> {
    let start = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let mut tokens: Vec<u32> = start.into_iter().collect();
    for text in words(prose) {
        tokens.extend(tokenizer.encode(text, Specials::Plain));
    }
    if tokens.len() < length {
        return Err(format!(
            "the text has {} tokens, {length} are asked for\nhint: `--prose` with a longer file",
            tokens.len()
        ));
    }
    tokens.truncate(length);
    Ok(tokens)
}
