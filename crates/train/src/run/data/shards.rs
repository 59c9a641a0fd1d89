//! Files of token ids: what others' preparation scripts leave behind.
//!
//! - `.safetensors`: a tensor `tokens`, of one dimension or more, U16, U32, I32 or I64 (as `antefix sae harvest` writes them).
//! - `.bin` that starts with llm.c's magic number: 256 little-endian i32 of header (magic, version, number of tokens), then ids: u16 for magic
//!   20240520, u32 for 20240801.
//! - any other `.bin`: bare little-endian ids, u16 as nanoGPT writes them, or what `dtype` says.

use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use super::read;
use crate::error::TrainError;

/// Width of ids in bare files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum RawIds {
    /// 16 bits, as nanoGPT writes them.
    #[default]
    U16,
    /// 32 bits.
    U32,
}

/// First numbers of llm.c's files, and what ids they have.
const MAGIC: [(i32, RawIds); 2] = [(20_240_520, RawIds::U16), (20_240_801, RawIds::U32)];

/// Bytes of llm.c's header.
const HEADER: usize = 256 * 4;

/// Token ids of one file, each below `vocab`.
pub(super) fn tokens(file: &Path, ids: RawIds, vocab: usize) -> Result<Vec<u32>, TrainError> {
    let all = read(file)?;
    let found = match file.extension().and_then(|e| e.to_str()) {
        Some("safetensors") => tensor(file, &all)?,
        Some("bin") => binary(file, &all, ids)?,
        _ => return Err(TrainError::file(file, "token files are .bin or .safetensors")),
    };
    match found.iter().position(|&id| id >= vocab as u64) {
        None => Ok(found.into_iter().map(|id| id as u32).collect()),
        Some(at) => Err(TrainError::file(
            file,
            format!(
                "token {at} is {}; the model has {vocab}\nhint: another tokenizer, or another width of ids (`data.ids`)",
                found[at] as i64
            ),
        )),
    }
}

fn little<const N: usize>(bytes: &[u8], to: impl Fn([u8; N]) -> u64) -> Vec<u64> {
    bytes.as_chunks::<N>().0.iter().map(|&c| to(c)).collect()
}

fn bare(file: &Path, bytes: &[u8], ids: RawIds) -> Result<Vec<u64>, TrainError> {
    let width = match ids {
        RawIds::U16 => 2,
        RawIds::U32 => 4,
    };
    if !bytes.len().is_multiple_of(width) {
        return Err(TrainError::file(
            file,
            format!(
                "{} bytes are no whole number of ids of {width} bytes",
                bytes.len()
            ),
        ));
    }
    Ok(match ids {
        RawIds::U16 => little(bytes, |c| u16::from_le_bytes(c).into()),
        RawIds::U32 => little(bytes, |c| u32::from_le_bytes(c).into()),
    })
}

fn binary(file: &Path, all: &[u8], ids: RawIds) -> Result<Vec<u64>, TrainError> {
    let number = |at: usize| all.as_chunks::<4>().0.get(at).map(|c| i32::from_le_bytes(*c));
    let Some((_, ids)) = MAGIC.into_iter().find(|(magic, _)| number(0) == Some(*magic)) else {
        return bare(file, all, ids);
    };
    let Some(rest) = all.get(HEADER..) else {
        return Err(TrainError::file(file, "it ends inside its header"));
    };
    let tokens = bare(file, rest, ids)?;
    match number(2) {
        Some(n) if usize::try_from(n) == Ok(tokens.len()) => Ok(tokens),
        n => Err(TrainError::file(
            file,
            format!(
                "its header says {} tokens, it has {}",
                n.unwrap_or(0),
                tokens.len()
            ),
        )),
    }
}

