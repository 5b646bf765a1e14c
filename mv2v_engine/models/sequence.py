"""The tokens of a forward, and everything that travels with them: of one sample, or of several.

Several samples lie one after another in a batch of one. Products and elementwise operations then
run over all tokens at once, attention keeps to each sample, and every token names the timestep that
modulates it.

B batch, L tokens, S text tokens, C width, N heads, D head dim, F frames of a layout, R frames of a
plan, T timesteps, P numbers of a camera, I image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from mv2v_engine.errors import RequestError
from mv2v_engine.models.kept import KeysValues
from mv2v_engine.ops.attention_libraries import Pack
from mv2v_engine.parallel.context import ContextGroup, Shard
from mv2v_engine.tokens.layout import Layout, Run


@dataclass(frozen=True, eq=False)
class Sequence:
    """The tokens that enter a block. `of` makes a sequence of one sample, `packed` one of several.

    x [B, L, C]; rope [1 or B, L, D].
    frames [B, F]: which of the plan's R frames each frame of the layout is; token_frames [B, L]:
        which of the cameras' frames each token is of.
    temb [T, C], temb_6 [T, 6, C]: the timesteps' modulation, one timestep a sample, or more where
        `row` [B, L] says which of them modulates a token. static_temb_6: that of static
        conditioning, whose timestep is 0.
    text [B, S, C]; None: there is no cross-attention. cameras [B, R, P] or None.
    rays [B, L, C]: what the cameras' rays became, of which attention makes phases; image [B, I, C]:
        what cross-attention reads beside the text. None of a model without.
    history [B, L', E]: what a history's tokens were made of, where blocks attend to it; else None.
    shard: over which ranks the layout's tokens lie; L are then this rank's, and `frames` still all.
    parts: the samples that were packed, with their tokens as they were then; of one sample, none.
    """

    x: Tensor
    rope: Tensor
    frames: Tensor
    token_frames: Tensor
    layout: Layout
    temb: Tensor
    temb_6: Tensor
    text: Tensor | None
    cameras: Tensor | None
    static_temb_6: Tensor | None = None
    rays: Tensor | None = None
    image: Tensor | None = None
    history: Tensor | None = None
    row: Tensor | None = None
    shard: Shard | None = None
    parts: tuple[Sequence, ...] = ()
    _packs: dict[tuple[int, ...], Pack] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        x: Tensor,
        rope: Tensor,
        frames: Tensor,
        layout: Layout,
        *,
        temb: Tensor,
        temb_6: Tensor,
        text: Tensor | None,
        cameras: Tensor | None,
        static_temb_6: Tensor | None = None,
        rays: Tensor | None = None,
        image: Tensor | None = None,
        history: Tensor | None = None,
    ) -> Sequence:
        """A sequence of one sample, or of a batch of samples of one plan."""
        token_frames = frames[:, token_slots(layout, frames.device)]
        return cls(
            x,
            rope,
            frames,
            token_frames,
            layout,
            temb,
            temb_6,
            text,
            cameras,
            static_temb_6,
            rays,
            image,
            history,
        )

    @classmethod
    def packed(cls, parts: Series[Sequence]) -> Sequence:
        """Join batches of one to one sequence; a single one is returned as it is.

        All is made on the device from Python numbers: a copy from the host would wait for it.
        """
        if len(parts) == 1:
            return parts[0]
        device = parts[0].x.device
        cameras = [part.cameras for part in parts if part.cameras is not None]
        first = [0] * len(parts)
        if cameras:
            first = [0, *accumulate(each.shape[1] for each in cameras)]
        owners = [
            torch.empty(1, part.layout.length, dtype=torch.int64, device=device).fill_(number)
            for number, part in enumerate(parts)
        ]
        texts = [part.text for part in parts if part.text is not None]
        rays = [part.rays for part in parts if part.rays is not None]
        images = [part.image for part in parts if part.image is not None]
        return cls(
            torch.cat([part.x for part in parts], 1),
            torch.cat([part.rope for part in parts], 1),
            torch.cat([part.frames for part in parts], 1),
            torch.cat([p.token_frames + n for p, n in zip(parts, first, strict=False)], 1),
            Layout(tuple(run for part in parts for run in part.layout.runs)),
            torch.cat([part.temb for part in parts]),
            torch.cat([part.temb_6 for part in parts]),
            torch.cat(texts, 1),
            torch.cat(cameras, 1) if cameras else None,
            rays=torch.cat(rays, 1) if rays else None,
            image=torch.cat(images, 1) if images else None,
            row=torch.cat(owners, 1),
            parts=tuple(parts),
        )

    def split(self) -> list[Sequence]:
        """Every sample's own sequence with its tokens of now."""
        if not self.parts:
            return [self]
        tokens = self.x.split(self._lengths, 1)
        return [replace(part, x=x) for part, x in zip(self.parts, tokens, strict=True)]

    @property
    def _lengths(self) -> list[int]:
        """Tokens of every sample of several."""
        return [part.layout.length for part in self.parts]

    @property
    def target_length(self) -> int:
        """How many of one sample's L tokens are the target's: the first ones."""
        return self.layout.target_length if self.shard is None else self.shard.own(0)

    def regrouped(
        self, x: Tensor, rope: Tensor, frames: Tensor, layout: Layout, rays: Tensor | None
    ) -> Sequence:
        """The same sample with other tokens, all of which are here."""
        token_frames = frames[:, token_slots(layout, frames.device)]
        return replace(
            self,
            x=x,
            rope=rope,
            frames=frames,
            token_frames=token_frames,
            layout=layout,
            rays=rays,
            row=None,
            shard=None,
        )

    def over(self, ranks: ContextGroup | None, *, is_by_frames: bool = False) -> Sequence:
        """This rank's part of a whole sequence; the sequence itself without ranks to share it.

        is_by_frames: blocks have operations over all frames of a place.

        Raises:
            RequestError: they cannot be shared so, or there are more ranks than target tokens.
        """
        if ranks is None:
            return self
        target, length = self.layout.target_length, self.layout.length
        if is_by_frames:
            raise RequestError(
                f"this model attends over frames place by place, which context={ranks.size} ranks "
                "do not hold whole; use context=1"
            )
        if target < ranks.size:
            raise RequestError(
                f"{target} target tokens cannot be shared by context={ranks.size} ranks; use "
                "fewer ranks"
            )
        shard = Shard(ranks, (target, length - target))
        by_token = (self.x, self.rope, self.token_frames)
        x, rope, token_frames = (shard.take(tensor) for tensor in by_token)
        rays = None if self.rays is None else shard.take(self.rays)
        return replace(self, x=x, rope=rope, token_frames=token_frames, rays=rays, shard=shard)

    def whole(self) -> Sequence:
        """The sequence with all tokens, on every rank."""
        if self.shard is None:
            return self
        x, rope = self.shard.gather(self.x), self.shard.gather(self.rope)
        rays = None if self.rays is None else self.shard.gather(self.rays)
        return self.regrouped(x, rope, self.frames, self.layout, rays)

    def with_frame_timesteps(self) -> Sequence:
        """The same, modulated frame by frame: T are all frames of the batch."""
        first = torch.arange(len(self.x), device=self.x.device) * self.layout.num_frames
        return replace(self, row=self.token_frames + first[:, None])

    def halves(self) -> tuple[Sequence, Sequence]:
        """The target and the conditioning of one sample, as sequences.

        Both count the plan's frames as before.

        Static conditioning has its own timestep and no text.
        """
        length, runs, count = self.target_length, self.layout.runs, self.layout.runs[0].num_frames
        target = self._half(0, slice(length), slice(count), runs[:1])
        rest = self._half(1, slice(length, None), slice(count, None), runs[1:])
        if self.static_temb_6 is not None:
            rest = replace(rest, temb_6=self.static_temb_6, text=None, image=None, history=None)
        return target, rest

    def _half(self, part: int, tokens: slice, frames: slice, runs: tuple[Run, ...]) -> Sequence:
        return replace(
            self,
            x=self.x[:, tokens],
            rope=self.rope[:, tokens],
            frames=self.frames[:, frames],
            token_frames=self.token_frames[:, tokens],
            layout=Layout(runs),
            rays=None if self.rays is None else self.rays[:, tokens],
            static_temb_6=None,
            row=None,
            shard=None if self.shard is None else self.shard.alone(part),
        )

    def followed_by(self, own: Tensor, kept: Series[Tensor | None]) -> Tensor:
        """K or V of every sample's tokens [B, L, N, D], each followed by what is kept for it."""
        of_samples = own.split(self._lengths, 1) if self.parts else [own]
        pairs = zip(of_samples, kept, strict=True)
        return torch.cat([each for pair in pairs for each in pair if each is not None], 1)

    def pack_over(self, kept: Series[KeysValues | None] | None) -> Pack | None:
        """The pack that says which queries attend to which keys, after `followed_by`.

        None: there is one sample, whose tokens attend to all.
        """
        if not self.parts:
            return None
        more = kept or [None] * len(self.parts)
        counts = [0 if pair is None else pair[0].shape[1] for pair in more]
        return self._pack([a + b for a, b in zip(self._lengths, counts, strict=True)])

    @property
    def text_pack(self) -> Pack | None:
        """The pack that says which queries attend to which text; None as in `pack_over`."""
        texts = [part.text.shape[1] for part in self.parts if part.text is not None]
        return self._pack(texts) if self.parts else None

    @property
    def image_pack(self) -> Pack | None:
        """The pack that says which queries attend to which image tokens; None as in `pack_over`."""
        images = [part.image.shape[1] for part in self.parts if part.image is not None]
        return self._pack(images) if images else None

    def _pack(self, keys: Series[int]) -> Pack:
        key, device, lengths = tuple(keys), self.x.device, self._lengths
        if key not in self._packs:
            starts = _starts(lengths, device), _starts(key, device)
            self._packs[key] = Pack(*starts, max(lengths), max(key))
        return self._packs[key]


def token_slots(layout: Layout, device: torch.device) -> Tensor:
    """The layout's frame number of every token: int64 [L].

    Made on the device from Python numbers: a copy from the host would wait for it.
    """
    if not layout.runs:
        return torch.empty(0, dtype=torch.int64, device=device)
    numbers = [
        torch.arange(start, start + run.num_frames, device=device)[:, None]
        for start, run in zip(run_starts(layout), layout.runs, strict=True)
    ]
    slots = [
        number.expand(-1, run.tokens_per_frame).flatten()
        for number, run in zip(numbers, layout.runs, strict=True)
    ]
    return torch.cat(slots)


def run_starts(layout: Layout) -> list[int]:
    """The layout's number of every run's first frame."""
    return [0, *accumulate(run.num_frames for run in layout.runs)][:-1]


def _starts(lengths: Series[int], device: torch.device) -> Tensor:
    """The first token of each sequence and the end of the last: int32 [G + 1], on the device."""
    starts = [0, *accumulate(lengths)]
    return torch.cat(
        [torch.full((1,), start, dtype=torch.int32, device=device) for start in starts]
    )
