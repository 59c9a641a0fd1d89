"""Finds the flags with which llama.cpp is fastest on a row, so that the comparison is with its best and not its default.

Formats change the products of weights and flags change attention, so they are searched one after the other: the format on a
short row (pp512 for prompts and batches, tg128 for single steps, both with and without flash attention), the flags on the row
itself with that format. Long rows try only the flags that came within 20 % of the best on the same row at 2,048 tokens.
`everything` tries every format with all flags instead.
"""

import json
from dataclasses import asdict, replace

from engines import EQUAL, WORSE, Failed, Flags, calm, warn
from rows import Row, parse

# Results closer than this to the best are measured once more.
TIE = 0.95
# Steps of a shared row while flags are tried; depth, not their number, decides the speed.
SHARED_PROBE = 16
# Flags slower than this at 2,048 tokens are not tried on longer rows.
HOPELESS = 0.8


def candidates(row):
    """Flags worth trying. Cached keys in q8_0 only where they have been seen to win; bf16 never was faster than f16."""
    on, off = Flags(fa=True), Flags(fa=False)
    if row.kind == "shared":
        shared = [off, Flags(fa=False, ctk="q8_0"), on]
        return [*shared, Flags(fa=False, unified=False), Flags(fa=True, unified=False)]
    if row.kind == "tg" and row.depth:
        # Values can be quantised with flash attention only.
        return [off, Flags(fa=False, ctk="q8_0"), on, Flags(fa=True, ctk="q8_0", ctv="q8_0")]
    return [on, off]


def base(row):
    """The short row that decides the format."""
    return parse("tg128" if row.kind == "tg" else "pp512")


def shorter(row):
    """The same row at 2,048 tokens, for rows longer than that."""
    if row.kind == "pp" and row.n > 2048 and not row.depth:
        return Row("pp", 2048)
    if row.kind == "shared" and row.depth > 2048:
        return Row("shared", row.n, 2048, row.batch)
    return None


class Scan:
    """Results of earlier scans are kept in scan.json beside the peers: llama.cpp does not change while antefix does."""

    def __init__(self, engines, machine, record, everything=False, again=False):
        self.engines, self.machine, self.record = engines, machine, record
        self.everything = everything
        self.path = engines.folder / "scan.json"
        kept = not again and not everything and self.path.exists()
        self.known = json.loads(self.path.read_text()) if kept else {}

    def _tried(self, model, row):
        """[(format, flags, mean tokens/s)] of this row, measured now or earlier."""
        size = (self.engines.folder / "models" / f"{model}.shipped.gguf").stat().st_size
        key = f"{self.machine}, {self.engines.threads} threads: {model}, {size} bytes: {row.name}"
        if key not in self.known:
            self.known[key] = self._measure(model, row)
            self.path.write_text(json.dumps(self.known, indent=1))
        return [(format, Flags(**flags), sum(runs) / len(runs)) for format, flags, runs in self.known[key]]

    def _contenders(self, model, row):
        all_flags = candidates(row)
        if self.everything or row == base(row):
            return [(format, flags) for format in [*EQUAL, WORSE] for flags in all_flags]
        format, _, _ = fastest(self._tried(model, base(row)), EQUAL)
        if (short := shorter(row)) is not None:
            seen = self._tried(model, short)
            best = max(speed for _, _, speed in seen)
            slow = [flags for _, flags, speed in seen if speed < HOPELESS * best]
            all_flags = [flags for flags in all_flags if flags not in slow]
        return [(format, flags) for flags in all_flags]

    def _measure(self, model, row):
        results = {}
        contenders = self._contenders(model, row)
        probe = replace(row, n=SHARED_PROBE) if row.kind == "shared" else row

        def once(format, flags):
            try:
                run = calm(lambda: self.engines.llama(model, probe, format, flags, repeats=1))
            except Failed as error:
                warn(f"scan: {error}")
                return
            self.record(run, model, "scan")
            warn(f"scan: {model} {row.name} {format}, {flags.words(row)}: {run.tok_s:.1f}")
            results.setdefault((format, flags), []).append(run.tok_s)

        for contender in contenders if len(contenders) > 1 else []:
            once(*contender)
        if len(contenders) == 1:
            # Nothing to choose: not worth a run, and no speed is compared with another.
            results[contenders[0]] = [1.0]
        for formats in (EQUAL, [WORSE]):
            group = {it: runs[0] for it, runs in results.items() if it[0] in formats}
            close = [it for it, speed in group.items() if speed > TIE * max(group.values())]
            # A minute's run is steadier than that by itself.
            if len(close) > 1 and shorter(row) is None:
                for it in close:
                    once(*it)
        if not results:
            raise Failed(f"llama.cpp ran {row.name} with no flags at all")
        return [(format, asdict(flags), runs) for (format, flags), runs in results.items()]

    def best(self, model, row):
        """(format, flags) of equal quality, and the same for the format that writes worse text."""
        tried = self._tried(model, row)
        format, flags, _ = fastest(tried, EQUAL)
        worse = fastest(tried, [WORSE])
        return (format, flags), (WORSE, worse[1] if worse else flags)


def fastest(tried, formats):
    return max((it for it in tried if it[0] in formats), key=lambda it: it[2], default=None)
