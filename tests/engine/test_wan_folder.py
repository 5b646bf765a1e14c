"""Wan's own folder, small: an engine from it alone, and as the components of another file."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import UMT5EncoderModel

from mv2v_engine import Engine, run
from mv2v_engine.models.autoencoder import Autoencoder
from tests.checkpoints.conftest import SMALL, fill, original_shapes
from tests.checkpoints.small_hub import SmallHub
from tests.test_text import original_t5_name
from tests.test_vae import original_name

State = dict[str, Tensor]


@pytest.fixture
def wan_folder(tmp_path: Path, worded_checkpoint: Path) -> Path:
    """`Wan2.1-T2V-1.3B` as it is downloaded; its transformer is `diffusion_pytorch_model`."""
    root = tmp_path / "Wan2.1-T2V-1.3B"
    root.mkdir()
    text = UMT5EncoderModel.from_pretrained(worded_checkpoint / "text_encoder")
    state = {original_t5_name(name): weight.data for name, weight in text.named_parameters()}
    torch.save(state, root / "models_t5_umt5-xxl-enc-bf16.pth")
    (root / "google").mkdir()
    (root / "google/umt5-xxl").symlink_to(worded_checkpoint / "tokenizer")
    torch.manual_seed(0)
    vae = Autoencoder({"base_dim": 8}).state_dict()
    torch.save({original_name(key): value for key, value in vae.items()}, root / "Wan2.1_VAE.pth")
    config = replace(SMALL, in_channels=16, out_channels=16, text_dim=text.config.d_model)
    weights = fill(original_shapes(config, camera=False))
    save_file(weights, str(root / "diffusion_pytorch_model.safetensors"))
    return root


def test_it_loads_alone_and_as_components(tmp_path: Path, wan_folder: Path) -> None:
    alone = Engine.from_pretrained(wan_folder, device="cpu")
    lone = tmp_path / "lone" / "step20000.safetensors"
    lone.parent.mkdir()
    (wan_folder / "diffusion_pytorch_model.safetensors").rename(lone)
    given = Engine.from_pretrained(lone, device="cpu", components=wan_folder)
    assert alone.vae.key == given.vae.key and alone.vae.latent_channels == 16
    assert alone.text is not None and given.text is not None
    assert torch.equal(alone.text.encode("a red ball"), given.text.encode("a red ball"))


def test_a_lone_transformer_needs_components(
    hub: SmallHub, wan_folder: Path, source_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(wan_folder, hub.root / "wan/Wan2.1")
    config = replace(SMALL, in_channels=16, out_channels=16, text_dim=16)
    (hub.root / "kling/cameras").mkdir(parents=True)
    weights = fill(original_shapes(config, camera=True))
    torch.save(weights, hub.root / "kling/cameras/step20000.ckpt")
    words = ["novel-view", str(source_clip), "--camera", "pan_right", "--out", "out"]
    assert run.main([*words, "--checkpoint", "kling/cameras", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "cameras (recammaster) holds no VAE; give" in said and said.count("\n") == 1
    assert not hub.fetched()
    engine = Engine.from_pretrained("kling/cameras", components="wan/Wan2.1", device="cpu")
    assert engine.checkpoint.name == "cameras" and engine.text is not None
    assert "wan/Wan2.1/diffusion_pytorch_model.safetensors" not in hub.fetched()
