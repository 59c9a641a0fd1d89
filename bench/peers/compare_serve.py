#!/usr/bin/env python3
"""antefix serve beside llama-server: the same traffic by the same client, in alternation. See README.md in this folder.

    bench/peers/setup.sh smollm2 && bench/peers/setup_client.sh
    python3 bench/peers/compare_serve.py                              # all rows
    python3 bench/peers/compare_serve.py --rows prefix-repetition:32 --pairs 1
    python3 bench/peers/compare_serve.py --fairness                   # a stream beside long prompts
    python3 bench/peers/compare_serve.py --table bench/results/*/serve.jsonl
"""

import argparse
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from compare import ROOT, Session, words
from engines import EQUAL, Engines, Failed, busy_seconds, json_lines, one, warn

KINDS = ["prefix-repetition", "multi-turn"]
LOADS = [1, 8, 32]
# Questions or conversations of a row, by how many are under way: enough that most of them start while others run, few enough that
# the slower server needs about two minutes.
COUNTS = {"prefix-repetition": {1: 8, 8: 24, 32: 48}, "multi-turn": {1: 4, 8: 16, 32: 32}}
# Tokens of a system prompt and of a question behind it, system prompts, tokens of an answer.
PREFIX, SUFFIX, PREFIXES, OUTPUT = 2048, 64, 4, 64
# Turns of a conversation, each a request, and tokens that the user adds in each.
TURNS, TURN = 4, 256
SECONDS_TO_START = 60
TOKENS_A_SEQUENCE = 2816


# What vllm-rs is told of the traffic, and the percentiles that it is asked for.
DATASETS = {
    "prefix-repetition": [
        "--dataset-name", "prefix_repetition", "--prefix-repetition-prefix-len", str(PREFIX),
        "--prefix-repetition-suffix-len", str(SUFFIX), "--prefix-repetition-num-prefixes", str(PREFIXES),
        "--prefix-repetition-output-len", str(OUTPUT),
    ],
    "multi-turn": [
        "--dataset-name", "random", "--multi-turn", "--multi-turn-num-turns", str(TURNS),
        "--random-input-len", str(TURN), "--random-output-len", str(OUTPUT),
    ],
}  # fmt: skip
PERCENTS = range(1, 101)


@dataclass(frozen=True)
class Flags:
    """How llama-server is told to run: flash attention, one buffer for all slots, and the least length of a chunk that is reused
    at another position (0: none)."""

    fa: bool
    unified: bool
    reuse: int = 0

    def words(self):
        return f"fa {'on' if self.fa else 'off'}, {'unified' if self.unified else 'not unified'}" + (
            f", cache reuse {self.reuse}" if self.reuse else ""
        )


# The two most promising settings. They are tried on one format, and the better one on the other.
FEW = [Flags(False, True), Flags(True, True)]
TRIED = [Flags(fa, unified) for fa, unified in itertools.product([False, True], [True, False])] + [Flags(True, True, 256)]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--antefix", default=str(ROOT / "target" / "release" / "antefix"), help="the binary: server and client")
    parser.add_argument("--peers", default=os.environ.get("ANTEFIX_PEERS", "/tmp/antefix-peers"), help="setup.sh's folder")
    parser.add_argument("--model", default="smollm2", help="a name that setup.sh was given")
    rows = [f"{kind}:{load}" for kind in KINDS for load in LOADS]
    parser.add_argument("--rows", type=words, default=rows, help=f"default: {','.join(rows)}")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each server on each row (default: 3)")
    parser.add_argument("--threads", "-t", type=int, default=2)
    parser.add_argument("--ttft-ms", type=float, default=1000, help="a good request has its first token after this")
    parser.add_argument("--itl-ms", type=float, default=100, help="and takes this from token to token in the mean")
    parser.add_argument("--few-flags", action="store_true", help="try only llama-server's three most promising settings")
    parser.add_argument("--setting", help="run llama-server with this one: `shipped, fa on, unified`")
    parser.add_argument("--limit", type=int, default=300, help="seconds after which a run is given up: the setting is hopeless")
    parser.add_argument("--fairness", action="store_true", help="a stream beside prompts of 7,000 words, instead of the rows")
    parser.add_argument("--own-client", action="store_true", help="`antefix bench --serve` instead of vllm-rs")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only-antefix", action="store_true")
    only.add_argument("--only-scan", action="store_true", help="try llama-server's flags on each row and stop")
    parser.add_argument("--out", type=Path, help="JSON lines; default: bench/results/DATE-CPU/serve.jsonl")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of an earlier run's lines and stop")
    args = parser.parse_args()
    if args.pairs < 1 or args.threads < 1:
        parser.error("`--pairs` and `--threads` are at least 1")
    for row in args.rows:
        kind, _, load = row.partition(":")
        if kind not in KINDS or not load.isdigit() or int(load) < 1:
            parser.error(f"`{row}` is no row\nhint: such as prefix-repetition:8")
    if args.setting and args.setting.partition(", ")[2] not in [flags.words() for flags in TRIED]:
        parser.error(f"`{args.setting}` is no setting\nhint: `FORMAT, FLAGS`, the flags one of: {'; '.join(f.words() for f in TRIED)}")
    return args


