"""From scenes to a result: means with bootstrap intervals, targets, a Markdown table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import methodcaller
from statistics import median
from typing import Any

from mv2v_engine.evaluation import bootstrap
from mv2v_engine.evaluation.comparisons import (
    Columns,
    Target,
    Values,
    add,
    compared,
    described,
    measures_table,
    rounded,
    steps_words,
    table,
    targets_table,
)
from mv2v_engine.evaluation.protocol import DETOUR, REPLAY, RETURN, ROWS, Protocol, pair_name

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
_ENERGIES = {
    "sharpness": "energy",
    "source_sharpness": "source_energy",
    "unseen_sharpness": "unseen_energy",
}
_COST = ("tokens", "flops")
_MAIN_PAIRS = ("1-2", "1-3", "2-3")
# the pair that has all others in memory, of five turns and of nine
_CLOSURE = ("1-5", "1-9")

MEASURES = {
    "consistency": "mean L1 (0..1) of later against warped earlier turns, over pairs 1-2, 1-3 and "
    "2-3, where both see the point and the source does not; lower is better",
    "features": "1 - cosine of 7x7 colour neighbourhoods, over the same pixels; lower is better",
    "source_psnr": "PSNR in dB against the true view, where the source sees the point",
    "unseen_psnr": "PSNR in dB where the source does not see the point",
    "sharpness": "gradient energy of all turns over that of the true views through the VAE; 1 is "
    "as sharp as the VAE allows",
    "source_sharpness": "the same where the source sees the point",
    "unseen_sharpness": "the same where it does not",
    "camera_error": "mean displacement in pixels between the requested camera and the one that "
    "aligns best with the turn; rotation_error in degrees, translation_error in metres",
    "flicker": "(255 - mean |change between frames|) / 255; 1 is a still picture",
    "branches": "consistency of a last turn with the first one (loop closure, replay; open-domain "
    "return: of walls and things that the source shows nothing of), or with all turns before it, "
    "by pixels (detour; choice: all last turns)",
    "tokens": "of a turn's sequence before merging, mean over turns",
    "flops": "of all forwards of a turn, counted from its token plan, mean over turns",
    "seconds": "of denoising a turn, without VAE and retrieval; mean over turns, median of scenes",
}


_ST_LPIPS = {
    "st_lpips": "shift-tolerant LPIPS (AlexNet) of every fourth frame against the true view; lower "
    "is better",
}


def summarise(scenes: Scenes, protocol: Protocol) -> dict[str, Any]:
    """Everything that follows from the scenes' measures (see `MEASURES` for units)."""
    has_st_lpips = "st_lpips" in scenes[0]["references"]["truth"]["turns"][0]
    measures = MEASURES | (_ST_LPIPS if has_st_lpips else {})
    quality = [*_QUALITY, *(_ST_LPIPS if has_st_lpips else ())]
    rows = {
        row.name: _row(_Row(scenes, "rows", row.name), quality, has_cost=True)
        for row in protocol.chosen_rows
    }
    references = {
        name: _row(_Row(scenes, "references", name), quality, has_cost=False)
        for name in scenes[0]["references"]
    }
    return {
        "scenes": len(scenes),
        "rows": rows,
        "references": references,
        "targets": targets(scenes, protocol),
        "responsiveness": _responsiveness(scenes),
        "measures": measures,
    }


