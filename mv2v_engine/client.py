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

import asyncio
import dataclasses
import functools
import json
import secrets
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Any,
    BinaryIO,
    Concatenate,
    Literal,
    ParamSpec,
    TypeGuard,
    TypeVar,
    cast,
)

try:
    import httpx
except ImportError as error:
    raise ImportError("the client needs httpx; pip install 'mv2v_engine[client]'") from error

from mv2v_engine import __version__
from mv2v_engine.errors import MV2VError
from mv2v_engine.files import replacing

Given = ParamSpec("Given")
Result = TypeVar("Result")
Video = Path | str | bytes | BinaryIO
Order = Literal["asc", "desc"]
# how a job ends, by the last of its events
_ENDS = frozenset({"finished", "failed", "cancelled"})
# seconds before a request that got no answer is sent again
_PAUSES = (0.2, 1.0, 3.0)
# the most that is waited for a result that is being written again
_PATIENCE = 60.0


class ServiceError(MV2VError):
    """The service refused a request, or a job has failed.

    code: one of the service's codes. status: of the HTTP answer, None of a job. param: the field of
    the request that is at fault. retry_after: seconds after which the service may be asked again.
    request_id: by which the service's log tells of the request.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: int | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.status, self.param = code, message, status, param
        self.retry_after, self.request_id = retry_after, request_id


class UnreachableError(MV2VError):
    """No answer came from the service."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """A source video and its turns; times are unix seconds, sizes pixels and bytes.

    footprint: what the session takes, where one session was asked for.
    """

    id: str
    kind: str
    name: str
    checkpoint: str
    frames: int
    width: int
    height: int
    fps: float
    created: float
    touched: float
    bytes: int
    num_turns: int
    parent: str | None
    parent_turn: int | None
    warnings: list[str]
    damage: str | None
    num_references: int = 0
    has_mask: bool = False
    footprint: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A finished turn. report: what was remembered, tokens, seconds and bytes."""

    session: str
    number: int
    job: str | None
    request: dict[str, Any]
    report: dict[str, Any]
    created: float
    bytes: int
    warnings: list[str]
    damage: str | None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A turn that was asked for. number: the turn's. progress: the last event's data."""

    id: str
    session: str
    state: Literal["queued", "running", "finished", "failed", "cancelled"]
    request: dict[str, Any]
    number: int | None
    created: float
    started: float | None
    ended: float | None
    attempts: int
    error: dict[str, str] | None
    progress: dict[str, Any] | None
    position: int | None
    is_cancelling: bool
    warnings: list[str]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A stream. blocks: finished ones; num_blocks: after which it ends, None if it goes on."""

    id: str
    checkpoint: str
    state: str
    waits_for: str | None
    prompt: str
    seed: int
    num_blocks: int | None
    blocks: int
    frames: int
    seconds: float
    fps: float
    width: int
    height: int
    error: dict[str, str] | None
    latency: dict[str, float] | None


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the service runs. sampling: the defaults of a turn. limits: of an upload.

    guides: whether edits take "references", and a "mask".
    """

    id: str
    kind: str
    has_text: bool
    memory: str
    presets: list[str]
    sampling: dict[str, Any]
    limits: dict[str, Any]
    guides: dict[str, bool] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """What has happened to a job. number: increases. data: as docs/serving.md lists it by kind."""

    number: int
    kind: str
    data: dict[str, Any]


Answer = TypeVar("Answer", Session, Turn, Job, Stream, Model)


def _read(kind: type[Answer], body: Mapping[str, Any]) -> Answer:
    """What an answer holds; fields of a newer service are left out."""
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in body.items() if name in known})


def _set(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


class _Blocking:
    """None of its coroutines waits: `_run` takes each in one go."""

    def __init__(self, **settings: Any) -> None:
        self._http = httpx.Client(**settings)
        self.build_request = self._http.build_request

    async def send(self, request: httpx.Request) -> httpx.Response:
        return self._http.send(request, stream=True)

    async def parts(self, response: httpx.Response) -> AsyncIterator[bytes]:
        for part in response.iter_bytes():
            yield part

    async def end(self, response: httpx.Response) -> None:
        response.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def close(self) -> None:
        self._http.close()


class _Waiting:
    def __init__(self, **settings: Any) -> None:
        self._http = httpx.AsyncClient(**settings)
        self.build_request = self._http.build_request

    async def send(self, request: httpx.Request) -> httpx.Response:
        return await self._http.send(request, stream=True)

    def parts(self, response: httpx.Response) -> AsyncIterator[bytes]:
        return response.aiter_bytes()

    async def end(self, response: httpx.Response) -> None:
        await response.aclose()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        await self._http.aclose()


class AsyncClient:
    """The service at an address, in an event loop.

    Args:
        url: such as http://127.0.0.1:8000.
        token: a bearer token, if the service has any.
        timeout: seconds without a byte after which a connection is given up.
    """

    _wires: type[_Blocking | _Waiting] = _Waiting

    def __init__(
        self, url: str = "http://127.0.0.1:8000", *, token: str | None = None, timeout: float = 60.0
    ) -> None:
        headers = {"User-Agent": f"mv2v_engine/{__version__}"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        self._wire = self._wires(base_url=url, headers=headers, timeout=timeout)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._wire.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    @asynccontextmanager
    async def _answer(
        self,
        method: str,
        path: str,
        *,
        key: str | None = None,
        files: Sequence[tuple[str, Video]] = (),
        headers: Mapping[str, str] | None = None,
        **how: Any,
    ) -> AsyncIterator[httpx.Response]:
        """An answer of success, whose body is still to be read."""
        headers = dict(headers or {})
        if key is not None:
            headers["Idempotency-Key"] = key
        is_repeatable = method != "POST" or key is not None or path.endswith("/cancel")
        streams = [given for _, given in files if _is_file(given)]
        starts = [(file, file.tell()) for file in streams if file.seekable()]
        can_rewind = len(starts) == len(streams)
        for pause in (*(_PAUSES if is_repeatable else ()), None):
            opened: list[BinaryIO] = []
            try:
                for file, start in starts:
                    file.seek(start)
                if files:
                    how["files"] = []
                for field, given in files:
                    name, content = _content(given)
                    if content is not given and _is_file(content):
                        opened.append(content)
                    how["files"].append((field, (name, content)))
                request = self._wire.build_request(method, path, headers=headers, **how)
                response = await self._wire.send(request)
            except httpx.TransportError as error:
                if pause is None or not can_rewind:
                    raise _unreachable(error) from error
                await self._wire.sleep(pause)
                continue
            finally:
                for file in opened:
                    file.close()
            break
        try:
            if not response.is_success:
                raise _refusal(response, await self._body(response))
            yield response
        except httpx.TransportError as error:
            raise _unreachable(error) from error
        finally:
            await self._wire.end(response)

    async def _body(self, response: httpx.Response) -> bytes:
        return b"".join([part async for part in self._wire.parts(response)])

    async def _json(self, method: str, path: str, **how: Any) -> Any:
        async with self._answer(method, path, **how) as response:
            body = await self._body(response)
        return json.loads(body) if body else None

    async def _pages(self, path: str, **params: Any) -> AsyncGenerator[Any, None]:
        """The items of a list, page after page."""
        while True:
            page = await self._json("GET", path, params=_set(limit=100, **params))
            for item in page["data"]:
                yield item
            if not page["has_more"]:
                return
            params["after"] = page["last_id"]

    async def model(self) -> Model:
        """The model that the service runs. Raises not_ready before it is loaded."""
        return _read(Model, (await self._json("GET", "/v1/models"))["data"][0])

    async def version(self) -> dict[str, Any]:
        """Versions of the service, torch and the native libraries; the model and its digest."""
        return cast("dict[str, Any]", await self._json("GET", "/version"))

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
        fields = _set(name=name, window=window, fps=fps, alpha=alpha, fit=fit, size=size)
        data = {field: str(value) for field, value in fields.items()}
        key = key or secrets.token_hex(16)
        files = [("video", video), *(("reference", image) for image in references)]
        files += [] if mask is None else [("mask", mask)]
        return _read(
            Session, await self._json("POST", "/v1/sessions", data=data, files=files, key=key)
        )

    async def sessions(self, *, order: Order = "desc") -> AsyncGenerator[Session, None]:
        """All sessions by creation; "desc" is newest first."""
        async for item in self._pages("/v1/sessions", order=order):
            yield _read(Session, item)

    async def session(self, session: Session | str) -> Session:
        """A session as it is now, with its footprint."""
        return _read(Session, await self._json("GET", f"/v1/sessions/{_id(session)}"))

    async def delete_session(self, session: Session | str) -> None:
        """Remove a session and all its files; what runs or waits in it is cancelled."""
        await self._json("DELETE", f"/v1/sessions/{_id(session)}")

    async def branch(self, session: Session | str, turn: int) -> Session:
        """A new session of the same video with turns 1 to `turn`; 0 for none."""
        path = f"/v1/sessions/{_id(session)}/branches"
        return _read(Session, await self._json("POST", path, json={"turn": turn}))

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
        body = _set(
            camera=camera,
            prompt=prompt,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            memory=memory,
            previews=previews,
        )
        path, key = f"/v1/sessions/{_id(session)}/turns", key or secrets.token_hex(16)
        return _read(Job, await self._json("POST", path, json=body, key=key))

    async def turns(self, session: Session | str) -> list[Turn]:
        """The finished turns of a session, in order."""
        found = await self._json("GET", f"/v1/sessions/{_id(session)}/turns")
        return [_read(Turn, item) for item in found["data"]]

    async def turn(self, session: Session | str, number: int) -> Turn:
        """A finished turn."""
        return _read(Turn, await self._json("GET", f"/v1/sessions/{_id(session)}/turns/{number}"))

    async def jobs(
        self, session: Session | str | None = None, *, order: Order = "desc"
    ) -> AsyncGenerator[Job, None]:
        """All jobs by creation, or those of one session."""
        of = None if session is None else _id(session)
        async for item in self._pages("/v1/jobs", session=of, order=order):
            yield _read(Job, item)

    async def job(self, job: Job | str) -> Job:
        """A job as it is now."""
        return _read(Job, await self._json("GET", f"/v1/jobs/{_id(job)}"))

    async def cancel(self, job: Job | str) -> Job:
        """End a job: at once if it waits, at its next step if it runs."""
        return _read(Job, await self._json("POST", f"/v1/jobs/{_id(job)}/cancel"))

    async def events(self, job: Job | str, *, after: int = 0) -> AsyncGenerator[Event, None]:
        """All events of a job behind number `after`, as they happen, to its end.

        A connection that is cut off is taken up behind the last event.
        """
        path, pauses = f"/v1/jobs/{_id(job)}/events", list(_PAUSES)
        while True:
            failure: MV2VError = UnreachableError("the service ended the events before the job's")
            try:
                headers = {"Last-Event-ID": str(after)}
                async with self._answer("GET", path, headers=headers) as response:
                    async for event in _events(self._wire.parts(response)):
                        after, pauses = event.number, list(_PAUSES)
                        yield event
                        if event.kind in _ENDS:
                            return
            except UnreachableError as error:
                failure = error
            if not pauses:
                raise failure
            await self._wire.sleep(pauses.pop(0))

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
                async with self._answer("GET", path) as response:
                    async for part in self._wire.parts(response):
                        yield part
                    return
            except ServiceError as error:
                if error.code != "not_finished" or not error.retry_after or waited >= _PATIENCE:
                    raise
                await self._wire.sleep(error.retry_after)
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
        body = _set(prompt=prompt, seed=seed, blocks=blocks, frames=frames, policy=policy)
        key = key or secrets.token_hex(16)
        return _read(Stream, await self._json("POST", "/v1/streams", json=body, key=key))

    async def stream(self, stream: Stream | str) -> Stream:
        """A stream as it is now."""
        return _read(Stream, await self._json("GET", f"/v1/streams/{_id(stream)}"))

    async def stream_prompt(self, stream: Stream | str, prompt: str) -> int:
        """Another prompt for a stream; the number of the first block that has it."""
        path = f"/v1/streams/{_id(stream)}/prompt"
        return int((await self._json("POST", path, json={"prompt": prompt}))["first_block"])

    async def stream_video(
        self, stream: Stream | str, *, first: int | None = None, last: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """A stream's fragmented mp4 in parts, while it is made."""
        path, params = f"/v1/streams/{_id(stream)}/video", _set(first=first, last=last)
        async with self._answer("GET", path, params=params) as response:
            async for part in self._wire.parts(response):
                yield part

    async def cancel_stream(self, stream: Stream | str) -> Stream:
        """End a stream at its next step; its finished blocks stay."""
        return _read(Stream, await self._json("POST", f"/v1/streams/{_id(stream)}/cancel"))

    async def delete_stream(self, stream: Stream | str) -> None:
        """End a stream and remove all of it."""
        await self._json("DELETE", f"/v1/streams/{_id(stream)}")


