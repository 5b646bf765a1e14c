"""Multipart forms as they arrive: in any pieces, too long, cut off, or from nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.http.uploads import received_form

BOUNDARY = "b0undary"
VIDEO = bytes(range(256)) * 40 + b"\r\n--b0und no boundary\r\n"


def part(name: str, data: bytes, filename: str | None = None) -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    return head.encode() + data + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()
WHOLE = part("name", "Größe".encode()) + part("video", VIDEO, "../../a.mp4") + END


def receive(
    folder: Path,
    pieces: Iterable[bytes],
    *,
    content_type: str = f"multipart/form-data; boundary={BOUNDARY}",
    is_cut: bool = False,
    is_taken: bool = True,
    target: Path | None = None,
) -> tuple[dict[str, str], bytes | None]:
    """What a form holds: its fields, and the file's bytes."""
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": piece, "more_body": True} for piece in pieces
    ]
    ends = {"type": "http.disconnect"} if is_cut else {"type": "http.request", "body": b""}
    messages.append(ends)
    coming = iter(messages)

    async def next_message() -> Any:
        return next(coming)

    async def new_path() -> Path:
        return target or folder / "upload"

    async def run() -> tuple[dict[str, str], bytes | None]:
        headers = [(b"content-type", content_type.encode())]
        scope = {"type": "http", "method": "POST", "headers": headers}
        request = Request(scope, next_message)
        async with received_form(request, {"video": 1}, len(VIDEO), new_path) as form:
            data = form.files["video"][0].read_bytes() if form.files else None
            if is_taken:
                form.take("video")
        return form.fields, data

    return asyncio.run(run())


@pytest.mark.parametrize("size", [1, 7, 64, 1000, len(WHOLE)])
def test_any_pieces_give_the_same_form(tmp_path: Path, size: int) -> None:
    pieces = [WHOLE[start : start + size] for start in range(0, len(WHOLE), size)]
    assert receive(tmp_path, pieces) == ({"name": "Größe"}, VIDEO)
    assert (tmp_path / "upload").read_bytes() == VIDEO


@pytest.mark.parametrize("size", [1, 7, 1000, 5 << 20])
def test_files_of_several_fields_keep_their_order(tmp_path: Path, size: int) -> None:
    files = [("image", b"one"), ("video", VIDEO), ("image", b""), ("image", bytes(2 << 20))]
    body = b"".join(part(name, data, "a") for name, data in files) + part("name", b"n") + END
    pieces = iter([body[start : start + size] for start in range(0, len(body), size)])
    if size < 1000:
        body = b"".join(part(name, data[:9], "a") for name, data in files) + END
        pieces = iter([body[start : start + size] for start in range(0, len(body), size)])
    most, cut = 3 << 20, 9 if size < 1000 else None

    async def next_message() -> Any:
        piece = next(pieces, None)
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    async def new_path() -> Path:
        return tmp_path / str(len(list(tmp_path.iterdir())))

    async def run() -> None:
        kind = f"multipart/form-data; boundary={BOUNDARY}".encode()
        request = Request(
            {"type": "http", "method": "POST", "headers": [(b"content-type", kind)]}, next_message
        )
        async with received_form(request, {"video": 1, "image": 3}, most, new_path) as form:
            (video,), images = form.files["video"], form.take("image")
            assert video.read_bytes() == VIDEO[:cut]
            assert [image.read_bytes() for image in images] == [
                data[:cut] for name, data in files if name == "image"
            ]
        # what was not taken is gone
        assert sorted(tmp_path.iterdir()) == sorted(images)

    asyncio.run(run())


def test_what_nobody_takes_is_removed(tmp_path: Path) -> None:
    receive(tmp_path, [WHOLE], is_taken=False)
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    "one byte too many": ("too_large", part("video", VIDEO + b"\0", "a") + END),
    "a long field": ("too_large", part("name", b"x" * (300 << 10)) + END),
    "cut off": ("malformed_request", WHOLE[:5000]),
    "without its last boundary": ("malformed_request", WHOLE[: -len(END)]),
    "two files": ("invalid_request", part("video", b"1", "a") + part("video", b"2", "b") + END),
    "a field twice": ("invalid_request", part("name", b"1") + part("name", b"2") + END),
    "a file elsewhere": ("invalid_request", part("name", b"1", "a") + END),
    "many fields": ("malformed_request", b"".join(part(str(n), b"") for n in range(40)) + END),
    "no text": ("malformed_request", part("name", b"\xff\xfe") + END),
    "no name": ("malformed_request", WHOLE.replace(b'name="name"', b"")),
    "no form": ("malformed_request", b"{}"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_form_is_refused_and_leaves_nothing(tmp_path: Path, what: str) -> None:
    code, body = REFUSED[what]
    pieces = [body[start : start + 999] for start in range(0, len(body), 999)]
    with pytest.raises(ApiError) as caught:
        receive(tmp_path, pieces)
    assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_a_client_that_leaves_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="left before its end"):
        receive(tmp_path, [WHOLE[:5000]], is_cut=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content_type", "code"),
    [
        ("application/json", "unsupported_media"),
        ("multipart/form-data", "malformed_request"),
        (f"multipart/form-data; boundary={'b' * 9999}", "malformed_request"),
        ("", "unsupported_media"),
    ],
)
def test_a_body_that_is_no_form(tmp_path: Path, content_type: str, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        receive(tmp_path, [WHOLE], content_type=content_type)
    assert caught.value.code == code


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    full = tmp_path / "upload"
    full.symlink_to("/dev/full")
    with pytest.raises(ApiError) as caught:
        receive(tmp_path, [WHOLE], target=full)
    assert (caught.value.code, caught.value.status) == ("disk_full", 507)
    assert list(tmp_path.iterdir()) == []
