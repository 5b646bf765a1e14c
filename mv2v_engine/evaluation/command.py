"""The command `run evaluate`: which task, how much of it, in how many processes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from mv2v_engine.config import FAST, TransformerConfig
from mv2v_engine.engine.engine import Engine
from mv2v_engine.errors import RequestError
from mv2v_engine.evaluation.edit_protocol import QUICK_EDITS, EditProtocol
from mv2v_engine.evaluation.edit_report import edits_markdown
from mv2v_engine.evaluation.evaluate import VIEWS, evaluate
from mv2v_engine.evaluation.evaluate_edits import EDITS, evaluate_edits
from mv2v_engine.evaluation.figures import require_matplotlib
from mv2v_engine.evaluation.folder import EvaluationFolder
from mv2v_engine.evaluation.parallel import Processes, default_jobs
from mv2v_engine.evaluation.protocol import QUICK, Protocol
from mv2v_engine.evaluation.report import markdown
from mv2v_engine.files import require_writable

AnyProtocol = TypeVar("AnyProtocol", Protocol, EditProtocol)
_VIEWS_ALONE, _EDITS_ALONE = ("turns",), ("windows", "dino", "clip")


def task_of(shape: TransformerConfig, asked: str | None, name: str) -> str:
    """ "edit" or "novel-view".

    Raises:
        RequestError: the checkpoint does the other one.
    """
    found = "edit" if shape.is_editor else "novel-view"
    if asked not in (None, found):
        raise RequestError(
            f"{name} is a checkpoint for the task {found}, asked was {asked}; leave --task out, or "
            "give another --checkpoint"
        )
    return found


def evaluate_checkpoint(args: argparse.Namespace, task: str, load: Callable[[], Engine]) -> None:
    """Measure and print what was written. args: as `run evaluate --help` says.

    Raises:
        RequestError: an option of the other task.
    """
    require_matplotlib()
    # one of the two, by the checkpoint's task
    steps = args.steps
    if steps is None and args.fast is not None:
        steps = FAST[args.fast]["num_inference_steps"]
    common = {"steps": steps, "rows": args.rows and tuple(args.rows.split(","))}
    if task == "edit":
        _refuse(args, _VIEWS_ALONE, task)
        of_clips = {name: getattr(args, name) for name in _EDITS_ALONE}
        edits = _chosen(
            QUICK_EDITS if args.quick else EditProtocol(),
            clips=args.scenes,
            grade=args.grade,
            **of_clips,
            **common,
        )
        results, folder = _run(args, load, EDITS, evaluate_edits, edits)
        table = edits_markdown(results)
    else:
        _refuse(args, _EDITS_ALONE, task)
        of_worlds = {"scenes": args.scenes, "turns": args.turns, "grade": args.grade}
        views = _chosen(QUICK if args.quick else Protocol(), **of_worlds, **common)
        results, folder = _run(args, load, VIEWS, evaluate, views)
        table = markdown(results)
    if not args.quiet:
        print("\n" + table)
    pictures = [path for path in folder.pictures if path.exists()]
    print(folder.results, folder.table, *pictures, sep="\n")


def _refuse(args: argparse.Namespace, names: tuple[str, ...], task: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise RequestError(f"--{name} is for the other task, this checkpoint's is {task}")


def _chosen(protocol: AnyProtocol, **options: Any) -> AnyProtocol:
    """The protocol with what was asked for."""
    return replace(protocol, **{k: value for k, value in options.items() if value is not None})


def _run(
    args: argparse.Namespace,
    load: Callable[[], Engine],
    kind: Any,
    measure: Callable[..., dict[str, Any]],
    protocol: Protocol | EditProtocol,
) -> tuple[dict[str, Any], EvaluationFolder]:
    require_writable(args.out)
    folder = EvaluationFolder(args.out, kind)
    if not args.resume and not args.overwrite:
        folder.check_free()
    jobs = default_jobs(args.device) if args.jobs is None else args.jobs
    processes = Processes(jobs=jobs, load=load)
    engine = load()
    if args.overwrite:
        folder.clear()
    results = measure(engine, protocol, folder, processes=processes, is_quiet=args.quiet)
    return results, folder