def shown(argv):
    """A command line without the folders of this machine."""
    return [Path(word).name if word.startswith("/") else word for word in argv]


def free_port():
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


class Server:
    """A server process, from its start to the end of a `with` block."""

    def __init__(self, argv, port):
        self.argv, self.url = argv, f"http://127.0.0.1:{port}"

    def __enter__(self):
        try:
            self.child = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise Failed(f"`{self.argv[0]}` cannot be started: {error}\nhint: run bench/peers/setup.sh") from error
        until = time.monotonic() + SECONDS_TO_START
        while not self.healthy():
            if self.child.poll() is not None or time.monotonic() > until:
                self.__exit__()
                raise Failed(f"`{' '.join(self.argv)}` did not come up")
            time.sleep(0.1)
        return self

    def healthy(self):
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def seconds(self):
        """Processor seconds of the process so far."""
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __exit__(self, *_):
        self.child.kill()
        self.child.wait()


class Beside:
    """Both servers with one model file each, and the client."""

    def __init__(self, args, engines):
        self.args, self.engines = args, engines
        self.client = engines.folder / "client"
        self.neutral = (self.client / "vllm-rs").exists() and not args.own_client

    def antefix(self, load):
        port = free_port()
        argv = [self.engines.antefix_binary, "serve", "-m", self.engines.file(self.args.model, "shipped")]
        argv += ["--served-model-name", self.args.model, "--port", str(port), "-t", str(self.args.threads)]
        return Server(argv, port)

    def llama(self, load, format, flags):
        port, slots = free_port(), max(load, 2)
        # Fairness needs room for one prompt of 8,192 tokens beside a stream.
        context = 2 * 8192 if self.args.fairness else slots * TOKENS_A_SEQUENCE
        argv = [str(self.engines.folder / "bin" / "llama-server"), "-m", self.engines.file(self.args.model, format)]
        argv += ["--alias", self.args.model, "--host", "127.0.0.1", "--port", str(port)]
        argv += ["-t", str(self.args.threads), "-c", str(context)]
        argv += ["--parallel", str(slots), "-kvu" if flags.unified else "-no-kvu", "-fa", "on" if flags.fa else "off"]
        if flags.reuse:
            argv += ["--cache-reuse", str(flags.reuse)]
        return Server(argv, port)

    def ask(self, server, *what):
        """What the client prints, and the share of the processors that neither of the two took meanwhile."""
        argv = [self.engines.antefix_binary, "bench", "--serve", server.url, "--json", *what]
        text, others = self.watched(server, argv)
        return {"client": "antefix bench --serve", **one(json_lines(text), argv)}, others

    def watched(self, server, argv):
        busy, own, start = busy_seconds(), server.seconds(), time.monotonic()
        try:
            client = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=self.args.limit)
        except subprocess.TimeoutExpired as error:
            raise Failed(f"not done after {self.args.limit} seconds") from error
        if client.returncode:
            raise Failed(f"`{' '.join(argv)}` failed: {client.stderr.strip()[-400:]}")
        # The client's processor time is part of the others': it is small, and the same for both.
        others = busy_seconds() - busy - (server.seconds() - own)
        return client.stdout, max(0.0, others / (time.monotonic() - start) / os.cpu_count())

    def vllm(self, server, kind, load, count, seed):
        """A row by vllm-rs. The base address ends in `/v1`, where neither server has a `/tokenize`: llama-server's differs from vLLM's,
        which the client takes it for. Without one, it counts tokens with the tokenizer that it is given."""
        limits = {"ttft": self.args.ttft_ms, "tpot": self.args.itl_ms}
        with tempfile.TemporaryDirectory() as folder:
            argv = [str(self.client / "vllm-rs"), "bench", "serve", "--backend", "openai-chat", "--base-url", f"{server.url}/v1"]
            argv += ["--endpoint", "/chat/completions", "--model", self.args.model, "--tokenizer", str(self.client / self.args.model)]
            argv += DATASETS[kind]
            argv += ["--num-prompts", str(count), "--max-concurrency", str(load), "--seed", str(seed), "--ignore-eos"]
            argv += ["--temperature", "0", "--goodput", *(f"{name}:{most:g}" for name, most in limits.items())]
            argv += ["--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", ",".join(map(str, PERCENTS))]
            argv += ["--disable-tqdm", "--no-steady-state", "--save-result", "--result-dir", folder, "--result-filename", "row.json"]
            _, others = self.watched(server, argv)
            found = json.loads((Path(folder) / "row.json").read_text())
        if not found["completed"]:
            raise Failed(f"no answer: {json.dumps(found.get('failed_requests', ''))[:400]}")
        spread = lambda name: {f"p{q}": found[f"p{q}_{name}_ms"] for q in (50, 90, 99)}  # noqa: E731
        return {
            "client": "vllm-rs", "client_argv": shown(argv), "kind": kind, "concurrency": load, "seed": seed,
            "requests": found["completed"], "errors": found["failed"], "seconds": found["duration"],
            "requests_s": found["request_throughput"], **good(found, limits),
            "tok_s": found["output_throughput"], "prompt_tok_s": found["input_throughput"],
            "ttft_ms": spread("ttft"), "itl_ms": spread("itl"), "tpot_ms": spread("tpot"),
        }, others  # fmt: skip

    def row(self, server, row, count, seed):
        """One measured row: by vllm-rs, or by `antefix bench --serve`."""
        kind, load = row.split(":")
        if self.neutral:
            return self.vllm(server, kind, int(load), count, seed)
        words = PREFIX if kind == "prefix-repetition" else TURN * TURNS
        return self.ask(
            server, "--traffic", kind, "--concurrency", load, "--conversations", str(count), "--seed", str(seed),
            "--turns", str(TURNS), "--prefix-words", str(words), "--output-tokens", str(OUTPUT), "--ttft-ms", str(self.args.ttft_ms), "--itl-ms", str(self.args.itl_ms),
        )  # fmt: skip


