#!/usr/bin/env bash
# Step time and peak memory of training behind a shared prompt: grouped against repeated, in turn. SmolLM2, LoRA r 8 on q and v.
#   bench/grouped.sh [PAIRS] [OUT.jsonl]
set -euo pipefail
cd "$(dirname "$0")/.."
pairs=${1:-3}
out=${2:-/dev/stdout}
model=${MODEL:-$HOME/.cache/antefix/models/smollm2/model.gguf}
cargo build --release -q -p antefix-train --example grouped
step=./target/release/examples/grouped
for _ in $(seq "$pairs"); do
    for form in grouped repeated; do
        "$step" "$model" "$form" 8 1024 128 1 >>"$out"
        "$step" "$model" "$form" 8 256 256 1 >>"$out"
    done
    for form in grouped plain; do
        "$step" "$model" "$form" 1 1024 128 3 >>"$out"
    done
done
