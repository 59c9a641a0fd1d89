//! Names of blocks: a chain of hashes from the model and the salt down to the last token.

use antefix_state::PAGE_ROWS;

/// Token ids of a block.
pub type BlockTokens = [u32; PAGE_ROWS];

/// Whose keys and values these are. Anything that changes a bit of them must change the identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Hash of the model's weights and configuration.
    pub model: [u8; 32],
    /// Shape and type of the pages, rotary embedding, and kind of kernels that computed them (their sums differ in the last bit).
    pub layout: String,
}

impl Identity {
    /// One name for all of it.
    pub(super) fn fingerprint(&self) -> [u8; 32] {
        let mut hash = blake3::Hasher::new_derive_key("antefix disk tier: identity, version 1");
        hash.update(&self.model);
        hash.update(self.layout.as_bytes());
        *hash.finalize().as_bytes()
    }
}

/// Name of a block and of all tokens before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(pub(super) [u8; 32]);

impl Key {
    /// Parent of the first blocks of one tenant of one model.
    pub(super) fn root(fingerprint: &[u8; 32], salt: u64) -> Key {
        let mut hash = blake3::Hasher::new_derive_key("antefix disk tier: salt, version 1");
        hash.update(fingerprint);
        hash.update(&salt.to_le_bytes());
        Key(*hash.finalize().as_bytes())
    }

    /// The block `tokens` after the one named by `self`.
    #[must_use]
    pub fn child(&self, tokens: &BlockTokens) -> Key {
        let mut hash = blake3::Hasher::new_derive_key("antefix disk tier: block, version 1");
        hash.update(&self.0);
        for token in tokens {
            hash.update(&token.to_le_bytes());
        }
        Key(*hash.finalize().as_bytes())
    }

    /// What records of a root and of everything below it carry, so that tenants can be listed without naming their salts.
    pub(super) fn namespace(&self) -> Namespace {
        let mut short = [0; 16];
        short.copy_from_slice(&self.0[..16]);
        Namespace(short)
    }
}

/// A salt (and identity), hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Namespace(pub(super) [u8; 16]);

/// Lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}
