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
    pub fn fingerprint(&self) -> Fingerprint {
        let mut hash = blake3::Hasher::new_derive_key("antefix disk tier: identity, version 2");
        hash.update(&self.model);
        hash.update(self.layout.as_bytes());
        Fingerprint(*hash.finalize().as_bytes())
    }
}

/// An [`Identity`], hashed. The default is that of a cache which nobody else reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Fingerprint(pub(crate) [u8; 32]);

impl Fingerprint {
    /// Parent of the first blocks of one tenant of one model.
    pub fn root(&self, salt: u64) -> Key {
        let mut hash = blake3::Hasher::new_derive_key("antefix disk tier: salt, version 1");
        hash.update(&self.0);
        hash.update(&salt.to_le_bytes());
        Key(*hash.finalize().as_bytes())
    }
}

/// Name of a block and of all tokens before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(pub(crate) [u8; 32]);

impl Key {
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
    pub(crate) fn namespace(&self) -> Namespace {
        let mut short = [0; 16];
        short.copy_from_slice(&self.0[..16]);
        Namespace(short)
    }

    /// Lower-case hexadecimal digits: a name for stores of objects.
    pub fn hex(&self) -> String {
        hex(&self.0)
    }
}

/// A block, and everything that tells it from others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockName {
    /// The block before it, or the root of its salt.
    pub parent: Key,
    /// Whose it is.
    pub salt: u64,
    /// Its own tokens.
    pub tokens: BlockTokens,
}

impl BlockName {
    /// Its key.
    pub fn key(&self) -> Key {
        self.parent.child(&self.tokens)
    }
}

/// A salt (and identity), hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Namespace(pub(crate) [u8; 16]);

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}
