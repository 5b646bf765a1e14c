"""DINO-F and CLIP-F with tiny models of the real classes, and folders that hold something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from mv2v_engine.errors import CheckpointError, VideoError
from mv2v_engine.evaluation.frame_features import frame_consistency, load_frame_features

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(path)
    # a whole CLIP's folder says so; its image half is what is loaded
    said = json.loads((path / "config.json").read_text())
    text = {"model_type": "clip_text_model"}
    whole = {"model_type": "clip", "vision_config": said, "text_config": text}
    (path / "config.json").write_text(json.dumps({**whole, "projection_dim": 24}))
    return path


def _frames(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (count, 3, 6, 10), generator=generator).float()
    large = torch.nn.functional.interpolate(small, (48, 80), mode="bilinear")
    return large.permute(0, 2, 3, 1).to(torch.uint8)


def test_dino_scores_a_still_clip_highest(dino: Path) -> None:
    features = load_frame_features(dino, device=CPU)
    assert (features.name, features.crop) == ("DINO-F", 224)
    moving = features.embed(_frames(19))
    assert moving.shape == (19, 32)
    torch.testing.assert_close(moving.norm(dim=-1), torch.ones(19))
    still = frame_consistency(features.embed(_frames(1).expand(5, -1, -1, -1)))
    score = frame_consistency(moving)
    assert still == pytest.approx(1, abs=1e-5)
    assert score is not None and score < 0.999
    assert frame_consistency(moving[:1]) is None


def test_clip_gives_its_image_embeddings(clip: Path) -> None:
    features = load_frame_features(clip, device=CPU)
    assert (features.name, features.crop) == ("CLIP-F", 28)
    assert features.embed(_frames(3)).shape == (3, 24)


def test_the_score_is_the_mean_of_two_cosines() -> None:
    turned = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    # with the frame before: 0.6, 0.8; with the first: 0.6, 0
    assert frame_consistency(turned) == pytest.approx((0.6 + 0.8 + 0.6 + 0.0) / 4)


def test_other_folders_and_frames(dino: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no readable config\.json"):
        load_frame_features(tmp_path, device=CPU)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match=r"of type 'bert', expected dinov2"):
        load_frame_features(tmp_path, device=CPU)
    config = json.loads((dino / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="cannot be read as a dinov2"):
        load_frame_features(tmp_path, device=CPU)
    (tmp_path / "model.safetensors").write_bytes((dino / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"lacks \d+ weights"):
        load_frame_features(tmp_path, device=CPU)
    with pytest.raises(VideoError, match="frames must be uint8"):
        load_frame_features(dino, device=CPU).embed(torch.zeros(2, 8, 8, 3))
