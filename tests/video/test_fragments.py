"""An mp4 in fragments: it plays while it grows, and is continued byte for byte."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine.errors import RequestError, StorageError, VideoError
from mv2v_engine.video.fragments import append_fragments, fragment_ends
from mv2v_engine.video.io import VideoReader

PARTS = [5, 8, 8]


@pytest.fixture(scope="module")
def frames() -> Tensor:
    """uint8 [21, 32, 48, 3]: smooth, each brighter than the one before."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 4, 6, generator=generator)
    (picture,) = torch.nn.functional.interpolate(coarse, (32, 48), mode="bilinear")
    brighter = torch.stack([picture * (0.3 + 0.03 * n) for n in range(21)])
    return (brighter * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _written(path: Path, frames: Tensor, fps: float | Fraction) -> Path:
    with append_fragments(path, fps) as writer:
        for part in frames.split(PARTS):
            writer.add(part)
    assert (writer.num_fragments, writer.num_frames) == (3, 21)
    return path


@pytest.mark.parametrize("fps", [16, Fraction(30000, 1001), 12.5])
def test_it_plays_while_it_grows(frames: Tensor, tmp_path: Path, fps: float | Fraction) -> None:
    path, done = tmp_path / "a.mp4", 0
    with append_fragments(path, fps) as writer:
        for count, part in enumerate(frames.split(PARTS), 1):
            writer.add(part)
            done += len(part)
            assert len(fragment_ends(path)) == count
            assert fragment_ends(path)[-1] == path.stat().st_size
            reader = VideoReader(path)
            assert reader.info.num_frames == done
            assert reader.info.fps == pytest.approx(float(fps))
            bright, due = (
                each.float().mean((1, 2, 3)) for each in (reader.read(range(done)), frames[:done])
            )
            # a frame's place tells it from the one before, which is 3.7 darker
            assert (bright - due).abs().max() < 1.8


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
@pytest.mark.parametrize("torn", [0, 30])
def test_it_is_continued_byte_for_byte(
    frames: Tensor, tmp_path: Path, kept: int, torn: int
) -> None:
    whole = _written(tmp_path / "whole.mp4", frames, 16).read_bytes()
    path = tmp_path / "cut.mp4"
    ends = [0, *fragment_ends(tmp_path / "whole.mp4")]
    # a kill may have cut the next fragment off, or have left more than the folder knows
    path.write_bytes(whole[: ends[kept] + torn] if torn else whole)
    done = sum(PARTS[:kept])
    with append_fragments(path, 16, num_fragments=kept, num_frames=done) as writer:
        for part in frames.split(PARTS)[kept:]:
            writer.add(part)
    assert path.read_bytes() == whole


def test_what_is_refused(frames: Tensor, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"written as H.264 in .mp4"):
        append_fragments(tmp_path / "a.mov", 16)
    path = _written(tmp_path / "a.mp4", frames, 16)
    with pytest.raises(StorageError, match="holds 3 whole fragments, expected 4 or more"):
        append_fragments(path, 16, num_fragments=4)
    (tmp_path / "no.mp4").mkdir()
    with pytest.raises(StorageError, match="cannot write"):
        append_fragments(tmp_path / "no.mp4", 16)
    with append_fragments(path, 16) as writer, pytest.raises(VideoError, match="frames to write"):
        writer.add(frames.float())
    assert fragment_ends(tmp_path / "nothing.mp4") == []
    (tmp_path / "words.mp4").write_text("no boxes at all, but words")
    assert fragment_ends(tmp_path / "words.mp4") == []
