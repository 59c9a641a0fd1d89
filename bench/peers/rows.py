"""What is measured: rows such as `pp2048`, `tg128@d4096` and `shared7168x32`, and the least time each could take."""

import re
from dataclasses import dataclass

# gemma3's sliding window in tokens; `antefix explain` says how many layers have one, not how long it is.
WINDOW = 512

ROWS = ["pp512", "pp2048", "pp8192", "tg128", "tg128@d4096"]
SHARED = ["shared2048x32", "shared7168x32"]
# Tokens each sequence of a shared row writes.
SHARED_STEPS = 64


@dataclass(frozen=True)
class Row:
    """One test. `kind` is `pp` (n prompt tokens after `depth` others), `tg` (n single steps after `depth` tokens) or `shared`
    (`batch` sequences write n tokens each behind one prompt of `depth`)."""

    kind: str
    n: int
    depth: int = 0
    batch: int = 1

    @property
    def name(self):
        if self.kind == "shared":
            return f"shared{self.depth}x{self.batch}"
        return f"{self.kind}{self.n}" + (f"@d{self.depth}" if self.depth else "")

    @property
    def repeats(self):
        """Repetitions inside one process: short tests need several for a median, long ones are steady and slow."""
        return 1 if self.kind == "shared" or (self.kind == "pp" and self.n > 1024) else 3

    def within(self, context):
        """This row, cut to fit the model: 8,192 prompt tokens become 7,168 where the context has no room for more."""
        if self.kind == "pp" and self.n + self.depth >= context:
            return Row(self.kind, context - context // 8 - self.depth, self.depth)
        return self


def parse(name):
    if found := re.fullmatch(r"(pp|tg)([1-9]\d*)(?:@d(\d+))?", name):
        return Row(found[1], int(found[2]), int(found[3] or 0))
    if found := re.fullmatch(r"shared([1-9]\d*)x([1-9]\d*)", name):
        return Row("shared", SHARED_STEPS, int(found[1]), int(found[2]))
    raise ValueError(f"`{name}` is no row\nhint: such as pp512, tg128, tg128@d4096, shared2048x32")


def ceiling(row, model, machine):
    """Tokens per second that no program could exceed if it did the same arithmetic at the measured ceilings.

    `model` is what `antefix explain --json` prints, `machine` what `antefix doctor --json` prints. Every pass reads all
    packed weights and the keys and values it attends to; products of weights run in int8, attention in f32; reading may
    overlap with arithmetic, int8 and f32 work may not overlap with each other.
    """
    layers, windowed = model["layers"], model["windowed_layers"]
    width, heads, dim = model["d_model"], model["heads"], model["head_dim"]
    attention_weights = width * dim * (2 * heads + 2 * model["kv_heads"])
    body = layers * (attention_weights + 3 * width * model["d_ff"])
    head = width * model["vocab"]

    def keys(context):
        """Keys read by one token, summed over layers."""
        return (layers - windowed) * context + windowed * min(context, WINDOW)

    def seconds(int8_macs, key_reads, kv_reads, passes):
        arithmetic = 2 * int8_macs / (machine["int8_gop_s"] * 1e9)
        arithmetic += 4 * heads * dim * key_reads / (machine["f32_gflop_s"] * 1e9)
        kv_bytes = kv_reads * model["kv_bytes_per_token"] / layers
        return max(arithmetic, (passes * model["weight_bytes"] + kv_bytes) / (machine["read_gb_s"] * 1e9))

    if row.kind == "pp":
        # Only the last position needs logits. A chunk's keys are read once, not once a token: left out of the bytes.
        key_reads = sum(keys(row.depth + i + 1) for i in range(row.n))
        return row.n / seconds(body * row.n + head, key_reads, 0, 1)
    if row.kind == "tg":
        key_reads = keys(row.depth + row.n // 2)
        return 1 / seconds(body + head, key_reads, key_reads, 1)
    shared, own = keys(row.depth), keys(row.depth + row.n // 2) - keys(row.depth)
    step = seconds((body + head) * row.batch, row.batch * (shared + own), shared + row.batch * own, 1)
    return row.batch / step
