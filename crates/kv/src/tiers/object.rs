//! A block as an object of its own, for stores that have no place for headers.
//!
//! ```text
//! magic 8, length of the payload 8, namespace 16, parent 32, tokens 32 x 4, payload, blake3 hash of all before it 32
//! ```

use crate::key::BlockName;

const MAGIC: [u8; 8] = *b"AFXOBJ01";
const HEADER: usize = 8 + 8 + 16 + 32 + 128;
const HASH: usize = 32;

fn header(block: &BlockName, root: crate::Key, len: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + len + HASH);
    out.extend(MAGIC);
    out.extend((len as u64).to_le_bytes());
    out.extend(root.namespace().0);
    out.extend(block.parent.0);
    block.tokens.iter().for_each(|t| out.extend(t.to_le_bytes()));
    out
}

/// The object of a block under the root of its salt.
pub fn seal(block: &BlockName, root: crate::Key, payload: &[u8]) -> Vec<u8> {
    let mut out = header(block, root, payload.len());
    out.extend_from_slice(payload);
    let hash = blake3::hash(&out);
    out.extend(hash.as_bytes());
    out
}

/// The payload of an object, if it is whole and that of this very block.
pub fn open<'a>(block: &BlockName, root: crate::Key, object: &'a [u8]) -> Option<&'a [u8]> {
    let (body, hash) = object.split_last_chunk::<HASH>()?;
    let payload = body.get(HEADER..)?;
    let ours = body.starts_with(&header(block, root, payload.len()));
    (ours && blake3::hash(body) == blake3::Hash::from_bytes(*hash)).then_some(payload)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Fingerprint;

    #[test]
    fn an_object_opens_only_as_itself_and_whole() {
        let root = Fingerprint([4; 32]).root(7);
        let block = BlockName {
            parent: root,
            salt: 7,
            tokens: [5; 32],
        };
        let object = seal(&block, root, b"keys and values");
        assert_eq!(open(&block, root, &object), Some(&b"keys and values"[..]));
        assert_eq!(open(&block, Fingerprint([4; 32]).root(8), &object), None);
        let mut other = block.clone();
        other.tokens[31] = 6;
        assert_eq!(open(&other, root, &object), None);
        other = block.clone();
        other.parent = block.key();
        assert_eq!(open(&other, root, &object), None);
        for len in 0..object.len() {
            assert_eq!(open(&block, root, &object[..len]), None);
        }
        for bit in 0..object.len() * 8 {
            let mut bad = object.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(&block, root, &bad), None, "bit {bit}");
        }
    }
}
