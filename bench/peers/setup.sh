#!/usr/bin/env bash
# Makes a throw-away folder with the peers that compare.py runs: llama.cpp, mistral.rs, and the models in three formats.
#
#   bench/peers/setup.sh [NAME[=FILE.gguf]]...
#
# Without arguments: the three models of the store. A bare NAME is pulled by antefix; NAME=FILE takes a file from the disk.
# ANTEFIX_PEERS  the folder (default: /tmp/antefix-peers); what is there already is kept
# ANTEFIX        the antefix binary (default: target/release/antefix)
# JOBS           compiler processes (default: 2)
set -euo pipefail
cd "$(dirname "$0")/../.."

LLAMA=0.3.36  # of llama-cpp-python, whose source package holds a whole llama.cpp
MISTRAL=0.9.5
TOOLS=(llama-bench llama-batched-bench llama-perplexity llama-quantize llama-server)
peers=${ANTEFIX_PEERS:-/tmp/antefix-peers}
antefix=${ANTEFIX:-target/release/antefix}
mkdir -p "$peers/models"
peers=$(cd "$peers" && pwd)

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $1"; say "hint: $2"; exit 1; }

# llama.cpp at its best: compiled for this processor, and by clang where there is AMX, because what gcc 12 makes of its AMX
# code dies with an illegal instruction.
compilers() {
    if ! grep -qw amx_int8 /proc/cpuinfo; then
        echo "gcc g++"
        return
    fi
    local v
    for v in "" -19 -18 -17 -16; do
        if command -v "clang$v" >/dev/null && command -v "clang++$v" >/dev/null; then
            echo "clang$v clang++$v"
            return
        fi
    done
    die "this processor has AMX, and no clang was found" "install clang-16 or later (Debian: apt-get install clang-16)"
}

all_tools() {
    local tool
    for tool in "${TOOLS[@]}"; do
        [ -x "$1/$tool" ] || return 1
    done
}

# The build is for one processor and one compiler; a folder that moved to another machine is built again.
fingerprint() { echo "$1 $(grep -m1 '^flags' /proc/cpuinfo | tr ' ' '\n' | grep -E '^(avx|amx|fma|f16c)' | sort | tr '\n' ' ')"; }

llama_cpp() {
    local cc cxx pair source build stamp
    pair=$(compilers)
    read -r cc cxx <<<"$pair"
    source=$peers/llama_cpp_python-$LLAMA/vendor/llama.cpp
    build=$source/build
    stamp=$build/antefix-built-for
    if [ ! -e "$source/CMakeLists.txt" ]; then
        if [ ! -e "$peers/llama_cpp_python-$LLAMA.tar.gz" ]; then
            say "fetching llama.cpp"
            python3 -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$peers" "llama-cpp-python==$LLAMA"
        fi
        tar -xzf "$peers/llama_cpp_python-$LLAMA.tar.gz" -C "$peers"
    fi
    # A build made by hand has no stamp: it is taken when it is for this machine and by the right kind of compiler.
    if all_tools "$build/bin" && [ ! -e "$stamp" ] && grep -q '^GGML_NATIVE:BOOL=ON' "$build/CMakeCache.txt" &&
        { [[ $cc != clang* ]] || grep -q '^CMAKE_C_COMPILER:.*clang' "$build/CMakeCache.txt"; }; then
        fingerprint "$cc" >"$stamp"
    fi
    if ! all_tools "$build/bin" || [ "$(cat "$stamp" 2>/dev/null)" != "$(fingerprint "$cc")" ]; then
        command -v cmake >/dev/null || die "cmake was not found" "install cmake (Debian: apt-get install cmake; or pip install cmake)"
        say "building llama.cpp with $cc (about 15 minutes on two cores; log: $source/build.log)"
        rm -rf "$build"
        {
            cmake -S "$source" -B "$build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
                -DCMAKE_C_COMPILER="$cc" -DCMAKE_CXX_COMPILER="$cxx" -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
                -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_MTMD=OFF -DLLAMA_BUILD_UI=OFF
            cmake --build "$build" -j "${JOBS:-2}" --target "${TOOLS[@]}"
        } >"$source/build.log" 2>&1 || die "llama.cpp does not build" "the end of $source/build.log says why"
        fingerprint "$cc" >"$stamp"
    fi
    ln -sfn "$build/bin" "$peers/bin"
    say "llama.cpp: $peers/bin ($(cat "$stamp"))"
}

mistral_rs() {
    if ! "$peers/venv/bin/python" -c 'import mistralrs' 2>/dev/null; then
        say "fetching mistral.rs"
        python3 -m venv "$peers/venv"
        "$peers/venv/bin/pip" install --quiet "mistralrs==$MISTRAL" ||
            die "mistral.rs $MISTRAL cannot be installed" "compare.py works without it; its rows are left out"
    fi
    say "mistral.rs: $peers/venv"
}

# NAME.shipped.gguf is a link to the file as published; the other two are made from it.
model() {
    local name=${1%%=*} file format
    if [[ $1 == *=* ]]; then
        file=$(realpath "${1#*=}")
    else
        [ -x "$antefix" ] || die "no $antefix to pull \`$name\` with" "cargo build --release, or give NAME=FILE.gguf"
        "$antefix" models pull "$name" >/dev/null
        file=$("$antefix" models show "$name" --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["path"])')
    fi
    [ -f "$file" ] || die "no file $file" "give NAME=FILE.gguf"
    local link=$peers/models/$name.shipped.gguf
    if [ "$(readlink "$link" 2>/dev/null)" != "$file" ]; then
        rm -f "$peers/models/$name".{Q8_0,Q4_0}.gguf
        ln -sfn "$file" "$link"
    fi
    for format in Q8_0 Q4_0; do
        local to=$peers/models/$name.$format.gguf
        if [ ! -e "$to" ]; then
            say "writing $to"
            "$peers/bin/llama-quantize" --allow-requantize "$file" "$to.part" "$format" "${JOBS:-2}" >"$to.log" 2>&1 ||
                die "\`$name\` cannot be requantised to $format" "the end of $to.log says why"
            mv "$to.part" "$to"
            rm "$to.log"
        fi
    done
    say "model: $name"
}

llama_cpp
mistral_rs
if [ $# -eq 0 ]; then
    set -- smollm2 gemma3-270m qwen2.5-coder-0.5b
fi
for it in "$@"; do
    model "$it"
done
