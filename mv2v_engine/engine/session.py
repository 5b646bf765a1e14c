"""A session: one source, many turns that remember the ones before (METHOD 1).

What it can be asked for follows from the engine's model: novel views of the source, or edits of it
by instruction. A turn is a generator of progress events that goes through its windows; a novel view
has one, an edit as many as the video is long. A window is finished once it is kept, in the
session's folder or in memory.

The world frame of a session is the source's first camera: every pose, asked or remembered, is
relative to it (METHOD 5).

C latent channels, F H W latent grid.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mv2v_engine import arguments
from mv2v_engine.camera.files import Camera
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.config import MemoryMode
from mv2v_engine.engine.budget import overflow_error, overflow_reason
from mv2v_engine.engine.denoise import StepDue, denoise, stepwise
from mv2v_engine.engine.folder import SessionFolder
from mv2v_engine.engine.guides import Guides
from mv2v_engine.engine.kept_turns import KeptTurns
from mv2v_engine.engine.parts import Parts
from mv2v_engine.engine.recall import EditRecall, Ranked, Recall, ViewRecall
from mv2v_engine.engine.report import edit_report
from mv2v_engine.engine.request import Request, check_camera, prompt_warnings, require_task
from mv2v_engine.engine.source import LongSource, Source, source_trajectory
from mv2v_engine.engine.turn import Draft, FinishedWindow, Turn
from mv2v_engine.engine.window import Happening, Steps, WindowRunner, plan_of
from mv2v_engine.errors import NotFiniteError, RequestError, StorageError
from mv2v_engine.locks import WriterLock
from mv2v_engine.progress import (
    CancelToken,
    Event,
    Spans,
    TurnNotStored,
    WindowDone,
    WindowStarted,
    cancel_token,
    driven,
    staged,
)
from mv2v_engine.tokens.plan import TokenPlan
from mv2v_engine.video.display import MAX_TURNS, pictures_html
from mv2v_engine.video.io import video_path, video_writer
from mv2v_engine.video.windows import EditWindow, edit_windows


class Session:
    """Made by `Engine.session`; not thread-safe, one turn at a time.

    With a folder, latents lie there, and a session stays as small as its reports; without one, the
    latents of every turn stay in memory. One with a folder keeps every other writer out of it until
    it is closed or gone. Dropped or closed, it takes its entries in the engine's memory with it.

    source: what the model sees of the clip, or the video of an edit, which is streamed. cuts: the
    first frames of its shots but the first. windows: what the model will see, in order.
    """

    def __init__(
        self,
        parts: Parts,
        source: Source | LongSource,
        *,
        id: str,
        camera: CameraTrajectory | None = None,
        cuts: Sequence[int] = (),
        folder: SessionFolder | None = None,
        lock: WriterLock | None = None,
        source_latents: Tensor | None = None,
        guides: Guides | None = None,
    ) -> None:
        """Take an opened source.

        camera: the source's own path; None: it stands still. guides: of edits, references and mask.
        lock: the folder's; None if there is no folder, it can only be read, or the caller keeps
        others out.
        """
        self.parts, self.source, self.id, self.cuts = parts, source, id, tuple(cuts)
        self.folder, self._lock, self.guides = folder, lock, guides or Guides()
        self._runner = WindowRunner(parts, source, self.guides, source_latents)
        self.windows = edit_windows(source.num_frames, parts.sampling.num_frames, cuts=self.cuts)
        self._is_closed = False
        path = source_trajectory(camera, parts.sampling.num_frames, parts.sampling.size)
        check_camera(path, parts.transformer.config)
        self._recall = ViewRecall(parts, id, path)
        self._kept = KeptTurns(parts, self._recall, source, self.windows, folder)

    def __repr__(self) -> str:
        model, turns = self.parts.checkpoint.name, len(self.turns)
        return f"Session(id={self.id!r}, model={model!r}, turns={turns})"

    def _repr_html_(self) -> str:
        """The source and the newest turns in a notebook, a picture of each."""
        source, shown = self.source, list[tuple[Tensor, str]]()
        if isinstance(source, Source):
            shown.append((source.frames[source.num_frames // 2], "source"))
        for turn in self.turns[-MAX_TURNS:]:
            with suppress(StorageError):  # lost
                frames = next(turn.footage.parts())
                asked = turn.report.get("camera") or turn.report.get("prompt")
                shown.append((frames[len(frames) // 2], f"{turn.number}: {asked}"))
        return pictures_html(shown, repr(self))

    @property
    def turns(self) -> list[Turn]:
        """Finished turns in the order in which they were begun."""
        return self._kept.turns

    @property
    def unstored(self) -> tuple[Turn, ...]:
        """Finished turns that the session's folder has not taken yet."""
        return self._kept.unstored

    @property
    def unfinished(self) -> tuple[tuple[Request, int], ...]:
        """Edits that were cut off, and how many of their windows are finished."""
        return self._kept.unfinished

    @property
    def lost(self) -> tuple[str, ...]:
        """What of the folder could not be read when the session was resumed, in words."""
        return self._kept.lost

    def render(
        self,
        camera: Camera,
        *,
        prompt: str = "",
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        memory: MemoryMode | None = None,
        on_progress: Callable[[Event], None] | None = None,
        cancel: CancelToken | None = None,
        previews: bool = False,
    ) -> Turn:
        """Re-render the source from another camera, remembering this session's earlier turns.

        Args:
            camera: a preset ("pan_right"), moves ("arc:-40+tilt:5"), a camera file with its
                options ("transforms.json?relative"), a trajectory, or poses [T, 3, 4] or
                [T, 4, 4] as a tensor, an array or lists, seen through the default lens. Poses are
                relative to the source's first frame; files and poses that look as if they were
                not are refused, a trajectory is taken as it is.
            memory: "retrieved" by field-of-view overlap; "alone" the same and no source, once
                something is remembered; "previous" takes the last turn as the source; "none"
                forgets. None takes the engine's default (see `EngineConfig`).
            previews: a small picture of every step, as a `Preview` event.

        Raises:
            CameraError, RequestError: the request does not fit the checkpoint.
            MemoryBudgetError: it cannot fit the device, or the memory ended in the middle; the
                session is as it was.
            NotFiniteError: the steps, the VAE or the text encoder gave numbers that are not
                finite; the session is as it was.
            CancelledError: the token was set; the session is as it was.

        A turn that the session's folder does not take is returned and remembered all the same: it
        is in `unstored`, its report has a `storage_error`, a `TurnNotStored` event says so, and
        the end of the next turn, or `store_missing`, tries again.
        """
        self._require_task(edits=False)
        asked = (prompt, seed, num_inference_steps, guidance_scale, memory)
        return self.ask(self.request(camera, *asked), on_progress, cancel, previews=previews)

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
        previews: bool = False,
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
            previews: a small picture of every step, as a `Preview` event.

        Raises:
            RequestError: the request does not fit the checkpoint.
            VideoError: a frame cannot be read, or changes its size.
            MemoryBudgetError: a window cannot fit the device, or the memory ended in the middle.
            NotFiniteError: the steps, the VAE or the text encoder gave numbers that are not
                finite; that window is dropped.
            StorageError: the folder does not take a window, or `out` cannot be written.
            CancelledError: the token was set.
        """
        self._require_task(edits=True)
        asked = (prompt, seed, num_inference_steps, guidance_scale, memory)
        request = self.request(None, *asked)
        return self.ask(request, on_progress, cancel, on_window, out, previews=previews)

    def request(
        self,
        camera: Camera | None = None,
        prompt: str = "",
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        memory: MemoryMode | None = None,
    ) -> Request:
        """The request of a turn, for `ask` and `events`; as `render` and `edit` take it.

        camera: None for an edit.

        Raises:
            CameraError, RequestError: it does not fit the checkpoint.
        """
        parts = self.parts
        common: dict[str, Any] = {
            "prompt": prompt,
            "seed": seed,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "memory": parts.memory_mode if memory is None else memory,
        }
        if not parts.is_editor:
            # whoever gives none is told what a camera is
            return Request.view(camera, parts.sampling, **common)  # type: ignore[arg-type]
        if camera is not None:
            self._require_task(edits=False)
        return Request.edit(sampling=parts.sampling, **common)

    def ask(
        self,
        request: Request,
        on_progress: Callable[[Event], None] | None = None,
        cancel: CancelToken | None = None,
        on_window: Callable[[FinishedWindow], None] | None = None,
        out: Path | str | None = None,
        *,
        previews: bool = False,
    ) -> Turn:
        """Make a turn: see `render` and `edit`."""
        how: dict[str, Any] = {"on_window": on_window, "out": out, "previews": previews}
        return driven(self.events(request, cancel, **how), on_progress)

    def events(
        self,
        request: Request,
        cancel: CancelToken | None = None,
        *,
        on_window: Callable[[FinishedWindow], None] | None = None,
        out: Path | str | None = None,
        previews: bool = False,
    ) -> Generator[Event, None, Turn]:
        """The turn as an iterator of progress events that returns the `Turn`.

        previews: a picture of every step, as a `Preview` event.
        """
        self._check(request)
        arguments.callback("on_window", on_window)
        if out is not None:
            out = video_path("out", out)
        how: dict[str, Any] = {"on_window": on_window, "out": out, "previews": previews}
        return self._turn(request, cancel_token(cancel), denoise, **how)

    def hand_over(
        self,
        request: Request,
        cancel: CancelToken | None = None,
        ranked: Ranked | None = None,
        *,
        previews: bool = False,
    ) -> Generator[Event | StepDue, None, Turn]:
        """What `events` gives, with every step left to the caller: a `StepDue` says it is due.

        ranked: what `plan_turn` has given for this turn.
        """
        self._check(request)
        how: dict[str, Any] = {"ranked": ranked, "previews": previews}
        return self._turn(request, cancel_token(cancel), stepwise, **how)

    def plan_turn(self, request: Request) -> Ranked:
        """What a novel view would remember and the plan it would run, without running it."""
        arguments.instance("request", request, Request, "a Request")
        self._require_task(edits=request.camera is None)
        if request.camera is None:
            raise RequestError("what an edit remembers follows from its windows; see `plans`")
        return self._recall.rank(request, len(self.turns))

    def plans(self) -> list[TokenPlan]:
        """The plans that an edit with memory may run, for `Engine.warmup`."""
        memory = EditRecall(self.parts, self.id, self.parts.memory_mode, self._references)
        shots = [window.shot for window in self.windows]
        return memory.plans(max(shots.count(shot) for shot in set(shots)) - 1)

    @property
    def _references(self) -> tuple[tuple[int, int], ...]:
        """Latent (rows, columns) of the images that edits refer to."""
        return self.guides.sizes(self.parts.vae.spatial_stride)

    def warnings(self, prompt: str = "") -> tuple[str, ...]:
        """What the weights do not know of the source and of an edit's instruction, in words."""
        words = prompt_warnings(self.parts.checkpoint, prompt) if self.parts.is_editor else ()
        return (*self.source.warnings, *words)

    def number_of(self, request: Request) -> int:
        """The number of the turn that a request has begun, or would."""
        return self._kept.taken_up(request).number

    def adopt(self, turn: Turn) -> None:
        """Take a finished novel view of another session of the same source as the next turn.

        Its latents stay where they are, in memory or in the other session's folder. If this one's
        folder does not take it, it is in `unstored`.

        Raises:
            RequestError: it was another session's turn of another number, or this one is closed.
        """
        self._require_open()
        arguments.instance("turn", turn, Turn, "a turn of a session of novel views")
        self._require_task(edits=False)
        if turn.trajectory is None:
            raise RequestError(f"turn {turn.number} is an edit; a session of views adopts views")
        if turn.number != len(self.turns) + 1:
            raise RequestError(
                f"this session's next turn is number {len(self.turns) + 1}, got a turn that was "
                f"number {turn.number}; adopt turns in their order"
            )
        request = Request.of_report(turn.report, turn.camera)
        windows = list(turn.footage.windows)
        self._kept.keep_view(Draft(turn.number, request, {}, windows, turn.report), turn)

    def store_missing(self) -> None:
        """Try again to store what the session's folder has not taken, in order.

        Raises:
            RequestError: the session is closed.
            StorageError: it does not take the first of them; the later ones were not tried.
        """
        self._require_open()
        self._kept.store()

    def other_settings(self) -> str | None:
        """Why no turn goes on behind those that there are, in words; None if one may.

        Views that were made by other steps or numbers remember each other badly. An edit remembers
        itself alone, and under other settings is another edit; by other steps it is refused, too.
        """
        return self._kept.other_settings()

    def restore(self) -> None:
        """Take up the turns of the session's folder; of their latents as many as memory holds.

        An edit with a window that is lost is unfinished from there on; a novel view whose file is
        lost keeps its place and its report, and is not remembered.

        Raises:
            RequestError: there is no folder.
            StorageError: its manifest cannot be read, or is of the other task.
        """
        self._kept.restore()

    def close(self) -> None:
        """Forget this session's memory, and let others write into its folder, which stays."""
        self._is_closed = True
        self._recall.forget()
        self.source.close()
        self.guides.close()
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

    def _require_task(self, *, edits: bool) -> None:
        require_task(self.parts.transformer.config, self.parts.checkpoint.name, edits=edits)

    def _check(self, request: Request) -> None:
        """Refuse what this session cannot be asked for."""
        self._require_open()
        arguments.instance("request", request, Request, "a Request")
        parts, camera = self.parts, request.camera
        problem = self.other_settings()
        if problem is not None:
            raise RequestError(problem)
        self._require_task(edits=camera is None)
        parts.check_text(request.prompt, request.guidance_scale)
        if camera is not None:
            check_camera(camera, parts.transformer.config)
        elif parts.text is not None:
            has_references = bool(self.guides.images)
            words = parts.whole_prompt(request.prompt, has_references=has_references)
            parts.text.require_whole(words)

    def _turn(
        self,
        request: Request,
        cancel: CancelToken,
        steps: Steps[Happening],
        *,
        on_window: Callable[[FinishedWindow], None] | None = None,
        out: Path | str | None = None,
        ranked: Ranked | None = None,
        previews: bool = False,
    ) -> Generator[Event | Happening, None, Turn]:
        """All windows of a turn."""
        parts, draft, total = self.parts, self._kept.taken_up(request), len(self.windows)
        decoding = Spans(parts.device)
        with ExitStack() as stack:
            memory = stack.enter_context(self._remembering(draft))
            writer = None
            if out is not None:
                sound = self.source.sound
                writer = stack.enter_context(video_writer(out, self.source.fps, sound=sound))
                for window in self.windows[: draft.num_done]:
                    # an edit that goes on: these are decoded once more
                    again = yield from self._decoded(draft, window, decoding, cancel)
                    writer.add(again.new_frames)
            began, done_before = time.monotonic(), draft.num_done
            for window in self.windows[done_before:]:
                if parts.is_editor:
                    yield WindowStarted(window.number + 1, total)
                spans, reason = Spans(parts.device), ""
                try:
                    made = yield from self._runner.run(
                        draft,
                        window,
                        memory,
                        self.turns,
                        spans,
                        cancel,
                        steps,
                        ranked=ranked,
                        previews=previews,
                    )
                except NotFiniteError as error:
                    error.args = (f"{error}; {self._outcome(draft, window)}",)
                    raise
                except (MemoryError, RuntimeError) as error:
                    reason = overflow_reason(error)
                if reason:
                    # with the error gone, no traceback holds the turn's tensors any more
                    plan = plan_of(memory, request, window, len(self.turns))
                    outcome = self._outcome(draft, window)
                    raise overflow_error(parts, spans, plan, reason, outcome)
                kept, frames = made
                self._require_open()
                if frames is not None:
                    turn = self._kept.view(draft, kept, frames)
                    failure = self._kept.keep_view(draft, turn)
                    if failure is not None:
                        yield TurnNotStored(turn.number, str(failure))
                    return turn
                assert isinstance(memory, EditRecall) and kept.latents is not None
                latents = kept.latents
                self._kept.keep_window(draft, window, kept)
                if memory.is_wanted(window, window):
                    memory.keep(window, kept, latents)
                if on_window is not None or writer is not None:
                    finished = yield from self._decoded(draft, window, decoding, cancel)
                    if writer is not None:
                        writer.add(finished.new_frames)
                    if on_window is not None:
                        on_window(finished)
                pace = (time.monotonic() - began) / (draft.num_done - done_before)
                yield WindowDone(window.number + 1, total, pace * (total - draft.num_done))
            return self._edited(draft, decoding)

    def _outcome(self, draft: Draft, window: EditWindow) -> str:
        """What becomes of a turn whose window fails."""
        if self.parts.is_editor:
            return f"window {window.number + 1} is dropped, finished ones are kept"
        return f"turn {draft.number} is dropped, earlier ones are kept"

    @contextmanager
    def _remembering(self, draft: Draft) -> Iterator[Recall]:
        """The memory of a turn under way.

        The cache spares the entries of a session of views, the coming one included. Those of an
        edit are its own: windows that it has finished before are taken back, and go with it.
        """
        if not self.parts.is_editor:
            numbers = range(1, draft.number + 1)
            with self.parts.cache.pinned(self._recall.entry_id(number) for number in numbers):
                yield self._recall
            return
        name, mode = f"{self.id}/{draft.number}", draft.request.memory
        memory = EditRecall(self.parts, name, mode, self._references)
        try:
            self.store_missing()
            for window, kept in zip(self.windows, draft.windows, strict=False):
                is_coming = draft.num_done < len(self.windows)
                if is_coming and memory.is_wanted(window, self.windows[draft.num_done]):
                    memory.keep(window, kept, kept.read())
            yield memory
        finally:
            memory.forget()
            self.source.close()
            self.guides.close()

    def _decoded(
        self, draft: Draft, window: EditWindow, decoding: Spans, cancel: CancelToken
    ) -> Generator[Event, None, FinishedWindow]:
        """A finished window of an edit, decoded."""
        cancel.check()
        kept = draft.windows[window.number]
        latents = kept.read()
        decode = partial(self.parts.vae.decode, latents, check=cancel.check)
        frames = yield from staged(decoding, "vae", decode)
        return FinishedWindow(window, latents, frames, kept.report)

    def _edited(self, draft: Draft, decoding: Spans) -> Turn:
        """A finished edit as a turn, which it stays."""
        if draft.report is None:
            source = {**self.source.describe(), "cuts": list(self.cuts), **self.guides.describe()}
            report = edit_report(
                self.parts,
                draft.request,
                source,
                self.windows,
                [kept.report for kept in draft.windows],
                number=draft.number,
                decoding=decoding,
            )
            report["warnings"] = list(self.warnings(draft.request.prompt))
            self._kept.finish(draft, report)
        return self._kept.turn(draft)
