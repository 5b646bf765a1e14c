"""Components in the layouts that users have: diffusers', Wan's own, ComfyUI's, one file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mv2v_engine.checkpoints import load_checkpoint
from mv2v_engine.checkpoints.components import find_components
from mv2v_engine.errors import CheckpointError
from tests.checkpoints.conftest import State, write


def vae(channels: int = 16) -> State:
    """The tensors that tell an original Wan VAE."""
    return {
        "decoder.middle.0.residual.0.gamma": torch.ones(2),
        "conv2.weight": torch.ones(channels),
    }


def text() -> State:
    return {"blocks.0.attn.q.weight": torch.ones(2, 2), "token_embedding.weight": torch.ones(2, 2)}


def umt5() -> State:
    return {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2)}


def folder(path: Path, config: str, name: str = "config.json") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(config)
    return path


def wans_own(root: Path, name: str = "Wan2.1_VAE.pth") -> tuple[Path, Path, Path]:
    return (
        write(root / name, vae(48 if "2.2" in name else 16)),
        write(root / "models_t5_umt5-xxl-enc-bf16.pth", text()),
        folder(root / "google/umt5-xxl", "{}", "tokenizer_config.json"),
    )


def test_diffusers_folder(tmp_path: Path) -> None:
    expected = (
        folder(tmp_path / "vae", '{"_class_name": "AutoencoderKLWan"}'),
        folder(tmp_path / "text_encoder", '{"architectures": ["UMT5EncoderModel"]}'),
        folder(tmp_path / "tokenizer", "{}", "tokenizer_config.json"),
    )
    found = find_components(tmp_path)
    found.require_all()
    assert (found.vae(16), found.text_encoder, found.tokenizer) == expected


@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "Wan2.2_VAE.pth"])
def test_wans_own_folder(tmp_path: Path, wan: State, name: str) -> None:
    expected = wans_own(tmp_path, name)
    write(
        tmp_path / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", {"a": torch.ones(2)}
    )
    found = find_components(tmp_path)
    found.require_all()
    assert (found.vae(16), found.text_encoder, found.tokenizer) == expected
    # the transformer that lies there finds them itself
    write(tmp_path / "diffusion_pytorch_model.safetensors", wan)
    loaded = load_checkpoint(tmp_path)
    assert (loaded.vae_path, loaded.text_path, loaded.tokenizer_path) == expected


def test_comfyuis_folder_and_a_vae_for_each_model(tmp_path: Path) -> None:
    first = write(tmp_path / "vae/wan_2.1_vae.safetensors", vae())
    second = write(tmp_path / "vae/wan2.2_vae.safetensors", vae(48))
    write(tmp_path / "vae/ae.safetensors", {"decoder.conv_in.weight": torch.ones(2)})
    (tmp_path / "vae/broken.safetensors").write_bytes(b"1")
    encoder = write(tmp_path / "text_encoders/umt5_xxl_fp16.safetensors", umt5())
    write(tmp_path / "text_encoders/clip_l.safetensors", {"text_model.a": torch.ones(2)})
    tokenizer = folder(tmp_path / "umt5-xxl", "{}", "tokenizer_config.json")
    found = find_components(tmp_path)
    assert found.vae(16) == first and found.vae(48) == second
    assert found.text_encoder == encoder and found.tokenizer == tokenizer
    with pytest.raises(CheckpointError, match=r"several VAEs \(wan2\.2_vae\.safetensors, wan_2\.1"):
        found.vae(8)
    write(tmp_path / "text_encoders/umt5_xxl_fp8.safetensors", umt5())
    with pytest.raises(CheckpointError, match=r"several text encoders \(umt5_xxl_fp16.*that is"):
        _ = find_components(tmp_path).text_encoder
    # T5 of other models does not count beside UMT5
    (tmp_path / "text_encoders/umt5_xxl_fp8.safetensors").unlink()
    positions = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    write(encoder, umt5() | {positions: torch.ones(2)})
    write(tmp_path / "text_encoders/t5xxl_fp16.safetensors", umt5())
    assert find_components(tmp_path).text_encoder == encoder
    write(tmp_path / "text_encoders/umt5_xxl_fp8.safetensors", umt5() | {positions: torch.ones(2)})
    # beside a checkpoint, whose user may have named another place
    assert find_components(tmp_path, is_asked=False).text_encoder is None


def test_a_file_with_everything(tmp_path: Path, wan: State) -> None:
    state = {f"model.diffusion_model.{key}": value for key, value in wan.items()}
    state |= {f"vae.{key}": value for key, value in vae().items()}
    state |= {f"text_encoders.umt5xxl.transformer.{key}": value for key, value in umt5().items()}
    path = write(tmp_path / "all.safetensors", state)
    tokenizer = folder(tmp_path / "tokenizer", "{}", "tokenizer_config.json")
    loaded = load_checkpoint(path)
    assert loaded.vae_path == loaded.text_path == path and loaded.tokenizer_path == tokenizer
    found = find_components(path)
    assert found.vae(16) == found.text_encoder == path


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("Wan2.1_VAE.pth", r"lacks a VAE: vae/ .*there: google, models_t5.*give a folder with all"),
        ("models_t5_umt5-xxl-enc-bf16.pth", "lacks a text encoder: .*umt5_xxl_fp16"),
        ("google/umt5-xxl/tokenizer_config.json", "lacks a tokenizer: .*google/umt5-xxl"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, lost: str, says: str) -> None:
    wans_own(tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(CheckpointError, match=says):
        find_components(tmp_path).require_all()


def test_a_damaged_file_is_said_where_it_was_asked_for(tmp_path: Path, wan: State) -> None:
    wans_own(tmp_path)
    path = tmp_path / "Wan2.1_VAE.pth"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match=r"Wan2\.1_VAE\.pth is truncated"):
        find_components(tmp_path)
    # the checkpoint beside it may have been given other components
    write(tmp_path / "diffusion_pytorch_model.safetensors", wan)
    assert load_checkpoint(tmp_path).vae_path is None
    with pytest.raises(CheckpointError, match="does not exist"):
        find_components(tmp_path / "none")
