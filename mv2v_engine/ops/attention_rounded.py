"""What SageAttention and SpargeAttn compute, in plain torch on any device: slow, to measure by.

SageAttention (arXiv 2410.02367): the mean of all keys is taken from each key, which leaves the
softmax as it is; blocks of 128 queries and of 64 keys of a head are rounded to int8 with one scale
a block, so that a score is an integer product and two scales. Weights and values stay floats, as in
its kernels without float8.

SpargeAttn (arXiv 2502.18137), by its rule of a fixed share: of the blocks of keys, each block of
queries sees those whose mean key its mean query scores highest.

B batch, L query and S key tokens, N heads, D head dim, I blocks of queries, J blocks of keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

QUERIES, KEYS = 128, 64
# share of the blocks of keys that are kept, which SpargeAttn's authors recommend
SHARE = 0.5
_LARGEST = 127.0
# what their quantisers add to a scale, so that a block of zeros has one
_LEAST_SCALE = 1e-7


def rounded_attention(
    q_BLND: Tensor, k_BSND: Tensor, v_BSND: Tensor, *, share: float | None = None
) -> Tensor:
    """Attention [B, L, N, D] over int8 queries and keys, in float32 beyond that.

    share: of the blocks of keys that a block of queries sees, at least one; None: all.
    """
    q, k, v = (t.transpose(1, 2).float() for t in (q_BLND, k_BSND, v_BSND))
    k = k - k.mean(2, keepdim=True)
    seen = None if share is None else chosen_blocks(q, k, share)
    # integers in float32: products of 128 channels stay below 2 ** 24 and are exact
    q_int, q_scale = rounded_blocks(q, QUERIES)
    k_int, k_scale = rounded_blocks(k, KEYS)
    k_scale = k_scale.repeat_interleave(KEYS, 2)[:, :, : k.shape[2]]
    rows = []
    for index, block in enumerate(q_int.split(QUERIES, 2)):
        scale = q_scale[:, :, index, None, None] * k_scale[:, :, None] * q.shape[-1] ** -0.5
        scores = block @ k_int.transpose(2, 3) * scale
        if seen is not None:
            mask = seen[:, :, index].repeat_interleave(KEYS, 2)[:, :, : k.shape[2]]
            scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
        rows.append(scores.softmax(-1) @ v)
    return torch.cat(rows, 2).transpose(1, 2).to(q_BLND.dtype)


def rounded_blocks(x_BNLD: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Integers -127..127 [B, N, L, D] and the scale of every block of `size` tokens [B, N, I]."""
    length = x_BNLD.shape[2]
    blocks = F.pad(x_BNLD, (0, 0, 0, -length % size)).unflatten(2, (-1, size))
    scale = blocks.abs().amax((3, 4)) / _LARGEST + _LEAST_SCALE
    whole = blocks / scale[..., None, None]
    # halves go away from zero
    whole = torch.trunc(whole + 0.5 * whole.sign())
    return whole.flatten(2, 3)[:, :, :length], scale


def chosen_blocks(q_BNLD: Tensor, k_BNSD: Tensor, share: float) -> Tensor:
    """Which blocks of keys each block of queries sees: bool [B, N, I, J].

    k: without its mean.
    """
    q, k = _means(q_BNLD, QUERIES), _means(k_BNSD, KEYS)
    scores = q @ k.transpose(2, 3)
    count = max(int(share * k.shape[2]), 1)
    places = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(3, places, value=True)


def _means(x_BNLD: Tensor, size: int) -> Tensor:
    """The mean token of every block [B, N, I, D]; the last block may be shorter."""
    return torch.stack([block.mean(2) for block in x_BNLD.split(size, 2)], 2)
