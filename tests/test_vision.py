"""Image encoders: transformers' own embeddings of whole frames, and folders of another kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.errors import CheckpointError, RequestError, VideoError
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import make_world
from mv2v_engine.vision import DINO, load_frame_encoder

CPU = torch.device("cpu")
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
PROCESSOR = {"crop_size": {"height": 56}, "image_mean": MEAN, "image_std": STD}


def frames(seed: int = 1) -> Tensor:
    return render(make_world(seed), named_trajectory("pan_right", 9, (48, 80))).frames


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
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


def expected_pixels(video: Tensor, side: int, mean: Any, std: Any) -> Tensor:
    planes = F.interpolate(
        video.permute(0, 3, 1, 2).float(), (side, side), mode="bicubic", antialias=True
    )
    pixels = planes.clamp(0, 255) / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@torch.no_grad()
def test_dino_gives_its_own_embeddings_of_whole_frames(dino: Path) -> None:
    model: Any = Dinov2Model.from_pretrained(dino).eval()
    expected = model(pixel_values=expected_pixels(frames(), 56, MEAN, STD)).pooler_output
    encode = load_frame_encoder(dino, device=CPU)
    assert (encode.kind, encode.side) == ("dinov2", 56)
    torch.testing.assert_close(encode(frames()), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_clip_gives_its_image_embeddings(clip: Path) -> None:
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    pixels = expected_pixels(frames(), 28, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    model: Any = CLIPVisionModelWithProjection.from_pretrained(clip).eval()
    got = load_frame_encoder(clip, device=CPU)(frames())
    assert got.shape == (9, 24)
    torch.testing.assert_close(got, model(pixel_values=pixels).image_embeds, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 9, 100])
def test_batches_do_not_matter(dino: Path, batch_size: int) -> None:
    whole = load_frame_encoder(dino, device=CPU)(frames())
    got = load_frame_encoder(dino, device=CPU, batch_size=batch_size)(frames())
    torch.testing.assert_close(got, whole)


def test_without_a_preprocessor_the_published_size(dino: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((dino / name).read_bytes())
    assert load_frame_encoder(tmp_path, device=CPU).side == 224


def test_frames_that_are_none(dino: Path) -> None:
    encode = load_frame_encoder(dino, device=CPU)
    for wrong in (torch.zeros(1, 8, 8, 3), torch.zeros(0, 8, 8, 3, dtype=torch.uint8)):
        with pytest.raises(VideoError, match=r"uint8 \[T, height, width, 3\] with T >= 1, got"):
            encode(wrong)
    with pytest.raises(RequestError, match="batch_size must be at least 1, got 0"):
        load_frame_encoder(dino, device=CPU, batch_size=0)


def test_folders_of_the_wrong_kind(dino: Path, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no readable config\.json .* folder of dinov2 or"):
        load_frame_encoder(tmp_path, device=CPU)
    with pytest.raises(CheckpointError, match="of type 'clip', expected dinov2 or dinov2_with"):
        load_frame_encoder(clip, device=CPU, kinds=DINO)
    config = json.loads((dino / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="cannot be read as a dinov2"):
        load_frame_encoder(tmp_path, device=CPU)
    (tmp_path / "model.safetensors").write_bytes((dino / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"lacks \d+ weights, the first is encoder"):
        load_frame_encoder(tmp_path, device=CPU)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{}", "says nothing of crop_size"),
        ("[]", "is no JSON object"),
        (json.dumps({**PROCESSOR, "crop_size": {"height": 7}}), "7 pixels with mean"),
        (json.dumps({**PROCESSOR, "image_std": [0, 1, 1]}), "are no input of a network of 14"),
    ],
)
def test_preprocessing_that_makes_no_sense(
    dino: Path, tmp_path: Path, said: str, message: str
) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((dino / name).read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(said)
    with pytest.raises(CheckpointError, match=message):
        load_frame_encoder(tmp_path, device=CPU)
