"""Assemble a checkpoint folder from a training run: averaged weights, parts, logs, loss curves.

`python -m mv2v_engine.training.package --vae runs/vae/vae --dit runs/dit --out FOLDER`
`... --name tiny-edit --shared-vae ../tiny-nvs/vae --text runs/text --dit runs/edit --out FOLDER`

Weights that are a flow map are sampled as one, in FLOW_MAP_STEPS steps.

Weights are stored in float16 and computed in whatever the engine asks for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import load_file

from mv2v_engine.checkpoints.configs import Knowledge, transformer_config
from mv2v_engine.checkpoints.detect import detect
from mv2v_engine.checkpoints.load import load_checkpoint, save_checkpoint
from mv2v_engine.checkpoints.resolve import resolve
from mv2v_engine.config import TINY, TINY_EDIT, ConditioningMode, SamplingConfig, TransformerConfig
from mv2v_engine.errors import TrainingError
from mv2v_engine.files import copy_file, make_folder, save_json, save_tensors
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.latent_rgb import FILE as RGB_FILE
from mv2v_engine.parser import Parser
from mv2v_engine.synthetic.instructions import vocabulary
from mv2v_engine.training.command import run_command
from mv2v_engine.training.dit import TINY_EDIT_MEMORY_RECIPE, TINY_MEMORY_RECIPE, TINY_SAMPLING
from mv2v_engine.training.log import Curve, plot_curves, read_curves

# dB of the VAE that both share: hardly a held-out world is below, most real videos are
# (profiling/results/known_sources.jsonl)
LEAST_PSNR = 26.5
# steps of a turn of a flow map, if not asked for others
FLOW_MAP_STEPS = 4
_VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
_TEXT_PARTS = {"text_encoder": "config.json", "tokenizer": "tokenizer_config.json"}


@dataclass(frozen=True, kw_only=True)
class Model:
    """An embedded checkpoint's shape, sampler, trained modes and what it knows."""

    transformer: TransformerConfig
    sampling: SamplingConfig
    conditioning: tuple[ConditioningMode, ...]
    knowledge: Knowledge


MODELS = {
    "tiny-nvs": Model(
        transformer=TINY,
        sampling=TINY_SAMPLING,
        conditioning=TINY_MEMORY_RECIPE.conditioning,
        knowledge=Knowledge(source_psnr=LEAST_PSNR),
    ),
    "tiny-edit": Model(
        transformer=TINY_EDIT,
        sampling=TINY_SAMPLING,
        conditioning=TINY_EDIT_MEMORY_RECIPE.conditioning,
        knowledge=Knowledge(source_psnr=LEAST_PSNR, words=vocabulary()),
    ),
}


def package(
    name: str,
    dit: Path,
    out: Path,
    *,
    vae: Path | None = None,
    shared_vae: str | None = None,
    text: Path | None = None,
    conditioning: Sequence[ConditioningMode] | None = None,
    base: str | None = None,
) -> None:
    """Write the folder: transformer, VAE or another checkpoint's, text encoder and tokenizer.

    Args:
        name: one of MODELS.
        dit: a finished training's folder; where it kept no shape, the model's own is taken.
        vae: the VAE's folder, which is copied. shared_vae: a folder relative to `out` instead,
            which `mv2v.json` then names.
        text: a folder with text_encoder and tokenizer.
        conditioning: the modes that were trained; None takes the model's own.
        base: the checkpoint that it started from, which has what was frozen.

    Raises:
        TrainingError: a part is not where it was said to be, or weights that were frozen are.
        CheckpointError: what was written would not load.
    """
    model = MODELS[name]
    _require(dit / "checkpoint.pt", "a training's --out folder")
    text_parts = {} if text is None else {name: text / name for name in _TEXT_PARTS}
    for part, folder in text_parts.items():
        _require(folder / _TEXT_PARTS[part], "what mv2v_engine.training.text writes")
    if shared_vae is not None:
        _require((out / shared_vae).resolve() / "config.json", "a VAE's folder, relative to --out")
    state = torch.load(dit / "checkpoint.pt", weights_only=True, map_location="cpu")
    # what has no weights, such as camera_attention, is told by the run alone
    shape = transformer_config(state["shape"]) if state.get("shape") else model.transformer
    sampling = model.sampling
    if shape.has_end_time:
        sampling = replace(sampling, scheduler="flow_map", num_inference_steps=FLOW_MAP_STEPS)
    transformer = MV2VTransformer(shape)
    weights = {**state["model"], **state["ema"]}
    if frozen := transformer.state_dict().keys() - weights.keys():
        if base is None:
            raise TrainingError(
                f"{len(frozen)} parameters were frozen, as {min(frozen)}, and {dit} does not hold "
                "them; name the checkpoint that it started from as --base"
            )
        before = load_checkpoint(base, device="cpu", dtype=torch.float32).transformer.state_dict()
        weights |= {name: before[name] for name in frozen}
    transformer.load_state_dict(weights)
    make_folder(out)
    if vae is not None:
        _copy_vae(vae, out / "vae")
    for part, folder in text_parts.items():
        shutil.copytree(folder, out / part, copy_function=copy_file, dirs_exist_ok=True)
    save_checkpoint(
        out,
        transformer,
        shape,
        sampling,
        name,
        torch.float16,
        conditioning=conditioning or model.conditioning,
        vae=shared_vae,
        knowledge=model.knowledge,
    )
    resolve(detect(out)).require_loadable()


