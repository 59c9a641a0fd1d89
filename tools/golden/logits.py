#!/usr/bin/env python3
"""Writes tests/golden/logits: prompts as token ids, and the logits that transformers and llama.cpp give for them.

    /tmp/venv-golden/bin/pip install torch==2.15.0 transformers==5.23.0 accelerate gguf==0.19.0 typing_extensions
    LLAMA_CPP_LIB_PATH=FOLDER-OF-libllama /tmp/venv-golden/bin/python tools/golden/logits.py --models /tmp/models \\
        --bindings FOLDER-OF-llama_cpp_python --wheel aiperf-0.13.0-py3-none-any.whl [--only smollm2]

One file a model, <alias>.jsonl. The first line says what made it and names the ids that are stored for every prompt. Each other
line is a prompt; under `transformers` (f32, weights dequantised, eager attention), `llama_f32` (llama.cpp on the file
requantised to f32) and `llama` (llama.cpp on the file as it is, int8 activations), both with an f32 cache and without flash
attention:
    at              logits of the last position at the ids of the first line
    top             [id, logit] of its 64 largest
    lse             its logsumexp over the whole vocabulary
    argmax, logprob of every position

transformers' loader is not trusted: every weight is compared with gguf.quants.dequantize, and the configuration with the file.
"""

import argparse, ctypes, hashlib, importlib, importlib.metadata, json, os, pathlib, random, re, subprocess, sys, tempfile, types, zipfile

import gguf
import numpy as np

SEED = 20252
AT, TOP, LONG = 512, 64, 2048
SHAKESPEARE = "aiperf/dataset/generator/assets/shakespeare.txt"
FILES = {
    "smollm2": "smollm2-135m-q4_1.gguf",
    "gemma3-270m": "gemma-3-270m-q4_k_m.gguf",
    "qwen2.5-coder-0.5b": "qwen2.5-coder-0.5b-q4_k_m.gguf",
}
CHATML = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TURNS = "<start_of_turn>user\n{}\n\n{}<end_of_turn>\n<start_of_turn>model\n"
CHAT = ("You answer in one short paragraph.", "Why is the sky blue at noon, but red in the evening?")
PROMPTS = {
    "prose": "The lighthouse keeper had not spoken to anyone since the autumn storms. Every evening he climbed the hundred and "
    "twelve steps, trimmed the wick, wound the clockwork and wrote the state of the sea into his book. On the first of "
    "February a small boat came round the point with its sail torn, and the man at the tiller was waving something white.",
    "facts": "The capital of France is Paris. The capital of Italy is Rome. The capital of Japan is Tokyo. The capital of Egypt is",
    "python": "import heapq\n\n\ndef shortest(graph, start):\n    \"\"\"Dijkstra. `graph[a][b]` is the length of a -> b.\"\"\"\n"
    "    dist = {start: 0}\n    queue = [(0, start)]\n    while queue:\n        d, a = heapq.heappop(queue)\n        if d > dist[a]:\n"
    "            continue\n        for b, w in graph[a].items():\n            if d + w < dist.get(b, float(\"inf\")):\n",
    "rust": "/// The largest element and its index.\npub fn peak(values: &[f32]) -> Option<(usize, f32)> {\n    let mut best = None;\n"
    "    for (i, &v) in values.iter().enumerate() {\n        match best {\n            Some((_, b)) if b >= v => {}\n",
    "german": "Als der Zug endlich über die Brücke fuhr, öffnete das Mädchen das Fenster und hörte, wie unten der Fluß rauschte. "
    "»Wohin fahren wir eigentlich?«, fragte sie. Der Schaffner lächelte müde und",
    "cjk": "日本の首都は東京です。人口は約千四百万人で、世界最大級の都市の一つです。中国的首都是北京，历史悠久，",
    "json": '{"users": [{"id": 1, "name": "Ada", "tags": ["admin", "ops"], "score": 9.75}, {"id": 2, "name": "Grace", "tags": [',
    "maths": "Let $f(x) = x^3 - 6x^2 + 11x - 6$. Then $f(1) = 0$, so $f(x) = (x - 1)(x^2 - 5x + 6)$. The quadratic factors as "
    "$(x - 2)(x - 3)$, hence the roots are 1, 2 and",
}


