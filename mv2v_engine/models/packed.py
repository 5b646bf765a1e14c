"""Samples of different plans, timesteps, texts and cameras as one ragged sequence.

Products and elementwise operations run over all tokens at once; attention keeps to each sample, and
every token names the timestep that modulates it. Merging, responsiveness and the head are done
sample by sample. `MV2VTransformer.forward_packed` runs it.

L tokens and S text tokens of all samples, C width, D head dim, F frames, P numbers of a camera.
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from mv2v_engine.models.forward_pass import ForwardPass
from mv2v_engine.models.merging import merged_before
from mv2v_engine.models.static_cache import ConditioningCache, KeysValues
from mv2v_engine.models.token_merge import MergeRecord, Sequence
from mv2v_engine.ops.attention_libraries import Pack
from mv2v_engine.tokens.plan import TokenPlan

if TYPE_CHECKING:
    from mv2v_engine.models.dit import MV2VTransformer


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One forward of a pack: what `MV2VTransformer.forward` takes for it alone, a batch of one.

    kept: filled by this turn's first forward; then `latents` is the target's alone, as in
    `forward_target`. Static conditioning needs it.
    """

    latents: Series[Tensor]
    timestep: Tensor
    encoder_hidden_states: Tensor
    plan: TokenPlan
    cameras: Tensor | None = None
    records: list[MergeRecord] | None = None
    kept: ConditioningCache | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that enter the first block."""
        return self.plan.length if self.kept is None else self.plan.target.length

    def begin(self, model: MV2VTransformer) -> ForwardPass:
        """Its forward before the first block.

        Raises:
            ValueError: what a pack cannot hold, or what does not fit the model.
        """
        if self.timestep.ndim != 1:
            raise ValueError(
                f"a sample of a pack has one timestep [1], got {list(self.timestep.shape)}; run "
                "frames of different timesteps alone"
            )
        batches = [len(self.timestep), len(self.encoder_hidden_states)]
        batches += [len(latent) for latent in self.latents]
        if batches.count(1) != len(batches):
            raise ValueError(
                f"a sample of a pack is a batch of one, got batches of {sorted(set(batches))}; "
                "make a sample of each"
            )
        given = (self.timestep, self.encoder_hidden_states)
        if self.kept is None:
            if self.plan.conditioning == "static":
                raise ValueError(
                    "a sample with static conditioning joins a pack once its K and V are kept; run "
                    "forward(..., keep=cache) alone first"
                )
            return model.begin(self.latents, *given, plan=self.plan, cameras=self.cameras)
        if self.kept.plan != self.plan or len(self.latents) != 1:
            raise ValueError(
                "with kept K and V a sample has its target's latents alone, and the cache's plan; "
                f"got {len(self.latents)} videos and "
                f"{'the' if self.kept.plan == self.plan else 'another'} plan"
            )
        return model.begin_target(self.latents[0], *given, kept=self.kept)


@dataclass(frozen=True, eq=False)
class PackedSequence:
    """The tokens x [1, L, C] of all samples; a block takes it as it takes a `Sequence`.

    rope [1, L, D]; row [1, L]: the sample of every token; token_frames [1, L]: its place among the
    cameras of all samples. parts: the samples' own sequences as they entered, or as a merge left
    them. text: which text each sample attends to. packs: which keys, by their numbers.
    """

    x: Tensor
    rope: Tensor
    row: Tensor
    token_frames: Tensor
    text: Pack
    parts: tuple[Sequence, ...]
    packs: dict[tuple[int, ...], Pack] = field(default_factory=dict)
    # all of it is on this rank
    shard: ClassVar[None] = None

    @classmethod
    def of(
        cls, parts: Series[Sequence], num_frames: Series[int], text_lengths: Series[int]
    ) -> PackedSequence:
        """num_frames: rows of each sample's cameras. All is made on the device, without a wait."""
        device, first = parts[0].x.device, [0, *accumulate(num_frames)]
        lengths = [part.layout.length for part in parts]
        numbers = [part.token_frames + start for part, start in zip(parts, first, strict=False)]
        owner = partial(torch.empty, dtype=torch.int64, device=device)
        return cls(
            torch.cat([part.x for part in parts], 1),
            torch.cat([part.rope for part in parts], 1),
            torch.cat([owner(1, n).fill_(i) for i, n in enumerate(lengths)], 1),
            torch.cat(numbers, 1),
            _pack(lengths, text_lengths, device),
            tuple(parts),
        )

    @property
    def lengths(self) -> list[int]:
        return [part.layout.length for part in self.parts]

    def split(self) -> list[Sequence]:
        """Every sample's sequence with its tokens of now."""
        tokens = self.x.split(self.lengths, 1)
        return [replace(part, x=x) for part, x in zip(self.parts, tokens, strict=True)]

    def followed_by(self, own: Tensor, kept: Series[Tensor | None]) -> Tensor:
        """K or V of every sample's tokens [1, L, N, D], each followed by what is kept for it."""
        parts = zip(own.split(self.lengths, 1), kept, strict=True)
        return torch.cat([each for pair in parts for each in pair if each is not None], 1)

    def pack_over(self, kept: Series[KeysValues | None] | None) -> Pack:
        """Which queries attend to which keys, where `followed_by` has put what is kept."""
        more = [
            0 if pair is None else pair[0].shape[1] for pair in kept or [None] * len(self.parts)
        ]
        lengths = tuple(own + kept for own, kept in zip(self.lengths, more, strict=True))
        if lengths not in self.packs:
            self.packs[lengths] = _pack(self.lengths, lengths, self.x.device)
        return self.packs[lengths]