def _copy_vae(vae: Path, out: Path) -> None:
    _require(vae / _VAE_WEIGHTS, "a VAE's folder")
    half = {key: tensor.half() for key, tensor in load_file(vae / _VAE_WEIGHTS).items()}
    save_tensors(out / _VAE_WEIGHTS, half, {"format": "pt"})
    config = json.loads((vae / "config.json").read_text())
    # where it was trained is of no use to anyone who loads it
    config.pop("_name_or_path", None)
    save_json(out / "config.json", config)
    if (vae / RGB_FILE).is_file():
        copy_file(vae / RGB_FILE, out / RGB_FILE)


def _require(path: Path, expected: str) -> None:
    if not path.is_file():
        raise TrainingError(f"{path} does not exist; expected {expected}")


def plot_losses(vae_logs: list[Path], earlier: list[Path], dit_log: Path, path: Path) -> None:
    """Loss against step of all trainings, every stage from its own step 0."""
    panels = {
        "VAE: squared error and terms": {
            log.parent.name: read_curves(log)["loss"] for log in vae_logs
        },
        **{f"transformer, {log.parent.name}: flow loss": _losses(log) for log in earlier},
        "transformer: flow loss": _losses(dit_log),
    }
    plot_curves({title: curves for title, curves in panels.items() if curves}, path)


def _losses(log: Path) -> dict[str, Curve]:
    return {name: curve for name, curve in read_curves(log).items() if name.startswith("loss")}


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--name", choices=tuple(MODELS), default="tiny-nvs")
    vae = parser.add_mutually_exclusive_group(required=True)
    vae.add_argument("--vae", type=Path, help="the VAE's folder, copied")
    vae.add_argument("--shared-vae", metavar="PATH", help="another checkpoint's, relative to --out")
    parser.add_argument("--text", type=Path, help="a folder with text_encoder and tokenizer")
    parser.add_argument(
        "--base",
        metavar="NAME_OR_PATH",
        help="the checkpoint that the training started from: it has what --train left out",
    )
    parser.add_argument("--dit", type=Path, required=True, help="the transformer's --out folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--conditioning",
        nargs="+",
        choices=get_args(ConditioningMode),
        help="the modes that were trained, if not the recipe's",
    )
    parser.add_argument("--vae-logs", type=Path, nargs="*", default=[])
    parser.add_argument(
        "--earlier", type=Path, nargs="*", default=[], help="logs of the transformer's first stages"
    )
    args = parser.parse_args()
    log = args.dit / "log.csv"
    for each in [*args.vae_logs, *args.earlier, log]:
        read_curves(each)
    package(
        args.name,
        args.dit,
        args.out,
        vae=args.vae,
        shared_vae=args.shared_vae,
        text=args.text,
        conditioning=args.conditioning,
        base=args.base,
    )
    plot_losses(args.vae_logs, args.earlier, log, args.out / "loss.png")
    for earlier in [*args.vae_logs, *args.earlier]:
        copy_file(earlier, args.out / f"{earlier.parent.name}_training_log.csv")
    copy_file(log, args.out / "training_log.csv")


if __name__ == "__main__":
    run_command(main)
