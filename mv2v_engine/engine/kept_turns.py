"""The turns that a session has: kept in memory, in its folder and in the engine's cache.

A turn is a draft until its last window is finished. Where there is a folder, it takes every
finished window in order; what it does not take stays in memory and is tried again. A session that
is resumed takes up what its folder holds.

C latent channels, F H W latent grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from mv2v_engine.engine.folder import STORAGE_ERROR, SessionFolder
from mv2v_engine.engine.parts import Parts
from mv2v_engine.engine.recall import ViewRecall
from mv2v_engine.engine.request import Request
from mv2v_engine.engine.source import LongSource, Source
from mv2v_engine.engine.turn import Draft, Footage, KeptWindow, Turn
from mv2v_engine.errors import RequestError, StorageError
from mv2v_engine.video.windows import EditWindow

# those of `Parts.turn_settings` that are about steps; and the settings that set some of other names
_SAMPLED = ("scheduler", "flow_shift", "timesteps")
_SET_BY = {"scheduler": "fast or scheduler", "flow_shift": "fast", "products": "dtype"}


class KeptTurns:
    """The turns of one session.

    drafts: finished turns, and edits that were cut off, in the order in which they were begun.
    lost: what of the folder could not be read when it was taken up, in words.

    Args:
        recall: the memory that novel views enter.
        windows: what the model sees of the source, in order.
        folder: None keeps everything in memory.
    """

    def __init__(
        self,
        parts: Parts,
        recall: ViewRecall,
        source: Source | LongSource,
        windows: Sequence[EditWindow],
        folder: SessionFolder | None,
    ) -> None:
        self.drafts: list[Draft] = []
        self.lost: tuple[str, ...] = ()
        self._parts, self._recall, self._source = parts, recall, source
        self._windows, self._folder = windows, folder
        self._turns: dict[int, Turn] = {}

    @property
    def turns(self) -> list[Turn]:
        """Finished turns in the order in which they were begun."""
        return [self._turns[number] for number in sorted(self._turns)]

    @property
    def unstored(self) -> tuple[Turn, ...]:
        """Finished turns that the folder has not taken yet."""
        if self._folder is None:
            return ()
        waiting = {d.number for d in self.drafts if d.num_stored < d.num_done}
        return tuple(turn for turn in self.turns if turn.number in waiting)

    @property
    def unfinished(self) -> tuple[tuple[Request, int], ...]:
        """Edits that were cut off, and how many of their windows are finished."""
        return tuple((each.request, each.num_done) for each in self.drafts if each.report is None)

    def taken_up(self, request: Request) -> Draft:
        """The edit that a request has begun, or a new turn."""
        settings = self._parts.turn_settings()
        if self._parts.is_editor:
            for draft in self.drafts:
                if (draft.request, draft.settings) == (request, settings):
                    return draft
        number = max((draft.number for draft in self.drafts), default=0) + 1
        return Draft(number, request, settings)

    def other_settings(self) -> str | None:
        """Why no turn goes on behind those that there are, in words; None if one may.

        Views that were made by other steps or numbers remember each other badly. An edit remembers
        itself alone, and under other settings is another edit; by other steps it is refused, too.
        """
        own = self._parts.turn_settings()
        for draft in self.drafts:
            # adopted ones, and those of before they were kept, have none
            begun = draft.settings or own
            for name in _SAMPLED if self._parts.is_editor else dict.fromkeys((*own, *begun)):
                if begun.get(name) != own.get(name):
                    return (
                        f"turn {draft.number} of the session was made with {name} "
                        f"{begun.get(name)!r}, and this engine has {own.get(name)!r}; give the "
                        f"same {_SET_BY.get(name, name)}, or begin another session"
                    )
        return None

    def restore(self) -> None:
        """Take up the turns of the folder; of their latents as many as memory holds.

        Raises:
            RequestError: there is no folder.
            StorageError: its manifest cannot be read, or is of the other task.
        """
        if self._folder is None:
            raise RequestError("this session has no folder to restore from; give it a store")
        for draft, latents in self._folder.drafts():
            if (draft.request.camera is None) != self._parts.is_editor:
                raise StorageError(
                    f"{self._folder.manifest} holds turns of the other task; choose another folder"
                )
            self.drafts.append(draft)
            if draft.report is not None:
                self._turns[draft.number] = self._finished(draft)
            if latents is not None:
                self._remember(draft, latents)
        self.lost = tuple(draft.lost for draft in self.drafts if draft.lost is not None)

    def view(self, draft: Draft, kept: KeptWindow, frames: Tensor) -> Turn:
        """A finished novel view, which is nobody's yet. frames: uint8 [T, height, width, 3]."""
        draft.windows, draft.report = [kept], kept.report
        turn = self._finished(draft)
        turn.footage.decoded(frames)
        return turn

    def keep_view(self, draft: Draft, turn: Turn) -> StorageError | None:
        """Store, remember, list; what the folder said if it does not take the turn."""
        failure = None
        self.drafts.append(draft)
        try:
            if self._folder is None:
                self._remember(draft, turn.latents)
            else:
                self.store()
        except StorageError as error:
            failure = error
            self._remember(draft, turn.latents)
        except BaseException:
            # interrupted: the turn was never made
            self.drafts.remove(draft)
            raise
        self._turns[turn.number] = turn
        return failure

    def keep_window(self, draft: Draft, window: EditWindow, kept: KeptWindow) -> None:
        """A window of an edit is finished: it is the session's, and the folder's if it takes it.

        Raises:
            StorageError: the folder does not take it.
        """
        assert window.number == draft.num_done and kept.latents is not None
        draft.windows.append(kept)
        if draft not in self.drafts:
            self.drafts.append(draft)
        self.store()

    def finish(self, draft: Draft, report: dict[str, Any]) -> None:
        """Give an edit whose windows are all there its report.

        Raises:
            StorageError: the folder does not take it; the edit has no report then.
        """
        draft.report = report
        if self._folder is not None:
            try:
                self._folder.finish(draft)
            except StorageError:
                draft.report = None
                raise

    def turn(self, draft: Draft) -> Turn:
        """An edit that has its report as a turn, which it stays."""
        if draft.number not in self._turns:
            self._turns[draft.number] = self._finished(draft)
        return self._turns[draft.number]

    def store(self) -> None:
        """Give the folder, if there is one, what it has not taken, in order.

        Raises:
            StorageError: it does not take the first of them; the later ones were not tried.
        """
        for draft in self.drafts if self._folder is not None else ():
            self._store(draft)

    def _store(self, draft: Draft) -> None:
        """Give the folder what it lacks of a turn's finished windows, in order."""
        assert self._folder is not None
        while draft.num_stored < draft.num_done:
            number, kept = draft.num_stored + 1, draft.windows[draft.num_stored]
            latents = kept.read()
            try:
                digest = self._folder.append(draft, number, latents)
            except StorageError as error:
                # the reports of views say why the folder has not taken them
                for waiting in self.drafts[self.drafts.index(draft) :]:
                    if waiting.request.camera is not None and waiting.report is not None:
                        waiting.report[STORAGE_ERROR] = str(error)
                raise
            row = {"number": draft.number, "camera": draft.request.camera}
            read = partial(self._folder.latents, row, number, digest)
            draft.num_stored = number
            if draft.request.camera is not None and draft.report is not None:
                draft.report.pop(STORAGE_ERROR, None)
                self._remember(draft, latents, read)
            kept.stored(read)

    def _remember(
        self, draft: Draft, latents: Tensor, reload: Callable[[], Tensor] | None = None
    ) -> None:
        """Put a novel view into the memory."""
        if reload is None and draft.num_stored:
            reload = draft.windows[0].read_stored
        self._recall.add(draft.number, latents, reload, draft.request.camera)

    def _finished(self, draft: Draft) -> Turn:
        """A turn of which every window is finished."""
        assert draft.report is not None
        report, camera, new_frames = draft.report, draft.request.camera, None
        if camera is None:
            report = {**report, "windows": [kept.report for kept in draft.windows]}
            new_frames = [window.new_frames for window in self._windows]
        parts, source = self._parts, self._source
        footage = Footage(draft.windows, parts.vae.decode, parts.recent_frames, new_frames)
        return Turn(draft.number, camera, footage, source.fps, report, source.sound)
