//! A GGUF file again, with other data in some of its tensors.

use std::io::{self, Write};

use super::{Gguf, TensorInfo};

/// New data of a tensor.
#[derive(Debug, Clone)]
pub struct Replacement {
    /// Number of the format.
    pub ggml_type: u32,
    /// As many rows of as many values as before.
    pub bytes: Vec<u8>,
}

fn put_str(out: &mut impl Write, text: &[u8]) -> io::Result<()> {
    out.write_all(&(text.len() as u64).to_le_bytes())?;
    out.write_all(text)
}

fn pad(out: &mut impl Write, len: usize, alignment: usize) -> io::Result<()> {
    let missing = len.next_multiple_of(alignment) - len;
    out.write_all(&vec![0; missing])
}

impl Gguf {
    /// Writes this file with the same metadata; `replace` gives the new data of a tensor, or `None` to keep it as it is.
    ///
    /// # Errors
    /// What the writer says.
    pub fn rewrite(
        &self,
        out: &mut impl Write,
        replace: impl Fn(&TensorInfo<'_>) -> Option<Replacement>,
    ) -> io::Result<()> {
        let alignment = self.u64("general.alignment").map_or(32, |a| (a as usize).max(1));
        let tensors: Vec<(TensorInfo<'_>, Option<Replacement>)> =
            self.tensors().map(|t| (t, replace(&t))).collect();
        let bytes = |t: &(TensorInfo<'_>, Option<Replacement>)| {
            t.1.as_ref().map_or(t.0.bytes.len(), |r| r.bytes.len())
        };
        let mut head = b"GGUF".to_vec();
        head.extend(3u32.to_le_bytes());
        head.extend((tensors.len() as u64).to_le_bytes());
        head.extend((self.tables.entries.len() as u64).to_le_bytes());
        for entry in &self.tables.entries {
            put_str(&mut head, entry.key.of(&self.bytes))?;
            head.extend((entry.kind as u32).to_le_bytes());
            head.extend(entry.value.of(&self.bytes));
        }
        let mut offset = 0u64;
        for tensor in &tensors {
            put_str(&mut head, tensor.0.name.as_bytes())?;
            let dims = tensor.0.dims();
            head.extend((dims.len() as u32).to_le_bytes());
            head.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
            head.extend(
                tensor
                    .1
                    .as_ref()
                    .map_or(tensor.0.ggml_type, |r| r.ggml_type)
                    .to_le_bytes(),
            );
            head.extend(offset.to_le_bytes());
            offset += bytes(tensor).next_multiple_of(alignment) as u64;
        }
        out.write_all(&head)?;
        pad(out, head.len(), alignment)?;
        for tensor in &tensors {
            out.write_all(tensor.1.as_ref().map_or(tensor.0.bytes, |r| &r.bytes))?;
            pad(out, bytes(tensor), alignment)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Arch;
    use crate::testing::tiny_gguf;

    #[test]
    fn a_rewritten_file_says_the_same_but_for_what_was_replaced() {
        for arch in [Arch::Llama, Arch::Gemma3] {
            let old = Gguf::parse(tiny_gguf(arch, 1)).unwrap();
            let name = "blk.0.attn_norm.weight";
            let replacement = || Replacement {
                ggml_type: 0,
                bytes: vec![7; old.tensor(name).unwrap().bytes.len()],
            };
            let mut out = Vec::new();
            old.rewrite(&mut out, |t| (t.name == name).then(replacement))
                .unwrap();
            let new = Gguf::parse(out).unwrap();
            assert!(old.keys().eq(new.keys()));
            for (a, b) in old.tables.entries.iter().zip(&new.tables.entries) {
                assert_eq!((a.kind, a.value.of(&old.bytes)), (b.kind, b.value.of(&new.bytes)));
            }
            for (a, b) in old.tensors().zip(new.tensors()) {
                assert_eq!((a.name, a.dims()), (b.name, b.dims()));
                if a.name == name {
                    assert!(b.bytes.iter().all(|&x| x == 7));
                } else {
                    assert_eq!((a.ggml_type, a.bytes), (b.ggml_type, b.bytes));
                }
            }
        }
    }
}
