//! Writes small valid files into `fuzz/corpus`, so that fuzzing starts behind the magic numbers.
use std::{fs, io, path::Path};

use antefix_models::{
    spec::Arch,
    testing::{GgufBuilder, Meta, safetensors_bytes, tiny_gguf},
};

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let write = |target: &str, name: &str, bytes: Vec<u8>| {
        let dir = corpus.join(target);
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(name), bytes)
    };
    for arch in [Arch::Llama, Arch::Qwen2, Arch::Qwen3, Arch::Gemma3] {
        write("gguf", arch.name(), tiny_gguf(arch, 1))?;
    }
    let mut nested = 9u32.to_le_bytes().to_vec();
    nested.extend(1u64.to_le_bytes());
    nested.extend(4u32.to_le_bytes());
    nested.extend(1u64.to_le_bytes());
    nested.extend(5u32.to_le_bytes());
    let small = GgufBuilder::default()
        .meta("general.architecture", Meta::Str("llama".into()))
        .meta("list", Meta::Strs(vec!["one".into(), "two".into()]))
        .meta("nested", Meta::Raw(9, nested))
        .meta("ids", Meta::I32s(vec![1, 2]))
        .meta("scores", Meta::F32s(vec![0.5]))
        .tensor("token_embd.weight", &[32, 2], 8, vec![1; 68])
        .tensor("y", &[3], 0, vec![0; 12]);
    let aligned = GgufBuilder::default().meta("general.alignment", Meta::U32(64)).tensor("x", &[1], 0, vec![0; 4]);
    write("gguf", "small", small.build())?;
    write("gguf", "aligned", aligned.build())?;
    let tensors = [("x".into(), vec![2, 3], vec![1.0; 6]), ("y".into(), vec![1], vec![0.0])];
    write("safetensors_header", "f32", safetensors_bytes(&tensors, false))?;
    write("safetensors_header", "bf16", safetensors_bytes(&tensors, true))
}
