"""Hard cuts of rendered worlds: found to the frame, and nothing found where the camera moves."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import make_world
from mv2v_engine.video.shots import find_cuts

SIZE, FPS = (36, 60), 16.0


@cache
def shot(seed: int, camera: str, num_frames: int) -> Tensor:
    """uint8 [T, height, width, 3] of a world through a moving camera."""
    return render(make_world(seed), named_trajectory(camera, num_frames, SIZE)).frames


def test_cuts_between_worlds_are_found_to_the_frame() -> None:
    shots = [shot(1, "pan_right", 17), shot(2, "arc_left", 21), shot(3, "zoom_in", 13)]
    assert find_cuts(torch.cat(shots), FPS) == (17, 38)


@pytest.mark.parametrize("camera", ["pan_right", "arc_left", "zoom_out", "tilt_up", "static"])
def test_a_moving_camera_is_no_cut(camera: str) -> None:
    assert find_cuts(shot(4, camera, 33), FPS) == ()


def test_a_flash_is_no_cut() -> None:
    frames = shot(5, "pan_left", 33).clone()
    frames[15:17] = 255
    assert find_cuts(frames, FPS) == ()


def test_shots_too_short_belong_to_their_neighbours() -> None:
    shots = [shot(1, "static", 17), shot(2, "static", 4), shot(3, "static", 17)]
    cuts = find_cuts(torch.cat(shots), FPS)
    assert len(cuts) <= 1 and set(cuts) <= {17, 21}
    assert find_cuts(torch.cat(shots), FPS, min_shot_frames=2) == (17, 21)


def test_a_cut_at_every_frame_is_one_shot() -> None:
    frames = torch.stack([shot(seed, "static", 5)[0] for seed in range(20)])
    assert find_cuts(frames, FPS) == ()


@pytest.mark.parametrize("num_frames", [0, 1, 2])
def test_next_to_no_frames(num_frames: int) -> None:
    assert find_cuts(shot(1, "static", 5)[:num_frames], FPS) == ()


def test_large_frames_have_the_same_cuts() -> None:
    frames = torch.cat([shot(1, "pan_right", 13), shot(2, "arc_left", 13)])
    larger = frames.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :, :-3]
    assert find_cuts(larger, FPS) == find_cuts(frames, FPS) == (13,)


def test_one_frame_is_held_at_a_time() -> None:
    alive: list[int] = []

    class Frame(torch.Tensor):
        """Counts itself out."""

        def __del__(self) -> None:
            alive.append(-1)

    def frames() -> Iterator[Tensor]:
        for frame in shot(1, "static", 17):
            alive.append(1)
            assert sum(alive) <= 2
            yield frame.as_subclass(Frame)

    assert find_cuts(frames(), FPS) == ()
