"""What to remember with: encoders and rankings of memory in one table each, from what is measured.

`python profiling/memory_table.py` prints them; `readme_numbers.py --write` puts them into
docs/tuning-memory.md. Tokens, FLOPs and bytes are counted from shapes, of a window of `tiny-edit`
that remembers four others; all else is read from results, "not measured" where there is none:

history_frames.json       `python profiling/history_frames.py --edits`
memory_encoders.json      `python profiling/history_frames.py --latents`
tiny_edit_textured.json   `run evaluate --task edit --clips 10 --rows independent,memory`, its
                          results.json
tiny_edit_history.json    the same with `--rows independent,history`, of what
                          `training.history --stage 2` writes
rankings.json             `python profiling/rankings.py`
tiny_nvs_nine_turns.json  `run evaluate --turns 9 --grade furnished`, its results.json
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from history_frames import CHANNELS, ENCODERS, HEADS, LABELS
from history_frames import REMEMBERED as VIDEOS
from measure import ROOT
from memory_encoders import EncoderKind

from mv2v_engine.config import TINY_EDIT, HistoryConfig
from mv2v_engine.tokens.encoders import history_flops
from mv2v_engine.tokens.plan import TokenPlan, memory_tokenizers, turn_plan

RESULTS = ROOT / "profiling" / "results"
NOTHING, RATE, REMEMBERED, WINDOW = "not measured", "2x2x2", 4, (5, 12, 20)
# a row of the first table, and of history_frames.json
_ENCODERS = {
    "both": "TinyHistory 2x2x2",
    "hr": "its full-resolution branch alone",
    "lr": "its low-resolution branch alone",
    "kernel": "one kernel, the base's repeated",
}
_RANKINGS = {
    "retrieved_2": ("VideoFOV", "fov"),
    "coverage_2": ("residual coverage", "coverage"),
    "responsiveness_2": ("responsiveness", ""),
    "learned_2": ("learned", "learned"),
    "random_2": ("at random", "random"),
    "oracle_2": ("*an oracle*", "oracle"),
}


def read(name: str) -> dict[str, Any]:
    """A result, empty if there is none."""
    path = RESULTS / name
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def interval(found: dict[str, Any] | None, digits: int) -> str:
    """A cell of a value with its interval."""
    if not found or found["value"] is None:
        return NOTHING
    low, high = found["ci"]
    return f"{found['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _of(rows: dict[str, Any], row: str, measure: str, digits: int) -> str:
    """A cell of an evaluation's row."""
    own = rows.get(row, {})
    found = {"value": own.get(measure), "ci": own.get(f"{measure}_ci")}
    return interval(found, digits)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _counts(plan: TokenPlan, encode: int, kept: int) -> list[str]:
    """Tokens of memory, GFLOP of a forward and of encoding a window, kB that are kept."""
    tokens = plan.lengths_by_kind["memory"]
    cells = [f"{tokens:,}", f"{plan.flops() / 1e9:.2f}"]
    return [*cells, f"{encode / 1e9:.3f}" if encode else "in the forward", f"{kept / 1e3:.0f}"]


