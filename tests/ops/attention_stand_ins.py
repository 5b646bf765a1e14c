"""Attention libraries that run on a CPU: the signatures and the conventions of the real ones.

What a library would refuse, its stand-in asserts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.ops import attention_libraries as libraries

PACKAGES = (
    "flash_attn_interface",
    "flash_attn",
    "flash_attn.cute",
    "xformers",
    "xformers.ops",
    "sageattention",
    "spas_sage_attn",
)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """[B, L, N, D] laid out as q, and the log-sum-exp [B, N, L]."""
    assert q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:] and k.shape == v.shape
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("blnd,bsnd->bnls", q.double(), k.double()) * scale
    out = torch.einsum("bnls,bsnd->blnd", scores.softmax(-1), v.double())
    return torch.empty_like(q).copy_(out), scores.logsumexp(-1).float()


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float | None,
    *,
    longest: tuple[int | None, int | None] | None = None,
    blind: float = -torch.inf,
) -> tuple[Tensor, Tensor]:
    """[T, N, D] and [N, T]; `blind` is the log-sum-exp of a query without keys."""
    assert q.ndim == 3 and cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
    for cu, bound in zip((cu_q, cu_k), longest or (), strict=False):
        assert bound is not None and bound >= int(cu.diff().max())
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], len(q)), blind)
    edges = [cu.tolist() for cu in (cu_q, cu_k)]
    assert (edges[0][-1], edges[1][-1]) == (len(q), len(k))
    for a, b, c, d in zip(edges[0], edges[0][1:], edges[1], edges[1][1:], strict=False):
        if b > a and d > c:
            part, part_lse = dense(q[None, a:b], k[None, c:d], v[None, c:d], scale)
            out[a:b], lse[:, a:b] = part[0], part_lse[0]
    return out, lse


def module(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    found = ModuleType(name)
    for function, body in functions.items():
        setattr(found, function, body)
    monkeypatch.setitem(sys.modules, name, found)


def install_fa3(monkeypatch: pytest.MonkeyPatch, *, is_old: bool = False) -> None:
    def func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        qv: Tensor | None = None,
        return_attn_probs: bool = False,
    ) -> Any:
        assert qv is None and not causal
        found = dense(q, k, v, softmax_scale)
        return found if return_attn_probs else found[0]

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        softmax_scale: float | None = None,
        return_attn_probs: bool = False,
    ) -> Any:
        assert seqused_q is None and seqused_k is None
        longest = (max_seqlen_q, max_seqlen_k)
        found = _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, longest=longest)
        return found if return_attn_probs else found[0]

    # until August 2025 the log-sum-exp came unasked
    def old_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> Any:
        return func(q, k, v, softmax_scale, return_attn_probs=True)

    def old_varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
    ) -> Any:
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return varlen(q, k, v, *lengths, softmax_scale=softmax_scale, return_attn_probs=True)

    module(
        monkeypatch,
        "flash_attn_interface",
        flash_attn_func=old_func if is_old else func,
        flash_attn_varlen_func=old_varlen if is_old else varlen,
    )


def install_fa4(monkeypatch: pytest.MonkeyPatch) -> None:
    def func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        gather_kv_indices: Tensor | None = None,
        softmax_scale: float | None = None,
        return_lse: bool = False,
    ) -> Any:
        assert qv is None and gather_kv_indices is None
        out, lse = dense(q, k, v, softmax_scale)
        return out, lse if return_lse else None

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        softmax_scale: float | None = None,
        return_lse: bool = False,
    ) -> Any:
        assert qv is None and cu_seqlens_q is not None and cu_seqlens_k is not None
        longest = (max_seqlen_q, max_seqlen_k)
        out, lse = _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, longest=longest)
        return out, lse if return_lse else None

    if sys.modules.get("flash_attn") is None:
        module(monkeypatch, "flash_attn")
    module(monkeypatch, "flash_attn.cute", flash_attn_func=func, flash_attn_varlen_func=varlen)


def install_fa2(monkeypatch: pytest.MonkeyPatch, *, is_padded: bool = False) -> None:
    def func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        return_attn_probs: bool = False,
    ) -> Any:
        assert dropout_p == 0
        out, lse = dense(q, k, v, softmax_scale)
        return (out, lse, None) if return_attn_probs else out

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        return_attn_probs: bool = False,
    ) -> Any:
        assert dropout_p == 0
        cu, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        out, lse = _packed(q, k, v, *cu, softmax_scale, longest=longest, blind=torch.inf)
        if is_padded:  # before 2.6: a row for every sequence
            lse = torch.zeros(len(cu_seqlens_q) - 1, q.shape[1], max_seqlen_q)
        return (out, lse, None) if return_attn_probs else out

    module(monkeypatch, "flash_attn", flash_attn_func=func, flash_attn_varlen_func=varlen)


class _Mask:
    def __init__(self, queries: list[int], keys: list[int]) -> None:
        self.queries, self.keys = queries, keys

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int]) -> _Mask:
        return cls(q_seqlen, kv_seqlen)


def install_xformers(monkeypatch: pytest.MonkeyPatch, *, is_padded: bool = False) -> None:
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: _Mask | None = None,
        p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        assert attn_bias is None and p == 0
        return dense(query, key, value, scale)[0]

    def with_lse(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: _Mask | None = None,
        p: float = 0.0,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(attn_bias, _Mask) and len(query) == len(key) == 1 and p == 0
        cu_q, cu_k = (
            torch.tensor([0, *each]).cumsum(0).int() for each in (attn_bias.queries, attn_bias.keys)
        )
        out, lse = _packed(query[0], key[0], value[0], cu_q, cu_k, scale, blind=torch.inf)
        # what stands where there is no key, and after the last query, is not to be read
        out[lse[0].isinf()] = torch.nan
        if not is_padded:
            return out[None], F.pad(lse, (0, 3), value=torch.nan)[None]
        rows = lse.split(attn_bias.queries, 1)
        padded = [F.pad(row, (0, 32 - row.shape[1]), value=torch.nan) for row in rows]
        return out[None], torch.stack(padded)

    module(monkeypatch, "xformers")
    module(
        monkeypatch,
        "xformers.ops",
        memory_efficient_attention_forward=forward,
        memory_efficient_attention_forward_requires_grad=with_lse,
    )
    module(monkeypatch, "xformers.ops.fmha", BlockDiagonalMask=_Mask)


def install_in_torch(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What torch would run on a GPU, and its word that it would."""

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        enabled = {
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
            "torch": torch.backends.cuda.flash_sdp_enabled(),
            "math": torch.backends.cuda.math_sdp_enabled(),
        }
        assert [each for each, is_enabled in enabled.items() if is_enabled] == [name]
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return dense(q, k, v)[0].transpose(1, 2)

    def varlen(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> tuple[Tensor, Tensor]:
        assert return_aux.lse and window_size == (-1, -1)
        cu, longest = (cu_seq_q, cu_seq_k), (max_q, max_k)
        return _packed(query, key, value, *cu, scale, longest=longest, blind=torch.inf)

    allow(monkeypatch, "cudnn" if name == "cudnn" else "flash")
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    if name == "torch":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)


