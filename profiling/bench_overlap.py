"""Whether decoding a window in a second thread, beside the next one's steps, makes two any faster.

`python profiling/bench_overlap.py [--steps 4 20] [--rounds 5] [--out FILE]`

Two windows of `tiny-edit` on a CPU, in three ways that take turns: one after the other with all
threads; the first one decoded while the second's steps run, each with all threads; and the same
with half of them each. All give the same frames, which is checked. `ratio` is a round's wall clock
against one after the other in the same round, the median of the rounds, and `cpu_ratio` the same of
the seconds that its threads computed; `share` what decoding is of the former. Other work on the
machine slows all three, and favours who has more threads: the load is told.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import Report, digits, provenance, table
from torch import Tensor

from mv2v_engine import Engine
from mv2v_engine.engine.denoise import engine_denoiser
from mv2v_engine.engine.step import Conditioning
from mv2v_engine.sampling.flow_match import turn_noise

COLUMNS = "steps way threads_each ratio lowest highest cpu_ratio share load"


class Windows:
    """Two windows' steps and decodings on the embedded editor, from drawn latents."""

    def __init__(self, steps: int) -> None:
        self.engine, self.steps = Engine.from_pretrained("tiny-edit", device="cpu"), steps
        generator = torch.Generator().manual_seed(0)
        self.source = torch.randn(1, *self.engine.latent_shape, generator=generator)
        self.texts = self.engine.guidance_texts("make the sphere red", 1.0)
        self.decode_seconds = 0.0

    def denoised(self, seed: int) -> Tensor:
        """A window's latents [C, F, H, W]."""
        noise, generator = turn_noise(tuple(self.source.shape), seed)
        denoiser = engine_denoiser(
            self.engine,
            self.engine.plan(()),
            Conditioning([], None, *self.texts, self.source),
            noise,
            num_inference_steps=self.steps,
            guidance_scale=1.0,
            generator=generator,
        )
        while not denoiser.is_finished:
            denoiser.step()
        latents = denoiser.result().latents
        denoiser.release()
        return latents

    def in_turn(self, threads: int) -> list[Tensor]:
        """One window, then the other."""
        torch.set_num_threads(threads)
        frames, self.decode_seconds = [], 0.0
        for seed in (1, 2):
            latents, began = self.denoised(seed), time.perf_counter()
            frames.append(self.engine.vae.decode(latents))
            self.decode_seconds += time.perf_counter() - began
        return frames

    def overlapped(self, threads: int) -> list[Tensor]:
        """The first one is decoded while the second one's steps run."""
        torch.set_num_threads(threads)
        first = self.denoised(1)
        found: list[Tensor] = []

        def decode() -> None:
            torch.set_num_threads(threads)  # OpenMP's number, each thread's own
            found.append(self.engine.vae.decode(first))

        beside = threading.Thread(target=decode)
        beside.start()
        second = self.denoised(2)
        beside.join()
        return [*found, self.engine.vae.decode(second)]


def measure(steps: int, rounds: int, cores: int) -> list[dict[str, Any]]:
    """A row a way."""
    windows, half = Windows(steps), max(1, cores // 2)
    ways = {
        "one after the other": (windows.in_turn, cores),
        "overlapped": (windows.overlapped, cores),
        "overlapped, half each": (windows.overlapped, half),
    }
    first, expected = next(iter(ways)), windows.in_turn(cores)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    computed: dict[str, list[float]] = {name: [] for name in ways}
    shares = []
    for _ in range(rounds):
        for name, (run, threads) in ways.items():
            began, cpu = time.perf_counter(), time.process_time()
            frames = run(threads)
            seconds[name].append(time.perf_counter() - began)
            computed[name].append(time.process_time() - cpu)
            if name == first:
                shares.append(windows.decode_seconds / seconds[name][-1])
            for one, other in zip(frames, expected, strict=True):
                # another number of threads sums in another order
                assert int((one.int() - other.int()).abs().max()) <= 1
    load, rows = digits(os.getloadavg()[0]), []
    for name, (_, threads) in ways.items():
        ratios, of_cpu = (
            [own / whole for own, whole in zip(each[name], each[first], strict=True)]
            for each in (seconds, computed)
        )
        bounds = {"lowest": digits(min(ratios)), "highest": digits(max(ratios))}
        row = {"steps": steps, "way": name, "threads_each": threads, **bounds}
        row |= {"ratio": digits(median(ratios)), "cpu_ratio": digits(median(of_cpu))}
        rows.append(row | {"share": digits(median(shares)), "load": load})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 20])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    report = Report(args.out, {**provenance(torch.device("cpu")), "cores": cores})
    for steps in args.steps:
        for row in measure(steps, args.rounds, cores):
            report.add(**row)
    print(table(report.rows, COLUMNS))


if __name__ == "__main__":
    main()
