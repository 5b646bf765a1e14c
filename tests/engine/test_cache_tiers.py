"""Sessions over a cache of tiers: the same turns, more of them remembered, and damage is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine, EngineConfig, Session
from mv2v_engine.errors import MemoryBudgetError, RequestError

CAMERAS = ("pan_right", "arc_left", "pan_right", "pan:8")
VIDEO = 16 * 3 * 6 * 8 * 4


def tiered(checkpoint: Path, device_videos: int, host_videos: int) -> Engine:
    config = EngineConfig(
        cache_bytes=(device_videos + host_videos) * VIDEO,
        device_cache_bytes=device_videos * VIDEO,
    )
    return Engine.from_pretrained(checkpoint, device="cpu", config=config)


def remembered(session: Session) -> list[list[int]]:
    rows = [turn.report["memory"]["retrieved"] for turn in session.turns]
    return [[row["turn"] for row in row] for row in rows]


def test_turns_are_those_of_a_cache_without_tiers(
    tiny_checkpoint: Path, engine: Engine, source_frames: Tensor, tmp_path: Path
) -> None:
    plain = engine.session(source_frames)
    small = tiered(tiny_checkpoint, 1, 1)
    session = small.session(source_frames, id="s", store=tmp_path / "s")
    for camera in CAMERAS:
        expected, turn = plain.render(camera), session.render(camera)
        assert torch.equal(turn.latents, expected.latents)
        assert small.cache.bytes_used <= 2 * VIDEO
    assert remembered(session) == remembered(plain)
    assert len(remembered(session)[3]) == 3  # two of them do not fit into memory
    report = session.turns[3].report
    assert report["cache_bytes_by_tier"] == {"device": VIDEO, "host": VIDEO}
    assert json.loads(json.dumps(report)) == report
    # another process opens the folder with as little memory, and knows as much
    session.close()
    again = tiered(tiny_checkpoint, 1, 0).session(source_frames, store=tmp_path / "s", resume=True)
    assert torch.equal(again.render("tilt_up").latents, plain.render("tilt_up").latents)
    assert not small.cache._pins


def test_a_turn_that_disk_lost_is_said_and_left_out(
    tiny_checkpoint: Path, source_frames: Tensor, tmp_path: Path
) -> None:
    engine = tiered(tiny_checkpoint, 1, 0)
    session = engine.session(source_frames, id="s", store=tmp_path / "s")
    for camera in CAMERAS[:3]:
        session.render(camera)
    one, two, _ = sorted((tmp_path / "s" / "turns").iterdir())
    content = bytearray(one.read_bytes())
    content[-1] ^= 1  # well-formed, with one bit of the latents or the camera turned
    one.write_bytes(content)
    two.unlink()
    turn = session.render(CAMERAS[3])
    memory = turn.report["memory"]
    assert [row["turn"] for row in memory["retrieved"]] == [3]
    assert set(memory["lost"]) == {"s/1", "s/2"} and memory["num_candidates"] == 1
    assert "turn_01.safetensors holds other bits than were stored" in memory["lost"]["s/1"]
    assert "turn_02.safetensors cannot be read again" in memory["lost"]["s/2"]
    assert "lost" not in session.render("tilt_up").report["memory"]
    # what they would have been without the lost turns
    other = engine.session(source_frames)
    other.adopt(dataclasses.replace(session.turns[2], number=1))
    assert torch.equal(other.render(CAMERAS[3]).latents, turn.latents)


def test_a_running_sessions_turns_stay_near(tiny_checkpoint: Path, source_frames: Tensor) -> None:
    engine = tiered(tiny_checkpoint, 2, 2)
    running = engine.session(source_frames, id="running")
    running.render("pan_right")
    events = running.events(running.request("arc_left"))
    next(events)
    others = [engine.session(source_frames, id=f"other{number}") for number in range(4)]
    for other in others[:3]:
        other.render("tilt_up")
    assert engine.cache.tier_of("running/1") == "device"
    events.close()
    assert not engine.cache._pins
    # nobody's now, and the least recently used
    others[3].render("tilt_up")
    assert "running/1" not in engine.cache


def test_budgets_of_tiers(tiny_checkpoint: Path) -> None:
    with pytest.raises(RequestError, match=r"give 0\.\.10 or raise cache_bytes, got 11"):
        EngineConfig(cache_bytes=10, device_cache_bytes=11)
    with pytest.raises(RequestError, match="device_cache_bytes must be at least 0, got -1"):
        EngineConfig(device_cache_bytes=-1)
    config = EngineConfig(device_cache_bytes=VIDEO - 1)
    with pytest.raises(MemoryBudgetError, match=r"9,216 bytes .*device_cache_bytes allows 9,215"):
        Engine.from_pretrained(tiny_checkpoint, device="cpu", config=config)
