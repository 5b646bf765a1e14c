"""What every session is: one source, many turns that remember the ones before (METHOD 1).

What a session can be asked for follows from its engine's model: `ViewSession` re-renders the source
from other cameras, `EditSession` edits it by instruction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.config import MemoryMode
from mv2v_engine.engine.request import NO_EDITS, NO_VIEWS
from mv2v_engine.engine.turn import Turn
from mv2v_engine.errors import RequestError
from mv2v_engine.locks import WriterLock
from mv2v_engine.progress import CancelToken, Event

if TYPE_CHECKING:
    from mv2v_engine.engine.editing.result import FinishedWindow
    from mv2v_engine.engine.engine import Engine


class Session(ABC):
    """Made by `Engine.session`; not thread-safe, one turn at a time.

    One with a folder keeps every other writer out of it until it is closed or gone.

    lost: what of the folder could not be read when the session was resumed, in words.

    lock: the folder's; None if there is no folder, it can only be read, or the caller keeps others
        out.
    """

    def __init__(self, engine: Engine, id: str, lock: WriterLock | None = None) -> None:
        self.engine, self.id, self._lock = engine, id, lock
        self.lost: tuple[str, ...] = ()
        self._is_closed = False

    @property
    @abstractmethod
    def turns(self) -> Sequence[Turn]:
        """Finished turns in order."""

    def close(self) -> None:
        """Forget this session's memory, and let others write into its folder, which stays."""
        self._is_closed = True
        if self._lock is not None:
            self._lock.release()

    def _require_open(self) -> None:
        """Refuse what would write into a folder that others may have by now.

        Raises:
            RequestError: the session is closed.
        """
        if self._is_closed:
            raise RequestError(
                f"the session {self.id} is closed; open it again from its folder (resume=True), "
                "or begin another"
            )

    def render(
        self,
        camera: str | CameraTrajectory,
        *,
        prompt: str = "",
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        memory: MemoryMode | None = None,
        on_progress: Callable[[Event], None] | None = None,
        cancel: CancelToken | None = None,
    ) -> Turn:
        """Re-render the source from another camera: see `ViewSession.render`.

        Raises:
            RequestError: the model edits by instruction.
        """
        raise RequestError(f"{self.engine.checkpoint.name} {NO_VIEWS}")

    def edit(
        self,
        prompt: str,
        *,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        memory: MemoryMode | None = None,
        on_progress: Callable[[Event], None] | None = None,
        cancel: CancelToken | None = None,
        on_window: Callable[[FinishedWindow], None] | None = None,
        out: Path | str | None = None,
    ) -> Turn:
        """Edit the source by instruction: see `EditSession.edit`.

        Raises:
            RequestError: the model renders novel views.
        """
        raise RequestError(f"{self.engine.checkpoint.name} {NO_EDITS}")
