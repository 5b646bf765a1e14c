"""Notebooks run from their first cell to their last, and show what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="the extra [dev] is not installed")
    nbclient = pytest.importorskip("nbclient", reason="the extra [dev] is not installed")
    pytest.importorskip("ipykernel", reason="the extra [dev] is not installed")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in codes), "strip its outputs"
    paths = [str(ROOT), str(ROOT / "kernels")]
    monkeypatch.setenv("PYTHONPATH", ":".join(paths), prepend=":")
    # several threads that wait for each other by turning burn seventy times what the work takes on
    # a machine whose cores are busy
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown: list[Any] = [output for cell in codes for output in cell.outputs if "data" in output]
    pages = "".join(output["data"].get("text/html", "") for output in shown)
    assert pages.count("data:video/mp4;base64,") == 2, "a turn, and all side by side"
    assert pages.count("data:image/png;base64,") == 4, "a session: its source and three turns"
    assert any("image/png" in output["data"] for output in shown), "the plot"
    assert (tmp_path / "third.mp4").stat().st_size > 0
