#!/usr/bin/env bash
# Real clients against a live server: tests/clients/run.sh [ANTEFIX]. Needs python3 with venv, and node for the npm packages.
set -euo pipefail
cd "$(dirname "$0")/../.."
antefix=${1:-target/release/antefix}
source tests/live.sh

packages tests/clients/requirements.txt
serve
"$python" tests/clients/python_clients.py "$base"
if npm --version >/dev/null 2>&1; then
    mkdir -p target/clients-node
    cp tests/clients/package.json tests/clients/node_clients.mjs target/clients-node/
    (cd target/clients-node && npm install --silent --no-audit --no-fund && node node_clients.mjs "$base")
else
    echo "left out: the npm packages (there is no npm)"
fi
finish

# What the API's description allows, made up at random. A key keeps the answers short.
packages tests/clients/requirements-fuzz.txt
key=0123456789abcdef-fuzz
config=$(mktemp)
printf '[[keys]]\nname = "fuzz"\nkey = "%s"\nmax_tokens = 4\nn = 2\n' "$key" >"$config"
serve --config "$config"
"$venv/bin/schemathesis" run "$base/openapi.json" --header "Authorization: Bearer $key" \
    --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance \
    --phases examples,coverage,fuzzing --max-examples "${ANTEFIX_EXAMPLES:-12}" --seed 1 --workers 2 --no-shrink \
    --suppress-health-check all --warnings off --generation-database none --request-timeout 60
finish
rm -f "$config"
