#!/usr/bin/env bash
# Fetches the neutral client of compare_serve.py: `vllm-rs`, a program inside vLLM's wheel (336 MB, of which 61 MB are kept), and
# the tokenizer that it counts prompts with, made from the model's file.
#
#   bench/peers/setup_client.sh      # after setup.sh
# ANTEFIX_PEERS  the folder (default: /tmp/antefix-peers)
set -euo pipefail
cd "$(dirname "$0")/../.."

VLLM=0.33.0
peers=${ANTEFIX_PEERS:-/tmp/antefix-peers}
client=$peers/client
mkdir -p "$client/smollm2"

if [ ! -x "$client/vllm-rs" ]; then
    python3 -m pip download --quiet --no-deps --only-binary :all: --dest "$client" "vllm==$VLLM"
    python3 - "$client" <<'PY'
import pathlib, sys, zipfile

folder = pathlib.Path(sys.argv[1])
wheel = next(folder.glob("vllm-*.whl"))
with zipfile.ZipFile(wheel) as it:
    (folder / "vllm-rs").write_bytes(it.read("vllm/vllm-rs"))
(folder / "vllm-rs").chmod(0o755)
wheel.unlink()
PY
fi

if [ ! -e "$client/smollm2/tokenizer.json" ]; then
    python3 -m venv "$client/venv"
    "$client/venv/bin/pip" install --quiet tokenizers==0.23.3 gguf==0.19.0
    PYTHONPATH=tools/golden PYTHONDONTWRITEBYTECODE=1 "$client/venv/bin/python" - "$peers" <<'PY'
import sys

import tokens
from tokenizers import decoders

tokenizer = tokens.smollm2(tokens.File(f"{sys.argv[1]}/models/smollm2.shipped.gguf"))
tokenizer.decoder = decoders.ByteLevel()
tokenizer.save(f"{sys.argv[1]}/client/smollm2/tokenizer.json")
PY
fi
echo "client: $client/vllm-rs" >&2
