"""Runs one engine once, in a process of its own, and reads what it prints."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

# The shipped file and its requantisation to Q8_0 score the same perplexity; Q4_0 writes worse text (see README.md).
EQUAL = ["shipped", "Q8_0"]
WORSE = "Q4_0"

# Share of the processors that others may take before a run counts as disturbed, and how often it is then tried again.
QUIET = 0.05
RETRIES = 2


class Failed(Exception):
    """An engine did not measure; the message says why."""


@dataclass(frozen=True)
class Flags:
    """How llama.cpp is told to run: flash attention, types of the cached keys and values, one buffer for all sequences."""

    fa: bool
    ctk: str = "f16"
    ctv: str = "f16"
    unified: bool = True

    def words(self, row):
        words = "fa on" if self.fa else "fa off"
        if (self.ctk, self.ctv) != ("f16", "f16"):
            words += f", K {self.ctk}, V {self.ctv}"
        if row.kind == "shared":
            words += ", unified" if self.unified else ", not unified"
        return words


@dataclass(frozen=True)
class Used:
    """What a process took from the machine, and what others took meanwhile."""

    # Peak resident memory, MiB.
    rss_mb: float
    # Share of all processors' time that went to other processes or, on a virtual machine, to other machines.
    others: float


@dataclass
class Run:
    """One measured process. `tok_s` is the median of `runs`; for shared rows the sum over the sequences."""

    engine: str
    row: str
    format: str
    argv: list
    runs: list
    used: "Used"
    flags: str = ""
    extra: dict = field(default_factory=dict)

    @property
    def tok_s(self):
        return statistics.median(self.runs)


def calm(measure):
    """The run of `measure`, repeated while other work disturbs it; if all attempts were disturbed, the least disturbed."""
    attempts = []
    for _ in range(1 + RETRIES):
        attempts.append(measure())
        if attempts[-1].used.others <= QUIET:
            break
        warn(f"disturbed: other work took {attempts[-1].used.others:.0%} of the processors")
    return min(attempts, key=lambda run: run.used.others)


def busy_seconds():
    """Processor seconds spent by everyone since the machine started, stolen ones included."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _wait, irq, softirq, steal = (int(n) for n in file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def execute(argv):
    """Standard output, and what it took."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        busy, start = busy_seconds(), time.monotonic()
        try:
            child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        except OSError as error:
            raise Failed(f"`{argv[0]}` cannot be started: {error}\nhint: run bench/peers/setup.sh") from error
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if child.returncode:
            tail = "\n".join(err.read().decode(errors="replace").strip().splitlines()[-6:])
            raise Failed(f"`{' '.join(argv)}` ended with status {child.returncode}:\n{tail}")
        others = busy_seconds() - busy - usage.ru_utime - usage.ru_stime
        share = others / (time.monotonic() - start) / os.cpu_count()
        return out.read().decode(errors="replace"), Used(usage.ru_maxrss / 1024, max(0.0, share))


def json_lines(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def one(lines, argv):
    if len(lines) != 1:
        raise Failed(f"`{' '.join(argv)}` printed {len(lines)} results where one was due")
    return lines[0]


@dataclass(frozen=True)
class Engines:
    """Where the programs and files are."""

    antefix_binary: str
    folder: Path
    threads: int

    def file(self, model, format):
        return str(self.folder / "models" / f"{model}.{format}.gguf")

    def ask(self, *words):
        """What `antefix WORDS --json` prints."""
        argv = [self.antefix_binary, *words, "-t", str(self.threads), "--json"]
        return one(json_lines(execute(argv)[0]), argv)

    def antefix(self, model, row):
        argv = [self.antefix_binary, "bench", "--model", self.file(model, "shipped"), "-t", str(self.threads), "--json"]
        if row.kind == "shared":
            argv += ["--shared-prefix", str(row.depth), "--batch", str(row.batch), "-n", str(row.n)]
        else:
            p, n = (row.n, 0) if row.kind == "pp" else (0, row.n)
            argv += ["-p", str(p), "-n", str(n), "-d", str(row.depth), "-r", str(row.repeats)]
        out, used = execute(argv)
        line = one(json_lines(out), argv)
        if row.kind == "shared":
            extra = {"prefill_tok_s": line["prefill_tok_s"], "kv_bytes": line["kv_bytes"]}
            return Run("antefix", row.name, "shipped", argv, [line["decode_tok_s_sum"]], used, extra=extra)
        return Run("antefix", row.name, "shipped", argv, line["runs"], used)

    def llama(self, model, row, format, flags, repeats=None):
        if row.kind == "shared":
            return self._batched(model, row, format, flags)
        p, n = (row.n, 0) if row.kind == "pp" else (0, row.n)
        argv = [str(self.folder / "bin" / "llama-bench"), "-m", self.file(model, format), "-t", str(self.threads)]
        argv += ["-p", str(p), "-n", str(n), "-d", str(row.depth), "-r", str(repeats or row.repeats)]
        argv += ["-fa", str(int(flags.fa)), "-ctk", flags.ctk, "-ctv", flags.ctv, "-o", "jsonl"]
        if row.kind == "pp" and row.n > 1024:
            # Its warm-up is the whole prompt once more, which such a long run does not need (antefix warms up with 64 tokens).
            argv.append("--no-warmup")
        out, used = execute(argv)
        line = one(json_lines(out), argv)
        return Run("llama.cpp", row.name, format, argv, line["samples_ts"], used, flags.words(row))

    def _batched(self, model, row, format, flags):
        # Unified: one buffer where all sequences point to the same prompt. Otherwise each holds a copy of its own.
        cells = row.depth + row.batch * row.n if flags.unified else row.batch * (row.depth + row.n)
        argv = [str(self.folder / "bin" / "llama-batched-bench"), "-m", self.file(model, format)]
        argv += ["-t", str(self.threads), "-c", str(cells + 256 * (1 if flags.unified else row.batch)), "-b", "2048", "-ub", "512"]
        argv += ["-npp", str(row.depth), "-ntg", str(row.n), "-npl", str(row.batch), "-pps"]
        argv += ["-fa", "on" if flags.fa else "off", "-ctk", flags.ctk, "-ctv", flags.ctv]
        argv += ["-kvu" if flags.unified else "-no-kvu", "--output-format", "jsonl"]
        out, used = execute(argv)
        line = one(json_lines(out), argv)
        extra = {"prefill_tok_s": line["speed_pp"]}
        return Run("llama.cpp", row.name, format, argv, [line["speed_tg"]], used, flags.words(row), extra)

    @property
    def has_mistralrs(self):
        return (self.folder / "venv" / "bin" / "python").exists()

    def mistralrs(self, model, format, rows, repeats=1):
        script = str(Path(__file__).with_name("mistralrs_row.py"))
        argv = [str(self.folder / "venv" / "bin" / "python"), script, "-m", self.file(model, format), "-t", str(self.threads)]
        for kind, flag in (("pp", "-p"), ("tg", "-n")):
            argv += [flag, ",".join(str(row.n) for row in rows if row.kind == kind) or "0"]
        out, used = execute([*argv, "-r", str(repeats)])
        return [
            Run("mistral.rs", line["test"].removesuffix("@d0"), format, argv, line["runs"], used) for line in json_lines(out)
        ]


def warn(text):
    print(text, file=sys.stderr, flush=True)
