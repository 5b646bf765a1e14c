"""Detection: what each file or folder is, and one clear error for what is none."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mv2v_engine.checkpoints import detect, embedded_names
from mv2v_engine.checkpoints.weights import WeightReader, read_header
from mv2v_engine.errors import CheckpointError
from tests.checkpoints.conftest import State, write

EXPERTS = ("high_noise_model", "low_noise_model")


class Unwelcome:
    """Any object that a state dict should not hold."""


@pytest.mark.parametrize("name", ["wan.safetensors", "wan.pth", "wan.ckpt"])
def test_single_files(
    tmp_path: Path, wan: State, recammaster: State, memory: State, name: str
) -> None:
    assert detect(write(tmp_path / "a" / name, wan)).format == "wan_original"
    assert detect(write(tmp_path / "b" / name, recammaster)).format == "recammaster"
    found = detect(write(tmp_path / "c" / name, memory))
    assert found.format == "memory_v2v"
    assert "3 blocks" in found.reason and "8 keys of unknown modules" in found.reason


def test_content_decides_and_not_the_suffix(tmp_path: Path, wan: State) -> None:
    path = write(tmp_path / "wan.safetensors", wan).rename(tmp_path / "wan.ckpt")
    assert detect(path).format == "wan_original"


def test_original_folder_ignores_its_companions(tmp_path: Path, wan: State) -> None:
    write(tmp_path / "diffusion_pytorch_model.safetensors", wan)
    write(tmp_path / "Wan2.1_VAE.pth", {"conv1.weight": torch.zeros(2)})
    write(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth", {"token_embedding.weight": torch.zeros(2)})
    found = detect(tmp_path)
    assert found.format == "wan_original" and found.config_file is None
    assert [file.name for file in found.files] == ["diffusion_pytorch_model.safetensors"]


def test_lone_ckpt_in_a_folder(tmp_path: Path, recammaster: State) -> None:
    write(tmp_path / "step20000.ckpt", recammaster)
    write(tmp_path / "Wan2.1_VAE.pth", {"conv1.weight": torch.zeros(2)})
    assert detect(tmp_path).format == "recammaster"


def split(folder: Path, state: State, *, index: bool) -> list[str]:
    keys = list(state)
    names = [f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        write(folder / name, {key: state[key] for key in keys[i::3]})
    if index:
        weight_map = {key: names[i % 3] for i, key in enumerate(keys)}
        path = folder / "diffusion_pytorch_model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}))
    return names


@pytest.mark.parametrize("index", [True, False])
def test_shards(tmp_path: Path, wan: State, index: bool) -> None:
    names = split(tmp_path, wan, index=index)
    assert set(detect(tmp_path).tensors) == set(wan)
    assert set(detect(tmp_path / names[1]).tensors) == set(wan)
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"lacks 1 of 3 weight shards: {names[1]}"):
        detect(tmp_path)


def test_missing_path_offers_embedded_names_or_says_none() -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at 'tiny-nvz'.*embedded name"):
        detect("tiny-nvz")


def test_embedded_names_are_own_folders() -> None:
    for name in embedded_names():
        found = detect(name)
        assert found.format == "mv2v_engine" and found.folder.name == name


def test_empty_file_and_folder(tmp_path: Path) -> None:
    path = tmp_path / "wan.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match="is empty"):
        detect(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no transformer weights \(found nothing\)"):
        detect(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n", "LFS pointer"),
        (b"\n<!DOCTYPE html><html><body>401</body></html>", "web page"),
        (b"<html><body>Access denied</body></html>", "web page"),
        (b"hello, I am a text", "is text that begins 'hello, I am a text'; expected weights"),
        (b"\x00\x01\x02\x03" * 9, "no weight file"),
        (b'{"error": "Entry not found"}', "is JSON that begins .*Entry not found"),
        (b"GGUF\x03\0\0\0" + b"\x05" * 40, "is a GGUF file"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "is a PNG image; expected weights"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "is a JPEG image"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "is a WebP image"),
        (b"\0\0\0\x20ftypisom\0\0\x02\0", "is a video"),
        (b"\x1f\x8b\x08\0" + b"\x03" * 40, "is a gzip archive: unpack it"),
        (pickle.dumps({"a": 1}), "bare pickle"),
    ],
)
def test_what_is_not_weights_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    for name in ("wan.pth", "wan.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        if name.endswith("s") and says in ("no weight file", "bare pickle"):
            says = "truncated or damaged"  # told by its name; nothing says that it is another
        with pytest.raises(CheckpointError, match=says) as caught:
            detect(path)
        assert "\n" not in str(caught.value)


def test_old_torch_files_are_told(tmp_path: Path, wan: State) -> None:
    path = tmp_path / "wan.pth"
    torch.save(wan, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before torch 1\.6"):
        detect(path)


def test_pickled_objects_are_refused(tmp_path: Path, wan: State) -> None:
    path = tmp_path / "wan.pth"
    torch.save({"state_dict": wan, "trainer": Unwelcome()}, path)
    with pytest.raises(CheckpointError, match="Python objects besides tensors, refused"):
        detect(path)


@pytest.mark.parametrize("name", ["wan.safetensors", "wan.pth"])
@pytest.mark.parametrize("keep", [0.3, 0.97, 0.9999])
def test_truncated_files(tmp_path: Path, wan: State, name: str, keep: float) -> None:
    path = write(tmp_path / name, wan)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        detect(path)


def test_other_zip_files_and_empty_dicts(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(CheckpointError, match=r"is a zip archive of a\.txt; .*unpack it"):
        detect(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match="without tensors"):
        detect(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(CheckpointError, match=r"holds a list; expected a state dict"):
        detect(path)


def test_programs_and_arrays_are_no_damaged_weights(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name in ("version", "data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"a/{name}", "3\n")
    np.savez(tmp_path / "a.npz", weight=np.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match=r"is a program \(TorchScript.*state_dict"):
            detect(tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=r"is an archive of NumPy arrays"):
            detect(tmp_path / "a.npz")


OTHERS = {
    "LoRA of rank 4 for 1 layers": {
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight": (4, 8),
        "diffusion_model.blocks.0.self_attn.q.lora_B.weight": (8, 4),
    },
    "LoRA of rank 2": {"lora_unet_blocks_0_self_attn_q.lora_down.weight": (2, 8)},
    "Wan2.1's VAE, a component": {
        "decoder.middle.0.residual.0.gamma": (8, 1, 1, 1),
        "conv2.weight": (16, 16, 1, 1, 1),
    },
    "Wan2.2's VAE, a component": {
        "decoder.mid_block.resnets.0.norm1.gamma": (8, 1, 1, 1),
        "post_quant_conv.weight": (48, 48, 1, 1, 1),
    },
    "text encoder \\(UMT5\\), a component": {
        "blocks.0.attn.q.weight": (8, 8),
        "blocks.1.pos_embedding.embedding.weight": (32, 2),
    },
    "text encoder \\(T5\\)": {"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)},
    "Stable Diffusion checkpoint": {
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
        "first_stage_model.decoder.up.0.block.0.norm1.weight": (8,),
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (8, 8),
    },
    "FLUX": {"double_blocks.0.img_attn.qkv.weight": (8, 8)},
    "CLIP text encoder": {"text_model.encoder.layers.0.mlp.fc1.weight": (8, 8)},
    "VAE of another model": {"decoder.up.0.block.0.norm1.weight": (8,)},
    "language model": {"model.layers.0.self_attn.q_proj.weight": (8, 8)},
    "one rank's part": {"_fsdp_wrapped_module._flat_param": (8,)},
    "first keys: some.thing": {"some.thing": (8,)},
}


@pytest.mark.parametrize("says", OTHERS)
def test_other_models_are_named(tmp_path: Path, says: str) -> None:
    state = {key: torch.zeros(shape) for key, shape in OTHERS[says].items()}
    for name in ("other.safetensors", "other.pth"):
        with pytest.raises(CheckpointError, match=says) as caught:
            detect(write(tmp_path / name, state))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "says"),
    [("img_emb.proj.0.bias", "image-to-video"), ("motion_encoder.0.bias", "Animate")],
)
def test_other_wan_models_are_named(tmp_path: Path, wan: State, key: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=f"is a {says} checkpoint"):
        detect(write(tmp_path / "other.safetensors", wan | {key: torch.zeros(2)}))


def test_a_second_attention_for_cameras_is_named(tmp_path: Path, wan: State) -> None:
    branch = {f"blocks.{n}.prope_attn.q_proj.weight": torch.zeros(2, 2) for n in range(3)}
    path = write(tmp_path / "memorizon.safetensors", wan | branch)
    with pytest.raises(
        CheckpointError,
        match=r"second attention .*\(blocks\.0\.prope_attn\.q_proj\.weight and 2 more .* "
        r"frame slots and masks, .*camera_attention of mv2v\.json",
    ):
        detect(path)


def test_other_pipelines_are_named(tmp_path: Path) -> None:
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"FluxPipeline.*WanTransformer3DModel"):
        detect(tmp_path)


PIPELINE = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}


@pytest.mark.parametrize("names", [("transformer", "transformer_2"), EXPERTS])
@pytest.mark.parametrize("index", [True, False])
def test_two_experts_are_refused_and_each_of_them(
    tmp_path: Path, wan: State, names: tuple[str, str], index: bool
) -> None:
    root = tmp_path / "Wan2.2-T2V-A14B"
    for name in names:
        write(root / name / "diffusion_pytorch_model.safetensors", wan)
        (root / name / "config.json").write_text("{}")
    if index:
        second = {"transformer_2": PIPELINE["transformer"], "boundary_ratio": 0.875}
        (root / "model_index.json").write_text(json.dumps(PIPELINE | second))
    with pytest.raises(CheckpointError, match=r"has two experts.*one transformer for all") as said:
        detect(root)
    assert "give one" not in str(said.value)
    for name in names:
        for path in (root / name, root / name / "diffusion_pytorch_model.safetensors"):
            with pytest.raises(CheckpointError, match="is one of two experts"):
                detect(path)


def test_an_expert_without_the_other_is_known_by_name_or_index(tmp_path: Path, wan: State) -> None:
    for name in (
        "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        "Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors",
        "Wan2.2-T2V-A14B-HighNoise-Q8.safetensors",
        "low_noise_model/diffusion_pytorch_model-00001-of-00001.safetensors",
    ):
        with pytest.raises(CheckpointError, match="one of two experts"):
            detect(write(tmp_path / name, wan))
    alone = write(tmp_path / "a/transformer" / "diffusion_pytorch_model.safetensors", wan)
    index = PIPELINE | {"transformer_2": [None, None], "boundary_ratio": None}
    (tmp_path / "a/model_index.json").write_text(json.dumps(index))
    assert detect(alone.parent).format == detect(tmp_path / "a").format == "wan_original"
    (tmp_path / "a/model_index.json").write_text(json.dumps(PIPELINE | {"boundary_ratio": 0.9}))
    for path in (tmp_path / "a", alone.parent, alone):
        with pytest.raises(CheckpointError, match="two experts"):
            detect(path)


@pytest.mark.parametrize("names", [("transformer", "transformer_2"), EXPERTS])
def test_experts_of_one_file_folder_or_link(
    tmp_path: Path, wan: State, names: tuple[str, str]
) -> None:
    whole = write(tmp_path / "both.pth", dict.fromkeys(names, wan))
    for path in (whole, *(f"{whole}#{name}" for name in names)):
        with pytest.raises(CheckpointError, match=r"both\.pth has two experts") as said:
            detect(path)
        assert "PATH#NAME" not in str(said.value)
    for name in names:
        inner = write(tmp_path / "pair" / name / "model.safetensors", wan)
        link = tmp_path / f"my_{names.index(name)}.safetensors"
        link.symlink_to(inner)
    for link in tmp_path.glob("my_?.safetensors"):
        with pytest.raises(CheckpointError, match="is one of two experts"):
            detect(link)
    lone = write(tmp_path / "lone.pth", {names[1]: wan})
    with pytest.raises(CheckpointError, match=f"by the name that it lies under, {names[1]}"):
        detect(lone)
    for name in ("wan2.2_t2v_high_noise_14B", "wan2.2_t2v_low_noise_14B"):
        write(tmp_path / "comfy" / f"{name}.safetensors", wan)
    with pytest.raises(CheckpointError, match="comfy has two experts"):
        detect(tmp_path / "comfy")
    for name in ("high", "low"):
        lone = write(tmp_path / "short" / name / "wan.safetensors", wan)
    for path, says in ((tmp_path / "short", "has two experts"), (lone, "is one of two experts")):
        with pytest.raises(CheckpointError, match=says):
            detect(path)


@pytest.mark.parametrize("name", ["Wan2.2-TI2V-5B", "wan2.1_high_quality", "highland", "slow"])
def test_other_names_are_no_experts(tmp_path: Path, wan: State, name: str) -> None:
    assert detect(write(tmp_path / f"{name}.safetensors", wan)).format == "wan_original"


def test_several_weight_files_must_be_chosen(tmp_path: Path, wan: State) -> None:
    write(tmp_path / "a.ckpt", wan)
    write(tmp_path / "b.ckpt", wan)
    with pytest.raises(CheckpointError, match=r"a\.ckpt, b\.ckpt.*give one"):
        detect(tmp_path)


@pytest.mark.parametrize("name", ["wan.safetensors", "wan.pth"])
def test_reader_hands_out_every_tensor_over_reopenings(
    tmp_path: Path, wan: State, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mv2v_engine.checkpoints import weights

    monkeypatch.setattr(weights, "_RECYCLE_MIN_BYTES", 1000)
    path = write(tmp_path / name, wan | {"half": torch.arange(5, dtype=torch.bfloat16)})
    header = read_header(path)
    assert header["half"].dtype == torch.bfloat16 and header["half"].num_bytes == 10
    with WeightReader() as reader:
        for key, value in wan.items():
            torch.testing.assert_close(reader.read(header[key]), value, rtol=0, atol=0)
