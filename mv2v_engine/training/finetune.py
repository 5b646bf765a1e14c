"""Give a full-size base its memory: fine-tune a loaded checkpoint on encoded videos (METHOD 12).

`python -m mv2v_engine.training.finetune --checkpoint ReCamMaster.ckpt --latents DIR --out DIR`
`torchrun --nproc-per-node 8 -m mv2v_engine.training.finetune ...`

Self-attention, camera modules, tokenizers and mergers are trained in float32; everything else is
frozen in what the base has, bfloat16 on a GPU. Weights, gradients, average and moments are 10 GB
for the 1.3B model, no more than one step's activations, so processes keep whole copies
(DistributedDataParallel) and only gradients travel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mv2v_engine.checkpoints import load_checkpoint, save_checkpoint
from mv2v_engine.checkpoints.fetch import fetch_components
from mv2v_engine.checkpoints.load import Checkpoint
from mv2v_engine.config import MergerConfig, TransformerConfig
from mv2v_engine.errors import CheckpointError
from mv2v_engine.files import save_json
from mv2v_engine.models.block import Block
from mv2v_engine.models.camera_encoder import camera_encoder, camera_projector
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.merging import Merger
from mv2v_engine.parser import Parser, count, positive
from mv2v_engine.text import load_text_encoder
from mv2v_engine.training.command import run_command
from mv2v_engine.training.distributed import (
    data_parallel,
    from_first,
    join,
    leave,
    rank,
    world_size,
)
from mv2v_engine.training.latents import LatentCache
from mv2v_engine.training.loop import LoopConfig, TrainingLoop
from mv2v_engine.training.losses import Sampler, flow_step
from mv2v_engine.training.recipe import Recipe, SceneSampler
from mv2v_engine.training.text import trim_text
from mv2v_engine.training.throughput import compute_dtype, matmul_tflops
from mv2v_engine.vae import weights_fingerprint

_TRAINED_IN_BLOCK = ("attn1", "projector", "cam_encoder")
_TRAINED_MODULES = ("tokenizers", "mergers")


def is_trained(name: str) -> bool:
    """Whether fine-tuning moves a parameter: METHOD 12's list, by the model's names."""
    parts = name.split(".")
    if parts[0] == "blocks":
        return parts[2] in _TRAINED_IN_BLOCK
    return parts[0] in _TRAINED_MODULES


def prepare(
    model: MV2VTransformer, is_trained: Callable[[str], bool] = is_trained
) -> list[nn.Parameter]:
    """Freeze what the recipe freezes; returns the parameters that it trains, in float32.

    Blocks keep their inputs alone for the backward pass. is_trained: tells by a parameter's name.
    """
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            trained.append(parameter)
    model.gradient_checkpointing = True
    return trained


@torch.no_grad()
def add_memory_modules(model: MV2VTransformer) -> TransformerConfig:
    """Complete a base with the modules that memory needs; returns its config afterwards.

    Cameras as ReCamMaster starts them (zero and identity), average pooling for mergers; the
    loader has made tokenizers already. Conditioning tokens take their own cameras (METHOD 5).
    """
    config, like = model.config, model.patch_embedding.weight

    def placed(module: nn.Module) -> nn.Module:
        return module.to(like.device, like.dtype)

    for block in model.blocks:
        assert isinstance(block, Block)
        if block.cam_encoder is None:
            block.cam_encoder = placed(camera_encoder(config.dim))  # type: ignore[assignment]
            block.projector = placed(camera_projector(config.dim))  # type: ignore[assignment]
    if config.merger is None:
        config = replace(config, merger=MergerConfig())
        assert config.merger is not None
        for index in config.merging_blocks:
            model.mergers[str(index)] = placed(Merger(config.dim, config.merger))
    model.config = replace(config, camera_conditioning="own")
    return model.config


def make_optimizer(trained: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW as ReCamMaster's training has it (BASE_MODELS 2.2)."""
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01)


def empty_text(checkpoint: Checkpoint, components: Path | None) -> Tensor | None:
    """Embedding [S', text_dim] of the empty prompt, where there is a text encoder."""
    text_path, tokenizer_path = checkpoint.text_path, checkpoint.tokenizer_path
    if components is not None:
        given = fetch_components(components, ("text_encoder", "tokenizer"))
        text_path, tokenizer_path = given.text_encoder, given.tokenizer
    if text_path is None or tokenizer_path is None:
        return None
    encoder = load_text_encoder(
        text_path,
        tokenizer_path,
        max_length=checkpoint.config.text_len,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )
    return trim_text(encoder.encode(""))[0]


