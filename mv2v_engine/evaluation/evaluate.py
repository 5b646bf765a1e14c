"""An evaluation's folder: scenes measured one by one, resumable, and what they add up to.

    results.json  table.md  side_by_side.png  consistency.png  cost.png
    scenes/scene_2000000.json ...     one file a finished scene, what an evaluation resumes from

Every file is whole or absent.
"""

from __future__ import annotations

import contextlib
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from mv2v_engine.config import WAN_1_3B
from mv2v_engine.engine.engine import Engine, default_memory
from mv2v_engine.errors import CheckpointError, StorageError
from mv2v_engine.evaluation import figures
from mv2v_engine.evaluation.cost import forward_costs
from mv2v_engine.evaluation.parallel import Processes, measure_all
from mv2v_engine.evaluation.protocol import Protocol
from mv2v_engine.evaluation.report import markdown, summarise
from mv2v_engine.evaluation.scene import SceneEvaluator
from mv2v_engine.files import replacing, save_json
from mv2v_engine.vae import weights_fingerprint

FORMAT, VERSION = "mv2v-evaluation", 1
_MEMORY_COUNTS = range(0, 11)


class EvaluationFolder:
    """Where one evaluation is written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.scenes = folder, folder / "scenes"
        self.results, self.table = folder / "results.json", folder / "table.md"
        self.pictures = [
            folder / name for name in (figures.SIDE_BY_SIDE, figures.CONSISTENCY, figures.COST)
        ]

    def check_free(self) -> None:
        """Refuse a folder that already holds an evaluation.

        Raises:
            StorageError: it does.
        """
        found = len(self._scene_files())
        if found or self.results.exists():
            raise StorageError(
                f"{self.folder} already holds an evaluation of {found} scenes; continue it with "
                "--resume, replace it with --overwrite, or choose another folder"
            )

    def clear(self) -> None:
        """Remove an evaluation's files, and nothing else that lies there.

        Raises:
            StorageError: a file cannot be removed.
        """
        try:
            for path in [*self._scene_files(), self.results, self.table, *self.pictures]:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot remove an earlier evaluation: {error}; choose another folder"
            ) from error

    def finished(self, seed: int, settings: dict[str, Any]) -> dict[str, Any] | None:
        """A scene's measures if they are there.

        Raises:
            StorageError: the file is damaged, or of an evaluation with other settings.
        """
        path = self._scene_path(seed)
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
        if kind != FORMAT or stored.get("version") != VERSION:
            raise StorageError(f"{path} is of another format or version; use --overwrite")
        for name, value in settings.items():
            if theirs.get(name) != value:
                raise StorageError(
                    f"{self.folder} holds an evaluation whose {name} is {theirs.get(name)!r}, this "
                    f"one's is {value!r}; ask for the same, or choose another folder"
                )
        return {**measures, "seconds": seconds}

    def keep(
        self, seed: int, settings: dict[str, Any], measures: dict[str, Any], seconds: float
    ) -> None:
        """Write a finished scene."""
        content = {"format": FORMAT, "version": VERSION, "settings": settings, "seconds": seconds}
        save_json(self._scene_path(seed), {**content, "measures": measures})

    def publish(self, results: dict[str, Any]) -> list[Path]:
        """Write the results, the table and the figures; returns every file to open."""
        save_json(self.results, results)
        with replacing(self.table) as temporary:
            temporary.write_text(markdown(results), encoding="utf-8")
        figures.save_consistency(self.folder / figures.CONSISTENCY, results)
        figures.save_cost(self.folder / figures.COST, results)
        return [self.results, self.table, *self.pictures]

    def _scene_path(self, seed: int) -> Path:
        return self.scenes / f"scene_{seed:07d}.json"

    def _scene_files(self) -> list[Path]:
        return sorted(self.scenes.glob("scene_*.json"))


@dataclass(frozen=True)
class SceneJob:
    """Measure a scene and write its file, and the picture if it is the protocol's first."""

    protocol: Protocol
    folder: EvaluationFolder
    settings: dict[str, Any]

    def __call__(self, engine: Engine, seed: int) -> dict[str, Any]:
        began = time.monotonic()
        scene = SceneEvaluator(engine, self.protocol).measure(seed)
        seconds = round(time.monotonic() - began, 3)
        if seed == self.protocol.first_scene:
            figures.save_side_by_side(self.folder.folder / figures.SIDE_BY_SIDE, scene)
        self.folder.keep(seed, self.settings, scene.measures, seconds)
        return {**scene.measures, "seconds": seconds}