def run_packed(
    model: MV2VTransformer,
    passes: Series[ForwardPass],
    records: Series[list[MergeRecord] | None],
) -> None:
    """Take several forwards, batches of one, through all blocks as one sequence.

    records: for each, receives what its merges did.
    """
    if not passes:
        return
    rows = [begun.rows for begun in passes if begun.rows is not None]
    cameras = torch.cat(rows, 1) if rows else None
    num_frames = [row.shape[1] for row in rows] or [0] * len(passes)
    text_lengths = [begun.context.shape[1] for begun in passes]
    temb_6 = torch.cat([begun.temb_6 for begun in passes])
    context = torch.cat([begun.context for begun in passes], 1)
    pack = PackedSequence.of([begun.sequence for begun in passes], num_frames, text_lengths)
    for index, block in enumerate(model.blocks):
        if index in model.config.merging_blocks:
            has_merged = False
            for begun, own, record in zip(passes, pack.split(), records, strict=True):
                begun.sequence = own
                if begun.is_merging:
                    begun.sequence = merged_before(model, index, begun, record)
                has_merged |= begun.sequence is not own
            if has_merged:
                parts = [begun.sequence for begun in passes]
                pack = PackedSequence.of(parts, num_frames, text_lengths)
        kept = None
        if any(begun.kept is not None for begun in passes):
            kept = [begun.kept and begun.kept.of_block(index) for begun in passes]
        pack = replace(pack, x=block(pack, temb_6, context, cameras, kept))
    for begun, own in zip(passes, pack.split(), strict=True):
        begun.sequence, begun.depth = own, len(model.blocks)


def _pack(queries: Series[int], keys: Series[int], device: torch.device) -> Pack:
    return Pack(_starts(queries, device), _starts(keys, device), max(queries), max(keys))


def _starts(lengths: Series[int], device: torch.device) -> Tensor:
    """Where each sequence begins and the last ends: int32 [G + 1].

    Made on the device from Python numbers: a copy from the host would wait for it.
    """
    starts = [0, *accumulate(lengths)]
    return torch.cat(
        [torch.full((1,), start, dtype=torch.int32, device=device) for start in starts]
    )
