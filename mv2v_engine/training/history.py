"""Train TinyHistory's encoder and low-rank updates of the blocks (METHOD 17), in two stages.

`python -m mv2v_engine.training.history --stage 1 --checkpoint tiny-edit --edits LATENTS --out OUT1`
`... --stage 2 --checkpoint OUT1/model --edits LATENTS --out OUT2`
`... --stage 1 --checkpoint tiny-nvs --latents LATENTS --out OUT1`

Of edits a history is the windows of a clip, of novel views (`--latents`) the videos that some
cameras of a scene took. Stage 1, frame query: of a history whose frames are drowned in noise but
for a few, these few are asked for by their numbers. Stage 2: the whole history is clean, and the
next window, or another camera's video, is asked for.
The updates are merged into the weights that are written.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mv2v_engine.checkpoints import load_checkpoint, save_checkpoint
from mv2v_engine.config import HistoryConfig, TransformerConfig
from mv2v_engine.errors import TrainingError
from mv2v_engine.models.attention import HistoryAttention
from mv2v_engine.models.block import Block
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.history import HistoryEncoder
from mv2v_engine.parser import Parser, count, positive
from mv2v_engine.shapes import HistoryBranches
from mv2v_engine.tokens.plan import Segment, TokenPlan, history_segments, turn_plan
from mv2v_engine.training import finetune
from mv2v_engine.training.command import run_command
from mv2v_engine.training.distributed import join, own_generator
from mv2v_engine.training.edit_latents import EditLatents
from mv2v_engine.training.edit_recipe import edit_weights
from mv2v_engine.training.latents import LatentCache
from mv2v_engine.training.loop import LoopConfig
from mv2v_engine.training.losses import Sampler, shifted
from mv2v_engine.training.low_rank import add_low_rank, merge_low_rank
from mv2v_engine.training.odds import chance, number, padded_text, pick
from mv2v_engine.training.recipe import Batch, Recipe, SceneSampler, Tracks, TrackSource
from mv2v_engine.training.text import copy_text_parts
from mv2v_engine.training.throughput import compute_dtype, matmul_tflops

# noise levels of masked frames
_MASK_LEVELS = (0.2, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryRecipe(Recipe):
    """The odds of both stages: `max_memory` counts the windows or videos of a history.

    stage: 1 or 2. rate: the rate of the history's tokens. whole_frames: how many at its end stage 2
    shows whole beside it, in half of the batches: the weights serve with them and without.
    text_from_memory, edit_weight: of edits, as `EditRecipe`'s; stage 2 alone.
    """

    stage: int = 1
    rate: str = "4x4x2"
    whole_frames: int = 0
    text_from_memory: float = 0.1
    edit_weight: float = 15.0


class HistorySampler:
    """Draws histories from encoded editing pairs; everything follows from the generator.

    Args:
        empty_text: [S', text_dim], the encoder's own of the empty prompt.

    Raises:
        TrainingError: no clip has windows enough, or the latents are not this model's.
        RequestError: the shortest history has no whole token of the rate.
    """

    def __init__(
        self,
        latents: EditLatents,
        shape: TransformerConfig,
        recipe: HistoryRecipe,
        *,
        empty_text: Tensor,
    ) -> None:
        self.latents, self.shape, self.recipe = latents, shape, recipe
        if shape.has_camera:
            raise TrainingError(
                "edited clips have no cameras, and this model's camera_conditioning is "
                f"{shape.camera_conditioning!r}; give videos with cameras, folders of "
                "training.latents, by --latents"
            )
        if latents.latent_shape[0] != shape.latent_channels:
            raise TrainingError(
                f"the latents have {latents.latent_shape[0]} channels, the transformer takes "
                f"{shape.latent_channels}; encode the clips with the VAE that belongs to it"
            )
        windows = [pair.num_windows - (recipe.stage == 2) for pair in latents.pairs]
        self._most = min(recipe.max_memory, max(windows))
        self._fewest = 2 if recipe.stage == 1 else 1
        if self._most < self._fewest:
            raise TrainingError(
                f"stage {recipe.stage} needs histories of {self._fewest} windows at least; the "
                f"longest clip has {max(windows)} for one, and at most {recipe.max_memory} "
                "(--max-windows) are taken; encode longer clips, or take more windows"
            )
        self._clips = {
            count: [clip for clip, own in enumerate(windows) if own >= count]
            for count in range(self._fewest, self._most + 1)
        }
        drawn_plan(shape, recipe, latents.latent_shape[1:], self._fewest, torch.Generator())
        self._empty_text = padded_text(empty_text, shape)
        self._texts = [padded_text(pair.text, shape) for pair in latents.pairs]

    def draw(self, generator: torch.Generator) -> Batch:
        """One batch of one plan; the plan is the same in all processes, the samples are not."""
        plan, asked = self.draw_plan(generator)
        own, (_, frames, *_) = own_generator(generator), self.latents.latent_shape
        recipe = self.recipe
        count, stage = plan.segments[1].grid[0] // frames, recipe.stage
        targets, histories, sources, texts, masks = [], [], [], [], []
        for _ in range(recipe.batch):
            clip = pick(self._clips[count], own)
            pair = self.latents.pairs[clip]
            first = number(0, pair.num_windows - count - (stage == 2), own)
            is_edit = stage == 2 or chance(0.5, own)
            shown = pair.edited if is_edit else pair.source
            history = _joined(shown[first : first + count])
            is_query = stage == 1
            histories.append(
                masked(history, asked, recipe.flow_shift, own) if is_query else history
            )
            if is_query:
                targets.append(history[:, asked])
                sources.append(torch.zeros_like(targets[-1]))
            else:
                targets.append(pair.edited[first + count].float())
                sources.append(pair.source[first + count].float())
                masks.append(pair.mask[first + count].float())
            is_told = is_edit and not chance(0.1 if is_query else recipe.text_from_memory, own)
            texts.append(self._texts[clip] if is_told else self._empty_text)
        past = torch.stack(histories)
        whole = [past[:, :, -s.grid[0] :] for s in plan.segments[2:]]
        return Batch(
            plan=plan,
            latents=[torch.stack(targets), past, *whole],
            cameras=None,
            text=torch.stack(texts),
            source=torch.stack(sources) if self.shape.source_channels else None,
            weight=edit_weights(torch.stack(masks), recipe.edit_weight) if masks else None,
        )

    def draw_plan(self, generator: torch.Generator) -> tuple[TokenPlan, list[int]]:
        """What `drawn_plan` gives, of so many windows as the clips have."""
        count = number(self._fewest, self._most, generator)
        return drawn_plan(self.shape, self.recipe, self.latents.latent_shape[1:], count, generator)


class ViewHistorySampler(SceneSampler):
    """Draws histories from encoded scenes: videos of some cameras one after the other, and at
    stage 2 the video of another one, with a source by `Recipe.source_dropped`.

    Args, Raises: as `SceneSampler`; and as `HistorySampler` for a rate.
    """

    def __init__(
        self,
        source: TrackSource,
        shape: TransformerConfig,
        recipe: HistoryRecipe,
        *,
        empty_text: Tensor | None = None,
    ) -> None:
        super().__init__(source, shape, recipe, empty_text=empty_text)
        self.recipe: HistoryRecipe = recipe
        drawn_plan(shape, recipe, self._grid, recipe.min_memory, torch.Generator())

    def draw(self, generator: torch.Generator) -> Batch:
        """One batch of one plan; the plan is the same in all processes, the samples are not."""
        recipe = self.recipe
        count = number(recipe.min_memory, recipe.max_memory, generator)
        plan, asked = drawn_plan(self.shape, recipe, self._grid, count, generator)
        own = own_generator(generator)
        has_source = any(segment.role == "source" for segment in plan.segments)
        videos, cameras, texts = [], [], []
        for _ in range(recipe.batch):
            sample = self._sample(count, 1, own)
            history, poses = _joined(sample.latents[2:]), self._cameras(sample)
            past, target, track = poses[2:].flatten(0, 1), sample.latents[0], poses[0]
            if recipe.stage == 1:
                target, track = history[:, asked], past[asked]
                history = masked(history, asked, recipe.flow_shift, own)
            elif has_source:
                history = recipe.perturbed(history, own)
            sources = [sample.latents[1]] if has_source else []
            whole = [s.grid[0] for s in plan.segments[2 + has_source :]]
            videos.append([target, *sources, history, *(history[:, -n:] for n in whole)])
            tracks = [track, poses[1], past, *(past[-n:] for n in whole)]
            # tracks are of one length: frames that no segment has are never read
            cameras.append(pad_sequence(tracks, batch_first=True))
            texts.append(
                self._empty_text if sample.text is None else padded_text(sample.text, self.shape)
            )
        latents = [torch.stack(each) for each in zip(*videos, strict=True)]
        return Batch(plan, latents, torch.stack(cameras), torch.stack(texts))

    def _sample(self, memory: int, targets: int, generator: torch.Generator) -> Tracks:
        """Draw as `SceneSampler` does; a camera that returns does so to any of the videos."""
        sample = super()._sample(memory, targets, generator)
        if not self.recipe.revisited:
            return sample
        order = torch.cat([torch.arange(2), 2 + torch.randperm(memory, generator=generator)])
        return Tracks(sample.latents[order], sample.cameras[order], sample.text)

    def _by_relevance(self, tracks: Tracks, memory: int) -> Tracks:
        """The videos as they come: a session's history is in the order of its turns."""
        return tracks


def drawn_plan(
    shape: TransformerConfig,
    recipe: HistoryRecipe,
    grid: tuple[int, int, int],
    count: int,
    generator: torch.Generator,
) -> tuple[TokenPlan, list[int]]:
    """A plan by the odds, and the frames of the history that stage 1 asks for, in order.

    grid: of one of the history's `count` windows or videos.
    """
    length = count * grid[0]
    asked = sorted(torch.randperm(length, generator=generator)[: grid[0]].tolist())
    is_static, is_query = chance(recipe.static_conditioning, generator), recipe.stage == 1
    whole = recipe.whole_frames if not is_query and chance(0.5, generator) else 0
    if shape.has_camera and not is_query:
        plan = turn_plan(
            shape,
            grid,
            (2,) * count,
            source=not chance(recipe.source_dropped, generator),
            merge="off",
            conditioning="static" if is_static else "joint",
            history=recipe.rate,
            history_frames=whole,
        )
        return plan, asked
    past = tuple(history_segments(shape, (length, *grid[1:]), recipe.rate, whole))
    return query_plan(shape, grid, past, asked if is_query else None, is_static=is_static), asked


def masked(
    history: Tensor, asked: list[int], flow_shift: float, generator: torch.Generator
) -> Tensor:
    """A history [C, F, H, W] with noise in all but the frames that are asked for."""
    low, high = _MASK_LEVELS
    drawn = torch.randn((), generator=generator).sigmoid()
    level = low + (high - low) * shifted(drawn, flow_shift)
    noise = torch.randn(history.shape, generator=generator)
    found = (1 - level) * history + level * noise
    found[:, asked] = history[:, asked]
    return found


def query_plan(
    shape: TransformerConfig,
    grid: tuple[int, int, int],
    past: tuple[Segment, ...],
    asked: list[int] | None,
    *,
    is_static: bool = False,
) -> TokenPlan:
    """A target beside a history: the frames of it that are asked for, or what comes after it.

    grid: the target's. past: the history's segments. asked: numbers of frames in the history,
    which the target's own positions say; None: the target follows.
    """
    length = past[0].grid[0]
    taus = () if asked is None else tuple(number - length for number in asked)
    return TokenPlan(
        segments=(
            Segment(role="target", grid=grid, taus=taus, camera=0 if shape.has_camera else None),
            *past,
        ),
        shape=shape,
        merge="off",
        conditioning="static" if is_static else "joint",
    )


def _joined(windows: Tensor) -> Tensor:
    """Windows [N, C, F, H, W] one after the other: float32 [C, N F, H, W]."""
    return windows.float().transpose(0, 1).flatten(1, 2)


def add_history(model: MV2VTransformer, history: HistoryConfig) -> TransformerConfig:
    """Give a transformer history encoders, beside those that it has; its config afterwards.

    Raises:
        TrainingError: those that it has are of another shape.
        RequestError: its conditioning takes the target's camera, which says nothing of a history's.
    """
    had = model.config.history
    if had is not None and replace(had, rates=history.rates) != history:
        raise TrainingError(
            f"this model has history encoders of {had}, asked was {history}; leave --channels, "
            "--heads and --branches out"
        )
    rates = had.rates if had is not None else ()
    rates += tuple(rate for rate in history.rates if rate not in rates)
    model.config = replace(model.config, history=replace(history, rates=rates))
    with model.patch_embedding.weight.device:
        for rate in rates:
            if rate not in model.history_encoders:
                model.history_encoders[rate] = encoder = HistoryEncoder(model.config, rate)
                encoder.begin_as(model.patch_embedding)
        for index in history.cross_attention:
            block, config = cast(Block, model.blocks[index]), model.config
            if block.attn_history is None:
                block.attn_history = HistoryAttention(
                    config.dim, config.num_attention_heads, config.eps, history.channels[-1]
                )
    return model.config


def is_trained(name: str) -> bool:
    """Whether a parameter moves: the encoders', what attends to them, and the updates'."""
    marks = ("history_encoders.", ".attn_history.", ".parametrizations.weight.0.")
    return any(mark in name for mark in marks)


def prepare(model: MV2VTransformer, rank: int) -> list[nn.Parameter]:
    """Freeze all but the history encoders, what attends to them, and low-rank updates, which are
    added; those, as `finetune.prepare` makes them ready.
    """
    add_low_rank(model, rank)
    return finetune.prepare(model, is_trained)


def make_optimizer(trained: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay, as updates of low rank are trained."""
    return torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--checkpoint", required=True, metavar="NAME_OR_PATH")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--edits", type=Path, nargs="+", help="folders of training.edit_latents")
    data.add_argument(
        "--latents", type=Path, nargs="+", help="folders of training.latents, of novel views"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--components", type=Path, help="text_encoder and tokenizer from here")
    parser.add_argument("--rate", default="4x4x2", help="of the history's tokens")
    parser.add_argument(
        "--channels",
        type=count,
        nargs=4,
        default=HistoryConfig().channels,
        help="of the convolutions",
    )
    parser.add_argument("--heads", type=count, default=HistoryConfig().heads)
    parser.add_argument("--branches", choices=get_args(HistoryBranches), default="both")
    parser.add_argument(
        "--cross-attention",
        type=int,
        nargs="+",
        default=(),
        metavar="BLOCK",
        help="none by default",
    )
    parser.add_argument("--rank", type=count, default=128, help="of the blocks' updates")
    parser.add_argument(
        "--whole-frames", type=int, default=0, help="of a history's end, whole, in half of stage 2"
    )
    parser.add_argument(
        "--text-from-memory",
        type=float,
        default=HistoryRecipe().text_from_memory,
        help="share of stage 2's edits that have no text: what was edited is read from the history",
    )
    parser.add_argument(
        "--max-windows", type=count, help="or videos of a history; 8, of --latents 6"
    )
    parser.add_argument("--batch", type=count, default=8)
    parser.add_argument("--steps", type=count, help="in place of --minutes")
    parser.add_argument("--minutes", type=positive, default=60)
    parser.add_argument("--flow-shift", type=positive, help="of the noise; the checkpoint's if not")
    parser.add_argument("--learning-rate", type=positive, default=1e-3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.whole_frames < 0:
        parser.error(f"--whole-frames must be at least 0, got {args.whole_frames}")
    if not 0 <= args.text_from_memory <= 1:
        parser.error(f"--text-from-memory must be a share from 0 to 1, got {args.text_from_memory}")

    torch.manual_seed(0)
    device = join(args.device)
    base = load_checkpoint(args.checkpoint, device=device, dtype=compute_dtype(device))
    model, had = base.transformer.train(), base.config.history
    if args.stage == 2 and (had is None or args.rate not in had.rates):
        raise TrainingError(
            f"stage 2 goes on with the encoder that stage 1 has trained, and {args.checkpoint} has "
            f"none of rate {args.rate}; give the model that stage 1 wrote"
        )
    history = HistoryConfig(
        rates=(args.rate,),
        channels=tuple(args.channels),
        heads=args.heads,
        branches=args.branches,
        cross_attention=tuple(args.cross_attention),
    )
    shape = add_history(model, history if had is None else replace(had, rates=(args.rate,)))
    trained = prepare(model, args.rank)
    shift = base.sampling.flow_shift if args.flow_shift is None else args.flow_shift
    most = args.max_windows
    if most is None:
        most = 8 if args.edits else Recipe().max_memory
    recipe = HistoryRecipe(
        batch=args.batch,
        max_memory=most,
        flow_shift=shift,
        stage=args.stage,
        rate=args.rate,
        whole_frames=args.whole_frames,
        text_from_memory=args.text_from_memory,
    )
    text = finetune.empty_text(base, args.components)
    if text is None:
        text = torch.zeros(1, shape.text_dim)
    sampler: Sampler = (
        HistorySampler(EditLatents(*args.edits), shape, recipe, empty_text=text)
        if args.edits
        else ViewHistorySampler(LatentCache(*args.latents), shape, recipe, empty_text=text)
    )
    # what is refused above has claimed no folder
    finetune.record_run(
        args.out,
        {
            "base": args.checkpoint,
            "frozen_weights": finetune.frozen_fingerprint(model),
            "stage": args.stage,
            "rate": args.rate,
            "rank": args.rank,
            "learning_rate": args.learning_rate,
            "whole_frames": args.whole_frames,
            "text_from_memory": args.text_from_memory,
        },
    )
    config = LoopConfig(
        out=args.out,
        minutes=args.minutes if args.steps is None else math.inf,
        max_steps=args.steps,
        batch=args.batch,
        peak_tflops=matmul_tflops(device, compute_dtype(device)),
    )
    optimizer = make_optimizer(trained, args.learning_rate)
    if finetune.run(model, optimizer, config, sampler, device):
        merge_low_rank(model)
        folder = args.out / "model"
        if args.components is None:  # else they are as large as a base, and known to the user
            copy_text_parts(base, folder)
        vae = None if base.vae_path is None else os.path.relpath(base.vae_path, folder)
        name = f"{base.name.removesuffix('-history')}-history"
        save_checkpoint(
            folder, model, shape, base.sampling, name, torch.bfloat16,
            conditioning=recipe.conditioning, vae=vae,
        )  # fmt: skip
        print(f"wrote {folder}: the averaged weights; run with --checkpoint and --history")


if __name__ == "__main__":
    run_command(main)
