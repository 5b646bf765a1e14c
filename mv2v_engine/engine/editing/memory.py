"""What a window remembers: the windows of the same edit before it, through the cache (METHOD 10).

C F H W latents, D numbers of a descriptor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from mv2v_engine.config import MemoryMode
from mv2v_engine.engine.recall import gathered
from mv2v_engine.memory.entry import MemoryEntry
from mv2v_engine.memory.retrieval import Retrieval
from mv2v_engine.memory.segment_retrieval import SegmentKey, rank_segments
from mv2v_engine.tokens.editing import editing_plan
from mv2v_engine.tokens.plan import TokenPlan, memory_tokenizers
from mv2v_engine.video.windows import EditWindow

if TYPE_CHECKING:
    from mv2v_engine.engine.engine import Engine


class SegmentMemory:
    """The finished windows of one edit under way. id: of its entries in the cache.

    Entries count windows from 1, as reports and progress do. What the cache has no room for is
    read again from where the window is kept.
    """

    def __init__(self, engine: Engine, id: str, mode: MemoryMode) -> None:
        self.engine, self.id, self.mode = engine, id, mode
        self._keys: list[SegmentKey] = []
        self._owner = object()
        # one whose edit is dropped in its midst
        weakref.finalize(self, engine.cache.abandon, self._owner).atexit = False

    @property
    def _top_k(self) -> int:
        tokenizers = self.engine.transformer.config.tokenizers
        return self.engine.config.max_memory if tokenizers else 0

    def is_wanted(self, window: EditWindow, later: EditWindow) -> bool:
        """Whether a window may be remembered when a later one is edited."""
        if self.mode == "none" or not self._top_k:
            return False
        return window.shot == later.shot or self._crosses_shots

    @property
    def _crosses_shots(self) -> bool:
        return self.engine.config.cross_shot_similarity is not None

    def add(
        self, window: EditWindow, latents: Tensor, descriptor: Tensor, read: Callable[[], Tensor]
    ) -> None:
        """Remember a finished window. latents: [C, F, H, W]. descriptor: of its source, [D].

        read: the latents again.
        """
        number = window.number + 1
        if self._keys and self._keys[-1].shot != window.shot and not self._crosses_shots:
            self.forget()  # the shot before
        entry = MemoryEntry(
            id=f"{self.id}/{number}",
            turn=number,
            latents=latents,
            trajectory=None,
            key=self.engine.latent_kind.key,
            reload=read,
            owner=self._owner,
        )
        self.engine.cache.add(entry)
        self._keys.append(SegmentKey(entry.id, number, descriptor, window.shot))

    def rank(self, window: EditWindow, descriptor: Tensor) -> Retrieval:
        """The windows that this one remembers, best first. descriptor: of its source, [D]."""
        if self.mode == "none":
            return Retrieval.nothing(len(self._keys), "memory is off")
        config = self.engine.config
        return rank_segments(
            descriptor,
            [key for key in self._keys if key.id in self.engine.cache],
            top_k=self._top_k,
            shot=window.shot,
            cross_shot_similarity=config.cross_shot_similarity,
            tokenizers=config.memory_tokenizers,
        )

    def gather(
        self, window: EditWindow, descriptor: Tensor
    ) -> tuple[Retrieval, TokenPlan, list[Tensor]]:
        """What is remembered, its plan, and its latents [1, C, F, H, W] on the device."""
        retrieval, plan, entries = gathered(
            self.engine.cache,
            lambda: self.rank(window, descriptor),
            lambda ranked: self._plan(ranked.tokenizers, self._has_preceding(window, ranked)),
        )
        return retrieval, plan, [entry.latents.to(self.engine.device)[None] for entry in entries]

    def largest_plan(self, window: EditWindow) -> TokenPlan:
        """The longest plan that a window may get, known before its source is read."""
        count = sum(self._crosses_shots or key.shot == window.shot for key in self._keys)
        return self._plan_of(0 if self.mode == "none" else min(count, self._top_k))

    def plans(self, most: int) -> list[TokenPlan]:
        """The plans of windows with none to `most` others of their shot before them."""
        counts = range(1 if self.mode == "none" else min(most, self._top_k) + 1)
        return [self._plan_of(count) for count in counts]

    def _plan_of(self, count: int) -> TokenPlan:
        shape, mode = self.engine.transformer.config, self.engine.config.memory_tokenizers
        return self._plan(memory_tokenizers(count, shape.tokenizers, mode=mode), True)

    def _has_preceding(self, window: EditWindow, retrieval: Retrieval) -> bool:
        """Whether the first of what is remembered comes just before the window, in its own shot."""
        before = (f"{self.id}/{window.number}", window.shot)
        return retrieval.ids[:1] == before[:1] and before in ((k.id, k.shot) for k in self._keys)

    def _plan(self, tokenizers: tuple[int, ...], preceding: bool) -> TokenPlan:
        config, sampling = self.engine.config, self.engine.sampling
        _, *grid = self.engine.vae.latent_shape(sampling.num_frames, sampling.size)
        frames, rows, columns = grid
        return editing_plan(
            self.engine.transformer.config,
            (frames, rows, columns),
            tokenizers,
            preceding=preceding,
            merge=self.engine.merge,
            scope=config.merge_scope,
            fraction=config.merge_fraction,
            conditioning=config.conditioning,
            rope=config.rope,
        )

    def forget(self) -> None:
        """The edit has ended, however it did: nothing of it stays in the cache."""
        self._keys.clear()
        self.engine.cache.forget(self._owner)
