#!/usr/bin/env bash
# A run that is killed (SIGKILL) at random moments and resumed ends with the bytes of one that is not.
#   tests/train/kill.sh ANTEFIX [KILLS]
set -euo pipefail
antefix=$(realpath "$1")
kills=${2:-20}
here=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# In a process of its own that becomes the command, so that a kill meets it.
train() {
    exec "$antefix" train "$here/examples/train/sum-sft.toml" --set model.d=32 --set model.layers=2 --set model.ffn=64 --set model.heads=2 \
        --set model.kv_heads=1 --set train.batch=8 --set train.steps=$steps --set train.save_every=10 --set train.eval_every=0 "$@"
}
steps=100
start=$(date +%s%N)
(train --out "$work/trial") >/dev/null 2>&1
# So many steps that the kills fall into the run: an interval of theirs is half a second on average, with the start of the process.
took=$((($(date +%s%N) - start) / 1000000 + 1))
steps=$((100 * (kills * 1500) / took / 10 * 10 + 100))
(train --out "$work/whole") >/dev/null 2>&1
RANDOM=7
killed=0
while [ "$killed" -lt "$kills" ]; do
    train --out "$work/cut" --resume >/dev/null 2>&1 &
    pid=$!
    sleep "0.$((RANDOM % 500 + 200))"
    if kill -KILL "$pid" 2>/dev/null; then killed=$((killed + 1)); fi
    wait "$pid" 2>/dev/null || true
    if [ -f "$work/cut/latest" ] && [ "$(cat "$work/cut/latest")" = "ckpt-$(printf %06d "$steps")" ]; then break; fi
done
(train --out "$work/cut" --resume) >/dev/null
for file in model.safetensors optim.safetensors; do
    cmp "$work/whole/ckpt-$(printf %06d "$steps")/$file" "$work/cut/ckpt-$(printf %06d "$steps")/$file"
done
if [ "$killed" -lt $((kills / 2)) ]; then
    echo "only $killed of $kills kills fell into the run of $steps steps" >&2
    exit 1
fi
echo "train: killed $killed times in $steps steps, the same bytes"
