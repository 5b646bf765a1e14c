"""Tables of measurements in the guides, from the committed results: printed, or written in.

`python profiling/readme_numbers.py [--write]`

Each table stands in its page between `<!-- numbers: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import memory_table
from measure import ROOT, read_rows

RESULTS = ROOT / "profiling" / "results"
COSTS, SCALING, SERVING, TUNING = (
    ROOT / "docs" / f"{name}.md" for name in ("costs", "scaling", "serving", "tuning-memory")
)
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
# [`Session.render`](../mv2v_engine/engine/session.py#L139)
_PLACE = re.compile(r"\[`([\w.]+)`\]\(([\w/.]+)#L\d+\)")
Row = dict[str, Any]


def memory(rows: Sequence[Row]) -> str:
    """What a forward costs by count of memory videos: counted at full size, measured small."""
    timed = {(row["kind"], row["memory"]): row for row in rows if "time_ratio" in row}
    lines = [
        "| memory videos | tokens: all 1x2x2 | by rank | PFLOP: all 1x2x2 | by rank | + merging "
        "| static step | time: all 1x2x2 | by rank | + merging | static turn |",
        "|---|" + "---|" * 10,
    ]
    for row in rows:
        if row["what"] != "counted":
            continue
        count = row["memory"]
        times = []
        for kind, column in (
            ("uniform", "time_ratio"),
            ("dynamic", "time_ratio"),
            ("merged", "time_ratio"),
            ("static", "turn_time_ratio"),
        ):
            found = timed.get((kind, count))
            times.append(f"{found[column]:.2f}" if found else "")
        pflop = [f"{row[f'pflop_{kind}']:.3f}" for kind in ("uniform", "dynamic", "merged")]
        cells = [str(count), f"{row['tokens_uniform']:,}", f"{row['tokens_dynamic']:,}", *pflop]
        cells += [f"{row['pflop_static']:.3f}", *times]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def peers(rows: Sequence[Row]) -> str:
    """Our forward beside others', by threads."""
    lines = [
        "| against | our forward | GFLOP: theirs | ours | threads | ms: theirs | ours | speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['peer']} | {row['ours']} | {row['gflop']:.2f} | {row['our_gflop']:.2f} "
        f"| {row['threads']} | {row['ms']:.1f} | {row['our_ms']:.1f} | {row['speedup']:.2f} |"
        for row in rows
        if "speedup" in row
    ]
    return "\n".join(lines)


