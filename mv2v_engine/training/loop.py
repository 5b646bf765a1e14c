"""One training loop for every stage: time budget, schedule, EMA, log, and resumption at any step.

The data of step n depend on (seed, n) alone, so a run killed and resumed sees what an unbroken
run would have seen. Under torchrun every process holds the same weights, schedule and average;
the first one logs and saves. Frozen parameters are neither averaged nor saved.
"""

from __future__ import annotations

import math
import pickle
import sys
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mv2v_engine.checkpoints.configs import transformer_config
from mv2v_engine.config import TransformerConfig
from mv2v_engine.errors import CheckpointError
from mv2v_engine.files import make_folder, replacing
from mv2v_engine.training.distributed import first_says, rank, world_size
from mv2v_engine.training.log import TrainingLog, plot_curves
from mv2v_engine.training.throughput import training_flops_factor

StepFn = Callable[[torch.Generator], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """minutes: time budget, counted over all resumptions; infinite with max_steps alone.

    ema_decay: reached after warm-up. batch: samples of one call of the step function in one
    process. accumulate: calls whose gradients are averaged into one step. peak_tflops: matrix
    products of one process's device; with it, and a step that reports `forward_tflop`, the log
    says what share of that the run gets.
    """

    out: Path
    minutes: float = math.inf
    max_steps: int | None = None
    warmup_steps: int = 100
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    save_seconds: float = 120.0
    log_every: int = 20
    seed: int = 0
    batch: int = 1
    accumulate: int = 1
    peak_tflops: float | None = None


class TrainingLoop:
    """Runs `step_fn(generator) -> {"loss": ..., other metrics}` until the budget is spent.

    A metric may be missing from some steps; the log has its mean over the steps that had it.

    Raises:
        CheckpointError: there is a checkpoint in the folder that cannot be resumed from.
        TrainingError: there is a damaged log in the folder.
    """

    def __init__(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer], config: LoopConfig
    ) -> None:
        self.model, self.optimizers, self.config = model, optimizers, config
        self.step, self.elapsed = 0, 0.0
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self._trained.items()}
        self._base_lr = [
            [float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers
        ]
        make_folder(config.out)
        self.checkpoint = config.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self._resume()
        self._log = None
        if rank() == 0:
            self._log = TrainingLog(config.out / "log.csv", step=self.step)

    def run(self, step_fn: StepFn) -> None:
        config, began = self.config, time.monotonic() - self.elapsed
        saved = time.monotonic()
        bar = self._bar()
        window: defaultdict[str, list[Tensor]] = defaultdict(list)
        logged_at, logged_step = self.elapsed, self.step
        while not self._finished():
            scale = self._schedule()
            for optimizer, rates in zip(self.optimizers, self._base_lr, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * scale
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
            for _ in range(config.accumulate):
                metrics = step_fn(generator)
                (metrics["loss"] / config.accumulate).backward()
                for name, value in metrics.items():
                    window[name].append(value.detach())
            nn.utils.clip_grad_norm_(self._trained.values(), config.grad_clip)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self._update_ema()
            self.step += 1
            self.elapsed = first_says(time.monotonic() - began)
            if self.step % config.log_every == 0 or self._finished():
                rate = (self.step - logged_step) / max(self.elapsed - logged_at, 1e-9)
                samples = rate * config.batch * config.accumulate * world_size()
                row = {"step": self.step, "seconds": round(self.elapsed, 1), "lr_scale": scale}
                row |= {name: float(torch.stack(values).mean()) for name, values in window.items()}
                row |= {
                    "steps_per_second": round(rate, 3),
                    "samples_per_second": round(samples, 3),
                }
                if config.peak_tflops is not None and "forward_tflop" in row:
                    work = row["forward_tflop"] * training_flops_factor(self.model)
                    share = work * config.accumulate * rate / config.peak_tflops
                    row["peak_share"] = round(share, 4)
                if self._log is not None:
                    self._log.append(row)
                bar.update(self._progress() - bar.n)
                bar.set_postfix(
                    step=self.step, loss=f"{row['loss']:.4f}", rate=f"{samples:.2f} samples/s"
                )
                window.clear()
                logged_at, logged_step = self.elapsed, self.step
            if time.monotonic() - saved > config.save_seconds:
                self.save()
                saved = time.monotonic()
        bar.close()
        self.save()
        self.plot()

    @property
    def done(self) -> float:
        """The share of the budget that is spent, 0 to 1."""
        done = self.elapsed / (self.config.minutes * 60)
        if self.config.max_steps:
            done = max(done, self.step / self.config.max_steps)
        return min(done, 1.0)

    def averaged(self) -> dict[str, Tensor]:
        """The exponential moving average of the weights, frozen ones and buffers as they are."""
        return {**self.model.state_dict(), **self.ema}

    def save(self) -> None:
        """Write the checkpoint, in the first process."""
        if rank() > 0:
            return
        frozen = self._frozen()
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "shape": self._shape,
            "model": {n: v for n, v in self.model.state_dict().items() if n not in frozen},
            "ema": self.ema,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        # given a path, torch hides a full disk behind an internal error; a file lets it through
        with replacing(self.checkpoint) as temporary, temporary.open("wb") as file:
            torch.save(state, file)

    def plot(self) -> None:
        """Draw every loss of the log into `loss.png`, in the first process."""
        if self._log is None:
            return
        if find_spec("matplotlib") is None:
            print("no loss.png: matplotlib is missing, install the [train] extra", file=sys.stderr)
            return
        curves = {n: c for n, c in self._log.curves().items() if n.startswith("loss") and c[0]}
        if curves:
            plot_curves({self.config.out.name: curves}, self.config.out / "loss.png")

    def _resume(self) -> None:
        path = self.checkpoint
        advice = "delete it to start anew, or train into another folder"
        if not zipfile.is_zipfile(path):  # torch.save writes one, its directory last
            raise CheckpointError(
                f"cannot resume from {path}: cut short or no training checkpoint; {advice}"
            )
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"cannot resume from {path}: {reason}; {advice}") from error
        try:
            self._require_shape(state.get("shape"))
            self.step, self.elapsed = int(state["step"]), float(state["elapsed"])
            self._load(state["model"], state["ema"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"cannot resume from {path}: it is of another training than this one "
                f"({' '.join(str(error).split())[:300]}); {advice}"
            ) from error

    @property
    def _shape(self) -> dict[str, Any] | None:
        """A transformer's config, of which its weights do not tell all."""
        config = getattr(self.model, "config", None)
        return asdict(config) if isinstance(config, TransformerConfig) else None

    def _require_shape(self, saved: dict[str, Any] | None) -> None:
        """Refuse a transformer's checkpoint of another config; older ones have kept none.

        Raises:
            ValueError: naming what differs.
        """
        own = self._shape
        if saved is None or own is None:
            return
        before = asdict(transformer_config(saved))
        other = [f"{n} {before[n]!r}, not {own[n]!r}" for n in own if before[n] != own[n]]
        if other:
            raise ValueError(f"its transformer has {'; '.join(other)}")

    def _load(self, weights: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> None:
        """Put saved weights and averages in place.

        Raises:
            KeyError: something trained here is missing, or something saved is unknown here.
        """
        frozen = self._frozen()
        found = self.model.load_state_dict(weights, strict=False)
        missing = [n for n in found.missing_keys if n not in frozen]
        missing += [n for n in self.ema if n not in averages]
        unknown = found.unexpected_keys
        unknown += [n for n in averages if n not in self.ema and n not in frozen]
        if missing or unknown:
            raise KeyError(f"{len(missing)} missing, {len(unknown)} unknown: {missing + unknown}")
        for name, average in self.ema.items():
            average.copy_(averages[name])

    def _frozen(self) -> set[str]:
        return {n for n, _ in self.model.named_parameters() if n not in self._trained}

    def _bar(self) -> Any:
        """Seconds where there is a time budget, else steps."""
        is_timed = math.isfinite(self.config.minutes)
        total = round(self.config.minutes * 60) if is_timed else self.config.max_steps
        unit = "s" if is_timed else "step"
        return tqdm(total=total, unit=unit, initial=self._progress(), disable=rank() > 0)

    def _progress(self) -> int:
        return round(self.elapsed) if math.isfinite(self.config.minutes) else self.step

    def _finished(self) -> bool:
        limit = self.config.max_steps
        out_of_steps = limit is not None and self.step >= limit
        return out_of_steps or self.elapsed >= self.config.minutes * 60

    def _schedule(self) -> float:
        """Linear warm-up, then half a cosine over the budget down to 2 % of the peak."""
        warm = min(1.0, (self.step + 1) / self.config.warmup_steps)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.done)))

    def _update_ema(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        live = [parameter.detach() for parameter in self._trained.values()]
        torch._foreach_lerp_(list(self.ema.values()), live, 1 - decay)
