"""Editing pairs rendered ahead, one safetensors file a clip.

`python -m mv2v_engine.training.edits --out runs/edits --clips 0:2000` renders them; several
processes may share a folder if their ranges do not overlap, and what is there is kept. Short clips
(`--frames 5`) show more instructions for the same work, whole ones have a memory.

T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from tqdm import tqdm

from mv2v_engine.files import make_folder, save_tensors
from mv2v_engine.parallel.device import usable_device
from mv2v_engine.parser import Parser, count
from mv2v_engine.synthetic.edit_clips import make_edit_clip
from mv2v_engine.synthetic.edit_worlds import WINDOW
from mv2v_engine.synthetic.worlds import Grade
from mv2v_engine.training.command import run_command, seeds, shard
from mv2v_engine.training.stored import reading, stored_in

_FEWEST_WINDOWS, _MOST_WINDOWS = 5, 8


@dataclass(frozen=True, eq=False)
class EditPair:
    """source, edited: uint8 [T, height, width, 3]. mask: bool [T, height, width], what is edited
    in either. A window is 17 frames; the last one may have fewer."""

    source: Tensor
    edited: Tensor
    mask: Tensor
    prompt: str
    kind: str


class RenderedEdits:
    """The folder that this module's command fills."""

    def __init__(self, folder: Path) -> None:
        self._paths = {path.stem: path for path in stored_in(folder, "edit", "edits")}

    @property
    def names(self) -> Sequence[str]:
        return tuple(self._paths)

    def load(self, name: str) -> EditPair:
        """One pair.

        Raises:
            TrainingError: the file is damaged or holds something else.
        """
        with reading(self._paths[name], "rendered editing pair", "edits") as file:
            said = file.metadata() or {}
            source, edited, mask = map(file.get_tensor, ("source", "edited", "mask"))
            return EditPair(source, edited, mask, said["prompt"], said["kind"])


def num_windows(seed: int) -> int:
    """Windows of a seed's clip: 5 to 8."""
    return _FEWEST_WINDOWS + seed % (_MOST_WINDOWS - _FEWEST_WINDOWS + 1)


def render_pair(
    path: Path,
    seed: int,
    *,
    num_frames: int | None = None,
    device: str = "cpu",
    grade: Grade = "textured",
) -> None:
    """Render the editing pair of a seed into a file. num_frames: None takes `num_windows`."""
    num_frames = num_frames or WINDOW * num_windows(seed)
    clip = make_edit_clip(seed, num_frames=num_frames, device=device, grade=grade)
    tensors = {"source": clip.source.frames, "edited": clip.edited.frames, "mask": clip.mask}
    save_tensors(
        path,
        {name: tensor.cpu() for name, tensor in tensors.items()},
        {"prompt": clip.prompt, "kind": clip.instruction.kind},
    )


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=seeds, default="0:2000", help="first:last seed")
    parser.add_argument(
        "--frames", type=count, help=f"of every clip; not given: 5 to 8 windows of {WINDOW} by seed"
    )
    parser.add_argument("--grade", choices=get_args(Grade), default="textured", help="of the rooms")
    parser.add_argument(
        "--shard", type=shard, default="0/1", help="i/n: every n-th clip from the i-th"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = str(usable_device(args.device))
    make_folder(args.out)
    for seed in tqdm(args.clips[args.shard], unit="clip"):
        path = args.out / f"edit_{seed:07d}.safetensors"
        if not path.exists():
            render_pair(path, seed, num_frames=args.frames, device=device, grade=args.grade)


if __name__ == "__main__":
    run_command(main)
