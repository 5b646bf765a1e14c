"""The guides say what is so: their blocks run, their names exist, their links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from mv2v_engine import errors
from mv2v_engine.camera.files import resolve_camera
from mv2v_engine.camera.options import CameraOptions
from mv2v_engine.camera.poses import default_intrinsics
from mv2v_engine.config import SamplingConfig
from mv2v_engine.serving.http.schemas import TurnRequest
from mv2v_engine.serving.work.turn_request import make_camera

DOCS = Path(__file__).resolve().parents[1] / "docs"
README = DOCS.parent / "README.md"


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """A page's blocks of a language, each with its first line's number."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, block.start(1)) + 1, block[1]) for block in found]


def table(page: str, header: str) -> list[list[str]]:
    """The rows below a table's header line."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    first = lines.index(header) + 2
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def run_page(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a page's blocks in order, in a folder; the names that they leave."""
    monkeypatch.chdir(folder)
    for _, commands in blocks(page, "bash"):
        for command in commands.splitlines():
            python, option, module, *words = command.split()
            assert (python, option) == ("python", "-m"), command
            monkeypatch.setattr("sys.argv", [module, *words])
            importlib.import_module(module).main()
    names: dict[str, Any] = {"__name__": page}
    for line, code in blocks(page, "python"):
        # errors then name the page and its line
        exec(compile("\n" * (line - 1) + code, page, "exec"), names)
    return names


def test_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_page("embedding.md", tmp_path, monkeypatch)
    assert [video["turn"] for video in names["second"].report["memory"]["retrieved"]] == [1]
    assert (tmp_path / "second.mp4").stat().st_size > 0
    assert [stage for stage, _ in names["spent"]] == ["text", "memory", "sampling", "vae"]
    assert [turn.number for turn in names["session"].turns] == list(range(1, 7))
    assert names["retrieval"].turns == tuple(
        video["turn"] for video in names["turn"].report["memory"]["retrieved"]
    )


def test_tuning_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_page("tuning-memory.md", tmp_path, monkeypatch)
    few = names["few"]
    assert few.cache.bytes_used == few.video_bytes
    # both turns were remembered, one of them read from the folder
    assert len(names["report"]["memory"]["retrieved"]) == 2
    assert few.cache.counters()["reloads"] > 0 == few.cache.counters()["evictions"]


def test_cameras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file on the page holds the same path, and every option on it is one."""
    text = (DOCS / "cameras.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert len(files) == 9
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    names = run_page("cameras.md", tmp_path, monkeypatch)
    shown = capsys.readouterr()
    assert (tmp_path / "cameras.png").stat().st_size > 10_000 and not shown.err
    assert "its 3 poses were resampled to 17" in shown.out
    first = resolve_camera("camera.json", 3, (96, 160))
    for name in sorted(set(files) - {"cameras.txt", "request.json"}):
        spec = f"{name}#cam01" if name == "extrinsics.json" else name
        camera = resolve_camera(spec, 3, (96, 160))
        torch.testing.assert_close(camera.poses, first.poses, rtol=0, atol=3e-6, msg=spec)
        # 1500 of 1600 pixels are 150 of 160
        has_lens = name not in ("groundtruth.txt", "poses.txt", "extrinsics.json")
        lens = first.intrinsics if has_lens else default_intrinsics(96, 160)
        torch.testing.assert_close(camera.intrinsics, lens, msg=spec)
    own = resolve_camera("own.json", 17, (96, 160))
    assert torch.equal(own.poses, names["camera"].poses)
    assert resolve_camera("poses.npy", 17, (96, 160)).poses[-1].equal(torch.eye(3, 4))
    request = TurnRequest.model_validate_json((tmp_path / "request.json").read_bytes())
    asked = request.to_dict()["camera"]
    sampling = SamplingConfig(
        num_frames=17, size=(96, 160), fps=8.0, num_inference_steps=4, guidance_scale=1.0
    )
    sent = make_camera(asked, sampling)
    assert sent.poses[-1, 0, 3].item() == 0.5 and "resampled" in sent.notes[-1]
    known = {field.name for field in fields(CameraOptions)}
    told = table("cameras.md", "| option | what it does |")
    assert {re.match(r"`(\w+)", row[0])[1] for row in told} == known  # type: ignore[index]


def test_the_errors_are_those_that_there_are() -> None:
    rows = table("embedding.md", "| error | what happened | the session |")
    public = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.MV2VError)
    }
    assert {row[0].strip("`") for row in rows} == public - {"MV2VError", "TrainingError"}


@pytest.mark.parametrize("page", [README, *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_the_readme_stays_one_that_is_read() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    unnamed = [page.name for page in DOCS.glob("*.md") if f"(docs/{page.name})" not in text]
    assert unnamed == []


@pytest.mark.parametrize("package", ["mv2v_engine", "kernels", "profiling", "stress"])
def test_docstrings_say_what_is_done_or_returned(package: str) -> None:
    """Not "Of a turn" nor "As `other`", which say nothing by themselves."""
    found = []
    for path in sorted((DOCS.parent / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = ast.get_docstring(node) or ""
                if words.startswith(("Of ", "As ")):
                    found.append(f"{path.relative_to(DOCS.parent)}: {words.splitlines()[0]}")
    assert not found
