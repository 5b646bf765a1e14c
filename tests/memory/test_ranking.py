"""Rankings by what a video adds, against a brute-force projection and by hand.

T moments, D depths, H W cells.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory, named_trajectory
from mv2v_engine.errors import CheckpointError
from mv2v_engine.files import save_tensors
from mv2v_engine.memory.ranking import (
    FILE,
    Known,
    Ranker,
    chosen,
    coverage,
    ends,
    moments,
    pooled,
    seen_volume,
)
from mv2v_engine.testing import randomise

SIZE, FRAMES, CHANNELS = (48, 80), 9, 4


def camera(name: str, frames: int = FRAMES) -> CameraTrajectory:
    return named_trajectory(name, frames, SIZE)


def projected(target: CameraTrajectory, video: CameraTrajectory) -> Tensor:
    """The definition, point by point in float64."""
    seen = torch.zeros(5, 4, 12, 20, dtype=torch.bool)
    frames, own = moments(target).tolist(), moments(video).tolist()
    k, other = target.intrinsics.double(), video.intrinsics.double()
    for t, (frame, there) in enumerate(zip(frames, own, strict=True)):
        pose, back = target.poses[frame].double(), video.poses[there].double()
        for d, depth in enumerate((1.5, 2.5, 4.0, 6.5)):
            for row in range(12):
                for column in range(20):
                    pixel = torch.tensor([(column + 0.5) * 4, (row + 0.5) * 4, 1.0]).double()
                    world = pose[:, :3] @ (k.inverse() @ pixel * depth) + pose[:, 3]
                    x, y, z = (other @ (back[:, :3].T @ (world - back[:, 3]))).tolist()
                    inside = 0 <= x < 80 * z and 0 <= y < 48 * z
                    seen[t, d, row, column] = inside and z > 0
    return seen


@pytest.mark.parametrize("name", ["pan:20", "arc:-30", "zoom:2", "tilt:9+pan:-5"])
def test_a_volume_is_projected_point_by_point(name: str) -> None:
    target, video = camera("arc:25"), camera(name, 17)
    found = seen_volume(target, [target, video])
    assert found[0].all()
    # points on a border may fall on either side
    assert (found[1] != projected(target, video)).float().mean() < 2e-3


def test_one_after_the_other_by_what_is_left() -> None:
    """The source leaves 60 of 100 points; the second choice is not the second best alone."""
    left = torch.zeros(1, 1, 10, 10, dtype=torch.bool)
    left.view(-1)[40:] = True
    seen = torch.zeros(4, 1, 1, 10, 10, dtype=torch.bool)
    for video, span in enumerate([(40, 80), (45, 80), (75, 95), (0, 40)]):
        seen[video].view(-1)[slice(*span)] = True
    assert coverage(left, seen).tolist() == pytest.approx([0.4, 0.35, 0.2, 0.0])
    found = chosen(left, seen, coverage, 3)
    assert [number for number, _ in found] == [0, 2]
    assert [gain for _, gain in found] == pytest.approx([0.4, 0.15])
    # the last one of equals; none where there is nothing
    assert chosen(left, seen[[0, 0]], coverage, 5) == [(1, pytest.approx(0.4))]
    assert chosen(left, seen[:0], coverage, 2) == []
    assert chosen(~left, seen[:3], coverage, 2) == []


def known(target: str, videos: list[str]) -> tuple[Known, Tensor, Tensor]:
    source, cameras = camera("static"), [camera(name) for name in videos]
    own = [ends(camera(target), source, video) for video in cameras]
    generator = torch.Generator().manual_seed(0)
    shown = torch.randn(len(videos), 4 * CHANNELS, generator=generator)
    seen = seen_volume(camera(target), [source, *cameras])
    return Known(torch.stack(own), shown), ~seen[0], seen[1:]


def test_a_network_is_told_cameras_shares_and_latents() -> None:
    ranker = Ranker(CHANNELS)
    randomise(ranker)
    told, left, seen = known("pan:20", ["pan:15", "tilt:9", "arc:20"])
    with torch.no_grad():
        logits = ranker(told, left, seen)
        # each video for itself, in any order
        alone = ranker(Known(told.ends[1:2], told.pooled[1:2]), left, seen[1:2])
        torch.testing.assert_close(alone, logits[1:2])
        for changed in (
            (Known(told.ends.roll(1, 0), told.pooled), left, seen),
            (Known(told.ends, told.pooled.roll(1, 0)), left, seen),
            (told, left & ~seen[0], seen),
            (told, left, seen.roll(1, 0)),
        ):
            assert not torch.allclose(ranker(*changed), logits)
    assert [n for n, _ in chosen(left, seen, ranker.gain(told), 2)]
    # the end of a video as seen from where the target ends
    same = ends(camera("pan:20"), camera("static"), camera("pan:20")).view(2, 3, 4)
    torch.testing.assert_close(same[0], torch.eye(4)[:3], atol=1e-6, rtol=0)


def test_the_last_latent_frame_is_what_it_shows() -> None:
    latents = torch.randn(CHANNELS, 3, 6, 8)
    assert torch.equal(pooled(latents), pooled(latents[:, -1:]))
    torch.testing.assert_close(pooled(latents)[0], latents[0, -1, :3, :4].mean())


def test_weights_of_a_ranking(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"has no {FILE}.*training.ranking"):
        Ranker.read(tmp_path, CHANNELS)
    ranker = Ranker(16)
    randomise(ranker)
    ranker.save(tmp_path)
    assert (tmp_path / FILE).stat().st_size <= 40_000
    read = Ranker.read(tmp_path, 16)
    for name, tensor in ranker.state_dict().items():
        torch.testing.assert_close(read.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    with pytest.raises(CheckpointError, match="no ranking of latents with 4 channels"):
        Ranker.read(tmp_path, 4)
    save_tensors(tmp_path / FILE, {n: t * torch.nan for n, t in ranker.state_dict().items()})
    with pytest.raises(CheckpointError, match="not finite"):
        Ranker.read(tmp_path, 16)
    (tmp_path / FILE).write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match="train it again"):
        Ranker.read(tmp_path, 16)
