"""Train a small memory transformer on cached latents of procedural worlds.

`python -m mv2v_engine.training.dit --latents runs/latents --out runs/cameras --minutes 70`
`... --start-from FOLDER --out runs/memory` goes on from a checkpoint and teaches it memory.
`... --edits runs/short_latents --text runs/edit_text --out runs/edit` follows instructions in short
clips; with `--start-from FOLDER` and clips of many windows it goes on to their memory.
`... --start-from FOLDER --guide source=1.5` learns what guidance makes of that checkpoint.
`... --start-from FOLDER --flow-map` teaches it steps of any length, so that few are enough.

The recipe and the loss are those of full-size fine-tuning; here every parameter is trained.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from mv2v_engine.checkpoints import load_checkpoint
from mv2v_engine.config import TINY, TINY_EDIT, CameraAttention, SamplingConfig
from mv2v_engine.errors import TrainingError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.rope import axis_dims
from mv2v_engine.parser import Parser, count, positive
from mv2v_engine.training.command import run_command
from mv2v_engine.training.distributed import data_parallel, join, leave
from mv2v_engine.training.edit_latents import EditLatents
from mv2v_engine.training.edit_recipe import EditRecipe, EditSampler
from mv2v_engine.training.flow_map import DELTA, flow_map_step
from mv2v_engine.training.latents import LatentCache
from mv2v_engine.training.loop import LoopConfig, TrainingLoop
from mv2v_engine.training.losses import Sampler, flow_step
from mv2v_engine.training.odds import padded_text
from mv2v_engine.training.optimizers import Muon
from mv2v_engine.training.recipe import Recipe, SceneSampler
from mv2v_engine.training.teacher import Teacher, read_scales
from mv2v_engine.training.text import read_text_encoder
from mv2v_engine.training.throughput import compute_dtype, matmul_tflops

TINY_SAMPLING = SamplingConfig(
    num_frames=17,
    size=(96, 160),
    num_inference_steps=20,
    guidance_scale=1.0,
    flow_shift=3.0,
)
# From scratch, cameras first: the first turn of a session has no memory, a source of unknown
# camera stands still, and only beside sources that mostly do is the camera learned at all.
TINY_RECIPE = Recipe(
    batch=8, max_memory=4, no_memory=0.25, static_source=0.8, targets=4, flow_shift=3.0
)
# Then memory. So small a model takes what it can from the source and never reads the rest, unless
# many samples need it, and sources that move teach it to compare two cameras (profiling/LOG.md).
TINY_MEMORY_RECIPE = replace(
    TINY_RECIPE, no_memory=0.2, source_dropped=0.3, revisited=0.1, static_source=0.4
)
# Instructions first, on clips so short that there can be thousands of them, without memory.
TINY_EDIT_RECIPE = EditRecipe(
    batch=16, max_memory=4, no_memory=1.0, static_conditioning=0.0, flow_shift=3.0
)
# Then windows and memory; of full tokens, which only the ablation has, less than METHOD 12. Where
# words and source say enough, so small a model never reads its memory: half of it comes without.
TINY_EDIT_MEMORY_RECIPE = replace(
    TINY_EDIT_RECIPE,
    no_memory=0.25,
    uniform_tokenizer=0.1,
    static_conditioning=0.3,
    text_from_memory=0.5,
)


@torch.no_grad()
def initialise(model: MV2VTransformer) -> None:
    """Set weights to begin from: cameras count at once, attention begins local, the head is zero.

    Equal constants in the spatial channels of queries and keys make their rotary product peak
    where row and column agree, so a target token first looks at its own place in every frame;
    every head half as sharply as the one before.
    """
    config = model.config
    time_dim, *_ = axis_dims(config.rotary_dim)
    spatial = torch.ones(config.num_attention_heads, config.attention_head_dim)
    spatial[:, : config.attention_head_dim - config.rotary_dim + time_dim] = 0
    spatial *= 2.0 ** -torch.arange(len(spatial))[:, None]
    for name, parameter in model.named_parameters():
        if name.endswith("cam_encoder.weight"):
            nn.init.normal_(parameter, std=0.6)
        elif name.endswith(("attn1.to_q.bias", "attn1.to_k.bias")):
            parameter.copy_(spatial.flatten())
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)


def train_alone(model: MV2VTransformer, words: Sequence[str]) -> None:
    """Freeze all parameters in whose name none of the words is.

    Raises:
        TrainingError: a word is in no name.
    """
    names = [name for name, _ in model.named_parameters()]
    if missing := [word for word in words if not any(word in name for name in names)]:
        raise TrainingError(
            f"--train {missing[0]} is in no parameter's name; the model has {', '.join(names[:3])} "
            f"and {len(names) - 3} more"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(word in name for word in words))


def make_optimizers(
    model: MV2VTransformer, learning_rate: float, matrix_learning_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest; frozen ones are left out."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim == 2 and name.startswith("blocks.") and "cam_" not in name
        (matrices if is_matrix else others).append(parameter)
    return [
        Muon(matrices, lr=matrix_learning_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--latents", type=Path, nargs="+", help="scenes, to learn novel views")
    task.add_argument(
        "--edits", type=Path, nargs="+", help="encoded editing pairs, to learn long editing"
    )
    parser.add_argument(
        "--latent-frames",
        type=count,
        metavar="N",
        help="with --edits: the first N of every window alone, so that long clips train beside "
        "short ones",
    )
    parser.add_argument("--text", type=Path, help="with --edits: folder of training.text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--start-from",
        metavar="NAME_OR_PATH",
        help="a checkpoint that follows cameras, or instructions, to learn memory; if not given, "
        "from scratch",
    )
    parser.add_argument(
        "--flow-map",
        action="store_true",
        help="with --start-from: teach it the time to which a step goes, for turns of 1 to 4 steps",
    )
    parser.add_argument(
        "--delta",
        type=float,
        default=DELTA,
        help="with --flow-map: noise levels to either side, between which the derivative is taken; "
        "a small model changes in jumps from level to level, which more than 0.005 evens out",
    )
    parser.add_argument(
        "--guide",
        nargs="+",
        default=(),
        metavar="WHAT=SCALE",
        help="with --start-from: learn what guidance away from a lack of source, memory, text or "
        "training makes of that checkpoint, in place of the data's velocity; as source=1.5",
    )
    parser.add_argument(
        "--weaker", metavar="NAME_OR_PATH", help="with --guide training=SCALE: the weaker weights"
    )
    parser.add_argument(
        "--train",
        nargs="+",
        metavar="WORD",
        help="with --start-from: only parameters in whose name one of these words is, as attn1",
    )
    parser.add_argument("--minutes", type=positive, default=60)
    parser.add_argument(
        "--steps", type=count, help="in place of --minutes: what the schedule spans"
    )
    parser.add_argument(
        "--frames", type=int, nargs="+", help="with --latents: these latent frames of a clip alone"
    )
    parser.add_argument(
        "--camera-attention",
        choices=get_args(CameraAttention),
        help="with --latents, from scratch: PRoPE inside attention; a checkpoint has its own",
    )
    parser.add_argument("--no-memory", type=float, help="share of samples without memory")
    parser.add_argument(
        "--targets",
        type=count,
        default=TINY_RECIPE.targets,
        help="with --latents: target videos of one encoded static conditioning",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the blocks, anew for every shape that comes, which pays in long runs",
    )
    parser.add_argument("--batch", type=count, default=TINY_RECIPE.batch)
    parser.add_argument("--max-memory", type=int, default=TINY_RECIPE.max_memory)
    parser.add_argument("--learning-rate", type=positive, default=3e-3, help="of AdamW")
    parser.add_argument("--matrix-learning-rate", type=positive, default=5e-3, help="of Muon")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if (args.edits is None) != (args.text is None):
        parser.error("--edits and --text belong together")
    if args.latent_frames is not None and args.edits is None:
        parser.error("--latent-frames belongs to --edits")
    if args.camera_attention and (args.latents is None or args.start_from is not None):
        parser.error("--camera-attention belongs to --latents without --start-from")
    if not 0 < args.delta < 0.5:
        parser.error(f"--delta must lie between 0 and 0.5, got {args.delta:g}")
    if args.flow_map and args.start_from is None:
        parser.error("--flow-map belongs to --start-from: a flow is learned first, then its steps")
    if (args.guide or args.weaker or args.train) and args.start_from is None:
        parser.error("--guide, --weaker and --train belong to --start-from")

    torch.manual_seed(0)
    device = join(args.device)
    model = _model(args, device)
    sampler = _sampler(args, model, device)
    optimizers = make_optimizers(model, args.learning_rate, args.matrix_learning_rate)
    if args.compile:
        compile_blocks(model)
    config = LoopConfig(
        out=args.out,
        minutes=args.minutes if args.steps is None else math.inf,
        max_steps=args.steps,
        batch=args.batch,
        peak_tflops=matmul_tflops(device, compute_dtype(device)),
    )
    loop = TrainingLoop(model, optimizers, config)
    given = (data_parallel(model), sampler, device)
    teacher = _teacher(args, device)
    if args.flow_map:
        loop.run(flow_map_step(*given, lambda: loop.done, args.delta, teacher))
    else:
        loop.run(flow_step(*given, teacher))
    leave()


def compile_blocks(model: MV2VTransformer) -> None:
    """Compile every block, each shape anew; parameters and names stay."""
    torch._dynamo.config.recompile_limit = 512
    torch._dynamo.config.accumulated_recompile_limit = 4096
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=False)


def _model(args: argparse.Namespace, device: torch.device) -> MV2VTransformer:
    if args.start_from is not None:
        checkpoint = load_checkpoint(args.start_from, device=device, dtype=torch.float32)
        if args.flow_map:
            checkpoint.transformer.add_end_time()
        elif checkpoint.config.has_end_time:
            raise TrainingError(
                f"{args.start_from} is a flow map, which training on plain flow alone would undo; "
                "add --flow-map"
            )
        if args.train:
            train_alone(checkpoint.transformer, args.train)
        return checkpoint.transformer.train()
    shape = TINY if args.edits is None else TINY_EDIT
    model = MV2VTransformer(replace(shape, camera_attention=args.camera_attention or "none"))
    initialise(model)
    return model.to(device)


def _teacher(args: argparse.Namespace, device: torch.device) -> Teacher | None:
    """What --guide asks for: --start-from's weights, guided."""
    scales = read_scales(args.guide)
    if not scales and args.weaker is None:
        return None
    model, weaker = (
        None
        if name is None
        else load_checkpoint(name, device=device, dtype=torch.float32).transformer.eval()
        for name in (args.start_from, args.weaker)
    )
    assert model is not None
    empty_text = None
    if args.text is not None:
        text = read_text_encoder(args.text, model.config.text_len, torch.device("cpu"))
        empty_text = padded_text(text.encode("")[0], model.config).to(device)
    return Teacher(model, scales, weaker=weaker, empty_text=empty_text)


def _sampler(args: argparse.Namespace, model: MV2VTransformer, device: torch.device) -> Sampler:
    odds = {"batch": args.batch, "max_memory": args.max_memory}
    if args.edits is None:
        views = TINY_RECIPE if args.start_from is None else TINY_MEMORY_RECIPE
        if args.frames is not None:
            views = replace(views, frames=tuple(args.frames))
        if args.no_memory is not None:
            views = replace(views, no_memory=args.no_memory)
        views = replace(views, targets=args.targets, **odds)
        return SceneSampler(LatentCache(*args.latents, device=device), model.config, views)
    recipe = TINY_EDIT_RECIPE if args.start_from is None else TINY_EDIT_MEMORY_RECIPE
    if args.no_memory is not None:
        recipe = replace(recipe, no_memory=args.no_memory)
    text = read_text_encoder(args.text, model.config.text_len, torch.device("cpu"))
    return EditSampler(
        EditLatents(*args.edits, frames=args.latent_frames),
        model.config,
        replace(recipe, **odds),
        empty_text=text.encode("")[0],
    )


if __name__ == "__main__":
    run_command(main)
