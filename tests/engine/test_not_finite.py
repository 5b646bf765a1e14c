"""Numbers that are not finite end a turn by name; nothing of it is stored or remembered."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.config import SamplingConfig
from mv2v_engine.engine.batch import TOKENS
from mv2v_engine.engine.folder import SessionFolder
from mv2v_engine.engine.request import Request
from mv2v_engine.engine.session import Session
from mv2v_engine.errors import NotFiniteError, RequestError, StorageError
from mv2v_engine.evaluation.fifo import edit_fifo
from mv2v_engine.files import save_tensors, tensor_digest
from mv2v_engine.progress import StageStarted
from tests.engine.graphed_turns import Asked, StandInTurns, steps
from tests.folders import contents

CAMERAS = ("pan_right", "arc_left", "tilt_up")
BAD = (math.nan, math.inf)
SETTINGS: dict[str, dict[str, Any]] = {
    "joint": {},
    "static": {"conditioning": "static", "merge": "off"},
    "step cache": {"step_cache": 0.2},
    "UniPC": {"scheduler": "unipc"},
}


@contextmanager
def one_bad(weight: Tensor, value: float = math.nan) -> Iterator[None]:
    """One number of a weight is not finite for as long as the block runs."""
    flat = weight.data.view(-1)
    whole = flat[0].clone()
    flat[0] = value
    try:
        yield
    finally:
        flat[0] = whole


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("conditioning", ["joint", "static"])
@pytest.mark.parametrize("when", [0, 2, 4])
def test_the_first_bad_step_is_named(when: int, conditioning: str, solver: str, bad: float) -> None:
    """Steps are eager or captured; captured ones count within the capture."""
    turns = StandInTurns()
    plan, asked = turns.plan(conditioning), Asked(1, 5, 3.0, solver)
    turns.run(plan, asked, turns.graphs)
    for graphs in (None, turns.graphs):
        denoiser = turns.denoiser(plan, asked, graphs)
        while not denoiser.is_finished:
            if denoiser.index == when:
                denoiser.latents.view(-1)[7] = bad
            denoiser.step()
        with pytest.raises(
            NotFiniteError, match=rf"^step {when + 1} of 5 gave .*guidance_scale 3 "
        ):
            denoiser.result()
        if graphs is not None:
            filling = int(conditioning == "static")
            assert steps(denoiser.graph_report()) == (filling, 0, 5 - filling)
        denoiser.release()
    # what captured steps share carries nothing over
    turns.check(plan, asked)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_less_guidance_is_advised_where_it_can_help(scale: float) -> None:
    turns = StandInTurns()
    denoiser = turns.denoiser(turns.plan("joint"), Asked(1, 2, scale, "euler"), None)
    denoiser.latents.view(-1)[7] = math.nan
    while not denoiser.is_finished:
        denoiser.step()
    with pytest.raises(NotFiniteError) as raised:
        denoiser.result()
    assert ("guidance" in str(raised.value)) == (scale > 1)
    assert "look for damaged weights" in str(raised.value)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("folder", [True, False], ids=["folder", "no folder"])
def test_a_turn_that_is_not_finite_was_never_made(
    engine: Engine, source_frames: Tensor, tmp_path: Path, name: str, folder: bool
) -> None:
    engine = engine.reconfigured(EngineConfig(**SETTINGS[name]))
    unbroken = engine.session(source_frames)
    expected = [unbroken.render(camera) for camera in CAMERAS]
    session = engine.session(source_frames, store=tmp_path if folder else None)
    session.render(CAMERAS[0])
    before, held, stages = contents(tmp_path), engine.cache.ids(), []
    with (
        one_bad(engine.transformer.proj_out.weight),
        pytest.raises(NotFiniteError, match=r"^step 1 of 3 gave .*turn 2 is dropped"),
    ):
        session.render(CAMERAS[1], on_progress=lambda event: stages.append(event))
    assert [e.stage for e in stages if isinstance(e, StageStarted)][-1] == "sampling"
    assert contents(tmp_path) == before and engine.cache.ids() == held
    assert len(session.turns) == 1 and not session.unstored
    # healed: as if nothing had been
    for camera in CAMERAS[1:]:
        session.render(camera)
    for turn, other in zip(session.turns, expected, strict=True):
        assert torch.equal(turn.latents, other.latents) and torch.equal(turn.frames, other.frames)


@pytest.mark.parametrize("part", ["encoder", "decoder", "text"])
def test_the_part_that_overflows_is_named(
    worded_checkpoint: Path, source_frames: Tensor, tmp_path: Path, part: str
) -> None:
    engine = Engine.from_pretrained(worded_checkpoint, device="cpu")
    assert engine.text is not None
    weights, words = {
        "encoder": (
            engine.vae.model.encoder.conv_out.weight,
            "latents that the VAE made of the so",
        ),
        "decoder": (
            engine.vae.model.decoder.conv_out.weight,
            "frames that the VAE made of the lat",
        ),
        "text": (
            engine.text.model.encoder.final_layer_norm.weight,
            "numbers for the prompt 'a red ",
        ),
    }[part]
    session = engine.session(source_frames, store=tmp_path)
    before = contents(tmp_path)
    with (
        one_bad(weights, math.inf),
        pytest.raises(NotFiniteError, match=rf"{words}.*turn 1 is dro"),
    ):
        session.render("pan_right", prompt="a red ball")
    assert contents(tmp_path) == before and not session.turns and not len(engine.cache)
    turn = session.render("pan_right", prompt="a red ball")
    other = Engine.from_pretrained(worded_checkpoint, device="cpu").session(source_frames)
    assert torch.equal(turn.frames, other.render("pan_right", prompt="a red ball").frames)


def test_one_turn_of_a_batch_fails_alone(tiny_checkpoint: Path, source_frames: Tensor) -> None:
    config = EngineConfig(batch_tokens=TOKENS)
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", config=config)

    def batch(bad: int | None) -> list[Any]:
        sessions = [engine.session(source_frames) for _ in CAMERAS]
        for session in sessions:
            session.render("static", num_inference_steps=1)
        if bad is not None:
            damaged = sessions[bad]._runner.source_latents
            assert damaged is not None
            sessions[bad]._runner.source_latents = torch.full_like(damaged, math.nan)
        asked = [
            Request.view(camera, engine.sampling, memory="retrieved", seed=number)
            for number, camera in enumerate(CAMERAS)
        ]
        results = engine.answer_all(list(zip(sessions, asked, strict=True)))
        assert [len(session.turns) for session in sessions] == [2 - (n == bad) for n in range(3)]
        return results

    expected = batch(None)
    for bad in range(3):
        for number, result in enumerate(batch(bad)):
            if number == bad:
                assert isinstance(result, NotFiniteError) and "step 1 of 3" in str(result)
            else:
                assert torch.equal(result.latents, expected[number].latents)


def test_an_edit_keeps_the_windows_before(
    editor_folder: Path, long_clip: Path, tmp_path: Path
) -> None:
    engine = Engine.from_pretrained(editor_folder, device="cpu")
    expected = engine.session(long_clip, cuts=()).edit("a red ball")
    session = engine.session(long_clip, cuts=(), store=tmp_path)
    weight, finished = engine.transformer.proj_out.weight, []

    def spoil(window: Any) -> None:
        finished.append(contents(tmp_path))
        if len(finished) == 2:
            weight.data.view(-1)[0] = math.nan

    whole = weight.data.clone()
    with pytest.raises(NotFiniteError, match=r"step 1 of 2 gave .*window 3 is dropped, finished"):
        session.edit("a red ball", on_window=spoil)
    assert contents(tmp_path) == finished[-1] and session.unfinished[0][1] == 2
    weight.data.copy_(whole)
    assert torch.equal(session.edit("a red ball").latents, expected.latents)


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_fifo_edit_names_its_iteration(
    editor_folder: Path, long_clip: Path, lookahead: bool
) -> None:
    engine = Engine.from_pretrained(editor_folder, device="cpu")
    frames = engine.session(long_clip, cuts=()).source.window(
        engine.session(long_clip, cuts=()).windows[0]
    )
    with (
        one_bad(engine.transformer.proj_out.weight),
        pytest.raises(
            NotFiniteError, match=r"^iteration 1 of \d+ gave latents that are not finite"
        ),
    ):
        edit_fifo(engine, frames, "a red ball", lookahead=lookahead)
    with pytest.raises(RequestError, match="guidance_scale must lie in"):
        edit_fifo(engine, frames, "a red ball", guidance_scale=1e38)


def poison(store: SessionFolder, number: int, bad: float, *, is_old: bool) -> None:
    """What an engine that did not check would have stored, digest and all."""
    manifest = store.read()
    row = next(row for row in manifest["turns"] if row["number"] == number)
    tensors, _ = store._tensors(row, 1, row["windows"][0])
    tensors["latents"].view(-1)[3] = bad
    save_tensors(store.window_path(row, 1), tensors)
    row["windows"] = [tensor_digest(*tensors.values())]
    if is_old:
        del row["camera"]["poses"], row["camera"]["intrinsics"]
    store.write(manifest)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("is_old", [True, False])
def test_a_stored_turn_that_is_not_finite_is_lost_alone(
    engine: Engine, source_frames: Tensor, tmp_path: Path, bad: float, is_old: bool
) -> None:
    """Whether its list has a copy of its camera or not, which is good in the file."""
    session = engine.session(source_frames, store=tmp_path)
    for camera in CAMERAS[:2]:
        session.render(camera)
    session.close()
    store = SessionFolder(tmp_path)
    poison(store, 1, bad, is_old=is_old)
    row = next(row for row in store.read()["turns"] if row["number"] == 1)
    said = r"turn 1 is lost: .*turn_01\.safetensors holds latents that are not finite"
    with pytest.raises(StorageError, match=said):
        store.latents(row, 1, row["windows"][0])
    session = engine.session(source_frames, store=tmp_path, resume=True)
    (words,) = session.lost
    assert re.search(said, words) and len(session.turns) == 2 and len(engine.cache) == 1
    with pytest.raises(StorageError, match=said):
        _ = session.turns[0].frames
    turn = session.render(CAMERAS[2])
    assert [row["turn"] for row in turn.report["memory"]["retrieved"]] == [2]
    assert bool(turn.latents.isfinite().all())


def test_a_stored_window_that_is_not_finite_is_made_again(
    editor_folder: Path, long_clip: Path, tmp_path: Path
) -> None:
    engine = Engine.from_pretrained(editor_folder, device="cpu")
    session = engine.session(long_clip, cuts=(), store=tmp_path)
    expected = session.edit("a red ball").latents
    store, (edit,) = SessionFolder(tmp_path), session._kept.drafts
    kept = edit.windows[1]
    latents = kept.read().clone()
    latents.view(-1)[3] = math.nan
    edit.report = None
    digest = store.append(edit, 2, latents)
    session.close()
    said = r"window_00002\.safetensors holds latents that are not finite"
    with pytest.raises(StorageError, match=said):
        store.latents({"number": 1, "camera": None}, 2, digest)
    resumed = engine.session(long_clip, cuts=(), store=tmp_path, resume=True)
    assert re.search(said, resumed.lost[0]) and resumed.unfinished[0][1] == 1
    assert torch.equal(resumed.edit("a red ball").latents, expected)


def test_a_given_source_is_finite(engine: Engine, source_frames: Tensor) -> None:
    latents = engine.vae.encode(source_frames)
    latents[0, 0, 0, 0] = math.nan
    with pytest.raises(NotFiniteError, match=r"source_latents are not finite \(1 of 2,304"):
        engine.session(source_frames, source_latents=latents)


NUMBERS: list[tuple[str, Any]] = [
    *(("guidance_scale", value) for value in (1e38, 1e300, 101, -1, math.nan, math.inf, "5", True)),
    *(("num_inference_steps", value) for value in (0, 1001, 10**30, 2.5, math.nan, "2", True)),
    *(("seed", value) for value in (-1, 2**63, 1.5, "7")),
]


@pytest.mark.parametrize(("name", "value"), NUMBERS)
def test_numbers_that_cannot_be_meant(
    engine: Engine, source_frames: Tensor, name: str, value: Any
) -> None:
    """Both tasks refuse them."""
    session = engine.session(source_frames)
    for ask in (
        lambda: session.render("pan_right", **{name: value}),
        lambda: Request.edit("a red ball", engine.sampling, memory="none", **{name: value}),
    ):
        with pytest.raises(RequestError, match=rf"^{name} must (lie in [01]\.\.|be an? )"):
            ask()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("guidance_scale", value) for value in (1e38, math.nan, -1)),
        *(("flow_shift", value) for value in (0, math.nan, math.inf, 1e38, "5")),
        *(("fps", value) for value in (0, math.nan, math.inf)),
        *(("num_inference_steps", value) for value in (0, 1001)),
    ],
)
def test_a_checkpoint_of_numbers_that_cannot_be_meant(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{name} must (lie in|be a )"):
        SamplingConfig(**{name: value})


def test_an_old_folder_of_such_a_number_can_be_read(
    engine: Engine, source_frames: Tensor, tmp_path: Path
) -> None:
    """What was asked then is told; the latents decide."""
    session = engine.session(source_frames, store=tmp_path)
    turn = session.render("pan_right")
    latents, store = turn.latents, SessionFolder(tmp_path)
    session.close()
    manifest = store.read()
    manifest["turns"][0]["report"]["guidance_scale"] = 1e38
    store.write(manifest)
    resumed = engine.session(source_frames, store=tmp_path, resume=True)
    assert isinstance(resumed, Session) and torch.equal(resumed.turns[0].latents, latents)