def turns(rows: Sequence[Row]) -> str:
    """Seconds of whole turns by stage."""
    stages = ("vae encode", "memory", "sampling", "vae decode")
    lines = [
        f"| turn | memory videos | steps | GFLOP | seconds | {' | '.join(stages)} |",
        "|---|" + "---|" * (4 + len(stages)),
    ]
    for row in rows:
        if not row.get("stages"):
            continue
        spent = [f"{row['stages'].get(stage, 0):.2f}" for stage in stages]
        cells = [row["config"], str(row["memory"]), str(row["steps"])]
        cells += [f"{row['tflop'] * 1e3:.1f}", f"{row['seconds']:.1f}", *spent]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def peaks(rows: Sequence[Row]) -> str:
    """Predicted GiB of a full-size turn, by where the text encoder waits."""
    lines = [
        "| memory videos | conditioning | merging | kept K and V, GiB "
        "| peak with the text encoder | peak without |",
        "|---|---|---|---|---|---|",
    ]
    for resident, offloaded in zip(rows[::2], rows[1::2], strict=True):
        both = [f"{row['peak_gib']:.1f} ({row['fullest']})" for row in (resident, offloaded)]
        cells = [str(resident["memory"]), resident["conditioning"], resident["merge"]]
        cells += [f"{resident['kept_gib']:.1f}", *both]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cards(rows: Sequence[Row]) -> str:
    """Predicted GiB of full-size turns, and the smallest card that each fits."""
    lines = [
        "| shape | weights | text encoder | blocks | transformer on the device "
        "| a prompt's first turn | fits | later turns | fit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["model"], row["weights"], row["text"]]
        cells.append("on the host" if row["offload"] else "on the device")
        cells += [f"{row['transformer_gib']:.1f}", f"{row['peak_gib']:.1f} ({row['fullest']})"]
        cells += [_card(row["fits"]), f"{row['later_gib']:.1f}", _card(row["fits_later"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _card(gib: int | None) -> str:
    return "none of them" if gib is None else str(gib)


def models(rows: Sequence[Row]) -> str:
    """What turns of the known full-size checkpoints take, by count, and their licences."""
    lines = [
        "| checkpoint | memory videos | tokens | PFLOP a turn | peak GiB, text encoder on the host "
        "| on the GPU | GB on disk | licence |",
        "|---|" + "---|" * 7,
    ]
    for row in rows:
        peaks = [f"{row[name]:.1f}" for name in ("peak_gib", "peak_gib_text_resident")]
        disk = "not told" if row["disk_bytes"] is None else f"{row['disk_bytes'] / 1e9:.1f}"
        cells = [f"`{row['model']}`", str(row["memory"]), f"{row['tokens']:,}"]
        cells += [f"{row['pflop']:.1f}", *peaks, disk, row["licence"] or "not told"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def hourly(rows: Sequence[Row]) -> str:
    """Turns that one worker makes in an hour, by count of memory videos."""
    measured = {(row["config"], row["memory"]): row["seconds"] for row in rows if "stages" in row}
    lines = [
        "| memory videos | joint, merged: seconds a turn | turns an hour | static: seconds a turn "
        "| turns an hour |",
        "|---|---|---|---|---|",
    ]
    for count in sorted({memory for _, memory in measured}):
        cells = [str(count)]
        for config in ("joint, merged", "static"):
            seconds = measured[config, count]
            cells += [f"{seconds:.1f}", f"{3600 / seconds:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def growth(rows: Sequence[Row]) -> str:
    """How many times a full-size forward without memory one with memory takes, in FLOPs."""
    counted = [row for row in rows if row["what"] == "counted"]
    kinds = ("uniform", "dynamic", "merged", "static")
    base = counted[0]["pflop_dynamic"]
    lines = [
        "| memory videos | all 1x2x2 | by rank | by rank, merged | static step |",
        "|---|---|---|---|---|",
    ]
    for row in counted:
        cells = [f"{row[f'pflop_{kind}'] / base:.2f}" for kind in kinds]
        lines.append(f"| {row['memory']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def faults(rows: Sequence[Row]) -> str:
    """What a client sees of faults; moments at which it sees the same are one line."""
    columns = ("fault", "of", "while", "what a client sees", "what is lost")
    together: dict[tuple[str, ...], list[str]] = {}
    random: dict[tuple[str, ...], str] = {}
    kills = turns = 0
    for row in rows:
        lost = "; ".join(row["lost"]) or "nothing"
        seen = row["seen"] or "nothing was under way"
        key = (row["fault"], row["process"], seen, lost)
        if "kills" in row:
            kills, turns = kills + row["kills"], turns + row["finished"]
            random[row["fault"], row["process"], lost] = f"at {kills} random moments"
        else:
            together.setdefault(key, []).append(row["moment"])
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [
        f"| {fault} | {process} | {', '.join(moments)} | {seen} | {lost} |"
        for (fault, process, seen, lost), moments in together.items()
    ]
    lines += [
        f"| {fault} | {process} | {moment} | as above; {turns} turns were finished | {lost} |"
        for (fault, process, lost), moment in random.items()
    ]
    return "\n".join(lines)


def sessions(rows: Sequence[Row]) -> str:
    """What one service makes of turns that are asked for at once."""
    lines = [
        "| sessions | turns an hour | s in the queue: median | p99 | s to the end: median | p99 "
        "| MB a session | load average of the machine |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        seconds = [row[f"{what}_{p}_s"] for what in ("waiting", "whole") for p in ("p50", "p99")]
        cells = [row["sessions"], f"{row['turns_an_hour']:,.0f}", *(f"{s:,.1f}" for s in seconds)]
        cells += [f"{row['session_bytes'] / 1e6:.2f}", row["load_average"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def statuses(rows: Sequence[Row]) -> str:
    """What a job's status costs, and how soon it comes; before and now, from one run."""
    lines = [
        "| | while | the client sends the tag back | CPU a request, µs | answered a second, of "
        "those asked | ms: median | p99 | load average of the machine |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        cells = ["now" if row["checkout"] == "this one" else "before", row["while"]]
        cells += ["yes" if row["tagged"] else "no", f"{row['cpu_us']:,.0f}"]
        cells += [f"{row['answered_a_second']:,.0f} of {row['rate']:,.0f}"]
        cells += [f"{row['p50_ms']:,.1f}", f"{row['p99_ms']:,.1f}", str(row["load_average"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# a table's name, the result that it is made of, and how; None: it reads several itself
TABLES: dict[str, tuple[str | None, Callable[[Sequence[Row]], str]]] = {
    "memory": ("memory.jsonl", memory),
    "peers": ("peers.jsonl", peers),
    "turns": ("engine.jsonl", turns),
    "peaks": ("peak_memory.jsonl", peaks),
    "cards": ("small_memory.jsonl", cards),
    "models": ("models.jsonl", models),
    "hourly": ("engine.jsonl", hourly),
    "growth": ("memory.jsonl", growth),
    "faults": ("fault_matrix.jsonl", faults),
    "encoders and rankings": (None, lambda _: memory_table.encoders_and_rankings()),
    "rankings": (None, lambda _: memory_table.rankings()),
    "sessions": ("service_sessions.jsonl", sessions),
    "statuses": ("service.jsonl", statuses),
}
# the tables of each page
PAGES: dict[Path, tuple[str, ...]] = {
    README: ("models",),
    COSTS: ("memory", "peers", "turns", "peaks", "cards"),
    SCALING: ("hourly", "sessions", "statuses", "growth"),
    SERVING: ("faults",),
    TUNING: ("encoders and rankings", "rankings"),
}


def block(name: str) -> str:
    """A table between its marks, as its page has it."""
    file, markdown = TABLES[name]
    rows = [] if file is None else read_rows(RESULTS / file)
    return f"<!-- numbers: {name} -->\n{markdown(rows)}\n<!-- end -->"


def written(page: Path) -> str:
    """A page's text with every table as the results have it now."""
    text = page.read_text(encoding="utf-8")
    for name in PAGES[page]:
        marks = re.compile(rf"<!-- numbers: {name} -->\n.*?<!-- end -->", re.DOTALL)
        if not marks.search(text):
            raise SystemExit(f"{page.name} has no place for the table {name!r}")
        text = marks.sub(lambda _, name=name: block(name), text)  # type: ignore[misc]
    return text


def placed(page: Path) -> str:
    """A page's text with every link to a name of the code at the line that defines it."""

    def link(found: re.Match[str]) -> str:
        name, path = found[1], found[2]
        lines = (page.parent / path).read_text(encoding="utf-8").splitlines()
        # `Class.method` is the method behind its class
        at, wanted = 0, name.split(".")
        for part in wanted:
            define = re.compile(rf"\s*(?:class|def|async def) {part}\b")
            at = next((i for i in range(at, len(lines)) if define.match(lines[i])), -1)
            if at < 0:
                raise SystemExit(f"{page.name}: {path} defines no {name}; correct the page")
        return f"[`{name}`]({path}#L{at + 1})"

    return _PLACE.sub(link, page.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into the pages")
    args = parser.parse_args()
    if args.write:
        for page in PAGES:
            page.write_text(written(page), encoding="utf-8")
        ARCHITECTURE.write_text(placed(ARCHITECTURE), encoding="utf-8")
        return
    for name in TABLES:
        print(f"{block(name)}\n")


if __name__ == "__main__":
    main()
