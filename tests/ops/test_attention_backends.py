"""The attention libraries, by stand-ins that have their signatures and conventions.

A wrong argument, layout, scale or shape of the log-sum-exp does not pass.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine.config import EngineConfig
from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.ops import attention_libraries as libraries
from mv2v_engine.ops.attention import attention, attention_varlen
from mv2v_engine.ops.attention_backends import availability, resolve_attention
from mv2v_engine.testing import assert_within_budget
from tests.ops.attention_stand_ins import (
    BY_NAME,
    INSTALL,
    PACKAGES,
    allow,
    dense,
    install_fa2,
    install_fa4,
    install_sage,
    install_sparge,
    install_triton,
    module,
)

CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Hopper GPU with no library at all; torch's own refuse."""
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(libraries, "import_lacks", libraries.import_lacks.__wrapped__)
    monkeypatch.setattr(libraries, "capability", lambda device: (9, 0))
    monkeypatch.setattr(libraries, "missing_reason", lambda *_: "triton is not installed")
    monkeypatch.setattr(libraries, "triton_launcher", lambda op: None)
    for kernel in ("cudnn", "flash", "mem_efficient"):
        allow(monkeypatch, kernel, is_allowed=False)
    return monkeypatch


def _heads(*, dim: int = 16, dtype: torch.dtype = BF16) -> list[Tensor]:
    """q [2, 5, 3, D], k and v [2, 9, 3, D]."""
    torch.manual_seed(dim)
    return [torch.randn(2, length, 3, dim).to(dtype) for length in (5, 9, 9)]


def _lengths(queries: list[int], keys: list[int]) -> dict[str, Any]:
    cu_q, cu_k = (torch.tensor([0, *each]).cumsum(0).int() for each in (queries, keys))
    bounds = {"max_seqlen_q": max(queries), "max_seqlen_k": max(keys)}
    return {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, **bounds}


@pytest.mark.parametrize("library", [name for name in INSTALL if name != "xformers-padded"])
def test_dense_conventions(library: str, gpu: pytest.MonkeyPatch) -> None:
    q, k, v = _heads()
    # heads before tokens, as a library's output then lies too
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    scores = torch.einsum("blnd,bsnd->bnls", q, k) * 0.25
    eager = torch.einsum("bnls,bsnd->blnd", scores.softmax(-1), v)
    oracle = dense(q.double(), k.double(), v.double())[0]
    INSTALL[library](gpu)
    for backend in (library.partition("-")[0], "auto"):
        got = attention(q, k, v, backend=backend)
        assert got.dtype == BF16 and got.is_contiguous()
        assert_within_budget(got, oracle, eager)


