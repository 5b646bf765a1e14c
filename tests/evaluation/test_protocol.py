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
from mv2v_engine.synthetic.worlds import make_world

SAMPLING = SamplingConfig(num_frames=5, size=(48, 80))


@pytest.mark.parametrize("seed", [FIRST_SCENE, FIRST_SCENE + 1])
def test_the_turns_reveal_the_same_places(seed: int) -> None:
    world = make_world(seed)
    source = film(world, named_trajectory("static", 5, (48, 80)))
    views = [film(world, camera, source) for camera in scene_trajectories(seed, SAMPLING, 5)]

    def shared(earlier: int, later: int) -> float:
        mask = overlap(views[later - 1], views[earlier - 1]).mask
        return float(mask[-1].float().mean())

    assert all(shared(*pair) > 0.02 for pair in ((1, 2), (1, 3), (2, 3)))
    # the fourth looks away from the first and the fifth comes back
    assert shared(1, 4) == shared(4, 5) == 0
    assert shared(1, 5) > 0.15


def test_three_turns_begin_five_and_sides_alternate() -> None:
    five = [camera.name for camera in scene_trajectories(FIRST_SCENE, SAMPLING, 5)]
    three = [camera.name for camera in scene_trajectories(FIRST_SCENE, SAMPLING)]
    assert three == five[:3] == ["pan:19.88", "arc:-29.82", "zoom:-1.988"]
    other = [camera.name for camera in scene_trajectories(FIRST_SCENE + 1, SAMPLING)]
    assert other == ["pan:-19.88", "arc:29.82", "zoom:-1.988"]


def test_every_turn_has_noise_of_its_own() -> None:
    seeds = {turn_seed(scene, number) for scene in range(10) for number in range(1, 6)}
    assert len(seeds) == 50


def test_rows_differ_in_what_they_are_for() -> None:
    base = EngineConfig(fov_radius=2.0)
    configured = {row.name: row.configure(base) for row in ROWS}
    assert all(config.fov_radius == 2.0 for config in configured.values())
    assert len({(row.configure(base), row.memory) for row in ROWS}) == len(ROWS)
    assert set(MAIN_ROWS) <= set(configured)
    assert configured["static"].conditioning == "static"
    assert configured["random_1"].memory_ranking == "random"
    assert configured["retrieved_1"].max_memory == configured["random_1"].max_memory == 1


def test_rows_run_in_their_own_order() -> None:
    protocol = Protocol(rows=("static", "independent"))
    assert [row.name for row in protocol.chosen_rows] == ["independent", "static"]
    assert Protocol(turns=3).pairs == ((1, 2), (1, 3), (2, 3))
    assert len(Protocol(turns=5).pairs) == 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scenes": 0}, "at least 1 scene of 3 or 5 turns, got 0"),
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