def allow(monkeypatch: pytest.MonkeyPatch, kernel: str, *, is_allowed: bool = True) -> None:
    """What torch says of its `cudnn`, `flash` or `mem_efficient` kernel."""
    check = f"_can_use_{kernel}_attention"
    monkeypatch.setattr(torch._C, check, lambda params, debug: is_allowed)
    if kernel == "flash":
        monkeypatch.setattr(torch._C, "_is_flash_attention_available", lambda: is_allowed)


def install_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int
    ) -> tuple[Tensor, Tensor]:
        return _packed(q, k, v, cu_q, cu_k, None, longest=(max_q, len(k)))

    module(monkeypatch, "mv2v_kernels.attention", MAX_HEAD_DIM=128)
    monkeypatch.setattr(libraries, "triton_launcher", lambda op: launch)


def _by_layout(
    q: Tensor, k: Tensor, v: Tensor, layout: str, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Either layout's result in that layout, and its log-sum-exp."""
    assert layout in ("HND", "NHD") and q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    if layout == "NHD":
        return dense(q, k, v, scale)
    out, lse = dense(*(t.transpose(1, 2) for t in (q, k, v)), scale)
    return out.transpose(1, 2), lse


def install_sage(monkeypatch: pytest.MonkeyPatch, *, release: int = 2) -> None:
    def sageattn(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        sm_scale: float | None = None,
        return_lse: bool = False,
        **kwargs: Any,
    ) -> Any:
        # the real one drops what it does not know
        assert not kwargs and not is_causal and q.shape[-1] <= 128
        out, lse = _by_layout(q, k, v, tensor_layout, sm_scale)
        return (out, lse) if return_lse else out

    def sageattn_1(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        sm_scale: float | None = None,
        smooth_k: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        assert not kwargs and not is_causal and q.shape[-1] in (64, 96, 128)
        if smooth_k:
            k -= k.mean(1 if tensor_layout == "NHD" else 2, keepdim=True)
        return _by_layout(q, k, v, tensor_layout, sm_scale)[0]

    module(monkeypatch, "sageattention", sageattn=sageattn if release == 2 else sageattn_1)


def install_sparge(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        smooth_k: bool = True,
        simthreshd1: float = -0.1,
        cdfthreshd: float | None = None,
        topk: float = 0.5,
        pvthreshd: int = 50,
        attention_sink: bool = False,
        tensor_layout: str = "HND",
        output_dtype: torch.dtype = torch.float16,
        return_sparsity: bool = False,
    ) -> Tensor:
        assert attn_mask is None and dropout_p == 0 and not is_causal and smooth_k
        assert topk == 0.5 and cdfthreshd is None and not return_sparsity
        assert q.shape[1 if tensor_layout == "NHD" else 2] >= 128 and q.shape[-1] in (64, 128)
        return _by_layout(q, k, v, tensor_layout, scale)[0]

    module(monkeypatch, "spas_sage_attn", spas_sage2_attn_meansim_topk_cuda=attend)


# approximate ones, which are exact here: what is proven is how they are called
BY_NAME: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "sage": install_sage,
    "sage-1": lambda patch: install_sage(patch, release=1),
    "sparge": install_sparge,
}
INSTALL: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "fa3": install_fa3,
    "fa3-old": lambda patch: install_fa3(patch, is_old=True),
    "fa4": install_fa4,
    "cudnn": lambda patch: install_in_torch(patch, "cudnn"),
    "fa2": install_fa2,
    "torch": lambda patch: install_in_torch(patch, "torch"),
    "xformers": install_xformers,
    "xformers-padded": lambda patch: install_xformers(patch, is_padded=True),
    "triton": install_triton,
}
