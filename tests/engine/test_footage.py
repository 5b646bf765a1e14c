"""What a session holds of its turns: no more for its hundredth than for its first."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.engine.results import ViewResults
from mv2v_engine.errors import RequestError, StorageError
from tests.conftest import configured

CAMERAS = ("pan_right", "arc_left", "pan:8", "tilt_up", "pan:-8")
VIDEO, FRAMES = 16 * 3 * 6 * 8 * 4, 9 * 48 * 64 * 3


def videos_in_memory() -> int:
    """Tensors of a turn's latents anywhere in this process, each storage once."""
    gc.collect()
    found = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
    shaped = [one for one in found if tuple(one.shape) == (16, 3, 6, 8) and not one.is_meta]
    return len({one.untyped_storage().data_ptr() for one in shaped})


def test_frames_stay_within_a_budget_and_decode_again_to_the_same_bits(
    tiny_checkpoint: Path, source_frames: Tensor
) -> None:
    engine = configured(tiny_checkpoint, frames_bytes=2 * FRAMES + 1)
    sessions = [engine.session(source_frames) for _ in range(2)]
    expected = []
    for session in sessions:
        for camera in CAMERAS[:2]:
            turn = session.render(camera, num_inference_steps=1)
            expected.append(turn.frames.clone())
            assert engine.recent_frames.bytes_used <= 2 * FRAMES
    turns = [turn for session in sessions for turn in session.turns]
    assert [turn.footage.held_frames is not None for turn in turns] == [False, False, True, True]
    assert torch.equal(turns[0].frames, expected[0])
    # that was use, so the least recently used made room
    assert [turn.footage.held_frames is not None for turn in turns] == [True, False, False, True]
    assert all(torch.equal(one.frames, other) for one, other in zip(turns, expected, strict=True))
    del sessions, session, turn, turns
    gc.collect()
    assert engine.recent_frames.bytes_used == 0


def test_the_turn_used_last_holds_its_frames_whatever_the_budget(
    tiny_checkpoint: Path, source_frames: Tensor
) -> None:
    engine = configured(tiny_checkpoint, frames_bytes=0)
    session = engine.session(source_frames)
    first = session.render("pan_right", num_inference_steps=1)
    assert first.frames is first.frames
    session.render("arc_left", num_inference_steps=1)
    assert first.footage.held_frames is None and engine.recent_frames.bytes_used == FRAMES
    with pytest.raises(RequestError, match="frames_bytes must be at least 0"):
        EngineConfig(frames_bytes=-1)


@pytest.mark.parametrize("has_folder", [True, False])
def test_latents_lie_in_the_folder_and_not_in_memory(
    tiny_checkpoint: Path, source_frames: Tensor, tmp_path: Path, has_folder: bool
) -> None:
    before = videos_in_memory()
    engine = configured(tiny_checkpoint, cache_bytes=VIDEO)
    store = tmp_path / "s" if has_folder else None
    session = engine.session(source_frames, store=store)
    digests = []
    for camera in CAMERAS:
        turn = session.render(camera, num_inference_steps=1)
        digests.append(turn.latents.sum())
    # the source's, and the one that the cache has room for
    assert videos_in_memory() - before == (2 if has_folder else 1 + len(CAMERAS))
    assert [turn.latents.sum() for turn in session.turns] == digests
    if store is None:
        return
    del session, turn
    resumed = engine.session(source_frames, store=store, resume=True)
    assert videos_in_memory() - before == 1
    assert [turn.latents.sum() for turn in resumed.turns] == digests
    # all of them are remembered all the same
    report = resumed.render("pan_left", num_inference_steps=1).report
    assert len(report["memory"]["retrieved"]) == len(CAMERAS)
    path = store / "turns" / "turn_02.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"turn_02\.safetensors cannot be read again"):
        _ = resumed.turns[1].latents


def test_sessions_that_are_dropped_leave_no_memory(engine: Engine, source_frames: Tensor) -> None:
    session = engine.session(source_frames, id="s")
    session.render("pan_right", num_inference_steps=1)
    kept = engine.session(source_frames, id="kept")
    kept.render("pan_right", num_inference_steps=1)
    assert engine.cache.ids() == ("s/1", "kept/1")
    del session
    assert engine.cache.ids() == ("kept/1",)
    # another session of that name remembers its own turns alone, whenever the first one goes
    other = engine.session(source_frames, id="kept")
    assert other.render("tilt_up", num_inference_steps=1).report["memory"]["num_candidates"] == 0
    kept.close()
    del kept
    assert engine.cache.ids() == ("kept/1",)
    report = other.render("pan_right", num_inference_steps=1).report
    assert [row["turn"] for row in report["memory"]["retrieved"]] == [1]


def test_publishing_decodes_nothing_again(
    engine: Engine, source_frames: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    decode = engine.vae.decode
    monkeypatch.setattr(engine.vae, "decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    engine.recent_frames.capacity_bytes = 0
    results = ViewResults(tmp_path / "out")
    session = engine.session(source_frames, store=tmp_path / "out")
    pictures = []
    for camera in CAMERAS[:3]:
        session.render(camera, num_inference_steps=1)
        results.publish(session, version="0")
        pictures.append(results.overview.read_bytes())
    assert len(calls) == 3
    # from the folder alone it is the same picture
    session.close()
    session = engine.session(source_frames, store=tmp_path / "out", resume=True)
    ViewResults(tmp_path / "out").publish(session, version="0")
    assert results.overview.read_bytes() == pictures[2] != pictures[1]
