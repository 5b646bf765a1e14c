"""How far a reader walks: the files that one denoising step enters, and the frames to attention."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch import Tensor

import mv2v_engine
from mv2v_engine import Engine, EngineConfig

ROOT = f"{Path(mv2v_engine.__file__).parent}/"
# files of a step, the operations apart, which are leaves; frames from `render` to attention, and
# generators among them
MOST_FILES, MOST_FRAMES, MOST_GENERATORS = 16, 13, 3


class Walk:
    """A profiler of a turn's second step. path: the package's frames, from attention outwards."""

    def __init__(self) -> None:
        self.steps, self.is_inside = 0, False
        self.files, self.path, self.generators = set[str](), list[str](), list[str]()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(ROOT) or event not in ("call", "return"):
            return
        if code.co_qualname == "Denoiser.step":
            self.steps += event == "call"
            self.is_inside = event == "call" and self.steps == 2
        if not self.is_inside or event != "call":
            return
        self.files.add(code.co_filename.removeprefix(ROOT))
        if code.co_name == "attention" and not self.path:
            caller: FrameType | None = frame
            while caller is not None:
                if caller.f_code.co_filename.startswith(ROOT):
                    self.path.append(caller.f_code.co_qualname)
                    if caller.f_code.co_flags & inspect.CO_GENERATOR:
                        self.generators.append(caller.f_code.co_qualname)
                caller = caller.f_back


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code has no qualified name")
@pytest.mark.parametrize(
    ("conditioning", "merge"), [("joint", "off"), ("static", "off"), ("joint", "discard")]
)
def test_a_step_is_a_short_walk(
    tiny_checkpoint: Path, source_frames: Tensor, conditioning: Any, merge: Any
) -> None:
    config = EngineConfig(conditioning=conditioning, merge=merge, graphs="off")
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", config=config)
    session = engine.session(source_frames)
    session.render("pan_left")  # the walk is that of a turn which remembers one
    walk, before = Walk(), sys.getprofile()
    sys.setprofile(walk)
    try:
        turn = session.render("pan_right")
    finally:
        sys.setprofile(before)
    assert turn.report["memory"]["retrieved"]
    files = sorted(name for name in walk.files if not name.startswith("ops/"))
    print(f"\n{len(files)} files: {', '.join(files)}")
    print(f"{len(walk.path)} frames: {' < '.join(walk.path)}")
    assert {"engine/denoise.py", "models/dit.py", "models/block.py"} <= set(files)
    assert ("models/merging.py" in files) == (merge != "off")
    assert len(files) <= MOST_FILES
    assert walk.path[-1].endswith("render") and len(walk.path) <= MOST_FRAMES
    assert 0 < len(walk.generators) <= MOST_GENERATORS
