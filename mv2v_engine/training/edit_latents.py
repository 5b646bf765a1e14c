"""Editing pairs as latents, window by window, so that training never runs the VAE.

`python -m mv2v_engine.training.edit_latents --edits runs/edits --vae VAE --text runs/edit_text
--out runs/edit_latents` encodes them; several processes may share a folder, each with its shard.

W windows of a clip, C F H W latents, S' text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mv2v_engine.errors import TrainingError
from mv2v_engine.files import save_tensors
from mv2v_engine.parallel.device import usable_device
from mv2v_engine.parser import Parser, count
from mv2v_engine.synthetic.edit_worlds import WINDOW
from mv2v_engine.training.command import run_command, shard
from mv2v_engine.training.edits import RenderedEdits
from mv2v_engine.training.stored import reading, stored_in
from mv2v_engine.training.text import read_text_encoder, trim_text
from mv2v_engine.vae import VideoVAE, load_vae

_TENSORS = ("source", "edited", "mask", "text")


@dataclass(frozen=True, eq=False)
class EncodedPair:
    """source, edited: float16 [W, C, F, H, W]. mask: float16 [W, F, H, W], the share of a latent
    cell's pixels that is edited, at most over its frames. text: bfloat16 [S', text_dim]. ends:
    float16 [W, C, F, H, W], the windows as memory where they are no longer whole."""

    source: Tensor
    edited: Tensor
    mask: Tensor
    text: Tensor
    ends: Tensor | None = None

    @property
    def remembered(self) -> Tensor:
        """The edited windows as memory, [W, C, F, H, W]."""
        return self.edited if self.ends is None else self.ends

    @property
    def num_windows(self) -> int:
        return len(self.source)


class EditLatents:
    """Folders of encoded pairs, all in memory.

    Args:
        frames: how many latent frames from a window's beginning are kept, all by default. The VAE
            is causal: they are what the window's first 1 + 4 (frames - 1) pixel frames encode to.
            As memory its last ones are kept, which are near the next window's first in time.

    Raises:
        TrainingError: nothing there, a damaged file, windows shorter than `frames`, or clips of
            different shapes.
    """

    def __init__(self, *folders: Path, frames: int | None = None) -> None:
        paths = [path for f in folders for path in stored_in(f, "edit", "edit_latents")]
        self.pairs = tuple(_beginning(_read(path), frames, path) for path in paths)
        shapes = {
            (tuple(pair.source.shape[1:]), pair.text.shape[1]): path
            for pair, path in zip(self.pairs, paths, strict=True)
        }
        if len(shapes) > 1:
            listed = "; ".join(f"{path.name} {list(shape)}" for (shape, _), path in shapes.items())
            raise TrainingError(
                f"clips of different shapes cannot be mixed ({listed}); encode each into a folder "
                "of its own, or train on as many latent frames of each as the shortest has"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of every window."""
        channels, frames, rows, columns = self.pairs[0].source.shape[1:]
        return channels, frames, rows, columns


def latent_mask(mask: Tensor, vae: VideoVAE) -> Tensor:
    """A mask [T, height, width] on the latent grid, float32 [F, H, W].

    The first latent frame is of one pixel frame, every other one of `temporal_stride`.
    """
    _, _, rows, columns = vae.latent_shape(len(mask), (mask.shape[1], mask.shape[2]))
    share = F.adaptive_avg_pool2d(mask[:, None].float(), (rows, columns))[:, 0]
    rest = share[1:].unflatten(0, (-1, vae.temporal_stride)).amax(1)
    return torch.cat([share[:1], rest])


def _encoded(frames: Tensor, vae: VideoVAE) -> Tensor:
    return torch.stack([vae.encode(window).cpu() for window in frames.split(WINDOW)]).half()


def _read(path: Path) -> EncodedPair:
    with reading(path, "encoded editing pair", "edit_latents") as file:
        pair = EncodedPair(*map(file.get_tensor, _TENSORS))
        cells, shape = (pair.num_windows, *pair.source.shape[2:]), pair.source.shape
        if len(shape) != 5 or pair.edited.shape != shape or pair.mask.shape != cells:
            listed = {name: list(getattr(pair, name).shape) for name in _TENSORS}
            raise ValueError(f"its tensors do not belong together: {listed}")
    return pair


def _beginning(pair: EncodedPair, frames: int | None, path: Path) -> EncodedPair:
    if frames is None:
        return pair
    longest = pair.source.shape[2]
    if not 1 <= frames <= longest:
        raise TrainingError(
            f"{path} has {longest} latent frames a window, {frames} were asked for; "
            f"ask for 1 to {longest}"
        )
    kept = {
        "source": pair.source[:, :, :frames],
        "edited": pair.edited[:, :, :frames],
        "mask": pair.mask[:, :frames],
        "ends": pair.edited[:, :, longest - frames :],
    }
    return replace(pair, **{name: t.contiguous() for name, t in kept.items()})


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--edits", type=Path, required=True, help="of mv2v_engine.training.edits")
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="of mv2v_engine.training.text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--shard", type=shard, default="0/1", help="i/n: every n-th clip from the i-th"
    )
    parser.add_argument("--text-length", type=count, default=16, help="tokens of the transformer")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    device = usable_device(args.device)
    vae = load_vae(args.vae, device=device, dtype=torch.float32)
    text = read_text_encoder(args.text, args.text_length, device)
    source = RenderedEdits(args.edits)
    for name in tqdm(source.names[args.shard], unit="clip"):
        path = args.out / f"{name}.safetensors"
        if not path.exists():
            pair = source.load(name)
            masks = [latent_mask(mask, vae) for mask in pair.mask.split(WINDOW)]
            encoded = EncodedPair(
                source=_encoded(pair.source, vae),
                edited=_encoded(pair.edited, vae),
                mask=torch.stack(masks).half(),
                text=trim_text(text.encode(pair.prompt))[0].bfloat16(),
            )
            save_tensors(path, {n: getattr(encoded, n).contiguous() for n in _TENSORS})


if __name__ == "__main__":
    run_command(main)