def frozen_fingerprint(model: nn.Module) -> str:
    """Identity of the frozen weights: what the trained ones belong to, and are not saved with."""
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    return weights_fingerprint(frozen)


def record_run(out: Path, record: dict[str, Any]) -> None:
    """Write `run.json`; a folder goes on with the base that it began with.

    Args:
        record: holds "base" and "frozen_weights", its name and fingerprint.

    Raises:
        CheckpointError: the folder's trained weights belong to another base.
    """
    path = out / "run.json"
    if path.exists():
        try:
            began = json.loads(path.read_text(encoding="utf-8"))
            base, frozen = began["base"], began["frozen_weights"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}), so the base of this training is unknown; delete "
                f"it if that is {record['base']}, or give another --out"
            ) from error
        if frozen != record["frozen_weights"]:
            raise CheckpointError(
                f"{out} fine-tunes {base}, whose frozen weights differ from those of "
                f"{record['base']}; give the same --checkpoint, or another --out"
            )
    if rank() == 0:
        save_json(path, record)


def run(
    model: MV2VTransformer,
    optimizer: torch.optim.Optimizer,
    config: LoopConfig,
    sampler: Sampler,
    device: torch.device,
) -> bool:
    """Train a prepared model to the end, and part from the other processes.

    Returns:
        whether this is the process that saves it; there it has the averaged weights.
    """
    loop = TrainingLoop(model, [optimizer], config)
    loop.run(flow_step(data_parallel(model), sampler, device))
    if is_first := leave():
        model.load_state_dict(loop.averaged())
    return is_first


def _say(*lines: str) -> None:
    if rank() == 0:
        print("\n".join(lines), flush=True)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", required=True, metavar="NAME_OR_PATH")
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--components", type=Path, help="text_encoder and tokenizer from here")
    parser.add_argument("--rename", type=Path, help="names that the checkpoint leaves open")
    parser.add_argument("--steps", type=count, default=2000)
    parser.add_argument("--minutes", type=positive, default=math.inf)
    parser.add_argument("--batch", type=count, default=1, help="samples of one process at once")
    parser.add_argument("--accumulate", type=count, default=1, help="batches of one step")
    parser.add_argument("--max-memory", type=int, default=Recipe().max_memory)
    parser.add_argument("--learning-rate", type=positive, default=1e-4)
    parser.add_argument("--save-minutes", type=positive, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = join(args.device)
    recipe = Recipe(batch=args.batch, max_memory=args.max_memory)
    cache = LatentCache(args.latents)
    base = load_checkpoint(
        args.checkpoint,
        device=device,
        dtype=compute_dtype(device),
        rename=args.rename,
        with_components=args.components is None,
    )
    model = base.transformer.train()
    shape = add_memory_modules(model)
    trained = prepare(model)
    text = None
    if not cache.has_captions:
        # one process loads the encoder: it is larger than the transformer
        text = from_first(lambda: empty_text(base, args.components))
    sampler = SceneSampler(cache, shape, recipe, empty_text=text)
    record_run(
        args.out,
        {
            "base": args.checkpoint,
            "frozen_weights": frozen_fingerprint(model),
            "recipe": asdict(recipe),
            "accumulate": args.accumulate,
            "learning_rate": args.learning_rate,
            "processes": world_size(),
            "device": args.device,
        },
    )
    words = "all with text"
    if not cache.has_captions:
        without = "zeros, for want of a text encoder" if text is None else "the empty prompt's"
        words = f"some without text: they get {without}"
    size = sum(parameter.numel() for parameter in trained)
    _say(
        *base.report.lines(),
        f"trains {size:,} of {sum(p.numel() for p in model.parameters()):,} parameters",
        f"{len(cache)} scenes, {words}",
    )
    config = LoopConfig(
        out=args.out,
        minutes=args.minutes,
        max_steps=args.steps,
        save_seconds=60 * args.save_minutes,
        batch=args.batch,
        accumulate=args.accumulate,
        peak_tflops=matmul_tflops(device, compute_dtype(device)),
    )
    if run(model, make_optimizer(trained, args.learning_rate), config, sampler, device):
        name = f"{base.name}-memory"
        save_checkpoint(
            args.out / "model", model, shape, base.sampling, name, torch.bfloat16,
            conditioning=recipe.conditioning,
        )  # fmt: skip
        print(f"wrote {args.out / 'model'}: the averaged weights; run with --checkpoint")


if __name__ == "__main__":
    run_command(main)
