#!/usr/bin/env bash
# Reproductions end to end on real models: tests/repro.sh [ANTEFIX]. The quickest of each kind: what always runs, documents that are reused,
# heads. Which verdict comes out may depend on the machine's speed; that there is one, with its figures and its page, does not.
set -euo pipefail
cd "$(dirname "$0")/.."
antefix=${1:-target/release/antefix}
slugs=(cacheblend hydragen retrieval_heads)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

"$antefix" repro "${slugs[@]}" --fast --json --out "$out" --write-docs "$out" | tee "$out/lines"
python3 - "$out" "${slugs[@]}" <<'PYTHON'
import json, math, pathlib, sys

folder, slugs = pathlib.Path(sys.argv[1]), sys.argv[2:]
lines = [json.loads(line) for line in (folder / "lines").read_text().splitlines()]
assert sorted(line["slug"] for line in lines) == sorted(slugs), lines
page = (folder / "reproductions.md").read_text()
for line in lines:
    slug = line["slug"]
    assert line["claim"] and line["why"] and line["verdict"] in ("reproduced", "partly", "not"), line
    assert all(math.isfinite(line[key]) for key in ("measured", "baseline")), line
    rows = [json.loads(row) for row in (folder / f"repro-{slug}.jsonl").read_text().splitlines()]
    assert len(rows) > 2 and rows[-1] == line, slug
    assert f"## {slug}\n" in page and line["why"] in page, slug
print(f"{len(lines)} reproductions ran")
PYTHON
