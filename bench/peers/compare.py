#!/usr/bin/env python3
"""antefix beside llama.cpp and mistral.rs, on one machine, in alternating pairs. See README.md in this folder.

    bench/peers/setup.sh
    python3 bench/peers/compare.py                        # all models, all rows
    python3 bench/peers/compare.py --shared               # many sequences behind one prompt
    python3 bench/peers/compare.py --models smollm2 --rows pp512,tg128 --pairs 3
    python3 bench/peers/compare.py --table bench/results/*/peers.jsonl
"""

import argparse
import datetime
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import table
from engines import EQUAL, Engines, Failed, Run, calm, warn
from rows import ROWS, SHARED, parse
from scan import Scan

ROOT = Path(__file__).resolve().parents[2]


def words(text):
    return [word for word in text.split(",") if word]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--antefix", default=str(ROOT / "target" / "release" / "antefix"), help="the binary")
    parser.add_argument("--peers", default=os.environ.get("ANTEFIX_PEERS", "/tmp/antefix-peers"), help="setup.sh's folder")
    parser.add_argument("--models", type=words, help="names that setup.sh was given (default: all; --shared: smollm2)")
    parser.add_argument("--rows", type=words, help=f"default: {','.join(ROWS)}; --shared: {','.join(SHARED)}")
    parser.add_argument("--shared", action="store_true", help="the rows of many sequences behind one prompt")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each engine on each row (default: 5)")
    parser.add_argument("--threads", "-t", type=int, default=2)
    parser.add_argument("--scan", choices=["kept", "again", "everything"], default="kept", help="how flags are found")
    parser.add_argument("--skip-q4", action="store_true", help="leave out llama.cpp's Q4_0, which is not of equal quality")
    parser.add_argument("--skip-mistralrs", action="store_true")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only-antefix", action="store_true")
    only.add_argument("--only-peer", action="store_true", help="only llama.cpp and mistral.rs")
    only.add_argument("--only-scan", action="store_true", help="find llama.cpp's best flags and stop")
    parser.add_argument("--out", type=Path, help="JSON lines; default: bench/results/DATE-CPU/peers.jsonl")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of an earlier run's lines and stop")
    args = parser.parse_args()
    if args.pairs < 1 or args.threads < 1:
        parser.error("`--pairs` and `--threads` are at least 1")
    try:
        args.rows = [parse(name) for name in args.rows or (SHARED if args.shared else ROWS)]
    except ValueError as error:
        parser.error(str(error))
    return args


def models(args):
    folder = Path(args.peers) / "models"
    here = sorted(path.name.removesuffix(".shipped.gguf") for path in folder.glob("*.shipped.gguf"))
    wanted = args.models or (["smollm2"] if args.shared else here)
    missing = [name for name in wanted if name not in here]
    if missing or not wanted:
        raise Failed(f"no model {', '.join(missing) or 'at all'} in {folder}\nhint: run bench/peers/setup.sh")
    return wanted


def commit():
    def git(*words):
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")


