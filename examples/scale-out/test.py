#!/usr/bin/env python3
"""Starts run.sh and checks that the gateway answers as a worker does, streams, and keeps conversations where their prefix is cached.

    pip install openai 'smg==1.13.*'
    python3 examples/scale-out/test.py target/release/antefix
"""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai

PORT = int(os.environ.get("PORT", "8200"))
HERE = Path(__file__).parent
MODEL = "smollm2"


def client(port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=2)


def wait_until_ready(process):
    for _ in range(600):
        assert process.poll() is None, "run.sh ended"
        try:
            if client(PORT).models.list().data:
                ask(PORT, "x", 1)
                return
        except openai.OpenAIError:
            pass
        time.sleep(0.2)
    raise AssertionError("the gateway does not answer")


def ask(port, text, length=16, **more):
    return client(port).chat.completions.create(
        model=MODEL, max_tokens=length, temperature=0, messages=[{"role": "user", "content": text}], **more)


def served(port):
    """Prompt tokens that a worker was asked for, and those of them that it found cached."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return int(lines["vllm:prefix_cache_queries_total"]), int(lines["vllm:prefix_cache_hits_total"])


def main():
    environment = os.environ | {"PORT": str(PORT), "SMG": str(Path(sys.executable).parent / "smg")}
    process = subprocess.Popen([HERE / "run.sh", sys.argv[1], MODEL], env=environment, start_new_session=True)
    try:
        wait_until_ready(process)
        through, alone = ask(PORT, "Name a colour."), ask(PORT + 1, "Name a colour.")
        assert through.choices[0].message.content == alone.choices[0].message.content
        print("ok     the gateway answers what a worker answers")

        stream = ask(PORT, "Name a colour.", stream=True)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert said == alone.choices[0].message.content
        print("ok     streams pass through")

        # Eight documents, four questions about each: whoever has read a document gets the questions about it.
        before = [served(PORT + i) for i in (1, 2)]
        for question in range(4):
            for document in range(8):
                ask(PORT, f"Document {document}: " + f"fact {document} of many. " * 80 + f"Question {question}?", 1)
        after = [served(PORT + i) for i in (1, 2)]
        asked = [a[0] - b[0] for a, b in zip(after, before)]
        cached = sum(a[1] - b[1] for a, b in zip(after, before))
        print(f"       prompt tokens by worker: {asked}, {cached / sum(asked):.0%} from their caches")
        assert min(asked) > 0, "both workers work"
        assert cached / sum(asked) > 0.5, "questions follow their document"
        print("ok     questions go where their document is cached")

        try:
            client(PORT).chat.completions.create(model=MODEL, messages=[], max_tokens=1)
        except openai.BadRequestError:
            print("ok     a worker's refusal is the gateway's")
        else:
            raise AssertionError("an empty conversation was answered")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


if __name__ == "__main__":
    main()
