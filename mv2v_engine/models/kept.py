"""The tensors that one forward leaves for later ones of its turn.

With static conditioning these are the conditioning's K and V of every block (METHOD 13).

They depend on neither the noisy target nor the timestep nor the text, so the first forward of a
turn makes them and all later ones, of both guidance branches, attend to them as they are. Frames
that merge are chosen by that first forward and stay chosen.

B batch, L conditioning tokens of a block, N heads, D head dim, F frames, P numbers of a camera.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mv2v_engine.models.camera_encoder import frame_dim
from mv2v_engine.tokens.plan import TokenPlan

KeysValues = tuple[Tensor, Tensor]
# bytes: what CUDA's own allocations start at
_ALIGNMENT = 512


@dataclass(frozen=True, eq=False)
class KeptStorage:
    """Tensors that a cache keeps into, of one sample: k and v of every block, the cameras, and what
    a history's tokens were made of."""

    blocks: tuple[KeysValues, ...]
    cameras: Tensor | None
    history: Tensor | None = None


class KeptLayout:
    """The places of a plan's kept tensors in a buffer: in order of depth, at fixed offsets.

    num_bytes: the least size of the buffer. cameras: their dtype, None without cameras.
    """

    def __init__(self, plan: TokenPlan, dtype: torch.dtype, cameras: torch.dtype | None) -> None:
        heads = (plan.shape.num_attention_heads, plan.shape.attention_head_dim)
        self._pieces: list[tuple[int, tuple[int, ...], torch.dtype]] = []
        self.num_bytes = 0
        for length in plan.lengths_by_block():
            for _ in range(2):
                self._place((1, length - plan.target.length, *heads), dtype)
        self._has_cameras = cameras is not None
        if cameras is not None:
            self._place((1, plan.target.num_frames, frame_dim(plan.shape)), cameras)
        self._has_history = plan.attended_history is not None
        if plan.attended_history is not None:
            self._place((1, *plan.attended_history), dtype)

    def _place(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._pieces.append((self.num_bytes, shape, dtype))
        size = math.prod(shape) * dtype.itemsize
        self.num_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT

    def storage(self, buffer: Tensor) -> KeptStorage:
        """Views of a buffer, uint8 [>= num_bytes]."""
        views = [
            buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for start, shape, dtype in self._pieces
        ]
        history = views.pop() if self._has_history else None
        cameras = views.pop() if self._has_cameras else None
        return KeptStorage(tuple(zip(views[::2], views[1::2], strict=True)), cameras, history)


class ConditioningCache:
    """One turn's kept K and V: the first forward that is given it fills it, later ones read it.

    blocks: k (normalised, rotated) and v [B, L, N, D] of every block's conditioning, after the
    merges before it. cameras: [B, F, P] of the target's frames; None for a model without cameras.
    history: [B, L', E], what a history's tokens were made of, where blocks attend to it.
    `keep_in` gives it a place to keep them; without one it keeps the tensors that it is handed.

    Args:
        is_trained: keep the graph of what is kept too, so that gradients flow back through it.
    """

    def __init__(self, plan: TokenPlan, *, is_trained: bool = False) -> None:
        if plan.conditioning != "static":
            raise ValueError(
                f"K and V are kept of static conditioning, got a plan of {plan.conditioning!r}: "
                "joint conditioning sees the noisy target, and its K and V change with every step"
            )
        self.plan, self._is_trained = plan, is_trained
        self.blocks: list[KeysValues] = []
        self.cameras: Tensor | None = None
        self.history: Tensor | None = None
        self._storage: KeptStorage | None = None

    def keep_in(self, storage: KeptStorage) -> None:
        """Copy what is kept into a storage made for the plan; before anything is kept."""
        assert not self.blocks
        self._storage = storage

    @property
    def is_filled(self) -> bool:
        return len(self.blocks) == self.plan.shape.num_layers

    def of_block(self, index: int) -> KeysValues:
        """The K and V that block `index` attends to."""
        return self.blocks[index]

    def start(
        self, plan: TokenPlan, cameras_BFP: Tensor | None, history_BLE: Tensor | None = None
    ) -> None:
        """Take up a forward's plan, the cameras of all its frames and its history, before its
        first block.

        Raises:
            ValueError: it is another plan, gradients are on, or another forward was kept before.
        """
        if plan != self.plan or self.blocks:
            found = "holds another forward's" if self.blocks else "was made for another plan"
            raise ValueError(f"this cache {found}; make one for every turn")
        if torch.is_grad_enabled() and not self._is_trained:
            raise ValueError(
                "a cache would keep every block's graph alive; run under torch.no_grad(), or "
                "say is_trained=True"
            )
        self.cameras = None if cameras_BFP is None else cameras_BFP[:, : plan.target.num_frames]
        if self._storage is not None and self.cameras is not None:
            assert self._storage.cameras is not None
            self.cameras = self._storage.cameras.copy_(self.cameras)
        self.history = history_BLE
        if self._storage is not None and history_BLE is not None:
            assert self._storage.history is not None
            self.history = self._storage.history.copy_(history_BLE)

    def append(self, keys_values: KeysValues) -> None:
        """Keep the next block's K and V."""
        if self._storage is not None:
            keys, values = self._storage.blocks[len(self.blocks)]
            keys_values = keys.copy_(keys_values[0]), values.copy_(keys_values[1])
        self.blocks.append(keys_values)

    def of_samples(self, samples_T: Tensor, cameras_TFP: Tensor | None) -> ConditioningCache:
        """The same for T targets of any of the samples: K and V [T, L, N, D].

        samples: the sample of each target, int64. cameras: those of the targets' frames.
        """
        other = ConditioningCache(self.plan, is_trained=self._is_trained)
        other.cameras = cameras_TFP
        if self.history is not None:
            other.history = self.history.index_select(0, samples_T)
        other.blocks = [
            (keys.index_select(0, samples_T), values.index_select(0, samples_T))
            for keys, values in self.blocks
        ]
        return other

    def release(self) -> None:
        """Let go of every tensor, whoever still holds the cache."""
        self.blocks.clear()
        self.cameras = self.history = self._storage = None


class TargetResidual:
    """The sum of all that a forward added to the target's patches [B, L, C]: rays and blocks."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def read(self) -> Tensor:
        """The residual of the last forward.

        Raises:
            ValueError: no forward has left one.
        """
        if self.value is None:
            raise ValueError("no forward has left a residual; run forward(..., residual=) first")
        return self.value

    def release(self) -> None:
        self.value = None