class Llama:
    """llama.cpp, through the bindings of llama-cpp-python without its Python code above them."""

    def __init__(self, bindings):
        package = types.ModuleType("llama_cpp")
        package.__path__ = [str(bindings / "llama_cpp")]
        sys.modules["llama_cpp"] = package
        self.api = importlib.import_module("llama_cpp.llama_cpp")
        self.api.llama_backend_init()
        self.version = re.search(r"Version: (.*)", (bindings / "PKG-INFO").read_text()).group(1)

    def open(self, path):
        params = self.api.llama_model_default_params()
        params.use_mmap = True
        return self.api.llama_model_load_from_file(str(path).encode(), params)

    def tokenize(self, model, text):
        out = (ctypes.c_int32 * 400_000)()
        data = text.encode()
        n = self.api.llama_tokenize(self.api.llama_model_get_vocab(model), data, len(data), out, len(out), True, True)
        return list(out[:n])

    def logits(self, model, ids):
        params = self.api.llama_context_default_params()
        params.n_ctx = len(ids) + 64
        params.n_batch = len(ids)
        params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = 2
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = 0  # off
        params.swa_full = True
        ctx = self.api.llama_init_from_model(model, params)
        batch = self.api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, t in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = t, i, 1, 0, 1
        if self.api.llama_decode(ctx, batch) != 0:
            sys.exit("llama_decode failed")
        vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(model))
        out = np.ctypeslib.as_array(self.api.llama_get_logits(ctx), (len(ids) * vocab,)).reshape(len(ids), vocab).copy()
        self.api.llama_batch_free(batch)
        self.api.llama_free(ctx)
        return out


