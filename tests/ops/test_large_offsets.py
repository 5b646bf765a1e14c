"""Tensors that span more than 2**31 elements: offsets are 64 bits wide everywhere.

Each stride fits 32 bits and the last row's offset does not, so a product of 32-bit numbers would
wrap and read elsewhere. The rows lie in a file with holes between them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mv2v_engine.ops.adaln import adaln
from mv2v_engine.ops.attention import attention_varlen
from mv2v_engine.ops.frame_responsiveness import frame_responsiveness
from mv2v_engine.ops.gated_residual import gated_residual
from mv2v_engine.ops.qk_norm_rope import qk_norm_rope
from mv2v_engine.ops.residual_norm import residual_norm
from mv2v_engine.ops.rope import rope as rotated
from mv2v_engine.ops.token_merge import token_merge

FAR = 2**30 + 64
BACKENDS = ["reference", "auto"]


def far_apart(tensor: Tensor, dim: int) -> Tensor:
    """A float16 tensor of three entries along `dim`, FAR elements apart."""
    assert tensor.shape[dim] == 3 and tensor.dtype == torch.float16
    size = 2 * FAR + tensor.numel()
    with tempfile.NamedTemporaryFile() as file:
        memory = torch.from_file(file.name, shared=True, size=size, dtype=torch.float16)
    strides = list(tensor.select(dim, 0).contiguous().stride())
    strides.insert(dim, FAR)
    result = memory.as_strided(tensor.shape, strides)
    return result.copy_(tensor)


def agree(run: Callable[[Tensor], Tensor], near: Tensor, dim: int) -> None:
    torch.testing.assert_close(run(far_apart(near, dim)), run(near), rtol=0, atol=0)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_elementwise(backend: str, dim: int) -> None:
    x = torch.randn(3, 3, 16).half()
    vector, weight, rope = torch.randn(3, 16), torch.randn(16), torch.randn(1, 3, 8)
    agree(lambda x: adaln(x, vector, vector, backend=backend), x, dim)
    agree(lambda x: gated_residual(x, x, vector, backend=backend).contiguous(), x, dim)
    agree(lambda x: qk_norm_rope(x, weight, rope, num_heads=2, backend=backend), x, dim)
    agree(lambda x: rotated(x.unflatten(-1, (2, -1)), rope, backend=backend), x, dim)
    add = {"scale": vector, "shift": vector, "backend": backend}
    agree(lambda x: residual_norm(x, x, **add)[1], x, dim)


@pytest.mark.parametrize("backend", BACKENDS)
def test_camera_rows(backend: str) -> None:
    x, vector = torch.randn(1, 3, 16).half(), torch.randn(1, 16)
    frame = torch.tensor([[0, 2, 1]])

    def run(camera: Tensor) -> Tensor:
        return adaln(x, vector, vector, camera=camera, frame=frame, backend=backend)

    agree(run, torch.randn(1, 3, 16).half(), 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_modulation_rows(backend: str) -> None:
    x, row = torch.randn(1, 3, 16).half(), torch.tensor([[0, 2, 1]])
    by_row = {"row": row, "backend": backend}

    def norm(vector: Tensor) -> Tensor:
        add = {"gate": vector, "scale": vector, "shift": vector}
        return residual_norm(x, x, **add, **by_row)[1]

    rows = torch.randn(3, 16).half()
    agree(lambda vector: adaln(x, vector, vector, **by_row), rows, 0)
    agree(lambda vector: gated_residual(x, x, vector, **by_row), rows, 0)
    agree(norm, rows, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_responsiveness(backend: str) -> None:
    rows = torch.randn(1, 3, 16).half()

    def queries(q: Tensor) -> Tensor:
        return frame_responsiveness(q, rows, frames=[3], tokens=[1], backend=backend)

    def keys(k: Tensor) -> Tensor:
        return frame_responsiveness(rows, k, frames=[1], tokens=[3], backend=backend)

    agree(queries, rows, 1)
    agree(keys, rows, 1)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_merge(backend: str, dim: int) -> None:
    rope, kept, merged = torch.randn(1, 3, 3, 4), torch.tensor([[1]]), torch.tensor([[2]])
    weight = torch.randn(8, 8, 1, 2).half()

    def run(x: Tensor) -> Tensor:
        tokens, _ = token_merge(
            x, rope, kept, merged, grid=(1, 3), kernel=(1, 2), weight=weight, backend=backend
        )
        return tokens

    agree(run, torch.randn(1, 3, 3, 8).half(), dim)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention(backend: str, dim: int) -> None:
    near = torch.randn(3, 3, 16).half()
    starts = torch.tensor([0, 3], dtype=torch.int32)

    def run(packed: Tensor) -> Tensor:
        out, _ = attention_varlen(
            packed,
            packed,
            packed,
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
            max_seqlen_q=3,
            max_seqlen_k=3,
            backend=backend,
        )
        return out

    agree(run, near, dim)
