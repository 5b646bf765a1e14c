"""Files are whole or absent, whatever goes wrong while they are written."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mv2v_engine.errors import StorageError
from mv2v_engine.files import make_folder, move, replacing, save_json, save_tensors, share_file
from mv2v_engine.testing import largest_file
from mv2v_engine.video.io import write_video


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
    for kind, write in WRITERS.items():
        for folder in (blocker, blocker / "deep"):
            with pytest.raises(StorageError, match=rf"cannot write .*a\.{kind}.*another place"):
                write(folder / f"a.{kind}")
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
        with pytest.raises(StorageError, match=r"^cannot write") as tensors:
            save_tensors(tmp_path / "old.safetensors", {"x": torch.zeros(100_000)})
        with pytest.raises(StorageError, match=r"^cannot write") as text:
            save_json(tmp_path / "new.json", "x" * 100_000)
    for caught in (tensors, text):
        cause = caught.value.__cause__
        assert isinstance(cause, OSError) and cause.errno == errno.EFBIG
    assert _names(tmp_path) == ["old.safetensors"]
    assert (tmp_path / "old.safetensors").read_bytes() == b"old"


@pytest.fixture(params=[True, False], ids=["links", "no links"])
def has_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    if not request.param:
        monkeypatch.setattr(os, "link", refuse)
    return bool(request.param)


def test_a_shared_file_outlives_its_first_place(tmp_path: Path, has_links: bool) -> None:
    first, second = tmp_path / "a.json", tmp_path / "deep" / "b.json"
    save_json(first, 1)
    share_file(first, second)
    assert (first.stat().st_ino == second.stat().st_ino) == has_links
    # replaced, not changed in place
    save_json(first, 2)
    assert second.read_text() == "1\n"
    with pytest.raises(FileNotFoundError):
        share_file(tmp_path / "missing", tmp_path / "c.json")


class Disk:
    """What is flushed in a test, in order, and which of the watched paths were there by then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.events: list[tuple[Path, bool]] = []
        self.failing: Callable[[Path], bool] = lambda _: False
        self.errno = errno.EIO
        fsync = os.fsync

        def watched(file: int) -> None:
            place = Path(os.readlink(f"/proc/self/fd/{file}"))
            self.events.append((place, path.exists()))
            if self.failing(place):
                raise OSError(self.errno, os.strerror(self.errno))
            fsync(file)

        monkeypatch.setattr(os, "fsync", watched)

    @property
    def places(self) -> list[Path]:
        return [place for place, _ in self.events]


WRITERS: dict[str, Callable[[Path], None]] = {
    "json": lambda path: save_json(path, {"a": 1}),
    "tensors": lambda path: save_tensors(path, {"x": torch.zeros(3)}),
    "mp4": lambda path: write_video(path, torch.zeros(2, 32, 32, 3, dtype=torch.uint8), 8),
}
on_linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")


@on_linux
@pytest.mark.parametrize("writer", WRITERS)
def test_bytes_are_on_the_disk_before_their_name_and_the_name_before_the_end(
    tmp_path: Path, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "deep" / f"a.{writer}"
    disk = Disk(monkeypatch, path)
    WRITERS[writer](path)
    # the folders that are new, the bytes under their temporary name, the name
    folders, bytes_first, name_last = disk.places[:2], disk.events[2], disk.events[3]
    assert folders == [tmp_path, tmp_path / "new"] and len(disk.events) == 4
    assert bytes_first[0].parent == path.parent and bytes_first[0].name.startswith(".a-")
    assert not bytes_first[1] and name_last == (path.parent, True)


@on_linux
@pytest.mark.usefixtures("has_links")
def test_a_shared_file_and_a_moved_one_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "a.json", tmp_path / "deep" / "b.json"
    save_json(first, 1)
    disk = Disk(monkeypatch, second)
    share_file(first, second)
    assert tmp_path in disk.places and disk.events[-1] == (second.parent, True)
    assert any(place.suffix == ".json" for place in disk.places)
    other = tmp_path / "other"
    make_folder(other)
    move(second, other / "c.json")
    assert disk.places[-1] == other and (other / "c.json").read_text() == "1\n"


@on_linux
@pytest.mark.parametrize("what", ["bytes", "name"])
def test_a_disk_that_does_not_take_it_is_one_clear_error(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    save_json(path, "old")
    disk = Disk(monkeypatch, path)
    disk.failing = lambda place: (place == tmp_path) == (what == "name")
    with pytest.raises(StorageError, match=r"cannot write .*a\.json: Input/output error"):
        save_json(path, "new")
    assert _names(tmp_path) == ["a.json"]
    assert json.loads(path.read_text()) == ("old" if what == "bytes" else "new")
    # a file system that knows no flushing of folders is none that fails
    disk.errno = errno.EINVAL
    if what == "name":
        save_json(path, "newer")
        assert json.loads(path.read_text()) == "newer"
