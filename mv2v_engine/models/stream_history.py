"""What a stream keeps of frames that left its window: the tokens of a history encoder (METHOD 17).

Frames behind the sink are one history. Before the first frame of a token leaves the window, the
encoder makes the token of all frames that it covers, the others of which are still held, so that no
frame is ever missing; it goes through the transformer once, at timestep 0 and without text, and its
K and V are kept. It sees what is held then: the history so far, the sink, and the whole frames that
it stands for. There is room for as many tokens as the whole frames of `history_slots` have; the
oldest leave when more come.

Positions are by slot, as those of whole frames: the history's temporal ids end where the recent
frames begin. Where a token covers frames that are still whole, that is up to one frame less than a
token covers too far back.

B batch, C latent channels, F H W latents, L tokens, D head dim, t latent frames of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mv2v_engine.config import StreamConfig, TransformerConfig
from mv2v_engine.errors import RequestError
from mv2v_engine.models.history import HistoryState
from mv2v_engine.models.rope import table_on
from mv2v_engine.shapes import rate_of
from mv2v_engine.tokens.encoders import history_past, history_peak
from mv2v_engine.tokens.flops import arriving_flops
from mv2v_engine.tokens.plan import Segment, TokenPlan, history_segments

_LATENTS, _PAST = "history.latents", "history.past"


class StreamHistory:
    """The part of a `StreamCache` that is a history's.

    rate: of its tokens. segment: the most that is kept, as a plan has it. state: what the encoder
    has to know of the frames that it has seen. latents: clean ones [B, C, F, H, W] of the whole
    frames that are held, which are not encoded yet.

    Args:
        grid: latent rows and columns.

    Raises:
        RequestError: as `check_history`, or the grid or the window cannot have such tokens.
    """

    def __init__(
        self, shape: TransformerConfig, grid: tuple[int, int], config: StreamConfig
    ) -> None:
        self.config, self.rate = config, check_history(shape, "this model", config)
        rows, _, self.frames = rate_of(self.rate)
        self.channels = shape.latent_channels
        patch, whole = 2 * rows, (grid[0] // 2) * (grid[1] // 2)
        tokens = (grid[0] // patch) * (grid[1] // patch)
        if not tokens:
            raise RequestError(
                f"a token of history_rate={self.rate!r} covers {patch}x{patch} latent cells, the "
                f"video has {grid[0]}x{grid[1]}; use a finer rate"
            )
        most, least = config.history_slots * whole // tokens, -(-config.block_frames // self.frames)
        if most < least:
            raise RequestError(
                f"history_slots={config.history_slots} have room for the tokens of {most} times "
                f"{self.frames} latent frames, and a block can bring those of {least}; raise "
                "history_slots"
            )
        wanted = config.sink_frames + config.block_frames + self.frames - 1
        if config.whole_frames < wanted:
            raise RequestError(
                f"a window of {config.window} latent frames, {config.history_slots} of them in "
                f"tokens, keeps {config.whole_frames} whole, and tokens of {self.frames} frames "
                f"beside a sink of {config.sink_frames} and blocks of {config.block_frames} need "
                f"{wanted}; raise window, or lower sink_frames or history_slots"
            )
        self.segment = self._segment(shape, grid, most)
        self.most_tokens, self.most_new = self.segment.length, least
        self.state = HistoryState()
        self.latents: Tensor | None = None

    def _segment(self, shape: TransformerConfig, grid: tuple[int, int], count: int) -> Segment:
        """Tokens of `count` times t frames, whose ids end where the recent frames begin."""
        size = (count * self.frames, *grid)
        segment = next(history_segments(shape, size, self.rate))
        return replace(segment, tau=self.config.sink_frames - size[0])

    @property
    def num_bytes(self) -> int:
        held = 0 if self.latents is None else self.latents.nbytes
        return held + sum(past.nbytes for past in self.state.past)

    def describe(self, shape: TransformerConfig, held: int) -> dict[str, Any]:
        """Its part of `StreamCache.describe`; held: tokens that new ones see beside themselves."""
        new = self._segment(shape, self.segment.grid[1:], 1)
        return {
            "rate": self.rate,
            "tokens": self.most_tokens,
            "latent_frames": self.segment.grid[0],
            "flops": arriving_flops(new, shape, held),
            "frames_a_token": self.frames,
        }

    def peak_bytes(self, shape: TransformerConfig, element_bytes: int) -> tuple[int, int]:
        """Bytes that are kept beside K and V, and those that the encoder makes at once."""
        assert shape.history is not None
        _, *grid = self.segment.grid
        kept = self.channels * self.config.whole_frames * math.prod(grid) * 4
        new = self._segment(shape, (grid[0], grid[1]), self.most_new).grid
        size = (shape.history, self.channels, new, self.segment.tokenizer, self.frames)
        return kept + element_bytes * history_past(*size), element_bytes * history_peak(*size)

    def _gone(self, num_blocks: int) -> int:
        """How many frames behind the sink have left the window when a block was begun."""
        return max(0, num_blocks * self.config.block_frames - self.config.whole_frames)

    def _made(self, num_blocks: int) -> int:
        """How often t frames were made tokens by then."""
        return -(-self._gone(num_blocks) // self.frames)

    def length(self, num_blocks: int) -> int:
        """Tokens that are held after so many blocks were begun."""
        return min(self._made(num_blocks) * self.segment.tokens_per_frame, self.most_tokens)

    def due(self, num_blocks: int) -> Tensor | None:
        """Latents [B, C, F, H, W] whose tokens have to be made before the next block begins.

        None: the frames that leave then are all in tokens, or none leave.
        """
        made, wanted = self._made(num_blocks), self._made(num_blocks + 1)
        if made == wanted:
            return None
        assert self.latents is not None
        first = self.config.sink_frames + made * self.frames - self._gone(num_blocks)
        return self.latents[:, :, first : first + (wanted - made) * self.frames]

    def keep(self, latents: Tensor, num_frames: int, *, is_trained: bool) -> None:
        """Take the newest block's latents [B, C, F, H, W], which every forward overwrites.

        num_frames: whole frames that are held, these included.
        """
        own, before = latents[:, : self.channels], num_frames - latents.shape[2]
        if is_trained:
            held = own[:, :, :0] if self.latents is None else self.latents[:, :, :before]
            self.latents = torch.cat([held, own], 2)
            return
        if self.latents is None:
            size = (*own.shape[:2], self.config.whole_frames, *own.shape[3:])
            self.latents = own.new_zeros(size)
        self.latents[:, :, before:num_frames] = own

    def roll(self, count: int, *, is_trained: bool) -> None:
        """Let the latents of the `count` oldest recent frames go."""
        assert self.latents is not None
        sink = self.config.sink_frames
        moved = self.latents[:, :, sink + count :]
        if is_trained:
            self.latents = torch.cat([self.latents[:, :, :sink], moved], 2)
        else:
            self.latents[:, :, sink : sink + moved.shape[2]] = moved.clone()

    def table(self, plan: TokenPlan, whole: Segment, device: torch.device) -> Tensor:
        """The rotary table of all slots, the history's first: float32 [L, D].

        plan: of a block. whole: all whole frames as one segment.
        """
        table = table_on(replace(plan, segments=(whole, self.segment)), device)
        return torch.cat([table[whole.length :], table[: whole.length]])

    def new_table(self, plan: TokenPlan, count: int, device: torch.device) -> Tensor:
        """The rotary table of `count` times t frames' tokens that come behind the others [L, D]."""
        new = self._segment(plan.shape, plan.target.grid[1:], count)
        new = replace(new, tau=self.config.sink_frames)
        table = table_on(replace(plan, segments=(plan.target, new)), device)
        return table[plan.target.length :]

    def tensors(self, num_frames: int) -> dict[str, Tensor]:
        """What has to be stored between two blocks, by name."""
        found = {} if self.latents is None else {_LATENTS: self.latents[:, :, :num_frames]}
        return found | {f"{_PAST}.{n}": past for n, past in enumerate(self.state.past)}

    def load(self, tensors: Mapping[str, Tensor], num_frames: int, device: torch.device) -> None:
        """Take up what `tensors` gave.

        Raises:
            ValueError: they are of another model, grid or policy.
        """
        latents = tensors.get(_LATENTS)
        expected = (self.channels, num_frames, *self.segment.grid[1:])
        if latents is None or tuple(latents.shape[1:]) != expected:
            got = None if latents is None else list(latents.shape)
            raise ValueError(
                f"a history's latents must have shape [B, {', '.join(map(str, expected))}], got "
                f"{got}"
            )
        room = self.config.whole_frames - num_frames
        self.latents = pad(latents.to(device), (0, 0, 0, 0, 0, room))
        names = (f"{_PAST}.{number}" for number in range(len(tensors)))
        self.state = HistoryState(
            tuple(tensors[name].to(device) for name in names if name in tensors)
        )


def check_history(shape: TransformerConfig, name: str, config: StreamConfig) -> str:
    """The rate of the tokens that policy history takes.

    Raises:
        RequestError: the model has no encoder of it, or blocks that read what a stream keeps not.
    """
    encoders, asked = shape.history, config.history_rate
    rates = () if encoders is None else encoders.rates
    if not rates or (asked is not None and asked not in rates):
        has = f"encoders of rate {' and '.join(rates)} alone" if rates else "none"
        of = "" if asked is None else f" of rate {asked}"
        raise RequestError(
            f"policy='history' takes a history encoder{of}, and {name} has {has}; use another "
            "policy, or train one beside a causal model: python -m mv2v_engine.training.causal "
            "--policies history"
        )
    assert encoders is not None
    if encoders.cross_attention:
        raise RequestError(
            f"blocks {', '.join(map(str, encoders.cross_attention))} of {name} attend to what "
            "history tokens were made of, which a stream does not keep; use another policy, or "
            "weights whose encoder has no cross_attention"
        )
    return asked or rates[0]
