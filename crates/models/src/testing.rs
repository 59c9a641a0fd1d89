//! Small model files made in memory, for tests of this crate and of those above it.
//!
//! ```
//! use antefix_models::{files::ModelFiles, gguf::Gguf, spec::Arch, testing::tiny_gguf};
//!
//! let gguf = Gguf::parse(tiny_gguf(Arch::Qwen2, 1))?;
//! let files = ModelFiles::from_gguf(gguf, "tiny.gguf".as_ref())?;
//! assert_eq!(files.spec().d_model, 64);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod hostile;

use crate::{
    files::Role,
    spec::{Act, Arch, LayerKind, ModelSpec, RopeScaling, RopeSpec, RopeStyle},
};

/// A metadata value to write.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Meta {
    U32(u32),
    U64(u64),
    F32(f32),
    Bool(bool),
    Str(String),
    Strs(Vec<String>),
    F32s(Vec<f32>),
    I32s(Vec<i32>),
    /// Any type number with any bytes, right or wrong.
    Raw(u32, Vec<u8>),
}

/// Writes GGUF files, valid ones as well as broken ones.
#[derive(Debug, Clone)]
pub struct GgufBuilder {
    /// Written as it is; 2 and 3 are valid.
    pub version: u32,
    /// Used for layout; written as `general.alignment` unless it is 32, the default.
    pub alignment: u64,
    meta: Vec<(String, Meta)>,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

impl Default for GgufBuilder {
    fn default() -> Self {
        Self {
            version: 3,
            alignment: 32,
            meta: Vec::new(),
            tensors: Vec::new(),
        }
    }
}

fn put_str(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_array<T>(out: &mut Vec<u8>, kind: u32, items: &[T], mut put: impl FnMut(&mut Vec<u8>, &T)) {
    out.extend(kind.to_le_bytes());
    out.extend((items.len() as u64).to_le_bytes());
    for item in items {
        put(out, item);
    }
}

impl Meta {
    fn put(&self, out: &mut Vec<u8>) {
        let kind: u32 = match self {
            Self::U32(_) => 4,
            Self::F32(_) => 6,
            Self::Bool(_) => 7,
            Self::Str(_) => 8,
            Self::Strs(_) | Self::F32s(_) | Self::I32s(_) => 9,
            Self::U64(_) => 10,
            Self::Raw(kind, _) => *kind,
        };
        out.extend(kind.to_le_bytes());
        match self {
            Self::U32(v) => out.extend(v.to_le_bytes()),
            Self::U64(v) => out.extend(v.to_le_bytes()),
            Self::F32(v) => out.extend(v.to_le_bytes()),
            Self::Bool(v) => out.push(u8::from(*v)),
            Self::Str(v) => put_str(out, v),
            Self::Strs(v) => put_array(out, 8, v, |out, v| put_str(out, v)),
            Self::F32s(v) => put_array(out, 6, v, |out, v| out.extend(v.to_le_bytes())),
            Self::I32s(v) => put_array(out, 5, v, |out, v| out.extend(v.to_le_bytes())),
            Self::Raw(_, bytes) => out.extend(bytes),
        }
    }
}

impl GgufBuilder {
    /// Adds a metadata entry, also if its key is there already.
    #[must_use]
    pub fn meta(mut self, key: &str, value: Meta) -> Self {
        self.meta.push((key.to_owned(), value));
        self
    }

    /// Replaces (or adds) a metadata entry.
    #[must_use]
    pub fn replace(mut self, key: &str, value: Meta) -> Self {
        self.meta.retain(|(k, _)| k != key);
        self.meta(key, value)
    }

    /// Removes a metadata entry or a tensor.
    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        self.meta.retain(|(k, _)| k != name);
        self.tensors.retain(|(n, ..)| n != name);
        self
    }

    /// Adds a tensor. `dims` as in the file, fastest first; nothing is checked.
    #[must_use]
    pub fn tensor(mut self, name: &str, dims: &[u64], ggml_type: u32, bytes: Vec<u8>) -> Self {
        self.tensors
            .push((name.to_owned(), dims.to_vec(), ggml_type, bytes));
        self
    }

    /// The file.
    pub fn build(&self) -> Vec<u8> {
        let alignment = self.alignment.max(1) as usize;
        let mut meta = self.meta.clone();
        if self.alignment != 32 {
            meta.push(("general.alignment".into(), Meta::U32(self.alignment as u32)));
        }
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((meta.len() as u64).to_le_bytes());
        for (key, value) in &meta {
            put_str(&mut out, key);
            value.put(&mut out);
        }
        let mut offset = 0;
        for (name, dims, ggml_type, bytes) in &self.tensors {
            put_str(&mut out, name);
            out.extend((dims.len() as u32).to_le_bytes());
            out.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
            out.extend(ggml_type.to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset += bytes.len().next_multiple_of(alignment);
        }
        for (.., bytes) in &self.tensors {
            out.resize(out.len().next_multiple_of(alignment), 0);
            out.extend(bytes);
        }
        out
    }
}

/// `SplitMix64`, so that files do not depend on a random number crate.
#[derive(Debug, Clone)]
pub struct Rng(pub u64);

impl Rng {
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `-1..1`.
    pub fn signed(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// What [`tiny_gguf`] makes: 2 to 4 layers, `d_model` 64, grouped heads, a vocabulary of about 300.
pub fn tiny_spec(arch: Arch) -> ModelSpec {
    let gemma = arch == Arch::Gemma3;
    let (layers, heads, kv_heads, head_dim) = match arch {
        Arch::Llama => (2, 4, 2, 16),
        Arch::Qwen2 => (3, 4, 1, 16),
        Arch::Qwen3 => (2, 4, 2, 32), // q_dim 128, not d_model, on purpose
        Arch::Gemma3 => (4, 2, 1, 32),
    };
    let rope = RopeSpec {
        base: if gemma { 1e6 } else { 1e4 },
        dims: head_dim,
        style: if arch == Arch::Llama {
            RopeStyle::Interleaved
        } else {
            RopeStyle::Neox
        },
        scaling: RopeScaling::None,
    };
    let local = RopeSpec {
        base: 1e4,
        ..rope.clone()
    };
    let kind = |layer: usize| {
        let (rope, window) = if gemma && layer.is_multiple_of(2) {
            (1, Some(12))
        } else {
            (0, None)
        };
        LayerKind { rope, window }
    };
    ModelSpec {
        arch,
        name: format!("tiny {}", arch.name()),
        layers,
        d_model: 64,
        d_ff: 128,
        heads,
        kv_heads,
        head_dim,
        vocab: vocabulary(arch).tokens.len(),
        context: 4096,
        norm_eps: 1e-5,
        embed_scale: if gemma { 8.0 } else { 1.0 },
        attn_scale: (head_dim as f32).sqrt().recip(),
        attn_softcap: None,
        final_softcap: None,
        act: if gemma { Act::GeluTanh } else { Act::Silu },
        qkv_bias: arch == Arch::Qwen2,
        qk_norm: matches!(arch, Arch::Qwen3 | Arch::Gemma3),
        post_norms: gemma,
        tied: arch != Arch::Qwen2,
        layer_kinds: (0..layers).map(kind).collect(),
        ropes: if gemma { vec![rope, local] } else { vec![rope] },
    }
}

/// A small random model: a valid GGUF file with f32, `Q8_0` and `Q4_0` tensors, a tokenizer and a chat template.
pub fn tiny_gguf(arch: Arch, seed: u64) -> Vec<u8> {
    tiny_builder(arch, seed).build()
}

/// [`tiny_gguf`] before it is written, for tests that change something.
pub fn tiny_builder(arch: Arch, seed: u64) -> GgufBuilder {
    let spec = tiny_spec(arch);
    let key = |name: &str| format!("{}.{name}", arch.name());
    let mut out = GgufBuilder::default()
        .meta("general.architecture", Meta::Str(arch.name().into()))
        .meta("general.name", Meta::Str(spec.name.clone()))
        .meta(&key("block_count"), Meta::U32(spec.layers as u32))
        .meta(&key("context_length"), Meta::U32(spec.context as u32))
        .meta(&key("embedding_length"), Meta::U32(spec.d_model as u32))
        .meta(&key("feed_forward_length"), Meta::U32(spec.d_ff as u32))
        .meta(&key("attention.head_count"), Meta::U32(spec.heads as u32))
        .meta(&key("attention.head_count_kv"), Meta::U32(spec.kv_heads as u32))
        .meta(&key("attention.key_length"), Meta::U32(spec.head_dim as u32))
        .meta(&key("attention.value_length"), Meta::U32(spec.head_dim as u32))
        .meta(&key("attention.layer_norm_rms_epsilon"), Meta::F32(spec.norm_eps))
        .meta(&key("rope.freq_base"), Meta::F32(spec.ropes[0].base));
    if arch == Arch::Gemma3 {
        out = out
            .meta(&key("attention.sliding_window"), Meta::U32(12))
            .meta(&key("attention.sliding_window_pattern"), Meta::U32(2));
    }
    out = vocabulary(arch).write(out);
    let mut rng = Rng(seed);
    for role in Role::all(spec.layers) {
        let Some([rows, cols]) = role.shape(&spec) else {
            continue;
        };
        let dims = if rows == 1 {
            vec![cols as u64]
        } else {
            vec![cols as u64, rows as u64]
        };
        let (ggml_type, bytes) = weights(role, rows, cols, &mut rng);
        out = out.tensor(&role.gguf_name(), &dims, ggml_type, bytes);
    }
    out
}

/// `config.json` of the same model in a safetensors folder.
pub fn tiny_config(arch: Arch) -> serde_json::Value {
    let spec = tiny_spec(arch);
    let mut config = serde_json::json!({
        "model_type": if arch == Arch::Gemma3 { "gemma3_text" } else { arch.name() },
        "_name_or_path": spec.name,
        "num_hidden_layers": spec.layers,
        "max_position_embeddings": spec.context,
        "hidden_size": spec.d_model,
        "intermediate_size": spec.d_ff,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.ropes[0].base,
        "tie_word_embeddings": spec.tied,
    });
    if arch == Arch::Gemma3 {
        config["sliding_window"] = 12.into();
        config["sliding_window_pattern"] = 2.into();
        config["query_pre_attn_scalar"] = spec.head_dim.into();
        config["rope_local_base_freq"] = 10_000.0.into();
    }
    config
}

/// Tensors of a safetensors folder: names, shapes, values. Every value is exact in bf16; Gemma's norms are `w`, not `1 + w`.
pub fn tiny_tensors(arch: Arch, seed: u64) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let spec = tiny_spec(arch);
    let mut rng = Rng(seed);
    let tensor = |role: Role| {
        let [rows, cols] = role.shape(&spec)?;
        let spread = if rows == 1 {
            0.25
        } else {
            (3.0 / cols as f32).sqrt()
        };
        let value = |_| half::bf16::from_f32(spread * rng.signed()).to_f32();
        let shape = if rows == 1 { vec![cols] } else { vec![rows, cols] };
        Some((
            role.folder_name(arch, "model."),
            shape,
            (0..rows * cols).map(value).collect(),
        ))
    };
    Role::all(spec.layers).filter_map(tensor).collect()
}

/// Writes tensors as a safetensors file, as f32 or, with `narrow`, as bf16.
pub fn safetensors_bytes(tensors: &[(String, Vec<usize>, Vec<f32>)], narrow: bool) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, shape, values) in tensors {
        let from = data.len();
        if narrow {
            data.extend(values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()));
        } else {
            data.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        }
        let dtype = if narrow { "BF16" } else { "F32" };
        let entry = serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": [from, data.len()] });
        header.insert(name.clone(), entry);
    }
    let header = serde_json::Value::Object(header).to_string().into_bytes();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header);
    out.extend(data);
    out
}

