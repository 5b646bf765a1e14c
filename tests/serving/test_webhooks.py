"""Callbacks of the service: where they go, how they are signed, what outlives a kill."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

from mv2v_engine.errors import RequestError
from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.work import webhooks
from mv2v_engine.serving.work.outbound import Hosts, RefusedError
from mv2v_engine.serving.work.webhooks import signed, signing_key
from tests.serving.fake_backend import FakeBackend
from tests.serving.in_process import (
    abandon,
    asked,
    ended,
    in_loop,
    new_session,
    refused,
    serving,
    started,
)

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()


class Receiver:
    """A listener for callbacks that answers with the statuses it is given, then with 200."""

    def __init__(self, *statuses: int) -> None:
        self.statuses, self.got = list(statuses), list[tuple[dict[str, str], bytes]]()
        self.come = threading.Semaphore(0)
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.got.append((headers, body))
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                self.send_header("Location", receiver.url)
                self.end_headers()
                receiver.come.release()

            def log_message(self, *said: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.place = f"127.0.0.1:{self.server.server_port}"
        self.url = f"http://{self.place}/hook?a=b"

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.come.acquire, timeout=120)


@contextmanager
def receiving(*statuses: int) -> Iterator[Receiver]:
    receiver = Receiver(*statuses)
    thread = threading.Thread(target=receiver.server.serve_forever)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.server.shutdown()
        thread.join()
        receiver.server.server_close()


def kept(store: Path) -> list[Path]:
    return sorted((store / "webhooks").iterdir())


async def emptied(store: Path) -> None:
    deadline = time.monotonic() + 60
    while kept(store):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_a_signature_is_that_of_standard_webhooks() -> None:
    """The example of the specification's own libraries."""
    key = signing_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signed(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("secret", [None, "", "whsec_???", "whsec_YWJj"])
def test_a_secret_that_is_none(secret: str | None) -> None:
    with pytest.raises(RequestError, match="MV2V_WEBHOOK_SECRET"):
        signing_key(secret)


@in_loop
async def test_the_end_of_a_turn_is_told_until_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "PAUSES", (0.0, 0.0))
    with receiving(500, 302) as receiver:
        hosts = {"webhook_hosts": (receiver.place,), "webhook_secret": SECRET}
        async with serving(tmp_path, **hosts) as (service, _):
            session = await new_session(service)
            job = await asked(service, session, callback_url=receiver.url)
            await ended(service, job)
            for _ in range(3):
                await receiver.wait()
            await emptied(tmp_path)
    assert len(receiver.got) == 3, "a redirect is not followed"
    for headers, body in receiver.got:
        told = json.loads(body)
        assert told["type"] == "job.finished"
        assert told["data"]["id"] == job.id and told["data"]["number"] == 1
        content = f"msg_{job.id}.{headers['webhook-timestamp']}.".encode() + body
        digest = base64.b64encode(hmac.digest(KEY, content, hashlib.sha256)).decode()
        assert headers["webhook-signature"] == f"v1,{digest}"
        assert headers["host"] == receiver.place


@in_loop
async def test_what_was_not_told_is_told_after_a_kill(tmp_path: Path) -> None:
    with receiving() as receiver:
        hosts: dict[str, Any] = {"webhook_hosts": (receiver.place,), "webhook_secret": SECRET}
        backend = FakeBackend()
        backend.go.clear()
        service = await started(tmp_path, backend, **hosts)
        session = await new_session(service)
        job = await asked(service, session, callback_url=receiver.url)
        assert [path.name for path in kept(tmp_path)] == [f"{job.id}.json"]
        await abandon(service)
        # what a kill leaves of a job that was never queued, and of a file
        lost = tmp_path / "webhooks" / f"job_{'0' * 24}.json"
        lost.write_text(json.dumps({"url": receiver.url, "attempts": 0}))
        (tmp_path / "webhooks" / ".job_0-abcdefgh.json").write_text("{")
        async with serving(tmp_path, **hosts) as (service, _):
            await ended(service, job)
            await receiver.wait()
            await emptied(tmp_path)
    assert [json.loads(body)["data"]["id"] for _, body in receiver.got] == [job.id]


@in_loop
async def test_a_host_that_hangs_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "TIMEOUT", 30.0)
    with socket.create_server(("127.0.0.1", 0)) as silent, receiving() as receiver:
        hangs = f"127.0.0.1:{silent.getsockname()[1]}"
        hosts = {"webhook_hosts": (receiver.place, hangs), "webhook_secret": SECRET}
        async with serving(tmp_path, **hosts) as (service, _):
            session = await new_session(service)
            first = await asked(service, session, callback_url=f"http://{hangs}/")
            second = await asked(service, session, callback_url=receiver.url)
            began = time.monotonic()
            await ended(service, first)
            await ended(service, second)
            await receiver.wait()
            assert time.monotonic() - began < 30.0
        # and the one that hangs is told after the next start
        assert [path.name for path in kept(tmp_path)] == [f"{first.id}.json"]


@in_loop
async def test_a_host_that_does_not_answer_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"127.0.0.1:{silent.getsockname()[1]}"
        hosts = Hosts([place])
        with pytest.raises(RefusedError, match=r"within 0\.2 s"):
            async with hosts.request("POST", f"http://{place}/", seconds=0.2):
                pass
        hosts.close()


@in_loop
async def test_callbacks_are_off_unless_hosts_are_listed(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, _):
        session = await new_session(service)
        error = await refused(asked(service, session, callback_url="https://example.org/"))
        assert error.code == "host_not_allowed" and error.param == "callback_url"
        assert not kept(tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        "https://other.org/",
        "https://example.org.evil.org/",
        "https://example.org:444/",
        "https://example.org@evil.org/",
        "https://user:word@example.org/",
        "ftp://example.org/",
        "example.org",
        "http://[::1",
        "https://example.org:99999/",
        "https://example.org/ x",
        "https://example.org/\r\nX: y",
        "https://exämple.org/",
        "https://example.org/" + "a" * 2000,
    ],
)
def test_urls_that_are_not_asked(url: str) -> None:
    hosts = Hosts(["example.org", "hooks.example.org:8443"])
    with pytest.raises(ApiError) as error:
        hosts.check(url, "callback_url")
    assert error.value.code == "host_not_allowed"
    hosts.close()


@pytest.mark.parametrize(
    "url", ["https://example.org/", "http://EXAMPLE.org:80/a", "https://h:8443"]
)
def test_urls_that_are(url: str) -> None:
    hosts = Hosts(["example.org", "h:8443"])
    assert hosts.check(url, "callback_url") == url
    hosts.close()


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.8",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fd00::1",
        "fe80::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
    ],
)
@in_loop
async def test_a_listed_name_that_leads_inside(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    public = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", 443))
    private = (family, socket.SOCK_STREAM, 6, "", (address, 443))
    hosts = Hosts(["example.org"])
    for found in ([private], [public, private]):
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, found=found: found)
        with pytest.raises(RefusedError, match="not public"):
            await hosts._address("example.org", 443)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [public])
    assert str(await hosts._address("example.org", 443)) == "93.184.215.14"
    hosts.close()


@in_loop
async def test_a_network_that_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    row = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.1.2.3", 80))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [row])
    hosts = Hosts(["inside.example", "10.0.0.0/8"])
    assert str(await hosts._address("inside.example", 80)) == "10.1.2.3"
    hosts.close()


@pytest.mark.parametrize("entry", ["", "http://example.org", "a@b", "10.0.0.0/99", "h:x"])
def test_entries_that_are_no_hosts(entry: str) -> None:
    with pytest.raises(RequestError, match="is no host"):
        Hosts([entry])
