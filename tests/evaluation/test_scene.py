"""One scene on a small random checkpoint: sharing changes nothing but the time it takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mv2v_engine import Engine
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.engine.view_session import ViewSession
from mv2v_engine.evaluation.images import masked_psnr
from mv2v_engine.evaluation.protocol import (
    FIRST_SCENE,
    ROWS,
    Protocol,
    scene_trajectories,
    turn_seed,
)
from mv2v_engine.evaluation.scene import SceneEvaluator, SceneResult
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import make_world

PROTOCOL = Protocol(scenes=1, turns=5, steps=2)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> Engine:
    return Engine.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def answered() -> list[str]:
    """The turns that were denoised, in order."""
    return []


@pytest.fixture(scope="module")
def scene(loaded: Engine, answered: list[str]) -> Iterator[SceneResult]:
    with pytest.MonkeyPatch.context() as patch:
        plain = ViewSession.answer

        def counted(session: ViewSession, *arguments: object) -> object:
            answered.append(f"{len(session.turns) + 1}")
            return plain(session, *arguments)  # type: ignore[arg-type]

        patch.setattr(ViewSession, "answer", counted)
        yield SceneEvaluator(loaded, PROTOCOL).measure(FIRST_SCENE)


def test_equal_turns_are_denoised_once(scene: SceneResult, answered: list[str]) -> None:
    # the first turn differs by merging, discarding and static conditioning alone
    assert answered.count("1") == 4
    # seven other rows begin alike: previous, memory, uniform, no source and none go their ways,
    # and one video, retrieved or random, is the only one there is
    assert answered.count("2") == 3 + 5
    assert len(answered) < len(ROWS) * PROTOCOL.turns
    first = {name: videos[0] for name, videos in scene.frames.items()}
    assert first["independent"] is first["memory"] is first["no_source"]
    assert first["memory_merged"] is not first["memory"]


@pytest.mark.parametrize("name", ["previous", "memory", "static", "random_1", "no_source"])
def test_a_row_is_what_a_session_of_its_own_gives(
    scene: SceneResult, loaded: Engine, name: str
) -> None:
    row = next(row for row in ROWS if row.name == name)
    engine = loaded.reconfigured(row.configure(loaded.config))
    world = make_world(FIRST_SCENE)
    still = named_trajectory("static", loaded.sampling.num_frames, loaded.sampling.size)
    session = engine.session(render(world, still).frames, fps=8.0)
    for number, camera in enumerate(scene_trajectories(FIRST_SCENE, engine.sampling, 5), 1):
        turn = session.render(
            camera,
            memory=row.memory,
            seed=turn_seed(FIRST_SCENE, number),
            num_inference_steps=2,
        )
        assert torch.equal(turn.frames, scene.frames[name][number - 1])
    session.close()


def test_what_is_measured(scene: SceneResult) -> None:
    rows = scene.measures["rows"]
    assert set(rows) == {row.name for row in ROWS}
    for name, row in rows.items():
        assert set(row["pairs"]) >= {"1-2", "1-3", "2-3", "1-5"}
        assert all(
            0 < pair["l1"] < 1 and 0 < pair["features"] < 2 for pair in row["pairs"].values()
        )
        for turn, video, view in zip(row["turns"], scene.frames[name], scene.views, strict=True):
            assert turn["source_psnr"] == masked_psnr(video, view.truth.frames, view.seen)
            assert turn["flops"] > 0 and turn["seconds"] > 0
    counts = {name: [turn["memory"] for turn in row["turns"]] for name, row in rows.items()}
    assert counts["memory"] == counts["no_source"] == [0, 1, 2, 3, 4]
    assert counts["independent"] == counts["previous"] == [0] * 5
    assert counts["retrieved_1"] == counts["random_1"] == [0, 1, 1, 1, 1]
    # the last turn looks where the first did
    assert rows["retrieved_1"]["turns"][4]["retrieved"] == [1]
    tokens = {name: row["turns"][4]["tokens"] for name, row in rows.items()}
    assert tokens["uniform"] > tokens["memory"] > tokens["no_source"]
    flops = {name: row["turns"][4]["flops"] for name, row in rows.items()}
    assert flops["static"] < flops["memory"] and flops["memory_merged"] < flops["memory"]


def test_references_bound_the_rows(scene: SceneResult) -> None:
    references = scene.measures["references"]
    floor = references["truth"]["pairs"]
    for row in scene.measures["rows"].values():
        assert all(row["pairs"][name]["l1"] > floor[name]["l1"] for name in floor)
    assert all(turn["psnr"] > 70 for turn in references["truth"]["turns"])
    assert all((turn["camera_error"] or 0) < 1e-3 for turn in references["truth"]["turns"])


def test_blocks_are_compared_on_the_turn_with_most_memory(scene: SceneResult) -> None:
    table = scene.measures["responsiveness"]
    assert list(table) == ["1 vs 2-3", "2 vs 3"]
    assert all(-1 <= values["pearson"] <= 1 for values in table.values())
    assert all(0 <= values["bottom_half"] <= 1 for values in table.values())
