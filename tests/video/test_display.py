"""What a notebook shows of frames holds all it needs, and quotes what it is told."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import torch

from mv2v_engine.video.display import pictures_html, video_html
from mv2v_engine.video.io import read_video


def test_a_player_holds_its_video(tmp_path: Path) -> None:
    frames = torch.full((5, 32, 48, 3), 128, dtype=torch.uint8)
    page = video_html(frames, 8.0, "<b>& 'prompt'")
    (data,) = re.findall(r'src="data:video/mp4;base64,([^"]+)"', page)
    (tmp_path / "shown.mp4").write_bytes(base64.b64decode(data))
    assert read_video(tmp_path / "shown.mp4").frames.shape == frames.shape
    assert "<b>" not in page and "&lt;b&gt;&amp;" in page


def test_pictures_beside_each_other() -> None:
    picture = torch.zeros(300, 500, 3, dtype=torch.uint8)
    page = pictures_html([(picture, "<i>"), (picture, "2")], "<s>")
    assert page.count("data:image/png;base64,") == 2
    assert not re.search("<i>|<s>", page)