/// Type and bytes of a random tensor. Variances keep activations and logits in a sane range.
fn weights(role: Role, rows: usize, cols: usize, rng: &mut Rng) -> (u32, Vec<u8>) {
    let n = rows * cols;
    let floats = |rng: &mut Rng, centre: f32, spread: f32| {
        (
            0,
            (0..n)
                .flat_map(|_| (centre + spread * rng.signed()).to_le_bytes())
                .collect(),
        )
    };
    // Uniform in -a..a has variance a^2 / 3.
    let spread = (3.0 / cols as f32).sqrt();
    match role {
        Role::AttnQBias(_) | Role::AttnKBias(_) | Role::AttnVBias(_) => floats(rng, 0.0, 0.5),
        _ if rows == 1 => floats(rng, 1.0, 0.2),
        Role::AttnQ(_) | Role::Output => floats(rng, 0.0, spread),
        Role::AttnV(_) | Role::FfnGate(_) | Role::FfnDown(_) => (2, q4_0(n, spread, rng)),
        Role::TokenEmbd => (8, q8_0(n, 0.43, rng)),
        _ => (8, q8_0(n, spread, rng)),
    }
}

/// Random blocks of 32 values in `-spread..spread`: a scale, then 32 signed bytes.
fn q8_0(n: usize, spread: f32, rng: &mut Rng) -> Vec<u8> {
    let mut out = Vec::with_capacity(n / 32 * 34);
    for _ in 0..n / 32 {
        let scale = spread / 127.0 * (0.9 + 0.1 * rng.signed());
        out.extend(half::f16::from_f32(scale).to_le_bytes());
        out.extend((0..32).map(|_| (rng.signed() * 127.0) as i8 as u8));
    }
    out
}

