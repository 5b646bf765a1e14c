"""Requests with something wrong on purpose: in their bodies, and in their HTTP itself."""

from __future__ import annotations

import random
from collections.abc import Iterator


def damaged(data: bytes, pick: random.Random) -> bytes:
    """A body with something wrong somewhere."""
    at = pick.randrange(len(data))
    end = at + pick.randrange(1, 9)
    kind = pick.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + pick.randbytes(end - at) + data[end:]
    if kind == 2:
        return data[:at] + data[end:]
    if kind == 3:
        return data[:at] + data[at : at + 64] * pick.choice((2, 50)) + data[at:]
    if kind == 4:
        other = pick.choice((b"null", b"[]", b"{}", b"1e999", b"-1", b'"\\ud800"', b"\0", b"NaN"))
        return data[:at] + other + data[end:]
    return pick.choice((b"[", b'{"a":', b'"')) * pick.choice((3, 5000)) + data


def raw_requests(session: str, host: str, pick: random.Random) -> Iterator[bytes]:
    """Requests whose HTTP itself is wrong, without end."""
    head = f"Host: {host}\r\nConnection: close\r\n"
    body = '{"camera": "pan:5"}'
    whole = (
        f"POST /v1/sessions/{session}/turns HTTP/1.1\r\n{head}Content-Type: application/json\r\n"
    )
    while True:
        kind = pick.randrange(9)
        if kind == 0:
            yield pick.randbytes(pick.choice((1, 40, 4000)))
        elif kind == 1:
            yield f"GET /{'a' * pick.choice((9000, 70_000))} HTTP/1.1\r\n{head}\r\n".encode()
        elif kind == 2:
            yield f"GET /v1/jobs HTTP/1.1\r\n{head}{'X: y' * 30_000}\r\n\r\n".encode()
        elif kind == 3:
            length = pick.choice(("-1", "abc", "9" * 30, "3", "500", "1e3", "0x10"))
            yield f"{whole}Content-Length: {length}\r\n\r\n{body}".encode()
        elif kind == 4:
            size = pick.choice(("zz", "-5", "ffffffffffffffff", "13", ""))
            yield f"{whole}Transfer-Encoding: chunked\r\n\r\n{size}\r\n{body}\r\n0\r\n\r\n".encode()
        elif kind == 5:
            path = pick.choice(
                ("/%00", "/%ff%fe", "/v1/sessions/%2e%2e", "//", "*", "/page/%2e%2e")
            )
            yield f"GET {path} HTTP/1.1\r\n{head}\r\n".encode()
        elif kind == 6:
            method = pick.choice(("TRACE", "CONNECT", "get", "\x00", "A" * 500, "PROPFIND"))
            yield f"{method} /v1/sessions HTTP/1.1\r\n{head}\r\n".encode()
        elif kind == 7:
            range_ = pick.choice(
                ("bytes=9-", "bytes=--1", "bytes=1-1,2-2", "bytes=" + "0-1," * 999)
            )
            where = f"/v1/sessions/{session}/source"
            yield f"GET {where} HTTP/1.1\r\n{head}Range: {range_}\r\n\r\n".encode()
        else:
            good = f"{whole}Content-Length: {len(body)}\r\n\r\n{body}".encode()
            yield damaged(good, pick)