class _Row:
    """One method's values, a number (or None) a scene."""

    def __init__(self, scenes: Scenes, kind: str, name: str) -> None:
        self.scenes = [scene[kind][name] for scene in scenes]
        self._best = [scene["references"]["vae"]["turns"] for scene in scenes]

    def pairs(self, names: Sequence[str], measure: str = "l1") -> Values:
        """Mean over the given pairs of turns."""
        return [_mean([pair.get(n, {}).get(measure) for n in names]) for pair in self._pairs()]

    def turns(self, measure: str) -> Values:
        """Mean over turns."""
        return [_mean([turn[measure] for turn in scene["turns"]]) for scene in self.scenes]

    def sharpness(self, energy: str = "energy") -> Values:
        """Gradient energy of all turns of a scene, over that of the true views through the VAE.

        A turn with next to nothing to draw decides nothing in this way.
        """
        values: Values = []
        for scene, best in zip(self.scenes, self._best, strict=True):
            allowed = {turn["turn"]: turn[energy] for turn in best}
            total = sum(allowed[turn["turn"]] for turn in scene["turns"])
            made = sum(turn[energy] for turn in scene["turns"])
            values.append(made / total if total else None)
        return values

    def pair_names(self) -> list[str]:
        return sorted({name for pairs in self._pairs() for name in pairs})

    def by_later(self) -> dict[str, Values]:
        """Consistency of each turn with all turns before it, in the order of the turns."""
        names = self.pair_names()
        later = sorted({name.partition("-")[2] for name in names})
        return {
            turn: self.pairs([n for n in names if n.partition("-")[2] == turn]) for turn in later
        }

    def last_turns(self, *names: str) -> Values:
        """Consistency of last turns with all turns before them, a pixel as much as another."""
        values: Values = []
        for pairs in self._pairs():
            chosen = [pair for n, pair in pairs.items() if n.partition("-")[2] in names]
            total = sum(pair["pixels"] for pair in chosen)
            error = sum(pair["l1"] * pair["pixels"] for pair in chosen)
            values.append(error / total if total else None)
        return values

    def _pairs(self) -> list[dict[str, dict[str, float]]]:
        return [scene["pairs"] for scene in self.scenes]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _row(row: _Row, quality: Sequence[str], *, has_cost: bool) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    add(summary, "consistency", row.pairs(_MAIN_PAIRS))
    add(summary, "features", row.pairs(_MAIN_PAIRS, "features"))
    for measure in quality:
        add(summary, measure, row.turns(measure))
    for measure, energy in _ENERGIES.items():
        add(summary, measure, row.sharpness(energy))
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
        later: described(bootstrap.mean(values)) for later, values in row.by_later().items()
    }
    branches = {name: bootstrap.mean(values(row)) for name, values in _BRANCHES.items()}
    summary["branches"] = {
        name: described(estimate) for name, estimate in branches.items() if estimate is not None
    }
    return summary


def _of(measure: str) -> Callable[[_Row], Values]:
    return methodcaller("turns", measure)


_three_turns = methodcaller("pairs", _MAIN_PAIRS)
_closure = methodcaller("pairs", _CLOSURE)
_replay = methodcaller("pairs", [pair_name("1", REPLAY)])
_return = methodcaller("pairs", [pair_name("1", RETURN)])
_detour = methodcaller("last_turns", DETOUR)
# where a few of eight videos are chosen
_choice = methodcaller("last_turns", "9", DETOUR)

_BRANCHES = {
    "loop closure": _closure,
    "replay": _replay,
    "open-domain return": _return,
    "detour": _detour,
    "choice": _choice,
}
_GAIN, _MERGED, _STATIC = (
    ("memory", "independent"),
    ("memory_merged", "memory"),
    ("static", "memory"),
)
_RETRIEVED, _ORACLE = ("retrieved_2", "random_2"), ("oracle_2", "random_2")
_RANKINGS = {
    "retrieved_2": "VideoFOV",
    "coverage_2": "coverage",
    "responsiveness_2": "responsiveness",
    "learned_2": "learned",
}
_WITHIN = 1.02  # the most that a row's mean may be, divided by that of memory
_TARGETS = (
    Target(name="PSNR where seen, dB", rows=("memory",), values=_of("source_psnr"), at_least=26),
    Target(name="camera error, px", rows=("memory",), values=_of("camera_error"), at_most=1.5),
    Target(
        name="gradient energy / truth through the VAE",
        rows=("memory",),
        values=_Row.sharpness,
        at_least=0.85,
        at_most=1.1,
    ),
    Target(name="memory / independent", rows=_GAIN, values=_three_turns, at_most=0.5),
    Target(name="memory / independent, loop closure", rows=_GAIN, values=_closure, at_most=0.35),
    Target(name="memory / independent, replay", rows=_GAIN, values=_replay),
    Target(
        name="memory / independent, open-domain return", rows=_GAIN, values=_return, at_most=0.35
    ),
    Target(name="memory / independent, camera", rows=_GAIN, values=_of("camera_error"), at_most=1),
    Target(name="merged / memory", rows=_MERGED, values=_three_turns, at_most=_WITHIN),
    Target(name="merged / memory, loop closure", rows=_MERGED, values=_closure, at_most=_WITHIN),
    Target(name="static / memory", rows=_STATIC, values=_three_turns, at_most=_WITHIN),
    Target(name="static / memory, loop closure", rows=_STATIC, values=_closure, at_most=_WITHIN),
    Target(name="retrieved / random", rows=_RETRIEVED, values=_choice, at_most=0.9),
    Target(name="retrieved / random, loop closure", rows=_RETRIEVED, values=_closure),
    Target(name="retrieved / random, detour", rows=_RETRIEVED, values=_detour),
    Target(name="oracle / random", rows=_ORACLE, values=_choice),
    Target(name="oracle / random, loop closure", rows=_ORACLE, values=_closure),
    Target(name="oracle / random, detour", rows=_ORACLE, values=_detour),
    *(
        Target(
            name=f"{label}, of the oracle's gain over random",
            rows=("random_2", row, "oracle_2"),
            values=_choice,
        )
        for row, label in _RANKINGS.items()
    ),
    *(
        target
        for row, label in _RANKINGS.items()
        if row != "retrieved_2"
        for target in (
            Target(name=f"{label} / VideoFOV", rows=(row, "retrieved_2"), values=_choice),
            Target(
                name=f"{label}, of the oracle's gain over VideoFOV",
                rows=("retrieved_2", row, "oracle_2"),
                values=_choice,
            ),
        )
    ),
)


