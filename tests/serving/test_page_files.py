"""The page's files as the service gives them: joined, compressed, and told apart by their tags."""

from __future__ import annotations

import base64
import gzip
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mv2v_engine.serving.http.page_files import FIRST, INDEX, PAGE, STYLES, joined_modules

NODE = shutil.which("node")
MODULES = {
    "app.js": 'import * as sums from "./sums.js";\nimport { $, Box } from "./box.js";\n'
    "console.log(new Box(sums.add($, 2)).held, typeof hidden);\n",
    "sums.js": 'import { $ } from "./box.js";\nconst hidden = $;\n'
    "export const add = (a, b) => a + b + hidden;\n",
    "box.js": "export const $ = 1;\nexport class Box {\n  constructor(held) {\n    "
    "this.held = held;\n  }\n}\nexport async function later() {}\n",
}


@pytest.mark.skipif(NODE is None, reason="needs Node")
def test_joined_modules_do_what_they_did(tmp_path: Path) -> None:
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "joined.js").write_text(joined_modules(MODULES, "app.js"))
    assert NODE is not None
    (tmp_path / "package.json").write_text('{"type": "module"}')
    said = [
        subprocess.run([NODE, tmp_path / name], check=True, capture_output=True).stdout
        for name in ("app.js", "joined.js")
    ]
    # what a module does not export is its own
    assert said == [b"4 undefined\n"] * 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('import "./box.js";', "import { a, b } from"),
        ('import box from "./box.js";', "'import box from"),
        ('import { $ as first } from "./box.js";', "as first"),
        ("export default 3;", "'export default 3;'"),
        ("export { held };", "export before a function, class or const"),
        ("export let held = 3;", "'export let held"),
        ('import { a } from "./none.js";', "box.js imports 'none.js'"),
        ('import { add } from "./sums.js";', "app.js -> sums.js -> box.js -> sums.js"),
    ],
)
def test_a_module_that_cannot_be_joined_is_named(text: str, words: str) -> None:
    files = {**MODULES, "box.js": f"{text}\n{MODULES['box.js']}"}
    with pytest.raises(ValueError, match=words):
        joined_modules(files, "app.js")


@pytest.fixture(scope="module")
def http(
    serving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    from tests.serving.fake_backend import FakeBackend

    with (
        serving(tmp_path_factory.mktemp("store"), FakeBackend()) as service,
        service.client() as client,
    ):
        yield client


def test_files_are_compressed_and_sent_once(http: httpx.Client) -> None:
    for address, name in [("/page/app.js", "app.js"), ("/docs", "docs.html")]:
        written = (PAGE / name).read_bytes()
        plain = http.get(address, headers={"Accept-Encoding": "identity"})
        assert plain.content == written and "content-encoding" not in plain.headers
        packed = http.get(address, headers={"Accept-Encoding": "gzip"})
        assert packed.headers["content-encoding"] == "gzip" and packed.content == written
        assert int(packed.headers["content-length"]) == len(gzip.compress(written, mtime=0))
        tag = {"If-None-Match": packed.headers["etag"]}
        known = http.get(address, headers=tag)
        assert (known.status_code, known.content) == (304, b"")
        assert known.headers["cache-control"] == "no-cache"
        assert http.get(address, headers={"If-None-Match": '"other"'}).status_code == 200


def test_the_first_script_stands_in_the_page_and_no_other_would_run(http: httpx.Client) -> None:
    script = (PAGE / FIRST).read_text()
    answer, other = http.get("/"), http.get("/docs")
    assert "</script" not in script
    reference = f'<script src="page/{FIRST}"></script>'
    assert answer.text == (PAGE / INDEX).read_text().replace(
        reference, f"<script>{script}</script>"
    )
    assert script in answer.text
    policy, others = (one.headers["content-security-policy"] for one in (answer, other))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"{others}; script-src 'self' 'sha256-{digest}'"
    assert "unsafe" not in policy and "script-src" not in others


def test_styles_are_joined_in_order(http: httpx.Client) -> None:
    answer = http.get("/page/page.css")
    assert answer.headers["content-type"] == "text/css; charset=utf-8"
    assert answer.text == "".join((PAGE / name).read_text() for name in STYLES)


def test_what_there_is_not(http: httpx.Client) -> None:
    for address in ("/page/none.js", "/page/", "/page/../app.py", "/page/%2e%2e/app.py"):
        assert http.get(address).json()["error"]["code"] == "not_found"
    assert http.post("/page/app.js").status_code == 405
