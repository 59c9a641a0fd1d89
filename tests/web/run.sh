#!/usr/bin/env bash
# The page in headless Chromium, against a live server and against the mock: tests/web/run.sh [ANTEFIX]
# SCREENSHOTS=docs/img also takes the pictures of the documentation.
set -euo pipefail
cd "$(dirname "$0")/../.."
antefix=${1:-target/release/antefix}
source tests/live.sh

chromium=${CHROMIUM:-$(command -v chromium || command -v chromium-browser || true)}
if [ -z "$chromium" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    (apt-get update && apt-get install --yes --no-install-recommends chromium) >/dev/null 2>&1 || true
    chromium=$(command -v chromium || true)
fi
if [ -z "$chromium" ]; then
    echo "left out: the page's tests (there is no chromium, and it could not be installed)"
    exit 0
fi
export CHROMIUM=$chromium

packages tests/web/requirements.txt
SCREENSHOTS='' "$python" tests/web/test_page.py
serve
ANTEFIX_URL=$base "$python" tests/web/test_page.py
finish