/// Random blocks of 32 values in `-spread..spread`: a scale, then 16 bytes with two values of `-8..8` each.
fn q4_0(n: usize, spread: f32, rng: &mut Rng) -> Vec<u8> {
    let mut out = Vec::with_capacity(n / 32 * 18);
    for _ in 0..n / 32 {
        let scale = spread / 8.0 * (0.9 + 0.1 * rng.signed());
        out.extend(half::f16::from_f32(scale).to_le_bytes());
        out.extend((0..2).flat_map(|_| rng.bits().to_le_bytes()));
    }
    out
}

/// A tokenizer's tables.
struct Vocabulary {
    model: &'static str,
    pre: &'static str,
    tokens: Vec<String>,
    types: Vec<i32>,
    merges: Vec<String>,
    scores: Vec<f32>,
    bos: u32,
    eos: u32,
    add_bos: bool,
    template: &'static str,
}

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const BYTE: i32 = 6;

/// Byte-level BPE with a few merges, or, for Gemma, SentencePiece with byte fallback.
fn vocabulary(arch: Arch) -> Vocabulary {
    if arch == Arch::Gemma3 {
        sentencepiece()
    } else {
        byte_bpe(arch)
    }
}

fn byte_bpe(arch: Arch) -> Vocabulary {
    let controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    let mut tokens: Vec<String> = controls.map(String::from).into();
    let mut types = vec![CONTROL; tokens.len()];
    tokens.extend((0..=255u8).map(|byte| byte_char(byte).to_string()));
    // In order of rank; both halves of a merge exist before it.
    let merges = [
        "h e", "Ġ t", "Ġt he", "i n", "a n", "Ġ a", "o n", "e r", "r e", "Ġ s", "a t", "o r", "e n", "l l",
        "o u", "an d", "Ġ and", "in g", "Ġ w", "i s", "he ll", "hell o", "Ġw or", "l d", "Ġwor ld", "u s",
        "us er", "Ċ Ċ",
    ];
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    types.resize(tokens.len(), NORMAL);
    Vocabulary {
        model: "gpt2",
        pre: if arch == Arch::Llama { "smollm" } else { "qwen2" },
        tokens,
        types,
        merges: merges.map(String::from).into(),
        scores: Vec::new(),
        bos: 1,
        eos: 2,
        add_bos: false,
        template: "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    }
}

/// The character that stands for a byte in byte-level BPE: printable Latin-1 as it is, the others from U+0100 on.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(256 + rank).expect("68 characters from U+0100 on exist")
}

