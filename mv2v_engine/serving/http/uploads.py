"""Multipart forms with one video: streamed to a file as they arrive, nothing large in memory.

The file's own name and type are read and never used: what it holds, decoding tells.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from mv2v_engine.serving.errors import FULL, ApiError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_MAX_FIELDS = 32
_FIELD_BYTES = 256 << 10
# bytes that are gathered before a thread writes them
_WRITE_BYTES = 1 << 20


@dataclass(slots=True)
class Form:
    """What was sent. video: where the file lies, None if there was none; name: its field's."""

    fields: dict[str, str] = field(default_factory=dict)
    video: Path | None = None

    def take_video(self) -> Path | None:
        """The file, for whom it is then: leaving the block that received it removes it no more."""
        video, self.video = self.video, None
        return video


@asynccontextmanager
async def received_form(
    request: Request,
    file_field: str,
    max_bytes: int,
    new_path: Callable[[], Awaitable[Path]],
) -> AsyncIterator[Form]:
    """Receive a form; its file is removed when the block ends, unless it was taken.

    Args:
        file_field: the one field that may be a file. max_bytes: of it.
        new_path: a place for the file, asked for when it begins.

    Raises:
        ApiError: no multipart form, a broken one, too large, or no room on the disk.
    """
    parts = _Parts(file_field, max_bytes)
    parser = _parser(request, parts)
    file: BinaryIO | None = None
    try:
        try:
            async for chunk in request.stream():
                parser.write(chunk)
                if parts.has_file and file is None:
                    parts.form.video = await new_path()
                    file = await asyncio.to_thread(open, parts.form.video, "wb")
                if file is not None and len(parts.waiting) >= _WRITE_BYTES:
                    await _write(file, parts)
            if not parts.is_complete:
                raise _malformed("it ends before its closing boundary")
            if file is not None:
                await _write(file, parts)
        except FormParserError as error:
            raise _malformed(str(error)) from error
        except ClientDisconnect:
            # nobody reads this; what was received goes
            raise _malformed("the client left before its end") from None
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise ApiError(
                "disk_full", "the disk of the service is full; delete sessions and send it again"
            ) from error
        finally:
            if file is not None:
                await asyncio.to_thread(file.close)
        yield parts.form
    finally:
        if parts.form.video is not None:
            await asyncio.to_thread(parts.form.video.unlink, missing_ok=True)


async def _write(file: BinaryIO, parts: _Parts) -> None:
    # bytes() because the parser goes on with the buffer while a cancelled write may still run
    data = bytes(parts.waiting)
    parts.waiting.clear()
    await asyncio.to_thread(file.write, data)


class _Parts:
    """What the parser calls: fields in memory, the file's bytes into `waiting`."""

    def __init__(self, file_field: str, max_bytes: int) -> None:
        self.form = Form()
        self.waiting = bytearray()
        self.has_file = self.is_complete = False
        self._file_field, self._max_bytes = file_field, max_bytes
        self._file_bytes = 0
        self._header, self._value = b"", b""
        self._disposition = b""
        self._name = ""
        self._is_file = False
        self._field = bytearray()

    def on_part_begin(self) -> None:
        self._disposition = b""
        self._field = bytearray()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or b"name" not in options:
            raise _malformed("a part has no Content-Disposition: form-data with a name")
        self._name = options[b"name"].decode("utf-8", "replace")
        shown = self._name[:100]
        self._is_file = b"filename" in options
        if len(self.form.fields) + self.has_file >= _MAX_FIELDS:
            raise _malformed(f"it has more than {_MAX_FIELDS} parts")
        if self._is_file and (self._name != self._file_field or self.has_file):
            raise ApiError(
                "invalid_request",
                f"the form may have one file, in the field {self._file_field!r}; leave the file "
                f"in {shown!r} out",
                param=shown,
            )
        if not self._is_file and self._name in self.form.fields:
            message = f"the field {shown!r} is given twice; give it once"
            raise ApiError("invalid_request", message, param=shown)
        self.has_file |= self._is_file

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._file_bytes += end - start
            if self._file_bytes > self._max_bytes:
                raise ApiError(
                    "too_large",
                    f"the video has more than {self._max_bytes} bytes, which is the most that is "
                    "taken; cut it, or encode it smaller",
                    param=self._file_field,
                )
            self.waiting += data[start:end]
            return
        self._field += data[start:end]
        if len(self._field) > _FIELD_BYTES:
            raise ApiError(
                "too_large",
                f"the field {self._name[:100]!r} has more than {_FIELD_BYTES} bytes",
                param=self._name[:100],
            )

    def on_part_end(self) -> None:
        if self._is_file:
            return
        try:
            self.form.fields[self._name] = self._field.decode()
        except UnicodeDecodeError as error:
            raise _malformed(f"the field {self._name[:100]!r} is not UTF-8") from error

    def on_end(self) -> None:
        self.is_complete = True


def _parser(request: Request, parts: _Parts) -> MultipartParser:
    content_type = request.headers.get("content-type", "")
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        raise ApiError(
            "unsupported_media",
            "a multipart/form-data body is expected, got "
            f"{repr(content_type[:100]) if content_type else 'no Content-Type'}",
        )
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise _malformed("its Content-Type names no boundary")
    calls: Any = {name: getattr(parts, name) for name in dir(parts) if name.startswith("on_")}
    try:
        return MultipartParser(boundary, calls)
    except FormParserError as error:
        raise _malformed(str(error)) from error


def _malformed(reason: str) -> ApiError:
    return ApiError("malformed_request", f"the form cannot be read: {reason}; send it whole")
