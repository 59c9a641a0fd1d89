#!/usr/bin/env python3
"""A long document asked five questions, as one person does: densely, and under each profile that is given.

    cargo build --release
    bench/session.py -m qwen2.5-coder-0.5b --tokens 30000 [--profile profile.toml ..] [--out rows.jsonl]

The document is our own documentation, cut to about so many tokens (2.8 characters each). A server of its own answers the questions one after the other,
greedily, so that the document is computed with the first of them and cached for the others. A JSON line a question: seconds to the first
token and to the last, the answer; and one a session with the peak memory of the server.
"""

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")), "ARCHITECTURE.md", "CHANGELOG.md", "LOG.md"]
QUESTIONS = [
    "Which model is the default model of antefix?",
    "Which command finds settings of a sparse method that meet a target?",
    "What does the method razor_attention keep?",
    "Which option of `antefix serve` names a profile?",
    "What does `density` in an answer say?",
]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(url, model, document, question, tokens):
    messages = [{"role": "system", "content": document}, {"role": "user", "content": question + " Answer in one sentence."}]
    body = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    started, first, answer, usage, methods = time.monotonic(), None, "", None, None
    try:
        reply = urllib.request.urlopen(request, timeout=900)
    except urllib.error.HTTPError as error:
        sys.exit(f"{error}: {error.read().decode()}")
    with reply:
        for line in reply:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            usage, methods = event.get("usage") or usage, event.get("antefix") or methods
            for choice in event.get("choices", []):
                if text := choice["delta"].get("content"):
                    first = first or time.monotonic() - started
                    answer += text
    return {"question": question, "first_s": first, "all_s": time.monotonic() - started, "answer": answer, "usage": usage, "antefix": methods}


def session(args, document, profile):
    port = free_port()
    command = [args.antefix, "serve", "-m", args.model, "--port", str(port)]
    command += ["--profile", profile] if profile else []
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        else:
            sys.exit("the server did not start")
        for question in QUESTIONS:
            yield {"profile": profile or "dense", **ask(url, args.model, document, question, args.answer)}
        status = Path(f"/proc/{server.pid}/status").read_text()
        peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
        yield {"profile": profile or "dense", "peak_mib": peak / 1024}
    finally:
        server.terminate()
        server.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--antefix", default=str(ROOT / "target" / "release" / "antefix"))
    parser.add_argument("-m", "--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--tokens", type=int, default=30000)
    parser.add_argument("--answer", type=int, default=48, help="tokens of an answer, at most")
    parser.add_argument("--profile", action="append", default=[])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    document = "\n".join((ROOT / text).read_text() for text in TEXTS)[: int(args.tokens * 2.8)]
    for profile in [None, *args.profile]:
        for row in session(args, document, profile):
            print(json.dumps(row), flush=True)
            if args.out:
                with args.out.open("a") as out:
                    out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
