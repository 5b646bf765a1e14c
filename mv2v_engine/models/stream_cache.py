"""What a causal model sees of the blocks before: K and V of every transformer block, unrotated.

A block of a stream is a few new latent frames; each of its forwards overwrites their K and V here
and attends to all that is held. Keys get their rotary position when they are read, by the slot in
which they lie, so that positions never grow. What makes room for a new block follows the policy:

    memrope   [sink][long average][short average][recent][new]    (arXiv 2603.12513)
    sink      [sink][recent][new]
    window    [recent][new]
    all       everything, without bound

The averages take in every frame that leaves `recent`. They are kept in float32: in bfloat16 a step
of 0.01 of a difference is often below half a unit of the average, and lost.

B batch, L tokens, P tokens of a frame, N heads, D head dim, S text tokens, C width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from mv2v_engine.config import StreamConfig, TransformerConfig
from mv2v_engine.models.kept import KeysValues
from mv2v_engine.models.rope import table_on
from mv2v_engine.tokens.plan import turn_plan

# the adaptive average of a position takes up to so many times short_alpha, and at least so much
_MOST, _LEAST = 5.0, 0.1
_NAMES = ("keys", "values")


class StreamCache:
    """K and V of one stream, which all its forwards share.

    plan: of every forward. num_frames: how many are held, those of the block under way included.
    num_blocks: how many were begun. layers: one a transformer block. text: what cross-attention
    reads [B, S, C], after the text embedder; None until a forward leaves it. era: another object
    whenever tensors that forwards read were replaced, beside those of a window that fills.

    Args:
        grid: latent rows and columns.
        is_trained: write over nothing that was read, so that gradients flow back through it.
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
        self.capacity = config.window
        self.layers = [LayerCache(self) for _ in range(shape.num_layers)]
        self.text: Tensor | None = None
        self.era = object()
        self._rope: Tensor | None = None

    def begin_block(self) -> None:
        """Make room for a new block's frames, which lie last; once a block, before its forwards.

        While there is room nothing is lost. After that the oldest recent frames go, and the frames
        behind them move up.
        """
        config = self.config
        wanted = self.num_frames + config.block_frames
        if config.policy == "all":
            while self.capacity < wanted:
                self.capacity *= 2
        elif wanted > self.capacity:
            for layer in self.layers:
                layer.roll(wanted - self.capacity)
            wanted = self.capacity
        self.num_frames, self.num_blocks = wanted, self.num_blocks + 1

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
        length = self.capacity * self.tokens_per_frame
        # every transformer block asks for it, and to find it by its plan takes longer than to read
        if self._rope is None or len(self._rope) < length or self._rope.device != device:
            segment = self.plan.target
            whole = replace(segment, grid=(self.capacity, *segment.grid[1:]))
            self._rope = table_on(replace(self.plan, segments=(whole,)), device)
        return self._rope[None, : self.num_frames * self.tokens_per_frame]

    def new_rope(self, device: torch.device) -> Tensor:
        """The rotary table of the new frames, which come last."""
        return self.rope(device)[:, -self.plan.target.length :]

    @property
    def num_bytes(self) -> int:
        """The bytes of all its tensors."""
        own = 0 if self.text is None else self.text.nbytes
        return own + sum(layer.num_bytes for layer in self.layers)

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored between two blocks, by name; the text is read again."""
        held = self.num_frames * self.tokens_per_frame
        found = {}
        for index, layer in enumerate(self.layers):
            for name, stored in zip(_NAMES, layer.stored, strict=False):
                found[f"{index}.{name}"] = stored[:, :held]
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
        expected = (
            frames * self.tokens_per_frame,
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
            layer.stored = [held.to(device) for held in pair if held is not None]
            names = (f"{index}.averages.{number}" for number in range(4))
            layer.averages = [tensors[name].to(device) for name in names if name in tensors]


class LayerCache:
    """One transformer block's part of a `StreamCache`.

    stored: K and V [B, L, N, D]. averages: the long ones of K and V, then the short ones
    [B, 1 or P, N, D], from the first roll on. text: K and V of cross-attention [B, S, N, D].
    """

    def __init__(self, cache: StreamCache) -> None:
        self._cache = cache
        self.stored: list[Tensor] = []
        self.averages: list[Tensor] = []
        self.text: KeysValues | None = None

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in (*self.stored, *self.averages, *(self.text or ())))

    def rope(self, device: torch.device) -> Tensor:
        """The rotary table of what is held [1, L, D]."""
        return self._cache.rope(device)

    def put(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Store the new frames' K and V [B, L, N, D]; what is held with them."""
        size = self._cache.tokens_per_frame
        length, held = self._cache.capacity * size, self._cache.num_frames * size
        if self._cache.is_trained:
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
        return self.stored[0][:, :held], self.stored[1][:, :held]

    def _allocate(self, like: Tensor, length: int) -> None:
        """Room for so many tokens, with what is stored already at its beginning."""
        shape = (len(like), length, *like.shape[2:])
        before, self.stored = self.stored, [like.new_zeros(shape) for _ in _NAMES]
        for stored, old in zip(self.stored, before, strict=False):
            stored[:, : old.shape[1]] = old

    def roll(self, count: int) -> None:
        """Let the `count` oldest recent frames go, and move those behind them up."""
        config, size = self._cache.config, self._cache.tokens_per_frame
        first, held = config.num_fixed * size, self._cache.num_frames * size
        stop = first + count * size
        if self._cache.is_trained:
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
