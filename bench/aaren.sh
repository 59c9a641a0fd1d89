#!/usr/bin/env bash
# Aaren beside its Transformer twin, as rows under bench/results/DATE-CPU/: bench/aaren.sh DATA_FOLDER
#
# The folder holds JapaneseVowels_TRAIN.ts and JapaneseVowels_TEST.ts (docs/aaren.md says where from). Trained models go to target/aaren/.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?a folder with JapaneseVowels_TRAIN.ts and JapaneseVowels_TEST.ts}
cpu=$(grep -qm1 amx_bf16 /proc/cpuinfo && echo intel-amx || uname -m)
out=${OUT:-bench/results/$(date +%F)-$cpu}
mkdir -p "$out" target/aaren
cargo build --release -p antefix-train --examples
target/release/examples/aaren_stream > "$out/aaren-stream.jsonl"
target/release/examples/aaren_tasks target/aaren --data "$data"
cat target/aaren/aaren-tasks.jsonl >> "$out/aaren-tasks.jsonl"
