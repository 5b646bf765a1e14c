"""Turns packed into one forward against the same turns one after the other.

`python profiling/bench_batch.py [--device cpu] [--out profiling/results/gpu_batch.jsonl]`

One step of 1, 2, 4 and 8 turns with different numbers of memory videos, joint and static (over kept
K and V); the embedded model, and on CUDA the 1.3B shape with random weights, at a short clip and at
full size. The two ways run turn about, ratios are within a round; on a CPU one thread's own seconds
count. `error` is their largest relative difference: what rounding makes of another order of sums,
and in bfloat16 of frames that rank the other way round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from forwards import Setting, embedded, full_size
from measure import Report, digits, provenance, reason, table
from op_cases import random_tensors

from mv2v_engine.config import ConditioningMode, SamplingConfig
from mv2v_engine.models.kept import ConditioningCache
from mv2v_engine.models.sample import Sample
from mv2v_engine.testing import relative_error
from mv2v_engine.tokens.plan import novel_view_plan

COLUMNS = "model clip conditioning turns tokens alone_ms packed_ms speedup error skipped"
MEMORY = (3, 0, 6, 1)  # videos, of one turn after the other
PAYS = 1.05
MODES: tuple[ConditioningMode, ...] = ("joint", "static")


@dataclass(frozen=True, eq=False)
class Case:
    """Turns of one kind. most: how many of them there is time for."""

    setting: Setting
    conditioning: ConditioningMode
    most: int

    @torch.no_grad()
    def samples(self, count: int) -> list[Sample]:
        """The next step of so many turns; static ones have their K and V."""
        setting = self.setting
        config, new = setting.transformer.config, random_tensors(setting.device)
        samples = []
        for index in range(count):
            plan = novel_view_plan(
                memory=MEMORY[index % len(MEMORY)],
                frames=setting.sampling.num_frames,
                size=setting.sampling.size,
                shape=config,
                conditioning=self.conditioning,
            )
            size = (len(plan.segments), plan.target.num_frames, 12)
            sample = Sample(
                latents=[new(1, config.in_channels, *segment.grid) for segment in plan.segments],
                timestep=torch.full((1,), 900.0 - 100 * index, device=setting.device),
                encoder_hidden_states=new(1, config.text_len, config.text_dim),
                plan=plan,
                cameras=new(1, *size, dtype=torch.float32),
            )
            samples.append(self._kept(sample) if self.conditioning == "static" else sample)
        return samples

    def _kept(self, sample: Sample) -> Sample:
        cache = ConditioningCache(sample.plan)
        self.setting.transformer(
            sample.latents,
            sample.timestep,
            sample.encoder_hidden_states,
            plan=sample.plan,
            cameras=sample.cameras,
            kept=cache,
        )
        return replace(sample, latents=sample.latents[:1], kept=cache)


def cases(device: torch.device, *, with_large: bool) -> Iterator[Case]:
    tiny = embedded(device)
    for mode in MODES:
        yield Case(tiny, mode, 8)
    if not with_large:
        return
    large = full_size(device)
    short = replace(large, sampling=SamplingConfig(num_frames=17, size=(240, 416)))
    for mode in MODES:
        yield Case(short, mode, 8)
    yield Case(large, "static", 2)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The seconds of one call; a GPU's with everything that it has queued."""
    if device.type != "cuda":
        began = time.process_time()
        run()
        return time.process_time() - began
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


@torch.no_grad()
def compare(case: Case, count: int, rounds: int) -> dict[str, Any]:
    """A row's figures; ratios within a round are freer of drift than those of medians."""
    samples = case.samples(count)
    run = case.setting.transformer.forward_samples
    alone, packed = [run([sample])[0] for sample in samples], run(samples)
    error = max(relative_error(ours, own) for ours, own in zip(packed, alone, strict=True))
    del alone, packed
    ways: tuple[Callable[[], Any], ...] = (
        lambda: [run([sample]) for sample in samples],
        partial(run, samples),
    )
    times = [[seconds(way, case.setting.device) for way in ways] for _ in range(rounds + 1)][1:]
    ratios = [alone / packed for alone, packed in times]
    return {
        "tokens": sum(sample.num_tokens for sample in samples),
        "alone_ms": digits(median(row[0] for row in times) * 1e3),
        "packed_ms": digits(median(row[1] for row in times) * 1e3),
        "speedup": digits(median(ratios)),
        "speedups": [digits(ratio) for ratio in ratios],
        "error": digits(error),
    }


def verdict(rows: list[dict[str, Any]]) -> str:
    """When packing pays, by these rows."""
    pays = [row for row in rows if row["turns"] > 1 and row.get("speedup", 0) >= PAYS]
    if not pays:
        return f"packing pays nowhere here: nothing is {PAYS:g} times as fast"
    where = [
        f"{row['turns']} x {row['model']} {row['clip']} {row['conditioning']} ({row['speedup']}x)"
        for row in pays
    ]
    return f"packing pays ({PAYS:g} times as fast or more) for " + ", ".join(where)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    is_cuda = device.type == "cuda"
    if is_cuda and not torch.cuda.is_available():
        raise SystemExit("no CUDA device was found; use --device cpu")
    if min(args.turns) < 1 or args.rounds < 1:
        parser.error("--turns and --rounds count from 1")
    if not is_cuda:
        torch.set_num_threads(1)
    report = Report(args.out, provenance(device, args.commit))
    for case in cases(device, with_large=is_cuda):
        frames, (height, width) = case.setting.sampling.num_frames, case.setting.sampling.size
        for count in args.turns:
            if count > case.most:
                continue
            row: dict[str, Any] = {"model": case.setting.name, "clip": f"{frames}x{height}x{width}"}
            row |= {"conditioning": case.conditioning, "turns": count}
            try:
                report.add(**row, **compare(case, count, args.rounds))
            # whatever a kernel raises is this row's result
            except Exception as error:
                report.add(**row, skipped=reason(error))
    print(table(report.rows, COLUMNS))
    print(verdict(report.rows))


if __name__ == "__main__":
    main()
