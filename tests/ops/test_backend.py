"""Backends: resolved once, never silently, and every refusal names its reason."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.ops import (
    adaln,
    attention,
    frame_responsiveness,
    gated_residual,
    prope,
    qk_norm_rope,
    residual_norm,
    token_merge,
)
from mv2v_engine.ops.backend import OPS, _missing_on, missing_reason, resolve

CPU = torch.device("cpu")


def test_the_reference_stays_what_it_is() -> None:
    assert resolve("reference", CPU) == "reference"


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_an_explicit_request_that_cannot_be_met_raises(backend: Any) -> None:
    with pytest.raises(KernelUnavailableError, match=rf"'{backend}'.*CUDA device.*runs on cpu"):
        resolve(backend, CPU)


@pytest.mark.parametrize("op", OPS)
def test_every_operation_is_registered_and_says_why_it_lacks_a_backend(op: str) -> None:
    assert hasattr(torch.ops.mv2v, op)
    assert missing_reason("reference", op, CPU) is None
    assert missing_reason("auto", op, CPU) is None
    for backend in ("triton", "cuda"):
        assert "cpu" in (missing_reason(backend, op, CPU) or "")
        # asked about a GPU, the answer names what lacks it or nothing; it needs no driver
        reason = missing_reason(backend, op, torch.device("cuda"))
        assert reason is None or any(
            package in reason for package in ("triton", "mv2v_kernels", "libmv2v_cuda")
        )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_lookup_is_a_constant_to_torch_compile(device: str) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if _missing_on("triton", "adaln", device) else x - 1

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert compiled(torch.ones(())) == run(torch.ones(()))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_an_explicit_backend_takes_tensors_on_cuda() -> None:
    assert resolve("triton", torch.device("cuda")) == "triton"
    with FakeTensorMode():
        x = torch.empty(2, 6, 12, device="cuda", dtype=torch.bfloat16)
        vector, heads = torch.empty(2, 12, device="cuda"), x.unflatten(-1, (3, 4))
        weight, rope = torch.empty(12, device="cuda"), torch.empty(1, 6, 4, device="cuda")
        assert adaln.adaln(x, vector, vector, backend="triton").shape == x.shape
        assert gated_residual.gated_residual(x, x, vector, backend="triton").shape == x.shape
        add = residual_norm.residual_norm(x, x, scale=vector, shift=vector, backend="triton")
        assert add[0].shape == add[1].shape == x.shape
        turned = qk_norm_rope.qk_norm_rope(x, weight, rope, num_heads=3, backend="triton")
        assert turned.shape == heads.shape
        camera = torch.empty(2, 5, 4, 4, device="cuda")
        frame = torch.empty(2, 6, device="cuda", dtype=torch.int64)
        projected = prope.prope(heads, camera, frame, channels=4, backend="triton")
        assert projected.shape == heads.shape
        score = frame_responsiveness.frame_responsiveness(
            x, x, frames=[3], tokens=[2], backend="triton"
        )
        assert score.shape == (2, 3) and score.dtype == torch.float32
        frames, turns = x.unsqueeze(1), rope.unsqueeze(1)
        kept, index = torch.empty(2, 1, device="cuda", dtype=torch.int64).split([0, 1], 1)
        merged, _ = token_merge.token_merge(
            frames, turns, kept, index, grid=(2, 3), backend="triton"
        )
        assert merged.shape == (2, 2, 12)
        assert attention.attention(heads, heads, heads, backend="triton").shape == heads.shape