fn tensor(file: &Path, all: &[u8]) -> Result<Vec<u64>, TrainError> {
    let bad = |e: safetensors::SafeTensorError| TrainError::file(file, e.to_string());
    let tensors = SafeTensors::deserialize(all).map_err(bad)?;
    let view = tensors.tensor("tokens").map_err(bad)?;
    // A negative id becomes larger than any vocabulary.
    match view.dtype() {
        Dtype::U16 => Ok(little(view.data(), |c| u16::from_le_bytes(c).into())),
        Dtype::U32 => Ok(little(view.data(), |c| u32::from_le_bytes(c).into())),
        Dtype::I32 => Ok(little(view.data(), |c| i64::from(i32::from_le_bytes(c)) as u64)),
        Dtype::I64 => Ok(little(view.data(), u64::from_le_bytes)),
        other => Err(TrainError::file(
            file,
            format!("tensor `tokens` is {other:?}; ids are U16, U32, I32 or I64"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    fn written(name: &str, bytes: &[u8], ids: RawIds) -> Result<Vec<u32>, String> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(name);
        std::fs::write(&file, bytes).unwrap();
        let found = tokens(&file, ids, 1000).map_err(|e| e.to_string());
        if let Err(e) = &found {
            assert!(e.contains(name), "{e}");
        }
        found
    }

    fn with_header(magic: i32, n: i32, rest: &[u8]) -> Vec<u8> {
        let mut out = vec![0; HEADER];
        out[..4].copy_from_slice(&magic.to_le_bytes());
        out[4..8].copy_from_slice(&1i32.to_le_bytes());
        out[8..12].copy_from_slice(&n.to_le_bytes());
        out.extend(rest);
        out
    }

    #[test]
    fn every_form_gives_the_same_tokens() {
        let want = vec![7u32, 999, 0, 300];
        let short: Vec<u8> = want.iter().flat_map(|&t| (t as u16).to_le_bytes()).collect();
        let long: Vec<u8> = want.iter().flat_map(|t| t.to_le_bytes()).collect();
        let longer: Vec<u8> = want.iter().flat_map(|&t| i64::from(t).to_le_bytes()).collect();
        let tensor = |dtype, bytes: &[u8], dims: Vec<usize>| {
            let view = TensorView::new(dtype, dims, bytes).unwrap();
            safetensors::serialize([("tokens", view)], None).unwrap()
        };
        let cases = [
            ("a.bin", short.clone(), RawIds::U16),
            ("a.bin", long.clone(), RawIds::U32),
            ("a.bin", with_header(20_240_520, 4, &short), RawIds::U32),
            ("a.bin", with_header(20_240_801, 4, &long), RawIds::U16),
            ("a.safetensors", tensor(Dtype::U16, &short, vec![4]), RawIds::U16),
            (
                "a.safetensors",
                tensor(Dtype::U32, &long, vec![2, 2]),
                RawIds::U16,
            ),
            ("a.safetensors", tensor(Dtype::I32, &long, vec![4]), RawIds::U16),
            ("a.safetensors", tensor(Dtype::I64, &longer, vec![4]), RawIds::U16),
        ];
        for (name, bytes, ids) in cases {
            assert_eq!(written(name, &bytes, ids).unwrap(), want);
        }
    }

    #[test]
    fn broken_files_are_named() {
        let float = 1f32.to_le_bytes();
        let view = TensorView::new(Dtype::F32, vec![1], &float).unwrap();
        let floats = safetensors::serialize([("tokens", view)], None).unwrap();
        let minus = (-1i64).to_le_bytes();
        let view = TensorView::new(Dtype::I64, vec![1], &minus).unwrap();
        let negative = safetensors::serialize([("tokens", view)], None).unwrap();
        let view = TensorView::new(Dtype::I64, vec![1], &minus).unwrap();
        let misnamed = safetensors::serialize([("ids", view)], None).unwrap();
        let cases: [(&str, &[u8], &str); 9] = [
            ("a.bin", &[1, 0, 2], "whole number"),
            ("a.bin", &1000u16.to_le_bytes(), "the model has 1000"),
            (
                "a.bin",
                &with_header(20_240_520, 5, &[1, 0, 2, 0]),
                "says 5 tokens",
            ),
            ("a.bin", &with_header(20_240_520, -5, &[1, 0]), "says -5 tokens"),
            ("a.bin", &with_header(20_240_520, 5, &[])[..100], "header"),
            ("a.safetensors", b"nonsense", "a.safetensors"),
            ("a.safetensors", &floats, "F32"),
            ("a.safetensors", &negative, "token 0 is -1"),
            ("a.safetensors", &misnamed, "tokens"),
        ];
        for (name, bytes, says) in cases {
            let error = written(name, bytes, RawIds::U16).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
        assert!(written("a.txt", b"12", RawIds::U16).unwrap_err().contains(".bin"));
    }
}
