"""Files are whole or absent, whatever goes wrong while they are written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mv2v_engine.errors import StorageError
from mv2v_engine.files import replacing, save_json, save_tensors, share_file
from mv2v_engine.testing import largest_file


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".json"
        temporary.write_text("{}")
        assert not path.exists()
    assert path.read_text() == "{}" and _names(path.parent) == ["report.json"]


def test_results_have_ordinary_permissions(tmp_path: Path) -> None:
    plain, ours = tmp_path / "plain", tmp_path / "ours.json"
    plain.write_text("")
    save_json(ours, 1)
    assert ours.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("is_new", [True, False])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException], is_new: bool
) -> None:
    path = tmp_path / "turn.mp4"
    if not is_new:
        path.write_text("old")
    expected = StorageError if error is OSError else error
    with pytest.raises(expected), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert _names(tmp_path) == ([] if is_new else ["turn.mp4"])
    assert is_new or path.read_text() == "old"


def test_the_place_is_named_when_it_cannot_be_written(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    # not a permission, which root ignores: a file where a folder should be
    for path in (blocker / "report.json", blocker / "deep" / "report.json"):
        with pytest.raises(StorageError, match=r"cannot write .*report\.json.*another place"):
            save_json(path, {})
    assert _names(tmp_path) == ["file"]


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out" / "inside").mkdir(parents=True)
    with pytest.raises(StorageError):
        save_json(tmp_path / "out", {})
    assert _names(tmp_path) == ["out"]


def test_an_inner_storage_error_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the inner one"), replacing(tmp_path / "a"):
        raise StorageError("the inner one")


def test_tensors_and_json_come_back(tmp_path: Path) -> None:
    turned = torch.arange(6.0).reshape(2, 3).T
    save_tensors(tmp_path / "a.safetensors", {"x": turned}, {"turn": "1"})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], turned)
    save_json(tmp_path / "a.json", {"prompt": "naïve 夜"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"prompt": "naïve 夜"}
    assert "夜" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    """The limit on a process's file size fails writes midway, as a full disk does."""
    (tmp_path / "old.safetensors").write_bytes(b"old")
    with largest_file(4096):
        with pytest.raises(StorageError, match=r"^cannot write"):
            save_tensors(tmp_path / "old.safetensors", {"x": torch.zeros(100_000)})
        with pytest.raises(StorageError, match=r"^cannot write"):
            save_json(tmp_path / "new.json", "x" * 100_000)
    assert _names(tmp_path) == ["old.safetensors"]
    assert (tmp_path / "old.safetensors").read_bytes() == b"old"


@pytest.mark.parametrize("has_links", [True, False])
def test_a_shared_file_outlives_its_first_place(
    tmp_path: Path, has_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    first, second = tmp_path / "a.json", tmp_path / "deep" / "b.json"
    save_json(first, 1)
    share_file(first, second)
    assert (first.stat().st_ino == second.stat().st_ino) == has_links
    # replaced, not changed in place
    save_json(first, 2)
    assert second.read_text() == "1\n"
    with pytest.raises(FileNotFoundError):
        share_file(tmp_path / "missing", tmp_path / "c.json")
