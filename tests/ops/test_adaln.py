"""adaLN with the camera: float64 oracle, odd sizes, strides, the registered operation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mv2v_engine.ops.adaln import adaln
from mv2v_engine.testing import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [  # batch, tokens, width, camera frames (0: none)
    pytest.param(1, 1, 2, 0, id="smallest"),
    pytest.param(2, 7, 24, 0, id="no-camera"),
    pytest.param(3, 13, 35, 4, id="odd"),
    pytest.param(1, 43, 130, 21, id="wide"),
]


def _inputs(
    batch: int, tokens: int, width: int, frames: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    torch.manual_seed(tokens)
    x = (3 * torch.randn(batch, tokens, width) + 1).to(dtype)
    scale, shift = torch.randn(2, batch, width).unbind()
    if not frames:
        return x, scale, shift, None, None
    camera = torch.randn(batch, frames, width).to(dtype)
    return x, scale, shift, camera, torch.randint(frames, (batch, tokens))


def _naive(
    x: Tensor, scale: Tensor, shift: Tensor, camera: Tensor | None, frame: Tensor | None
) -> Tensor:
    """Plain torch in the dtype of x."""
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    y = (x - mean) / (variance + 1e-6).sqrt()
    y = y * (1 + scale.to(x.dtype)[:, None]) + shift.to(x.dtype)[:, None]
    if camera is not None and frame is not None:
        rows = [rows[index] for rows, index in zip(camera.to(x.dtype), frame, strict=True)]
        y = y + torch.stack(rows)
    return y


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "tokens", "width", "frames"), CASES)
def test_matches_float64(
    batch: int, tokens: int, width: int, frames: int, dtype: torch.dtype, backend: str
) -> None:
    x, scale, shift, camera, frame = _inputs(batch, tokens, width, frames, dtype)
    wide = None if camera is None else camera.double()
    oracle = _naive(x.double(), scale.double(), shift.double(), wide, frame)
    eager = _naive(x, scale, shift, camera, frame)
    got = adaln(x, scale, shift, camera=camera, frame=frame, backend=backend)
    assert_within_budget(got, oracle, eager)


def test_strided_input() -> None:
    x, scale, shift, camera, frame = _inputs(2, 6, 10, 3, torch.float32)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    for backend in ("reference", "auto"):
        expected = adaln(x, scale, shift, camera=camera, frame=frame, backend=backend)
        got = adaln(turned, scale, shift, camera=camera, frame=frame, backend=backend)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("frames", [0, 3])
@pytest.mark.parametrize("is_strided", [False, True])
def test_opcheck(frames: int, is_strided: bool) -> None:
    x, *rest = _inputs(2, 6, 10, frames, torch.float32)
    if is_strided:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(torch.ops.mv2v.adaln.default, (x, *rest, None, 1e-6))
