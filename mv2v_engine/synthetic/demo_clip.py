"""The clip of `make demo`: a held-out world, filmed by a static camera.

`python -m mv2v_engine.synthetic.demo_clip --out demo/clip.mp4`

Worlds from seed 1,000,000 on are never trained on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.errors import MV2VError
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import make_world
from mv2v_engine.video.io import write_video

# balls and boxes of clear colours, one of them moving, and more to both sides of the view
DEMO_WORLD = 1_000_029
NUM_FRAMES, SIZE, FPS = 17, (96, 160), 8


def write_demo_clip(path: Path, *, seed: int = DEMO_WORLD) -> None:
    """Film a world: 17 frames of 96x160 at 8 frames a second.

    Raises:
        StorageError: the place cannot be written.
    """
    camera = named_trajectory("static", NUM_FRAMES, SIZE)
    write_video(path, render(make_world(seed), camera).frames, FPS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="the mp4 to write")
    parser.add_argument("--seed", type=int, default=DEMO_WORLD, help="of the world")
    args = parser.parse_args()
    try:
        write_demo_clip(args.out, seed=args.seed)
    except MV2VError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
