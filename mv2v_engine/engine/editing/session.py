"""A session of edits: one long video, instructions, each edit window by window (METHOD 11).

A window is finished once it is kept, in the session's folder or in memory; then it is decoded, if
anybody wants its frames while the edit runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mv2v_engine import arguments
from mv2v_engine.config import MemoryMode
from mv2v_engine.engine.editing.edit import Edit, KeptWindow
from mv2v_engine.engine.editing.memory import SegmentMemory
from mv2v_engine.engine.editing.report import edit_report
from mv2v_engine.engine.editing.request import EditRequest, engine_settings
from mv2v_engine.engine.editing.result import EditFootage, FinishedWindow
from mv2v_engine.engine.editing.source import LongSource
from mv2v_engine.engine.editing.store import EditStore
from mv2v_engine.engine.editing.window import edit_window
from mv2v_engine.engine.knowledge import prompt_warnings
from mv2v_engine.engine.session import Session
from mv2v_engine.engine.turn import Turn
from mv2v_engine.locks import WriterLock
from mv2v_engine.progress import (
    CancelToken,
    Event,
    Spans,
    WindowDone,
    WindowStarted,
    cancel_token,
    driven,
    staged,
)
from mv2v_engine.tokens.plan import TokenPlan
from mv2v_engine.video.io import VideoWriter, video_path, video_writer
from mv2v_engine.video.windows import EditWindow, edit_windows

if TYPE_CHECKING:
    from mv2v_engine.engine.engine import Engine


class EditSession(Session):
    """Made by `Engine.session` on a model that edits; not thread-safe, one turn at a time.

    With a folder, finished windows keep their latents there, and memory holds the cache's budget
    and one window; without one, every window's latents stay in memory.

    source: the video, streamed. cuts: first frames of its shots but the first. windows: what the
    model will see, in order.
    """

    def __init__(
        self,
        engine: Engine,
        source: LongSource,
        *,
        id: str,
        cuts: Sequence[int],
        store: EditStore | None,
        lock: WriterLock | None = None,
    ) -> None:
        super().__init__(engine, id, lock)
        self.source, self.cuts, self.store = source, tuple(cuts), store
        self.windows = edit_windows(source.num_frames, engine.sampling.num_frames, cuts=self.cuts)
        self._edits: list[Edit] = []
        self._turns: dict[int, Turn] = {}

    @property
    def turns(self) -> list[Turn]:
        """Finished edits in the order in which they were begun."""
        return [self._turns[number] for number in sorted(self._turns)]

    @property
    def unfinished(self) -> tuple[tuple[EditRequest, int], ...]:
        """Edits that were cut off, and how many of their windows are finished."""
        return tuple((edit.request, edit.num_done) for edit in self._edits if edit.report is None)

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
        """Edit the whole video by one instruction.

        Windows are finished one by one and never lost: after an error or a cancellation they wait
        in the session, in its folder if it has one, and the same request goes on behind them, to
        the same bits as an unbroken one. A request whose windows are all there gives its turn
        again. Another request is a turn of its own, with windows and a memory of its own.

        Args:
            memory: "retrieved" remembers this edit's own earlier windows, "none" forgets them.
                None takes the engine's default (see `EngineConfig`).
            on_window: given every window that this call finishes, decoded.
            out: an mp4 that is written as windows finish, and is there when the last one has.

        Raises:
            RequestError: the request does not fit the checkpoint.
            VideoError: a frame cannot be read, or changes its size.
            MemoryBudgetError: a window cannot fit the device, or the memory ended in the middle.
            NotFiniteError: the steps, the VAE or the text encoder gave numbers that are not
                finite; that window is dropped.
            StorageError: the folder does not take a window, or `out` cannot be written.
            CancelledError: the token was set.
        """
        events = self.edit_events(
            prompt,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            memory=memory,
            cancel=cancel,
            on_window=on_window,
            out=out,
        )
        return driven(events, on_progress)

    def edit_events(
        self,
        prompt: str,
        *,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        memory: MemoryMode | None = None,
        cancel: CancelToken | None = None,
        on_window: Callable[[FinishedWindow], None] | None = None,
        out: Path | str | None = None,
    ) -> Generator[Event, None, Turn]:
        """The edit as an iterator of progress events that returns the `Turn`."""
        request = EditRequest.of(
            prompt,
            self.engine.sampling,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            memory=self.engine.memory if memory is None else memory,
        )
        return self.perform(request, cancel, on_window=on_window, out=out)

    def perform(
        self,
        request: EditRequest,
        cancel: CancelToken | None = None,
        *,
        on_window: Callable[[FinishedWindow], None] | None = None,
        out: Path | str | None = None,
    ) -> Generator[Event, None, Turn]:
        """As `edit_events`, of a request that is already made."""
        self._require_open()
        arguments.instance("request", request, EditRequest, "an EditRequest")
        arguments.callback("on_window", on_window)
        if out is not None:
            out = video_path("out", out)
        engine = self.engine
        engine.check_text(request.prompt, request.guidance_scale)
        if engine.text is not None:
            engine.text.require_whole(request.prompt)
        return self._perform(request, cancel_token(cancel), on_window, out)

    def plans(self) -> list[TokenPlan]:
        """The plans that an edit with memory may run, for `Engine.warmup`."""
        memory = SegmentMemory(self.engine, self.id, self.engine.memory)
        shots = [window.shot for window in self.windows]
        return memory.plans(max(shots.count(shot) for shot in set(shots)) - 1)

    def _perform(
        self,
        request: EditRequest,
        cancel: CancelToken,
        on_window: Callable[[FinishedWindow], None] | None,
        out: Path | str | None,
    ) -> Generator[Event, None, Turn]:
        edit = self._take_up(request)
        memory = SegmentMemory(self.engine, f"{self.id}/{edit.number}", request.memory)
        decoding = Spans(self.engine.device)
        with ExitStack() as stack:
            stack.callback(self.source.close)
            stack.callback(memory.forget)
            self._store_missing(edit)
            writer = None
            if out is not None:
                writer = stack.enter_context(
                    video_writer(out, self.source.fps, sound=self.source.sound)
                )
                yield from self._write_finished(edit, writer, decoding, cancel)
            self._remember_finished(edit, memory)
            began, done_before = time.monotonic(), edit.num_done
            for window in self.windows[done_before:]:
                yield WindowStarted(window.number + 1, len(self.windows))
                kept = yield from edit_window(
                    self.engine, self.source, request, window, memory, cancel
                )
                self._keep(edit, window, memory, kept)
                if on_window is not None or writer is not None:
                    finished = yield from self._decoded(edit, window, decoding, cancel)
                    if writer is not None:
                        writer.add(finished.new_frames)
                    if on_window is not None:
                        on_window(finished)
                left = len(self.windows) - edit.num_done
                pace = (time.monotonic() - began) / (edit.num_done - done_before)
                yield WindowDone(window.number + 1, len(self.windows), pace * left)
            return self._finish(edit, decoding)

    def number_of(self, request: EditRequest) -> int:
        """The number of the turn that a request has begun, or would."""
        return self._take_up(request).number

    def _take_up(self, request: EditRequest) -> Edit:
        """The edit that a request has begun, or a new one."""
        settings = engine_settings(self.engine)
        for edit in self._edits:
            if edit.answers(request, settings):
                return edit
        number = max((edit.number for edit in self._edits), default=0) + 1
        return Edit(number, request, settings)

    def _keep(
        self, edit: Edit, window: EditWindow, memory: SegmentMemory, kept: KeptWindow
    ) -> None:
        """A window is finished: it is the session's, and the folder's if it takes it."""
        self._require_open()
        assert window.number == edit.num_done and kept.latents is not None
        latents = kept.latents
        edit.windows.append(kept)
        if edit not in self._edits:
            self._edits.append(edit)
        self._store_missing(edit)
        if memory.is_wanted(window, window):
            memory.add(window, latents, kept.descriptor, kept.read)

    def _store_missing(self, edit: Edit) -> None:
        if self.store is not None:
            edit.store_missing(self.store)

    def _remember_finished(self, edit: Edit, memory: SegmentMemory) -> None:
        """Take the windows that a broken edit has finished back into the cache."""
        if edit.num_done < len(self.windows):
            coming = self.windows[edit.num_done]
            for window, kept in zip(self.windows, edit.windows, strict=False):
                if memory.is_wanted(window, coming):
                    memory.add(window, kept.read(), kept.descriptor, kept.read)

    def _write_finished(
        self, edit: Edit, writer: VideoWriter, decoding: Spans, cancel: CancelToken
    ) -> Generator[Event, None, None]:
        """Decode the windows that a broken edit has finished once more."""
        for window in self.windows[: edit.num_done]:
            finished = yield from self._decoded(edit, window, decoding, cancel)
            writer.add(finished.new_frames)

    def _decoded(
        self, edit: Edit, window: EditWindow, decoding: Spans, cancel: CancelToken
    ) -> Generator[Event, None, FinishedWindow]:
        cancel.check()
        kept = edit.windows[window.number]
        latents = kept.read()
        frames = yield from staged(
            decoding, "vae", lambda: self.engine.vae.decode(latents, check=cancel.check)
        )
        return FinishedWindow(window, latents, frames, kept.report)

    def _finish(self, edit: Edit, decoding: Spans) -> Turn:
        """The edit as a turn, which it stays."""
        if edit.report is None:
            rows = [kept.report for kept in edit.windows]
            report = edit_report(
                self.engine,
                edit.request,
                {**self.source.describe(), "cuts": list(self.cuts)},
                self.engine.describer.describe(),
                self.windows,
                rows,
                number=edit.number,
                decoding=decoding,
            )
            report["warnings"] = list(self.warnings(edit.request.prompt))
            if self.store is not None:
                self.store.finish(edit, report)
            edit.report = report
        return self._turns.setdefault(edit.number, self._turn(edit, edit.report))

    def warnings(self, prompt: str) -> tuple[str, ...]:
        """What the weights do not know of the source and of an instruction, in words."""
        return (*self.source.warnings, *prompt_warnings(self.engine.checkpoint, prompt))

    def _turn(self, edit: Edit, report: dict[str, Any]) -> Turn:
        rows = [kept.report for kept in edit.windows]
        footage = EditFootage(self.windows, partial(_latents_of, edit), self.engine.vae.decode)
        whole = {**report, "windows": rows}
        return Turn(edit.number, None, footage, self.source.fps, whole, self.source.sound)

    def restore(self) -> None:
        """Take up the edits of the session's folder; their windows are read once, and checked.

        An edit with a window that is lost is unfinished from there on.

        Raises:
            StorageError: the manifest is damaged.
        """
        assert self.store is not None
        self._edits = list(self.store.edits())
        self.lost = tuple(edit.lost for edit in self._edits if edit.lost is not None)
        for edit in self._edits:
            if edit.report is not None:
                self._turns[edit.number] = self._turn(edit, edit.report)

    def close(self) -> None:
        """Let go of the source and the folder, which stays; an edit's memory ends with it."""
        self.source.close()
        super().close()


def _latents_of(edit: Edit, number: int) -> Tensor:
    return edit.windows[number].read()
