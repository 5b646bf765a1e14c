"""ST-LPIPS on random weights, against what its authors' own code gives on the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine.errors import CheckpointError
from mv2v_engine.evaluation.perceptual import load_perceptual_distance

CONVOLUTIONS = {
    "slice1.0": (64, 3, 11, 11),
    "slice2.5": (192, 64, 5, 5),
    "slice3.9": (384, 192, 3, 3),
    "slice4.11": (256, 384, 3, 3),
    "slice5.13": (256, 256, 3, 3),
}


def random_weights() -> dict[str, Tensor]:
    """In the form of the package's file."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1),
    }
    for index, (name, shape) in enumerate(CONVOLUTIONS.items()):
        scale = (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        weights[f"net.{name}.weight"] = scale * torch.randn(shape, generator=generator)
        weights[f"net.{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
        weights[f"lin{index}.model.1.weight"] = torch.rand(1, shape[0], 1, 1, generator=generator)
    return weights


def frames(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (9, 32, 48, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The weights' file of a package that lies before any other."""
    path = tmp_path / "stlpips_pytorch" / "weights" / "vST0.0" / "alex_shift_tolerant.pth"
    path.parent.mkdir(parents=True)
    (tmp_path / "stlpips_pytorch" / "__init__.py").write_text("raise ImportError('not needed')")
    torch.save(random_weights(), path)
    monkeypatch.syspath_prepend(tmp_path)
    return path


def test_it_is_what_the_authors_code_gives(package: Path) -> None:
    measure = load_perceptual_distance()
    assert measure is not None
    one, other = measure.features(frames(0)), measure.features(frames(1))
    # two of nine frames: the fifth and the ninth
    assert {len(layer) for layer in one} == {2}
    assert measure.distance(one, other) == pytest.approx(0.716982, rel=1e-4)
    assert measure.distance(one, one) == 0


def test_without_the_extra_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stlpips_pytorch", None)
    assert load_perceptual_distance() is None


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_weights_that_cannot_be_read_are_refused(package: Path, content: bytes | None) -> None:
    package.unlink() if content is None else package.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights of ST-LPIPS in .*stlpips-pytorch==0.0.2"):
        load_perceptual_distance()
