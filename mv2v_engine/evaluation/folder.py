"""An evaluation's folder, whatever it measures: items one by one, resumable, and their sum.

Every file is whole or absent.
"""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from mv2v_engine.checkpoints.resolve import is_trained_for_memory
from mv2v_engine.engine.engine import Engine
from mv2v_engine.errors import StorageError
from mv2v_engine.evaluation.edit_protocol import EditProtocol
from mv2v_engine.evaluation.parallel import Measures, Processes, measure_all
from mv2v_engine.evaluation.protocol import Protocol
from mv2v_engine.files import replacing, save_json
from mv2v_engine.vae import weights_fingerprint

AnyProtocol: TypeAlias = Protocol | EditProtocol


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationKind:
    """What tells one task's evaluations from another's.

    format, version: of its files. item: what is measured one by one, as a word; a protocol has a
    field of their number. protocol, quick: what is measured if nothing else is asked for.
    pictures: all that may lie in the folder, by name. evaluator: of an engine and a protocol, whose
    `measure(seed)` gives a result with `measures`. draw: a result into a file. sum_up: an engine,
    all items' measures and the protocol to what `results.json` says of them. table: of these. plot:
    them, into the folder. agreed: what a resumed evaluation must agree on beside the protocol and
    the weights.
    """

    format: str
    version: int
    item: str
    protocol: AnyProtocol
    quick: AnyProtocol
    pictures: tuple[str, ...]
    evaluator: Callable[[Engine, Any], Any]
    draw: Callable[[Path, Any], None]
    sum_up: Callable[[Engine, list[Measures], Any], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    plot: Callable[[Path, dict[str, Any]], None]
    agreed: Callable[[], dict[str, Any]] = dict


class EvaluationFolder:
    """Where one evaluation is written.

    results.json  table.md  and the kind's pictures
    scenes/scene_2000000.json ...   one file a finished item, what an evaluation resumes from
    """

    def __init__(self, folder: Path, kind: EvaluationKind) -> None:
        self.folder, self.kind, self.items = folder, kind, folder / f"{kind.item}s"
        self.results, self.table = folder / "results.json", folder / "table.md"
        self.pictures = [folder / name for name in kind.pictures]

    def check_free(self) -> None:
        """Refuse a folder that already holds an evaluation.

        Raises:
            StorageError: it does.
        """
        found = len(self._item_files())
        if found or self.results.exists():
            raise StorageError(
                f"{self.folder} already holds an evaluation of {found} {self.kind.item}s; "
                "continue it with --resume, replace it with --overwrite, or choose another folder"
            )

    def clear(self) -> None:
        """Remove an evaluation's files, and nothing else that lies there.

        Raises:
            StorageError: a file cannot be removed.
        """
        try:
            for path in [*self._item_files(), self.results, self.table, *self.pictures]:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot remove an earlier evaluation: {error}; choose another folder"
            ) from error

    def finished(self, seed: int, settings: dict[str, Any]) -> dict[str, Any] | None:
        """An item's measures if they are there.

        Raises:
            StorageError: the file is damaged, or of an evaluation with other settings.
        """
        path = self._item_path(seed)
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            kind, theirs, measures = stored["format"], stored["settings"], dict(stored["measures"])
            seconds = float(stored["seconds"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{path} cannot be read ({error!r}); remove it and --resume, or --overwrite"
            ) from error
        if (kind, stored.get("version")) != (self.kind.format, self.kind.version):
            raise StorageError(f"{path} is of another format or version; use --overwrite")
        for name, value in settings.items():
            if theirs.get(name) != value:
                raise StorageError(
                    f"{self.folder} holds an evaluation whose {name} is {theirs.get(name)!r}, this "
                    f"one's is {value!r}; ask for the same, or choose another folder"
                )
        return {**measures, "seconds": seconds}

    def save(
        self, seed: int, settings: dict[str, Any], measures: Measures, seconds: float
    ) -> Measures:
        """Write an item's file; what it holds of the item."""
        kind = {"format": self.kind.format, "version": self.kind.version}
        timed = {"seconds": round(seconds, 3)}
        content = {**kind, "settings": settings, **timed, "measures": measures}
        save_json(self._item_path(seed), content)
        return measures | timed

    def publish(self, results: dict[str, Any]) -> None:
        """Write the results, and show them in a table and in pictures."""
        save_json(self.results, results)
        with replacing(self.table) as temporary:
            temporary.write_text(self.kind.table(results), encoding="utf-8")
        self.kind.plot(self.folder, results)

    def _item_path(self, seed: int) -> Path:
        return self.items / f"{self.kind.item}_{seed:07d}.json"

    def _item_files(self) -> list[Path]:
        return sorted(self.items.glob(f"{self.kind.item}_*.json"))


@dataclass
class Job:
    """Measure an item and write its file, and its picture if the protocol has one drawn."""

    protocol: AnyProtocol
    folder: EvaluationFolder
    settings: dict[str, Any]
    # each process has its own: engines and networks that measure are made once
    _evaluator: Any = field(default=None, init=False)

    def __call__(self, engine: Engine, seed: int) -> Measures:
        kind = self.folder.kind
        self._evaluator = self._evaluator or kind.evaluator(engine, self.protocol)
        began = time.monotonic()
        result = self._evaluator.measure(seed)
        if seed in self.protocol.drawn:
            kind.draw(self.folder.folder / self.protocol.drawn[seed], result)
        return self.folder.save(seed, self.settings, result.measures, time.monotonic() - began)


def evaluate(
    engine: Engine,
    folder: EvaluationFolder,
    protocol: AnyProtocol,
    *,
    processes: Processes,
    is_quiet: bool,
) -> None:
    """Measure the items of a protocol that the folder lacks, or whose picture it lacks; sum up.

    processes: measure in several at once, with engines like this one.

    Raises:
        StorageError: the folder holds something else, or cannot be written.
        MemoryBudgetError: one of the processes was killed.
    """
    kind, seeds = folder.kind, protocol.seeds
    settings = _settings(engine, protocol, f"{kind.item}s") | kind.agreed()
    stored = {seed: folder.finished(seed, settings) for seed in seeds}
    for seed, picture in protocol.drawn.items():
        if not (folder.folder / picture).exists():
            stored[seed] = None
    missing = [seed for seed, measures in stored.items() if measures is None]
    began, job = time.monotonic(), Job(protocol, folder, settings)
    bar = tqdm(total=len(seeds), unit=kind.item, disable=is_quiet)
    bar.update(len(seeds) - len(missing))
    with contextlib.closing(measure_all(engine, missing, job, processes)) as measured:
        for seed, measures in zip(missing, measured, strict=True):
            stored[seed] = measures
            bar.update()
    bar.close()
    took = time.monotonic() - began
    items = [measures for measures in stored.values() if measures is not None]
    results = {
        "format": kind.format,
        "version": kind.version,
        **kind.sum_up(engine, items, protocol),
        "settings": settings,
        "engine": engine.describe(),
        "machine": {
            "cpu": platform.machine(),
            "threads": torch.get_num_threads(),
            "processes": processes.jobs,
        },
        "seconds": round(sum(measures["seconds"] for measures in items), 1),
        # this run alone, whose processes measured side by side what earlier ones had left
        "this_run": {
            f"{kind.item}s": len(missing),
            "seconds": round(took, 1),
        },
    }
    folder.publish(results)


def _settings(engine: Engine, protocol: AnyProtocol, count: str) -> dict[str, Any]:
    """What every resumed evaluation must agree on; the number of items may grow.

    count: the protocol's field of that number.
    """
    config, sampling = engine.config, engine.sampling
    return {
        **{name: value for name, value in asdict(protocol).items() if name != count},
        "steps": protocol.steps or sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "scheduler": engine.scheduler,
        **({} if engine.timesteps == "exact" else {"timesteps": engine.timesteps}),
        "merge_fraction": config.merge_fraction,
        "checkpoint": engine.checkpoint.name,
        "weights": weights_fingerprint(engine.transformer.state_dict()),
        "vae": engine.vae.key,
        "device": str(engine.device),
        "dtype": engine.describe()["dtype"],
        # on other weights the memory rows show what an untrained memory does
        "trained_for_memory": is_trained_for_memory(
            engine.checkpoint.config, engine.checkpoint.report.initialised
        ),
        "rows": [row.name for row in protocol.chosen_rows],
    }
