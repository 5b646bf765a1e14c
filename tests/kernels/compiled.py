"""The public operations compiled for GPUs that are not here, and what the machine code shows.

Run by `test_machine_code.py`, in a process of its own: the kernels must be compiled ones, and a
stand-in driver takes Triton's. A launch then compiles just what it would run (the same
specialisation, alignment, warps, stages) and runs nothing.
"""

from __future__ import annotations

import re
import struct
import subprocess
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mv2v_engine.ops.adaln import adaln
from mv2v_engine.ops.attention import attention_varlen
from mv2v_engine.ops.backend import triton_launcher
from mv2v_engine.ops.frame_responsiveness import frame_responsiveness
from mv2v_engine.ops.gated_residual import gated_residual
from mv2v_engine.ops.prope import prope
from mv2v_engine.ops.qk_norm_rope import qk_norm_rope
from mv2v_engine.ops.residual_norm import residual_norm
from mv2v_engine.ops.rope import rope
from mv2v_engine.ops.token_merge import token_merge
from tests.ops.conftest import OPS

SHARED_BYTES = {80: 166_912, 90: 232_448, 120: 101_376}  # what one block may ask for
ARCHITECTURES = {80: "SM80", 90: "SM90a", 120: "SM120a"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = {"_row_lse_kernel", "_share_max_kernel", "_merge_kernel", "_attention_kernel"}
BF16 = torch.bfloat16


class StandIn(DriverBase):  # type: ignore[misc]
    """What Triton asks of a driver before a launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # a cache of compiled kernels for each target

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.capability, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        return None

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


@dataclass(frozen=True)
class Compiled:
    case: str
    name: str
    shared: int
    registers: int
    stack: int
    instructions: tuple[str, ...]

    def count(self, *prefixes: str, part: str = "") -> int:
        return sum(i.startswith(prefixes) and part in i for i in self.instructions)

    def __str__(self) -> str:
        return f"{self.name} of {self.case}"


def _dump(tool: str, *words: str) -> str:
    command = [str(TOOLS / tool), *words]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def _code(cubin: bytes) -> bytes:
    """The instructions of a cubin: the sections of an ELF file that are executed."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<2H", cubin, 0x3A)
    headers = (struct.unpack_from("<2I4Q", cubin, table + size * n) for n in range(count))
    return b"".join(
        cubin[start : start + length] for _, _, flags, _, start, length in headers if flags & 4
    )


def inspect(kernels: list[tuple[str, str, Any]], capability: int, folder: Path) -> list[Compiled]:
    """What is in the machine code of kernels, each with its case and its name.

    All in one listing: the disassembler takes a third of a second before it begins.
    """
    path, whole, usages, ends = folder / "code", bytearray(), [], []
    for case, name, kernel in kernels:
        path.write_bytes(kernel.asm["cubin"])
        dumped = _dump("cuobjdump", "--dump-resource-usage", str(path))
        usage = re.search(r"REG:(\d+) STACK:(\d+)", dumped)
        assert usage, f"no resource usage of {name} of {case}"
        usages.append((int(usage[1]), int(usage[2])))
        whole += _code(kernel.asm["cubin"])
        ends.append(len(whole))
    path.write_bytes(whole)
    listing = _dump("nvdisasm", "--binary", ARCHITECTURES[capability], str(path))
    pattern = r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
    found: list[list[str]] = [[] for _ in kernels]
    for place, instruction in re.findall(pattern, listing, re.MULTILINE):
        found[bisect_right(ends, int(place, 16))].append(instruction)
    return [
        Compiled(case, name, kernel.metadata.shared, *usage, tuple(instructions))
        for (case, name, kernel), usage, instructions in zip(kernels, usages, found, strict=True)
    ]


@pytest.fixture(scope="module", autouse=True)
def launchers_on_the_cpu() -> Iterator[None]:
    library = torch.library.Library("mv2v", "IMPL")
    for op in OPS:
        launcher = triton_launcher(op)
        assert launcher is not None
        library.impl(op, launcher, "CPU", allow_override=True)
    packed = triton_launcher("attention")
    assert packed is not None
    library.impl("attention_varlen", lambda *args: packed(*args[:6]), "CPU", allow_override=True)
    yield
    library._destroy()


