#!/usr/bin/env bash
# What sparse attention gains and loses, as rows and pictures under bench/results/DATE-CPU/: bench/sparse.sh [b c e i]
#
# Without letters all of them, about an hour on two cores with AMX, alone on the machine. Minutes below are estimates for such a machine. The text is
# our own documentation: some 40,000 tokens that somebody wrote (generated prose misleads, docs/sparse.md).
set -euo pipefail
cd "$(dirname "$0")/.."
antefix=${ANTEFIX:-target/release/antefix}
cpu=$(grep -qm1 amx_bf16 /proc/cpuinfo && echo intel-amx || uname -m)
out=${OUT:-bench/results/$(date +%F)-$cpu}
qwen=qwen2.5-coder-0.5b
text=$(mktemp)
trap 'rm -f "$text"' EXIT
cat README.md docs/*.md ARCHITECTURE.md CHANGELOG.md LOG.md > "$text"
mkdir -p "$out"

failed=0

# Runs a command and appends what it prints to a file of rows. One that fails does not end the others.
rows() {
  local file=$1
  shift
  echo "== $(date +%T) antefix $*" >&2
  "$antefix" "$@" >> "$out/$file" || { failed=1; echo "failed: antefix $*" >&2; }
}

list() { local IFS=,; echo "$*"; }

b() { # the kernel alone, by density; 8 min
  cargo run --release -p antefix-attention --example sparse_density > "$out/sparse-density.jsonl"
  cargo run --release -p antefix-lab --example plot_density "$out/sparse-density.jsonl" "$out/sparse-density.svg"
}

c() { # prompts: time, density, recall, predictions, the pictures of item d; answers at the same settings; 60 min
  local group=unit=kv_group
  local few=(
    "flexprefill,gamma=0.95,$group" "flexprefill,gamma=0.98,$group" "xattention,tau=0.9,$group" "xattention,tau=0.95,$group"
    minference,share=0.125 dhsa,share=0.25 anchor_attention,theta=8 "hip_attention,top_k=2048,$group" a_shape,window=4096
  )
  local all=(
    "${few[@]}" flexprefill,gamma=0.95 flexprefill,gamma=0.98 anchor_attention,theta=6 anchor_attention,theta=7
    block_topk,keep=32 block_topk,keep=64 block_topk,keep=96 minference,share=0.25 "hip_attention,top_k=1024,$group" dhsa,share=0.125 dhsa,share=0.4
    random_blocks oracle_topk
  )
  local length
  rows sparse-prefill.jsonl bench --sparse -m smollm2 --lengths 8000 --text "$text" --recall-rows 2 --json --methods "$(list "${few[@]}")"
  for length in 8192 16384; do
    rows sparse-prefill.jsonl bench --sparse -m $qwen --lengths $length --text "$text" --recall-rows 2 --json \
      --plot "$out/sparse-prefill-$length.svg" --methods "$(list "${all[@]}")" # 3 and 10 min
  done
  rows sparse-prefill.jsonl bench --sparse -m $qwen --lengths 32000 --text "$text" --recall-rows 2 --json \
    --plot "$out/sparse-prefill-32000.svg" --methods "$(list "${few[@]}" block_topk,keep=64 block_topk,keep=128)" # 15 min
  rows sparse-answers.jsonl eval needle variables -m $qwen --lengths 16000,32000 --depths 0.3,0.7 -n 1 --digits 5 --json \
    --sweep dense --sweep "xattention,tau=0.9,$group" --sweep block_topk,keep=64 --sweep "flexprefill,gamma=0.98,$group" # 30 min
}

e() { # drawn tokens; what choosing costs them, without a model; answers at the same settings; 20 min
  cargo run --release -p antefix-papers --example decode_plans -- --lengths 4096,16384,32768 >> "$out/decode-plans.jsonl"
  local methods=tidaldecode,tidaldecode,recall=1,hip_decode,quest,a_shape_decode
  rows sparse-decode.jsonl bench --sparse -m $qwen --lengths 16384,32000 --text "$text" -n 32 --batch 1,4,8 --json --methods $methods
  rows sparse-decode.jsonl bench --sparse --shared -m $qwen --lengths 16384 --text "$text" -n 32 --batch 8,32 --json --methods $methods # 2 min
  rows sparse-answers.jsonl eval needle -m $qwen --lengths 16000 --depths 0.1,0.5,0.9 -n 2 --digits 5 --seed 3 --reuse-prompts --json \
    --sweep dense --sweep tidaldecode --sweep hip_decode --sweep hip_decode,unit_keys=2 --sweep quest --sweep a_shape_decode # 6 min
  rows sparse-answers.jsonl eval variables -m $qwen --lengths 16000 -n 6 --digits 5 --seed 5 --reuse-prompts --json \
    --sweep dense --sweep tidaldecode --sweep hip_decode --sweep hip_decode,unit_keys=2 --sweep quest # 5 min
}

i() { # settings by target on prompts of 16K: two of text, two of program code; 10 min
  local folder profile=$out/profile.toml
  folder=$(mktemp -d)
  head -c 50000 "$text" > "$folder/1.txt"
  head -c 100000 "$text" | tail -c 50000 > "$folder/2.txt"
  head -c 50000 < <(cat crates/attention/src/*.rs) > "$folder/3.txt"
  head -c 50000 < <(cat crates/engine/src/*.rs) > "$folder/4.txt"
  SECONDS=0
  "$antefix" tune -m $qwen --method xattention,unit=kv_group --target-recall 0.95 "$folder"/*.txt --out "$profile" 2>&1 | tee "$out/tune.txt"
  echo "$SECONDS s" >> "$out/tune.txt"
  rm -r "$folder"
}

for item in "${@:-b c e i}"; do
  for letter in $item; do
    case $letter in
      [bcei]) "$letter" ;;
      *) echo "no item \`$letter\`: one of b c e i" >&2; exit 2 ;;
    esac
  done
done
exit $failed
