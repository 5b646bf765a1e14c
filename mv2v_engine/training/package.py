"""Assemble a checkpoint folder from a training run: averaged weights, VAE, logs and loss curves.

`python -m mv2v_engine.training.package --vae runs/vae/vae --dit runs/dit --out FOLDER`

Weights are stored in float16 and computed in whatever the engine asks for.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from mv2v_engine.checkpoints.load import save_checkpoint
from mv2v_engine.config import TINY
from mv2v_engine.files import replacing, save_tensors
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.training.command import run_command
from mv2v_engine.training.dit import TINY_MEMORY_RECIPE, TINY_SAMPLING
from mv2v_engine.training.log import Curve, plot_curves, read_curves

_VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"


def package(vae: Path, dit: Path, out: Path, name: str) -> None:
    """Write the folder: transformer, VAE."""
    state = torch.load(dit / "checkpoint.pt", weights_only=True, map_location="cpu")
    model = MV2VTransformer(TINY)
    model.load_state_dict({**state["model"], **state["ema"]})
    out.mkdir(parents=True, exist_ok=True)
    (out / "vae").mkdir(exist_ok=True)
    weights = load_file(vae / _VAE_WEIGHTS)
    half = {key: tensor.half() for key, tensor in weights.items()}
    save_tensors(out / "vae" / _VAE_WEIGHTS, half, {"format": "pt"})
    config = json.loads((vae / "config.json").read_text())
    # where it was trained is of no use to anyone who loads it
    config.pop("_name_or_path", None)
    with replacing(out / "vae" / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")
    conditioning = TINY_MEMORY_RECIPE.conditioning
    save_checkpoint(out, model, TINY, TINY_SAMPLING, name, torch.float16, conditioning=conditioning)


def plot_losses(vae_logs: list[Path], earlier: list[Path], dit_log: Path, path: Path) -> None:
    """Loss against step of both trainings, every stage from its own step 0."""
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--dit", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="tiny-nvs")
    parser.add_argument("--vae-logs", type=Path, nargs="*", default=[])
    parser.add_argument(
        "--earlier", type=Path, nargs="*", default=[], help="logs of the transformer's first stages"
    )
    args = parser.parse_args()
    package(args.vae, args.dit, args.out, args.name)
    plot_losses(args.vae_logs, args.earlier, args.dit / "log.csv", args.out / "loss.png")
    shutil.copyfile(args.dit / "log.csv", args.out / "training_log.csv")
    for log in [*args.vae_logs, *args.earlier]:
        shutil.copyfile(log, args.out / f"{log.parent.name}_training_log.csv")


if __name__ == "__main__":
    run_command(main)