def good(found, limits):
    """Good requests a second. In conversations vllm-rs does not count them, but its percentiles say how many requests keep each limit:
    at least those that can not all break one of the two, at most those that keep the harder one."""
    if "request_goodput" in found:
        return {"goodput": found["request_goodput"]}
    kept = [max((q for q in PERCENTS if found[f"p{q}_{name}_ms"] <= most), default=0) / 100 for name, most in limits.items()]
    return {"goodput": found["request_throughput"] * max(0, sum(kept) - 1), "goodput_most": found["request_throughput"] * min(kept)}


def count(row):
    kind, load = row.split(":")
    return COUNTS[kind].get(int(load), 2 * int(load))


def scan(session, beside, row):
    """llama-server's best format and flags for `row`: most good requests a second, then most tokens a second."""
    load = int(row.split(":")[1])
    tried = {}

    def best(settings):
        for format, flags in settings:
            try:
                with beside.llama(load, format, flags) as server:
                    found, others = beside.row(server, row, max(load, count(row) // 2), seed=99)
            except Failed as error:
                warn(f"{row}: {format}, {flags.words()}: {error}")
                continue
            session.write({"phase": "scan", "row": row, "engine": "llama.cpp", "format": format, "flags": flags.words(),
                           "others": round(others, 3), **found, "argv": shown(server.argv)})  # fmt: skip
            warn(f"{row}: {format}, {flags.words()}: {found['goodput']:.2f} good/s, {found['tok_s']:.0f} tok/s")
            tried[format, flags] = found["goodput"], found["tok_s"]
        if not tried:
            raise Failed(f"llama-server could not be run on {row}")
        return max(tried, key=tried.get)

    if beside.args.setting:
        format, _, text = beside.args.setting.partition(", ")
        return format, next(flags for flags in TRIED if flags.words() == text)
    if not beside.args.few_flags:
        return best(itertools.product(EQUAL, TRIED))
    *others, first = EQUAL
    _, flags = best((first, flags) for flags in FEW)
    return best((format, flags) for format in others)


def kept(path, row):
    """What an earlier scan of `row` in the file of results found best."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    best = {}
    for line in lines:
        if line.get("phase") == "scan" and line["row"] == row:
            key = (line["format"], line["flags"])
            best[key] = max(best.get(key, (0, 0)), (line["goodput"], line["tok_s"]))
    if not best:
        return None
    format, text = max(best, key=best.get)
    return format, next(flags for flags in TRIED if flags.words() == text)


def measure(session, beside, args):
    for row in args.rows:
        load = int(row.split(":")[1])
        contenders = [("antefix", "shipped", "", lambda load=load: beside.antefix(load))]
        if not args.only_antefix:
            format, flags = (None if args.only_scan else kept(session.path, row)) or scan(session, beside, row)
            start = lambda load=load, format=format, flags=flags: beside.llama(load, format, flags)  # noqa: E731
            contenders.append(("llama.cpp", format, flags.words(), start))
        if args.only_scan:
            continue
        for pair in range(args.pairs):
            for engine, format, words_, start in contenders:
                # A cold server each time, and other texts in each pair.
                with start() as server:
                    found, others = beside.row(server, row, count(row), seed=pair + 1)
                session.write({"phase": "pair", "pair": pair, "row": row, "engine": engine, "format": format, "flags": words_,
                               "model": args.model, "others": round(others, 3), **found, "argv": shown(server.argv)})  # fmt: skip
                warn(f"{row} pair {pair + 1}: {engine}: {found['goodput']:.2f} good/s of {found['requests_s']:.2f}, "
                     f"{found['tok_s']:.0f} tok/s, others {others:.0%}")  # fmt: skip


def fairness(session, beside, args):
    what = ["--fairness", "--prefix-words", "7000", "--long-prompts", "2"]
    contenders = [("antefix", "shipped", "", lambda: beside.antefix(2))]
    if not args.only_antefix:
        for flags in (Flags(True, True), Flags(False, True)):
            contenders.append(("llama.cpp", "Q8_0", flags.words(), lambda flags=flags: beside.llama(2, "Q8_0", flags)))
    for pair in range(args.pairs):
        for engine, format, words_, start in contenders:
            with start() as server:
                found, others = beside.ask(server, *what, "--seed", str(pair + 1))
            session.write({"phase": "fairness", "pair": pair, "row": "fairness", "engine": engine, "format": format,
                           "flags": words_, "model": args.model, "others": round(others, 3), **found, "argv": shown(server.argv)})  # fmt: skip
            warn(f"fairness {engine} {words_}: p99 {found['busy_ms']['p99']:.1f} ms is {found['factor']:.2f} times the idle median")


def median(lines, *path):
    def of(line):
        for name in path:
            line = line[name]
        return line

    return statistics.median(of(line) for line in lines)


def table(lines):
    """Markdown: medians over all pairs of each row."""
    out = ["| traffic | at a time | server | good/s | requests/s | tok/s | TTFT p50 / p99, ms | token p50 / p99, ms | client |",
           "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    groups = {}
    for line in lines:
        if line["phase"] == "pair":
            groups.setdefault(line["row"], {}).setdefault((line["engine"], line["format"], line["flags"]), []).append(line)
    for row, engines in groups.items():
        kind, load = row.split(":")
        for (engine, format, flags), runs in engines.items():
            name = engine if engine == "antefix" else f"{engine} {format}, {flags}"
            ttft, token = (f"{median(runs, key, 'p50'):.0f} / {median(runs, key, 'p99'):.0f}" for key in ("ttft_ms", "itl_ms"))
            goodput = f"{median(runs, 'goodput'):.2f}"
            if "goodput_most" in runs[0] and (most := f"{median(runs, 'goodput_most'):.2f}") != goodput:
                goodput += f" to {most}"
            out.append(f"| {kind} | {load} | {name} | {goodput} | {median(runs, 'requests_s'):.2f} | "
                       f"{median(runs, 'tok_s'):.0f} | {ttft} | {token} | {runs[0]['client']} |")  # fmt: skip
            kind = load = ""
    groups = {}
    for line in lines:
        if line["phase"] == "fairness":
            groups.setdefault((line["engine"], line["format"], line["flags"]), []).append(line)
    if groups:
        out += ["", "| beside a prompt of 7,000 words | idle p50 / p99, ms | p50 / p99, ms | longest | p99 / idle p50 | prompt, s |",
                "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for (engine, format, flags), runs in groups.items():
        name = engine if engine == "antefix" else f"{engine} {format}, {flags}"
        pair = lambda key: f"{median(runs, key, 'p50'):.1f} / {median(runs, key, 'p99'):.1f}"  # noqa: E731
        seconds = statistics.median(s for run in runs for s in run["prompt_s"])
        out.append(f"| {name} | {pair('idle_ms')} | {pair('busy_ms')} | {median(runs, 'busy_max_ms'):.0f} | "
                   f"{median(runs, 'factor'):.2f} | {seconds:.1f} |")  # fmt: skip
    return "\n".join(out)


def read(path):
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    return [line for line in lines if line["phase"] in ("pair", "fairness")]


def main():
    args = arguments()
    if args.table:
        print(table(read(args.table)))
        return 0
    engines = Engines(args.antefix, Path(args.peers), args.threads)
    try:
        session = Session(args, engines, "serve.jsonl")
        (fairness if args.fairness else measure)(session, Beside(args, engines), args)
    except Failed as error:
        warn(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        warn("stopped; what was measured follows")
    warn(f"lines: {session.path}")
    print(table(read(session.path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
