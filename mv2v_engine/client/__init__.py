"""The service's HTTP API from Python, blocking or in an event loop, without torch.

    with Client("http://127.0.0.1:8000") as client:
        session = client.create_session("clip.mp4")
        turn = client.wait(client.submit(session, camera="arc:-40"), print)
        client.download(turn, "turn1.mp4")

Every method is written once, as a coroutine of `AsyncClient`; `Client` runs it to its end at once,
over a connection whose coroutines never wait.

Methods raise `ServiceError` with the service's code, and `UnreachableError` if no answer came. What
may be repeated is repeated: reading, deleting, cancelling, and what an Idempotency-Key protects.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import (
    AsyncGenerator,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from pathlib import Path
from typing import (
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    TypeVar,
    cast,
)

from mv2v_engine import __version__
from mv2v_engine.client.answers import (
    Event,
    Job,
    Model,
    ServiceError,
    Session,
    Stream,
    Turn,
    UnreachableError,
    read,
)
from mv2v_engine.client.connection import (
    Blocking,
    Connection,
    Video,
    Waiting,
    events_of,
    without_none,
)
from mv2v_engine.errors import MV2VError
from mv2v_engine.files import replacing

__all__ = [
    "AsyncClient",
    "Client",
    "Event",
    "Job",
    "Model",
    "Order",
    "ServiceError",
    "Session",
    "Stream",
    "Turn",
    "UnreachableError",
    "Video",
]

Given = ParamSpec("Given")
Result = TypeVar("Result")
Order = Literal["asc", "desc"]
# how a job ends, by the last of its events
_ENDS = frozenset({"finished", "failed", "cancelled"})
# the most that is waited for a result that is being written again
_PATIENCE = 60.0


class AsyncClient:
    """The service at an address, in an event loop.

    Args:
        url: such as http://127.0.0.1:8000.
        token: a bearer token, if the service has any.
        timeout: seconds without a byte after which a connection is given up.
    """

    _wires: type[Blocking | Waiting] = Waiting

    def __init__(
        self, url: str = "http://127.0.0.1:8000", *, token: str | None = None, timeout: float = 60.0
    ) -> None:
        headers = {"User-Agent": f"mv2v_engine/{__version__}"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        self._connection = Connection(self._wires(base_url=url, headers=headers, timeout=timeout))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._connection.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def model(self) -> Model:
        """The model that the service runs. Raises not_ready before it is loaded."""
        return read(Model, (await self._connection.json("GET", "/v1/models"))["data"][0])

    async def version(self) -> dict[str, Any]:
        """Versions of the service, torch and the native libraries; the model and its digest."""
        return cast("dict[str, Any]", await self._connection.json("GET", "/version"))

    async def create_session(
        self,
        video: Video,
        *,
        name: str | None = None,
        window: str | int | None = None,
        fps: float | None = None,
        alpha: Literal["black", "white", "refuse"] | None = None,
        fit: Literal["crop", "letterbox"] | None = None,
        size: str | None = None,
        references: Sequence[Video] = (),
        mask: Video | None = None,
        key: str | None = None,
    ) -> Session:
        """Begin a session with a video: a path, bytes, or a file that is open for reading bytes.

        Args:
            name: how people call it; the file's name, if not given.
            window, fps, alpha, fit, size: how the video is read; see docs/serving.md.
            references: images that the session's edits refer to, in order, for a model that takes
                any (`Model.guides`), as VACE and Bernini-R.
            mask: of edits by VACE, a video as large and as long, or one image: what is bright there
                is made anew.
            key: of idempotency; one is made if none is given.
        """
        name = Path(video).name if name is None and isinstance(video, str | Path) else name
        fields = without_none(name=name, window=window, fps=fps, alpha=alpha, fit=fit, size=size)
        data = {field: str(value) for field, value in fields.items()}
        key = key or secrets.token_hex(16)
        files = [("video", video), *(("reference", image) for image in references)]
        files += [] if mask is None else [("mask", mask)]
        return read(
            Session,
            await self._connection.json("POST", "/v1/sessions", data=data, files=files, key=key),
        )

    async def sessions(self, *, order: Order = "desc") -> AsyncGenerator[Session, None]:
        """All sessions by creation; "desc" is newest first."""
        async for item in self._connection.pages("/v1/sessions", order=order):
            yield read(Session, item)

    async def session(self, session: Session | str) -> Session:
        """A session as it is now, with its footprint."""
        return read(Session, await self._connection.json("GET", f"/v1/sessions/{_id(session)}"))

    async def delete_session(self, session: Session | str) -> None:
        """Remove a session and all its files; what runs or waits in it is cancelled."""
        await self._connection.json("DELETE", f"/v1/sessions/{_id(session)}")

    async def branch(self, session: Session | str, turn: int) -> Session:
        """A new session of the same video with turns 1 to `turn`; 0 for none."""
        path = f"/v1/sessions/{_id(session)}/branches"
        return read(Session, await self._connection.json("POST", path, json={"turn": turn}))

    async def submit(
        self,
        session: Session | str,
        *,
        camera: str | Mapping[str, Any] | None = None,
        prompt: str | None = None,
        seed: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        memory: str | None = None,
        previews: bool | None = None,
        key: str | None = None,
    ) -> Job:
        """Ask for a turn: a camera for a model of novel views, a prompt for one that edits.

        Args:
            camera: a preset, moves, a trajectory or camera files; see docs/cameras.md.
            previews: a small picture of every step among the events.
            key: of idempotency; one is made if none is given.
        """
        body = without_none(
            camera=camera,
            prompt=prompt,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            memory=memory,
            previews=previews,
        )
        path, key = f"/v1/sessions/{_id(session)}/turns", key or secrets.token_hex(16)
        return read(Job, await self._connection.json("POST", path, json=body, key=key))

    async def turns(self, session: Session | str) -> list[Turn]:
        """The finished turns of a session, in order."""
        found = await self._connection.json("GET", f"/v1/sessions/{_id(session)}/turns")
        return [read(Turn, item) for item in found["data"]]

    async def turn(self, session: Session | str, number: int) -> Turn:
        """A finished turn."""
        return read(
            Turn, await self._connection.json("GET", f"/v1/sessions/{_id(session)}/turns/{number}")
        )

    async def jobs(
        self, session: Session | str | None = None, *, order: Order = "desc"
    ) -> AsyncGenerator[Job, None]:
        """All jobs by creation, or those of one session."""
        of = None if session is None else _id(session)
        async for item in self._connection.pages("/v1/jobs", session=of, order=order):
            yield read(Job, item)

    async def job(self, job: Job | str) -> Job:
        """A job as it is now."""
        return read(Job, await self._connection.json("GET", f"/v1/jobs/{_id(job)}"))

    async def cancel(self, job: Job | str) -> Job:
        """End a job: at once if it waits, at its next step if it runs."""
        return read(Job, await self._connection.json("POST", f"/v1/jobs/{_id(job)}/cancel"))

    async def events(self, job: Job | str, *, after: int = 0) -> AsyncGenerator[Event, None]:
        """All events of a job behind number `after`, as they happen, to its end.

        A connection that is cut off is taken up behind the last event.
        """
        path, pauses = f"/v1/jobs/{_id(job)}/events", list(self._connection.pauses)
        while True:
            failure: MV2VError = UnreachableError("the service ended the events before the job's")
            try:
                headers = {"Last-Event-ID": str(after)}
                async with self._connection.answer("GET", path, headers=headers) as response:
                    async for event in events_of(self._connection.parts(response)):
                        after, pauses = event.number, list(self._connection.pauses)
                        yield event
                        if event.kind in _ENDS:
                            return
            except UnreachableError as error:
                failure = error
            if not pauses:
                raise failure
            await self._connection.sleep(pauses.pop(0))

    async def wait(self, job: Job | str, on_event: Callable[[Event], object] | None = None) -> Turn:
        """The finished turn of a job. on_event: called with every event of it.

        Raises:
            ServiceError: the job failed, with its code, or was cancelled.
        """
        async for event in self.events(job):
            if on_event is not None:
                on_event(event)
        ended = await self.job(job)
        if ended.state != "finished" or ended.number is None:
            error = ended.error or {"code": ended.state, "message": f"the turn was {ended.state}"}
            raise ServiceError(error["code"], error["message"])
        return await self.turn(ended.session, ended.number)

    async def _result(self, path: str) -> AsyncGenerator[bytes, None]:
        """A file in parts. One that the service writes again is waited for."""
        waited = 0.0
        while True:
            try:
                async with self._connection.answer("GET", path) as response:
                    async for part in self._connection.parts(response):
                        yield part
                    return
            except ServiceError as error:
                if error.code != "not_finished" or not error.retry_after or waited >= _PATIENCE:
                    raise
                await self._connection.sleep(error.retry_after)
                waited += error.retry_after

    async def _save(self, path: str, target: Path | str) -> Path:
        with replacing(Path(target)) as temporary, open(temporary, "wb") as file:
            async for part in self._result(path):
                file.write(part)
        return Path(target)

    async def download(
        self,
        turn: Turn,
        path: Path | str,
        *,
        which: Literal["video", "thumbnail"] = "video",
    ) -> Path:
        """Write a turn's mp4, or its picture, whole or not at all.

        Raises:
            StorageError: the place cannot be written.
        """
        return await self._save(_file_of(turn, which), path)

    async def content(self, turn: Turn, *, which: Literal["video", "thumbnail"] = "video") -> bytes:
        """A turn's mp4, or its picture."""
        return b"".join([part async for part in self._result(_file_of(turn, which))])

    async def export(self, session: Session | str, path: Path | str) -> Path:
        """Write a zip of a session's videos, thumbnails and reports."""
        return await self._save(f"/v1/sessions/{_id(session)}/export", path)

    async def begin_stream(
        self,
        prompt: str = "",
        *,
        seed: int | None = None,
        blocks: int | None = None,
        frames: int | None = None,
        policy: str | None = None,
        key: str | None = None,
    ) -> Stream:
        """Begin a stream of a causal model; without blocks or frames it has no end."""
        body = without_none(prompt=prompt, seed=seed, blocks=blocks, frames=frames, policy=policy)
        key = key or secrets.token_hex(16)
        return read(Stream, await self._connection.json("POST", "/v1/streams", json=body, key=key))

    async def stream(self, stream: Stream | str) -> Stream:
        """A stream as it is now."""
        return read(Stream, await self._connection.json("GET", f"/v1/streams/{_id(stream)}"))

    async def stream_prompt(self, stream: Stream | str, prompt: str) -> int:
        """Another prompt for a stream; the number of the first block that has it."""
        path = f"/v1/streams/{_id(stream)}/prompt"
        return int(
            (await self._connection.json("POST", path, json={"prompt": prompt}))["first_block"]
        )

    async def stream_video(
        self, stream: Stream | str, *, first: int | None = None, last: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """A stream's fragmented mp4 in parts, while it is made."""
        path, params = f"/v1/streams/{_id(stream)}/video", without_none(first=first, last=last)
        async with self._connection.answer("GET", path, params=params) as response:
            async for part in self._connection.parts(response):
                yield part

    async def cancel_stream(self, stream: Stream | str) -> Stream:
        """End a stream at its next step; its finished blocks stay."""
        return read(
            Stream, await self._connection.json("POST", f"/v1/streams/{_id(stream)}/cancel")
        )

    async def delete_stream(self, stream: Stream | str) -> None:
        """End a stream and remove all of it."""
        await self._connection.json("DELETE", f"/v1/streams/{_id(stream)}")


def _id(named: Session | Job | Stream | str) -> str:
    return named if isinstance(named, str) else named.id


def _file_of(turn: Turn, which: str) -> str:
    return f"/v1/sessions/{turn.session}/turns/{turn.number}/{which}"


def _run(work: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine that never waits."""
    try:
        work.send(None)
    except StopIteration as done:
        return cast(Result, done.value)
    work.close()
    raise AssertionError("a blocking connection has waited")


def _done(
    work: Callable[Concatenate[AsyncClient, Given], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate[Client, Given], Result]:
    """A method of `AsyncClient` as one of `Client`."""

    @functools.wraps(work)
    def called(on: Client, /, *given: Given.args, **named: Given.kwargs) -> Result:
        return _run(work(on._api, *given, **named))

    return called


def _each(
    work: Callable[Concatenate[AsyncClient, Given], AsyncGenerator[Result, None]],
) -> Callable[Concatenate[Client, Given], Iterator[Result]]:
    """The same for a method that gives one thing after another."""

    @functools.wraps(work)
    def called(on: Client, /, *given: Given.args, **named: Given.kwargs) -> Iterator[Result]:
        items = work(on._api, *given, **named)
        try:
            while True:
                try:
                    item = _run(items.__anext__())
                except StopAsyncIteration:
                    return
                yield item
        finally:
            _run(items.aclose())

    return called


class _Unlooped(AsyncClient):
    """An `AsyncClient` whose coroutines never wait."""

    _wires = Blocking


class Client:
    """`AsyncClient` without an event loop: every method returns when it is done."""

    def __init__(
        self, url: str = "http://127.0.0.1:8000", *, token: str | None = None, timeout: float = 60.0
    ) -> None:
        self._api = _Unlooped(url, token=token, timeout=timeout)

    close = _done(AsyncClient.aclose)
    model = _done(AsyncClient.model)
    version = _done(AsyncClient.version)
    create_session = _done(AsyncClient.create_session)
    sessions = _each(AsyncClient.sessions)
    session = _done(AsyncClient.session)
    delete_session = _done(AsyncClient.delete_session)
    branch = _done(AsyncClient.branch)
    submit = _done(AsyncClient.submit)
    turns = _done(AsyncClient.turns)
    turn = _done(AsyncClient.turn)
    jobs = _each(AsyncClient.jobs)
    job = _done(AsyncClient.job)
    cancel = _done(AsyncClient.cancel)
    events = _each(AsyncClient.events)
    wait = _done(AsyncClient.wait)
    download = _done(AsyncClient.download)
    content = _done(AsyncClient.content)
    export = _done(AsyncClient.export)
    begin_stream = _done(AsyncClient.begin_stream)
    stream = _done(AsyncClient.stream)
    stream_prompt = _done(AsyncClient.stream_prompt)
    stream_video = _each(AsyncClient.stream_video)
    cancel_stream = _done(AsyncClient.cancel_stream)
    delete_stream = _done(AsyncClient.delete_stream)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
