"""Train a small memory transformer on cached latents of procedural worlds (METHOD 12).

`python -m mv2v_engine.training.dit --latents runs/latents --out runs/dit --minutes 60`

Rectified-flow loss on the target alone; memory videos are other cameras of the same world, the
tokenizers by rank or one for all, merging in half of the steps, noise on memory latents, the
source sometimes dropped. The samples of a batch share one token plan, so a step is one forward;
under torchrun every process has a batch of its own of that plan.

B batch, V camera tracks, F H W latent grid.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mv2v_engine.config import TINY, SamplingConfig, TransformerConfig
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.rope import axis_dims
from mv2v_engine.tokens.plan import TokenPlan, memory_tokenizers, turn_plan
from mv2v_engine.training.distributed import data_parallel, join, leave, own_generator
from mv2v_engine.training.latents import LatentScene, load_latents
from mv2v_engine.training.loop import LoopConfig, TrainingLoop

TINY_SAMPLING = SamplingConfig(
    num_frames=17,
    size=(96, 160),
    num_inference_steps=20,
    guidance_scale=1.0,
    flow_shift=3.0,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The odds of METHOD 12; max_memory bounds the memory videos of a sample."""

    batch: int = 4
    max_memory: int = 3
    no_memory: float = 0.25
    uniform_tokenizer: float = 0.5
    merging: float = 0.5
    merge_fraction: tuple[float, float] = (0.3, 0.7)
    memory_noise: float = 0.1
    source_dropped: float = 0.1
    static_source: float = 0.8
    flow_shift: float = 3.0


@dataclass(frozen=True, eq=False)
class Batch:
    """latents: one [B, C, F, H, W] per segment of the plan, the target's still clean."""

    plan: TokenPlan
    latents: list[Tensor]
    cameras: Tensor


class SceneSampler:
    """Draws batches from a latent cache; everything follows from the generator."""

    def __init__(self, scenes: list[LatentScene], shape: TransformerConfig, recipe: Recipe) -> None:
        if not scenes:
            raise ValueError("the latent cache is empty; run mv2v_engine.training.latents first")
        self.scenes, self.shape, self.recipe = scenes, shape, recipe

    def draw(self, generator: torch.Generator) -> Batch:
        """One batch of one plan; the plan is the same in all processes, the samples are not."""
        recipe = self.recipe

        def chance(probability: float) -> bool:
            return float(torch.rand((), generator=generator)) < probability

        def number(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        num_memory = 0 if chance(recipe.no_memory) else number(1, recipe.max_memory)
        tokenizers = memory_tokenizers(num_memory)
        if chance(recipe.uniform_tokenizer):
            choices = self.shape.tokenizers
            tokenizers = (choices[number(0, len(choices) - 1)],) * num_memory
        low, high = recipe.merge_fraction
        fraction = low + (high - low) * float(torch.rand((), generator=generator))
        source = not (num_memory and chance(recipe.source_dropped))
        frames, height, width = self.scenes[0].latents.shape[2:]
        plan = turn_plan(
            self.shape,
            (frames, height, width),
            tokenizers,
            source=source,
            merge="conv" if chance(recipe.merging) else "off",
            fraction=round(fraction, 2),
        )
        generator = own_generator(generator)
        rows: list[tuple[Tensor, Tensor]] = []
        for _ in range(recipe.batch):
            scene = self.scenes[number(0, len(self.scenes) - 1)]
            order = torch.randperm(len(scene.latents), generator=generator).tolist()
            # a user's clip is of unknown camera, hence static (METHOD 5): train on that most
            if chance(recipe.static_source):
                order.remove(0)
                order.insert(1, 0)
            target, first_source, *others = order
            tracks = [target, first_source, *others[:num_memory]]
            latents = scene.latents[tracks].float()
            rows.append((latents, scene.cameras(tracks, first_source)))
        latents = torch.stack([row[0] for row in rows])
        kept = [0, *([1] if source else []), *range(2, 2 + num_memory)]
        videos = [latents[:, index] for index in kept]
        for index in range(len(kept) - num_memory, len(kept)):
            if source:
                noise = torch.randn(videos[index].shape, generator=generator)
                videos[index] = videos[index] + recipe.memory_noise * noise
        return Batch(plan, videos, torch.stack([row[1] for row in rows]))


def flow_loss(
    model: nn.Module,
    batch: Batch,
    generator: torch.Generator,
    *,
    flow_shift: float,
    device: torch.device,
) -> Tensor:
    """Mean squared error of the target's velocity at random noise levels."""
    clean = batch.latents[0].to(device)
    uniform = torch.rand(len(clean), generator=generator)
    sigma = (flow_shift * uniform / (1 + (flow_shift - 1) * uniform)).to(device)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    level = sigma[:, None, None, None, None]
    noisy = (1 - level) * clean + level * noise
    others = [latents.to(device) for latents in batch.latents[1:]]
    shape = batch.plan.shape
    text = torch.zeros(len(clean), shape.text_len, shape.text_dim, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        velocity = model(
            [noisy, *others],
            sigma * 1000,
            text,
            plan=batch.plan,
            cameras=batch.cameras.to(device),
        )
    loss: Tensor = (velocity.float() - (noise - clean)).pow(2).mean()
    return loss


@torch.no_grad()
def initialise(model: MV2VTransformer) -> None:
    """From scratch: cameras that speak at once, attention that begins local, a zero head.

    Equal constants in the spatial channels of queries and keys make their rotary product peak
    where row and column agree, so a target token first looks at its own place in every frame;
    every head half as sharply as the one before.
    """
    time_dim, *_ = axis_dims(model.config.attention_head_dim)
    spatial = torch.ones(model.config.num_attention_heads, model.config.attention_head_dim)
    spatial[:, :time_dim] = 0
    spatial *= 2.0 ** -torch.arange(len(spatial))[:, None]
    for name, parameter in model.named_parameters():
        if name.endswith("cam_encoder.weight"):
            nn.init.normal_(parameter, std=0.6)
        elif name.endswith(("attn1.to_q.bias", "attn1.to_k.bias")):
            parameter.copy_(spatial.flatten())
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)


def make_optimizers(
    model: MV2VTransformer, learning_rate: float, matrix_learning_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and name.startswith("blocks.") and "cam_" not in name
        (matrices if is_matrix else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=matrix_learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-memory", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of AdamW")
    parser.add_argument("--matrix-learning-rate", type=float, default=5e-3, help="of Muon")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device(args.device)
    join(device)
    recipe = Recipe(batch=args.batch, max_memory=args.max_memory)
    model = MV2VTransformer(TINY)
    initialise(model)
    model.to(device)
    optimizers = make_optimizers(model, args.learning_rate, args.matrix_learning_rate)
    loop = TrainingLoop(model, optimizers, LoopConfig(out=args.out, minutes=args.minutes))
    parallel = data_parallel(model)
    sampler = SceneSampler(load_latents(args.latents), TINY, recipe)

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        batch = sampler.draw(generator)
        own = own_generator(generator)
        loss = flow_loss(parallel, batch, own, flow_shift=recipe.flow_shift, device=device)
        return {"loss": loss}

    loop.run(step)
    leave()


if __name__ == "__main__":
    main()