def encoders() -> str:
    """Encoders of remembered windows."""
    ranked, latents = memory_tokenizers(REMEMBERED), 4 * math.prod(WINDOW) * 16
    frames, history = read("history_frames.json").get("rows", {}), read("tiny_edit_history.json")
    own = read("tiny_edit_textured.json").get("rows", {})
    plan = turn_plan(TINY_EDIT, WINDOW, ranked, merge="off")
    rows = [
        [
            "patches by rank",
            *_counts(plan, 0, REMEMBERED * latents),
            NOTHING,
            _of(own, "memory", "subject_error", 3),
            _of(own, "memory", "agreement", 2),
        ]
    ]
    for name, label in _ENCODERS.items():
        config = HistoryConfig(rates=(RATE,), channels=CHANNELS, heads=HEADS, branches=name)  # type: ignore[arg-type]
        shape = replace(TINY_EDIT, history=config)
        plan = turn_plan(shape, WINDOW, ranked, history=RATE, is_encoded=True)
        past = plan.segments[-1]
        size = (WINDOW, past.tokenizer, past.frames_per_token)
        encode = history_flops(config, shape.latent_channels, shape.dim, *size)
        kept = REMEMBERED * latents + 4 * past.length * shape.dim
        rows.append(
            [
                label,
                *_counts(plan, encode, kept),
                interval(frames.get(name, {}).get("psnr"), 2),
                *(
                    _of(history.get("rows", {}) if name == "both" else {}, "history", *measure)
                    for measure in (("subject_error", 3), ("agreement", 2))
                ),
            ]
        )
    titles = ("encoder", "tokens", "GFLOP a forward", "GFLOP to encode a window", "kept, kB")
    measures = (
        "PSNR of frames asked back, dB",
        "edited thing, window against window (L1, lower is better)",
        "windows that show what was asked, share",
    )
    return _table((*titles, *measures), rows)


def view_encoders() -> str:
    """Encoders of remembered views at equal tokens."""
    measured, rows = read("memory_encoders.json").get("rows", {}), []
    for name in (*ENCODERS, "no history"):
        own = measured.get(name, {})
        # only what reads all videos at once has them all to read when another one comes
        joins = 1 if name == "view" else VIDEOS
        counts = [
            (own.get("tokens"), 1, 0),
            (own.get("encoder_parameters"), 1e6, 2),
            (own.get("encode_flops"), 1e9, 3),
            (own.get("encode_flops", 0) / joins or None, 1e9, 3),
            (own.get("kept_bytes"), 1e3, 0),
        ]
        cells = [NOTHING if n is None else f"{n / unit:.{digits}f}" for n, unit, digits in counts]
        label = LABELS.get(name, "*nothing remembered*")
        cells = [""] * len(cells) if name not in LABELS else cells
        own_decibels = [interval(own.get(key), 2) for key in ("psnr", "psnr_everywhere")]
        behind = "" if name == ENCODERS[0] else interval(own.get(f"{ENCODERS[0]}_over_it"), 2)
        reader = measured.get(f"{name}, read", {}).get("psnr")
        read_by = interval(reader, 2) if name in get_args(EncoderKind) else ""
        rows.append([label, *cells, *own_decibels, behind, read_by])
    titles = (
        "encoder",
        "tokens",
        "parameters, M",
        f"GFLOP to encode {VIDEOS} videos",
        "when one more joins",
        "kept for that, kB",
        "PSNR where the videos show it, dB",
        "everywhere",
        f"{LABELS[ENCODERS[0]]} are better by",
        "its own reader's PSNR",
    )
    return _table(titles, rows)


def rankings() -> str:
    """The table of rankings that choose two videos of eight."""
    shown, nine = read("rankings.json").get("rows", {}), read("tiny_nvs_nine_turns.json")
    rows = []
    for name, (label, short) in _RANKINGS.items():
        own, measured = shown.get(short, {}), nine.get("rows", {}).get(name, {})
        choice = measured.get("branches", {}).get("choice")
        cost = [
            f"{measured[key] / unit:.{digits}f}" if key in measured else NOTHING
            for key, unit, digits in (("tokens", 1, 0), ("flops", 1e9, 1))
        ]
        cells = [own.get("shown"), own.get("of_the_oracles_gain_over_fov")]
        gain = "" if name == "retrieved_2" else interval(cells[1], 2)
        rows.append([label, interval(cells[0], 3), gain, interval(choice, 4), *cost])
    titles = (
        "ranking",
        "share of what must be invented that the two show",
        "of the oracle's gain over VideoFOV",
        "consistency of the last turns (L1, lower is better)",
        "tokens",
        "GFLOP a turn",
    )
    return _table(titles, rows)


if __name__ == "__main__":
    print(encoders(), view_encoders(), rankings(), sep="\n\n")
