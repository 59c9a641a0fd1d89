#!/usr/bin/env bash
# The texts of bench/sae.sh: the kernel's documentation (Debian's linux-doc-6.1) and Python's library, mixed by a hash of the names.
#   bench/sae_text.sh FOLDER
set -euo pipefail
out=$(realpath -m "$1")
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$work" && apt-get -q download linux-doc-6.1 && dpkg -x linux-doc-6.1*.deb .)
python=$(python3 -c 'import os; print(os.path.dirname(os.__file__))')
{
    find "$work/usr/share/doc/linux-doc-6.1/html/_sources" -name '*.rst.txt'
    find "$python" -name '*.py' -not -path '*/site-packages/*' -not -path '*/dist-packages/*' -not -path '*/test/*'
} | while read -r file; do
    name=${file#"$work"}
    key=$(printf '%s' "${name##*/_sources/}" | md5sum | cut -c1-8)
    # Half a million bytes at most of one file: tables of registers are long.
    head -c 500000 "$file" >"$out/$key-$(basename "$file").txt"
done
find "$out" -name '*.txt' | wc -l
du -sb "$out"
