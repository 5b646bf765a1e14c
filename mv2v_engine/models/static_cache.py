"""What static conditioning keeps for a turn: the conditioning's K and V of every block (METHOD 13).

They depend on neither the noisy target nor the timestep nor the text, so the first forward of a
turn makes them and all later ones, of both guidance branches, attend to them as they are. Frames
that merge are chosen by that first forward and stay chosen.

B batch, L conditioning tokens of a block, N heads, D head dim, F frames, P numbers of a camera.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mv2v_engine.config import Conditioning
from mv2v_engine.tokens.plan import TokenPlan

KeysValues = tuple[Tensor, Tensor]


class ConditioningCache:
    """One turn's kept K and V. `MV2VTransformer.forward` fills it, `forward_target` reads it.

    blocks: k (normalised, rotated) and v [B, L, N, D] of every block's conditioning, after the
    merges before it. cameras: [B, F, P] of the target's frames; None for a model without cameras.
    """

    serves: Conditioning = "static"

    def __init__(self, plan: TokenPlan) -> None:
        if plan.conditioning != self.serves:
            raise ValueError(
                f"a {type(self).__name__} keeps conditioning={self.serves!r}, got a plan of "
                f"{plan.conditioning!r}: what is exact for static conditioning is an "
                "approximation for joint, which has a cache of its own"
            )
        self.plan = plan
        self.blocks: list[KeysValues] = []
        self.cameras: Tensor | None = None

    @property
    def _is_taken(self) -> bool:
        """Whether no other forward may be kept."""
        return bool(self.blocks)

    @property
    def is_filled(self) -> bool:
        return len(self.blocks) == self.plan.shape.num_layers

    def of_block(self, index: int) -> KeysValues:
        """What block `index` attends to."""
        return self.blocks[index]

    def start(self, plan: TokenPlan, rows_BFP: Tensor | None) -> None:
        """Take up a forward's plan and the cameras of all its frames, before its first block.

        Raises:
            ValueError: it is another plan, gradients are on, or another forward was kept before.
        """
        if plan != self.plan or self._is_taken:
            found = "holds another forward's" if self.blocks else "was made for another plan"
            raise ValueError(f"this cache {found}; make one for every turn")
        if torch.is_grad_enabled():
            raise ValueError(
                "a cache would keep every block's graph alive; run under torch.no_grad(), or "
                "train without a cache"
            )
        self.cameras = None if rows_BFP is None else rows_BFP[:, : plan.target.num_frames]

    def append(self, keys_values: KeysValues) -> None:
        """The next block's."""
        self.blocks.append(keys_values)

    def release(self) -> None:
        """Let go of every tensor, whoever still holds the cache."""
        self.blocks.clear()
        self.cameras = None
