"""Where a session's finished turns go: its list, its folder and the memory.

A turn that the folder does not take stays in this process and is remembered all the same; it is
stored before any later turn is, so a folder never has a gap.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from mv2v_engine.engine.recall import Recall
from mv2v_engine.engine.store import SessionStore
from mv2v_engine.engine.turn import ViewTurn
from mv2v_engine.errors import RequestError, StorageError
from mv2v_engine.memory.entry import MemoryEntry

if TYPE_CHECKING:
    from mv2v_engine.engine.engine import Engine
    from mv2v_engine.engine.store import StoredTurn

# in a turn's report: why the folder has not taken it; why it can no longer be read from there
STORAGE_ERROR, LOST = "storage_error", "lost"


class Keeper:
    """One session's. turns: finished ones in order; unstored: those that a folder should have."""

    def __init__(self, engine: Engine, recall: Recall, store: SessionStore | None) -> None:
        self.engine, self._recall, self.store = engine, recall, store
        self.turns: list[ViewTurn] = []
        self.unstored: list[ViewTurn] = []

    def keep(self, turn: ViewTurn) -> StorageError | None:
        """Store, remember, list; what the folder said if it does not take the turn."""
        if self.store is None:
            self._remember(turn, turn.latents, None)
            self.turns.append(turn)
            return None
        self.unstored.append(turn)
        try:
            self.store_missing()
            failure = None
        except StorageError as error:
            failure = error
            self._remember(turn, turn.latents, None)
        except BaseException:
            # interrupted: the turn was never made
            if self.unstored and self.unstored[-1] is turn:
                self.unstored.pop()
            raise
        self.turns.append(turn)
        return failure

    def store_missing(self) -> None:
        """Store what the folder lacks, in order.

        Raises:
            StorageError: it does not take the first of them; the later ones were not tried.
        """
        while self.unstored:
            assert self.store is not None
            turn = self.unstored[0]
            latents = turn.latents
            report = {k: value for k, value in turn.report.items() if k != STORAGE_ERROR}
            try:
                digest = self.store.append(turn.number, latents, turn.trajectory, report)
            except StorageError as error:
                for waiting in self.unstored:
                    waiting.report[STORAGE_ERROR] = str(error)
                raise
            read = functools.partial(self.store.latents, turn.number, digest)
            turn.report.pop(STORAGE_ERROR, None)
            self._remember(turn, latents, read)
            turn.footage.stored(read)
            self.unstored.pop(0)

    def restore(self, make_turn: Callable[[StoredTurn, Callable[[], Tensor]], ViewTurn]) -> None:
        """Take up the turns of the session's folder, one after another's latents in memory.

        One whose file is lost keeps its place and its report, and is not remembered.

        Raises:
            RequestError: there is no folder.
            StorageError: its manifest cannot be read.
        """
        if self.store is None:
            raise RequestError("this session has no folder to restore from; give it a store")
        for stored, latents in self.store.turns():
            read = functools.partial(self.store.latents, stored.number, stored.digest)
            turn = make_turn(stored, read)
            if latents is None:
                turn.report[LOST] = stored.lost
            else:
                self._remember(turn, latents, read)
            self.turns.append(turn)

    def _remember(
        self, turn: ViewTurn, latents: Tensor, reload: Callable[[], Tensor] | None
    ) -> None:
        entry = MemoryEntry(
            id=self._recall.entry_id(turn.number),
            turn=turn.number,
            latents=latents,
            trajectory=turn.trajectory,
            key=self.engine.latent_kind.key,
            reload=reload,
            owner=self._recall.owner,
        )
        self.engine.cache.add(entry)
