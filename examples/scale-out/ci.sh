#!/usr/bin/env bash
# test.py with its packages: examples/scale-out/ci.sh [ANTEFIX]
set -euo pipefail
cd "$(dirname "$0")/../.."
antefix=${1:-target/release/antefix}
venv=target/scale-out
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
if ! "$venv/bin/pip" install --quiet --disable-pip-version-check 'openai>=3,<4' 'smg==1.13.*'; then
    echo "left out: the gateway (pip cannot install smg here)"
    exit 0
fi
"$venv/bin/python" examples/scale-out/test.py "$antefix"
