"""What small weights say of sources and words that they do not know."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mv2v_engine import Engine
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.checkpoints.detect import detect, embedded_folder
from mv2v_engine.checkpoints.resolve import resolve
from mv2v_engine.engine.request import prompt_warnings
from mv2v_engine.engine.source import round_trip_psnr, source_warnings
from mv2v_engine.errors import CheckpointError
from mv2v_engine.synthetic.instructions import vocabulary
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import HELD_OUT, make_world


@pytest.fixture(scope="module")
def tiny_edit() -> Engine:
    return Engine.from_pretrained("tiny-edit", device="cpu")


def noise(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (17, 96, 160, 3), generator=generator, dtype=torch.uint8)


def test_a_world_is_known_and_noise_is_not(tiny_edit: Engine) -> None:
    still = named_trajectory("static", 2, (96, 160))
    frame = render(make_world(HELD_OUT + 7, "plain"), still).frames[0]
    assert source_warnings(tiny_edit.checkpoint, tiny_edit.vae, frame) == ()
    assert round_trip_psnr(tiny_edit.vae, frame) > 28
    (words,) = source_warnings(tiny_edit.checkpoint, tiny_edit.vae, noise()[0])
    reached = round_trip_psnr(tiny_edit.vae, noise()[0])
    assert f"at {reached:.1f} dB" in words and "26.5 dB or more" in words and "tiny-edit" in words


def test_weights_that_say_nothing_know_everything(tiny_edit: Engine) -> None:
    silent = replace(tiny_edit.checkpoint, knowledge=replace(tiny_edit.checkpoint.knowledge))
    object.__setattr__(silent, "knowledge", type(silent.knowledge)())
    assert source_warnings(silent, tiny_edit.vae, noise()[0]) == ()
    assert prompt_warnings(silent, "a banana") == ()


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("make the sphere red", None),
        ("Make the Sphere, RED!", None),
        ("make the banana red", "the word 'banana',"),
        ("turn the sky into Gold", "the words 'sky', 'into', 'Gold',"),
        ("a b c d e f g", "'b', 'c', 'd', 'e', 'f' and 1 more,"),
        ("", None),
        ("!? \U0001f642", None),
        ("make 3 spheres", "'3'"),
        ("the dragon Dragon re\u0301d", "the words 'Dragon', 'r\u00e9d',"),
        ("b" * 300, f"the word '{'b' * 30}',"),
    ],
)
def test_words_that_were_never_read_are_named(
    tiny_edit: Engine, prompt: str, named: str | None
) -> None:
    found = prompt_warnings(tiny_edit.checkpoint, prompt)
    if named is None:
        assert found == ()
    else:
        assert len(found) == 1 and named in found[0]


def test_the_embedded_checkpoints_say_what_they_know() -> None:
    for name, words in (("tiny-nvs", ()), ("tiny-edit", vocabulary())):
        knowledge = resolve(detect(embedded_folder(name))).knowledge
        assert (knowledge.source_psnr, knowledge.words) == (26.5, words)


def test_reports_of_both_tasks_carry_the_warnings(tiny_edit: Engine) -> None:
    session = tiny_edit.session(noise(), cuts=[])
    turn = session.edit("make the banana red", num_inference_steps=1)
    assert [words.split(" ")[0] for words in turn.report["warnings"]] == ["this", "tiny-edit"]
    with Engine.from_pretrained("tiny-nvs", device="cpu") as views:
        turn = views.session(noise()).render("pan_right", num_inference_steps=1)
    (words,) = turn.report["warnings"]
    assert words.startswith("this video is unlike those that tiny-nvs was trained on")


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"source_psnr": "26"}, r"source_psnr is '26'"),
        ({"source_psnr": True}, r"source_psnr is True"),
        ({"words": [1]}, r"no list of words"),
        ({"colours": []}, r"colours"),
        ([], r"does not describe a checkpoint"),
    ],
)
def test_a_wrong_statement_is_refused(tmp_path: Path, said: Any, match: str) -> None:
    for file in embedded_folder("tiny-nvs").glob("*"):
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    about = json.loads((tmp_path / "mv2v.json").read_text())
    (tmp_path / "mv2v.json").write_text(json.dumps(about | {"knowledge": said}))
    with pytest.raises(CheckpointError, match=match):
        resolve(detect(tmp_path))
