"""Long edits measured on worlds of known geometry, clip by clip, into a folder.

results.json  table.md  windows_colour.png ... (a clip of every kind)  measures.png
clips/clip_3000000.json ...       one file a finished clip, what an evaluation resumes from
"""

from __future__ import annotations

from typing import Any

from mv2v_engine.engine.engine import Engine
from mv2v_engine.engine.request import require_task
from mv2v_engine.evaluation.edit_clip import ClipEvaluator
from mv2v_engine.evaluation.edit_figures import BARS, save_bars, save_windows
from mv2v_engine.evaluation.edit_protocol import EditProtocol, picture_of
from mv2v_engine.evaluation.edit_report import edits_markdown, summarise_edits
from mv2v_engine.evaluation.figures import require_matplotlib
from mv2v_engine.evaluation.folder import EvaluationFolder, EvaluationKind, measure_missing
from mv2v_engine.evaluation.parallel import Processes
from mv2v_engine.synthetic.instructions import KINDS

EDITS = EvaluationKind(
    format="mv2v-edit-evaluation",
    version=1,
    item="clip",
    pictures=(*(picture_of(kind) for kind in KINDS), BARS),
    evaluator=ClipEvaluator,
    draw=save_windows,
)


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
    measured = measure_missing(engine, folder, protocol, processes=processes, is_quiet=is_quiet)
    results = measured.results(**summarise_edits(measured.items, protocol))
    folder.publish(results, edits_markdown(results))
    save_bars(folder.folder / BARS, results)
    return results
