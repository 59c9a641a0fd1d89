#!/usr/bin/env bash
# What the first eight methods gain and lose, as rows and pictures under bench/results/DATE-CPU/: bench/methods.sh [b c d e f g h hooks]
#
# Without letters all of them, some 100 minutes on two cores with AMX. LONG=1 adds what needs an hour more (32,768 tokens). Minutes below are
# estimates for such a machine. Profiles of heads are kept in antefix's home, where methods look for them.
set -euo pipefail
cd "$(dirname "$0")/.."
antefix=${ANTEFIX:-target/release/antefix}
cpu=$(grep -qm1 amx_bf16 /proc/cpuinfo && echo intel-amx || uname -m)
out=${OUT:-bench/results/$(date +%F)-$cpu}
heads=${ANTEFIX_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/antefix}/profiles/heads
long=${LONG:-0}
mkdir -p "$out" "$heads"

failed=0

# Runs a command and appends what it prints to a file of rows. One that fails does not end the others.
rows() {
  local file=$1
  shift
  echo "== $(date +%T) antefix $*" >&2
  "$antefix" "$@" >> "$out/$file" || { failed=1; echo "failed: antefix $*" >&2; }
}
repro() { rows repro.jsonl repro "$@" --json --out "$out" --write-docs; }

b() { # retrieval heads: table, heat map, masking curve; 12 min
  local model
  for model in qwen2.5-coder-0.5b smollm2; do
    local lengths=512,1024,2048
    [ $model = smollm2 ] && lengths=256,512
    rows masking-$model.jsonl analyse heads --kind retrieval -m $model --runs 60 --lengths $lengths --json \
      --out "$heads/$model.json" --rows "$out/retrieval_heads-$model.jsonl" --heat-map "$out/retrieval_heads-$model.svg" \
      --mask 0,1,2,4,8,16,32 --mask-prompts 12 --mask-draws 5 --mask-plot "$out/masking-$model.svg"
    [ ! -f "$heads/$model.json" ] || cp "$heads/$model.json" "$out/heads-$model.json"
  done
  repro retrieval_heads # 7 min
}

profiles() { # induction and echo beside what `b` measured; 2 min
  local model kind
  for model in "$@"; do
    [ -f "$heads/$model.json" ] || rows heads.jsonl analyse heads --kind semantic -m $model --runs 18 --lengths 256,512 --json \
      --out "$heads/$model.json"
    for kind in induction echo; do
      rows heads.jsonl analyse heads --kind $kind -m $model --json --reuse --out "$heads/$model.json"
    done
  done
}

# Every policy at a budget: rows of a layer, and the share of the heads that razor_attention keeps whole.
policies() {
  local model=$1 budget=$2 share=$3 method
  for method in razor_attention,buffer=64,fraction=$share,profile=$model compresskv,budget=$budget,profile=$model \
    snapkv,budget=$budget pyramidkv,budget=$budget h2o,budget=$budget streaming_llm,budget=$budget random_kv,budget=$budget; do
    echo --sweep $method
  done
}

c() { # recall, KL and kept bytes of every policy, the question asked after the cut; 25 min
  local qwen=qwen2.5-coder-0.5b method
  profiles smollm2 $qwen
  rows policies.jsonl eval kl needle -m smollm2 --lengths 2048 --depths 0.1,0.5,0.9 -n 3 --digits 3 --question-after-cut --json \
    --sweep dense $(policies smollm2 400 0.05) $(policies smollm2 500 0.1) $(policies smollm2 700 0.2) # 7 min
  rows policies-8k.jsonl eval kl needle -m $qwen --lengths 8192 --depths 0.3,0.7 -n 2 --digits 5 --question-after-cut --reuse-prompts --json \
    --sweep dense $(policies $qwen 2048 0.2) # 10 min
  rows policies-16k.jsonl eval needle -m $qwen --lengths 16000 --depths 0.1,0.5,0.9 -n 2 --digits 5 --seed 3 --question-after-cut --reuse-prompts --json \
    --sweep dense $(policies $qwen 4608 0.15) --sweep razor_attention,buffer=64,fraction=0.1,profile=$qwen \
    --sweep razor_attention,buffer=64,fraction=0.05,profile=$qwen # 5 min
  for method in razor_attention,buffer=64,fraction=0.2,profile=$qwen compresskv,budget=2048,profile=$qwen snapkv,budget=2048; do
    rows decode.jsonl bench -m $qwen --method $method -p 2048,8192 -n 32 -r 3 --json # 1 min
    [ "$long" = 0 ] || rows decode.jsonl bench -m $qwen --method ${method/2048/8192} -p 32000 -n 32 -r 1 --json # 3 min
  done
  [ "$long" = 0 ] || rows policies-32k.jsonl eval kl needle -m $qwen --lengths 32000 --depths 0.5 -n 2 --digits 5 --question-after-cut \
    --json --reuse-prompts --sweep dense $(policies $qwen 8192 0.2) # 40 min
  repro compresskv razor_attention # 11 min
}

