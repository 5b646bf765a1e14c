"""What a causal model sees of the blocks before: K and V of every transformer block, unrotated.

A block of a stream is a few new latent frames; each of its forwards overwrites their K and V here
and attends to all that is held. Keys get their rotary position when they are read, by the slot in
which they lie, so that positions never grow. What makes room for a new block follows the policy:

    memrope   [sink][long average][short average][recent][new]    (arXiv 2603.12513)
    history   [history][sink][recent][new]                        (arXiv 2512.23851)
    sink      [sink][recent][new]
    window    [recent][new]
    all       everything, without bound

The averages take in every frame that leaves `recent`. They are kept in float32: in bfloat16 a step
of 0.01 of a difference is often below half a unit of the average, and lost. A history is what
`models.stream_history` makes of these frames.

B batch, L tokens, P tokens of a frame, N heads, D head dim, S text tokens, C width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from mv2v_engine.config import StreamConfig, TransformerConfig
from mv2v_engine.models.kept import KeysValues
from mv2v_engine.models.rope import table_on
from mv2v_engine.models.stream_history import StreamHistory
from mv2v_engine.tokens.flops import stream_flops
from mv2v_engine.tokens.plan import turn_plan

# the adaptive average of a position takes up to so many times short_alpha, and at least so much
_MOST, _LEAST = 5.0, 0.1
_NAMES = ("keys", "values")


class StreamLayer(Protocol):
    """What a transformer block reads of a stream, and leaves to it."""

    text: KeysValues | None

    def rope(self, device: torch.device) -> Tensor: ...

    def put(self, keys: Tensor, values: Tensor) -> KeysValues: ...


class StreamCache:
    """K and V of one stream, which all its forwards share.

    plan: of every forward. num_frames: how many are held whole, those of the block under way
    included; capacity: how many at most. history: None under another policy. num_blocks: how many
    were begun. layers: one a transformer block. text: what cross-attention reads [B, S, C], after
    the text embedder; None until a forward leaves it. era: another object whenever tensors that
    forwards read were replaced, beside those of a window that fills.

    Args:
        grid: latent rows and columns.
        is_trained: write over nothing that was read, so that gradients flow back through it.

    Raises:
        RequestError: policy history, and the model, the grid or the window cannot have it.
    """

    def __init__(
        self,
        shape: TransformerConfig,
        grid: tuple[int, int],
        config: StreamConfig,
        *,
        is_trained: bool = False,
    ) -> None:
        self.config, self.is_trained = config, is_trained
        frames = (config.block_frames, *grid)
        self.plan = turn_plan(shape, frames, (), source=False, merge="off")
        self.tokens_per_frame = self.plan.target.tokens_per_frame
        self.num_frames = self.num_blocks = 0
        self.capacity = config.whole_frames
        self.history: StreamHistory | None = None
        if config.policy == "history":
            self.history = StreamHistory(shape, grid, config)
        self.layers = [LayerCache(self) for _ in range(shape.num_layers)]
        self.text: Tensor | None = None
        self.era = object()
        self._rope: Tensor | None = None

    def begin_block(self) -> None:
        """Make room for a new block's frames, which lie last; once a block, before its forwards.

        While there is room nothing is lost. After that the oldest recent frames go, and the frames
        behind them move up. With a history the model makes room (`MV2VTransformer.begin_block`),
        for tokens of the frames that go are made before.

        Raises:
            ValueError: they were not.
        """
        config, history = self.config, self.history
        is_due = history is not None and history.due(self.num_blocks) is not None
        if is_due and any(layer.arrived is None for layer in self.layers):
            raise ValueError(
                "frames that leave the window are not in tokens yet; with a history let the model "
                "make room: MV2VTransformer.begin_block(cache)"
            )
        wanted = self.num_frames + config.block_frames
        if config.policy == "all":
            while self.capacity < wanted:
                self.capacity *= 2
        elif wanted > self.capacity:
            for layer in self.layers:
                layer.roll(wanted - self.capacity)
            if history is not None:
                history.roll(wanted - self.capacity, is_trained=self.is_trained)
            wanted = self.capacity
        self.num_frames, self.num_blocks = wanted, self.num_blocks + 1

    @property
    def least_window(self) -> int:
        """The smallest window that this policy can have."""
        config, more = self.config, 0 if self.history is None else self.history.frames - 1
        return config.num_fixed + config.block_frames + more

    def keep(self, latents: Tensor) -> None:
        """Take what a history is made of: the newest block's latents [B, C, F, H, W]."""
        if self.history is not None:
            self.history.keep(latents, self.num_frames, is_trained=self.is_trained)

    @property
    def history_length(self) -> int:
        """How many tokens of a history are held now."""
        return 0 if self.history is None else self.history.length(self.num_blocks)

    @property
    def whole_from(self) -> int:
        """The place in K and V where whole frames begin, behind the room of a history."""
        return self.history_length if self.is_trained else self._history_room

    @property
    def _history_room(self) -> int:
        """How many tokens of a history there is room for."""
        return 0 if self.history is None else self.history.most_tokens

    @property
    def num_tokens(self) -> int:
        """How many tokens a block sees at most, its own included."""
        return self._history_room + self.capacity * self.tokens_per_frame

    @property
    def is_full(self) -> bool:
        """Whether the blocks to come see as many tokens as this one."""
        return self.num_tokens == self.history_length + self.num_frames * self.tokens_per_frame

    @property
    def num_recent(self) -> int:
        """Whole frames that are held and will leave, those of the block under way included."""
        return self.num_frames - self.config.num_fixed + self.config.window - self.capacity

    def describe(self) -> dict[str, Any]:
        """What a block costs once all is full, as plain data: tokens, and FLOPs of a forward.

        Of a history also what it takes to bring in those frames that a token covers.
        """
        held = self.num_tokens - self.plan.length
        found: dict[str, Any] = {
            "tokens": self.plan.length,
            "tokens_seen": self.num_tokens,
            "forward_flops": stream_flops(self.plan, held),
        }
        if self.history is not None:
            found["history"] = self.history.describe(self.plan.shape, self.num_tokens)
        return found

    @contextmanager
    def before(self, count: int) -> Iterator[None]:
        """Forwards overwrite, and see, what was held before the last `count` frames.

        So blocks that are still held whole can be seen again, the oldest first.
        """
        held, self.num_frames = self.num_frames, self.num_frames - count
        try:
            yield
        finally:
            self.num_frames = held

    def clear_text(self) -> None:
        """Forget the prompt, so that the next forward reads another one."""
        self.text, self.era = None, object()
        for layer in self.layers:
            layer.text = None

    def rope(self, device: torch.device) -> Tensor:
        """The rotary table of all that is held, by slot [1, L, D]."""
        length, room = self.num_tokens, self._history_room
        # every transformer block asks for it, and to find it by its plan takes longer than to read
        if self._rope is None or len(self._rope) < length or self._rope.device != device:
            segment = self.plan.target
            whole = replace(segment, grid=(self.capacity, *segment.grid[1:]))
            if self.history is None:
                self._rope = table_on(replace(self.plan, segments=(whole,)), device)
            else:
                self._rope = self.history.table(self.plan, whole, device)
        held = room + self.num_frames * self.tokens_per_frame
        return self._rope[None, room - self.history_length : held]

    def new_rope(self, device: torch.device) -> Tensor:
        """The rotary table of the new frames, which come last."""
        return self.rope(device)[:, -self.plan.target.length :]

    @property
    def num_bytes(self) -> int:
        """The bytes of all its tensors."""
        own = 0 if self.text is None else self.text.nbytes
        own += 0 if self.history is None else self.history.num_bytes
        return own + sum(layer.num_bytes for layer in self.layers)

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored between two blocks, by name; the text is read again."""
        found = {} if self.history is None else self.history.tensors(self.num_frames)
        for index, layer in enumerate(self.layers):
            for name, held in zip(_NAMES, layer.held(), strict=False):
                found[f"{index}.{name}"] = held
            for number, average in enumerate(layer.averages):
                found[f"{index}.averages.{number}"] = average
        return found

    def load(self, tensors: Mapping[str, Tensor], num_blocks: int, device: torch.device) -> None:
        """Take up what `tensors` gave after so many blocks.

        Raises:
            ValueError: they are of another model, grid or policy.
        """
        self.era = object()
        self.num_blocks, per_block = num_blocks, self.config.block_frames
        frames = num_blocks * per_block
        if self.config.policy == "all":
            while self.capacity < frames:
                self.capacity *= 2
        self.num_frames = frames = min(frames, self.capacity)
        shape = self.plan.shape
        if self.history is not None:
            self.history.load(tensors, frames, device)
        expected = (
            self.history_length + frames * self.tokens_per_frame,
            shape.num_attention_heads,
            shape.attention_head_dim,
        )
        for index, layer in enumerate(self.layers):
            pair = [tensors.get(f"{index}.{name}") for name in _NAMES]
            if any(held is None or tuple(held.shape[1:]) != expected for held in pair):
                got = [None if held is None else list(held.shape) for held in pair]
                raise ValueError(
                    f"K and V of transformer block {index} must have shape "
                    f"[B, {', '.join(map(str, expected))}], got {got}"
                )
            # a history that is not full lies at the end of its room
            empty = (0, 0, 0, 0, self.whole_from - self.history_length, 0)
            layer.stored = [pad(held.to(device), empty) for held in pair if held is not None]
            names = (f"{index}.averages.{number}" for number in range(4))
            layer.averages = [tensors[name].to(device) for name in names if name in tensors]


class LayerCache:
    """One transformer block's part of a `StreamCache`.

    stored: K and V [B, L, N, D]. averages: the long ones of K and V, then the short ones
    [B, 1 or P, N, D], from the first roll on. text: K and V of cross-attention [B, S, N, D].
    arrived: K and V of tokens that join the history when room is made.
    """

    def __init__(self, cache: StreamCache) -> None:
        self._cache = cache
        self.stored: list[Tensor] = []
        self.averages: list[Tensor] = []
        self.text: KeysValues | None = None
        self.arrived: KeysValues | None = None

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in (*self.stored, *self.averages, *(self.text or ())))

    def rope(self, device: torch.device) -> Tensor:
        """The rotary table of what is held [1, L, D]."""
        return self._cache.rope(device)

    def held(self) -> list[Tensor]:
        """K and V [B, L, N, D] of all that is held; none before the first forward."""
        cache = self._cache
        first = cache.whole_from - cache.history_length
        stop = cache.whole_from + cache.num_frames * cache.tokens_per_frame
        return [stored[:, first:stop] for stored in self.stored]

    def put(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Store the new frames' K and V [B, L, N, D]; what is held with them."""
        cache, length = self._cache, self._cache.num_tokens
        held = cache.whole_from + cache.num_frames * cache.tokens_per_frame
        if cache.is_trained:
            before = self.stored or [keys[:, :0], values[:, :0]]
            self.stored = [
                torch.cat([stored[:, : held - new.shape[1]], new], 1)
                for stored, new in zip(before, (keys, values), strict=True)
            ]
            return self.stored[0], self.stored[1]
        if not self.stored or self.stored[0].shape[1] < length:
            self._allocate(keys, length)
        for stored, new in zip(self.stored, (keys, values), strict=True):
            stored[:, held - new.shape[1] : held] = new
        held_keys, held_values = self.held()
        return held_keys, held_values

    def _allocate(self, like: Tensor, length: int) -> None:
        """Room for so many tokens, with what is stored already at its beginning."""
        shape = (len(like), length, *like.shape[2:])
        before, self.stored = self.stored, [like.new_zeros(shape) for _ in _NAMES]
        for stored, old in zip(self.stored, before, strict=False):
            stored[:, : old.shape[1]] = old

    def roll(self, count: int) -> None:
        """Let the `count` oldest recent frames go, and move those behind them up."""
        cache, config, size = self._cache, self._cache.config, self._cache.tokens_per_frame
        first = cache.whole_from + (cache.num_frames - cache.num_recent) * size
        held, stop = cache.whole_from + cache.num_frames * size, first + count * size
        if cache.is_trained:
            # what was read is left as it is
            self.stored = [stored.clone() for stored in self.stored]
        if config.policy == "memrope":
            self._average([stored[:, first:stop] for stored in self.stored])
            for stored, *averages in zip(
                self.stored, self.averages[:2], self.averages[2:], strict=True
            ):
                for slot, average in enumerate(averages, config.sink_frames):
                    stored[:, slot * size : (slot + 1) * size] = average
        for stored in self.stored:
            # a copy between: the places overlap
            stored[:, first : held - count * size] = stored[:, stop:held].clone()
        if self.arrived is not None:
            self._join(*self.arrived)
            self.arrived = None

    def _join(self, keys: Tensor, values: Tensor) -> None:
        """Put K and V of new tokens behind the history's, the oldest of which go."""
        cache, count, place = self._cache, keys.shape[1], self._cache.whole_from
        for index, new in enumerate((keys, values)):
            stored = self.stored[index]
            if cache.is_trained:
                assert cache.history is not None
                joined = torch.cat([stored[:, :place], new], 1)[:, -cache.history.most_tokens :]
                self.stored[index] = torch.cat([joined, stored[:, place:]], 1)
            else:
                stored[:, : place - count] = stored[:, count:place].clone()
                stored[:, place - count : place] = new

    def _average(self, evicted: list[Tensor]) -> None:
        """Take the K and V that go into the averages.

        Their mean is one token for all positions, or one a position where the short average adapts.
        """
        config, size = self._cache.config, self._cache.tokens_per_frame
        means = []
        for gone in evicted:
            exact = gone.float() if config.averages == "float32" else gone
            if config.is_adaptive:
                means.append(exact.unflatten(1, (-1, size)).mean(1))
            else:
                means.append(exact.mean(1, keepdim=True))
        if not self.averages:
            self.averages = [*means, *(mean.clone() for mean in means)]
            return
        alphas: list[float | Tensor] = [config.long_alpha, config.short_alpha]
        if config.is_adaptive:
            alphas[1] = _adapted(config.short_alpha, means[0], self.averages[2])
        for place, average in enumerate(self.averages):
            alpha, mean = alphas[place // 2], means[place % 2]
            self.averages[place] = alpha * mean + (1 - alpha) * average


def _adapted(alpha: float, mean_BPND: Tensor, short_BPND: Tensor) -> Tensor:
    """The short average's weight of every position [B, P, 1, 1]: more where its keys change."""
    change = torch.linalg.vector_norm(mean_BPND - short_BPND, dim=-1).mean(-1)
    change = change / (change.amax(-1, keepdim=True) + 1e-8)
    weight: Tensor = _LEAST * alpha + change * (_MOST - _LEAST) * alpha
    return weight[..., None, None]


class ArrivingLayer:
    """A `LayerCache` as new tokens of the history see it.

    They attend to all that is held and to themselves; their K and V wait until room is made.
    """

    def __init__(self, layer: LayerCache, own_rope: Tensor) -> None:
        self._layer, self._own_rope = layer, own_rope
        self.text: KeysValues | None = None

    def rope(self, device: torch.device) -> Tensor:
        """The rotary table of what is held, and of the new tokens [1, L, D]."""
        return torch.cat([self._layer.rope(device), self._own_rope], 1)

    def put(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Keep the new tokens' K and V [B, L, N, D] aside; what is held with them."""
        self._layer.arrived = keys, values
        held_keys, held_values = self._layer.held()
        return torch.cat([held_keys, keys], 1), torch.cat([held_values, values], 1)
