"""Backends: resolved once, never silently, and every refusal names its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.ops import (  # noqa: F401 - importing registers the operations
    adaln,
    attention,
    frame_responsiveness,
    gated_residual,
    qk_norm_rope,
    token_merge,
)
from mv2v_engine.ops.backend import OPS, missing_reason, resolve

CPU = torch.device("cpu")


def test_auto_on_a_cpu_is_the_reference() -> None:
    assert resolve("auto", CPU) == "reference"
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
