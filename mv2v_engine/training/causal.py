"""Make an editor causal, so that it edits a source as it comes: three stages of one training.

`python -m mv2v_engine.training.causal --edits runs/latents --text runs/text --start-from tiny-edit
--out runs/causal --minutes 90`

forcing: a block of latent frames sees the blocks before as clean as they were filmed, each at a
noise level of its own (teacher forcing, as CausVid's and Self-Forcing's first stage). No mask is
needed: a clip runs block after block over the very cache that a stream has, so that what is trained
is what is run, policy and positions included. map: the steps of a block become long
(`flow_map`). rollout: a block sees the blocks before as the model itself made them, so that its
errors do not grow; gradients end at a block, as in Self-Forcing (arXiv 2506.08009), and the filmed
block is the teacher, since a source on the channels leaves little else to be drawn.

Policy history trains the encoder of what left the window with all else; weights that have none get
one, which begins as its low-resolution branch (METHOD 17).

Every stage has a folder in --out and goes on where it was stopped; --stages names those that run.

B batch, T blocks of a batch, C F H W latents of a clip.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mv2v_engine.checkpoints import load_checkpoint, save_checkpoint
from mv2v_engine.checkpoints.configs import Base
from mv2v_engine.checkpoints.detect import weight_files
from mv2v_engine.checkpoints.load import Checkpoint
from mv2v_engine.config import HistoryConfig, StreamConfig, StreamPolicy
from mv2v_engine.errors import TrainingError
from mv2v_engine.files import file_digest
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.stream_cache import StreamCache
from mv2v_engine.parser import Parser, count, positive
from mv2v_engine.sampling.flow_match import listed_sigmas, stream_solver
from mv2v_engine.settings import add_settings, given
from mv2v_engine.tokens.plan import turn_plan
from mv2v_engine.training.command import run_command
from mv2v_engine.training.distributed import data_parallel, join, leave, own_generator
from mv2v_engine.training.dit import TINY_EDIT_RECIPE, make_optimizers, train_alone
from mv2v_engine.training.edit_latents import EditLatents
from mv2v_engine.training.edit_recipe import EditSampler, edit_weights
from mv2v_engine.training.flow_map import (
    DELTA,
    balanced,
    end_levels,
    longest_step,
    map_target,
)
from mv2v_engine.training.history import add_history
from mv2v_engine.training.loop import LoopConfig, TrainingLoop
from mv2v_engine.training.losses import Noised, squared_error
from mv2v_engine.training.odds import chance, pick
from mv2v_engine.training.recipe import Batch
from mv2v_engine.training.text import copy_text_parts, read_text_encoder
from mv2v_engine.training.throughput import compute_dtype

StageName = Literal["forcing", "map", "rollout"]
# each stage's share of all minutes or steps, as far as it runs
SHARES: dict[StageName, float] = {"forcing": 0.5, "map": 0.3, "rollout": 0.2}
# made for clips of five latent frames: what they hold goes through every place of the cache
TINY_STREAM = StreamConfig(
    block_frames=1, policy="sink", window=4, sink_frames=1, timesteps=(1000, 500)
)


# divides the latents of clips of 96x160
TINY_HISTORY = HistoryConfig(rates=("2x2x2",), channels=(32, 64, 128, 128), heads=4)


class ReturningSampler(EditSampler):
    """Draws clips that leave time out: windows of one edit in their order, one behind the other.

    What was seen in the first window comes back after any time, so that what a cache holds of long
    ago is worth reading. Of every later window the first latent frame is left out: it is encoded
    without a past, as only the first frame of a stream is.

    Args:
        windows: how many windows of an edit a clip has.

    Raises:
        TrainingError: no clip has so many windows.
    """

    def __init__(self, *args: Any, windows: int, **others: Any) -> None:
        super().__init__(*args, **others)
        self._windows = windows
        pairs = self.latents.pairs
        self._long = [index for index, pair in enumerate(pairs) if pair.num_windows >= windows]
        if not self._long:
            most = max(pair.num_windows for pair in pairs)
            raise TrainingError(
                f"no clip has {windows} windows, the longest of {len(pairs)} has {most}; lower "
                "--windows, or encode longer clips"
            )

    def draw(self, generator: torch.Generator) -> Batch:
        """One batch; everything follows from the generator."""
        generator, recipe, pairs = own_generator(generator), self.recipe, self.latents.pairs
        drawn = list[tuple[int, list[int]]]()
        for _ in range(recipe.batch):
            clip = pick(self._long, generator)
            order = torch.randperm(pairs[clip].num_windows, generator=generator)
            drawn.append((clip, order[: self._windows].sort().values.tolist()))
        target, source, mask = (
            torch.stack([_joined(getattr(pairs[clip], of), chosen) for clip, chosen in drawn])
            for of in ("edited", "source", "mask")
        )
        _, _, frames, rows, columns = target.shape
        texts = [
            self._empty_text if chance(recipe.text_dropped, generator) else self._texts[clip]
            for clip, _ in drawn
        ]
        return Batch(
            plan=turn_plan(self.shape, (frames, rows, columns), (), source=False, merge="off"),
            latents=[target],
            cameras=None,
            text=torch.stack(texts),
            source=source,
            weight=edit_weights(mask, recipe.edit_weight),
        )


def _joined(windows: Tensor, chosen: Sequence[int]) -> Tensor:
    """Windows [W, ..., F, H, W] one behind the other, float32 [..., F', H, W]."""
    first, *others = (windows[index] for index in chosen)
    return torch.cat([first, *(window[..., 1:, :, :] for window in others)], -3).float()


@dataclass(frozen=True, eq=False)
class _Block:
    """clean, source: [B, C, F, H, W] of a block. weight: [B, F, H, W] or None."""

    clean: Tensor
    source: Tensor
    weight: Tensor | None


class ClipForward:
    """The forwards of a clip's blocks, one after the other, over a stream's cache.

    The first one is the wrapped model's, which counts gradients over processes.
    """

    def __init__(self, model: nn.Module, batch: Batch, config: StreamConfig) -> None:
        self._next, self._text, self.config = model, batch.text, config
        own: Any = getattr(model, "module", model)
        self._own: MV2VTransformer = own
        _, _, _, rows, columns = batch.targets.shape
        self.cache = StreamCache(own.config, (rows, columns), config, is_trained=True)

    def begin_block(self) -> None:
        """Make room for the next block."""
        self._own.begin_block(self.cache)

    def __call__(
        self, latents: Tensor, source: Tensor, level: Tensor, end: Tensor | None = None
    ) -> Tensor:
        """The newest block's velocity [B, C, F, H, W]; its K and V are left in the cache.

        level, end: noise levels t and r [B].
        """
        model, self._next = self._next, self._own
        noisy = torch.cat([latents, source], 1)
        velocity: Tensor = model(
            [noisy],
            level * 1000,
            self._text,
            plan=self.cache.plan,
            stream=self.cache,
            end_timestep=None if end is None else end * 1000,
        )
        return velocity

    @torch.no_grad()
    def sampled(self, source: Tensor, generator: torch.Generator, flow_shift: float) -> Tensor:
        """The newest block as a stream makes it [B, C, F, H, W]."""
        config = self.config
        sigmas = listed_sigmas(config.timesteps, flow_shift if config.is_warped else None)
        solver = stream_solver(sigmas, generator, is_map=self._own.config.has_end_time)
        latents = torch.randn(source.shape, generator=generator).to(source.device)
        for index, timestep in enumerate(solver.timesteps):
            level = timestep.to(source.device).expand(len(source)) / 1000
            end = None if solver.ends is None else solver.ends[index].to(level).expand_as(level)
            velocity = self(latents, source, level, None if end is None else end / 1000)
            latents = solver.step(velocity.float(), index, latents)
        return latents


def causal_loss(
    model: nn.Module,
    batch: Batch,
    generator: torch.Generator,
    config: StreamConfig,
    *,
    flow_shift: float,
    longest: float | None = None,
    delta: float = DELTA,
    rolls_out: bool = False,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The loss of all blocks of a batch's clips, each at its own noise level.

    Args:
        longest: the largest step of a flow map; None trains plain flow. delta: as in `map_target`.
        rolls_out: blocks see what the model made of those before; else what was filmed.
        dtype: what products are computed in, by autocast.

    Raises:
        TrainingError: the clips have no two blocks, or no source beside the target.
    """
    batch = batch.to(device)
    errors, levels, ends = list[Tensor](), list[Tensor](), list[Tensor]()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        forward, blocks = ClipForward(model, batch, config), list(_blocks(batch, config))
        for block in blocks:
            forward.begin_block()
            noised = Noised.drawn(block.clean, generator, flow_shift)
            level = end = noised.level
            if longest is not None:
                end = end_levels(noised, generator, longest=longest, flow_shift=flow_shift)
            told = None if longest is None else end
            mean = forward(noised.latents, block.source, level, told)
            wanted = noised.velocity
            if bool((end < level).any()):
                again = _again(forward, block, end)
                wanted = map_target(again, noised.latents, wanted, level, end, delta)
            errors.append(squared_error(mean, wanted, block.weight).flatten(1).mean(1))
            levels.append(level)
            ends.append(end)
            if block is not blocks[-1]:
                _leave(forward, block, generator, flow_shift if rolls_out else None)
    error = torch.cat(errors)
    if longest is None:
        return {"loss": error.mean()}
    return balanced(error, torch.cat(levels), torch.cat(ends))


def _again(forward: ClipForward, block: _Block, end: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A map's velocities to these ends of latents and levels, both twice as many, untrained."""

    @torch.no_grad()
    def run(latents: Tensor, levels: Tensor) -> Tensor:
        halves = zip(latents.chunk(2), levels.chunk(2), strict=True)
        return torch.cat([forward(x, block.source, level, end) for x, level in halves])

    return run


def _leave(
    forward: ClipForward, block: _Block, generator: torch.Generator, rolls_out: float | None
) -> None:
    """Leave K and V of a block in the cache, as later ones will see it: clean.

    rolls_out: the flow shift with which the model makes it; None takes the filmed one, and trains
    what is left.
    """
    clean = block.clean
    if rolls_out is not None:
        clean = forward.sampled(block.source, generator, rolls_out)
    with torch.set_grad_enabled(rolls_out is None):
        forward(clean, block.source, clean.new_zeros(len(clean)))


def _blocks(batch: Batch, config: StreamConfig) -> Iterator[_Block]:
    """The clips' blocks, without frames at the end that fill none."""
    size, frames = config.block_frames, batch.targets.shape[2]
    if batch.source is None or frames < 2 * size:
        raise TrainingError(
            f"causal training takes clips of two blocks at least, with a source: got {frames} "
            f"latent frames for blocks of {size}; lower --block-frames, or encode longer clips"
        )
    for first in range(0, frames - size + 1, size):
        place = slice(first, first + size)
        weight = None if batch.weight is None else batch.weight[:, place]
        yield _Block(batch.targets[:, :, place], batch.source[:, :, place], weight)


def causal_model(checkpoint: Checkpoint) -> MV2VTransformer:
    """A bidirectional editor's weights as a causal one's; without what only memory uses.

    Its source is on the target's channels already, as live editing has it, so all weights stay.

    Raises:
        TrainingError: it is no such editor.
    """
    shape = checkpoint.config
    if not shape.source_channels or shape.has_camera:
        raise TrainingError(
            f"{checkpoint.name} cannot be made causal: expected an editor whose source is on the "
            f"target's channels, without cameras, got source_channels {shape.source_channels} and "
            f"camera_conditioning {shape.camera_conditioning!r}"
        )
    model = MV2VTransformer(replace(shape, tokenizers=(), merger=None))
    weights = checkpoint.transformer.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    device = checkpoint.transformer.patch_embedding.weight.device
    return model.to(device, torch.float32).train()


def add_stream_history(
    model: MV2VTransformer, history: HistoryConfig, stream: StreamConfig
) -> None:
    """Give a model the history encoder that a stream asks for, unless it has it.

    history: the shape of a new encoder; its rate holds where neither stream nor model has one.

    Raises:
        TrainingError: the model's encoders are of another shape.
    """
    had = model.config.history
    rate = stream.history_rate or (had or history).rates[0]
    add_history(model, replace(had or history, rates=(rate,)))


def save_causal(
    out: Path,
    model: MV2VTransformer,
    base: Checkpoint,
    config: StreamConfig,
    dtype: torch.dtype,
    *,
    name: str,
    refers: bool = False,
) -> None:
    """Write a checkpoint folder that streams: weights, `stream`, the base's text parts; its VAE is
    named.

    refers: the base's folder is named, too, in place of what is in it: its text parts, and the
    parameters that are frozen. Of the others the blocks' matrices are stored in float8.
    """
    if not refers:
        copy_text_parts(base, out)
    vae = None if base.vae_path is None else os.path.relpath(base.vae_path, out.resolve())
    beneath, trained, matrices = None, None, list[str]()
    if refers:
        weights = weight_files(base.report.path)[-1]
        folder = os.path.relpath(weights.parent.resolve(), out.resolve())
        beneath = Base(folder, file_digest(weights))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = [
            name for name, p in trained.items() if p.ndim == 2 and name.startswith("blocks.")
        ]
    save_checkpoint(
        out,
        model,
        model.config,
        replace(base.sampling, guidance_scale=1.0, scheduler="euler"),
        name,
        dtype,
        vae=vae,
        knowledge=base.knowledge,
        stream=config,
        base=beneath,
        only=trained,
        eights=matrices,
    )


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--edits", type=Path, nargs="+", required=True, help="encoded editing pairs")
    add("--text", type=Path, required=True, help="folder of training.text")
    add("--start-from", required=True, metavar="NAME_OR_PATH", help="a bidirectional editor")
    add("--out", type=Path, required=True, help="a folder of each stage, and `model`")
    add("--name", help="of the model; the base's with -causal if not given")
    add(
        "--stages",
        nargs="+",
        choices=get_args(StageName),
        default=get_args(StageName),
        help="those that run, in their own order; all if not given",
    )
    add("--minutes", type=positive, default=60, help="of all stages together, default 60")
    add("--steps", type=count, help="of all stages together, in place of --minutes")
    add("--batch", type=count, default=TINY_EDIT_RECIPE.batch)
    add("--windows", type=count, default=1, help="of a clip, with what lies between them left out")
    add(
        "--policies",
        nargs="+",
        choices=get_args(StreamPolicy),
        help="each batch is trained under one of them; --policy alone if not given",
    )
    add(
        "--train",
        nargs="+",
        metavar="WORD",
        help="only parameters in whose name one of these words is, as attn1 or bias, and a history "
        "encoder's; the others stay the base's, and --out/model names it in place of holding them",
    )
    add("--warmup", type=count, default=100, help="steps of every stage until rates are whole")
    add("--learning-rate", type=positive, default=2e-3, help="of AdamW")
    add("--matrix-learning-rate", type=positive, default=4e-3, help="of Muon")
    add("--delta", type=float, default=DELTA, help="as --delta of training.dit")
    own = TINY_HISTORY
    add("--channels", type=count, nargs=4, default=own.channels, help="of a new history encoder")
    add("--heads", type=count, default=own.heads, help="of a new history encoder")
    add("--block-frames", type=count, metavar="N", help="latent frames of a block, 1 if not given")
    add("--timesteps", type=float, nargs="+", help="of a block, from 1000 down; 1000 500")
    add("--device", default="cpu")
    add_settings(parser, StreamConfig, has_defaults=False)
    args = parser.parse_args()
    fields = given(args, StreamConfig)
    if args.block_frames is not None:
        fields["block_frames"] = args.block_frames
    if args.timesteps is not None:
        fields["timesteps"] = tuple(args.timesteps)
    stream = replace(TINY_STREAM, **fields)

    torch.manual_seed(0)
    device = join(args.device)
    base = load_checkpoint(args.start_from, device=device, dtype=torch.float32)
    model, policies = causal_model(base), args.policies or [stream.policy]
    if "history" in policies:
        own = replace(own, channels=tuple(args.channels), heads=args.heads)
        add_stream_history(model, own, stream)
    if args.train:
        # a new encoder is in no base
        more = ["history_encoders"] if "history" in policies else []
        train_alone(model, [*args.train, *more])
    # memory is not read, and nothing else is left to draw
    recipe = replace(
        TINY_EDIT_RECIPE, batch=args.batch, no_memory=1.0, uniform_tokenizer=0.0, merging=0.0
    )
    text = read_text_encoder(args.text, model.config.text_len, torch.device("cpu"))
    latents, empty = EditLatents(*args.edits), text.encode("")[0]
    sampler = EditSampler(latents, model.config, recipe, empty_text=empty)
    if args.windows > 1:
        sampler = ReturningSampler(
            latents, model.config, recipe, empty_text=empty, windows=args.windows
        )
    stages = [name for name in get_args(StageName) if name in args.stages]
    for name in stages:
        _run_stage(name, stages, model, sampler, stream, args)
    if leave():
        name = args.name or f"{base.name}-causal"
        save_causal(
            args.out / "model",
            model,
            base,
            stream,
            torch.float16,
            name=name,
            refers=bool(args.train),
        )
        print(f"wrote {args.out / 'model'}: run stream SOURCE --checkpoint {args.out / 'model'}")


def _run_stage(
    name: StageName,
    stages: list[StageName],
    model: MV2VTransformer,
    sampler: EditSampler,
    stream: StreamConfig,
    args: argparse.Namespace,
) -> None:
    """Train a stage to its end, or find that it is there; the model has its averages then."""
    if name == "map":
        model.add_end_time()
    device, share = torch.device(args.device), SHARES[name] / sum(SHARES[each] for each in stages)
    config = LoopConfig(
        out=args.out / name,
        minutes=args.minutes * share if args.steps is None else math.inf,
        max_steps=None if args.steps is None else max(1, round(args.steps * share)),
        batch=args.batch,
        warmup_steps=args.warmup,
    )
    rates = args.learning_rate, args.matrix_learning_rate
    loop = TrainingLoop(model, make_optimizers(model, *rates), config)
    wrapped, policies = data_parallel(model), args.policies or [stream.policy]
    dtype, shift = compute_dtype(device), sampler.recipe.flow_shift

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        batch, longest = sampler.draw(generator), None
        policy = policies[int(torch.randint(len(policies), (), generator=generator))]
        if model.config.has_end_time:
            longest = longest_step(loop.done) if name == "map" else 1.0
        return causal_loss(
            wrapped,
            batch,
            own_generator(generator),
            replace(stream, policy=policy),
            flow_shift=shift,
            longest=longest,
            delta=args.delta,
            rolls_out=name == "rollout",
            device=device,
            dtype=dtype,
        )

    loop.run(step)
    model.load_state_dict(loop.averaged())


if __name__ == "__main__":
    run_command(main)
