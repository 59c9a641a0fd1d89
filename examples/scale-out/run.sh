#!/usr/bin/env bash
# A gateway in front of two antefix workers, each with a cache of its own; requests that start alike go to the same worker.
#
#     pip install 'smg==1.13.*'
#     examples/scale-out/run.sh [ANTEFIX] [MODEL]      # then: curl http://127.0.0.1:8200/v1/models
#
# PORT (8200) is the gateway's; the workers take the two after it. WORKERS (2), THREADS of each (cores / workers).
set -euo pipefail
antefix=${1:-antefix}
model=${2:-smollm2}
port=${PORT:-8200}
workers=${WORKERS:-2}
threads=${THREADS:-$((($(nproc) + workers - 1) / workers))}
smg=${SMG:-smg}

pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true; wait' EXIT
trap 'exit 0' TERM INT

urls=()
for i in $(seq "$workers"); do
    # One worker must not take the memory of all: half of what is free is taken when it starts.
    "$antefix" serve --model "$model" --port $((port + i)) --threads "$threads" --kv-mib "${KV_MIB:-512}" &
    pids+=($!)
    urls+=("http://127.0.0.1:$((port + i))")
done
for url in "${urls[@]}"; do
    for _ in $(seq 600); do
        curl --silent --fail --output /dev/null "$url/health/ready" && break
        sleep 0.1
    done
done
"$smg" launch --host 127.0.0.1 --port "$port" --worker-urls "${urls[@]}" --policy cache_aware --log-level warn &
pids+=($!)
wait -n "${pids[@]}"
