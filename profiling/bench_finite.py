"""What looking for numbers that are not finite costs: at every step, and when weights load.

`python profiling/bench_finite.py [--device cpu] [--out profiling/results/finite.jsonl]`

`tiny-nvs`; on a CPU one thread and its own time. A step that counts, one that does not and the
count alone take turns: `count_percent` is the median over rounds of the count over the step without
it, `step_percent` that of what the step takes longer, with its quartiles. `isfinite_us` is the
count by `torch.isfinite`. Weights are loaded with the check and without, turn about: the embedded
model's and random ones of the 1.3B shape's width.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from forwards import Inputs, Setting, embedded
from measure import Report, Timer, digits, existing_device, provenance, table

from mv2v_engine.checkpoints import load_checkpoint, save_checkpoint
from mv2v_engine.config import WAN_1_3B, SamplingConfig
from mv2v_engine.engine.denoise import Denoiser
from mv2v_engine.engine.step import Conditioning
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.sampling.flow_match import make_solver

STEPS = {
    "0 memory videos": ("dynamic", 0),
    "3, merged": ("merged", 3),
    "10, static": ("static", 10),
}
MOST_STEPS = 1000
COLUMNS = "case ms count_us isfinite_us count_percent step_percent low high checked_ms percent mib"
Row = dict[str, Any]


def denoiser(setting: Setting, kind: str, memory: int, *, counts: bool) -> Denoiser:
    """A turn under way, which has made its first step."""
    plan = setting.plan(kind, memory)
    given = Inputs(setting, plan)
    made = Denoiser(
        transformer=setting.transformer,
        plan=plan,
        conditioning=Conditioning(given.latents[1:], given.cameras, given.text, None),
        noise=given.latents[0],
        solver=make_solver("euler", MOST_STEPS, setting.sampling.flow_shift),
        guidance_scale=1.0,
    )
    if not counts:
        object.__setattr__(made.buffers, "count_finite", lambda: None)
    made.step()
    return made


def percentages(rounds: Sequence[Sequence[float]], new: int, old: int) -> list[float]:
    """Quartiles of what `new` takes, in percent of what `old` does, of the same round."""
    return statistics.quantiles([100 * times[new] / times[old] for times in rounds], n=4)


def steps(setting: Setting, timer: Timer, count: int) -> Iterator[Row]:
    for case, (kind, memory) in STEPS.items():
        plain, counting = (
            denoiser(setting, kind, memory, counts=counts) for counts in (False, True)
        )
        buffers = counting.buffers

        def by_isfinite(buffers: Any = buffers) -> None:
            buffers.finite_steps.add_(buffers.latents.isfinite().all())

        rivals: list[Callable[[], Any]] = [plain.step, counting.step]
        rivals += [buffers.count_finite, by_isfinite]
        for call in rivals:
            call()
        rounds = timer.rounds(rivals, count)
        without, _, alone, isfinite = (
            statistics.median(times[place] for times in rounds) for place in range(4)
        )
        low, middle, high = (percent - 100 for percent in percentages(rounds, 1, 0))
        yield {
            "case": f"a step, {case}",
            "rounds": count,
            "ms": digits(without * 1e3),
            "count_us": digits(alone * 1e6),
            "isfinite_us": digits(isfinite * 1e6),
            "count_percent": digits(percentages(rounds, 2, 0)[1]),
            "step_percent": digits(middle),
            "low": digits(low),
            "high": digits(high),
        }


def loading(folders: dict[str, Path | str], timer: Timer, count: int) -> Iterator[Row]:
    for case, folder in folders.items():

        def load(check: bool, folder: Path | str = folder) -> Callable[[], Any]:
            return lambda: load_checkpoint(folder, check_weights=check)

        rivals = [load(False), load(True)]
        for call in rivals:
            call()
        rounds = timer.rounds(rivals, count)
        low, middle, high = (percent - 100 for percent in percentages(rounds, 1, 0))
        weights = load_checkpoint(folder).transformer.parameters()
        yield {
            "case": f"loading {case}",
            "rounds": count,
            "mib": digits(sum(weight.nbytes for weight in weights) / 2**20),
            "ms": digits(statistics.median(times[0] for times in rounds) * 1e3),
            "checked_ms": digits(statistics.median(times[1] for times in rounds) * 1e3),
            "percent": digits(middle),
            "low": digits(low),
            "high": digits(high),
        }


def save_wide(folder: Path, layers: int) -> Path:
    """Random weights of the 1.3B shape's width, of fewer layers."""
    shape = replace(WAN_1_3B, num_layers=layers, merge_blocks=())
    torch.manual_seed(0)
    save_checkpoint(folder, MV2VTransformer(shape), shape, SamplingConfig(), "wide", torch.float32)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--layers", type=int, default=2, help="of the wide weights; 0: none")
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = existing_device(args.device)
    torch.set_num_threads(1)
    timer = Timer(device, seconds=1, clock=time.process_time)
    report = Report(args.out, provenance(device, args.commit) | {"threads": 1})
    with torch.no_grad(), tempfile.TemporaryDirectory() as temporary:
        for row in steps(embedded(device), timer, args.rounds):
            report.add(**row)
        folders: dict[str, Path | str] = {"tiny-nvs": "tiny-nvs"}
        if args.layers:
            folders[f"{args.layers} wide layers"] = save_wide(Path(temporary), args.layers)
        for row in loading(folders, timer, max(args.rounds // 6, 2)):
            report.add(**row)
    print(table(report.rows, COLUMNS))


if __name__ == "__main__":
    main()
