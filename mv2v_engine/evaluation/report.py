"""From scenes to a result: means with bootstrap intervals, targets, a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from mv2v_engine.evaluation import bootstrap
from mv2v_engine.evaluation.comparisons import (
    Target,
    Values,
    add,
    compared,
    described,
    number,
    rounded,
    targets_table,
    with_interval,
)
from mv2v_engine.evaluation.protocol import MAIN_TURNS, ROWS, Protocol, pair_name

Scenes = Sequence[dict[str, Any]]

_LABELS = {row.name: row.label for row in ROWS}
_QUALITY = (
    "source_psnr",
    "psnr",
    "unseen_psnr",
    "ssim",
    "camera_error",
    "rotation_error",
    "translation_error",
    "flicker",
)
_COST = ("tokens", "flops")
_MAIN_PAIRS = ("1-2", "1-3", "2-3")
_RETURN = "1-5"  # the pair that has four videos in memory

MEASURES = {
    "consistency": "mean L1 (0..1) of later against warped earlier turns, over pairs 1-2, 1-3 and "
    "2-3, where both see the point and the source does not; lower is better",
    "features": "1 - cosine of 7x7 colour neighbourhoods, over the same pixels; lower is better",
    "source_psnr": "PSNR in dB against the true view, where the source sees the point",
    "unseen_psnr": "PSNR in dB where the source does not see the point",
    "camera_error": "mean displacement in pixels between the requested camera and the one that "
    "aligns best with the turn; rotation_error in degrees, translation_error in metres",
    "flicker": "(255 - mean |change between frames|) / 255; 1 is a still picture",
    "tokens": "of a turn's sequence before merging, mean over turns",
    "flops": "of all forwards of a turn, counted from its token plan, mean over turns",
    "seconds": "of denoising a turn, without VAE and retrieval; mean over turns, median of scenes",
}


def summarise(scenes: Scenes, protocol: Protocol) -> dict[str, Any]:
    """Everything that follows from the scenes' measures (see `MEASURES` for units)."""
    rows = {
        row.name: _row(_Row(scenes, "rows", row.name), has_cost=True)
        for row in protocol.chosen_rows
    }
    references = {
        name: _row(_Row(scenes, "references", name), has_cost=False)
        for name in scenes[0]["references"]
    }
    return {
        "scenes": len(scenes),
        "rows": rows,
        "references": references,
        "targets": targets(scenes, protocol),
        "responsiveness": _responsiveness(scenes),
        "measures": MEASURES,
    }


class _Row:
    """One method's values, a number (or None) a scene."""

    def __init__(self, scenes: Scenes, kind: str, name: str) -> None:
        self.scenes = [scene[kind][name] for scene in scenes]

    def pairs(self, names: Sequence[str], measure: str = "l1") -> Values:
        """Mean over the given pairs of turns."""
        return [_mean([pair.get(n, {}).get(measure) for n in names]) for pair in self._pairs()]

    def turns(self, measure: str) -> Values:
        """Mean over turns."""
        return [_mean([turn[measure] for turn in scene["turns"]]) for scene in self.scenes]

    def pair_names(self) -> list[str]:
        return sorted({name for pairs in self._pairs() for name in pairs})

    def against_earlier(self, number: int) -> Values:
        """Consistency of one turn with all turns before it."""
        return self.pairs([pair_name((earlier, number)) for earlier in range(1, number)])

    def _pairs(self) -> list[dict[str, dict[str, float]]]:
        return [scene["pairs"] for scene in self.scenes]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _row(row: _Row, *, has_cost: bool) -> dict[str, Any]:
    summary: dict[str, Any] = {}

    add(summary, "consistency", row.pairs(_MAIN_PAIRS))
    add(summary, "features", row.pairs(_MAIN_PAIRS, "features"))
    for measure in _QUALITY:
        add(summary, measure, row.turns(measure))
    for measure in _COST if has_cost else ():
        estimate = bootstrap.mean(row.turns(measure))
        summary[measure] = estimate and rounded(estimate.value)
    if has_cost:
        known = [value for value in row.turns("seconds") if value is not None]
        # the median, since the first scene also pays for warming up
        summary["seconds"] = rounded(median(known))
    summary["pairs"] = {
        name: described(bootstrap.mean(row.pairs([name]))) for name in row.pair_names()
    }
    summary["by_turn"] = {
        str(number): described(bootstrap.mean(row.against_earlier(number)))
        for number in range(2, len(row.scenes[0]["turns"]) + 1)
    }
    return summary


def _three_turns(row: _Row) -> Values:
    return row.pairs(_MAIN_PAIRS)


def _first_third(row: _Row) -> Values:
    return row.pairs(["1-3"])


def _first_fifth(row: _Row) -> Values:
    return row.pairs([_RETURN])


def _from_the_third(row: _Row) -> Values:
    """Where retrieval has a choice."""
    return row.pairs([name for name in row.pair_names() if int(name[-1]) >= MAIN_TURNS])


