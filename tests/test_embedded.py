"""The embedded checkpoint keeps its promises: size, reconstruction, cameras, memory."""

from __future__ import annotations

import functools
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import mv2v_engine
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.checkpoints import inspect_checkpoint
from mv2v_engine.checkpoints.detect import embedded_names
from mv2v_engine.config import SamplingConfig
from mv2v_engine.engine.engine import Engine
from mv2v_engine.evaluation.alignment import camera_error
from mv2v_engine.evaluation.consistency import film
from mv2v_engine.evaluation.edit_protocol import MAIN_EDIT_ROWS
from mv2v_engine.evaluation.editing_measures import EditMeasurer
from mv2v_engine.evaluation.images import masked_l1, masked_psnr
from mv2v_engine.evaluation.protocol import MAIN_ROWS
from mv2v_engine.synthetic.edit_clips import grown, make_edit_clip, make_loop_clip
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import make_world
from mv2v_engine.training.dit import TINY_EDIT_MEMORY_RECIPE, TINY_MEMORY_RECIPE
from mv2v_engine.vae import weights_fingerprint

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(mv2v_engine.__file__).parent / "assets"
# never trained on, and none of the worlds that the published figures are measured on
WORLDS = (3_000_001, 3_000_002, 3_000_003, 3_000_004)
EDIT_CLIP = 7_000_001
# where a checkpoint's figures stand beside its card, and which rows of them; None is all
PAGES: dict[str, tuple[Path, tuple[str, ...] | None]] = {
    "tiny-nvs": (ROOT / "README.md", MAIN_ROWS),
    "tiny-edit": (ROOT / "docs" / "editing.md", None),
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("tiny-nvs", device="cpu")


@pytest.fixture(scope="module")
def editor() -> Engine:
    return Engine.from_pretrained("tiny-edit", device="cpu")


@functools.cache
def _film(world: int, camera: str, sampling: SamplingConfig) -> torch.Tensor:
    trajectory = named_trajectory(camera, sampling.num_frames, sampling.size)
    return render(make_world(world), trajectory).frames


def test_assets_stay_small() -> None:
    size = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    assert size <= 24 * 2**20


@pytest.mark.parametrize("name", embedded_names())
def test_every_checkpoint_is_whole(name: str) -> None:
    assert inspect_checkpoint(name).problem is None
    assert (ASSETS / name / "MODEL_CARD.md").stat().st_size > 500


def _published(engine: Engine) -> dict[str, Any]:
    """The result beside a checkpoint, which is of its weights, and shown as it is."""
    name = engine.checkpoint.name
    results: dict[str, Any] = json.loads((ASSETS / name / "results.json").read_text())
    assert results["settings"]["weights"] == weights_fingerprint(engine.transformer.state_dict())
    assert results["settings"]["vae"] == engine.vae.key
    markdown = runpy.run_path(str(ROOT / "profiling" / "evaluation_table.py"))["markdown"]
    page, rows = PAGES[name]
    assert markdown(results) in _card(name)
    assert markdown(results, rows) in page.read_text(encoding="utf-8")
    return results


def _card(name: str) -> str:
    return (ASSETS / name / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_the_published_figures_are_of_these_weights(engine: Engine) -> None:
    results = _published(engine)
    assert engine.checkpoint.conditioning == TINY_MEMORY_RECIPE.conditioning
    assert results["scenes"] >= 40 and set(results["rows"]) > set(MAIN_ROWS)
    grade = results["settings"]["grade"]
    readme = PAGES["tiny-nvs"][0].read_text(encoding="utf-8")
    for text in (_card("tiny-nvs"), readme):
        assert f"{results['scenes']} {grade} worlds" in text
    for row in results["rows"].values():
        low, high = row["consistency_ci"]
        assert low < row["consistency"] < high


def test_the_published_figures_of_edits_are_of_these_weights(editor: Engine) -> None:
    results = _published(editor)
    assert editor.checkpoint.conditioning == TINY_EDIT_MEMORY_RECIPE.conditioning
    assert results["clips"] >= 30 and set(results["rows"]) >= set(MAIN_EDIT_ROWS)
    for row in results["rows"].values():
        low, high = row["subject_error_ci"]
        assert low < row["subject_error"] < high


def test_vae_reconstructs_held_out_worlds(engine: Engine) -> None:
    scores = []
    for world, camera in zip(WORLDS, ("pan_right", "static") * 2, strict=True):
        frames = _film(world, camera, engine.sampling)
        scores.append(masked_psnr(engine.vae.decode(engine.vae.encode(frames)), frames))
    assert sum(scores) / len(scores) >= 27, scores


def test_the_vae_keeps_the_camera_of_plain_worlds(engine: Engine) -> None:
    """Else no denoiser could be seen to follow it within 1.5 pixels."""
    sampling, errors = engine.sampling, []
    still, moving = (
        named_trajectory(name, sampling.num_frames, sampling.size)
        for name in ("static", "pan_right")
    )
    for seed in WORLDS[:2]:
        world = make_world(seed, "plain")
        view = film(world, moving, film(world, still))
        error = camera_error(engine.vae.decode(engine.vae.encode(view.truth.frames)), view)
        assert error is not None
        errors.append(error.pixels)
    assert sum(errors) / len(errors) < 1.5, errors


def test_turns_follow_the_camera_and_remember(engine: Engine) -> None:
    """A turn is nearer to the true view than to the opposite one, and than the source is."""
    margins, gains, cameras = [], [], ("pan_right", "pan_left")
    source, *views = (_film(WORLDS[0], name, engine.sampling) for name in ("static", *cameras))
    truths = dict(zip(cameras, views, strict=True))
    session = engine.session(source, fps=8.0)
    for camera, opposite in (cameras, cameras[::-1]):
        turn = session.render(camera, num_inference_steps=8)
        right = masked_psnr(turn.frames, truths[camera])
        margins.append(right - masked_psnr(turn.frames, truths[opposite]))
        gains.append(right - masked_psnr(source, truths[camera]))
    retrieved = session.turns[1].report["memory"]["retrieved"]
    assert [row["turn"] for row in retrieved] == [1]
    assert min(margins) > 0.5, margins
    assert sum(gains) / len(gains) > 0.5, gains


def test_edits_follow_the_words_and_remember(editor: Engine) -> None:
    """An edit shows what was asked, which its source does not, and leaves the rest as it was."""
    num_frames = editor.sampling.num_frames
    clip = make_edit_clip(EDIT_CLIP, num_frames=2 * num_frames, kind="colour")
    source = clip.source.frames
    turn = editor.session(source, cuts=()).edit(clip.prompt, num_inference_steps=8)
    assert turn.frames.shape == source.shape
    windows = turn.report["windows"]
    assert [len(window["memory"]["retrieved"]) for window in windows] == [0, 1]
    measurer = EditMeasurer(clip, [0, num_frames])
    edited, unedited = measurer.measure(turn.frames), measurer.measure(source)
    assert edited["agreement"] > unedited["agreement"] + 0.3, (edited, unedited)
    assert edited["background_psnr"] > 22, edited


def test_a_stream_edits_what_is_named_and_leaves_the_rest() -> None:
    engine = Engine.from_pretrained("tiny-stream", device="cpu")
    clip = make_loop_clip(3_000_001, kind="colour")
    source, truth, mask = clip.source.frames[:13], clip.edited.frames[:13], clip.edited_mask[:13]
    with engine.stream(clip.prompt, source=iter(source), seed=1) as stream:
        made = torch.cat([block.frames for block in stream.blocks()])
    assert made.shape == source.shape and not stream.warnings
    assert masked_l1(made, truth, mask) < 0.7 * masked_l1(source, truth, mask)
    assert masked_psnr(made, truth, ~grown(clip.mask[:13], 8)) > 26
