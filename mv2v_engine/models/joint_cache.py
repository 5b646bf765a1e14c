"""What joint conditioning may keep between two whole forwards: its K and V, and how they drift.

Joint conditioning sees the noisy target, the timestep and the text (METHOD 13), so what is kept is
an approximation at every later step, and each guidance branch has its own. It is measured twice:
before it is used, on the first block's output, which the target has already reached; and when a
whole forward replaces it, on the K and V themselves.

B batch, L tokens, N heads, D head dim, C width, F frames, P numbers of a camera.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mv2v_engine.models.static_cache import ConditioningCache, KeysValues
from mv2v_engine.models.token_merge import Sequence, token_slots
from mv2v_engine.tokens.layout import Layout
from mv2v_engine.tokens.plan import TokenPlan


class JointCache(ConditioningCache):
    """One guidance branch's kept K and V; a whole forward fills it and may refresh it.

    probes: whether the first block always runs over the whole sequence, so that its output can be
    compared; its K and V are then not kept. blocks: of the blocks from `first_kept` on.
    """

    serves = "joint"

    def __init__(self, plan: TokenPlan, *, probes: bool) -> None:
        super().__init__(plan)
        self.probes, self.first_kept = probes, int(probes)
        self._frames: list[tuple[Tensor, Layout]] = []
        self._first_output: Tensor | None = None
        self._drifts: list[Tensor] = []
        self._next = 0

    @property
    def is_filled(self) -> bool:
        return len(self.blocks) == self.plan.shape.num_layers - self.first_kept

    @property
    def _is_taken(self) -> bool:
        return bool(self.blocks) and not self.is_filled

    def of_block(self, index: int) -> KeysValues:
        return self.blocks[index - self.first_kept]

    def start(self, plan: TokenPlan, rows_BFP: Tensor | None) -> None:
        super().start(plan, rows_BFP)
        self._next, self._drifts = 0, []

    def refresh(self, keys_values: KeysValues, sequence: Sequence) -> None:
        """The next block's k and v [B, L, N, D] of all tokens; those kept before are compared."""
        length = self.plan.target.length
        # views would hold the target's too
        k, v = (tensor[:, length:].clone() for tensor in keys_values)
        conditioning = sequence.halves()[1]
        frames = conditioning.frames, conditioning.layout
        index, self._next = self._next, self._next + 1
        if index == len(self.blocks):
            self.append((k, v))
            self._frames.append(frames)
            return
        self._drifts.append(self._drift(index, (k, v), frames))
        self.blocks[index], self._frames[index] = (k, v), frames

    def probe(self, sequence: Sequence) -> Tensor | None:
        """Relative L2 change of the first block's conditioning output since the last refresh.

        sequence: what that block has given. None: there is nothing to compare with.
        """
        if self._first_output is None:
            return None
        now = sequence.x[:, self.plan.target.length :]
        if now.shape != self._first_output.shape:
            return now.new_tensor(torch.inf)  # scope "joint": other counts have merged
        return relative_l2(self._first_output, now)

    def keep_output(self, sequence: Sequence) -> None:
        """Take the first block's conditioning output of a refresh, for later probes."""
        self._first_output = sequence.x[:, self.plan.target.length :].clone()

    @property
    def drifts(self) -> Tensor | None:
        """Of the last refresh [blocks, 3]: relative L2 change of K, of V, and the share of tokens
        that could be compared: those of frames that are merged in both, or in neither."""
        return torch.stack(self._drifts) if self._drifts else None

    def release(self) -> None:
        super().release()
        self._frames.clear()
        self._first_output = None

    def _drift(self, index: int, fresh: KeysValues, frames: tuple[Tensor, Layout]) -> Tensor:
        """What `drifts` tells of one block."""
        before = self.blocks[index]
        if self.plan.merge == "off" or not fresh[0].numel():
            changes = [relative_l2(old, new) for old, new in zip(before, fresh, strict=True)]
            return torch.stack([*changes, torch.ones_like(changes[0])])
        ids_before, ids = self._token_ids(*self._frames[index]), self._token_ids(*frames)
        # the same token's place in the new order, where it still is; no count that depends on
        # data leaves the device
        ordered, order = ids.sort(1)
        place = torch.searchsorted(ordered, ids_before).clamp_max(ids.shape[1] - 1)
        found = ordered.gather(1, place) == ids_before
        now = order.gather(1, place)
        rows = torch.arange(len(now), device=now.device)[:, None]
        weight = found[:, :, None, None].to(fresh[0].dtype)
        changes = [
            relative_l2(old * weight, new[rows, now] * weight)
            for old, new in zip(before, fresh, strict=True)
        ]
        return torch.stack([*changes, found.float().mean()])

    def _token_ids(self, frames_BF: Tensor, layout: Layout) -> Tensor:
        """Numbers [B, L] that say which frame a token is of, of how many, and which of them."""
        most, device = max(run.tokens_per_frame for run in self.plan.layout.runs), frames_BF.device
        cells = [
            run.tokens_per_frame * most
            + torch.arange(run.tokens_per_frame, device=device).repeat(run.num_frames)
            for run in layout.runs
        ]
        frame_BL = frames_BF[:, token_slots(layout, device)]
        return frame_BL * (most * (most + 1)) + torch.cat(cells)


def relative_l2(old: Tensor, new: Tensor) -> Tensor:
    """|new - old| / |new| as a float32 scalar; 0 where both are nothing."""
    change = torch.linalg.vector_norm((new - old).float())
    tiny = torch.finfo(torch.float32).tiny
    relative: Tensor = change / torch.linalg.vector_norm(new.float()).clamp_min(tiny)
    return relative