def _is_file(video: object) -> TypeGuard[BinaryIO]:
    return hasattr(video, "read")


def _content(video: Video) -> tuple[str, bytes | BinaryIO]:
    """The name and the bytes, or the open file, of a video or an image.

    Raises:
        OSError: a path cannot be opened.
    """
    if isinstance(video, str | Path):
        return Path(video).name, open(video, "rb")
    return "file", video


def _id(named: Session | Job | Stream | str) -> str:
    return named if isinstance(named, str) else named.id


def _file_of(turn: Turn, which: str) -> str:
    return f"/v1/sessions/{turn.session}/turns/{turn.number}/{which}"


def _unreachable(error: httpx.TransportError) -> UnreachableError:
    said = str(error) or type(error).__name__
    return UnreachableError(f"no answer from the service: {said}; is it started, and there?")


def _refusal(response: httpx.Response, body: bytes) -> ServiceError:
    """The error of an answer; of one that is not the service's, what can be told of it."""
    status, headers = response.status_code, response.headers
    try:
        error = json.loads(body)["error"]
        code, message, param = error["code"], error["message"], error.get("param")
    except (ValueError, KeyError, TypeError):
        code, param = "internal", None
        message = f"{response.url} answered with status {status}, and not as the service does"
    wait = headers.get("Retry-After", "")
    return ServiceError(
        code,
        message,
        status=status,
        param=param,
        retry_after=float(wait) if wait.isdigit() else None,
        request_id=headers.get("X-Request-ID"),
    )


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[Event]:
    """Server-sent events in the form that the service gives them."""
    rest = b""
    async for part in parts:
        *blocks, rest = (rest + part).split(b"\n\n")
        for block in blocks:
            lines = (line.split(": ", 1) for line in block.decode().splitlines())
            fields = {words[0]: words[-1] for words in lines if words[0]}
            if "data" in fields:
                yield Event(int(fields["id"]), fields["event"], json.loads(fields["data"]))


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

    _wires = _Blocking
    _wire: _Blocking


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
