"""The labels and the training of a learned ranking, on worlds small enough to look at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mv2v_engine.errors import RequestError, TrainingError
from mv2v_engine.memory.ranking import Ranker
from mv2v_engine.training import ranking
from mv2v_engine.training.ranking import Shown, draw, shown_world, train
from mv2v_engine.vae import load_vae
from tests.conftest import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("views") / "tiny")


@pytest.fixture(scope="module")
def scene(folder: Path) -> Shown:
    vae = load_vae(folder / "vae", device=torch.device("cpu"), dtype=torch.float32)
    return shown_world(1, "furnished", 5, 9, (48, 64), vae)


def test_labels_are_what_a_video_adds(scene: Shown) -> None:
    known, _, seen, share = draw(scene, torch.Generator().manual_seed(2))
    assert len(share) == len(seen) == len(known.ends) == len(known.pooled) == 3
    assert 0 < float(share.max()) < 1
    assert not scene.invented[0].any() and scene.seen[0, 0].all()
    # with the videos that were chosen before it, each adds less than alone
    for target in range(1, 5):
        others = [video for video in range(1, 5) if video != target]
        rest = scene.left(target, others)
        assert torch.equal(rest, scene.invented[target] & ~scene.seen[target, others].any(0))
        assert int(rest.sum()) <= int(scene.left(target, others[:1]).sum())
        assert not (scene.left_volume(target, others) & scene.volume[target, others[0]]).any()


def test_training_brings_the_labels_nearer(scene: Shown) -> None:
    def error(ranker: Ranker) -> float:
        generator, errors = torch.Generator().manual_seed(9), []
        for _ in range(20):
            known, left, seen, share = draw(scene, generator)
            with torch.no_grad():
                errors.append((ranker(known, left, seen).sigmoid() - share).abs().mean())
        return float(torch.stack(errors).mean())

    few, many = (train([scene], 16, steps, 3e-3) for steps in (1, 60))
    assert error(many) < 0.7 * error(few)


def test_the_command(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["ranking", "--checkpoint", str(folder), "--out", str(tmp_path), "--worlds", "1"]
    monkeypatch.setattr("sys.argv", [*words, "--cameras", "3", "--steps", "2"])
    ranking.main()
    assert 'memory_ranking="learned"' in capsys.readouterr().out
    Ranker.read(tmp_path, 16)
    monkeypatch.setattr("sys.argv", [*words, "--cameras", "2"])
    with pytest.raises(RequestError, match="--cameras must be at least 3, got 2"):
        ranking.main()
    # a copy beside it is not what the bare name gives
    (tmp_path / "tiny-nvs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ranking", "--checkpoint", "tiny-nvs", "--worlds", "1"])
    with pytest.raises(RequestError, match="tiny-nvs is embedded in the package; copy its folder"):
        ranking.main()
    monkeypatch.setattr("sys.argv", [*words, "--out", str(tmp_path / "ranking.safetensors")])
    with pytest.raises(RequestError, match="is a file, and the network lies in a folder"):
        ranking.main()
    blind = save_tiny(tmp_path / "blind", camera_conditioning="none")
    monkeypatch.setattr("sys.argv", ["ranking", "--checkpoint", str(blind)])
    with pytest.raises(TrainingError, match="has no cameras"):
        ranking.main()
