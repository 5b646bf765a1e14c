"""docs/serving.md against a service: its commands run, its tables are the service's own."""

from __future__ import annotations

import argparse
import base64
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

from mv2v_engine.parser import Parser, default_words
from mv2v_engine.serving.command import add_serve
from mv2v_engine.serving.errors import KINDS
from mv2v_engine.serving.work.webhooks import signed, signing_key

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
TEXT = GUIDE.read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def table(header: str) -> list[list[str]]:
    """The cells below a table's header line."""
    _, _, rest = TEXT.partition(f"\n{header}\n")
    assert rest, f"no table {header}"
    rows = rest.split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def options() -> argparse.ArgumentParser:
    parser = Parser()
    add_serve(parser)
    return parser


def test_the_commands_that_start_it_are_understood() -> None:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    starts = [line for line in lines if "mv2v_engine.run serve --" in line]
    assert len(starts) == 2
    for line in starts:
        assert options().parse_args(shlex.split(line)[4:]).store


def test_the_errors_are_the_services() -> None:
    expected = [
        f"| `{code}` | {kind.status or ''} | {kind.meaning} |" for code, kind in KINDS.items()
    ]
    found = [f"| {' | '.join(cells)} |" for cells in table("| code | status | meaning |")]
    assert found == expected, "the table should be:\n" + "\n".join(expected)


def test_the_limits_are_the_services() -> None:
    rows = table("| option | default | what it bounds | refused with |")
    actions = {option: action for action in options()._actions for option in action.option_strings}
    for option, default, *_ in rows:
        action = actions[option.strip("`")]
        if (value := default_words(action)) is not None:
            assert default == value, option
        else:  # a rule, which the help has in the same words
            assert f"if not given, {default.replace('`', '')}" in (action.help or ""), option
    assert {code.strip("`") for *_, code in rows} <= KINDS.keys()


@pytest.fixture(scope="module")
def service(serving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    with serving(tmp_path_factory.mktemp("store")) as service:
        yield service


def test_the_routes_are_the_services(service: Any) -> None:
    told = {route.strip("`") for route, _ in table("| route | what |")}
    there = {
        f"{method.upper()} {path}"
        for path, operations in service.app.openapi()["paths"].items()
        for method in operations
    }
    assert told == there


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_shell_commands(service: Any, source_clip: Path, tmp_path: Path) -> None:
    shutil.copy(source_clip, tmp_path / "clip.mp4")
    (commands,) = [block for block in blocks("bash") if "curl" in block]
    assert ADDRESS in commands
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands.replace(ADDRESS, service.address)],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    events = re.findall(r"^event: (\w+)$", done.stdout, re.MULTILINE)
    assert events[0] == "queued" and events[-1] == "finished"
    # the guide's events are those that come
    told = {
        name for cells in table("| event | data |") for name in re.findall(r"`(\w+)`", cells[0])
    }
    assert set(events) <= told
    assert (tmp_path / "turn1.mp4").read_bytes() == b"frames of turn 1"
    assert (tmp_path / "session.zip").read_bytes()[:2] == b"PK"
    assert '"num_turns":1' in done.stdout.replace(" ", "")


def test_the_plain_client(
    service: Any, source_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(source_clip, tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    code, *_ = blocks("python")
    assert ADDRESS in code
    exec(compile(code.replace(ADDRESS, service.address), "serving.md", "exec"), {})
    assert (tmp_path / "turn1.mp4").read_bytes() == b"frames of turn 1"


def test_a_callback_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "whsec_" + base64.b64encode(bytes(range(32))).decode()
    monkeypatch.setenv("MV2V_WEBHOOK_SECRET", secret)
    *_, code = blocks("python")
    names: dict[str, Any] = {}
    exec(compile(code, "serving.md", "exec"), names)
    verified, now, body = names["verified"], int(time.time()), b'{"type": "job.finished"}'
    headers = signed(signing_key(secret), "msg_job_a", now, body)
    assert verified(headers, body)
    # another key beside the service's, as while one is changed for another
    several = f"v1,{base64.b64encode(bytes(32)).decode()} {headers['webhook-signature']}"
    assert verified({**headers, "webhook-signature": several}, body)
    assert not verified(headers, body + b" ")
    assert not verified({**headers, "webhook-id": "msg_job_b"}, body)
    assert not verified({**headers, "webhook-timestamp": str(now + 1)}, body)
    assert not verified(signed(bytes(32), "msg_job_a", now, body), body)
    assert not verified(signed(signing_key(secret), "msg_job_a", now - 400, body), body)


def test_the_openai_client(
    service: Any, source_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    shutil.copy(source_clip, tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    _, code, _ = blocks("python")
    assert ADDRESS in code
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        # OpenAI ends its own service of this shape; the shape stays
        warnings.simplefilter("ignore", DeprecationWarning)
        exec(compile(code.replace(ADDRESS, service.address), "serving.md", "exec"), names)
    names["client"].close()
    assert names["video"].status == "completed"
    assert (tmp_path / "video.mp4").read_bytes() == b"frames of turn 1"
    assert names["again"].remixed_from_video_id == names["video"].id