def transformers(folder, name):
    """The model, after a look at everything its loader has set."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    reader = gguf.GGUFReader(folder / name)
    arch = reader.fields["general.architecture"].contents()
    field = lambda key: reader.fields[f"{arch}.{key}"].contents()
    config = model.config
    same = lambda what, got, want: got == want or sys.exit(f"{name}: {what} is {got!r}, the file needs {want!r}")
    same("eps", np.float32(config.rms_norm_eps), np.float32(field("attention.layer_norm_rms_epsilon")))
    same("heads", config.num_attention_heads, field("attention.head_count"))
    same("kv heads", config.num_key_value_heads, field("attention.head_count_kv"))
    same("layers", config.num_hidden_layers, field("block_count"))
    base, local = float(field("rope.freq_base")), 10_000.0
    # The frequencies that will be used, not what the configuration says about them.
    freqs = lambda base, dim: 1.0 / base ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    buffers = {k: v for k, v in model.model.rotary_emb.named_buffers() if k.endswith("inv_freq") and "original" not in k}
    if arch == "gemma3":
        same("window", config.sliding_window, field("attention.sliding_window"))
        kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(config.num_hidden_layers)]
        same("layer kinds", list(config.layer_types), kinds)
        same("query scale", config.query_pre_attn_scalar, field("attention.key_length"))
        same("head dim", config.head_dim, field("attention.key_length"))
        want = {"full_attention_inv_freq": base, "sliding_attention_inv_freq": local}
    else:
        want = {"inv_freq": base}
    same("RoPE buffers", sorted(buffers), sorted(want))
    for key, base in want.items():
        got = buffers[key].double().numpy()
        np.testing.assert_allclose(got, freqs(base, 2 * len(got)), rtol=1e-6, err_msg=f"{name}: {key}")

    state = model.state_dict()
    rename = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "ffn_norm": "pre_feedforward_layernorm" if arch == "gemma3" else "post_attention_layernorm",
        "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
    }
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    seen = set()
    for tensor in reader.tensors:
        stem, kind = tensor.name.rsplit(".", 1)
        if stem in whole:
            key = f"{whole[stem]}.{kind}"
        else:
            _, layer, part = stem.split(".")
            key = f"model.layers.{layer}.{rename[part]}.{kind}"
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if arch == "llama" and ("attn_q." in tensor.name or "attn_k." in tensor.name):
            # The file holds each head's rows for interleaved RoPE, transformers rotates halves.
            heads = config.num_attention_heads if "attn_q." in tensor.name else config.num_key_value_heads
            value = value.reshape(heads, -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        if arch == "gemma3" and "norm" in stem:
            value = value - np.float32(1)
        if not np.array_equal(state[key].numpy(), value):
            sys.exit(f"{name}: {key} is not {tensor.name}")
        seen.add(key)
    if "lm_head.weight" not in seen:
        same("tied", model.lm_head.weight.data_ptr(), model.model.embed_tokens.weight.data_ptr())
        seen.add("lm_head.weight")
    same("weights", sorted(seen), sorted(state))
    return lambda ids: model(torch.tensor([ids])).logits[0].numpy(), torch.inference_mode


def summary(logits, at):
    """What is stored of `[positions, vocab]`."""
    if not np.isfinite(logits).all():
        sys.exit("logits are not finite")
    lse = np.array([r.max() + np.log(np.exp((r - r.max()).astype(np.float64)).sum()) for r in logits])
    argmax, last = logits.argmax(1), logits[-1]
    top = np.argsort(-last, kind="stable")[:TOP]
    return {
        "at": [round(float(x), 5) for x in last[at]],
        "top": [[int(i), round(float(last[i]), 5)] for i in top],
        "lse": round(float(lse[-1]), 5),
        "argmax": argmax.tolist(),
        "logprob": [round(float(logits[i, a] - lse[i]), 4) for i, a in enumerate(argmax)],
    }


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--models", type=pathlib.Path, required=True, help="folder with the three GGUF files")
    args.add_argument("--bindings", type=pathlib.Path, required=True, help="unpacked sdist of llama-cpp-python")
    args.add_argument("--wheel", type=pathlib.Path, required=True, help="aiperf, for the long prompt")
    args.add_argument("--only", choices=FILES)
    args.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parents[2] / "tests/golden/logits")
    args = args.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    llama = Llama(args.bindings)
    play = zipfile.ZipFile(args.wheel).read(SHAKESPEARE).decode()[:20_000]
    for alias, name in FILES.items():
        if args.only not in (None, alias):
            continue
        model = llama.open(args.models / name)
        vocab = llama.api.llama_vocab_n_tokens(llama.api.llama_model_get_vocab(model))
        at = sorted(random.Random(SEED).sample(range(vocab), AT))
        chat = (TURNS if alias == "gemma3-270m" else CHATML).format(*CHAT)
        texts = PROMPTS | {"chat": chat}
        prompts = {key: llama.tokenize(model, text) for key, text in texts.items()}
        prompts["long"] = llama.tokenize(model, play)[:LONG]
        assert len(prompts["long"]) == LONG
        rows = {key: {"prompt": key, "ids": ids} for key, ids in prompts.items()}

        def measure(by, logits):
            for key, ids in prompts.items():
                rows[key][by] = summary(logits(ids), at)
                print(alias, key, len(ids), by, rows[key][by]["top"][0], file=sys.stderr, flush=True)

        measure("llama", lambda ids: llama.logits(model, ids))
        llama.api.llama_model_free(model)
        with tempfile.TemporaryDirectory() as folder:
            wide = pathlib.Path(folder) / "f32.gguf"
            quantize = pathlib.Path(os.environ["LLAMA_CPP_LIB_PATH"]) / "llama-quantize"
            command = [quantize, "--allow-requantize", args.models / name, wide, "F32"]
            subprocess.run(command, check=True, capture_output=True)
            model = llama.open(wide)
            measure("llama_f32", lambda ids: llama.logits(model, ids))
            llama.api.llama_model_free(model)
        forward, quiet = transformers(args.models, name)
        with quiet():
            measure("transformers", forward)
        import torch, transformers as package

        head = {
            "model": alias,
            "sha256": hashlib.sha256((args.models / name).read_bytes()).hexdigest(),
            "torch": torch.__version__, "transformers": package.__version__, "gguf": importlib.metadata.version("gguf"),
            "llama_cpp_python": llama.version, "seed": SEED, "at": at,
        }
        lines = [json.dumps(v, separators=(",", ":")) for v in [head, *rows.values()]]
        (args.out / f"{alias}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
