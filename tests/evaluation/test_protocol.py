"""The protocol: which scenes, cameras and rows, and what it refuses."""

from __future__ import annotations

import pytest

from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.config import EngineConfig, SamplingConfig
from mv2v_engine.errors import RequestError
from mv2v_engine.evaluation.consistency import film, overlap
from mv2v_engine.evaluation.protocol import (
    FIRST_SCENE,
    MAIN_ROWS,
    ROWS,
    Protocol,
    scene_trajectories,
    turn_seed,
)
from mv2v_engine.synthetic.worlds import Grade, make_world

SAMPLING = SamplingConfig(num_frames=5, size=(48, 80))


@pytest.mark.parametrize("grade", ["plain", "textured"])
@pytest.mark.parametrize("seed", [FIRST_SCENE, FIRST_SCENE + 1])
def test_the_turns_reveal_the_same_places(seed: int, grade: Grade) -> None:
    world = make_world(seed, grade)
    source = film(world, named_trajectory("static", 5, (48, 80)))
    cameras = scene_trajectories(seed, SAMPLING, 5)
    views = {name: film(world, camera, source) for name, camera in cameras.items()}

    def shared(earlier: str, later: str) -> float:
        mask = overlap(views[later], views[earlier], of_unshown=later == "return").mask
        return float(mask[-1].float().mean())

    assert all(shared(*pair) > 0.02 for pair in (("1", "2"), ("1", "3"), ("2", "3")))
    # the fourth looks away from the first and the fifth comes back
    assert shared("1", "4") == shared("4", "5") == 0
    assert shared("1", "5") > 0.15
    # all of the first turn again, and a wall or a thing that the source shows nothing of
    assert shared("1", "replay") == float(views["1"].invented[-1].float().mean())
    assert shared("1", "return") > 0.02


def test_a_protocol_begins_as_a_shorter_one_and_sides_alternate() -> None:
    def moves(seed: int, turns: int = 3) -> dict[str, str]:
        cameras = scene_trajectories(seed, SAMPLING, turns)
        return {name: camera.name for name, camera in cameras.items()}

    three, five, nine = (moves(FIRST_SCENE, turns) for turns in (3, 5, 9))
    assert three == {"1": "pan:19.88", "2": "arc:-29.82", "3": "zoom:-1.988"}
    assert five == three | {
        "4": "pan:-19.88",
        "5": "pan:14.91",
        "replay": "pan:19.88",
        "return": "pan:23.86",
    }
    assert [nine[str(number)] for number in range(1, 5)] == list(five.values())[:4]
    assert (len(nine), nine["9"], nine["detour"]) == (10, "pan:14.91", "arc:22.37")
    mirrored = {"1": "pan:-19.88", "2": "arc:29.82", "3": "zoom:-1.988"}
    assert moves(FIRST_SCENE + 1) == mirrored


def test_every_turn_has_noise_of_its_own() -> None:
    seeds = {turn_seed(scene, number) for scene in range(10) for number in range(1, 11)}
    assert len(seeds) == 100


def test_rows_differ_in_what_they_are_for() -> None:
    base = EngineConfig(fov_radius=2.0)
    configured = {row.name: row.configure(base) for row in ROWS}
    assert all(config.fov_radius == 2.0 for config in configured.values())
    # the engine of what an evaluation chooses is that of what is retrieved
    assert len({(row.configure(base), row.memory) for row in ROWS}) == len(ROWS) - 2
    assert set(MAIN_ROWS) <= set(configured)
    assert configured["static"].conditioning == "static"
    assert configured["random_2"].memory_ranking == "random"
    assert configured["retrieved_2"].max_memory == configured["random_2"].max_memory == 2


def test_rows_run_in_their_own_order() -> None:
    protocol = Protocol(rows=("static", "independent"))
    assert [row.name for row in protocol.chosen_rows] == ["independent", "static"]
    assert Protocol(turns=3).pairs == (("1", "2"), ("1", "3"), ("2", "3"))
    # six of the four before, and each of these with each of the last
    assert len(Protocol(turns=5).pairs) == 6 + 3 * 4


def test_rows_that_choose_are_for_nine_turns() -> None:
    few, many = (
        {row.name for row in protocol.chosen_rows} for protocol in (Protocol(), Protocol(turns=9))
    )
    # what few checkpoints have is asked for by name
    assert few | many == {row.name for row in ROWS} - {"learned_2"}
    rankings = {"retrieved", "random", "oracle", "coverage", "responsiveness"}
    assert many - few == {f"{ranking}_2" for ranking in rankings}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scenes": 0}, "at least 1 scene of 3, 5 or 9 turns, got 0"),
        ({"grade": "bare"}, "grade is one of .*'furnished'.*got 'bare'"),
        ({"turns": 4}, "scenes of 4"),
        ({"rows": ("memori",)}, "no row 'memori'; nearest: memory"),
        ({"rows": ()}, "named once each"),
        ({"rows": ("memory", "memory")}, "named once each"),
        ({"first_scene": 999_999}, "never trained on, got 999999"),
    ],
)
def test_what_it_refuses(change: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Protocol(**change)
