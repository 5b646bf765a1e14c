"""One scene on a small random checkpoint: sharing changes nothing but the time it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mv2v_engine import Engine
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.engine.session import Session
from mv2v_engine.evaluation.consistency import overlap
from mv2v_engine.evaluation.images import gradient_energy, masked_psnr
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
CHOICE = Protocol(
    scenes=1,
    grade="furnished",
    turns=9,
    steps=1,
    rows=("memory", "retrieved_2", "random_2", "coverage_2", "responsiveness_2", "oracle_2"),
)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> Engine:
    return Engine.from_pretrained(tiny_checkpoint, device="cpu")


def measured(engine: Engine, protocol: Protocol) -> tuple[SceneResult, list[int]]:
    """A scene, and the numbers of the turns that were denoised for it, in order."""
    answered = []
    with pytest.MonkeyPatch.context() as patch:
        plain = Session.ask

        def counted(session: Session, *arguments: object) -> object:
            answered.append(len(session.turns) + 1)
            return plain(session, *arguments)  # type: ignore[arg-type]

        patch.setattr(Session, "ask", counted)
        return SceneEvaluator(engine, protocol).measure(FIRST_SCENE), answered


@pytest.fixture(scope="module")
def five(loaded: Engine) -> tuple[SceneResult, list[int]]:
    return measured(loaded, PROTOCOL)


@pytest.fixture(scope="module")
def scene(five: tuple[SceneResult, list[int]]) -> SceneResult:
    return five[0]


@pytest.fixture(scope="module")
def nine(loaded: Engine) -> tuple[SceneResult, list[int]]:
    return measured(loaded, CHOICE)


def test_equal_turns_are_denoised_once(five: tuple[SceneResult, list[int]]) -> None:
    scene, answered = five
    # the first turn differs by merging, discarding and static conditioning alone
    assert answered.count(1) == 4
    # five other rows begin alike: none, previous, memory, uniform and no source go their ways
    assert answered.count(2) == 3 + 5
    assert answered.count(5) <= 3 * len(PROTOCOL.chosen_rows)
    first = {name: videos["1"] for name, videos in scene.frames.items()}
    assert first["independent"] is first["memory"] is first["no_source"]
    assert first["memory_merged"] is not first["memory"]


@pytest.mark.parametrize("last", PROTOCOL.last)
@pytest.mark.parametrize("name", ["previous", "memory", "static", "no_source"])
def test_a_row_is_what_a_session_of_its_own_gives(
    scene: SceneResult, loaded: Engine, name: str, last: str
) -> None:
    row = next(row for row in ROWS if row.name == name)
    engine = loaded.reconfigured(row.configure(loaded.config))
    world = make_world(FIRST_SCENE, "plain")
    still = named_trajectory("static", loaded.sampling.num_frames, loaded.sampling.size)
    session = engine.session(render(world, still).frames, fps=8.0)
    cameras = scene_trajectories(FIRST_SCENE, engine.sampling, 5)
    for number, (turn_name, camera) in enumerate(cameras.items(), 1):
        if turn_name not in (*PROTOCOL.before, last):
            continue
        turn = session.render(
            camera,
            memory=row.memory,
            seed=turn_seed(FIRST_SCENE, number),
            num_inference_steps=2,
        )
        assert torch.equal(turn.frames, scene.frames[name][turn_name])
    session.close()


def test_what_is_measured(scene: SceneResult) -> None:
    rows = scene.measures["rows"]
    assert set(rows) == {row.name for row in PROTOCOL.chosen_rows}
    branches = {"1-5", "1-replay", "1-return"}
    for name, row in rows.items():
        assert set(row["pairs"]) >= {"1-2", "1-3", "2-3", *branches}
        assert all(
            0 < pair["l1"] < 1 and 0 < pair["features"] < 2 for pair in row["pairs"].values()
        )
        for turn, (turn_name, view) in zip(row["turns"], scene.views.items(), strict=True):
            video, truth = scene.frames[name][turn_name], view.truth.frames
            assert turn["turn"] == turn_name
            assert turn["source_psnr"] == masked_psnr(video, truth, view.seen)
            assert turn["source_energy"] == gradient_energy(video, view.seen) > 0
            assert turn["flops"] > 0 and turn["seconds"] > 0
    counts = {name: [turn["memory"] for turn in row["turns"]] for name, row in rows.items()}
    assert counts["memory"] == counts["no_source"] == [0, 1, 2, 3, 4, 4, 4]
    assert counts["independent"] == counts["previous"] == [0] * 7
    tokens = {name: row["turns"][4]["tokens"] for name, row in rows.items()}
    assert tokens["uniform"] > tokens["memory"] > tokens["no_source"]
    flops = {name: row["turns"][4]["flops"] for name, row in rows.items()}
    assert flops["static"] < flops["memory"] and flops["memory_merged"] < flops["memory"]


def test_an_open_domain_return_counts_what_the_source_shows_nothing_of(scene: SceneResult) -> None:
    first, last = scene.views["1"], scene.views["return"]
    shared = overlap(last, first).mask
    counted = scene.measures["rows"]["memory"]["pairs"]["1-return"]["pixels"]
    assert counted == int((shared & last.unshown).sum()) < int(shared.sum())


def test_rankings_choose_from_the_same_eight_turns(nine: tuple[SceneResult, list[int]]) -> None:
    scene, answered = nine
    rows = scene.measures["rows"]
    # eight turns of memory, which the others take over, then the last ones
    assert answered[:8] == [*range(1, 9)] and set(answered[8:]) == {9}
    chosen = {}
    for name in CHOICE.rows[1:] if CHOICE.rows else ():
        assert [turn["turn"] for turn in rows[name]["turns"]] == ["9", "detour"]
        assert {pair.partition("-")[2] for pair in rows[name]["pairs"]} <= {"9", "detour"}
        chosen[name] = [turn["retrieved"] for turn in rows[name]["turns"]]
    assert all(len(turns) == 2 for name in ("retrieved_2", "random_2") for turns in chosen[name])
    # the ninth looks where the first did
    assert chosen["retrieved_2"][0][0] == 1
    assert chosen["random_2"] != chosen["retrieved_2"]
    assert all(len(turns) == 2 for turns in chosen["responsiveness_2"])
    assert chosen["responsiveness_2"] != chosen["retrieved_2"] != chosen["coverage_2"]


@pytest.mark.parametrize("last", CHOICE.last)
def test_an_oracle_chooses_what_shows_most_of_the_rest(
    nine: tuple[SceneResult, list[int]], last: str
) -> None:
    scene, _ = nine
    turn = scene.measures["rows"]["oracle_2"]["turns"][CHOICE.last.index(last)]
    shown = {
        int(name): overlap(scene.views[last], scene.views[name]).mask for name in CHOICE.before
    }
    first = max(shown, key=lambda number: int(shown[number].sum()))
    second = max(shown, key=lambda number: int((shown[number] & ~shown[first]).sum()))
    assert set(turn["retrieved"]) == {first, second}


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
