"""Contact sheets: the right frames in the right places, small ones enlarged, large ones shrunk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mv2v_engine.errors import StorageError, VideoError
from mv2v_engine.video.contact_sheet import make_strip, save_contact_sheet, spaced_frames

GAP, STRIP = 4, 26


def grey(levels: list[int], size: tuple[int, int] = (24, 64)) -> torch.Tensor:
    frames = torch.tensor(levels, dtype=torch.uint8)
    return frames[:, None, None, None].expand(-1, *size, 3).contiguous()


def test_frames_are_spaced_from_first_to_last() -> None:
    assert spaced_frames(17, 5) == [0, 4, 8, 12, 16]
    assert spaced_frames(3, 5) == [0, 1, 2]
    assert spaced_frames(9, 1) == [0]


def test_every_cell_shows_its_frame(tmp_path: Path) -> None:
    levels = {"source": [10, 20, 30, 40, 50], "turn 1": [110, 120, 130, 140, 150]}
    rows = [make_strip(label, grey(of_row), columns=3) for label, of_row in levels.items()]
    assert rows[0].frames == (0, 2, 4)
    save_contact_sheet(tmp_path / "sheet.png", rows)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    width, height = 320, 120  # five times as large
    assert sheet.shape == (2 * (STRIP + height + GAP), 3 * (width + GAP) + GAP, 3)
    for row, shown in enumerate([(10, 30, 50), (110, 130, 150)]):
        top = row * (STRIP + height + GAP) + STRIP
        # the label is there: dark ink on white paper
        strip = sheet[top - STRIP : top, : width // 2]
        assert strip.min() < 100 and strip.max() == 255
        for column, level in enumerate(shown):
            left = GAP + column * (width + GAP)
            assert (sheet[top : top + height, left : left + width] == level).all()


def test_rows_cut_from_a_video_say_where(tmp_path: Path) -> None:
    frames, numbers = grey([9, 9, 9, 9]), range(20, 24)
    rows = [make_strip("", frames, columns=2, numbers=numbers) for _ in range(3)]
    assert rows[0].frames == (20, 23)
    sheets = []
    for named in ((), (0, 2), range(3)):
        save_contact_sheet(tmp_path / "sheet.png", rows, named=named)
        sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
        labels = sheet.reshape(3, -1, *sheet.shape[1:])[:, :STRIP]
        sheets.append([bool((label < 200).any()) for label in labels])
    assert sheets == [[False] * 3, [True, False, True], [True] * 3]


def test_large_frames_are_shrunk(tmp_path: Path) -> None:
    save_contact_sheet(tmp_path / "sheet.png", [make_strip("source", grey([9] * 6, (480, 640)))])
    assert Image.open(tmp_path / "sheet.png").size == (5 * 324 + 4, STRIP + 240 + GAP)


def test_what_cannot_be_shown(tmp_path: Path) -> None:
    for frames in (grey([1]).float(), grey([1])[0], grey([])):
        with pytest.raises(VideoError, match="a contact sheet needs rows"):
            make_strip("a", frames)
    row = make_strip("a", grey([1]))
    for rows in ([], [row, make_strip("b", grey([1], (8, 8)))]):
        with pytest.raises(VideoError, match="a contact sheet needs rows"):
            save_contact_sheet(tmp_path / "sheet.png", rows)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        save_contact_sheet(tmp_path / "file" / "sheet.png", [row])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
