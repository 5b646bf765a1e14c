"""The transformer's block without this project's operations: what a fused block is compared with.

`EagerBlock` is written as one writes it for speed in eager PyTorch: torch's own fused norms,
modulation and gates as single `addcmul`s, a rotation by one complex product, and the same
attention. `diffusers_block` is diffusers' block, as its pipeline runs it by default.

B batch, L tokens, S text tokens, N heads, D head dim, C width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.models.attention import CrossAttention, SelfAttention
from mv2v_engine.models.block import Block
from mv2v_engine.models.sequence import Sequence
from mv2v_engine.ops.attention import attention


class EagerBlock:
    """A block's own parameters in plain torch; constants are cast once, before any call."""

    def __init__(self, block: Block, sequence: Sequence, *, attention_backend: str) -> None:
        self.block, self.attention_backend = block, attention_backend
        self.dtype, self.heads = sequence.x.dtype, block.attn1.num_heads
        self.width = (sequence.x.shape[-1],)
        self.frame_L = sequence.token_frames[0]
        self.turn_BL1D = torch.complex(*sequence.rope.chunk(2, -1))[:, :, None]
        self.norm2_weight = block.norm2.weight.to(self.dtype)
        self.norm2_bias = block.norm2.bias.to(self.dtype)

    def __call__(
        self, x: Tensor, temb_B6C: Tensor, context_BSC: Tensor, cameras_BFP: Tensor | None
    ) -> Tensor:
        """x [1, L, C] -> [1, L, C]."""
        block = self.block
        table = (block.scale_shift_table.float() + temb_B6C.float()).to(self.dtype)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.unsqueeze(2).unbind(1)

        # 1. self-attention
        hidden = self._modulated(x, scale, shift)
        if block.cam_encoder is not None and cameras_BFP is not None:
            hidden += block.cam_encoder(cameras_BFP.to(self.dtype))[0][self.frame_L]
        attended = self._self_attention(block.attn1, hidden)
        if block.projector is not None:
            attended = block.projector(attended)
        x = torch.addcmul(x, attended, gate)

        # 2. cross-attention
        normed = F.layer_norm(x, self.width, self.norm2_weight, self.norm2_bias, block.eps)
        x = x + self._cross_attention(block.attn2, normed, context_BSC)

        # 3. feed-forward
        hidden = self._modulated(x, ffn_scale, ffn_shift)
        expand, _, contract = block.ffn.net
        inner = F.gelu(expand.proj(hidden), approximate="tanh")  # type: ignore[operator]
        return torch.addcmul(x, contract(inner), ffn_gate)

    def _modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.addcmul(shift, F.layer_norm(x, self.width, eps=self.block.eps), 1 + scale)

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, self.width, weight, self.block.eps)

    def _rotated(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self._split(x).float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.turn_BL1D).flatten(-2).to(self.dtype)

    def _self_attention(self, attn: SelfAttention, hidden: Tensor) -> Tensor:
        q = self._rotated(self._normed(attn.to_q(hidden), attn.norm_q.weight))
        k = self._rotated(self._normed(attn.to_k(hidden), attn.norm_k.weight))
        return self._attended(attn, q, k, self._split(attn.to_v(hidden)))

    def _cross_attention(self, attn: CrossAttention, hidden: Tensor, context: Tensor) -> Tensor:
        q = self._split(self._normed(attn.to_q(hidden), attn.norm_q.weight))
        k = self._split(self._normed(attn.to_k(context), attn.norm_k.weight))
        return self._attended(attn, q, k, self._split(attn.to_v(context)))

    def _attended(
        self, attn: SelfAttention | CrossAttention, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        attended = attention(q, k, v, backend=self.attention_backend)
        out: Tensor = attn.to_out[0](attended.flatten(2))
        return out


def diffusers_block(block: Block, sequence: Sequence) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """diffusers' block with the weights of a block without cameras: (x, temb, context) -> x.

    Raises:
        ImportError: diffusers is not installed, or has no such block.
    """
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    theirs = WanTransformerBlock(
        dim=sequence.x.shape[-1],
        ffn_dim=block.ffn.net[2].in_features,
        num_heads=block.attn1.num_heads,
        qk_norm="rms_norm_across_heads",
        cross_attn_norm=True,
        eps=block.eps,
    )
    # in the dtypes of ours, which are those that its from_pretrained leaves
    theirs.load_state_dict(block.state_dict(), assign=True)
    theirs = theirs.eval().requires_grad_(False)
    rotary = [part.repeat_interleave(2, -1)[:, :, None] for part in sequence.rope.chunk(2, -1)]

    def run(x: Tensor, temb_B6C: Tensor, context_BSC: Tensor) -> Tensor:
        out: Tensor = theirs(x, context_BSC, temb_B6C, tuple(rotary))
        return out

    return run
