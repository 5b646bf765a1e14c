"""An engine and its open sessions, and how jobs are done with them: novel views step by step.

It knows no process, queue or database: a worker process drives it over a pipe, as a replica would.
Everything it writes into a session's folder is whole or absent, and a job that is done twice gives
the same turn once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch

from mv2v_engine import Engine
from mv2v_engine.camera.trajectories import PRESETS
from mv2v_engine.config import APPROXIMATE_ATTENTION
from mv2v_engine.engine.batch import TurnBatch, TurnEvent
from mv2v_engine.engine.guides import guides_of
from mv2v_engine.engine.request import Request
from mv2v_engine.engine.session import Session
from mv2v_engine.engine.stream import refused_policies
from mv2v_engine.engine.turn import Turn
from mv2v_engine.errors import (
    NO_PRIMITIVE,
    CancelledError,
    MV2VError,
    StorageError,
    is_out_of_memory,
)
from mv2v_engine.files import replacing
from mv2v_engine.progress import (
    CancelToken,
    Event,
    Preview,
    StageDone,
    StageStarted,
    StepDone,
    TurnNotStored,
    WindowDone,
    WindowStarted,
)
from mv2v_engine.serving.errors import failed, failure
from mv2v_engine.serving.store.folders import result_path, source_path, turn_bytes
from mv2v_engine.serving.store.records import PREVIEW
from mv2v_engine.serving.watch.listener import Caught
from mv2v_engine.serving.work.open_streams import OpenStreams
from mv2v_engine.serving.work.turn_request import make_request, pixels, session_window
from mv2v_engine.vae import weights_fingerprint
from mv2v_engine.video.display import data_url
from mv2v_engine.video.io import VideoReader

Json: TypeAlias = dict[str, Any]
# is given the events of a job, as they happen
Tell: TypeAlias = Callable[[Json], None]
log = logging.getLogger("mv2v_engine.serving.worker")

_NAMES: dict[type[Any], str] = {
    StageStarted: "stage_started",
    StepDone: "step_done",
    StageDone: "stage_done",
    WindowStarted: "window_started",
    WindowDone: "window_done",
}
_JPEG_QUALITY = 88
_PREVIEW_SIDE = 256


class Host:
    """Not thread-safe; one job of a session at a time.

    max_open: sessions kept in memory; the least recently used one is closed first, but none that
        a turn is made of.
    has_claims: every call comes while a `claims.Claim` holds the folder; if not, an open session
        keeps other writers out itself.
    capacity: jobs worth having under way at once; known after `warm_up`.
    max_streams: kept in memory, beside the sessions.
    """

    def __init__(
        self, engine: Engine, *, max_open: int, has_claims: bool = False, max_streams: int = 1
    ) -> None:
        self.engine, self.max_open, self.has_claims = engine, max_open, has_claims
        self._open: OrderedDict[str, Session] = OrderedDict()
        self.streams = OpenStreams(engine, max_streams)
        self._busy: set[str] = set()
        self._batch, self.capacity = TurnBatch(engine, failures=(Exception,)), 1
        self.about = _describe(engine)

    def warm_up(self) -> None:
        """Make a short turn of nothing, so that no request pays for what comes but once."""
        if self.about["kind"] == "streams":
            self.streams.warm_up()
            return
        sampling = self.engine.sampling
        frames = torch.zeros(
            (sampling.num_frames, *sampling.size, 3), dtype=torch.uint8, device="cpu"
        )
        session = self.engine.session(frames, cuts=() if self.engine.is_editor else None)
        steps = sampling.fewest_steps(2)
        try:
            if self.engine.is_editor:
                session.edit("-", num_inference_steps=steps)
                return
            turn = self._batch.add(session, session.request("static", num_inference_steps=steps))
            self._batch.run()
            if isinstance(turn.result, Exception):
                raise turn.result
            # turns that remember nothing; those that do not fit beside others wait for room
            self.capacity = max(1, min(self._batch.token_budget // turn.tokens, self.max_open))
        finally:
            session.close()

    def run(
        self, job: Json, session: Json, folder: Path, cancel: CancelToken, tell: Tell
    ) -> Iterator[None]:
        """Make a job's turn. Comes back wherever other jobs may go on, and before `tick` is due.

        job: "number" and "request". session: `protocol.session_fields`. folder: the session's.
        tell: is given the events that `backend` lists, the last one included.

        Whatever goes wrong fails the job, and others are made as if it had not been. A device
        that does no work any more is the exception: what it raises is raised here.
        """
        caught = Caught()
        self._busy.add(session["id"])
        try:
            with caught:
                yield from self._run(job, session, folder, cancel, tell)
        finally:
            self._busy.discard(session["id"])
        if caught.error is not None:
            tell(self._failure(caught.error, session["id"]))

    def tick(self) -> None:
        """Make the next step of the novel views under way: of all of them that have room."""
        budget = self._batch.token_budget
        self._batch.tick()
        if self._batch.token_budget < budget:
            left, why = self._batch.token_budget, self._batch.pack_failure
            log.warning("steps of several turns share at most %d tokens from now on: %s", left, why)

    def publish(self, session: Json, folder: Path, number: int) -> Json:
        """Write a finished turn's video and thumbnail again; `Backend.publish`'s answer."""
        caught = Caught()
        with caught:
            opened = self._session(session, folder)
            turn = next((turn for turn in opened.turns if turn.number == number), None)
            if turn is None:
                return failed("internal", f"the folder has no finished turn {number}")
            publish_turn(turn, folder)
        if caught.error is not None:
            return self._failure(caught.error, session["id"])
        return {"type": "published", "bytes": turn_bytes(folder, number)}

    def block(self, asked: Json, folder: Path, cancel: CancelToken, tell: Tell) -> Iterator[None]:
        """Make a block of a stream; comes back after every step, as `run`.

        asked: `protocol.stream_fields`. tell: is given `Backend.block`'s answer.
        """
        caught = Caught()
        with caught:
            tell((yield from self.streams.block(asked, folder, cancel)))
        if caught.error is not None:
            # what is in memory may be half of a step; the folder is not
            self.streams.release(asked["id"])
            tell(self._failure(caught.error, asked["id"]))

    def check(self, prompt: str) -> Json:
        """Whether a stream's prompt is read to its end; `Backend.check`'s answer."""
        caught = Caught()
        with caught:
            self.streams.check(prompt)
        return self._failure(caught.error, "") if caught.error else {"type": "checked"}

    def release(self, session_id: str) -> None:
        """Forget a session's memory, or a stream's; its folder stays."""
        self.streams.release(session_id)
        session = self._open.pop(session_id, None)
        if session is not None:
            session.close()

    def close(self) -> None:
        self.streams.close()
        for session_id in list(self._open):
            self.release(session_id)

    def _failure(self, error: Exception, session_id: str) -> Json:
        """What an error makes of a job; where one that nobody foresaw came from is logged.

        Raises:
            RuntimeError: the device does no work any more, and will not in this process.
        """
        if isinstance(error, CancelledError):
            return {"type": "cancelled"}
        if NO_PRIMITIVE in str(error):
            raise RuntimeError(f"this process cannot go on: {error}") from error
        if isinstance(error, MV2VError):
            return failure(error)
        self.release(session_id)
        if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
            return failed("out_of_memory", f"the memory ended: {error}")
        log.error("a turn failed", exc_info=error)
        # after some errors a GPU answers nothing to this process but the same error
        torch.ones(1, dtype=torch.float32, device=self.engine.device).sum().item()
        return failed(
            "internal",
            f"a fault of the service ({type(error).__name__}) ended the turn, its log says more; "
            "the session is as it was",
        )

    def _run(
        self, job: Json, session: Json, folder: Path, cancel: CancelToken, tell: Tell
    ) -> Generator[None, None, None]:
        request = make_request(job["request"], self.about, session.get("size"))
        cancel.check()
        opened, previews = self._session(session, folder, cancel), job["request"].get("previews")
        how: Json = {"cancel": cancel, "tell": tell, "previews": bool(previews)}
        if self.engine.is_editor:
            turn = yield from _edited(opened, request, folder, **how)
        else:
            turn = yield from self._rendered(opened, request, job["number"], **how)
        # from here on the turn is finished, whatever becomes of its files
        caught = Caught()
        with caught:
            publish_turn(turn, folder)
        if caught.error is not None:
            log.error("a finished turn has no video yet", exc_info=caught.error)
        done = {
            "type": "done",
            "number": turn.number,
            "report": turn.report,
            "bytes": turn_bytes(folder, turn.number),
            "published": caught.error is None,
            "reason": "" if caught.error is None else str(caught.error),
            "memory": self._memory(opened, request),
        }
        tell(done)

    def _rendered(
        self,
        opened: Session,
        request: Request,
        number: int,
        cancel: CancelToken,
        tell: Tell,
        previews: bool,
    ) -> Generator[None, None, Turn]:
        """The turn of a number: made, or as an earlier attempt left it."""
        tell({"type": "started", "number": number})
        done = len(opened.turns)
        if done >= number:
            turn = opened.turns[number - 1]
            difference = request.difference(turn.report, turn.trajectory)
            if difference:
                raise StorageError(
                    f"the session's folder has another turn {number}: {difference}; branch from "
                    f"turn {number - 1}"
                )
            return turn
        if done < number - 1:
            raise StorageError(
                f"the session's folder has {done} turns, and turn {number} is to be made; restore "
                "the folder"
            )

        def hear(happened: TurnEvent) -> None:
            _translate(happened.event, tell)

        under_way = self._batch.add(
            opened, request, cancel=cancel, on_progress=hear, previews=previews
        )
        while under_way.result is None:
            yield
        if isinstance(under_way.result, Exception):
            raise under_way.result
        try:
            opened.store_missing()
        except StorageError:
            # only this process has the turn: it never was
            self.release(opened.id)
            raise
        return under_way.result

    def _session(self, session: Json, folder: Path, cancel: CancelToken | None = None) -> Session:
        """A session, opened again from its folder if it is not in memory."""
        opened = self._open.pop(session["id"], None)
        if opened is None:
            resume = (folder / "session.json").exists()
            window = None
            if not self.engine.is_editor:
                wanted = self.engine.sampling.num_frames
                window = session_window(session["frames"], wanted, session["window"])
            opened = self.engine.session(
                source_path(folder),
                id=session["id"],
                fps=session.get("fps"),
                alpha=session.get("alpha"),
                fit=session.get("fit"),
                size=pixels(session.get("size")),
                references=[folder / name for name in session.get("references", ())],
                mask=folder / session["mask"] if session.get("mask") else None,
                store=folder,
                resume=resume,
                window=window,
                cancel=cancel,
                is_locked=self.has_claims,
                # its videos may still have to be written
                reads_any=True,
            )
        self._open[session["id"]] = opened
        idle = [name for name in self._open if name not in self._busy | {session["id"]}]
        for name in idle[: max(len(self._open) - self.max_open, 0)]:
            self.release(name)
        return opened

    def _memory(self, opened: Session, request: Request) -> Json:
        """What a session holds, and what a turn like the last one would be made of."""
        entries = self.engine.cache.entries()
        num_bytes = sum(
            entry.num_bytes for entry in entries if entry.id.startswith(f"{opened.id}/")
        )
        tokens = None
        if not self.engine.is_editor:
            # the turn is finished, though another one like it may have no room
            with suppress(MV2VError):
                tokens = opened.plan_turn(request)[1].lengths_by_kind
        return {"bytes": num_bytes, "next_turn_tokens": tokens}


def _edited(
    opened: Session,
    request: Request,
    folder: Path,
    cancel: CancelToken,
    tell: Tell,
    previews: bool,
) -> Generator[None, None, Turn]:
    """An edit, behind the windows that an earlier attempt has kept."""
    number = opened.number_of(request)
    tell({"type": "started", "number": number})
    video = result_path(folder, number, "video")
    out = None if video.exists() else video
    events = opened.events(request, cancel, out=out, previews=previews)
    while True:
        try:
            _translate(next(events), tell)
        except StopIteration as stop:
            turn: Turn = stop.value
            return turn
        yield


def publish_turn(turn: Turn, folder: Path) -> None:
    """Write a turn's video and thumbnail, those of the two that lack.

    Raises:
        StorageError: the place cannot be written, or the latents are lost.
    """
    video = result_path(folder, turn.number, "video")
    thumbnail = result_path(folder, turn.number, "thumbnail")
    if not video.exists():
        turn.save(video)
    if not thumbnail.exists():
        _save_thumbnail(video, thumbnail)


def _save_thumbnail(video: Path, path: Path) -> None:
    """The frame in the middle: the first ones of turns with moving cameras look alike."""
    from PIL import Image

    reader = VideoReader(video)
    frame = reader.read([reader.info.num_frames // 2])[0]
    with replacing(path) as temporary:
        Image.fromarray(frame.numpy()).save(temporary, "JPEG", quality=_JPEG_QUALITY)


def _translate(event: Event, tell: Tell) -> None:
    """Tell an engine's event as JSON."""
    if isinstance(event, Preview):
        # so few pixels have none of their colours to spare
        how: dict[str, Any] = {"quality": _JPEG_QUALITY, "subsampling": 0}
        image = data_url(event.picture, _PREVIEW_SIDE, "JPEG", **how)
        tell({"type": PREVIEW, "step": event.step, "total": event.total, "image": image})
    elif not isinstance(event, TurnNotStored):
        tell({"type": _NAMES[type(event)], **asdict(event)})


def _describe(engine: Engine) -> Json:
    """What `Backend.about` gives."""
    sampling, stream = dataclasses.asdict(engine.sampling), engine.checkpoint.stream
    # what makes other turns of the same weights
    others = engine.vae.key + (engine.vae.decoder_key or "")
    if engine.attention in APPROXIMATE_ATTENTION:
        others += engine.attention
    return {
        "kind": "streams" if stream else "edits" if engine.is_editor else "views",
        "stream": stream
        and {
            "settings": dataclasses.asdict(stream),
            "block_frames": stream.block_frames * engine.vae.temporal_stride,
            "lead": engine.vae.temporal_stride - 1,
            "has_source": engine.is_editor,
            "refused": refused_policies(engine, stream),
        },
        "engine": engine.describe(),
        "digest": weights_fingerprint(engine.transformer.state_dict(), others),
        "has_text": engine.text is not None,
        "guides": guides_of(engine.transformer.config),
        "source_alpha": engine.config.source_alpha,
        "source_fit": engine.config.source_fit,
        "memory": engine.memory_mode,
        "presets": list(PRESETS),
        "sampling": sampling | {"size": list(engine.sampling.size)},
    }
