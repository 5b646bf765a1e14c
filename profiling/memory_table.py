"""What to remember with: encoders and rankings of memory in one table, from what is measured.

`python profiling/memory_table.py` prints it; `readme_numbers.py --write` puts it into
docs/tuning-memory.md. All is read from results, "not measured" where there is none:

memory_study.json    `python profiling/memory_study.py`: novel views, of two turns in 150 tokens
history_edits.json   `python profiling/history_edits.py`: edits, of four windows in 150 tokens
history_frames.json  `python profiling/history_frames.py`: frames of edits asked back
rankings.json        `python profiling/rankings.py`: what two of eight videos show
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from history_edits import BASE, HISTORIES, MEMORY
from measure import ROOT
from memory_encoders import EncoderKind
from memory_study import ENCODERS, LABELS

from mv2v_engine.config import TINY_EDIT, HistoryConfig
from mv2v_engine.tokens.plan import turn_plan

RESULTS = ROOT / "profiling" / "results"
NOTHING = "not measured"
NO_CAMERAS = "needs cameras"
RANKINGS = {
    "fov": "by VideoFOV",
    "coverage": "by residual coverage",
    "responsiveness": "by responsiveness",
    "learned": "by a learned ranking",
    "random": "at random",
    "oracle": "*by an oracle*",
}
_RATE, _WINDOW = "2x2x2", (5, 12, 20)  # of edits
# rows of history_edits.json that have a model of the base's own
_EDITS = {"patches": "recent_2", "nothing": "independent", "all": MEMORY}


def read(name: str) -> dict[str, Any]:
    """A result's rows, none if there is no result."""
    path = RESULTS / name
    found: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    return found


def interval(found: dict[str, Any] | None, digits: int) -> str:
    """A cell of a value with its interval."""
    if not found or found["value"] is None:
        return NOTHING
    low, high = found["ci"]
    return f"{found['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _count(value: float | None, unit: float, digits: int) -> str:
    return NOTHING if value is None else f"{value / unit:,.{digits}f}"


def _views(own: dict[str, Any], took: dict[str, Any]) -> list[str]:
    """Costs of a turn, decibels of a path that is taken again, consistency of a return."""
    encode = took.get("encode_flops")
    encoded = "in the turn" if encode == 0 else _count(encode, 1e9, 3)
    return [
        _count(own.get("tokens"), 1, 0),
        _count(own.get("flops"), 1e9, 1),
        "" if own.get("tokens") == 0 else encoded,
        _count(took.get("kept_bytes"), 1e3, 0),
        interval(own.get("psnr"), 2),
        interval(own.get("return"), 4),
    ]


def _edits(own: dict[str, Any]) -> list[str]:
    """Identity over windows, and how many show what was asked."""
    return [interval(own.get("subject_error"), 3), interval(own.get("agreement"), 2)]


def _tokens_with_whole() -> int:
    """Tokens of an edit's four windows as one history, with its last latent frame whole."""
    shape = replace(TINY_EDIT, history=HistoryConfig(rates=(_RATE,)))
    plan = turn_plan(shape, _WINDOW, (2,) * 4, history=_RATE, history_frames=1, merge="off")
    return plan.lengths_by_kind["memory"]


def encoders_and_rankings() -> str:
    """Encoders of two videos that VideoFOV chose, then rankings of what patches are made of."""
    study, edits = read("memory_study.json"), read("history_edits.json")
    frames, ours = read("history_frames.json"), edits.get(BASE, {})
    rows = []
    for name in ENCODERS:
        own, model = study.get(name, {}), edits.get(name, {})
        views = _views(own.get("fov", {}), own.get("took", {}))
        of_edits = (
            ours.get(_EDITS["patches"], {}) if name == "patches" else model.get("history", {})
        )
        asked = interval(frames.get(name, {}).get("psnr"), 2)
        told = [NO_CAMERAS] * 3 if name in get_args(EncoderKind) else [asked, *_edits(of_edits)]
        rows.append([LABELS[name], *views, *told])
        if whole := model.get(HISTORIES[1]):
            label, tokens = f"{LABELS[name]}, and the last frame whole", str(_tokens_with_whole())
            rows.append([label, tokens, *[NOTHING] * 6, *_edits(whole)])
    patches = study.get("patches", {})
    took = patches.get("took", {})
    for name, label in RANKINGS.items():
        if name != "fov":
            row = _views(patches.get(name, {}), took)
            rows.append([f"patches, {label}", *row, *[NO_CAMERAS] * 3])
    for name, label in (("nothing", "*nothing remembered*"), ("all", "*all of it, by rank*")):
        row = _views(patches.get(name, {}), took if name == "all" else {"kept_bytes": 0})
        rows.append([label, *row, NOTHING, *_edits(ours.get(_EDITS[name], {}))])
    titles = (
        "memory",
        "tokens",
        "GFLOP a turn",
        "GFLOP to encode",
        "kept, kB",
        "a turn's path again: PSNR, dB",
        "a camera that returns: L1, lower is better",
        "frames of an edit asked back: PSNR, dB",
        "edited thing from window to window: L1, lower is better",
        "windows that show what was asked, share",
    )
    return _table(titles, rows)


def rankings() -> str:
    """What two of eight videos show, by who chooses them."""
    shown, rows = read("rankings.json"), []
    for name, label in RANKINGS.items():
        if name == "responsiveness":  # that asks a video model
            continue
        own = shown.get(name, {})
        gain = "" if name == "fov" else interval(own.get("of_the_oracles_gain_over_fov"), 2)
        rows.append([label, interval(own.get("shown"), 3), gain])
    titles = (
        "ranking",
        "share of what must be invented that the two show",
        "of the oracle's gain over VideoFOV",
    )
    return _table(titles, rows)


if __name__ == "__main__":
    print(encoders_and_rankings(), rankings(), sep="\n\n")
