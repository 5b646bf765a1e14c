"""A turn's steps launched one by one against the same steps replayed as a captured graph.

`python profiling/bench_graphs.py [--device cpu --quick] [--out profiling/results/gpu_graphs.jsonl]`

Whole runs of steps without guidance, back to back and turn about, by the wall: a cold cache before
every step would let the host get ahead, which is what graphs are about. host_ms is what handing out
an eager step takes, or waiting to hand it out; where the device takes as long, a graph has nothing
to gain. first_ms is what a turn takes that captures, over its replays: an eager step and the
capture. `auto` is what `EngineConfig(graphs="auto")` makes of the plan. On a CPU only the eager
steps run.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import Report, digits, provenance, reason, table, usable_device

from mv2v_engine.checkpoints import load_checkpoint
from mv2v_engine.config import WAN_1_3B, ConditioningMode, TransformerConfig
from mv2v_engine.engine.capture import open_recorder
from mv2v_engine.engine.denoise import Denoiser
from mv2v_engine.engine.graphs import Graphs, flops_per_launch
from mv2v_engine.engine.step import Conditioning as Given
from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.ops.backend import resolve
from mv2v_engine.sampling.flow_match import make_solver
from mv2v_engine.testing import tiny_config
from mv2v_engine.tokens.plan import TokenPlan, novel_view_plan

COLUMNS = "workload conditioning tokens gflop_per_launch auto eager_ms host_ms replay_ms speedup "
COLUMNS += "equal first_ms pool_mib arena_mib skipped"


@dataclass(frozen=True)
class Workload:
    """frames, size: of the video in pixels. model: embedded, or random weights of 1.3B.

    rounds: at most so many.
    """

    name: str
    model: str
    frames: int
    size: tuple[int, int]
    memory: int
    steps: int
    rounds: int = 5


WORKLOADS = (
    Workload("tiny-nvs, 3 memory videos", "tiny-nvs", 17, (96, 160), 3, 20),
    Workload("1.3B, 17 frames at 240x416", "1.3B", 17, (240, 416), 0, 10),
    Workload("1.3B, 17 frames at 240x416, 3 memory videos", "1.3B", 17, (240, 416), 3, 10),
    Workload("1.3B, 81 frames at 240x416", "1.3B", 81, (240, 416), 0, 5),
    Workload("1.3B, 81 frames at 480x832", "1.3B", 81, (480, 832), 0, 2, rounds=1),
)
QUICK = (Workload("tiny", "tiny", 9, (32, 64), 1, 2),)


def build_model(name: str, device: torch.device) -> MV2VTransformer:
    """Weights on the device: bfloat16 on CUDA, as an engine would load them."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if name == "tiny-nvs":
        model = load_checkpoint(name, device=device, dtype=dtype).transformer
    else:
        config: TransformerConfig = WAN_1_3B if name == "1.3B" else tiny_config()
        with device:
            model = MV2VTransformer(config)
        for parameter_name, parameter in model.named_parameters():
            if not any(part in parameter_name for part in model.keep_in_fp32_modules):
                parameter.data = parameter.data.to(dtype)
    model.set_backend(resolve("auto", device), "auto" if device.type == "cuda" else "reference")
    return model.eval().requires_grad_(False)


