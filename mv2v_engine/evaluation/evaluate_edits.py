"""Long edits measured on worlds of known geometry, clip by clip, into a folder.

results.json  table.md  windows_colour.png ... (a clip of every kind)  measures.png
clips/clip_3000000.json ...       one file a finished clip, what an evaluation resumes from
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from mv2v_engine.engine.engine import Engine
from mv2v_engine.engine.request import require_task
from mv2v_engine.evaluation.edit_clip import ClipEvaluator
from mv2v_engine.evaluation.edit_figures import BARS, save_bars, save_windows
from mv2v_engine.evaluation.edit_protocol import EditProtocol, picture_of
from mv2v_engine.evaluation.edit_report import edits_markdown, summarise_edits
from mv2v_engine.evaluation.figures import require_matplotlib
from mv2v_engine.evaluation.folder import (
    EvaluationFolder,
    EvaluationKind,
    assembled,
    measure_missing,
    weights_settings,
)
from mv2v_engine.evaluation.parallel import Measures, Processes
from mv2v_engine.synthetic.instructions import KINDS

EDITS = EvaluationKind(
    format="mv2v-edit-evaluation",
    version=1,
    item="clip",
    pictures=(*(picture_of(kind) for kind in KINDS), BARS),
)


@dataclass
class ClipJob:
    """Measure a clip and write its file, and a picture if it is the first of its kind."""

    protocol: EditProtocol
    folder: EvaluationFolder
    settings: dict[str, Any]
    # each process has its own: networks that measure are loaded once
    _evaluator: ClipEvaluator | None = field(default=None, init=False)

    def __call__(self, engine: Engine, seed: int) -> Measures:
        if self._evaluator is None:
            self._evaluator = ClipEvaluator(engine, self.protocol)
        evaluator = self._evaluator

        def measure() -> Measures:
            result = evaluator.measure(seed)
            picture = self.protocol.drawn.get(seed)
            if picture is not None:
                save_windows(self.folder.folder / picture, result)
            return result.measures

        return self.folder.measured(seed, self.settings, measure)


def evaluate_edits(
    engine: Engine,
    protocol: EditProtocol,
    folder: EvaluationFolder,
    *,
    processes: Processes | None = None,
    is_quiet: bool = False,
) -> dict[str, Any]:
    """Measure what is missing of a protocol's clips, and write the result.

    Args:
        processes: measure in several at once, with engines like this one.

    Returns:
        what `results.json` holds.

    Raises:
        RequestError: a model of novel views.
        StorageError: the folder holds something else, or cannot be written.
        MemoryBudgetError: one of the processes was killed.
    """
    require_task(engine.transformer.config, engine.checkpoint.name, edits=True)
    require_matplotlib()
    settings = _settings(engine, protocol)
    measured = measure_missing(
        engine,
        folder,
        protocol.seeds,
        settings,
        ClipJob(protocol, folder, settings),
        drawn=protocol.drawn,
        processes=processes,
        is_quiet=is_quiet,
    )
    results = assembled(
        engine, folder, settings, measured, processes, **summarise_edits(measured.items, protocol)
    )
    folder.publish(results, edits_markdown(results))
    save_bars(folder.folder / BARS, results)
    return results


def _settings(engine: Engine, protocol: EditProtocol) -> dict[str, Any]:
    """What a resumed evaluation must agree on; the number of clips may grow."""
    settings = asdict(protocol)
    del settings["clips"]
    rows = [row.name for row in protocol.chosen_rows]
    return {**settings, **weights_settings(engine, protocol.steps), "rows": rows}
