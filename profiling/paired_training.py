"""Does a change of what the transformer learns pay? Paired trainings of tiny-nvs's shape.

`python profiling/paired_training.py --latents LATENTS --held-out LATENTS --work runs/paired
--arm velocity` (then the other arms, side by side if there are cores), and with `--sum` in place of
`--arm` [--out profiling/results/paired_training.json]

"velocity"     what the engine has: the velocity is predicted, cameras enter by ReCamMaster's
               encoder, source and memory have rotary times of their own
"x0"           the clean latents are predicted, under the same loss of the velocity (JiT, arXiv
               2511.13720): v = (x_t - x0) / max(level, 0.05)
"shared_time"  source and memory have the target's rotary times (ReDirector, arXiv 2511.19827)
"prope"        PRoPE's fused form inside attention (METHOD 9), beside the encoder

All arms begin with the same weights and have the same batches and noise: the first stage of
`training.embedded --task views`, with memory in half of the samples. Judged is the squared error of
the velocity in held-out worlds at 16 noise levels, by averaged weights; an arm's ratio to
"velocity" is of the same worlds and noise, its interval a bootstrap over worlds, of one training.
A run that was cut off goes on where it stood.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import provenance
from torch import Tensor, nn

from mv2v_engine.config import TINY, TransformerConfig
from mv2v_engine.evaluation import bootstrap
from mv2v_engine.files import save_json
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.training.dit import TINY_RECIPE, initialise, make_optimizers
from mv2v_engine.training.latents import LatentCache
from mv2v_engine.training.loop import LoopConfig, TrainingLoop
from mv2v_engine.training.losses import BatchForward, flow_step, shifted, widened
from mv2v_engine.training.recipe import Batch, SceneSampler, Tracks
from mv2v_engine.training.throughput import compute_dtype, matmul_tflops

CPU = torch.device("cpu")
ARMS: dict[str, TransformerConfig] = {
    "velocity": TINY,
    "x0": TINY,
    "shared_time": replace(TINY, shared_time=True),
    "prope": replace(TINY, camera_attention="prope_fused"),
}
RECIPE = replace(TINY_RECIPE, frames=(2, 4), no_memory=0.5)
# of a held-out world: its noise levels, low to high, and the videos in memory
LEVELS, REMEMBERED = 16, 2
# below it the clean latents say little of the velocity, and their error would rule the loss
LOWEST_LEVEL = 0.05


class Part:
    """Some scenes of a cache."""

    def __init__(self, cache: LatentCache, scenes: range) -> None:
        self.cache, self.scenes, self.latent_shape = cache, scenes, cache.latent_shape

    def __len__(self) -> int:
        return len(self.scenes)

    def num_tracks(self, scene: int) -> int:
        """Videos of a scene."""
        return self.cache.num_tracks(self.scenes[scene])

    def still_track(self, scene: int) -> int | None:
        """The video whose camera does not move."""
        return self.cache.still_track(self.scenes[scene])

    def draw(self, scene: int, tracks: Sequence[int], source: int) -> Tracks:
        """The given videos."""
        return self.cache.draw(self.scenes[scene], tracks, source)


class WholeLinear(nn.Linear):
    """Computed in float32: divided by a low noise level, what bfloat16 rounds would be most of the
    error."""

    def forward(self, x: Tensor) -> Tensor:
        """The product of `nn.Linear`."""
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class CleanPrediction(nn.Module):
    """A transformer whose output is taken for the clean target; gives the velocity."""

    def __init__(self, transformer: MV2VTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, latents: list[Tensor], timestep: Tensor, *rest: Any, **given: Any) -> Tensor:
        clean = self.transformer(latents, timestep, *rest, **given)
        level = widened((timestep / 1000).clamp_min(LOWEST_LEVEL))
        velocity: Tensor = (latents[0] - clean) / level
        return velocity


def begin(args: argparse.Namespace, arm: str) -> tuple[TrainingLoop, nn.Module]:
    """The arm's loop, where it stands, and the module that gives its velocities."""
    torch.manual_seed(0)
    model = MV2VTransformer(ARMS[arm])
    initialise(model)
    if arm == "x0":
        head = WholeLinear(model.proj_out.in_features, model.proj_out.out_features)
        head.load_state_dict(model.proj_out.state_dict())
        model.proj_out = head
    config = LoopConfig(
        out=args.work / arm,
        max_steps=args.steps,
        batch=RECIPE.batch,
        peak_tflops=matmul_tflops(CPU, compute_dtype(CPU)),
    )
    loop = TrainingLoop(model, make_optimizers(model, 3e-3, 5e-3), config)
    return loop, CleanPrediction(model) if arm == "x0" else model


