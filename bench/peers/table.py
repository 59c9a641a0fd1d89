"""The Markdown table of a file of measurements."""

import json
import statistics

from engines import QUIET
from rows import ceiling, parse


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def speed(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def spread(values):
    """Median, with the smallest and the largest in brackets."""
    if not values:
        return "-"
    text = speed(statistics.median(values))
    return text if len(values) == 1 else f"{text} ({speed(min(values))}-{speed(max(values))})"


def ratio(ours, theirs):
    """Ratio of medians, with the smallest and the largest ratio of a pair in brackets. Both: pair number -> tokens/s."""
    if not ours or not theirs:
        return "-"
    whole = statistics.median(ours.values()) / statistics.median(theirs.values())
    each = [ours[pair] / theirs[pair] for pair in ours if pair in theirs]
    return f"**{whole:.2f}**" + (f" ({min(each):.2f}-{max(each):.2f})" if len(each) > 1 else "")


def latest(lines):
    """Lines of the last session in which each model and row was measured, in the order of the first."""
    sessions = {}
    for line in lines:
        if line["phase"] in ("pair", "failed"):
            sessions[line["model"], line["row"]] = line["session"]
    return sessions


def ceilings(lines):
    """The newest description of the machine, with the highest of all ceilings measured on it."""
    probes = [it for it in lines if it["phase"] == "machine"]
    same = [it for it in probes if all(it[key] == probes[-1][key] for key in ("cpu", "threads", "path"))]
    return {**same[-1], **{key: max(it[key] for it in same) for key in ("read_gb_s", "f32_gflop_s", "int8_gop_s")}}


def markdown(lines, history):
    """One line a row and a peer, newest session of each row; then the machine. `history`: where to look for its ceilings."""
    machine = ceilings(history)
    out = [
        "| model | row | antefix tok/s | of ceiling | peer | peer tok/s | ratio | peak MiB, antefix / peer |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (model, row), session in latest(lines).items():
        here = [it for it in lines if it.get("model") == model and it.get("row") == row]
        pairs = [it for it in here if it["phase"] == "pair" and it["session"] == session]
        beside = [it for it in here if it["phase"] == "beside"][-1:]
        ours = [it for it in pairs if it["engine"] == "antefix"]
        us = {it["pair"]: it["tok_s"] for it in ours}
        facts = next((it for it in reversed(lines) if it["phase"] == "model" and it["model"] == model), None)
        share = "-"
        if ours and facts:
            share = f"{statistics.median(us.values()) / ceiling(parse(row), facts, machine):.0%}"
        peers = {}
        for it in [*pairs, *beside]:
            if it["engine"] != "antefix":
                peers.setdefault((it["engine"], it["format"], it["flags"]), []).append(it)
        failed = [it for it in here if it["phase"] == "failed" and it["session"] == session]
        for it in failed:
            why = it["error"].splitlines()[-1].replace("|", "/")[:200]
            out.append(f"| {model} | {row} | {it['engine']} failed: {why} | | | | | |")
        if not peers and ours:
            out.append(f"| {model} | {row} | {spread(list(us.values()))} | {share} | - | - | - | {rss(ours)} / - |")
        for n, ((engine, format, flags), its) in enumerate(peers.items()):
            them = {it.get("pair", 0): it["tok_s"] for it in its}
            name = ", ".join(word for word in (f"{engine} {format}", flags) if word)
            name += " *(worse text)*" if format == "Q4_0" else ""
            mine = (spread(list(us.values())), share) if n == 0 else ("", "")
            out.append(
                f"| {model if n == 0 else ''} | {row if n == 0 else ''} | {mine[0]} | {mine[1]} | {name} "
                f"| {spread(list(them.values()))} | {ratio(us, them)} | {rss(ours)} / {rss(its)} |"
            )
    out += disturbed([it for it in lines if it["phase"] in ("pair", "beside")])
    out += ["", machine_words(machine)]
    return "\n".join(out)


def rss(its):
    return f"{max(it['rss_mb'] for it in its):,.0f}" if its else "-"


def disturbed(runs):
    """A warning when the machine was not ours alone."""
    noisy = [it for it in runs if it["others"] > QUIET]
    if not noisy:
        return []
    worst = max(it["others"] for it in noisy)
    return ["", f"**Not quiet**: in {len(noisy)} of {len(runs)} runs other work took up to {worst:.0%} of the processors."]


def machine_words(it):
    return (
        f"{it['cpu']}, {it['threads']} threads, antefix path {it['path']}, commit {it['commit']}; ceilings measured by "
        f"`antefix doctor`: read {it['read_gb_s']:.1f} GB/s, f32 {it['f32_gflop_s']:.0f} GFLOP/s, "
        f"int8 {it['int8_gop_s']:.0f} Gop/s."
    )