class Turns:
    """Turns of one plan on random inputs, with or without graphs."""

    def __init__(self, model: MV2VTransformer, plan: TokenPlan, steps: int) -> None:
        self.model, self.plan, self.steps = model, plan, steps
        self.device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)

        def new(*shape: int) -> torch.Tensor:
            return torch.randn(1, *shape, generator=generator).to(self.device)

        shape = plan.shape
        self.noise, *videos = [new(shape.in_channels, *s.grid) for s in plan.segments]
        cameras = new(len(plan.segments), plan.target.num_frames, 12)
        text = [new(shape.text_len, shape.text_dim) for _ in range(2)]
        self.given = Given(videos, cameras if shape.has_camera else None, *text)

    def run(self, graphs: Graphs | None) -> tuple[torch.Tensor, float, float, dict[str, Any]]:
        """Latents, seconds and host seconds of a step after the first, and how the steps ran."""
        denoiser = Denoiser(
            transformer=self.model,
            plan=self.plan,
            conditioning=self.given,
            noise=self.noise,
            # the first step, which may fill K and V, is not timed
            solver=make_solver("euler", self.steps + 1, 5.0),
            guidance_scale=1.0,
            graphs=graphs,
        )
        try:
            denoiser.step()
            self._wait()
            began = time.perf_counter()
            while not denoiser.is_finished:
                denoiser.step()
            launched = time.perf_counter() - began
            self._wait()
            spent = time.perf_counter() - began
            done = denoiser.result()
        finally:
            denoiser.release()
        return done.latents, spent / self.steps, launched / self.steps, done.graphs

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(turns: Turns, rounds: int) -> dict[str, Any]:
    """A row's figures."""
    row: dict[str, Any] = {"gflop_per_launch": digits(flops_per_launch(turns.plan) / 1e9)}
    expected = turns.run(None)[0]  # compiles, and lets libraries choose their algorithms
    graphs, missing = None, None
    try:
        recorder = open_recorder(turns.device)
        automatic = Graphs("auto", 1 << 40, recorder, None)
        row["auto"] = "captured" if automatic.serves(turns.plan) else "eager"
        graphs = Graphs("on", 1 << 40, recorder, None)
    except KernelUnavailableError as error:
        missing = str(error)
    first = 0.0
    if graphs is not None:
        began = time.perf_counter()
        latents, *_, report = turns.run(graphs)
        first = time.perf_counter() - began
        row["equal"] = bool(torch.equal(latents, expected))
        row |= {f"{name}_mib": digits(size / 2**20) for name, size in report["bytes"].items()}
    eager, host, replay = [], [], []
    for _ in range(rounds):
        _, seconds, launched, _ = turns.run(None)
        eager.append(seconds)
        host.append(launched)
        if graphs is not None:
            replay.append(turns.run(graphs)[1])
    row |= {"eager_ms": digits(median(eager) * 1e3), "host_ms": digits(median(host) * 1e3)}
    if graphs is None:
        return row | {"skipped": f"replay: {missing}"}
    graphs.clear()
    ratios = [a / b for a, b in zip(eager, replay, strict=True)]
    row |= {"replay_ms": digits(median(replay) * 1e3), "speedup": digits(median(ratios))}
    row["speedups"] = [digits(ratio) for ratio in ratios]
    return row | {"first_ms": digits((first - turns.steps * median(replay)) * 1e3)}


def workload_plans(
    workload: Workload, model: MV2VTransformer
) -> Iterator[tuple[ConditioningMode, TokenPlan]]:
    modes: tuple[ConditioningMode, ...] = ("joint", "static")
    for conditioning in modes:
        yield (
            conditioning,
            novel_view_plan(
                memory=workload.memory,
                frames=workload.frames,
                size=workload.size,
                conditioning=conditioning,
                shape=model.config,
            ),
        )


def verdict(rows: list[dict[str, Any]]) -> str:
    """Where graphs gain by more than 3 %, where not, and whether "auto" agrees."""
    timed = [row for row in rows if "speedup" in row]
    lines = []
    for row in timed:
        gains = row["speedup"] > 1.03
        agrees = gains == (row["auto"] == "captured")
        lines.append(
            f"{row['workload']}, {row['conditioning']}: {'gains' if gains else 'no gain'} "
            f"({row['speedup']}x); auto {'agrees' if agrees else 'does not agree'}"
        )
    return "\n".join(lines) or "no graphs here: nothing to compare"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model: a check of the script")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = usable_device(args.device, quick=args.quick)
    report = Report(args.out, provenance(device, args.commit))
    model, loaded = None, None
    for workload in QUICK if args.quick else WORKLOADS:
        if loaded != workload.model:
            model, loaded = build_model(workload.model, device), workload.model
        assert model is not None
        for conditioning, plan in workload_plans(workload, model):
            row: dict[str, Any] = {"workload": workload.name, "conditioning": conditioning}
            row |= {"tokens": plan.length, "steps": workload.steps}
            try:
                turns = Turns(model, plan, workload.steps)
                report.add(**row, **measure(turns, min(args.rounds, workload.rounds)))
            # whatever a kernel raises is this row's result
            except Exception as error:
                report.add(**row, skipped=reason(error))
            gc.collect()
    print(table(report.rows, COLUMNS))
    print(verdict(report.rows))


if __name__ == "__main__":
    main()