def train(args: argparse.Namespace, arm: str) -> None:
    """To the last step."""
    loop, module = begin(args, arm)
    sampler = SceneSampler(LatentCache(*args.latents, device=CPU), ARMS[arm], RECIPE)
    loop.run(flow_step(module, sampler, CPU))


def cases(args: argparse.Namespace, arm: str, memory: int) -> list[Batch]:
    """One target of each held-out world, beside its still source, repeated for every level."""
    cache = LatentCache(*args.held_out, device=CPU)
    recipe = replace(
        RECIPE, batch=1, min_memory=memory or 1, max_memory=REMEMBERED, targets=1,
        no_memory=0.0 if memory else 1.0, static_source=1.0, source_dropped=0.0,
        static_conditioning=0.0, uniform_tokenizer=0.0,
    )  # fmt: skip
    worlds = [Part(cache, range(scene, scene + 1)) for scene in range(len(cache))]
    samplers = [SceneSampler(world, ARMS[arm], recipe) for world in worlds]
    generators = [torch.Generator().manual_seed(scene) for scene in range(len(cache))]
    return [sampler.draw(each) for sampler, each in zip(samplers, generators, strict=True)]


@torch.no_grad()
def errors(module: nn.Module, batch: Batch, seed: int) -> Tensor:
    """Squared error of the velocity at every level [LEVELS]."""
    levels = shifted((torch.arange(LEVELS) + 0.5) / LEVELS, RECIPE.flow_shift)
    noise = torch.randn(batch.targets.shape, generator=torch.Generator().manual_seed(seed))
    found = []
    for level in levels:
        noisy = (1 - level) * batch.targets + level * noise
        with torch.autocast("cpu", compute_dtype(CPU), enabled=compute_dtype(CPU) != torch.float32):
            velocity = BatchForward(module, batch)(noisy, level[None] * 1000)
        found.append((velocity.float() - (noise - batch.targets)).pow(2).mean())
    return torch.stack(found)


def judged(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    """Errors of every held-out world, without and with memory [worlds][LEVELS]."""
    loop, module = begin(args, arm)
    loop.model.load_state_dict(loop.averaged())
    loop.model.eval()
    found: dict[str, list[Tensor]] = {}
    for row, memory in (("without memory", 0), ("with memory", REMEMBERED)):
        batches = cases(args, arm, memory)
        found[row] = [errors(module, batch, number) for number, batch in enumerate(batches)]
    parameters = sum(p.numel() for p in loop.model.parameters())
    took = {"steps": loop.step, "seconds": round(loop.elapsed), "parameters": parameters}
    return {"errors": found, "took": took}


def summed(args: argparse.Namespace) -> None:
    """The table of all arms that have begun."""
    arms = [arm for arm in ARMS if (args.work / arm / "checkpoint.pt").exists()]
    found = {arm: judged(args, arm) for arm in arms}
    rows: dict[str, Any] = {}
    for arm in arms:
        rows[arm] = dict(found[arm]["took"])
        for name, worlds in found[arm]["errors"].items():
            own = torch.stack(worlds)
            first = torch.stack(found[arms[0]]["errors"][name])
            thirds = [round(float(part.mean()), 4) for part in own.mean(0).tensor_split(3)]
            rows[arm][name] = {
                "error": _as_json(bootstrap.mean(own.mean(1).tolist())),
                "of_velocity": _as_json(bootstrap.mean((own.mean(1) / first.mean(1)).tolist())),
                "error_at_low_middle_high_levels": thirds,
            }
        print(arm, rows[arm])
    if args.out is not None:
        record = {
            "command": f"python profiling/paired_training.py --latents LATENTS --held-out LATENTS "
            f"--steps {args.steps} --sum",
            "worlds": len(LatentCache(*args.latents)),
            "rows": rows,
            **provenance(CPU),
        }
        save_json(args.out, record)


def _as_json(estimate: bootstrap.Estimate | None) -> dict[str, Any]:
    assert estimate is not None
    ci = [estimate.low, estimate.high]
    return {"value": estimate.value, "ci": ci, "worlds": estimate.count}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--arm", choices=tuple(ARMS), help="train it")
    what.add_argument("--sum", action="store_true", help="judge all arms that have begun")
    parser.add_argument("--latents", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True, help="where trainings lie")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.sum:
        summed(args)
    else:
        train(args, args.arm)


if __name__ == "__main__":
    main()
