"""Self- and cross-attention with Wan's full-width q/k RMSNorm.

B batch, L tokens, S text tokens, N heads, D head dim, C = N * D.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mv2v_engine.models.camera_rays import phase_layer
from mv2v_engine.models.feed_forward import Linear
from mv2v_engine.models.kept import KeysValues
from mv2v_engine.ops.attention import attention, attention_varlen
from mv2v_engine.ops.attention_libraries import Pack
from mv2v_engine.ops.qk_norm_rope import qk_norm_rope


class RMSNormWeight(nn.Module):
    """The learned scale of an RMSNorm; the ops do the arithmetic."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class _Projections(nn.Module):
    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(dim, dim)
        self.to_v = Linear(dim, dim)
        self.to_out = nn.ModuleList([Linear(dim, dim)])
        self.norm_q = RMSNormWeight(dim)
        self.norm_k = RMSNormWeight(dim)
        self.backend = "reference"
        self.attention_backend = "reference"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack | None = None) -> Tensor:
        """[B, L, N, D], before the output projection.

        pack: of several samples in one sequence, each of which attends to its own alone.
        """
        if pack is None:
            return attention(q, k, v, backend=self.attention_backend)
        out, _ = attention_varlen(
            q[0],
            k[0],
            v[0],
            cu_seqlens_q=pack.cu_q,
            cu_seqlens_k=pack.cu_k,
            max_seqlen_q=pack.max_q,
            max_seqlen_k=pack.max_k,
            backend=self.attention_backend,
        )
        return out[None]

    def _norm(self, x_BLC: Tensor, weight: Tensor, rope_BLD: Tensor | None = None) -> Tensor:
        """[B, L, N, D], normalised over the full width, turned if there is a table."""
        return qk_norm_rope(
            x_BLC,
            weight,
            rope_BLD,
            num_heads=self.num_heads,
            eps=self.eps,
            backend=self.backend,
        )

    def out(self, attended_BLND: Tensor) -> Tensor:
        """The output projection [B, L, C]."""
        out: Tensor = self.to_out[0](attended_BLND.flatten(2))
        return out


class SelfAttention(_Projections):
    """q and k are normalised and rotated, v is not; with phases all three are turned by cameras."""

    def __init__(self, dim: int, num_heads: int, eps: float, num_phases: int = 0) -> None:
        super().__init__(dim, num_heads, eps)
        count = num_heads * num_phases
        self.rope_phase_qk = phase_layer(dim, count) if count else None
        self.rope_phase_vo = phase_layer(dim, count) if count else None

    def phases(self, rays_BLC: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Phases [B, L, N, P] of q and k, and of v and the result; None of a model without."""
        if self.rope_phase_qk is None or self.rope_phase_vo is None:
            return None
        assert rays_BLC is not None
        qk, vo = self.rope_phase_qk(rays_BLC), self.rope_phase_vo(rays_BLC)
        return qk.unflatten(-1, (self.num_heads, -1)), vo.unflatten(-1, (self.num_heads, -1))

    def queries(self, hidden_BLC: Tensor, rope_BLD: Tensor | None) -> Tensor:
        return self._norm(self.to_q(hidden_BLC), self.norm_q.weight, rope_BLD)

    def keys_values(self, hidden_BLC: Tensor, rope_BLD: Tensor | None) -> KeysValues:
        """k, v [B, L, N, D]: what static conditioning keeps across steps.

        Without a table the keys are as a stream keeps them: normalised and unrotated.
        """
        keys = self._norm(self.to_k(hidden_BLC), self.norm_k.weight, rope_BLD)
        return keys, self.to_v(hidden_BLC).unflatten(-1, (self.num_heads, -1))

    def plain_queries(self, hidden_BLC: Tensor) -> Tensor:
        """Normalised, unrotated queries [B, L, C] for responsiveness (METHOD 6)."""
        return self._norm(self.to_q(hidden_BLC), self.norm_q.weight).flatten(2)

    def plain_keys(self, hidden_BLC: Tensor) -> Tensor:
        """Normalised, unrotated keys [B, L, C]."""
        return self._norm(self.to_k(hidden_BLC), self.norm_k.weight).flatten(2)


class HistoryAttention(_Projections):
    """Attention to what a history's tokens were made of, without positions (METHOD 17).

    Zero at the start. width: E, of the history encoder's last hidden states.
    """

    def __init__(self, dim: int, num_heads: int, eps: float, width: int) -> None:
        super().__init__(dim, num_heads, eps)
        self.to_k, self.to_v = Linear(width, dim), Linear(width, dim)
        for parameter in self.to_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden_BLC: Tensor, history_BLE: Tensor) -> Tensor:
        keys = self._norm(self.to_k(history_BLE), self.norm_k.weight)
        values = self.to_v(history_BLE).unflatten(-1, (self.num_heads, -1))
        # the queries are not named: they are gone before the output is made
        return self.out(
            self.attend(self._norm(self.to_q(hidden_BLC), self.norm_q.weight), keys, values)
        )


class CrossAttention(_Projections):
    """Attention to the text, without positions and without a mask, as Wan does.

    has_image: image tokens have k and v of their own, and their result is added.
    """

    def __init__(self, dim: int, num_heads: int, eps: float, *, has_image: bool = False) -> None:
        super().__init__(dim, num_heads, eps)
        self.add_k_proj = nn.Linear(dim, dim) if has_image else None
        self.add_v_proj = nn.Linear(dim, dim) if has_image else None
        self.norm_added_k = RMSNormWeight(dim) if has_image else None

    def image_keys_values(self, image_BIC: Tensor) -> KeysValues:
        """k, v [B, I, N, D] of image tokens."""
        assert self.add_k_proj is not None and self.add_v_proj is not None
        assert self.norm_added_k is not None
        keys = self._norm(self.add_k_proj(image_BIC), self.norm_added_k.weight)
        return keys, self.add_v_proj(image_BIC).unflatten(-1, (self.num_heads, -1))

    def keys_values(self, text_BSC: Tensor) -> KeysValues:
        """k, v [B, S, N, D]: what a stream keeps as long as its prompt stays."""
        keys = self._norm(self.to_k(text_BSC), self.norm_k.weight)
        return keys, self.to_v(text_BSC).unflatten(-1, (self.num_heads, -1))

    def forward(
        self,
        hidden_BLC: Tensor,
        keys_values: KeysValues,
        pack: Pack | None = None,
        image: KeysValues | None = None,
        image_pack: Pack | None = None,
    ) -> Tensor:
        if image is not None:
            queries = self._norm(self.to_q(hidden_BLC), self.norm_q.weight)
            attended = self.attend(queries, *keys_values, pack)
            attended = attended + self.attend(queries, *image, image_pack)
            del queries
            return self.out(attended)
        # the queries are not named: they are gone before the output is made
        return self.out(
            self.attend(self._norm(self.to_q(hidden_BLC), self.norm_q.weight), *keys_values, pack)
        )
