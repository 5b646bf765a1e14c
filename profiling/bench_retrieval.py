"""VideoFOV retrieval: 50 cached videos of 81 frames, torch against the library of `csrc/cpu`.

`python profiling/bench_retrieval.py [--out profiling/results/retrieval.json]`

Both in one run, turn about; medians over runs, and CPU seconds of all threads besides, which a busy
machine changes less. `scores` is a whole `video_fov_scores`, `counts` the operation alone. Nothing
but the directions of the sphere's grid is kept between calls.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory, named_trajectory
from mv2v_engine.files import save_json
from mv2v_engine.memory.retrieval import frustum_planes, sphere_points, video_fov_scores
from mv2v_engine.ops import native
from mv2v_engine.ops.fov_overlap import Backend, fov_overlap

FRAMES, SIZE, CANDIDATES = 81, (480, 832), 50
BACKENDS: tuple[Backend, Backend] = ("reference", "auto")


def retrieval_inputs(num_videos: int, num_frames: int) -> tuple[Tensor, Tensor, list[int]]:
    """Points and image borders of a requested pan and of videos on arcs, as retrieval has them."""
    target, candidates = _trajectories(num_videos, num_frames)
    planes = frustum_planes([target, *candidates])
    return sphere_points(target), planes, [num_frames] * (1 + num_videos)


def _trajectories(
    num_videos: int, num_frames: int
) -> tuple[CameraTrajectory, list[CameraTrajectory]]:
    step = 120 / num_videos
    arcs = [f"arc:{-60 + step * index}" for index in range(num_videos)]
    target = named_trajectory("pan_right", num_frames, SIZE)
    return target, [named_trajectory(arc, num_frames, SIZE) for arc in arcs]


def compare(run: Callable[[Backend], Tensor], runs: int) -> dict[str, object]:
    """Seconds of both backends side by side; refuses to time results that differ."""
    if not torch.equal(run("reference"), run("auto")):
        raise SystemExit("the backends disagree: no figures")
    wall: dict[Backend, list[float]] = {backend: [] for backend in BACKENDS}
    busy: dict[Backend, list[float]] = {backend: [] for backend in BACKENDS}
    for _ in range(runs):
        for backend in BACKENDS:
            began, began_busy = time.perf_counter(), time.process_time()
            run(backend)
            wall[backend].append(time.perf_counter() - began)
            busy[backend].append(time.process_time() - began_busy)
    (reference, library), (reference_busy, library_busy) = (
        [statistics.median(seconds[backend]) for backend in BACKENDS] for seconds in (wall, busy)
    )
    return {
        "reference_seconds": round(reference, 5),
        "native_seconds": round(library, 5),
        "ratio": round(reference / library, 1),
        "reference_cpu_seconds": round(reference_busy, 5),
        "native_cpu_seconds": round(library_busy, 5),
        "cpu_ratio": round(reference_busy / library_busy, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    missing = native.missing_reason("cpu", "fov_overlap")
    if missing:
        sys.exit(f"nothing to compare: {missing}")
    target, candidates = _trajectories(CANDIDATES, FRAMES)
    points, planes, frames = retrieval_inputs(CANDIDATES, FRAMES)
    result = {
        "frames": FRAMES,
        "candidates": CANDIDATES,
        "points": len(points),
        "runs": args.runs,
        "scores": compare(
            lambda backend: video_fov_scores(target, candidates, backend=backend), args.runs
        ),
        "counts": compare(
            lambda backend: fov_overlap(points, planes, frames=frames, backend=backend), args.runs
        ),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "native": native.describe("cpu"),
        "machine": platform.machine(),
    }
    print(result)
    if args.out:
        save_json(args.out, result)


if __name__ == "__main__":
    main()
