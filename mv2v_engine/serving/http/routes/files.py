"""Files as answers: whole, or the range of bytes that a player asks for."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.http.schemas import Answers

_CHUNK_BYTES = 256 << 10
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.IGNORECASE)
# first bytes of the containers that are taken; a browser is not left to guess
_MAGIC = (
    (4, b"ftyp", "video/mp4"),
    (0, b"\x1a\x45\xdf\xa3", "video/webm"),
    (8, b"AVI ", "video/x-msvideo"),
    (0, b"OggS", "video/ogg"),
    (0, b"FLV", "video/x-flv"),
    (0, b"GIF8", "image/gif"),
    (0, b"\x47", "video/mp2t"),
)
UNKNOWN = "application/octet-stream"
# the schema of a route that answers with a file
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_RANGE_PARAMETER = {
    "name": "Range",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "examples": ["bytes=0-65535"]},
    "description": "one range of bytes; others are answered with the whole file",
}
# what `answer_file` raises, and who finds the file for it
FILE_ERRORS = ("not_found", "damaged", "range_not_satisfiable")


def file_answers(*media_types: str) -> Answers:
    """The good answers of a route that calls `answer_file`."""
    content = dict.fromkeys(media_types, _BINARY)
    return {
        200: {"description": "the whole file", "content": content},
        206: {"description": "the range that was asked for", "content": content},
    }


WITH_RANGE: dict[str, Any] = {"parameters": [_RANGE_PARAMETER]}


async def answer_file(
    request: Request,
    path: Path,
    *,
    name: str,
    media_type: str | None = None,
    is_attachment: bool = False,
    is_last_use: bool = False,
) -> Response:
    """The file, or its part that the request's Range names.

    Args:
        name: under which it is saved; plain ASCII. media_type: None looks at its first bytes.
        is_last_use: the file is removed; its bytes stay until they are sent.

    Raises:
        ApiError: the file is gone by now, or the range lies outside of it.
    """
    try:
        file = await asyncio.to_thread(path.open, "rb")
    except FileNotFoundError:
        raise ApiError("not_found", "the file was deleted meanwhile") from None
    if is_last_use:
        await asyncio.to_thread(path.unlink, missing_ok=True)
    status = os.fstat(file.fileno())
    size = status.st_size
    tag = f'"{status.st_mtime_ns:x}-{size:x}"'
    start, end = 0, size
    wanted = request.headers.get("range")
    condition = request.headers.get("if-range")
    if wanted is not None and condition in (None, tag):
        found = _span(wanted, size)
        if found is None:
            file.close()
            raise ApiError(
                "range_not_satisfiable",
                f"the file has {size} bytes, 0 to {size - 1}; ask for some of these",
                headers={"Content-Range": f"bytes */{size}"},
            )
        start, end = found
    if media_type is None:
        media_type = media_type_of(await asyncio.to_thread(file.read, 16))
    headers = {
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-store",
        "Content-Disposition": f'{"attachment" if is_attachment else "inline"}; filename="{name}"',
        "Content-Length": str(end - start),
        "ETag": tag,
    }
    is_part = (start, end) != (0, size)
    if is_part:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    body = _chunks(file, start, end)
    return StreamingResponse(body, 206 if is_part else 200, headers, media_type)


def _span(header: str, size: int) -> tuple[int, int] | None:
    """The first byte and the one behind the last; all of them where a header is to be ignored.

    None: the range lies outside the file.
    """
    match = _RANGE.fullmatch(header.replace(" ", ""))
    if match is None or match[1] == match[2] == "":
        return 0, size
    if not match[1]:
        count = min(int(match[2]), size)
        return (size - count, size) if count else None
    start, last = int(match[1]), int(match[2] or size)
    if match[2] and last < start:
        return 0, size
    return (start, min(last + 1, size)) if start < size else None


def media_type_of(head: bytes) -> str:
    """The type of a video by its first bytes."""
    for place, magic, media_type in _MAGIC:
        if head[place : place + len(magic)] == magic:
            return media_type
    return UNKNOWN


async def _chunks(file: BinaryIO, start: int, end: int) -> AsyncIterator[bytes]:
    try:
        await asyncio.to_thread(file.seek, start)
        while start < end:
            data = await asyncio.to_thread(file.read, min(_CHUNK_BYTES, end - start))
            start += len(data)
            yield data
    finally:
        file.close()
