"""What all operations have in common: each is one graph to torch.compile, and refuses in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.ops.adaln import adaln
from mv2v_engine.ops.attention import attention, attention_varlen
from mv2v_engine.ops.frame_responsiveness import frame_responsiveness
from mv2v_engine.ops.gated_residual import gated_residual
from mv2v_engine.ops.linear_gelu import linear_gelu
from mv2v_engine.ops.prope import prope
from mv2v_engine.ops.qk_norm_rope import qk_norm_rope
from mv2v_engine.ops.residual_norm import residual_norm
from mv2v_engine.ops.rope import rope
from mv2v_engine.ops.token_merge import token_merge

_generator = torch.Generator().manual_seed(0)


def real(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator)


def numbers(below: int, *shape: int) -> Tensor:
    return torch.randint(below, shape, generator=_generator)


LENGTHS = {"cu_seqlens_q": torch.tensor([0, 5, 7]).int(), "max_seqlen_q": 5}
LENGTHS |= {"cu_seqlens_k": torch.tensor([0, 3, 12]).int(), "max_seqlen_k": 9}
WEIGHTS = {"weight": real(12, 12, 2, 2), "bias": real(12)}
ORDER = {"kept": torch.tensor([[0, 2, 3], [1, 2, 4]]), "merged": torch.tensor([[1, 4], [0, 3]])}
GIVEN: dict[Callable[..., Any], dict[str, Any]] = {
    adaln: {
        **{"x": real(2, 6, 10), "scale": real(2, 10), "shift": real(2, 10)},
        **{"camera": real(2, 3, 10), "frame": numbers(3, 2, 6)},
    },
    attention: {"q": real(2, 5, 3, 4), "k": real(2, 9, 3, 4), "v": real(2, 9, 3, 4)},
    attention_varlen: {"q": real(7, 2, 4), "k": real(12, 2, 4), "v": real(12, 2, 4)} | LENGTHS,
    frame_responsiveness: {
        **{"q": real(2, 5, 8), "k": real(2, 10, 8)},
        **{"frames": [2, 1], "tokens": [3, 4]},
    },
    gated_residual: {"x": real(2, 7, 12), "y": real(2, 7, 12), "gate": real(2, 12)},
    linear_gelu: {"x": real(2, 9, 24), "weight": real(40, 24), "bias": real(40)},
    prope: {
        **{"x": real(2, 7, 3, 12), "matrix": real(2, 5, 4, 4)},
        **{"frame": numbers(5, 2, 7), "channels": 8},
    },
    qk_norm_rope: {
        **{"x": real(2, 5, 12), "weight": real(12)},
        **{"rope": real(1, 5, 4), "num_heads": 3},
    },
    residual_norm: {
        **{"x": real(2, 7, 12), "y": real(2, 7, 12), "gate": real(2, 12)},
        **{"scale": real(2, 12), "shift": real(2, 12)},
    },
    rope: {"x": real(2, 5, 3, 4), "rope": real(1, 5, 4)},
    token_merge: {"x": real(2, 5, 15, 12), "rope": real(1, 5, 15, 6), "grid": (3, 5)}
    | ORDER
    | WEIGHTS,
}


@pytest.mark.parametrize("op", GIVEN, ids=lambda op: op.__name__)
def test_compiles_without_graph_breaks(op: Callable[..., Any]) -> None:
    (name, first), *rest = GIVEN[op].items()

    def run(x: Tensor) -> Any:
        return op(**{name: x}, **dict(rest), backend="auto")

    torch.compiler.reset()  # one function is compiled for so many others alone
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(first), run(first), rtol=0, atol=0)


def cut(*part: Any) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[part]


def meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


first, fewer, narrow = cut(0), cut(slice(None), slice(3)), cut(..., slice(2))
two_heads = cut(slice(None), slice(None), slice(2))
# for each operation what is wrong: an argument's value, or what is done to a right one; the words
REFUSED: dict[Callable[..., Any], list[tuple[dict[str, Any], str]]] = {
    adaln: [
        ({"x": Tensor.long}, r"x must be of a floating dtype, got torch.int64"),
        ({"shift": Tensor.bool}, r"shift must be of a floating dtype, got torch.bool"),
        ({"frame": Tensor.float}, r"frame must be int32 or int64, got torch.float32"),
        ({"scale": meta}, "scale must be on cpu as the first tensor is, got meta"),
        ({"x": first}, r"x must have shape \[B, L, C\], got \(6, 10\)"),
        ({"scale": narrow}, r"\(2, 10\)"),
        ({"shift": cut(slice(1))}, "shape"),
        ({"frame": None}, "both or neither"),
        ({"camera": None}, "both or neither"),
        ({"camera": narrow}, "camera"),
        ({"frame": fewer}, "frame"),
        ({"backend": "cuda"}, "cuda.*needs a CUDA device"),
    ],
    attention: [
        ({"v": fewer}, "must agree"),
        ({"k": two_heads, "v": two_heads}, "must agree"),
        ({"k": narrow, "v": narrow}, "must agree"),
        ({"q": cut(slice(1))}, "must agree"),
        ({"k": Tensor.long}, r"k must be of a floating dtype, got torch.int64"),
        ({"v": meta}, "v must be on cpu as the first tensor is, got meta"),
        ({"q": first}, r"q must have shape \[B, L, N, D\]"),
    ],
    attention_varlen: [
        ({"cu_seqlens_q": torch.tensor([0, 7]).int()}, r"got \(2,\) and \(3,\)"),
        ({"cu_seqlens_k": torch.tensor([0, 3, 12])}, "contiguous int32, got torch.int64"),
        ({"cu_seqlens_k": torch.tensor([0.0, 3, 12])}, "must be int32 or int64"),
        ({"max_seqlen_q": 0}, r"max_seqlen_q must lie in 1..7, got 0"),
        ({"max_seqlen_k": 13}, r"max_seqlen_k must lie in 1..12, got 13"),
        ({"backend": "fastest"}, "backend must be .*fa3.* got 'fastest'"),
        ({"v": cut(slice(4))}, r"k and v \[S, N, D\]"),
    ],
    frame_responsiveness: [
        ({"k": Tensor.long}, r"k must be of a floating dtype, got torch.int64"),
        ({"k": meta}, "k must be on cpu as the first tensor is, got meta"),
        ({"k": narrow}, r"k \[B, L, C\], got \(2, 5, 8\) and \(2, 10, 2\)"),
        ({"num_heads": 3}, "3 heads do not divide a width of 8"),
        ({"q": cut(slice(None), slice(0))}, "at least one query"),
        ({"frames": [], "tokens": []}, "equally many positive counts"),
        ({"frames": [2], "tokens": [3, 0]}, "equally many positive counts"),
        ({"frames": [2, 0], "tokens": [3, 3]}, "equally many positive counts"),
        ({"frames": [3], "tokens": [3]}, "cover 9 tokens, k has 10"),
    ],
    gated_residual: [
        ({"y": Tensor.long}, r"y must be of a floating dtype, got torch.int64"),
        ({"gate": meta}, "gate must be on cpu as the first tensor is, got meta"),
        ({"x": first, "y": first}, r"x must have shape \[B, L, C\], got \(7, 12\)"),
        ({"y": fewer}, r"\(2, 7, 12\)"),
        ({"gate": cut(slice(None), None)}, r"\(2, 12\)"),
    ],
    linear_gelu: [
        ({"x": narrow}, r"weight \[H, C\] and bias \[H\], got .*\(40, 24\)"),
        ({"bias": cut(slice(24))}, r"bias \[H\], got .*\(24,\)"),
        ({"bias": Tensor.long}, r"bias must be of a floating dtype, got torch.int64"),
    ],
    prope: [
        *(
            ({"channels": wrong}, rf"a multiple of 4 in 4\.\.12, .* got {wrong}")
            for wrong in (0, 6, 16)
        ),
        ({"x": first}, r"x must have shape \[B, L, N, D\], got \(7, 3, 12\)"),
        *(
            ({"matrix": wrong}, r"matrix must have shape \[2, F, 4, 4\]")
            for wrong in (cut(slice(1)), cut(..., slice(3)), cut(slice(None), 0))
        ),
        ({"frame": fewer}, r"frame must have shape \(2, 7\), got \(2, 3\)"),
        ({"frame": Tensor.float}, r"frame must be int32 or int64, got torch\.float32"),
        ({"matrix": meta}, "matrix must be on cpu as the first tensor is, got meta"),
    ],
    qk_norm_rope: [
        ({"weight": Tensor.long}, r"weight must be of a floating dtype, got torch.int64"),
        ({"rope": meta}, "rope must be on cpu as the first tensor is, got meta"),
        ({"x": first}, r"x must have shape \[B, L, C\], got \(5, 12\)"),
        ({"num_heads": 4}, "4 heads of an even dim do not divide a width of 12"),
        ({"rope": fewer}, "rope must have shape"),
        ({"num_heads": 2}, "rope must have shape"),
        ({"rope": lambda table: table.expand(3, -1, -1)}, "rope must have shape"),
        ({"weight": cut(slice(4))}, "weight"),
    ],
    residual_norm: [
        ({"weight": torch.ones(12)}, "either scale.* or weight"),
        ({"scale": None}, "either scale.* or weight"),
        ({"scale": first}, r"scale must have shape \(2, 12\), got \(12,\)"),
        ({"shift": first}, r"shift must have shape \(2, 12\), got \(12,\)"),
        ({"gate": cut(slice(None), None)}, r"gate must have shape \(2, 12\), got \(2, 1, 12"),
        ({"gate": Tensor.long}, "gate must be of a floating dtype"),
        ({"shift": meta}, "shift must be on cpu"),
        ({"y": fewer}, r"one shape \[B, L, C\], got \(2, 7, 12\) and \(2, 3, 12"),
    ],
    rope: [
        ({"rope": Tensor.long}, r"rope must be of a floating dtype, got torch.int64"),
        ({"rope": meta}, "rope must be on cpu as the first tensor is, got meta"),
        ({"x": first}, r"of an even D, got \(5, 3, 4\)"),
        ({"x": cut(..., slice(3))}, r"of an even D, got \(2, 5, 3, 3\)"),
        *(
            ({"rope": wrong}, r"rope must have shape \[1 or 2, 5, 4\]")
            for wrong in (fewer, narrow, lambda table: table.expand(3, -1, -1))
        ),
    ],
    token_merge: [
        ({"rope": Tensor.long}, r"rope must be of a floating dtype, got torch.int64"),
        ({"kept": Tensor.bool}, r"kept must be int32 or int64, got torch.bool"),
        ({"merged": meta}, "merged must be on cpu as the first tensor is, got meta"),
        ({"x": first}, r"x must have shape .* got \(5, 15, 12\)"),
        ({"kept": first}, r"kept must have shape \[2, frames\], got \(3,\)"),
        ({"weight": torch.zeros(12, 5, 2, 2)}, r"weight must have shape \[12, 12\] or"),
        ({"bias": cut(slice(4))}, r"bias must have shape \(12,\), got \(4,\)"),
        ({"grid": (3, 4)}, r"grid \(3, 4\)"),
        ({"rope": cut(slice(None), slice(None), slice(4))}, "rope"),
        ({"kernel": (1, 2)}, r"kernel \(2, 2\), expected \(1, 2\)"),
    ],
}
for _op in GIVEN:
    if _op is not linear_gelu:  # it has no kernel of Triton's
        REFUSED[_op].append(({"backend": "triton"}, "triton.*needs a CUDA device"))
ROWS = [(op, *row) for op, rows in REFUSED.items() for row in rows]


@pytest.mark.parametrize(
    ("op", "change", "message"),
    ROWS,
    ids=[f"{op.__name__}-{'-'.join(change)}-{message[:20]}" for op, change, message in ROWS],
)
def test_what_does_not_fit_is_refused(
    op: Callable[..., Any], change: dict[str, Any], message: str
) -> None:
    given = GIVEN[op].copy()
    for name, wrong in change.items():
        given[name] = wrong(given[name]) if callable(wrong) else wrong
    error: type[Exception] = ValueError
    if "dtype" in message or "int32" in message:  # what is wrong is a dtype
        error = TypeError
    elif "CUDA" in message:
        error = KernelUnavailableError
    with pytest.raises(error, match=message):
        op(**given)
