"""Sessions that remember by a history encoder: edits and views, on disk and off it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from mv2v_engine import EngineConfig, run
from mv2v_engine.checkpoints.inspect import inspect_checkpoint, render_inspection
from mv2v_engine.config import HistoryConfig
from mv2v_engine.engine import window as windows
from mv2v_engine.engine.denoise import Denoiser
from mv2v_engine.errors import RequestError
from mv2v_engine.models.history import HistoryEncoder
from mv2v_engine.video.io import write_video
from tests.conftest import EDITOR, configured, save_tiny
from tests.engine.editing.conftest import long_clip

HISTORY = HistoryConfig(rates=("2x2x2", "1x1x1"), channels=(4, 4, 8, 8), heads=2)
PROMPT = "a red ball"


@pytest.fixture(scope="module")
def editor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of 5 frames of 32x48: latents of 2x4x6."""
    return save_tiny(tmp_path_factory.mktemp("checkpoint") / "editor", **EDITOR, history=HISTORY)


def test_an_edit_remembers_its_windows_in_time(
    editor_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The history is all windows before, in their order; a resumed edit is the same one."""
    made: list[Denoiser] = []
    make = windows.engine_denoiser

    def noted(*given: Any, **named: Any) -> Denoiser:
        made.append(make(*given, **named))
        return made[-1]

    monkeypatch.setattr(windows, "engine_denoiser", noted)
    encoded: list[Tensor] = []
    append = HistoryEncoder.append

    def counted(self: HistoryEncoder, latents: Tensor, *given: Any) -> Any:
        encoded.append(latents)
        return append(self, latents, *given)

    monkeypatch.setattr(HistoryEncoder, "append", counted)
    clip = tmp_path / "clip.mp4"
    write_video(clip, long_clip(20), 8)
    editor = configured(editor_folder, history="default", history_frames=3)
    turn = editor.session(clip, cuts=()).edit(PROMPT)
    plans = [denoiser.plan for denoiser in made]
    grids = [[s.grid for s in plan.segments[1:]] for plan in plans]
    whole = [(2, 4, 6), (3, 4, 6), (3, 4, 6)]
    assert grids == [[]] + [[(2 * n, 4, 6), whole[n - 1]] for n in (1, 2, 3)]
    tokens, end = made[3].buffers.conditioning.latents
    joined = torch.cat(list(turn.latents[:3]), 1)
    assert torch.equal(end[0], joined[:, -3:])
    # whatever the number of windows and of steps, a window is encoded once
    assert [tuple(part.shape[2:]) for part in encoded] == [(2, 4, 6)] * 3
    encoder = cast(HistoryEncoder, editor.transformer.history_encoders["2x2x2"])
    expected = encoder(joined[None], editor.transformer.patch_embedding).tokens
    torch.testing.assert_close(tokens, expected.detach(), rtol=1e-5, atol=1e-6)
    window = turn.report["windows"][3]
    assert window["plan"]["memory_encoders"] == ["history", "patches"]
    assert {row["encoder"] for row in window["memory"]["retrieved"]} == {"history"}
    assert turn.report["history"] == "2x2x2"
    # other encoders make another edit
    finer = configured(editor_folder, history="1x1x1").session(clip, cuts=()).edit(PROMPT)
    assert not torch.equal(finer.latents[1], turn.latents[1])
    assert torch.equal(finer.latents[0], turn.latents[0])


def test_the_command_line_edits_and_resumes(
    editor_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = tmp_path / "clip.mp4"
    write_video(clip, long_clip(10), 8)
    words = ["edit", str(clip), "--prompt", PROMPT, "--out", str(tmp_path / "out.mp4")]
    words += ["--checkpoint", str(editor_folder), "--device", "cpu", "--history"]
    assert run.main(words) == 0
    report = json.loads((tmp_path / "out.edit" / "report.json").read_text())
    assert "2x2x2" in json.dumps(report)
    assert run.main([*words, "--resume"]) == 0
    capsys.readouterr()
    assert run.main([*words, "1x1x1", "--resume"]) == 2
    assert "history" in capsys.readouterr().err


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_views_remember_turns_with_their_cameras(
    tmp_path: Path, source_frames: Tensor, conditioning: Any
) -> None:
    folder = save_tiny(tmp_path / "views", history=HISTORY)
    config = {"history": "2x2x2", "conditioning": conditioning}
    session = configured(folder, **config).session(source_frames)
    turns = [session.render(camera) for camera in ("pan_left", "arc:-20", "tilt_up")]
    plan = turns[2].report["plan"]
    assert plan["memory_encoders"] == ["history"]
    assert [row["turn"] for row in turns[2].report["memory"]["retrieved"]] != []
    # the cameras of earlier turns are read: the same latents under others give another turn
    other = configured(folder, **config).session(source_frames)
    for turn in turns[:2]:
        other.adopt(turn)
    assert torch.equal(other.render("tilt_up").latents, turns[2].latents)
    moved = configured(folder, **config).session(source_frames)
    moved.adopt(turns[0])
    moved.adopt(replace(turns[1], trajectory=turns[0].trajectory))
    assert not torch.equal(moved.render("tilt_up").latents, turns[2].latents)


def test_what_is_refused(editor_folder: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(RequestError, match=r"tiny has no history encoder, got history='default'"):
        configured(tiny_checkpoint, history="default")
    with pytest.raises(RequestError, match=r"no history encoder but of 2x2x2 and 1x1x1"):
        configured(editor_folder, history="2x2x1")
    with pytest.raises(RequestError, match="ROWSxCOLUMNSxFRAMES"):
        EngineConfig(history="fine")
    with pytest.raises(RequestError, match="history_frames=2 are those of a history"):
        EngineConfig(history_frames=2)
    # before a first turn has been paid for, which remembers nothing yet
    for rate, message in (
        ("4x4x2", "covers 8x8 latent cells, the video has 4x6"),
        ("2x2x4", "covers 4 latent frames, the history has 2"),
    ):
        rates = replace(HISTORY, rates=(rate,))
        folder = save_tiny(tmp_path / rate, **EDITOR, history=rates)
        with pytest.raises(RequestError, match=message):
            configured(folder, history="default")
    # nor is a session begun at a size of the model that is too small for it
    own = editor_folder / "mv2v.json"
    described = json.loads(own.read_text())
    described["sampling"]["sizes"] = [[16, 16]]
    small = tmp_path / "small"
    shutil.copytree(editor_folder, small)
    (small / own.name).write_text(json.dumps(described))
    editor = configured(small, history="default")
    with pytest.raises(RequestError, match="covers 4x4 latent cells, the video has 2x2"):
        editor.session(long_clip(10), cuts=(), size=(16, 16))


def test_latents_of_another_vae_are_no_memory(editor_folder: Path) -> None:
    editor = configured(editor_folder, history="default")
    session = editor.session(long_clip(10), cuts=())
    entry = session._recall.add(1, torch.zeros(editor.latent_shape), None)
    entry.require_key(editor.vae.key)
    with pytest.raises(RequestError, match=r"has latents of the VAE .* this model's is elsewhere"):
        entry.require_key("elsewhere")


def test_inspect_says_what_it_is(editor_folder: Path) -> None:
    found = inspect_checkpoint(editor_folder)
    assert found.problem is None and found.config.history == HISTORY
    assert "history rates ('2x2x2', '1x1x1')" in render_inspection(found)