def targets(scenes: Scenes, protocol: Protocol) -> dict[str, Any]:
    """What the method is judged by: value, interval, bound, whether it is met.

    A comparison is left out where its rows or turns were not measured.
    """
    rows = {row.name for row in protocol.chosen_rows}

    return compared(
        _TARGETS,
        lambda target, name: target.values(_Row(scenes, "rows", name)) if name in rows else None,
    )


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


_COLUMNS: Columns = (
    ("consistency ↓", "consistency", 4, True),
    ("1 - cosine ↓", "features", 4, False),
    ("PSNR where seen ↑", "source_psnr", 2, True),
    ("gradient energy → 1", "sharpness", 2, True),
    ("where seen", "source_sharpness", 2, False),
    ("where not", "unseen_sharpness", 2, False),
    ("ST-LPIPS ↓", "st_lpips", 3, True),
    ("camera error, px ↓", "camera_error", 2, True),
    ("flicker ↑", "flicker", 4, False),
    ("tokens", "tokens", 0, False),
    ("GFLOP a turn", "flops", 1, False),
    ("seconds a turn", "seconds", 2, False),
)


def markdown(results: dict[str, Any]) -> str:
    """The result as tables that a README or a model card can show."""
    settings = results["settings"]
    lines = [
        f"{results['scenes']} held-out {settings['grade']} worlds, {settings['turns']} turns each, "
        f"{steps_words(settings)}, checkpoint {results['engine']['checkpoint']} on "
        f"{results['engine']['device']}; 95 % bootstrap intervals over worlds.",
        *([] if settings["trained_for_memory"] else ["These weights never learned to remember."]),
        "",
    ]
    named = [(_LABELS[name], row) for name, row in results["rows"].items()]
    named += [(f"*{name}*", row) for name, row in results["references"].items()]
    columns = [column for column in _COLUMNS if column[1] in results["measures"]]
    lines += measures_table(columns, named)
    if "st_lpips" not in results["measures"]:
        lines += ["", "ST-LPIPS was not measured: it needs mv2v_engine[eval]."]
    branches = [name for name in _BRANCHES if any(name in row["branches"] for _, row in named)]
    if branches:
        rows = [
            (label, [_described(row["branches"].get(name)) for name in branches])
            for label, row in named
        ]
        lines += ["", "Consistency of the last turns, by branch:", "", *table(branches, rows)]
    lines += targets_table(results["targets"])
    saved = [f"{100 * by['4']:.1f} % ({plan})" for plan, by in results["merging_saves"].items()]
    lines += [
        "",
        f"Of a forward's FLOPs, merging saves with four memory videos: {', '.join(saved)}.",
    ]
    if results["responsiveness"]:
        rows = [
            (group, [f"{value['value']:.3f}" for value in values.values()])
            for group, values in results["responsiveness"].items()
        ]
        titles = ["Pearson", "Spearman", "bottom-50 % overlap"]
        lines += ["", *table(titles, rows, corner="blocks")]
    return "\n".join(lines) + "\n"


def _described(value: dict[str, Any] | None) -> str:
    if value is None:
        return "-"
    low, high = value["ci"]
    return f"{value['value']:.4f} ({low:.4f} to {high:.4f})"
