"""Under TRITON_INTERPRET=1 the Triton launchers stand in the operations' CPU slots.

Every test of `backend="auto"` in this folder is then a test of a kernel's body. Their outputs
come poisoned with NaN, and inputs and outputs lie between canaries: neither the interpreter nor a
GPU notices what is read or written outside a tensor. Under MV2V_TEST_LAUNCHERS=cuda the same tests
run the compiled kernels: the launchers get copies on the GPU, laid out alike.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mv2v_engine.ops.backend import triton_launcher

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IS_ON_GPU = os.environ.get("MV2V_TEST_LAUNCHERS") == "cuda"
DEVICE = torch.device("cuda" if IS_ON_GPU else "cpu")
OPS = (
    "adaln",
    "frame_responsiveness",
    "gated_residual",
    "prope",
    "qk_norm_rope",
    "residual_norm",
    "rope",
    "token_merge",
)
GUARD = 512  # bytes on either side, all ones: NaN in every floating dtype, -1 in every integer one
SPACIOUS = 60 << 30  # bytes of a GPU on which tensors of 2**31 elements have room
LARGE = 1 << 28  # bytes; the tests of large offsets pass tensors that cannot be copied
# no kernel of Triton's is in them; what is compiled ends at an operation, whatever launcher it has
WITHOUT_KERNELS = {
    "test_attention_backends.py",
    "test_attention_rounded.py",
    "test_backend.py",
    "test_conv3d.py",
    "test_every_operation.py",
    "test_fov_overlap.py",
    "test_linear_gelu.py",
}


class Guarded:
    """Tensors made between canaries, and what the canaries look like now."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def empty(self, shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        size = span * dtype.itemsize
        if not all(shape):
            return torch.ones(tuple(shape), dtype=dtype, device=DEVICE)
        buffer = torch.full((size + 2 * GUARD,), 255, dtype=torch.uint8, device=DEVICE)
        self.buffers.append((buffer, size))
        flat = buffer[GUARD : GUARD + size].view(dtype)
        if not IS_ON_GPU:
            # a storage of its own, so that it starts at offset zero as a fresh tensor does
            flat = torch.frombuffer(buffer.numpy(), dtype=dtype, count=span, offset=GUARD)
        return flat.as_strided(tuple(shape), tuple(strides))

    def copy(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.untyped_storage().nbytes() > LARGE and not IS_ON_GPU:
            return value
        copy = self.empty(value.shape, value.stride(), value.dtype)
        # an expanded dimension is one element in memory, which may be written once
        once = tuple(slice(0, 1 if stride == 0 else None) for stride in value.stride())
        copy[once].copy_(value[once])
        return copy

    def check(self) -> None:
        for buffer, size in self.buffers:
            around = torch.cat([buffer[:GUARD], buffer[GUARD + size :]])
            assert bool((around == 255).all()), "a kernel wrote outside its output"


def to_cpu(result: Any) -> Any:
    """A launcher's tensor, or its tuple of tensors, where the tests expect it."""
    if isinstance(result, tuple):
        return tuple(to_cpu(each) for each in result)
    return result.cpu()


def guarded(launch: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher on copies of its inputs between canaries, with poisoned outputs."""
    empty, empty_like = torch.empty, torch.empty_like

    def run(*args: Any) -> Any:
        guard = Guarded()
        copies = [guard.copy(value) for value in args]

        def new(shape: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
            assert device.type == DEVICE.type
            return guard.empty(shape, empty(shape, device="meta").stride(), dtype)

        def new_like(like: Tensor) -> Tensor:
            return guard.empty(like.shape, empty_like(like).stride(), like.dtype)

        def new_zeros(shape: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
            return new(shape, dtype=dtype, device=device).zero_()

        with mock.patch.multiple("torch", empty=new, empty_like=new_like, zeros=new_zeros):
            result = launch(*copies)
        guard.check()
        for value, copy in zip(args, copies, strict=True):
            if isinstance(value, Tensor):
                assert torch.equal(value, copy.cpu()), "a kernel wrote into its input"
        return to_cpu(result)

    return run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """References gain nothing from a second run; in the interpreter float16 is like bfloat16."""
    if IS_INTERPRETED or IS_ON_GPU:
        told = r"reference" if IS_ON_GPU else r"reference|torch\.float16"
        again = [
            item
            for item in items
            if re.search(rf"[\[-]({told})[\]-]", item.name) or item.path.name in WITHOUT_KERNELS
        ]
        config.hook.pytest_deselected(items=again)
        items[:] = [item for item in items if item not in again]
    if IS_ON_GPU and torch.cuda.get_device_properties(0).total_memory < SPACIOUS:
        small = pytest.mark.skip(reason=f"needs a GPU of {SPACIOUS >> 30} GiB")
        for item in items:
            if item.path.stem == "test_large_offsets":
                item.add_marker(small)


@pytest.fixture(scope="session", autouse=True)
def launchers_on_the_cpu() -> Iterator[None]:
    if not (IS_INTERPRETED or IS_ON_GPU):
        yield
        return
    library = torch.library.Library("mv2v", "IMPL")
    for op in OPS:
        launcher = triton_launcher(op)
        assert launcher is not None, f"no Triton launcher of {op}"
        library.impl(op, guarded(launcher), "CPU", allow_override=True)
    packed = triton_launcher("attention")
    assert packed is not None
    launcher = guarded(packed)
    # the longest keys and the choice of a library concern libraries alone
    library.impl("attention_varlen", lambda *args: launcher(*args[:6]), "CPU", allow_override=True)
    yield
    library._destroy()
