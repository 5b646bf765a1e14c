"""Scaled dot-product attention of one packed sequence; never the math path on long ones.

The math path stores every score: 192 GiB on ReCamMaster's 65,520 tokens. Above 4,096 tokens it
is refused and the message says what to install.

B batch, L query and S key tokens, N heads, D head dim.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.ops.backend import define

MATH_LIMIT = 4096
# cuDNN leads on Hopper; torch by itself would pick FlashAttention-2
_FUSED = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
]


def attention_reference(q_BLND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q_BLND, k_BSND, v_BSND))
    if max(q.shape[2], k.shape[2]) <= MATH_LIMIT:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        try:
            with sdpa_kernel(_FUSED, set_priority=True):
                out = F.scaled_dot_product_attention(q, k, v)
        except RuntimeError as error:
            raise KernelUnavailableError(
                f"no fused attention takes {k.shape[2]} tokens of {q.dtype} with head dim "
                f"{q.shape[3]} on {q.device}, and the math path is refused above {MATH_LIMIT} "
                "tokens; use bfloat16 or float16 on CUDA, or install flash-attn"
            ) from error
    return out.transpose(1, 2)


_attention = define(
    "attention",
    "(Tensor q, Tensor k, Tensor v) -> Tensor",
    # an operator may not return a view of something it does not own: keep the layout fixed
    lambda q, k, v: attention_reference(q, k, v).contiguous(),
    lambda q, k, v: q.new_empty(q.shape),
)


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "reference") -> Tensor:
    """q [B, L, N, D], k and v [B, S, N, D] -> [B, L, N, D]; every query sees every key."""
    if k.shape != v.shape or q.shape[2:] != k.shape[2:] or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must agree in batch, "
            "heads and head dim, and k and v in length"
        )
    run = attention_reference if backend == "reference" else _attention
    result: Tensor = run(q, k, v)
    return result