d() { # documents reused in any order, and from disk; 10 min
  local model folder
  folder=$(mktemp -d)
  for model in smollm2 qwen2.5-coder-0.5b; do
    rows blend-$model.jsonl blend-check -m $model --documents 4 --tokens 512 --prompts 5 --orders 20 --folder "$folder" --json
  done
  rows blend-smollm2.jsonl blend-check -m smollm2 --documents 8 --tokens 1000 --prompts 3 --orders 20 --folder "$folder" --json
  rm -r "$folder"
  repro cacheblend # 2 min
}

e() { # temperature and scale, many shots beyond the window, times; 12 min
  rows ape-settings.jsonl analyse ape -m smollm2 -n 8 --json
  rows ape-settings.jsonl analyse ape -m qwen2.5-coder-0.5b -n 8 --json
  # About 1, 2, 4 .. 128 examples of 17 tokens, and 600: SmolLM2 was trained on 8,192 tokens.
  rows many-shot.jsonl eval many-shot -m smollm2 --shot-tokens 256 --lengths 50,68,102,168,310,580,1120,2210,10240 -n 24 --json \
    --sweep dense --sweep ape --sweep ape,T=1,S=1 # 4 min
  repro ape # 4 min
}

f() { # hidden sinks, calibrated heads; 12 min
  local model
  for model in smollm2 gemma3-270m qwen2.5-coder-0.5b; do
    rows sinks-$model.jsonl analyse attention -m $model --tokens 1024 --heat-map "$out/first-tokens-$model.svg" \
      --sink-map "$out/sinks-$model.svg" --json docs/server.md
  done
  [ -f "$heads/act-smollm2.json" ] || rows heads.jsonl analyse heads --kind act -m smollm2 --runs 6 --lengths 128 --json \
    --out "$heads/act-smollm2.json" --heat-map "$out/act-smollm2.svg"
  rows act-overhead.jsonl bench -m smollm2 --method act,top=14,profile=act-smollm2 -p 512,2048 -n 64 -r 5 --json
  repro act # 6 min
}

g() { # beyond the window; 15 min
  local lengths=8192,16384 scalings="--sweep dense --sweep entropy_abf --sweep entropy_abf,parts=base_only --sweep position_interpolation"
  scalings+=" --sweep ntk_aware --sweep ntk_by_parts --sweep yarn --sweep llama3_rope"
  [ "$long" = 0 ] || lengths+=,32768 # 30 min
  rows scalings.jsonl eval ppl needle -m smollm2 --lengths $lengths --depths 0.2,0.8 -n 1 --digits 3 --json $scalings
  repro entropy_abf # 6 min
}

h() { # documents once and twice; 14 min
  repro jrt -m smollm2
  repro jrt -m gemma3-270m
  repro jrt -m qwen2.5-coder-0.5b --fast
}

hooks() { # hooks at every layer that nothing ever meets: an upper bound of what unused hooks cost; 2 min
  local file
  file=$(mktemp)
  echo '{"captures": [{"at": {"site": "attn.hook_z", "positions": {"list": [1000000]}}}]}' > "$file"
  rows hooks.jsonl bench -m smollm2 --hooks "$file" -n 128 -d 0,1024 -r 61 --json
  rm "$file"
}

for item in "${@:-b c d e f g h hooks}"; do
  for letter in $item; do
    case $letter in
      [b-h] | hooks) "$letter" ;;
      *) echo "no item \`$letter\`: one of b c d e f g h hooks" >&2; exit 2 ;;
    esac
  done
done
exit $failed
