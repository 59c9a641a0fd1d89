#!/usr/bin/env bash
# Dictionaries of two layers of SmolLM2, three sparsities each, and how much of the cross-entropy they give back, beside principal components
# and random directions of as many coefficients.
#   bench/sae.sh FOLDER [ROWS] [OUT.jsonl]
# FOLDER takes about 5 GB: texts, activations, dictionaries. What is there already is not made again.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1
rows=${2:-2000000}
out=${3:-/dev/stdout}
antefix=${ANTEFIX:-./target/release/antefix}
layers=${LAYERS:-"10 15"}
[ -d "$folder/text" ] || bench/sae_text.sh "$folder/text"
"$antefix" sae harvest -m smollm2 --layers "${layers// /,}" --text "$folder/text" --out "$folder/z" --tokens "$rows" --max-bytes 6000000000
for layer in $layers; do
    saes=()
    for k in ${SPARSITIES:-8 32 96}; do
        "$antefix" sae train "$folder/z" --layer "$layer" --out "$folder/l$layer-k$k" --k "$k" --rows "$rows"
        saes+=(--sae "$folder/l$layer-k$k")
    done
    "$antefix" sae eval -m smollm2 --text "$folder/text" "${saes[@]}" --baselines "$folder/z" --json >>"$out"
done
