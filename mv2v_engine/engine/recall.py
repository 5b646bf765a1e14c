"""What a turn remembers, the plan it runs, and what its steps are conditioned on (METHOD 1-5).

C latent channels, F H W latent grid, V camera tracks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mv2v_engine.camera.poses import relative_to
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.engine.request import TurnRequest
from mv2v_engine.engine.turn import ViewTurn
from mv2v_engine.memory.cache import MemoryCache
from mv2v_engine.memory.entry import MemoryEntry
from mv2v_engine.memory.retrieval import Retrieval, rank_memory
from mv2v_engine.tokens.plan import TokenPlan, turn_plan

if TYPE_CHECKING:
    from mv2v_engine.engine.engine import Engine


class Recall:
    """One session's way to its memory. camera: the source's own path.

    owner: whose entries in the cache are this session's; another one under the same id has its
        own.
    """

    def __init__(self, engine: Engine, session_id: str, camera: CameraTrajectory) -> None:
        self.engine, self.session_id, self.camera = engine, session_id, camera
        self.owner = object()

    def entry_id(self, number: int) -> str:
        """What the cache calls a turn of this session."""
        return f"{self.session_id}/{number}"

    def rank(self, request: TurnRequest, num_turns: int) -> Retrieval:
        """What a turn after `num_turns` others remembers, best first."""
        config = self.engine.config
        if request.memory not in ("retrieved", "alone"):
            reason = "memory is off"
            if request.memory == "previous":
                reason = "the last turn is the source" if num_turns else "this is the first turn"
            return Retrieval((), (), (), (), num_turns, reason)
        held = [
            entry
            for entry in self.engine.cache.entries(self.engine.latent_kind)
            if entry.owner is self.owner
        ]
        shuffle = None
        if config.memory_ranking == "random":
            shuffle = torch.Generator().manual_seed(request.seed)
        return rank_memory(
            request.camera,
            held,
            top_k=config.max_memory if self.engine.transformer.config.tokenizers else 0,
            radius=config.fov_radius,
            blend=config.fov_blend,
            # trajectories lie on the CPU, whatever runs the model
            backend="reference" if config.backend == "reference" else "auto",
            tokenizers=config.memory_tokenizers,
            shuffle=shuffle,
        )

    def plan(self, request: TurnRequest, retrieval: Retrieval) -> TokenPlan:
        config, sampling = self.engine.config, self.engine.sampling
        _, *grid = self.engine.vae.latent_shape(sampling.num_frames, sampling.size)
        frames, rows, columns = grid
        return turn_plan(
            self.engine.transformer.config,
            (frames, rows, columns),
            retrieval.tokenizers,
            source=not (request.memory == "alone" and retrieval.ids),
            merge=self.engine.merge,
            scope=config.merge_scope,
            fraction=config.merge_fraction,
            conditioning=config.conditioning,
            rope=config.rope,
        )

    def condition(
        self, request: TurnRequest, source: Tensor, turns: list[ViewTurn]
    ) -> tuple[Retrieval, TokenPlan, list[Tensor], Tensor | None]:
        """What is remembered, its plan, latents [1, C, F, H, W] and cameras [1, V, F, 12 or 16].

        source: the source's latents [C, F, H, W]. turns: the session's finished ones.
        """
        retrieval, plan, entries = gathered(
            self.engine.cache,
            lambda: self.rank(request, len(turns)),
            lambda ranked: self.plan(request, ranked),
        )
        source_camera = self.camera
        if request.memory == "previous" and turns:
            source, source_camera = turns[-1].latents, turns[-1].trajectory
        cameras = self._cameras(
            plan, [request.camera, source_camera, *(entry.camera for entry in entries)]
        )
        device = self.engine.device
        has_source = any(segment.role == "source" for segment in plan.segments)
        videos = [*([source] if has_source else []), *(entry.latents for entry in entries)]
        return (
            retrieval,
            plan,
            [video.to(device)[None] for video in videos],
            None if cameras is None else cameras.to(device)[None],
        )

    def _cameras(self, plan: TokenPlan, trajectories: list[CameraTrajectory]) -> Tensor | None:
        """Camera tracks [V, F, 12 or 16] in the order that the plan's segments name them."""
        shape = plan.shape
        if not shape.has_camera:
            return None
        if shape.camera_conditioning == "target":
            # stock ReCamMaster: the target's camera for all, relative to its own first frame
            target = trajectories[0]
            poses = relative_to(target.poses, target.poses[0])
            trajectories = [dataclasses.replace(target, poses=poses)]
        stride = self.engine.vae.temporal_stride
        return torch.stack([t.vectors(shape.camera_dim, stride=stride) for t in trajectories])


def gathered(
    cache: MemoryCache,
    rank: Callable[[], Retrieval],
    make_plan: Callable[[Retrieval], TokenPlan],
) -> tuple[Retrieval, TokenPlan, list[MemoryEntry]]:
    """What is remembered, its plan and its entries; what cannot be read again is left out."""
    lost: dict[str, str] = {}
    while True:
        retrieval = rank()
        cache.prefetch(retrieval.ids)
        plan = make_plan(retrieval)
        entries, missing = cache.gather(retrieval.ids)
        if not missing:
            return dataclasses.replace(retrieval, lost=tuple(lost.items())), plan, entries
        lost |= missing  # the cache has forgotten them, so the ranking moves on