def _tokens(width: int, *, length: int = 2048, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(1, length, width, dtype=dtype)


def _numbers() -> Tensor:
    return torch.empty(1, 2048, dtype=torch.int64)


def _adaln(width: int, *, row: Tensor | None = None) -> None:
    vector, camera = torch.empty(1, width), torch.empty(1, 21, width, dtype=BF16)
    adaln(_tokens(width), vector, vector, camera=camera, frame=_numbers(), row=row, backend="auto")


def _gated_residual(width: int, *, row: Tensor | None = None) -> None:
    gate = torch.empty(1, width)
    gated_residual(_tokens(width), _tokens(width), gate, row=row, backend="auto")


def _residual_norm(width: int, *, is_affine: bool, row: Tensor | None = None) -> None:
    vector = torch.empty(1, width)
    gain = {"weight": vector[0], "gate": vector} if is_affine else {"scale": vector}
    shift = vector[0] if is_affine else vector
    residual_norm(_tokens(width), _tokens(width), shift=shift, **gain, row=row, backend="auto")


def _qk_norm_rope(width: int) -> None:
    weight, rope = torch.empty(width, dtype=BF16), torch.empty(1, 2048, 128)
    qk_norm_rope(_tokens(width), weight, rope, num_heads=width // 128, backend="auto")


def _qk_norm(width: int) -> None:
    weight = torch.empty(width, dtype=BF16)
    qk_norm_rope(_tokens(width), weight, None, num_heads=width // 128, backend="auto")


def _rope(width: int) -> None:
    rope(_tokens(width).unflatten(-1, (-1, 128)), torch.empty(1, 2048, 128), backend="auto")


def _prope(width: int, channels: int) -> None:
    x, matrix = _tokens(width).unflatten(-1, (-1, 128)), torch.empty(1, 84, 4, 4)
    prope(x, matrix, _numbers(), channels=channels, backend="auto")


def _responsiveness(width: int, num_heads: int) -> None:
    frames, tokens = [21, 63, 147], [1560, 390, 104]
    k = _tokens(width, length=21 * 1560 + 63 * 390 + 147 * 104)
    frame_responsiveness(
        _tokens(width), k, frames=frames, tokens=tokens, num_heads=num_heads, backend="auto"
    )


def _token_merge(width: int, *weight: int) -> None:
    x, rope = torch.empty(1, 21, 390, width, dtype=BF16), torch.empty(1, 21, 390, 128)
    kept, merged = torch.empty(2, 1, 10, dtype=torch.int64).unbind()
    token_merge(
        x,
        rope,
        kept,
        merged,
        grid=(15, 26),
        weight=torch.empty(weight, dtype=BF16),
        bias=torch.empty(width, dtype=BF16),
        backend="auto",
    )


def _attention(head_dim: int) -> None:
    q, starts = torch.empty(4096, 12, head_dim, dtype=BF16), torch.zeros(3, dtype=torch.int32)
    attention_varlen(
        q,
        q,
        q,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=4096,
        max_seqlen_k=4096,
        backend="auto",
    )


C = 1536
CASES: dict[str, Callable[[], None]] = {
    "adaln": lambda: _adaln(C),
    "adaln-3072": lambda: _adaln(2 * C),
    "adaln-rows": lambda: _adaln(C, row=_numbers()),
    "gated_residual": lambda: _gated_residual(C),
    "gated_residual-rows": lambda: _gated_residual(C, row=_numbers()),
    "residual_norm": lambda: _residual_norm(C, is_affine=True),
    "residual_norm-3072": lambda: _residual_norm(2 * C, is_affine=False),
    "residual_norm-rows": lambda: _residual_norm(C, is_affine=False, row=_numbers()),
    "residual_norm-rows-affine": lambda: _residual_norm(C, is_affine=True, row=_numbers()),
    "qk_norm_rope": lambda: _qk_norm_rope(C),
    "qk_norm_rope-3072": lambda: _qk_norm_rope(2 * C),
    "qk_norm": lambda: _qk_norm(C),
    "rope": lambda: _rope(C),
    "rope-3072": lambda: _rope(2 * C),
    "prope": lambda: _prope(C, 64),
    "prope-3072": lambda: _prope(2 * C, 128),
    "frame_responsiveness": lambda: _responsiveness(C, 1),
    "frame_responsiveness-heads": lambda: _responsiveness(C, 12),
    "token_merge": lambda: _token_merge(C, C, C, 2, 2),
    "token_merge-pooled": lambda: _token_merge(C, C, C),
    "attention_varlen": lambda: _attention(128),
}


def compile_for(
    capability: int, cases: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Compiled]:
    """What the launches of these cases would put on a GPU of this compute capability."""
    built: dict[str, tuple[str, str, Any]] = {}
    real = JITFunction.run
    case = ""

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = real(self, *args, grid=grid, warmup=True, **options)
        built.setdefault(kernel.hash, (case, self.__name__, kernel))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    driver.set_active(StandIn(capability))
    for case in cases:
        before = len(built)
        CASES[case]()
        assert len(built) > before, f"{case} launches nothing of its own"
    return inspect(list(built.values()), capability, folder)


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_machine_code(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # all on Hopper; elsewhere one case of every kernel
    twice = ("qk_norm", "frame_responsiveness")
    cases = [
        case
        for case in CASES
        if capability == 90 or not (case.endswith(("-3072", "-pooled")) or case in twice)
    ]
    for kernel in compile_for(capability, cases, tmp_path, monkeypatch):
        print(
            f"{kernel}: {kernel.registers} registers, {kernel.shared} B shared, "
            f"{kernel.count('HGMMA')} HGMMA, {kernel.count('HMMA')} HMMA, "
            f"{kernel.count('LDG', part='128')} wide loads"
        )
        assert len(kernel.instructions) > 50, f"no machine code of {kernel}"
        spills = kernel.count("LDL", "STL")
        assert kernel.stack == 0 and spills == 0, (
            f"{kernel} spills: {kernel.stack} B of stack, {spills} local loads and stores"
        )
        assert kernel.shared <= SHARED_BYTES[capability], (
            f"{kernel} needs {kernel.shared} B of shared memory, "
            f"sm_{capability} has {SHARED_BYTES[capability]}"
        )
        assert kernel.count("LDG", part="128"), f"{kernel} has no 128-bit load"
        if kernel.name in MATRIX:
            unit = "HGMMA" if capability == 90 else "HMMA"
            assert kernel.count(unit), f"{kernel} has no {unit} on sm_{capability}"
