"""What a turn remembers, the plan it runs, and what its steps are conditioned on (METHOD 1-5, 10).

A novel view remembers the session's earlier turns by their fields of view, a window of an edit the
windows of the same edit before it by their sources; both through the engine's cache.

C latent channels, F H W latent grid, V camera tracks, D numbers of a descriptor.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mv2v_engine.camera.poses import relative_to
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.config import MemoryMode
from mv2v_engine.engine.parts import Parts
from mv2v_engine.engine.request import Request
from mv2v_engine.engine.turn import KeptWindow, Turn
from mv2v_engine.memory.entry import MemoryEntry
from mv2v_engine.memory.ranking import Gain, Known, chosen, coverage, ends, pooled, seen_volume
from mv2v_engine.memory.retrieval import Retrieval, rank_memory
from mv2v_engine.memory.segment_retrieval import SegmentKey, rank_segments
from mv2v_engine.models.history import HistoryEncoder, HistoryTokens
from mv2v_engine.tokens.plan import TokenPlan
from mv2v_engine.video.windows import EditWindow

# what is remembered, and the plan of that
Ranked = tuple[Retrieval, TokenPlan]


@dataclass(frozen=True, eq=False)
class Recalled:
    """What a window's steps are conditioned on.

    latents: [1, C, F, H, W] of each conditioning segment, of a history its tokens, as
    `TokenPlan.latent_shapes` has them, on the device. cameras: tracks [1, V, F, 12 or 16]; None for
    a model without cameras.
    """

    retrieval: Retrieval
    plan: TokenPlan
    latents: list[Tensor]
    cameras: Tensor | None = None


class Recall:
    """A way to the memory that keeps entries of its own in the cache. id: what these begin with.

    Another one under the same id has its own entries. One that is dropped takes them with it.
    """

    def __init__(self, parts: Parts, id: str) -> None:
        self.parts, self.id = parts, id
        self.owner = object()
        self._history: HistoryTokens | None = None
        # one that is dropped without `forget`, wherever its last reference goes
        weakref.finalize(self, parts.cache.abandon, self.owner).atexit = False

    @property
    def top_k(self) -> int:
        """The most videos that a window remembers."""
        has_encoder = self.parts.transformer.config.tokenizers or self.parts.history
        return self.parts.config.max_memory if has_encoder else 0

    def entry_id(self, number: int) -> str:
        """What the cache calls a turn or a window, counted from 1."""
        return f"{self.id}/{number}"

    def add(
        self,
        number: int,
        latents: Tensor,
        reload: Callable[[], Tensor] | None,
        trajectory: CameraTrajectory | None = None,
    ) -> MemoryEntry:
        """Remember a finished video. latents: [C, F, H, W]. reload: reads them again."""
        entry = MemoryEntry(
            id=self.entry_id(number),
            turn=number,
            latents=latents,
            trajectory=trajectory,
            key=self.parts.latent_kind.key,
            reload=reload,
            owner=self.owner,
        )
        self.parts.cache.add(entry)
        if self._history is not None:
            self._history.forget(entry.id)
        return entry

    def forget(self) -> None:
        """Leave nothing of this in the cache."""
        self._history = None
        self.parts.cache.forget(self.owner)

    def _planned(self, retrieval: Retrieval, **how: Any) -> Ranked:
        """What is remembered, said of its encoder, and its plan. how: as `Parts.plan` takes it."""
        retrieval = dataclasses.replace(retrieval, history=self.parts.history)
        return retrieval, self.parts.plan(retrieval.tokenizers, **how)

    def _videos(self, plan: TokenPlan, entries: Sequence[MemoryEntry]) -> list[Tensor]:
        """Latents [1, C, F, H, W] of every memory segment, of a history its tokens.

        entries: as `_gathered` gives them.
        """
        for entry in entries:
            entry.require_key(self.parts.latent_kind.key)
        videos = [entry.latents for entry in entries]
        if self.parts.history is None or not videos:
            return [video[None] for video in videos]
        if self._history is None:
            transformer = self.parts.transformer
            encoder = cast(HistoryEncoder, transformer.history_encoders[self.parts.history])
            has_hidden = plan.attended_history is not None
            self._history = HistoryTokens(
                encoder, transformer.patch_embedding, with_hidden=has_hidden
            )
        tokens = self._history.of([(entry.id, entry.latents) for entry in entries])
        whole = [s.grid[0] for s in plan.segments if s.role == "memory" and not s.is_encoded]
        return [tokens, *(torch.cat(videos, 1)[None, :, -count:] for count in whole)]

    def _gathered(
        self, ranked: Ranked, rank: Callable[[], Ranked]
    ) -> tuple[Retrieval, TokenPlan, list[MemoryEntry]]:
        """What is remembered, its plan and its entries; what cannot be read again is left out.

        The entries are in the order of their segments; those of a history, of their turns.
        """
        (retrieval, plan), cache, lost = ranked, self.parts.cache, dict[str, str]()
        while True:
            cache.prefetch(retrieval.ids)
            entries, missing = cache.gather(retrieval.ids)
            if not missing:
                if self.parts.history is not None:
                    entries = sorted(entries, key=lambda entry: entry.turn)
                return dataclasses.replace(retrieval, lost=tuple(lost.items())), plan, entries
            lost |= missing  # the cache has forgotten them, so the ranking moves on
            retrieval, plan = rank()


class ViewRecall(Recall):
    """The memory of a session of novel views. camera: the source's own path."""

    def __init__(self, parts: Parts, id: str, camera: CameraTrajectory) -> None:
        super().__init__(parts, id)
        self.camera = camera
        self._pooled: dict[str, Tensor] = {}

    def add(
        self,
        number: int,
        latents: Tensor,
        reload: Callable[[], Tensor] | None,
        trajectory: CameraTrajectory | None = None,
    ) -> MemoryEntry:
        """Remember a finished video, and for a learned ranking what it shows."""
        if self.parts.ranker is not None:
            self._pooled[self.entry_id(number)] = pooled(latents)
        return super().add(number, latents, reload, trajectory)

    def rank(self, request: Request, num_turns: int) -> Ranked:
        """What a turn after `num_turns` others remembers, best first, and its plan."""
        retrieval = self._ranked(request, num_turns)
        has_source = not (request.memory == "alone" and retrieval.ids)
        return self._planned(retrieval, has_source=has_source)

    def _ranked(self, request: Request, num_turns: int) -> Retrieval:
        config, cache = self.parts.config, self.parts.cache
        if request.memory not in ("retrieved", "alone"):
            reason = "memory is off"
            if request.memory == "previous":
                reason = "the last turn is the source" if num_turns else "this is the first turn"
            return Retrieval.nothing(num_turns, reason)
        held = [e for e in cache.entries(self.parts.latent_kind) if e.owner is self.owner]
        shuffle = None
        if config.memory_ranking == "random":
            shuffle = torch.Generator().manual_seed(request.seed)
        assert request.camera is not None
        return rank_memory(
            request.camera,
            held,
            top_k=self.top_k,
            radius=config.fov_radius,
            blend=config.fov_blend,
            # trajectories lie on the CPU, whatever runs the model
            backend="reference" if config.backend == "reference" else "auto",
            tokenizers=config.memory_tokenizers,
            shuffle=shuffle,
            choose=self._choose if config.memory_ranking in ("coverage", "learned") else None,
        )

    def _choose(
        self, target: CameraTrajectory, entries: Sequence[MemoryEntry], count: int
    ) -> list[tuple[int, float]]:
        """A `Choose`: each entry by what it adds to the source and those before it."""
        gain: Gain = coverage
        cameras = [entry.camera for entry in entries]
        if self.parts.ranker is not None:
            own = [ends(target, self.camera, camera) for camera in cameras]
            shown = [self._pooled[entry.id] for entry in entries]
            gain = self.parts.ranker.gain(Known(torch.stack(own), torch.stack(shown)))
        seen = seen_volume(target, [self.camera, *cameras])
        return chosen(~seen[0], seen[1:], gain, count)

    def recall(
        self, request: Request, source: Tensor, turns: Sequence[Turn], ranked: Ranked | None = None
    ) -> Recalled:
        """What a turn is conditioned on.

        source: the source's latents [C, F, H, W]. turns: the session's finished ones. ranked: what
        `rank` has given already.
        """

        def rank() -> Ranked:
            return self.rank(request, len(turns))

        if ranked is None or not all(id in self.parts.cache for id in ranked[0].ids):
            ranked = rank()
        retrieval, plan, entries = self._gathered(ranked, rank)
        source_camera = self.camera
        if request.memory == "previous" and turns:
            source, source_camera = turns[-1].latents, turns[-1].camera
        assert request.camera is not None
        cameras = self._cameras(
            plan, [request.camera, source_camera, *(entry.camera for entry in entries)]
        )
        device = self.parts.device
        has_source = any(segment.role == "source" for segment in plan.segments)
        count = plan.shape.context_frames or source.shape[1]
        videos = [
            *([source[None, :, :count]] if has_source else []),
            *self._videos(plan, entries),
        ]
        return Recalled(
            retrieval,
            plan,
            [video.to(device) for video in videos],
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
        stride = self.parts.vae.temporal_stride
        tracks = [t.vectors(shape.camera_dim, stride=stride) for t in trajectories]
        histories = [s for s in plan.segments if s.role == "memory"]
        if self.parts.history is None or not histories:
            return torch.stack(tracks)
        past = torch.cat(tracks[2:])
        tracks = [*tracks[:2], *(past[-segment.grid[0] :] for segment in histories)]
        # tracks are of one length: frames that no segment has are never read
        return pad_sequence(tracks, batch_first=True)


class EditRecall(Recall):
    """The memory of one edit under way: its finished windows.

    What the cache has no room for is read again from where the window is kept. references: latent
    (rows, columns) of the images that every window refers to.
    """

    def __init__(
        self,
        parts: Parts,
        id: str,
        mode: MemoryMode,
        references: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(parts, id)
        self.mode, self.references = mode, tuple(references)
        self._keys: list[SegmentKey] = []

    @property
    def _crosses_shots(self) -> bool:
        return self.parts.config.cross_shot_similarity is not None

    def is_wanted(self, window: EditWindow, later: EditWindow) -> bool:
        """Whether a window may be remembered when a later one is edited."""
        if self.mode == "none" or not self.top_k:
            return False
        return window.shot == later.shot or self._crosses_shots

    def keep(self, window: EditWindow, kept: KeptWindow, latents: Tensor) -> None:
        """Remember a finished window. latents: [C, F, H, W], the window's."""
        if self._keys and self._keys[-1].shot != window.shot and not self._crosses_shots:
            self.forget()  # the shot before
        assert kept.descriptor is not None
        entry = self.add(window.number + 1, latents, kept.read)
        self._keys.append(SegmentKey(entry.id, entry.turn, kept.descriptor, window.shot))

    def rank(self, window: EditWindow, descriptor: Tensor) -> Ranked:
        """The windows that this one remembers, best first. descriptor: of its source, [D]."""
        retrieval = self._ranked(window, descriptor)
        # whether the first of them comes just before the window, in its own shot
        before = (self.entry_id(window.number), window.shot)
        preceding = retrieval.ids[:1] == before[:1] and before in (
            (key.id, key.shot) for key in self._keys
        )
        return self._planned(retrieval, preceding=preceding, references=self.references)

    def _ranked(self, window: EditWindow, descriptor: Tensor) -> Retrieval:
        if self.mode == "none":
            return Retrieval.nothing(len(self._keys), "memory is off")
        config = self.parts.config
        return rank_segments(
            descriptor,
            [key for key in self._keys if key.id in self.parts.cache],
            top_k=self.top_k,
            shot=window.shot,
            cross_shot_similarity=config.cross_shot_similarity,
            tokenizers=config.memory_tokenizers,
        )

    def recall(
        self,
        window: EditWindow,
        descriptor: Tensor,
        source: Tensor,
        references: Sequence[Tensor] = (),
    ) -> Recalled:
        """What a window is conditioned on.

        descriptor: of its source, [D]. source: its latents [C, F, H, W], a segment of their own
        where they do not lie on the target's channels. references: latents [C, 1, H, W] of images,
        segments of their own in the same case.
        """

        def rank() -> Ranked:
            return self.rank(window, descriptor)

        retrieval, plan, entries = self._gathered(rank(), rank)
        videos = self._videos(plan, entries)
        if not self.parts.transformer.config.source_channels:
            videos = [each[None] for each in (source, *references)] + videos
        return Recalled(retrieval, plan, [video.to(self.parts.device) for video in videos])

    def largest_plan(self, window: EditWindow) -> TokenPlan:
        """The longest plan that a window may get, known before its source is read."""
        count = sum(self._crosses_shots or key.shot == window.shot for key in self._keys)
        count = 0 if self.mode == "none" else min(count, self.top_k)
        return self.parts.plan_of(count, self.references)

    def plans(self, most: int) -> list[TokenPlan]:
        """The plans of windows with none to `most` others of their shot before them."""
        counts = range(1 if self.mode == "none" else min(most, self.top_k) + 1)
        return [self.parts.plan_of(count, self.references) for count in counts]

    def forget(self) -> None:
        """The edit, or its shot, has ended: nothing of it stays in the cache."""
        self._keys.clear()
        super().forget()