@pytest.mark.parametrize("library", BY_NAME)
def test_conventions_of_approximate_libraries(library: str, gpu: pytest.MonkeyPatch) -> None:
    """Libraries are called by them; the caller's keys stay as they are."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, length, 3, 64).to(BF16) + 1 for length in (130, 70, 70))
    q, before = q.transpose(1, 2).contiguous().transpose(1, 2), k.clone()
    scores = torch.einsum("blnd,bsnd->bnls", q, k - k.mean(1, keepdim=True)) * 0.125
    eager = torch.einsum("bnls,bsnd->blnd", scores.softmax(-1), v)
    oracle = dense(q.double(), k.double(), v.double())[0]
    BY_NAME[library](gpu)
    got = attention(q, k, v, backend=library.partition("-")[0])
    assert got.dtype == BF16 and got.is_contiguous() and torch.equal(k, before)
    assert_within_budget(got, oracle, eager)


def test_approximate_libraries_are_taken_by_name_alone(gpu: pytest.MonkeyPatch) -> None:
    for install in BY_NAME.values():
        install(gpu)
    for found in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        gpu.setattr(libraries, "capability", lambda device, found=found: found)
        assert not set(availability(CPU)) & {"sage", "sparge"}
        assert resolve_attention(EngineConfig(), CPU, BF16) == "reference"
    # and what they need to run is known before
    gpu.setattr(libraries, "capability", lambda device: (9, 0))
    assert set(availability(CPU, approximate=True).values()) == {None}
    q, k, v = (torch.randn(1, 128, 2, 64).to(BF16) for _ in range(3))
    gpu.delitem(sys.modules, "sageattention")
    gpu.setitem(sys.modules, "sageattention", None)
    assert torch.equal(attention(q, k, v, backend="auto"), attention(q, k, v))


BROKEN: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (torch.zeros_like, "is off by 1 of"),
    (lambda out: torch.full_like(out, torch.nan), "is off by nan of"),
    (lambda out: out.flip(2), "is off by 1"),
    (lambda out: out.roll(64, 1), "is off by 1"),
    (lambda out: out * 0.85, "is off by 0.15"),
    (lambda out: _fail(), r"failed: AssertionError: SM90 kernel is not available\.;"),
]


def _fail() -> Tensor:
    raise AssertionError("SM90 kernel is not available.\nmore of it")


@pytest.mark.parametrize(("heads", "dim"), [(12, 128), (3, 64)])
@pytest.mark.parametrize("library", BY_NAME)
def test_a_trial_on_the_device_decides(
    library: str, heads: int, dim: int, gpu: pytest.MonkeyPatch
) -> None:
    name = library.partition("-")[0]
    config = EngineConfig(attention=name)  # type: ignore[arg-type]
    BY_NAME[library](gpu)
    assert resolve_attention(config, CPU, BF16, num_heads=heads, head_dim=dim) == name
    function = {"sage": libraries._SAGE, "sparge": libraries._SPARGE}[name]
    package = sys.modules[function.partition(".")[0]]
    function = function.partition(".")[2]
    honest = getattr(package, function)
    for result, reason in BROKEN:

        @functools.wraps(honest)
        def run(*args: Any, result: Any = result, **given: Any) -> Tensor:
            return result(honest(*args, **given))  # type: ignore[no-any-return]

        gpu.setattr(package, function, run)
        with pytest.raises(KernelUnavailableError, match=f"'{name}', but its trial {reason}"):
            resolve_attention(config, CPU, BF16, num_heads=heads, head_dim=dim)


@pytest.mark.parametrize("library", [name for name in INSTALL if name != "cudnn"])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [([13], [9]), ([5, 20, 1], [8, 3, 17]), ([4, 0, 7], [0, 6, 5])],
    ids=["one", "three", "empty"],
)
def test_packed_conventions(
    library: str, queries: list[int], keys: list[int], gpu: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(sum(keys))
    q, k, v = (torch.randn(sum(each), 3, 16).to(BF16) for each in (queries, keys, keys))
    lengths = _lengths(queries, keys)
    oracle, oracle_lse = attention_varlen(q.float(), k.float(), v.float(), **lengths)
    INSTALL[library](gpu)
    for backend in (library.partition("-")[0], "auto"):
        out, lse = attention_varlen(q, k, v, **lengths, backend=backend)
        assert out.dtype == BF16 and lse.dtype == torch.float32
        torch.testing.assert_close(out.float(), oracle, rtol=2**-8, atol=1e-5)
        torch.testing.assert_close(lse, oracle_lse)


def test_a_log_sum_exp_of_another_shape_is_refused(gpu: pytest.MonkeyPatch) -> None:
    install_fa2(gpu, is_padded=True)
    q, k, v = (torch.randn(12, 3, 16).to(BF16) for _ in range(3))
    with pytest.raises(
        KernelUnavailableError, match=r"fa2 gave .*\(2, 3, 8\), expected .*\(3, 12\)"
    ):
        attention_varlen(q, k, v, **_lengths([8, 4], [4, 8]), backend="fa2")


def test_order(gpu: pytest.MonkeyPatch) -> None:
    """With everything installed, and the first of them lost one by one."""
    for name in ("fa2", "fa3", "fa4", "xformers", "triton"):
        INSTALL[name](gpu)
    for kernel in ("cudnn", "flash"):
        allow(gpu, kernel)
    config = EngineConfig()
    hopper = ("fa3", "fa4", "cudnn", "fa2", "torch", "xformers", "triton")
    assert tuple(availability(CPU)) == hopper and set(availability(CPU).values()) == {None}
    assert tuple(availability(CPU, packed=True)) == hopper
    for name, package in (("fa3", "flash_attn_interface"), ("fa4", "flash_attn.cute")):
        assert resolve_attention(config, CPU, BF16) == name
        gpu.setitem(sys.modules, package, None)
    assert resolve_attention(config, CPU, BF16) == "cudnn"
    serving = [name for name, why in availability(CPU, packed=True).items() if why is None]
    assert serving == ["fa2", "torch", "xformers", "triton"]
    gpu.setattr(libraries, "capability", lambda device: (8, 0))
    assert resolve_attention(config, CPU, BF16) == "fa2"
    assert resolve_attention(config, CPU, torch.float32) == "torch"
    allow(gpu, "flash", is_allowed=False)
    assert resolve_attention(config, CPU, torch.float32, head_dim=20) == "triton"
    assert resolve_attention(config, CPU, torch.float32, head_dim=200) == "reference"


def test_an_engine_takes_the_library_that_was_named(gpu: pytest.MonkeyPatch) -> None:
    install_fa2(gpu)
    for config, expected in (
        (EngineConfig(), "fa2"),
        (EngineConfig(backend="reference"), "reference"),
        (EngineConfig(attention="reference"), "reference"),
        (EngineConfig(backend="reference", attention="fa2"), "fa2"),
    ):
        assert resolve_attention(config, CPU, BF16) == expected
    with pytest.raises(KernelUnavailableError, match="backend 'fa3', but the packa"):
        resolve_attention(EngineConfig(attention="fa3"), CPU, BF16)


def _no_attribute(patch: pytest.MonkeyPatch) -> None:
    module(patch, "flash_attn")  # as FlashAttention-4 alone leaves it


def _broken(patch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c10\nmore of it")

    patch.setattr(libraries.importlib, "import_module", load)


REFUSALS: list[tuple[str, Callable[[pytest.MonkeyPatch], Any], dict[str, Any], str]] = [
    ("fa3", lambda patch: None, {}, "the package flash_attn_interface is not installed"),
    ("fa2", _no_attribute, {}, "the flash_attn that is installed has no flash_attn_func"),
    (
        "fa2",
        _broken,
        {},
        r"flash_attn cannot be imported: ImportError: .*undefined symbol: _ZN3c10;",
    ),
    ("fa4", install_fa2, {}, "the package flash_attn.cute is not installed"),
    (
        "fa2",
        install_fa2,
        {"dtype": torch.float32},
        "bfloat16 or float16 together, not torch.float3",
    ),
    ("fa2", install_fa2, {"dim": 20}, "head dims up to 256 that 8 divides, not 20"),
    ("fa4", install_fa4, {"dim": 136}, "head dims up to 128 that 8 divides, not 136"),
    ("triton", install_triton, {"dim": 136}, "head dims up to 128, not 136"),
    ("triton", lambda patch: None, {}, "triton is not installed"),
    ("sage", lambda patch: None, {}, "the package sageattention is not installed"),
    ("sage", install_sage, {"dim": 136}, "head dims up to 128 that 8 divides, not 136"),
    ("sage", install_sage, {"dtype": torch.float32}, "bfloat16 or float16 together, not torch.fl"),
    (
        "sage",
        lambda patch: install_sage(patch, release=1),
        {},
        "releases before 2 take head dims of 64, 96 or 128, not 16",
    ),
    ("sparge", lambda patch: None, {}, "the package spas_sage_attn is not installed"),
    ("sparge", install_sparge, {}, "takes head dims of 64 or 128, not 16"),
    ("sparge", install_sparge, {"dim": 64}, "takes at least 128 queries, not 5"),
    ("cudnn", lambda patch: None, {}, "torch refuses it: this build has no such kernel"),
    (
        "cudnn",
        lambda patch: None,
        {"dtype": torch.float32},
        "takes q, k and v in bfloat16 or float1",
    ),
]


@pytest.mark.parametrize(("name", "install", "change", "reason"), REFUSALS)
def test_a_library_that_was_named_runs_or_says_why_not(
    name: str,
    install: Callable[[pytest.MonkeyPatch], Any],
    change: dict[str, Any],
    reason: str,
    gpu: pytest.MonkeyPatch,
) -> None:
    q, k, v = _heads(**change)
    install(gpu)
    with pytest.raises(KernelUnavailableError, match=f"'{name}', but .*{reason}"):
        attention(q, k, v, backend=name)


def test_without_any_library_torch_chooses(gpu: pytest.MonkeyPatch) -> None:
    q, k, v = _heads()
    assert torch.equal(attention(q, k, v, backend="auto"), attention(q, k, v))
    packed, lengths = [t.flatten(0, 1) for t in (q, k, v)], _lengths([4, 6], [9, 9])
    found = attention_varlen(*packed, **lengths, backend="auto")
    for value, expected in zip(found, attention_varlen(*packed, **lengths), strict=True):
        assert torch.equal(value, expected)


def test_further_refusals(gpu: pytest.MonkeyPatch) -> None:
    q, k, v = _heads(dim=32)
    for name in ("fa3", "fa2"):
        INSTALL[name](gpu)
    for each in (q[..., ::2], q.unflatten(-1, (2, 16))[..., 0, :4].repeat(1, 1, 1, 4)[..., ::2]):
        with pytest.raises(KernelUnavailableError, match="channels lie side by side"):
            attention(each, k[..., : each.shape[-1]], v[..., : each.shape[-1]], backend="fa2")
    with pytest.raises(KernelUnavailableError, match="at least one query and one key"):
        attention(q, k[:, :0], v[:, :0], backend="fa2")
    with pytest.raises(
        KernelUnavailableError, match=r"together, not torch.bfloat16, torch.float16"
    ):
        attention(q, k.half(), v.half(), backend="fa2")
    packed = [t.flatten(0, 1) for t in (q, k, v)]
    with pytest.raises(KernelUnavailableError, match="'cudnn', but it takes no packed sequences"):
        attention_varlen(*packed, **_lengths([10], [18]), backend="cudnn")
    for name, install in BY_NAME.items():
        install(gpu)
        library = name.partition("-")[0]
        with pytest.raises(KernelUnavailableError, match=f"'{library}', but it takes no packed"):
            attention_varlen(*packed, **_lengths([10], [18]), backend=library)
    install_sage(gpu)
    gpu.setattr(libraries, "capability", lambda device: (10, 0))
    for name in ("sage", "sparge"):
        with pytest.raises(KernelUnavailableError, match=r"capability 8.0, 8.6, .*, this is 10.0"):
            attention(q, k, v, backend=name)
    gpu.setattr(libraries, "capability", lambda device: (8, 9))
    with pytest.raises(KernelUnavailableError, match=r"capability 9.x to 9.x, this is 8.9"):
        attention(q, k, v, backend="fa3")
    gpu.setattr(libraries, "capability", lambda device: None)
    with pytest.raises(KernelUnavailableError, match="'fa2', but it needs a CUDA device, not cpu"):
        attention(q, k, v, backend="fa2")
