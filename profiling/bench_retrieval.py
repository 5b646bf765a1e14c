"""VideoFOV retrieval: seconds to score 20 cached videos of 81 frames at 480x832.

`python profiling/bench_retrieval.py [--out profiling/results/retrieval.json]`

Median over runs on distinct trajectories; nothing is cached between calls.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch

from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.files import save_json
from mv2v_engine.memory.retrieval import video_fov_scores

FRAMES, SIZE, CANDIDATES = 81, (480, 832), 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    target = named_trajectory("pan_right", FRAMES, SIZE)
    candidates = [
        named_trajectory(f"arc:{-60 + 6 * index}", FRAMES, SIZE) for index in range(CANDIDATES)
    ]
    seconds = []
    for _ in range(args.runs):
        began = time.perf_counter()
        video_fov_scores(target, candidates)
        seconds.append(time.perf_counter() - began)
    result = {
        "frames": FRAMES,
        "candidates": CANDIDATES,
        "runs": args.runs,
        "seconds_median": round(statistics.median(seconds), 4),
        "seconds_worst": round(max(seconds), 4),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(result)
    if args.out:
        save_json(args.out, result)


if __name__ == "__main__":
    main()
