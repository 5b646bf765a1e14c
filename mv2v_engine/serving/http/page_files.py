"""The page's files as answers: read once, and those of one page joined, so that few are asked for.

A browser asks for six things at a time, and each costs the service and the browser more than its
bytes. So what a page begins with is one style sheet and one module, made here of the files as they
are written, and the script that comes first stands in the page itself, which its security policy
knows by that script's hash. Modules that are imported later (`import("./report.js")`) are served by
themselves.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import mimetypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mv2v_engine.serving.http.headers import CONTENT_SECURITY_POLICY

PAGE = Path(__file__).with_name("page")
# what is joined from which of the files, under a name that none of them has
STYLES = ("style.css", "layout.css", "viewer.css", "history.css", "composer.css", "live.css")
ENTRY = "app.js"
# the page, and the script that is written into it
INDEX, FIRST = "index.html", "first.js"
JOINED_STYLES, JOINED_SCRIPT = "page.css", "page.js"
_NAMES = r"\{\s*(?:[\w$]+,\s*)*[\w$]+\s*\}"
_IMPORT = re.compile(rf'^import (?:\* as (\w+)|({_NAMES})) from "\./([\w.]+)";$', re.MULTILINE)
_EXPORT = re.compile(r"^export ((?:async )?function|class|const) ([\w$]+)", re.MULTILINE)
_LEFT = re.compile(r"^(?:import|export)\b.*", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class _File:
    """A file's bytes, as they are and compressed, and the headers of both."""

    body: bytes
    packed: bytes
    headers: dict[str, str]
    tag: str


class PageFiles:
    """Answers with the files of a folder, and with what is joined of them.

    Clients ask again each time (`no-cache`), and get 304 while nothing has changed: files of two
    versions do not go together.
    """

    def __init__(self, folder: Path = PAGE) -> None:
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        texts = {name: body.decode() for name, body in files.items()}
        files[JOINED_STYLES] = "".join(texts[name] for name in STYLES).encode()
        files[JOINED_SCRIPT] = joined_modules(texts, ENTRY).encode()
        files[INDEX], policy = with_script(texts[INDEX], texts[FIRST])
        own = {INDEX: {"Content-Security-Policy": policy}}
        self._files = {name: _file(name, body, own.get(name, {})) for name, body in files.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the file that the path names below where these are mounted."""
        if scope["type"] != "http":
            raise HTTPException(404)
        name = scope["path"].removeprefix(scope["root_path"]).removeprefix("/")
        await self.response(name, Request(scope))(scope, receive, send)

    def response(self, name: str, request: Request) -> Response:
        """A file by its name, as a request asks for it.

        Raises:
            HTTPException: there is no such file, or it is to be changed.
        """
        if name not in self._files:
            raise HTTPException(404)
        if request.method != "GET":  # HEAD has become one
            raise HTTPException(405)
        file = self._files[name]
        if file.tag in request.headers.get("if-none-match", ""):
            return Response(None, 304, file.headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(file.packed, 200, {**file.headers, "Content-Encoding": "gzip"})
        return Response(file.body, 200, file.headers)


def with_script(page: str, script: str) -> tuple[bytes, str]:
    """The page with the script where it refers to `FIRST`, and the policy under which it runs."""
    reference = f'<script src="page/{FIRST}"></script>'
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"{CONTENT_SECURITY_POLICY}; script-src 'self' 'sha256-{digest}'"
    return page.replace(reference, f"<script>{script}</script>").encode(), policy


def _file(name: str, body: bytes, own: Mapping[str, str]) -> _File:
    tag = f'"{hashlib.blake2s(body, digest_size=12).hexdigest()}"'
    media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
    headers = {
        "Content-Type": f"{media_type}; charset=utf-8",
        "Cache-Control": "no-cache",
        "Vary": "Accept-Encoding",
        "ETag": tag,
        **own,
    }
    return _File(body, gzip.compress(body, mtime=0), headers, tag)


def joined_modules(texts: Mapping[str, str], entry: str) -> str:
    """One JavaScript module that does what a module and all that it imports do.

    Each becomes a function that gives back what it exports, called in the order of imports.

    Args:
        texts: of the files, by name. entry: the name of the module that is to run.

    Raises:
        ValueError: an import or export is written in a way that is not known here, names a file
        that there is not, or modules import each other in a circle.
    """
    done: dict[str, str] = {}

    def take(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join((*path, name))
            raise ValueError(f"modules import each other: {circle}; move what they share out")
        if name in done:
            return
        if name not in texts:
            raise ValueError(f"{path[-1]} imports {name!r}, which there is not")
        for found in _IMPORT.finditer(texts[name]):
            take(found[3], (*path, name))
        done[name] = _as_function(name, texts[name])

    take(entry, ())
    return "".join(done.values())


def _as_function(name: str, text: str) -> str:
    exported = [found[2] for found in _EXPORT.finditer(text)]
    body = _EXPORT.sub(r"\1 \2", text)
    body = _IMPORT.sub(lambda found: f"const {found[1] or found[2]} = {_variable(found[3])};", body)
    left = _LEFT.search(body)
    if left is not None:
        raise ValueError(
            f'{name}: {left[0]!r}; write import {{ a, b }} from "./file.js", import * as a from '
            '"./file.js", or export before a function, class or const'
        )
    return (
        f"const {_variable(name)} = (() => {{\n{body}return {{ {', '.join(exported)} }};\n}})();\n"
    )


def _variable(name: str) -> str:
    return "module_" + name.removesuffix(".js")