def evaluate(
    engine: Engine,
    protocol: Protocol,
    folder: EvaluationFolder,
    *,
    processes: Processes | None = None,
    is_quiet: bool = False,
) -> dict[str, Any]:
    """Measure what is missing of a protocol's scenes, and write the result.

    Args:
        processes: measure in several at once, with engines like this one.

    Returns:
        what `results.json` holds.

    Raises:
        CheckpointError: a model without cameras has no views to evaluate.
        StorageError: the folder holds something else, or cannot be written.
        MemoryBudgetError: one of the processes was killed.
    """
    shape = engine.transformer.config
    if not shape.has_camera:
        raise CheckpointError(
            f"{engine.checkpoint.name} takes no camera; this evaluates novel views of several turns"
        )
    figures.require_matplotlib()
    settings = _settings(engine, protocol)
    stored = {seed: folder.finished(seed, settings) for seed in protocol.seeds}
    if not (folder.folder / figures.SIDE_BY_SIDE).exists():
        stored[protocol.first_scene] = None
    missing = [seed for seed, measures in stored.items() if measures is None]
    job = SceneJob(protocol, folder, settings)
    began = time.monotonic()
    bar = tqdm(total=protocol.scenes, unit="scene", disable=is_quiet)
    bar.update(protocol.scenes - len(missing))
    with contextlib.closing(measure_all(engine, missing, job, processes)) as measured:
        for seed, measures in zip(missing, measured, strict=True):
            stored[seed] = measures
            bar.update()
    bar.close()
    scenes = [measures for measures in stored.values() if measures is not None]
    costs = _costs(engine)
    results = {
        "format": FORMAT,
        "version": VERSION,
        **summarise(scenes, protocol),
        "cost": costs,
        "merging_saves": {plan: _merging_saves(rows) for plan, rows in costs.items()},
        "seconds_by_memory": _seconds_by_memory(scenes),
        "settings": settings,
        "engine": engine.describe(),
        "machine": {
            "cpu": platform.machine(),
            "threads": torch.get_num_threads(),
            "processes": processes.jobs if processes is not None else 1,
        },
        "seconds": round(sum(scene["seconds"] for scene in scenes), 1),
        # of this run alone, whose processes measured side by side what earlier ones had left
        "this_run": {"scenes": len(missing), "seconds": round(time.monotonic() - began, 1)},
    }
    folder.publish(results)
    return results


def _settings(engine: Engine, protocol: Protocol) -> dict[str, Any]:
    """What a resumed evaluation must agree on; the number of scenes may grow."""
    settings = asdict(protocol)
    del settings["scenes"]
    config, sampling = engine.config, engine.sampling
    return {
        **settings,
        "rows": [row.name for row in protocol.chosen_rows],
        "steps": protocol.steps or sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "scheduler": engine.scheduler,
        "merge_fraction": config.merge_fraction,
        "checkpoint": engine.checkpoint.name,
        "weights": weights_fingerprint(engine.transformer.state_dict()),
        "vae": engine.vae.key,
        "device": str(engine.device),
        "dtype": engine.describe()["dtype"],
        # on other weights the memory rows show what an untrained memory does
        "trained_for_memory": default_memory(engine.checkpoint.report.initialised) != "none",
    }


def _costs(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    """FLOPs by number of memory videos: on this checkpoint's plan and on the full-size one."""
    sampling = engine.sampling
    own = forward_costs(
        _MEMORY_COUNTS,
        shape=engine.transformer.config,
        frames=sampling.num_frames,
        size=sampling.size,
        spatial_stride=engine.vae.spatial_stride,
    )
    full = forward_costs(_MEMORY_COUNTS, shape=WAN_1_3B)
    height, width = sampling.size
    name = f"{engine.checkpoint.name}: {sampling.num_frames} frames of {width}x{height}"
    return {name: own, "Wan2.1-1.3B: 81 frames of 832x480": full}


def _merging_saves(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Share of a forward's FLOPs that merging saves, by number of memory videos."""
    return {
        str(row["memory"]): round(1 - row["flops_merged"] / row["flops_dynamic"], 4) for row in rows
    }


def _seconds_by_memory(scenes: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median seconds of denoising by row and number of memory videos."""
    table: dict[str, dict[str, float]] = {}
    for name in scenes[0]["rows"]:
        found: dict[int, list[float]] = {}
        for scene in scenes:
            for turn in scene["rows"][name]["turns"]:
                found.setdefault(turn["memory"], []).append(turn["seconds"])
        table[name] = {str(n): round(median(v), 4) for n, v in sorted(found.items())}
    return table
