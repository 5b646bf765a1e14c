"""Context parallelism (Ulysses): every rank holds some of the tokens, and attends with some heads.

A rank's tokens are projected, normalised and rotated where they lie. Around self-attention one
all-to-all turns "some tokens, all heads" into "all tokens, some heads", and another turns what
comes out back. Neither tokens nor heads need to divide by the ranks: the first ranks have one more.

P ranks, B batch, L tokens of a rank, T tokens of all, N heads, n heads of a rank, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from mv2v_engine.errors import RequestError


def even_lengths(total: int, size: int) -> list[int]:
    """`total` over so many ranks; the first ones have one more where it does not divide."""
    each, more = divmod(total, size)
    return [each + (rank < more) for rank in range(size)]


def head_lengths(num_heads: int, size: int) -> list[int]:
    """Heads of every rank.

    Raises:
        RequestError: a rank would have none.
    """
    if size > num_heads:
        even = [count for count in range(1, num_heads + 1) if not num_heads % count]
        raise RequestError(
            f"context={size} leaves ranks without an attention head: the model has {num_heads}; "
            f"use at most {num_heads}, and best one of {', '.join(map(str, even))}, which share "
            "them evenly"
        )
    return even_lengths(num_heads, size)


class ContextGroup:
    """The ranks that share the tokens of one forward; every rank makes the same calls in order.

    received_bytes: what this rank has been sent so far.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.received_bytes = 0

    def exchange(self, flat: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send each rank its elements of a flat tensor; those received, in the ranks' order."""
        received = flat.new_empty(sum(receive))
        dist.all_to_all_single(received, flat, list(receive), list(send), group=self.group)
        self.received_bytes += (sum(receive) - receive[self.rank]) * flat.itemsize
        return received

    def gather(self, own: Tensor) -> Tensor:
        """Every rank's tensor of one shape, stacked [P, ...]."""
        everyone = own.new_empty(self.size, *own.shape)
        dist.all_gather(list(everyone.unbind()), own.contiguous(), group=self.group)
        self.received_bytes += everyone.nbytes - own.nbytes
        return everyone

    def take_largest(self, values: Tensor) -> None:
        """The elementwise largest of all ranks, in place: the same bits on every rank."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        self.received_bytes += values.nbytes


@dataclass(frozen=True, eq=False)
class Shard:
    """One rank's tokens of a sequence whose consecutive parts are each spread over all ranks.

    parts: tokens of each part (target, conditioning), all ranks together. A rank holds its run of
    the first part, then of the second, so that a part can go on by itself with every rank at work.
    """

    context: ContextGroup
    parts: tuple[int, ...]

    @cached_property
    def lengths(self) -> list[list[int]]:
        """The tokens of each part that every rank has."""
        by_part = [even_lengths(part, self.context.size) for part in self.parts]
        return [list(of_rank) for of_rank in zip(*by_part, strict=True)]

    @cached_property
    def totals(self) -> list[int]:
        """Tokens of every rank."""
        return [sum(of_rank) for of_rank in self.lengths]

    def own(self, part: int) -> int:
        """This rank's tokens of a part."""
        return self.lengths[self.context.rank][part]

    def alone(self, part: int) -> Shard:
        """A part by itself."""
        return Shard(self.context, self.parts[part : part + 1])

    def take(self, x: Tensor) -> Tensor:
        """This rank's tokens [B, L, ...] of all [B, T, ...], copied: the others can be freed."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                "tokens that lie over several ranks have no gradients; run under torch.no_grad()"
            )
        rank, start, pieces = self.context.rank, 0, []
        for part, tokens in enumerate(self.parts):
            before = sum(of_rank[part] for of_rank in self.lengths[:rank])
            pieces.append(x[:, start + before : start + before + self.own(part)])
            start += tokens
        return torch.cat(pieces, 1)

    def gather(self, own: Tensor) -> Tensor:
        """All ranks' tokens [B, T, ...] of this rank's [B, L, ...], on every rank."""
        first = own.transpose(0, 1)
        # collectives of unequal shapes are not every backend's
        padded = first.new_zeros(max(self.totals), *first.shape[1:])
        padded[: len(first)] = first
        everyone = self.context.gather(padded)
        by_rank = [everyone[rank, :total] for rank, total in enumerate(self.totals)]
        return self._in_order(torch.cat(by_rank)).transpose(0, 1).contiguous()

    def by_heads(self, x_BLND: Tensor) -> Tensor:
        """This rank's tokens with all heads -> all tokens with this rank's heads [B, T, n, D]."""
        batch, own, num_heads, dim = x_BLND.shape
        heads, row = head_lengths(num_heads, self.context.size), batch * dim
        first = x_BLND.transpose(0, 1)
        flat = torch.cat([piece.reshape(-1) for piece in first.split(heads, 2)])
        mine = heads[self.context.rank]
        received = self.context.exchange(
            flat, [own * n * row for n in heads], [total * mine * row for total in self.totals]
        )
        tokens = self._in_order(received.view(-1, batch, mine, dim))
        return tokens.transpose(0, 1).contiguous()

    def by_tokens(self, x_BTnD: Tensor, num_heads: int) -> Tensor:
        """The way back: all tokens with this rank's heads -> this rank's with all [B, L, N, D]."""
        batch, _, mine, dim = x_BTnD.shape
        heads, row = head_lengths(num_heads, self.context.size), batch * dim
        own = self.totals[self.context.rank]
        flat = self._by_rank(x_BTnD.transpose(0, 1)).reshape(-1)
        counts = [own * n * row for n in heads]
        received = self.context.exchange(
            flat, [total * mine * row for total in self.totals], counts
        )
        pieces = [
            piece.view(own, batch, n, dim)
            for piece, n in zip(received.split(counts), heads, strict=True)
        ]
        return torch.cat(pieces, 2).transpose(0, 1).contiguous()

    def _in_order(self, by_rank: Tensor) -> Tensor:
        """Tokens [T, ...] as the ranks hold them -> as the sequence has them, part after part."""
        if max(self.parts) == sum(self.parts):
            return by_rank
        pieces = by_rank.split([length for of_rank in self.lengths for length in of_rank])
        count = len(self.parts)
        return torch.cat([piece for part in range(count) for piece in pieces[part::count]])

    def _by_rank(self, in_order: Tensor) -> Tensor:
        """The way back of `_in_order`."""
        if max(self.parts) == sum(self.parts):
            return in_order
        size, by_part = self.context.size, zip(*self.lengths, strict=True)
        pieces = in_order.split([length for part in by_part for length in part])
        return torch.cat([piece for rank in range(size) for piece in pieces[rank::size]])
