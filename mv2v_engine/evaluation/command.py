"""The command `run evaluate`: which task, how much of it, in how many processes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

from mv2v_engine.config import FAST, SamplingConfig, TransformerConfig
from mv2v_engine.engine.engine import Engine
from mv2v_engine.errors import CheckpointError, RequestError
from mv2v_engine.evaluation.figures import require_matplotlib
from mv2v_engine.evaluation.folder import EvaluationFolder, evaluate
from mv2v_engine.evaluation.kinds import EDITS, VIEWS
from mv2v_engine.evaluation.parallel import Processes, default_jobs
from mv2v_engine.files import require_writable

# options
_OF_ONE_TASK = {"turns": "novel-view", "windows": "edit", "dino": "edit", "clip": "edit"}


def task_of(shape: TransformerConfig, asked: str | None, name: str) -> str:
    """ "edit" or "novel-view".

    Raises:
        RequestError: the checkpoint does the other one.
        CheckpointError: a model without cameras has no views to evaluate.
    """
    found = "edit" if shape.is_editor else "novel-view"
    if asked not in (None, found):
        raise RequestError(
            f"{name} is a checkpoint for the task {found}, asked was {asked}; leave --task out, or "
            "give another --checkpoint"
        )
    if not (shape.is_editor or shape.has_camera):
        raise CheckpointError(
            f"{name} takes no camera; this evaluates novel views of several turns"
        )
    return found


def evaluate_checkpoint(
    args: argparse.Namespace, task: str, sampling: SamplingConfig, load: Callable[[], Engine]
) -> None:
    """Measure and print what was written.

    args: as `run evaluate --help` says. sampling: the checkpoint's under them.

    Raises:
        RequestError: an option of the other task, or steps that the scheduler cannot take.
    """
    require_matplotlib()
    kind = EDITS if task == "edit" else VIEWS
    steps = args.steps
    if steps is None and args.fast is not None:
        steps = FAST[args.fast]["num_inference_steps"]
    options = {"steps": steps, "rows": args.rows and tuple(args.rows.split(","))}
    options |= {"grade": args.grade, f"{kind.item}s": args.scenes}
    for name, its_task in _OF_ONE_TASK.items():
        value = getattr(args, name)
        if its_task == task:
            options[name] = value
        elif value is not None:
            raise RequestError(f"--{name} is for the other task, this checkpoint's is {task}")
    asked = {name: value for name, value in options.items() if value is not None}
    protocol = replace(kind.quick if args.quick else kind.protocol, **asked)
    taken = sampling.num_inference_steps if protocol.steps is None else protocol.steps
    sampling.check_few_steps(taken, sampling.guidance_scale)
    require_writable(args.out)
    folder = EvaluationFolder(args.out, kind)
    if not args.resume and not args.overwrite:
        folder.check_free()
    jobs = default_jobs(args.device) if args.jobs is None else args.jobs
    processes, engine = Processes(jobs=jobs, load=load), load()
    if args.overwrite:
        folder.clear()
    evaluate(engine, folder, protocol, processes=processes, is_quiet=args.quiet)
    if not args.quiet:
        print("\n" + folder.table.read_text(encoding="utf-8"))
    pictures = [path for path in folder.pictures if path.exists()]
    print(folder.results, folder.table, *pictures, sep="\n")
