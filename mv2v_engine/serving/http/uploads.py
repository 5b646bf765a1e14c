"""Multipart forms with files, which are streamed to the disk as they arrive, none in memory.

Files' own names and types are read and never used: what they hold, decoding tells.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
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
    """What was sent. files: where those of each field lie, in the order in which they came."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[Path]] = field(default_factory=dict)

    def take(self, name: str) -> list[Path]:
        """A field's files, whose they are then: leaving the block that received them removes them
        no more."""
        return self.files.pop(name, [])

    async def remove(self) -> None:
        """Remove the files that were not taken."""
        for path in (path for paths in self.files.values() for path in paths):
            await asyncio.to_thread(path.unlink, missing_ok=True)


@asynccontextmanager
async def received_form(
    request: Request,
    file_fields: Mapping[str, int],
    max_bytes: int,
    new_path: Callable[[], Awaitable[Path]],
) -> AsyncIterator[Form]:
    """Receive a form; its files are removed when the block ends, but for those that were taken.

    Args:
        file_fields: fields that may be files, and how many of each. max_bytes: of all
            files together.
        new_path: a place for a file, asked for when it begins.

    Raises:
        ApiError: no multipart form, a broken one, too large, or no room on the disk.
    """
    parts = _Parts(file_fields, max_bytes)
    parser = _parser(request, parts)
    try:
        try:
            async for chunk in request.stream():
                parser.write(chunk)
                await parts.write(new_path)
            if not parts.is_complete:
                raise _malformed("it ends before its closing boundary")
            await parts.write(new_path, is_end=True)
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
            await parts.close()
        yield parts.form
    finally:
        await parts.form.remove()


@dataclass(slots=True)
class _Arriving:
    """A file on its way.

    name: its field's. waiting: its bytes that are not written yet. file: once it was begun.
    """

    name: str
    waiting: bytearray = field(default_factory=bytearray)
    file: BinaryIO | None = None


class _Parts:
    """What the parser calls: fields in memory, the bytes of files into what is `arriving`."""

    def __init__(self, file_fields: Mapping[str, int], max_bytes: int) -> None:
        self.form = Form()
        self.arriving: list[_Arriving] = []
        self.is_complete = False
        self._file_fields, self._max_bytes = file_fields, max_bytes
        self._counts, self._file_bytes = Counter[str](), 0
        self._header, self._value = b"", b""
        self._disposition = b""
        self._name = ""
        self._is_file = False
        self._field = bytearray()

    async def write(self, new_path: Callable[[], Awaitable[Path]], *, is_end: bool = False) -> None:
        """Write what waits; of the file that is still arriving, once it is enough for a thread."""
        while self.arriving:
            at, is_whole = self.arriving[0], is_end or len(self.arriving) > 1
            if at.file is None:
                path = await new_path()
                self.form.files.setdefault(at.name, []).append(path)
                at.file = await asyncio.to_thread(open, path, "wb")
            if is_whole or len(at.waiting) >= _WRITE_BYTES:
                # bytes() because the parser goes on with the buffer while a cancelled write may
                # still run
                data = bytes(at.waiting)
                at.waiting.clear()
                await asyncio.to_thread(at.file.write, data)
            if not is_whole:
                return
            await asyncio.to_thread(at.file.close)
            self.arriving.pop(0)

    async def close(self) -> None:
        """Close what is still open of a form that broke off."""
        for at in self.arriving:
            if at.file is not None:
                await asyncio.to_thread(at.file.close)

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
        if len(self.form.fields) + self._counts.total() >= _MAX_FIELDS:
            raise _malformed(f"it has more than {_MAX_FIELDS} parts")
        if self._is_file and self._counts[self._name] >= self._file_fields.get(self._name, 0):
            fields = " and ".join(f"{most} in {name!r}" for name, most in self._file_fields.items())
            raise ApiError(
                "invalid_request",
                f"the form may have as files {fields}; leave the file in {shown!r} out",
                param=shown,
            )
        if not self._is_file and self._name in self._file_fields:
            raise ApiError(
                "invalid_request",
                f"{shown} came as text, a file is expected; send it as one, as curl does with "
                f"-F {shown}=@FILE",
                param=shown,
            )
        if not self._is_file and self._name in self.form.fields:
            message = f"the field {shown!r} is given twice; give it once"
            raise ApiError("invalid_request", message, param=shown)
        if self._is_file:
            self._counts[self._name] += 1
            self.arriving.append(_Arriving(self._name))

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._file_bytes += end - start
            if self._file_bytes > self._max_bytes:
                raise ApiError(
                    "too_large",
                    f"the files have more than {self._max_bytes} bytes, which is the most that is "
                    "taken; cut them, or encode them smaller",
                    param=self._name,
                )
            self.arriving[-1].waiting += data[start:end]
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


def file_schema(description: str, most: int = 1) -> dict[str, Any]:
    """A field of files in the schema of a form."""
    if most > 1:
        return {"type": "array", "maxItems": most, "items": file_schema(description)}
    return {"type": "string", "format": "binary", "description": description}


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