def slug(cpu):
    cpu = re.sub(r"\((R|TM)\)|@.*|CPU|\bProcessor\b", " ", cpu, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")


class Session:
    """One call of this program: what does not change from line to line, and the file they go to."""

    def __init__(self, args, engines, file="peers.jsonl"):
        self.engines = engines
        machine = engines.ask("doctor")
        self.cpu = machine["cpu"]
        now = datetime.datetime.now(datetime.timezone.utc)
        self.name = now.isoformat(timespec="seconds")
        self.path = args.out or ROOT / "bench" / "results" / f"{now.date()}-{slug(self.cpu)}" / file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.same = {
            "session": self.name,
            "commit": commit(),
            "binary": hashlib.sha256(Path(engines.antefix_binary).read_bytes()).hexdigest()[:12],
            "cpu": self.cpu,
            "threads": engines.threads,
        }
        self.lines = []
        self.write({"phase": "machine", **machine})

    def probe(self):
        """Measures the machine's ceilings again. Other work can only make them look lower, so the table takes the highest."""
        self.write({"phase": "machine", **self.engines.ask("doctor")})

    def write(self, line):
        when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        line = {"when": when, **self.same, **line}
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def record(self, run: Run, model, phase, **more):
        line = {"phase": phase, "model": model, "row": run.row, "engine": run.engine, "format": run.format}
        line |= {"flags": run.flags, "tok_s": run.tok_s, "runs": run.runs, "rss_mb": round(run.used.rss_mb, 1)}
        line["others"] = round(run.used.others, 3)
        self.write({**line, **run.extra, **more, "argv": run.argv})


def pairs(session, args, model, row, scan):
    """antefix, llama.cpp, (its Q4_0,) antefix, llama.cpp, ..."""
    engines = session.engines
    contenders = []
    if not args.only_peer:
        contenders.append(lambda: engines.antefix(model, row))
    if not args.only_antefix:
        equal, worse = scan.best(model, row)
        contenders.append(lambda: engines.llama(model, row, *equal))
        if not args.skip_q4:
            contenders.append(lambda: engines.llama(model, row, *worse))
    if args.only_scan:
        return
    session.probe()
    for pair in range(args.pairs):
        for contender in contenders:
            run = calm(contender)
            session.record(run, model, "pair", pair=pair)
            warn(f"{model} {row.name} pair {pair + 1}: {run.engine} {run.format} {run.flags}: {run.tok_s:.1f}")


def mistralrs(session, model, rows):
    """Each test once with the fastest file of equal quality: it is far behind, so pairs would only cost time."""
    engines = session.engines
    rows = [row for row in rows if row.name in ("pp512", "tg128")]
    if not rows or not engines.has_mistralrs:
        return
    short = [parse("pp64"), parse("tg32")]
    tried = []
    for format in EQUAL:
        for run in engines.mistralrs(model, format, [it for it in short if it.kind in {row.kind for row in rows}]):
            session.record(run, model, "scan")
            tried.append(run)
    for row in rows:
        best = max((run for run in tried if run.row.startswith(row.kind)), key=lambda run: run.tok_s)
        run = calm(lambda row=row, best=best: engines.mistralrs(model, best.format, [row])[0])
        session.record(run, model, "beside")
        warn(f"{model} {row.name}: mistral.rs {run.format}: {run.tok_s:.1f}")


def measure(session, args, names):
    scan = Scan(session.engines, session.cpu, session.record, args.scan == "everything", args.scan == "again")

    def guarded(model, row_name, engine, work):
        try:
            work()
        except Failed as error:
            warn(f"{model} {row_name}: {error}")
            session.write({"phase": "failed", "model": model, "row": row_name, "engine": engine, "error": str(error)})

    for model in names:
        facts = session.engines.ask("explain", "--model", session.engines.file(model, "shipped"))
        session.write({"phase": "model", "model": model, **facts})
        rows = list(dict.fromkeys(row.within(facts["context"]) for row in args.rows))
        for row in rows:
            guarded(model, row.name, "pair", lambda row=row: pairs(session, args, model, row, scan))
        if not (args.only_antefix or args.only_scan or args.skip_mistralrs):
            guarded(model, "pp512, tg128", "mistral.rs", lambda: mistralrs(session, model, rows))


def main():
    args = arguments()
    if args.table:
        lines = table.read(args.table)
        print(table.markdown(lines, lines))
        return 0
    if os.nice(0) > 0:
        warn("warning: this process is niced, so other work slows down what it measures")
    try:
        names = models(args)
        session = Session(args, Engines(args.antefix, Path(args.peers), args.threads))
    except Failed as error:
        warn(f"error: {error}")
        return 2
    try:
        measure(session, args, names)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        warn("stopped; what was measured follows")
    warn(f"lines: {session.path}")
    print(table.markdown(session.lines, table.read(session.path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
