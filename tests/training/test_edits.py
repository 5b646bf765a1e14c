"""Editing pairs on disk: rendered once, read back whole, never from the held-out seeds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mv2v_engine.errors import TrainingError
from mv2v_engine.evaluation.editing_measures import FIRST_EDIT_CLIP
from mv2v_engine.synthetic.edit_clips import EditClip, make_edit_clip
from mv2v_engine.synthetic.instructions import all_prompts
from mv2v_engine.synthetic.worlds import HELD_OUT, Grade
from mv2v_engine.training import edits
from mv2v_engine.training.edits import RenderedEdits, num_windows


@pytest.fixture
def small_clips(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Clips of the command at 24x40; the frames that it asked for are listed."""
    asked: list[int] = []

    def small(seed: int, *, num_frames: int, device: str, grade: Grade) -> EditClip:
        asked.append(num_frames)
        return make_edit_clip(seed, num_frames=2, size=(24, 40), device=device)

    monkeypatch.setattr(edits, "make_edit_clip", small)
    return asked


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["edits", *arguments])
    edits.main()


def test_pairs_are_rendered_once_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_clips: list[int]
) -> None:
    _run(monkeypatch, "--out", str(tmp_path), "--clips", "3:6")
    assert small_clips == [17 * num_windows(seed) for seed in (3, 4, 5)]
    folder = RenderedEdits(tmp_path)
    assert folder.names == ("edit_0000003", "edit_0000004", "edit_0000005")
    pair, clip = folder.load("edit_0000004"), make_edit_clip(4, num_frames=2, size=(24, 40))
    assert torch.equal(pair.source, clip.source.frames)
    assert torch.equal(pair.edited, clip.edited.frames)
    assert torch.equal(pair.mask, clip.mask) and pair.mask.dtype == torch.bool
    assert (pair.prompt, pair.kind) == (clip.prompt, clip.instruction.kind)
    assert pair.prompt in all_prompts()
    _run(monkeypatch, "--out", str(tmp_path), "--clips", "3:7", "--threads", "1")
    assert len(small_clips) == 4  # one more
    _run(monkeypatch, "--out", str(tmp_path), "--clips", "7:8", "--frames", "34")
    assert small_clips[4:] == [34]


def test_lengths_are_five_to_eight_windows() -> None:
    assert {num_windows(seed) for seed in range(100)} == {5, 6, 7, 8}


def test_bad_files(tmp_path: Path) -> None:
    assert FIRST_EDIT_CLIP >= HELD_OUT
    with pytest.raises(TrainingError, match=r"holds no edit_\*.safetensors"):
        RenderedEdits(tmp_path)
    (tmp_path / "edit_0000001.safetensors").write_bytes(b"no tensors")
    with pytest.raises(TrainingError, match="is no rendered editing pair"):
        RenderedEdits(tmp_path).load("edit_0000001")
