"""The clips of the demos: held-out worlds, for new cameras or, longer, for instructions.

`python -m mv2v_engine.synthetic.demo_clip --out demo/clip.mp4`
`python -m mv2v_engine.synthetic.demo_clip --edit --out demo/long.mp4`

Worlds from seed 1,000,000 on are never trained on.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.errors import MV2VError
from mv2v_engine.parser import Parser
from mv2v_engine.synthetic.edit_clips import draw_instruction
from mv2v_engine.synthetic.edit_worlds import WINDOW, edit_camera, make_edit_world
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import make_world
from mv2v_engine.video.io import write_video

# a world of the plain grade, and the first held-out one for what it shows: a sphere, a box and a
# cylinder in the source, each 2 % of the picture at least, and at the end of both of the demo's
# cameras a thing of that size that the source hides (a test looks); how well a model draws it had
# no say
DEMO_WORLD = 1_000_004
# a yellow sphere that the camera leaves for more than two windows and finds again
EDIT_WORLD, EDIT_PROMPT = 1_000_012, "make the sphere red"
NUM_FRAMES, SIZE, FPS = 17, (96, 160), 8
NUM_WINDOWS = 5


def write_demo_clip(path: Path, *, seed: int = DEMO_WORLD) -> None:
    """Film a world with a static camera: 17 frames of 96x160 at 8 frames a second.

    Raises:
        StorageError: the place cannot be written.
    """
    camera = named_trajectory("static", NUM_FRAMES, SIZE)
    write_video(path, render(make_world(seed, "plain"), camera).frames, FPS)


def write_edit_clip(path: Path, *, seed: int = EDIT_WORLD) -> str:
    """Film a world to edit, 85 frames of 96x160, five windows of `tiny-edit`.

    Returns:
        an instruction that it can follow.

    Raises:
        StorageError: the place cannot be written.
    """
    num_frames = NUM_WINDOWS * WINDOW
    edit_world = make_edit_world(seed, num_frames=num_frames)
    camera = edit_camera(edit_world, seed, num_frames=num_frames, size=SIZE)
    write_video(path, render(edit_world.world, camera).frames, FPS)
    return EDIT_PROMPT if seed == EDIT_WORLD else draw_instruction(edit_world, seed).prompt


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="the mp4 to write")
    parser.add_argument("--edit", action="store_true", help="a long clip, to edit by instruction")
    parser.add_argument("--seed", type=int, help="of the world; that of `make demo` if not given")
    try:
        args = parser.parse_args()
        chosen = {} if args.seed is None else {"seed": args.seed}
        if args.edit:
            prompt = write_edit_clip(args.out, **chosen)
            edited = args.out.with_name("edited.mp4")
            words = ["edit", str(args.out), "--prompt", prompt, "--out", str(edited)]
            print(f"python -m mv2v_engine.run {shlex.join(words)}")
        else:
            write_demo_clip(args.out, **chosen)
    except MV2VError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
