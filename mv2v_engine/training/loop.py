"""One training loop for every stage: time budget, schedule, EMA, log, and resumption at any step.

The data of step n depend on (seed, n) alone, so a run killed and resumed sees what an unbroken
run would have seen. Under torchrun every process holds the same weights, schedule and average;
the first one logs and saves.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mv2v_engine.files import replacing
from mv2v_engine.training.distributed import first_says, rank

StepFn = Callable[[torch.Generator], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """minutes: time budget, counted over all resumptions. ema_decay: reached after warm-up."""

    out: Path
    minutes: float
    max_steps: int | None = None
    warmup_steps: int = 100
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    save_seconds: float = 120.0
    log_every: int = 20
    seed: int = 0


class TrainingLoop:
    """Runs `step_fn(generator) -> {"loss": ..., other metrics}` until the budget is spent."""

    def __init__(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer], config: LoopConfig
    ) -> None:
        self.model, self.optimizers, self.config = model, optimizers, config
        self.step, self.elapsed = 0, 0.0
        self.ema = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._base_lr = [
            [float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers
        ]
        config.out.mkdir(parents=True, exist_ok=True)
        self.checkpoint = config.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self._resume()

    def run(self, step_fn: StepFn) -> None:
        config, began = self.config, time.monotonic() - self.elapsed
        saved = time.monotonic()
        bar = tqdm(
            total=round(config.minutes * 60),
            unit="s",
            initial=round(self.elapsed),
            disable=rank() > 0,
        )
        window: list[float] = []
        logged_at, logged_step = self.elapsed, self.step
        while not self._finished():
            scale = self._schedule()
            for optimizer, rates in zip(self.optimizers, self._base_lr, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * scale
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
            metrics = step_fn(generator)
            metrics["loss"].backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self._update_ema()
            self.step += 1
            self.elapsed = first_says(time.monotonic() - began)
            window.append(float(metrics["loss"].detach()))
            if self.step % config.log_every == 0:
                rate = (self.step - logged_step) / max(self.elapsed - logged_at, 1e-9)
                row = {"step": self.step, "seconds": round(self.elapsed, 1), "lr_scale": scale}
                row |= {name: float(value.detach()) for name, value in metrics.items()}
                row |= {"loss": sum(window) / len(window), "steps_per_second": round(rate, 3)}
                self._log(row)
                bar.update(round(self.elapsed) - bar.n)
                bar.set_postfix(step=self.step, loss=f"{row['loss']:.4f}", rate=f"{rate:.2f}/s")
                window, logged_at, logged_step = [], self.elapsed, self.step
            if time.monotonic() - saved > config.save_seconds:
                self.save()
                saved = time.monotonic()
        bar.close()
        self.save()

    def averaged(self) -> dict[str, Tensor]:
        """The exponential moving average of the weights, buffers as they are."""
        return {**self.model.state_dict(), **self.ema}

    def save(self) -> None:
        """Write the checkpoint, in the first process."""
        if rank() > 0:
            return
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        # given a path, torch hides a full disk behind an internal error; a file lets it through
        with replacing(self.checkpoint) as temporary, temporary.open("wb") as file:
            torch.save(state, file)

    def _resume(self) -> None:
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.model.load_state_dict(state["model"])
        for name, value in state["ema"].items():
            self.ema[name].copy_(value)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def _finished(self) -> bool:
        limit = self.config.max_steps
        out_of_steps = limit is not None and self.step >= limit
        return out_of_steps or self.elapsed >= self.config.minutes * 60

    def _schedule(self) -> float:
        """Linear warm-up, then half a cosine over the budget down to 2 % of the peak."""
        done = self.elapsed / (self.config.minutes * 60)
        if self.config.max_steps:
            done = max(done, self.step / self.config.max_steps)
        warm = min(1.0, (self.step + 1) / self.config.warmup_steps)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))

    def _update_ema(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        live = [parameter.detach() for _, parameter in self.model.named_parameters()]
        torch._foreach_lerp_(list(self.ema.values()), live, 1 - decay)

    def _log(self, row: dict[str, float]) -> None:
        if rank() > 0:
            return
        path = self.config.out / "log.csv"
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)
