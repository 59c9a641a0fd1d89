#!/usr/bin/env bash
# Real clients against a live server: tests/clients/run.sh [ANTEFIX]. Needs python3 with venv; the packages come through pip.
set -euo pipefail
cd "$(dirname "$0")/../.."
antefix=${1:-target/release/antefix}
venv=target/clients
if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv"
fi
"$venv/bin/python" -c 'import openai, anthropic' 2>/dev/null || "$venv/bin/pip" install --quiet openai anthropic
log=$(mktemp)
"$antefix" serve --model smollm2 --port 0 2>"$log" &
server=$!
trap 'kill "$server" 2>/dev/null || true; rm -f "$log"' EXIT
for _ in $(seq 300); do
    base=$(sed -n 's/.* on \(http:[^ ]*\).*/\1/p' "$log")
    [ -n "$base" ] && break
    kill -0 "$server" 2>/dev/null || { cat "$log"; exit 1; }
    sleep 0.1
done
"$venv/bin/python" tests/clients/python_clients.py "$base"
kill -TERM "$server"
wait "$server" # 0: it drained
trap 'rm -f "$log"' EXIT