fn sentencepiece() -> Vocabulary {
    let mut tokens: Vec<String> = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<start_of_turn>",
        "<end_of_turn>",
    ]
    .map(String::from)
    .into();
    let mut types = vec![CONTROL, CONTROL, CONTROL, UNKNOWN, CONTROL, CONTROL];
    let mut scores = vec![-1000.0; tokens.len()];
    tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    types.resize(tokens.len(), BYTE);
    scores.resize(tokens.len(), -1000.0);
    let pieces = [
        "\n", "▁t", "he", "▁the", "in", "▁a", "on", "er", "ll", "hell", "hello", "or", "ld", "▁w", "▁wor",
        "▁world",
    ];
    let singles = "▁etaoinshrdlucmfwypvbgkqjxzTAIS.,!?'".chars().map(String::from);
    for (rank, piece) in pieces.into_iter().map(String::from).chain(singles).enumerate() {
        tokens.push(piece);
        types.push(NORMAL);
        scores.push(-(rank as f32));
    }
    Vocabulary {
        model: "llama",
        pre: "default",
        tokens,
        types,
        merges: Vec::new(),
        scores,
        bos: 2,
        eos: 1,
        add_bos: true,
        template: "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    }
}

impl Vocabulary {
    fn write(self, out: GgufBuilder) -> GgufBuilder {
        let mut out = out
            .meta("tokenizer.ggml.model", Meta::Str(self.model.into()))
            .meta("tokenizer.ggml.pre", Meta::Str(self.pre.into()))
            .meta("tokenizer.ggml.tokens", Meta::Strs(self.tokens))
            .meta("tokenizer.ggml.token_type", Meta::I32s(self.types))
            .meta("tokenizer.ggml.bos_token_id", Meta::U32(self.bos))
            .meta("tokenizer.ggml.eos_token_id", Meta::U32(self.eos))
            .meta("tokenizer.ggml.add_bos_token", Meta::Bool(self.add_bos))
            .meta("tokenizer.chat_template", Meta::Str(self.template.into()));
        if !self.merges.is_empty() {
            out = out.meta("tokenizer.ggml.merges", Meta::Strs(self.merges));
        }
        if !self.scores.is_empty() {
            out = out
                .meta("tokenizer.ggml.scores", Meta::F32s(self.scores))
                .meta("tokenizer.ggml.unknown_token_id", Meta::U32(3))
                .meta("tokenizer.ggml.padding_token_id", Meta::U32(0))
                .meta("tokenizer.ggml.add_space_prefix", Meta::Bool(false));
        }
        out
    }
}

/// The file of a pulled model, if this machine has it: in `ANTEFIX_TEST_MODELS` or in the model store's folder.
pub fn model(alias: &str) -> Option<std::path::PathBuf> {
    let home = std::env::var_os("ANTEFIX_HOME")
        .map(std::path::PathBuf::from)
        .or_else(|| {
            let cache = std::env::var_os("XDG_CACHE_HOME").map(std::path::PathBuf::from);
            let cache =
                cache.or_else(|| Some(std::path::PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
            Some(cache?.join("antefix"))
        });
    let file = home?.join("models").join(alias).join("model.gguf");
    file.exists().then_some(file)
}