def _source_psnr(row: _Row) -> Values:
    return row.turns("source_psnr")


def _camera_error(row: _Row) -> Values:
    return row.turns("camera_error")


_GAIN, _MERGED = ("memory", "independent"), ("memory_merged", "memory")
_FUSED, _STATIC = ("memory_merged", "discard"), ("static", "memory")
_TARGETS = (
    Target(name="memory / independent", rows=_GAIN, values=_three_turns, at_most=0.5),
    Target(name="memory / independent, 1-5", rows=_GAIN, values=_first_fifth, at_most=0.5),
    Target(
        name="memory / previous, 1-3",
        rows=("memory", "previous"),
        values=_first_third,
        at_most=1,
    ),
    Target(
        name="independent - memory, source_psnr",
        rows=("independent", "memory"),
        values=_source_psnr,
        at_most=0.2,
        compare=bootstrap.difference,
    ),
    Target(name="memory / independent, camera", rows=_GAIN, values=_camera_error, at_most=1),
    Target(name="merged / memory", rows=_MERGED, values=_three_turns, at_most=1.02),
    Target(name="merged / memory, 1-5", rows=_MERGED, values=_first_fifth, at_most=1.02),
    Target(name="static / memory", rows=_STATIC, values=_three_turns, at_most=1.05),
    Target(name="static / memory, 1-5", rows=_STATIC, values=_first_fifth, at_most=1.05),
    Target(name="merged / discard", rows=_FUSED, values=_three_turns, at_most=1),
    Target(name="merged / discard, 1-5", rows=_FUSED, values=_first_fifth, at_most=1),
    Target(
        name="retrieved / random",
        rows=("retrieved_1", "random_1"),
        values=_from_the_third,
        at_most=1,
    ),
)


def targets(scenes: Scenes, protocol: Protocol) -> dict[str, Any]:
    """The comparisons that the method is judged by: value, interval, bound, whether it is met.

    A comparison is left out where its rows or turns were not measured.
    """

    def values(target: Target, name: str) -> Values | None:
        is_measured = name in protocol.rows
        return target.values(_Row(scenes, "rows", name)) if is_measured else None

    return compared(_TARGETS, values)


def _responsiveness(scenes: Scenes) -> dict[str, Any]:
    """Table 1: each measure as a mean over scenes with its interval, by block group."""
    tables = [scene["responsiveness"] for scene in scenes if scene["responsiveness"]]
    if not tables:
        return {}
    return {
        group: {
            name: described(bootstrap.mean([table[group][name] for table in tables]))
            for name in measures
        }
        for group, measures in tables[0].items()
    }


def markdown(results: dict[str, Any]) -> str:
    """The result as tables that a README or a model card can show."""
    settings = results["settings"]
    lines = [
        f"{results['scenes']} held-out scenes of {settings['turns']} turns, "
        f"{settings['steps']} denoising steps, checkpoint {results['engine']['checkpoint']} on "
        f"{results['engine']['device']}; 95 % bootstrap intervals over scenes.",
        *([] if settings["trained_for_memory"] else ["These weights never learned to remember."]),
        "",
        "| | consistency ↓ | 1-2 | 1-3 | 2-3 | 1 - cosine ↓ | PSNR where seen ↑ "
        "| camera error, px ↓ | flicker ↑ | tokens | GFLOP a turn | seconds a turn |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    named = [(_LABELS[name], row) for name, row in results["rows"].items()]
    named += [(f"*{name}*", row) for name, row in results["references"].items()]
    lines += [_markdown_row(label, row) for label, row in named]
    lines += targets_table(results["targets"])
    saved = [f"{100 * by['4']:.1f} % ({plan})" for plan, by in results["merging_saves"].items()]
    lines += [
        "",
        f"Of a forward's FLOPs, merging saves with four memory videos: {', '.join(saved)}.",
    ]
    if results["responsiveness"]:
        lines += ["", "| blocks | Pearson | Spearman | bottom-50 % overlap |", "|---|---|---|---|"]
        for group, values in results["responsiveness"].items():
            cells = [f"{values[name]['value']:.3f}" for name in values]
            lines.append(f"| {group} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _markdown_row(label: str, row: dict[str, Any]) -> str:
    pairs = [number(row["pairs"].get(name, {}).get("value"), 4) for name in _MAIN_PAIRS]
    flops = row.get("flops")
    cells = [
        label,
        with_interval(row, "consistency", 4),
        *pairs,
        number(row["features"], 4),
        with_interval(row, "source_psnr", 2),
        with_interval(row, "camera_error", 2),
        number(row["flicker"], 4),
        number(row.get("tokens"), 0),
        number(None if flops is None else flops / 1e9, 1),
        number(row.get("seconds"), 2),
    ]
    return f"| {' | '.join(cells)} |"
