"""An evaluation's folder, whatever it measures: items one by one, resumable, and their sum.

Every file is whole or absent.
"""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mv2v_engine.engine.engine import Engine
from mv2v_engine.engine.parts import default_memory
from mv2v_engine.errors import StorageError
from mv2v_engine.evaluation.parallel import MeasureFn, Measures, Processes, measure_all
from mv2v_engine.files import replacing, save_json
from mv2v_engine.vae import weights_fingerprint


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationKind:
    """What tells one task's evaluations from another's.

    format, version: of its files. item: what is measured one by one, as a word. pictures: all that
    may lie in the folder, by name.
    """

    format: str
    version: int
    item: str
    pictures: tuple[str, ...]


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

    def measured(
        self, seed: int, settings: dict[str, Any], measure: Callable[[], Measures]
    ) -> Measures:
        """Measure an item and write its file."""
        began = time.monotonic()
        measures = measure()
        seconds = round(time.monotonic() - began, 3)
        kind = {"format": self.kind.format, "version": self.kind.version}
        content = {**kind, "settings": settings, "seconds": seconds, "measures": measures}
        save_json(self._item_path(seed), content)
        return {**measures, "seconds": seconds}

    def publish(self, results: dict[str, Any], table: str) -> None:
        """Write the results and the table."""
        save_json(self.results, results)
        with replacing(self.table) as temporary:
            temporary.write_text(table, encoding="utf-8")

    def _item_path(self, seed: int) -> Path:
        return self.items / f"{self.kind.item}_{seed:07d}.json"

    def _item_files(self) -> list[Path]:
        return sorted(self.items.glob(f"{self.kind.item}_*.json"))


@dataclass(frozen=True)
class Measured:
    """Every item's measures, in order; of this run alone, how many were missing and its seconds."""

    items: list[Measures]
    missing: int
    seconds: float


def measure_missing(
    engine: Engine,
    folder: EvaluationFolder,
    seeds: Sequence[int],
    settings: dict[str, Any],
    job: MeasureFn,
    *,
    drawn: Mapping[int, str],
    processes: Processes | None,
    is_quiet: bool,
) -> Measured:
    """Measure the items that the folder lacks.

    Args:
        job: measures an item through `EvaluationFolder.measured`.
        drawn: pictures that measuring an item draws; one that is not there is measured again.

    Raises:
        StorageError: the folder holds something else, or cannot be written.
        MemoryBudgetError: one of the processes was killed.
    """
    stored = {seed: folder.finished(seed, settings) for seed in seeds}
    for seed, picture in drawn.items():
        if not (folder.folder / picture).exists():
            stored[seed] = None
    missing = [seed for seed, measures in stored.items() if measures is None]
    began = time.monotonic()
    bar = tqdm(total=len(seeds), unit=folder.kind.item, disable=is_quiet)
    bar.update(len(seeds) - len(missing))
    with contextlib.closing(measure_all(engine, missing, job, processes)) as results:
        for seed, measures in zip(missing, results, strict=True):
            stored[seed] = measures
            bar.update()
    bar.close()
    items = [measures for measures in stored.values() if measures is not None]
    return Measured(items, len(missing), round(time.monotonic() - began, 1))


def weights_settings(engine: Engine, steps: int | None) -> dict[str, Any]:
    """What every resumed evaluation must agree on, whatever it measures."""
    config, sampling = engine.config, engine.sampling
    return {
        "steps": steps or sampling.num_inference_steps,
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
        "trained_for_memory": default_memory(engine.checkpoint.report.initialised) != "none",
    }


def assembled(
    engine: Engine,
    folder: EvaluationFolder,
    settings: dict[str, Any],
    measured: Measured,
    processes: Processes | None,
    **content: Any,
) -> dict[str, Any]:
    """What `results.json` holds: the task's content, and what was measured how."""
    item = f"{folder.kind.item}s"
    return {
        "format": folder.kind.format,
        "version": folder.kind.version,
        **content,
        "settings": settings,
        "engine": engine.describe(),
        "machine": {
            "cpu": platform.machine(),
            "threads": torch.get_num_threads(),
            "processes": processes.jobs if processes is not None else 1,
        },
        "seconds": round(sum(measures["seconds"] for measures in measured.items), 1),
        # this run alone, whose processes measured side by side what earlier ones had left
        "this_run": {item: measured.missing, "seconds": measured.seconds},
    }
