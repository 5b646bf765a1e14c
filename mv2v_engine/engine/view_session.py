"""A session of novel views: one source, many cameras, each turn remembering the ones before.

A turn is a generator of progress events; `render` drives it. The world frame of a session is
the source's first camera: every pose, asked or remembered, is relative to it (METHOD 5).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from mv2v_engine.arguments import instance
from mv2v_engine.camera.files import Camera
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.config import MemoryMode
from mv2v_engine.engine.buffers import Conditioning
from mv2v_engine.engine.denoisers import engine_denoiser
from mv2v_engine.engine.footage import Footage
from mv2v_engine.engine.keeper import LOST, Keeper
from mv2v_engine.engine.overflow import guarded
from mv2v_engine.engine.prompts import guidance_texts
from mv2v_engine.engine.recall import Recall
from mv2v_engine.engine.report import Prepared, turn_report
from mv2v_engine.engine.request import TurnRequest, check_camera
from mv2v_engine.engine.runner import Denoised, Denoiser, StepDue, denoise, stepwise
from mv2v_engine.engine.session import Session
from mv2v_engine.engine.source import Source, source_trajectory
from mv2v_engine.engine.store import SessionStore, StoredTurn
from mv2v_engine.engine.turn import ViewTurn
from mv2v_engine.errors import RequestError
from mv2v_engine.locks import WriterLock
from mv2v_engine.memory.retrieval import Retrieval
from mv2v_engine.progress import (
    CancelToken,
    Event,
    Spans,
    TurnNotStored,
    cancel_token,
    driven,
    staged,
)
from mv2v_engine.sampling.flow_match import initial_noise
from mv2v_engine.tokens.plan import TokenPlan

if TYPE_CHECKING:
    from mv2v_engine.engine.engine import Engine

Happening = TypeVar("Happening", bound="Event | StepDue")
Steps = Callable[[Denoiser, CancelToken], Generator[Happening, None, Denoised]]


class ViewSession(Session):
    """Made by `Engine.session` on a model with cameras; not thread-safe, one turn at a time.

    With a folder, a session's turns keep their latents there and a session stays as small as its
    reports; without one, every turn's latents stay in memory. Dropped or closed, it takes its
    entries in the engine's memory with it.

    source: what the model sees of the clip.
    """

    def __init__(
        self,
        engine: Engine,
        source: Source,
        *,
        id: str,
        cameras: CameraTrajectory | None,
        store: SessionStore | None,
        lock: WriterLock | None = None,
        source_latents: Tensor | None = None,
    ) -> None:
        super().__init__(engine, id, lock)
        self.source = source
        self._source_latents = source_latents
        camera = source_trajectory(cameras, engine.sampling.num_frames, engine.sampling.size)
        check_camera(camera, engine.transformer.config)
        self._recall = Recall(engine, id, camera)
        self._keeper = Keeper(engine, self._recall, store)
        # one that is dropped without `close`, wherever its last reference goes
        weakref.finalize(self, engine.cache.abandon, self._recall.owner).atexit = False

    @property
    def turns(self) -> list[ViewTurn]:
        """Finished turns in order."""
        return self._keeper.turns

    @property
    def unstored(self) -> tuple[ViewTurn, ...]:
        """Finished turns that the session's folder has not taken yet."""
        return tuple(self._keeper.unstored)

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
    ) -> ViewTurn:
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
        events = self.events(
            camera,
            prompt=prompt,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            memory=memory,
            cancel=cancel,
        )
        return driven(events, on_progress)

    def answer(
        self, request: TurnRequest, on_progress: Callable[[Event], None] | None = None
    ) -> ViewTurn:
        """As `render`, of a request that is already made."""
        return driven(self.perform(request), on_progress)

    def events(
        self,
        camera: Camera,
        *,
        prompt: str = "",
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        memory: MemoryMode | None = None,
        cancel: CancelToken | None = None,
    ) -> Generator[Event, None, ViewTurn]:
        """The turn as an iterator of progress events that returns the `Turn`."""
        request = TurnRequest.of(
            camera,
            self.engine.sampling,
            prompt=prompt,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            memory=self.engine.memory if memory is None else memory,
        )
        return self.perform(request, cancel)

    def perform(
        self, request: TurnRequest, cancel: CancelToken | None = None
    ) -> Generator[Event, None, ViewTurn]:
        """As `events`, of a request that is already made."""
        return self._begin(request, cancel_token(cancel), denoise)

    def hand_over(
        self, request: TurnRequest, cancel: CancelToken | None = None
    ) -> Generator[Event | StepDue, None, ViewTurn]:
        """As `perform`, with every step left to the caller: it is due where a `StepDue` comes."""
        return self._begin(request, cancel_token(cancel), stepwise)

    def plan_turn(self, request: TurnRequest) -> tuple[Retrieval, TokenPlan]:
        """What a turn would remember and the plan it would run, without running it."""
        instance("request", request, TurnRequest, "a TurnRequest")
        retrieval = self._recall.rank(request, len(self.turns))
        return retrieval, self._recall.plan(request, retrieval)

    def _pinning(
        self, turn: Generator[Happening, None, ViewTurn]
    ) -> Generator[Happening, None, ViewTurn]:
        """Run a turn while the cache spares this session's entries, the coming one included."""
        numbers = range(1, len(self.turns) + 2)
        with self.engine.cache.pinned(self._recall.entry_id(number) for number in numbers):
            return (yield from turn)

    def _begin(
        self, request: TurnRequest, cancel: CancelToken, steps: Steps[Happening]
    ) -> Generator[Event | Happening, None, ViewTurn]:
        self._require_open()
        instance("request", request, TurnRequest, "a TurnRequest")
        self.engine.check_text(request.prompt, request.guidance_scale)
        check_camera(request.camera, self.engine.transformer.config)
        return self._pinning(self._turn(request, cancel, steps))

    def _turn(
        self, request: TurnRequest, cancel: CancelToken, steps: Steps[Happening]
    ) -> Generator[Event | Happening, None, ViewTurn]:
        spans = Spans(self.engine.device)
        stages = self._stages(request, cancel, spans, steps)
        return (
            yield from guarded(
                self.engine,
                stages,
                spans,
                lambda: self.plan_turn(request)[1],
                outcome=f"turn {len(self.turns) + 1} is dropped, earlier ones are kept",
            )
        )

    def _stages(
        self,
        request: TurnRequest,
        cancel: CancelToken,
        spans: Spans,
        steps: Steps[Happening],
    ) -> Generator[Event | Happening, None, ViewTurn]:
        prepared = yield from self.prepare(request, cancel, spans)
        with spans.stage("sampling") as started:
            yield started
            denoised = yield from steps(prepared.denoiser, cancel)
        yield spans.done("sampling")
        return (yield from self.finish(prepared, denoised, spans))

    def prepare(
        self, request: TurnRequest, cancel: CancelToken, spans: Spans
    ) -> Generator[Event, None, Prepared]:
        """The part of a turn before its first step.

        Raises:
            MemoryBudgetError: the turn cannot fit the device; nothing has run.
        """
        engine = self.engine
        cancel.check()
        if engine.budget.limit() is not None:
            engine.budget.check(self.plan_turn(request)[1])
        source = self._source_latents
        if source is None:
            frames = self.source.frames
            source = yield from staged(
                spans, "vae", lambda: engine.vae.encode(frames, check=cancel.check)
            )
            self._source_latents = source
            cancel.check()
        asked = (request.prompt, request.guidance_scale)
        texts = yield from staged(spans, "text", lambda: guidance_texts(engine, *asked))
        cancel.check()
        retrieval, plan, videos, cameras = yield from staged(
            spans, "memory", lambda: self._recall.condition(request, source, self.turns)
        )
        denoiser = engine_denoiser(
            engine,
            plan,
            Conditioning(videos, cameras, *texts),
            initial_noise((1, *source.shape), request.seed),
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
        )
        return Prepared(request, retrieval, denoiser, cancel)

    def finish(
        self, prepared: Prepared, denoised: Denoised, spans: Spans
    ) -> Generator[Event, None, ViewTurn]:
        """The part of a turn after its last step: decode, store, remember."""
        engine, number = self.engine, len(self.turns) + 1
        latents = denoised.latents.cpu()
        cancel = prepared.cancel
        frames = yield from staged(
            spans, "vae", lambda: engine.vae.decode(latents, check=cancel.check)
        )
        cancel.check()
        report = turn_report(engine, prepared, denoised, spans, number=number)
        report["warnings"] = list(self.source.warnings)
        footage = Footage(latents, engine.vae.decode, engine.recent_frames)
        footage.decoded(frames)
        self._require_open()
        turn = ViewTurn(number, prepared.request.camera, footage, self.source.fps, report)
        failure = self._keeper.keep(turn)
        if failure is not None:
            yield TurnNotStored(number, str(failure))
        return turn

    def adopt(self, turn: ViewTurn) -> None:
        """Take a finished turn of another session of the same source as this one's next turn.

        Its latents stay where they are, in memory or in the other session's folder. If this one's
        folder does not take it, it is in `unstored`.

        Raises:
            RequestError: it was another session's turn of another number, or this one is closed.
        """
        self._require_open()
        instance("turn", turn, ViewTurn, "a turn of a session of novel views")
        if turn.number != len(self.turns) + 1:
            raise RequestError(
                f"this session's next turn is number {len(self.turns) + 1}, got a turn that was "
                f"number {turn.number}; adopt turns in their order"
            )
        self._keeper.keep(turn)

    def store_missing(self) -> None:
        """Try again to store what the session's folder has not taken, in order.

        Raises:
            RequestError: the session is closed.
            StorageError: it does not take the first of them.
        """
        self._require_open()
        self._keeper.store_missing()

    def restore(self) -> None:
        """Take up the turns of the session's folder; of their latents as many as memory holds.

        Raises:
            RequestError: there is no folder.
            StorageError: its manifest cannot be read.
        """
        self._keeper.restore(self._restored)
        self.lost = tuple(turn.report[LOST] for turn in self.turns if LOST in turn.report)

    def _restored(self, stored: StoredTurn, read: Callable[[], Tensor]) -> ViewTurn:
        engine = self.engine
        footage = Footage(None, engine.vae.decode, engine.recent_frames, read)
        return ViewTurn(stored.number, stored.trajectory, footage, self.source.fps, stored.report)

    def close(self) -> None:
        """As `Session.close`."""
        self.engine.cache.forget(self._recall.owner)
        super().close()
