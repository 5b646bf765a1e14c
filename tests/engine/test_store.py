"""A session's folder: it goes on bit for bit, or says why it cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.engine.store import SessionStore
from mv2v_engine.errors import RequestError, StorageError

CAMERAS = ("pan_right", "arc_left", "pan_right")


@pytest.fixture
def folder(tmp_path: Path, engine: Engine, source_frames: Tensor) -> Path:
    """A session of two turns."""
    session = engine.session(source_frames, store=tmp_path / "out")
    for camera in CAMERAS[:2]:
        session.render(camera)
    return tmp_path / "out"


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "session.json").read_text())
    edit(manifest)
    (folder / "session.json").write_text(json.dumps(manifest))


def test_a_resumed_session_goes_on_bit_for_bit(
    folder: Path, tiny_checkpoint: Path, engine: Engine, source_frames: Tensor
) -> None:
    unbroken = engine.session(source_frames)
    expected = [unbroken.render(camera) for camera in CAMERAS]
    fresh = Engine.from_pretrained(tiny_checkpoint, device="cpu")
    session = fresh.session(source_frames, store=folder, resume=True)
    assert [turn.trajectory.name for turn in session.turns] == list(CAMERAS[:2])
    session.render(CAMERAS[2])
    for turn, other in zip(session.turns, expected, strict=True):
        assert torch.equal(turn.latents, other.latents)
        assert torch.equal(turn.frames, other.frames)
        assert torch.equal(turn.trajectory.poses, other.trajectory.poses)
    reports = [turn.report["memory"]["retrieved"] for turn in session.turns]
    assert [[row["turn"] for row in report] for report in reports] == [[], [1], [1, 2]]
    again = fresh.session(source_frames, store=folder, resume=True)
    assert again.id == session.id and len(again.turns) == 3
    assert again.turns[2].report == session.turns[2].report


def test_a_folder_is_not_taken_over(folder: Path, engine: Engine, source_frames: Tensor) -> None:
    with pytest.raises(StorageError, match="already holds a session; resume it"):
        engine.session(source_frames, store=folder)
    with pytest.raises(StorageError, match="holds no session; start one"):
        engine.session(source_frames, store=folder / "none", resume=True)
    with pytest.raises(RequestError, match="give a store"):
        engine.session(source_frames, resume=True)


def test_other_input_does_not_go_on(
    folder: Path,
    engine: Engine,
    source_frames: Tensor,
    tmp_path: Path,
    make_checkpoint: Callable[..., Path],
) -> None:
    before = (folder / "session.json").read_bytes()
    with pytest.raises(StorageError, match=r"whose source is .* give the same input"):
        engine.session(255 - source_frames, store=folder, resume=True)
    camera = named_trajectory("zoom_in", 9, (48, 64))
    with pytest.raises(StorageError, match="source camera is 'static', this one's is 'zoom_in'"):
        engine.session(source_frames, cameras=camera, store=folder, resume=True)
    other = Engine.from_pretrained(make_checkpoint(tmp_path / "c", name="other"), device="cpu")
    with pytest.raises(StorageError, match="checkpoint is 'tiny', this one's is 'other'"):
        other.session(source_frames, store=folder, resume=True)
    vae = {"latents_std": [0.5] * 16}
    other = Engine.from_pretrained(make_checkpoint(tmp_path / "v", vae=vae), device="cpu")
    with pytest.raises(StorageError, match="whose vae is"):
        other.session(source_frames, store=folder, resume=True)
    assert (folder / "session.json").read_bytes() == before


DAMAGE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda m: m.update(format="other"), "is no session of this engine"),
    (lambda m: m.update(version=9), "has version 9, this engine reads 1"),
    (lambda m: m.pop("turns"), "turns must be a list"),
    (lambda m: m.update(identity=None), "identity must be a dict"),
    (lambda m: m["turns"][0].pop("camera"), "turns cannot be read"),
    (lambda m: m["turns"][0].update(size=[48]), "turns cannot be read"),
    (lambda m: m["turns"].append(3), "turns cannot be read"),
]


@pytest.mark.parametrize(("edit", "words"), DAMAGE)
def test_a_damaged_manifest(
    folder: Path,
    engine: Engine,
    source_frames: Tensor,
    edit: Callable[[dict[str, Any]], None],
    words: str,
) -> None:
    change(folder, edit)
    with pytest.raises(StorageError, match=words):
        engine.session(source_frames, store=folder, resume=True)


def test_damaged_turns(folder: Path, engine: Engine, source_frames: Tensor) -> None:
    _, second = sorted((folder / "turns").iterdir())
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(StorageError, match=r"turns cannot be read .*; start again in another"):
        engine.session(source_frames, store=folder, resume=True)
    second.unlink()
    with pytest.raises(StorageError, match="turns cannot be read"):
        engine.session(source_frames, store=folder, resume=True)
    shutil.copy(folder / "session.json", second)
    with pytest.raises(StorageError, match="turns cannot be read"):
        engine.session(source_frames, store=folder, resume=True)
    (folder / "session.json").write_text("{")
    with pytest.raises(StorageError, match=r"session\.json cannot be read"):
        engine.session(source_frames, store=folder, resume=True)


def test_a_turned_bit_and_a_list_without_digests(
    folder: Path, engine: Engine, source_frames: Tensor
) -> None:
    first, _ = sorted((folder / "turns").iterdir())
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    with pytest.raises(StorageError, match=r"turns cannot be read .*other bits than were stored"):
        engine.session(source_frames, store=folder, resume=True)
    # as an engine of before digests wrote it
    change(folder, lambda manifest: [row.pop("sha256") for row in manifest["turns"]])
    assert len(engine.session(source_frames, store=folder, resume=True).turns) == 2


def test_a_branch_begins_with_the_same_memory(
    folder: Path, engine: Engine, source_frames: Tensor, tmp_path: Path
) -> None:
    store, other = SessionStore(folder), tmp_path / "branch"
    store.branch(other, id="branch", count=1)
    session = engine.view_session(source_frames, store=other, resume=True)
    assert session.id == "branch" and len(session.turns) == 1
    turn = session.render("arc_left", num_inference_steps=1)
    assert turn.number == 2
    assert [row["turn"] for row in turn.report["memory"]["retrieved"]] == [1]
    assert SessionStore(other).listed_files() == set((other / "turns").iterdir())
    # the session that it came from is as it was
    assert len(store.read()["turns"]) == 2
    with pytest.raises(StorageError, match="holds 2 turns, asked were 3"):
        store.branch(tmp_path / "more", id="more", count=3)
