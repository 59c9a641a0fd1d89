"""Tokens per second of a full training step in PyTorch: the twin of crates/train/examples/step.

    python bench/train_step.py gpt [STEPS]
    python bench/train_step.py lora [STEPS]   # a model of SmolLM2-135M's sizes, LoRA r 8 on q and v

float32, two threads, fused attention (scaled_dot_product_attention), AdamW (fused), gradient norm clipped at 1.
"""

import json
import resource
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F


class Attention(nn.Module):
    def __init__(self, d, heads, kv_heads, rope, rank):
        super().__init__()
        self.heads, self.kv_heads, self.dim, self.rope = heads, kv_heads, d // heads, rope
        self.q = nn.Linear(d, d, bias=False)
        self.k = nn.Linear(d, kv_heads * self.dim, bias=False)
        self.v = nn.Linear(d, kv_heads * self.dim, bias=False)
        self.o = nn.Linear(d, d, bias=False)
        if rank:
            self.qa, self.qb = nn.Linear(d, rank, bias=False), nn.Linear(rank, d, bias=False)
            self.va, self.vb = nn.Linear(d, rank, bias=False), nn.Linear(rank, kv_heads * self.dim, bias=False)
        self.rank = rank

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.rank:
            q = q + 2.0 * self.qb(self.qa(x))
            v = v + 2.0 * self.vb(self.va(x))
        q = q.view(b, t, self.heads, self.dim).transpose(1, 2)
        k = k.view(b, t, self.kv_heads, self.dim).transpose(1, 2)
        v = v.view(b, t, self.kv_heads, self.dim).transpose(1, 2)
        if self.rope is not None:
            cos, sin = self.rope
            turn = lambda z: z * cos[:t] + torch.cat((-z[..., self.dim // 2 :], z[..., : self.dim // 2]), -1) * sin[:t]
            q, k = turn(q), turn(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class GptBlock(nn.Module):
    def __init__(self, d, heads, ffn):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = Attention(d, heads, heads, None, 0)
        self.up, self.down = nn.Linear(d, ffn, bias=False), nn.Linear(ffn, d, bias=False)

    def forward(self, x):
        x = x + self.attn(self.n1(x))
        return x + self.down(F.gelu(self.up(self.n2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self, d, layers, heads, ffn, vocab, context):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, d), nn.Embedding(context, d)
        self.blocks = nn.ModuleList(GptBlock(d, heads, ffn) for _ in range(layers))
        self.norm = nn.LayerNorm(d)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.tokens.weight.t()


class LlamaBlock(nn.Module):
    def __init__(self, d, heads, kv_heads, ffn, rope, rank):
        super().__init__()
        self.n1, self.n2 = nn.RMSNorm(d, 1e-5), nn.RMSNorm(d, 1e-5)
        self.attn = Attention(d, heads, kv_heads, rope, rank)
        self.gate, self.up = nn.Linear(d, ffn, bias=False), nn.Linear(d, ffn, bias=False)
        self.down = nn.Linear(ffn, d, bias=False)

    def forward(self, x):
        x = x + self.attn(self.n1(x))
        h = self.n2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    def __init__(self, d, layers, heads, kv_heads, ffn, vocab, context, rank):
        super().__init__()
        dim = d // heads
        angles = torch.outer(torch.arange(context).float(), 1e5 ** (-torch.arange(0, dim, 2) / dim))
        rope = (torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin())
        self.tokens = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList(LlamaBlock(d, heads, kv_heads, ffn, rope, rank) for _ in range(layers))
        self.norm = nn.RMSNorm(d, 1e-5)
        for name, p in self.named_parameters():
            p.requires_grad = any(f".{part}.weight" in name for part in ("qa", "qb", "va", "vb"))

    def forward(self, tokens):
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.tokens.weight.t()


def main():
    kind = sys.argv[1] if len(sys.argv) > 1 else "gpt"
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 10
    torch.set_num_threads(2)
    torch.manual_seed(0)
    if kind == "gpt":
        vocab, sequences, length = 4096, 8, 512
        model = Gpt(256, 4, 4, 1024, vocab, length)
    else:
        vocab, sequences, length = 49152, 2, 512
        model = Llama(576, 30, 9, 3, 1536, vocab, length, 8)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    times = []
    for step in range(steps + 2):
        tokens = torch.randint(vocab, (sequences, length))
        start = time.perf_counter()
        logits = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten().roll(-1))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        if step >= 2:
            times.append(time.perf_counter() - start)
    times.sort()
    seconds = times[len(times) // 2]
    print(json.dumps({"engine": f"torch {torch.__version__}", "tokens_s": round(sequences * length / seconds), "step_s": round(seconds, 4), "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))


main()
