"""A model hub on loopback: the routes that huggingface_hub asks, and the mishaps of real ones.

A repository is a folder `owner/name`; every file of more than 1,400 bytes is a large one, which the
hub answers with a redirect, as it does for all that lies in its large-file storage.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import constants

LARGE = 1400
COMMIT = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_CONTENT = re.compile(r"/content/(.+)")


class SmallHub:
    """What it serves, what it was asked for, and what goes wrong.

    asked: method, path and range of every request. cut: bytes after which the next transfer of a
    file breaks off, by its path. swapped: files whose content is another than is listed. gated:
    repositories that want a token. storage: the address of another host, where large files lie.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple[str, str, str]] = []
        self.cut: dict[str, int] = {}
        self.swapped: set[str] = set()
        self.gated: set[str] = set()
        self.licence: dict[str, str] = {"license": "apache-2.0"}
        self.address = self.storage = ""

    def fetched(self) -> list[str]:
        """The large files that were asked for as a whole or to their end, in order."""
        return [
            path.removeprefix("/content/")
            for method, path, part in self.asked
            if method == "GET"
            and path.startswith("/content/")
            and not part.split("-")[-1].isdigit()
        ]

    def info(self, repository: str) -> dict[str, Any]:
        folder = self.root / repository
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            "id": repository,
            "sha": COMMIT,
            "gated": repository in self.gated,
            "tags": [],
            "cardData": self.licence,
            "siblings": [self._sibling(folder, path) for path in files],
        }

    def _sibling(self, folder: Path, path: Path) -> dict[str, Any]:
        content = path.read_bytes()
        row: dict[str, Any] = {
            "rfilename": path.relative_to(folder).as_posix(),
            "size": len(content),
            "blobId": _git_sha1(content),
        }
        if len(content) > LARGE:
            sha256 = hashlib.sha256(content).hexdigest()
            row["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
        return row


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: SmallHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if match := _API.fullmatch(path):
            self._about(match[1], match[2] or "main")
        elif match := _RESOLVE.fullmatch(path):
            self._file(*match.groups())
        elif match := _CONTENT.fullmatch(path):
            self._content(match[1], (self.hub.root / match[1]).read_bytes(), {})
        else:
            self._refuse(404, "")

    def _is_open(self, repository: str, revision: str) -> bool:
        if not (self.hub.root / repository).is_dir():
            self._refuse(401, "RepoNotFound")
        elif revision not in ("main", "v1", COMMIT):
            self._refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def _about(self, repository: str, revision: str) -> None:
        if self._is_open(repository, revision):
            self._send(200, json.dumps(self.hub.info(repository)).encode(), {})

    def _file(self, repository: str, revision: str, name: str) -> None:
        if not self._is_open(repository, revision):
            return
        if repository in self.hub.gated and "Authorization" not in self.headers:
            return self._refuse(403, "GatedRepo")
        path = self.hub.root / repository / name
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        content = path.read_bytes()
        said = {"X-Repo-Commit": COMMIT}
        if len(content) <= LARGE:
            return self._content(
                f"{repository}/{name}", content, {**said, "ETag": f'"{_git_sha1(content)}"'}
            )
        said["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        said["X-Linked-Size"] = str(len(content))
        said["Location"] = f"{self.hub.storage}/content/{repository}/{name}"
        self._send(302, b"", said)

    def _content(self, name: str, content: bytes, said: dict[str, str]) -> None:
        if name in self.hub.swapped:
            content = content[::-1]
        first, last, status = 0, len(content) - 1, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, status = int(match[1]), 206
            last = min(int(match[2] or last), last)
            said = {**said, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        is_part = bool(match and match[2])
        cut = None if is_part else self.hub.cut.pop(name, None)
        self._send(status, content[first : last + 1], said, cut)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code} if code else {})

    def _send(
        self, status: int, content: bytes, said: dict[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**said, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True


@contextmanager
def serving(root: Path) -> Iterator[SmallHub]:
    """A hub of the repositories below a folder, until the block ends."""
    hub = SmallHub(root)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address, hub.storage = (
            f"http://{host}:{server.server_address[1]}" for host in ("127.0.0.1", "localhost")
        )
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def ask_at(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Set the hub's address, as HF_ENDPOINT does, which the library reads once."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
