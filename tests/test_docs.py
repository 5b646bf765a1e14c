"""The guides say what is so: their blocks run, their names exist, their links lead somewhere."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from mv2v_engine import errors

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
