//! Writes small valid files and hostile ones into `fuzz/corpus`, so that fuzzing starts behind the magic numbers and where others
//! went wrong. The hostile ones are those that tests on the stable toolchain refuse.
use std::{fs, io, path::Path};

use antefix_models::{
    gguf::{Gguf, Value},
    spec::Arch,
    testing::{GgufBuilder, Meta, hostile, safetensors_bytes, tiny_gguf},
};

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let write = |target: &str, name: &str, bytes: Vec<u8>| {
        let dir = corpus.join(target);
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(name), bytes)
    };
    for arch in [Arch::Llama, Arch::Qwen2, Arch::Qwen3, Arch::Gemma3] {
        let file = tiny_gguf(arch, 1);
        let gguf = Gguf::parse(file.clone()).expect("valid");
        write("tokenizer_tables", arch.name(), tables_of(&gguf).build())?;
        write("chat_template", arch.name(), gguf.str("tokenizer.chat_template").unwrap_or_default().into())?;
        write("gguf", arch.name(), file)?;
    }
    let config = "\0{\"bos_token\": \"<s>\", \"add_bos_token\": true}";
    write("tokenizer_tables", "json", format!("{}{config}", hostile::tokenizer_json()).into_bytes())?;
    write("chat_template", "many", MANY.as_bytes().to_vec())?;
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
    write("safetensors_header", "bf16", safetensors_bytes(&tensors, true))?;
    for (target, files) in [
        ("gguf", hostile::gguf()),
        ("safetensors_header", hostile::safetensors()),
        ("tokenizer_tables", hostile::tables()),
        ("tokenizer_tables", hostile::tokenizer_jsons()),
        ("chat_template", hostile::templates()),
    ] {
        for (name, bytes) in files {
            write(target, &format!("hostile-{name}"), bytes)?;
        }
    }
    Ok(())
}

/// Much of what templates are made of, in one.
const MANY: &str = "{%- macro f(x, y=1) -%}{{ x ~ y }}{%- endmacro -%}{% set ns = namespace(n=0, l=[]) %}{% if tools is defined and tools %}{{ tools | tojson(indent=2) }}{{ tools[0]['name'].upper() }}{% endif %}{% for m in messages %}{% if loop.first and m.role == 'system' %}{{ m.content | trim }}{% elif m['role'] != 'user' or loop.index0 % 2 == 1 %}{{ raise_exception('roles: ' ~ m.role) }}{% else %}{% set ns.n = ns.n + 1 %}{% set ns.l = ns.l + [m.content.strip().split('\n')[-1]] %}{{ f(m.content[1:5], y=ns.n) }}{% endif %}{% endfor %}{{ ns.l | join(', ') | replace('a', 'b') }}{{ '%s %d' % ('x', 3) }}{{ '{}'.format(1) }}{{ {'a': 1}.items() | list }}{{ [3, 1] | sort | map('string') | list }}{% filter upper %}x{% endfilter %}{% call f(1) %}{% endcall %}{{ bos_token if add_generation_prompt else eos_token }}\0 hi\n";

/// The tokenizer's entries of a file.
fn tables_of(gguf: &Gguf) -> GgufBuilder {
    let mut out = GgufBuilder::default();
    for key in gguf.keys().filter(|key| key.starts_with("tokenizer.ggml")) {
        let array = gguf.array(key);
        let texts = array.and_then(|a| a.strs());
        let meta = match (gguf.get(key), texts) {
            (_, Some(texts)) => Meta::Strs(texts.map(|t| String::from_utf8_lossy(t).into_owned()).collect()),
            (Some(Value::Array(a)), None) if key.ends_with("scores") => Meta::F32s(a.f32s().expect("scores").collect()),
            (Some(Value::Array(a)), None) => Meta::I32s(a.i64s().expect("types").map(|i| i as i32).collect()),
            _ => match (gguf.str(key), gguf.bool(key), gguf.u64(key)) {
                (Some(text), ..) => Meta::Str(text.into()),
                (_, Some(flag), _) => Meta::Bool(flag),
                (.., Some(id)) => Meta::U32(id as u32),
                _ => continue,
            },
        };
        out = out.meta(key, meta);
    }
    out
}
