"""From clips to a result: means with bootstrap intervals, by kind, targets, Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
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
    number,
    rounded,
    steps_words,
    table,
    targets_table,
)
from mv2v_engine.evaluation.edit_protocol import EDIT_ROWS, EditProtocol
from mv2v_engine.evaluation.editing_measures import MEASURES
from mv2v_engine.synthetic.instructions import KINDS

Clips = Sequence[dict[str, Any]]

_LABELS = {row.name: row.label for row in EDIT_ROWS} | {
    "source": "*the source itself*",
    "truth": "*the true edit*",
    "vae": "*the true edit through the VAE*",
}
_FEATURES = {
    "dino_f": "frame consistency by DINOv2, 1 is best",
    "clip_f": "the same by CLIP",
}
_COST = {
    "flops": "of all forwards of a clip, counted from token plans; mean over clips",
    "seconds": "of denoising a clip, without VAE and retrieval; median of clips",
}
_COLUMNS: Columns = (
    ("subject error ↓", "subject_error", 4, True),
    ("background error ↓", "background_error", 4, True),
    ("agreement ↑", "agreement", 3, True),
    ("background PSNR ↑", "background_psnr", 2, True),
    ("PSNR ↑", "psnr", 2, False),
    ("flicker ↑", "flicker", 4, False),
    ("seam ratio", "seam_ratio", 3, True),
    *((name.upper(), name, 4, False) for name in _FEATURES),
    ("GFLOP a clip", "flops", 1, False),
    ("seconds a clip", "seconds", 1, False),
)
_BY_KIND = ("subject_error", "background_error", "agreement", "background_psnr")

_FOLLOWS_FROM = 0.5  # agreement


def _of(measure: str) -> Any:
    return lambda clips: [clip[measure] for clip in clips]


def _followed(clips: Clips) -> Values:
    """Subject error of clips that mostly show what was asked: no edit agrees with itself too."""
    return [
        clip["subject_error"] if (clip["agreement"] or 0) >= _FOLLOWS_FROM else None
        for clip in clips
    ]


_MEMORY = ("memory",)
_TARGETS = (
    Target(name="agreement", rows=_MEMORY, values=_of("agreement"), at_least=0.95),
    Target(name="background PSNR, dB", rows=_MEMORY, values=_of("background_psnr"), at_least=30),
    Target(
        name="gradient energy, memory / truth through the VAE",
        rows=("memory", "vae"),
        values=_of("energy"),
    ),
    Target(
        name="subject error, memory / independent",
        rows=("memory", "independent"),
        values=_of("subject_error"),
        at_most=0.5,
    ),
    *(
        Target(
            name=f"subject error, memory / {words}, where both follow the words",
            rows=("memory", other),
            values=_followed,
            at_most=1,
            for_interval=True,
        )
        for other, words in (("one_noise", "one noise"), ("fifo", "FIFO"))
    ),
    # the true edit's own changes at seams are no fault of an editor's
    Target(
        name="seam ratio, memory / truth",
        rows=("memory", "truth"),
        values=_of("seam_ratio"),
        at_most=1.2,
    ),
)


def summarise_edits(clips: Clips, protocol: EditProtocol) -> dict[str, Any]:
    """Everything that follows from the clips' measures (see `measures` in it for units)."""
    measured = clips[0]["references"]["truth"]
    features = {name: words for name, words in _FEATURES.items() if name in measured}
    measures = MEASURES | features
    columns: dict[str, list[dict[str, Any]]] = {
        name: [clip["references"][name] for clip in clips] for name in clips[0]["references"]
    }
    columns |= {
        row.name: [clip["rows"][row.name] for clip in clips] for row in protocol.chosen_rows
    }
    kinds = [clip["kind"] for clip in clips]
    lengths = [clip["windows"] for clip in clips]
    rows = {name: _row(values, measures, kinds, lengths) for name, values in columns.items()}
    references = {name: rows.pop(name) for name in clips[0]["references"]}
    return {
        "clips": len(clips),
        "clips_by_kind": {kind: kinds.count(kind) for kind in KINDS if kind in kinds},
        "clips_by_windows": {str(n): lengths.count(n) for n in sorted(set(lengths))},
        "rows": rows,
        "references": references,
        "targets": compared(
            _TARGETS, lambda target, name: target.values(columns[name]) if name in columns else None
        ),
        "measures": measures | _COST,
    }


def _row(
    values: list[dict[str, Any]],
    measures: dict[str, str],
    kinds: Sequence[str],
    lengths: Sequence[int],
) -> dict[str, Any]:
    """One method's summary. values: its measures, one a clip."""
    summary: dict[str, Any] = {}
    for name in measures:
        add(summary, name, _of(name)(values))
    if "flops" in values[0]:
        summary["flops"] = rounded(sum(row["flops"] for row in values) / len(values))
        # the median, since the first clip also pays for warming up
        summary["seconds"] = rounded(median(row["seconds"] for row in values))
    summary["by_kind"] = {
        kind: _some(values, [own == kind for own in kinds]) for kind in KINDS if kind in kinds
    }
    summary["by_windows"] = {
        str(length): _some(values, [own == length for own in lengths])
        for length in sorted(set(lengths))
    }
    return summary


def _some(values: list[dict[str, Any]], chosen: list[bool]) -> dict[str, Any]:
    some = [row for row, counts in zip(values, chosen, strict=True) if counts]
    return {name: described(bootstrap.mean(_of(name)(some))) for name in _BY_KIND}


def edits_markdown(results: dict[str, Any]) -> str:
    """The result as tables that a README or a model card can show."""
    settings = results["settings"]
    lengths = [f"{count} of {n} windows" for n, count in results["clips_by_windows"].items()]
    lines = [
        f"{results['clips']} held-out clips ({', '.join(lengths)}), {steps_words(settings)}, "
        f"checkpoint {results['engine']['checkpoint']} on {results['engine']['device']}; "
        "95 % bootstrap intervals over clips.",
        *([] if settings["trained_for_memory"] else ["These weights never learned to remember."]),
        "",
    ]
    rows = {_LABELS[name]: row for name, row in (results["rows"] | results["references"]).items()}
    columns = [column for column in _COLUMNS if column[1] in results["measures"]]
    lines += measures_table(columns, list(rows.items()))
    lines += targets_table(results["targets"])
    kinds = list(results["clips_by_kind"])
    by_kind = [
        (label, [_kind_cell(row["by_kind"][kind]) for kind in kinds]) for label, row in rows.items()
    ]
    lines += ["", "Subject error and, in brackets, agreement by kind of instruction:", ""]
    return "\n".join([*lines, *table(kinds, by_kind)]) + "\n"


def _kind_cell(values: dict[str, Any]) -> str:
    subject, agreement = values["subject_error"]["value"], values["agreement"]["value"]
    return f"{number(subject, 4)} ({number(agreement, 2)})"
