"""Turns and sessions as a notebook shows them: HTML that holds all it needs.

T pixel frames, H W pixels.
"""

from __future__ import annotations

import base64
import html
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mv2v_engine.video.io import write_video

# more compressed than a result: the page is saved with it
_CRF = 28
# newest turns that a session shows, and pixels of a picture's longer side
MAX_TURNS, _SIDE = 8, 240


def video_html(frames: Tensor, fps: float, caption: str) -> str:
    """Frames uint8 [T, H, W, 3] as a player with the mp4 in it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "turn.mp4"
        write_video(path, frames, fps, crf=_CRF)
        data = base64.b64encode(path.read_bytes()).decode()
    source = f"data:video/mp4;base64,{data}"
    player = f'<video controls loop muted autoplay playsinline width="480" src="{source}"></video>'
    return f"<figure>{player}<figcaption>{html.escape(caption)}</figcaption></figure>"


def pictures_html(pictures: Sequence[tuple[Tensor, str]], caption: str) -> str:
    """Pictures uint8 [H, W, 3] beside each other, each above its words."""
    cells = "".join(
        f'<figure style="margin:4px"><img src="{data_url(picture, _SIDE, "PNG")}">'
        f"<figcaption>{html.escape(words)}</figcaption></figure>"
        for picture, words in pictures
    )
    heading = f"<div>{html.escape(caption)}</div>"
    return f'{heading}<div style="display:flex;flex-wrap:wrap">{cells}</div>'


def data_url(picture: Tensor, side: int, form: str, **options: Any) -> str:
    """A picture uint8 [H, W, 3], made no larger than so many pixels a side.

    form, options: as Pillow's `save` has them.
    """
    from PIL import Image

    image, encoded = Image.fromarray(picture.numpy()), io.BytesIO()
    image.thumbnail((side, side))
    image.save(encoded, form, **options)
    content = base64.b64encode(encoded.getvalue()).decode()
    return f"data:image/{form.lower()};base64,{content}"
