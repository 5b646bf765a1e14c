"""Turns of few steps: set by a preset, refused where it does not fit, and the seed's alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine import run
from mv2v_engine.engine.batch import TOKENS
from mv2v_engine.engine.request import Request
from mv2v_engine.errors import RequestError
from mv2v_engine.serving.work.host import Host
from mv2v_engine.serving.work.turn_request import make_request
from mv2v_engine.testing import relative_error
from tests.conftest import configured

PRESETS = [("lightx2v", "lightx2v", 4), ("fastwan", "dmd", 3), ("turbo", "rcm", 4)]


@pytest.mark.parametrize(("fast", "scheduler", "steps"), PRESETS)
def test_a_preset_sets_all_of_it(
    worded_checkpoint: Path, source_frames: Tensor, fast: str, scheduler: str, steps: int
) -> None:
    engine = configured(worded_checkpoint, fast=fast)
    first, second = (engine.session(source_frames) for _ in range(2))
    turn = first.render("pan_right", seed=3)
    report = turn.report
    assert (report["scheduler"], report["fast"]) == (scheduler, fast)
    assert (report["num_inference_steps"], report["guidance_scale"]) == (steps, 1)
    assert report["forwards"] == steps
    # weights that nothing says are distilled
    assert any(scheduler in words for words in report["approximations"])
    # the same seed gives the same bits, beside other turns in between
    second.render("tilt_up", seed=9)
    third = engine.session(source_frames)
    assert torch.equal(third.render("pan_right", seed=3).latents, turn.latents)
    assert not torch.equal(third.render("pan_right", seed=4).latents, turn.latents)
    with pytest.raises(RequestError, match=f"scheduler {scheduler} has a table for"):
        first.render("pan_right", num_inference_steps=8)
    with pytest.raises(RequestError, match="distilled with guidance inside"):
        first.render("pan_right", guidance_scale=3.0)
    assert [turn.number for turn in first.turns] == [1]


@pytest.mark.parametrize(("fast", "scheduler", "steps"), PRESETS)
def test_packed_turns_are_what_they_are_alone(
    tiny_checkpoint: Path, source_frames: Tensor, fast: str, scheduler: str, steps: int
) -> None:
    engine = configured(tiny_checkpoint, fast=fast, batch_tokens=TOKENS)

    def request(camera: str, seed: int) -> Request:
        return Request.view(camera, engine.sampling, memory="none", seed=seed)

    asked = [request("pan_right", 1), request("arc_left", 2), request("pan_right", 1)]
    sessions = [engine.session(source_frames) for _ in asked]
    results = engine.answer_all(list(zip(sessions, asked, strict=True)))
    for result, one in zip(results, asked, strict=True):
        assert not isinstance(result, Exception) and result.report["packed_steps"] == steps
        alone = engine.session(source_frames).ask(one)
        # sums in another order, whose errors the noise does not grow
        assert relative_error(result.latents, alone.latents) < 1e-4


def test_windows_of_an_edit_have_noise_of_their_own(
    tmp_path: Path, editor_folder: Path, long_clip: Path
) -> None:
    words = ["edit", str(long_clip), "--prompt", "a red ball", "--device", "cpu", "--quiet"]
    words += ["--checkpoint", str(editor_folder), "--fast", "fastwan"]
    edits = [tmp_path / name / "edited.mp4" for name in ("one", "other")]
    for place in edits:
        assert run.main([*words, "--out", str(place)]) == 0
    assert edits[0].read_bytes() == edits[1].read_bytes()


def test_warming_up_takes_what_the_table_has(tiny_checkpoint: Path, source_frames: Tensor) -> None:
    engine = configured(tiny_checkpoint, fast="turbo")
    session = engine.session(source_frames)
    plan = session.plan_turn(Request.view("pan_right", engine.sampling, memory="none"))[1]
    assert len(engine.warmup([plan])) == 1


def test_a_service_refuses_at_the_door(tiny_checkpoint: Path, tmp_path: Path) -> None:
    host = Host(configured(tiny_checkpoint, fast="lightx2v"), max_open=1)
    host.warm_up()
    about = json.loads(json.dumps(host.about))
    assert make_request({"camera": "pan_right"}, about).num_inference_steps == 4
    with pytest.raises(RequestError, match="lightx2v has a table for 4 steps"):
        make_request({"camera": "pan_right", "num_inference_steps": 10}, about)


def test_the_command_line(
    tmp_path: Path, tiny_checkpoint: Path, source_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["novel-view", str(source_clip), "--camera", "pan_right", "--device", "cpu", "--quiet"]
    words += ["--checkpoint", str(tiny_checkpoint), "--out", str(out), "--fast", "turbo"]
    for more, message in (
        (["--steps", "8"], "scheduler rcm has a table for 1 or 2 or 3 or 4 steps"),
        (["--guidance", "5"], "got --guidance 5; use 1: --fast turbo sets both if they are left"),
        (["--scheduler", "unipc"], "--fast turbo samples with rcm, got --scheduler unipc"),
    ):
        assert run.main([*words, *more]) == 2
        assert message in capsys.readouterr().err and not out.exists()
    assert run.main([*words, "--steps", "2"]) == 0
    assert '"scheduler": "rcm"' in (out / "report.json").read_text()
