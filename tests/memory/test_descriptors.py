"""Descriptors of segments: DINOv2's own embeddings, and what folders of another kind are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.errors import CheckpointError, RequestError, VideoError
from mv2v_engine.memory.descriptors import latent_descriptor, load_dino
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import make_world

CPU = torch.device("cpu")


def clip(seed: int, camera: str = "pan_right") -> Tensor:
    return render(make_world(seed), named_trajectory(camera, 9, (48, 80))).frames


def _processor() -> Any:
    """DINOv2's own preprocessing, under the name that needs no torchvision."""
    import transformers

    return getattr(transformers, "BitImageProcessorPil", transformers.BitImageProcessor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DINOv2 as transformers saves it, with a small crop."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14
    )
    path = tmp_path_factory.mktemp("dino")
    Dinov2Model(config).save_pretrained(path)
    _processor()(
        size={"shortest_edge": 64},
        crop_size={"height": 56, "width": 56},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.25],
        do_convert_rgb=True,
    ).save_pretrained(path)
    return path


def test_it_is_the_mean_of_the_models_own_embeddings(folder: Path) -> None:
    from transformers import BitImageProcessorPil, Dinov2Model

    frames = clip(1)
    processor, model = (
        BitImageProcessorPil.from_pretrained(folder),
        Dinov2Model.from_pretrained(folder),
    )
    pixels = processor(list(frames.numpy()), return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
        expected = model.eval()(**pixels).pooler_output.mean(0)
    got = load_dino(folder, device=CPU)(frames)
    # torch's bicubic and Pillow's round differently
    assert F.cosine_similarity(got, expected, dim=0) > 0.999
    assert got.dtype == torch.float32 and got.shape == (48,)


@pytest.mark.parametrize("batch_size", [1, 4, 9, 100])
def test_batches_do_not_matter(folder: Path, batch_size: int) -> None:
    frames = clip(2)
    whole = load_dino(folder, device=CPU)(frames)
    torch.testing.assert_close(load_dino(folder, device=CPU, batch_size=batch_size)(frames), whole)


def test_two_views_of_a_world_are_more_alike_than_two_worlds() -> None:
    means = [
        F.avg_pool2d(c.permute(3, 0, 1, 2).float() - 128, 8)
        for c in (clip(1, "static"), clip(1, "tilt_up"), clip(2, "static"))
    ]
    one, other_view, other_world = (latent_descriptor(m) for m in means)
    alike = F.cosine_similarity(one, other_view, dim=0)
    assert alike > F.cosine_similarity(one, other_world, dim=0)


def test_latents_of_any_length_and_size_compare() -> None:
    assert latent_descriptor(torch.randn(16, 5, 12, 20)).shape == (256,)
    assert latent_descriptor(torch.randn(16, 1, 3, 5)).shape == (256,)
    constant = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 2, 8, 8)
    assert torch.equal(latent_descriptor(constant), torch.arange(3.0).repeat_interleave(16))
    with pytest.raises(RequestError, match=r"\[C, F, H, W\], got \[1, 2, 3\]"):
        latent_descriptor(torch.zeros(1, 2, 3))


def test_frames_that_are_none(folder: Path) -> None:
    describe = load_dino(folder, device=CPU)
    with pytest.raises(VideoError, match=r"uint8 \[T, height, width, 3\], got torch.float32"):
        describe(torch.zeros(1, 8, 8, 3))
    with pytest.raises(VideoError, match="at least one frame"):
        describe(torch.zeros(0, 8, 8, 3, dtype=torch.uint8))


def test_folders_of_the_wrong_kind(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no readable"):
        load_dino(tmp_path, device=CPU)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match="of type 'clip', expected dinov2"):
        load_dino(tmp_path, device=CPU)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="cannot be read as a DINOv2"):
        load_dino(tmp_path, device=CPU)


def test_a_folder_that_lacks_weights(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"lacks 1 weights, the first is layernorm\.weight"):
        load_dino(tmp_path, device=CPU)


def test_a_crop_that_the_model_cannot_see(folder: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    path = tmp_path / "preprocessor_config.json"
    processor = json.loads(path.read_text())
    path.write_text(json.dumps({**processor, "crop_size": {"height": 80, "width": 80}}))
    with pytest.raises(CheckpointError, match="cannot see a crop of 80 from 64 pixels"):
        load_dino(tmp_path, device=CPU)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="says nothing of size"):
        load_dino(tmp_path, device=CPU)
