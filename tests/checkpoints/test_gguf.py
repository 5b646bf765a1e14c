"""GGUF files of transformers and text encoders, written by the package that reads them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mv2v_engine.checkpoints import detect, inspect_checkpoint, load_checkpoint, render_inspection
from mv2v_engine.checkpoints.weights import WeightReader, read_header
from mv2v_engine.errors import CheckpointError
from mv2v_engine.models.quantized import QuantizedLinear
from mv2v_engine.text import load_text_encoder
from tests.checkpoints.conftest import SMALL, fill, original_shapes
from tests.test_text import tiny_model, tiny_tokenizer

State = dict[str, Tensor]
# bytes of a block of 256 weights, and where its float16 scales lie; all else may be any bits
K_BLOCKS = {"Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}
KEY = "blocks.1.ffn.0.weight"


def write_gguf(
    path: Path,
    state: State,
    *,
    architecture: str = "wan",
    kinds: Mapping[str, str] | None = None,
) -> Path:
    """All in float32 but those whose kind is named."""
    gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
    writer, kinds = gguf.GGUFWriter(path, architecture), kinds or {}
    for name, tensor in state.items():
        kind = kinds.get(name, "F32")
        values: Any = tensor.float().numpy()
        if kind in K_BLOCKS:
            values = random_blocks(tensor, kind).numpy()
        elif kind != "F32":
            values = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(like: Tensor, kind: str) -> Tensor:
    """Bytes [rows, bytes] of small weights: the package cannot write these kinds."""
    size, scales = K_BLOCKS[kind]
    count = like.numel() // 256
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (count, size), generator=generator, dtype=torch.uint8)
    for at in scales:
        drawn = 1e-4 * (1 + torch.rand(count, 1, generator=generator))
        blocks[:, at : at + 2] = drawn.half().view(torch.uint8)
    return blocks.reshape(len(like), -1)


@pytest.fixture(scope="module")
def wan256() -> State:
    """Rows of 256, as K-quants need them."""
    config = replace(SMALL, num_attention_heads=2, ffn_dim=256, num_layers=2, merge_blocks=None)
    state = fill(original_shapes(config, camera=False))
    return {key: value / 16 if value.ndim == 2 else value for key, value in state.items()}


def test_a_file_of_float32_is_the_file(wan256: State, tmp_path: Path) -> None:
    save_file(wan256, tmp_path / "wan.safetensors")
    expected = load_checkpoint(tmp_path / "wan.safetensors").transformer.state_dict()
    loaded = load_checkpoint(write_gguf(tmp_path / "wan.gguf", wan256))
    for name, weight in loaded.transformer.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert loaded.format == "wan_original" and loaded.name == "wan"
    assert "a GGUF file of architecture 'wan'" in loaded.report.reason


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_weights_become_numbers_again(wan256: State, tmp_path: Path, kind: str) -> None:
    path = write_gguf(tmp_path / "wan.gguf", wan256, kinds={KEY: kind})
    gguf = pytest.importorskip("gguf")
    info = read_header(path)[KEY]
    assert info.shape == (256, 256)
    if kind in K_BLOCKS:
        raw = random_blocks(wan256[KEY], kind).numpy()
        expected = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]))
    elif kind == "Q8_0":
        # 32 weights a block, which are rounded to 127ths of the largest; that is float16
        expected = wan256[KEY].reshape(-1, 32)
        scale = expected.abs().amax(1, keepdim=True) / 127
    else:
        expected = wan256[KEY].to({"F16": torch.float16, "BF16": torch.bfloat16}[kind])
    with WeightReader() as reader:
        found = reader.read(info)
    rounding = (0.5 + 127 * 2**-11) * scale if kind == "Q8_0" else 0.0
    error = (found.float().reshape(expected.shape) - expected.float()).abs()
    assert (error <= rounding).all() and float(expected.float().abs().amax()) > 0
    loaded = load_checkpoint(path, dtype=torch.bfloat16)
    weight = loaded.transformer.get_submodule("blocks.1.ffn.net.0.proj").weight
    assert torch.equal(weight, found.to(torch.bfloat16))  # type: ignore[arg-type]
    named = {"F16": "float16", "BF16": "bfloat16"}.get(kind, kind)
    assert named in loaded.report.stored_dtypes


@pytest.mark.parametrize("order", ["little", "big"])
def test_other_versions_of_the_format_are_named(
    wan256: State, tmp_path: Path, order: Literal["little", "big"]
) -> None:
    path = write_gguf(tmp_path / "wan.gguf", wan256)
    content = path.read_bytes()
    path.write_bytes(content[:4] + (1).to_bytes(4, order) + content[8:])
    with pytest.raises(
        CheckpointError, match=r"a GGUF file of version 1, and versions 2 and 3 are"
    ):
        detect(path)
    path.write_bytes(content[:6])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        detect(path)


def test_inspect_says_how_it_is_stored(wan256: State, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "wan.gguf", wan256, kinds={KEY: "Q4_K"})
    found = inspect_checkpoint(path, deep=True)
    assert found.problem is None and found.dtypes["Q4_K"] == 1
    said = render_inspection(found)
    assert "a GGUF file of architecture 'wan'" in said and "Q4_K (1)" in said


def test_loras_and_eight_bits_go_with_it(wan256: State, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "wan.gguf", wan256, kinds={KEY: "Q8_0"})
    generator = torch.Generator().manual_seed(1)
    module = "diffusion_model.blocks.1.ffn.0"
    down, up = (torch.randn(*shape, generator=generator) for shape in ((2, 256), (256, 2)))
    save_file(
        {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, tmp_path / "l.safetensors"
    )
    loaded = load_checkpoint(path, lora=[(tmp_path / "l.safetensors", 0.5)], quantize="int8")
    with WeightReader() as reader:
        expected = reader.read(read_header(path)[KEY]) + 0.5 * up @ down
    layer = loaded.transformer.get_submodule("blocks.1.ffn.net.0.proj")
    assert isinstance(layer, QuantizedLinear)
    assert ((layer.weight - expected).abs() <= 0.501 * layer.scale).all()


def test_five_axes_may_be_four(wan256: State, tmp_path: Path) -> None:
    """ComfyUI-GGUF says the shape of what the format had no room for."""
    gguf = pytest.importorskip("gguf")
    key = "patch_embedding.weight"
    writer = gguf.GGUFWriter(tmp_path / "wan.gguf", "wan")
    for name, tensor in wan256.items():
        values = tensor.reshape(256, -1) if name == key else tensor
        writer.add_tensor(name, values.numpy())
    writer.add_array(f"comfy.gguf.orig_shape.{key}", list(wan256[key].shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load_checkpoint(tmp_path / "wan.gguf")
    assert torch.equal(loaded.transformer.patch_embedding.weight, wan256[key])


def test_another_architecture_is_named(wan256: State, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "flux.gguf", wan256, architecture="flux")
    with pytest.raises(CheckpointError, match=r"architecture 'flux'; expected a Wan transformer"):
        detect(path)
    text = write_gguf(tmp_path / "t5.gguf", llama_state(), architecture="t5encoder")
    with pytest.raises(CheckpointError, match=r"is a text encoder \(UMT5\), a component"):
        detect(text)


def test_what_the_package_does_not_undo(wan256: State, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "wan.gguf", wan256, kinds={KEY: "Q4_K"})
    key = gguf.GGMLQuantizationType.Q4_K
    traits = gguf.quants._type_traits
    kept = traits.pop(key)
    try:
        with pytest.raises(
            CheckpointError, match=rf"{KEY} is of type Q4_K, which the package gguf"
        ):
            load_checkpoint(path)
    finally:
        traits[key] = kept


def test_a_damaged_file(wan256: State, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "wan.gguf", wan256)
    content = path.read_bytes()
    for length in (20, 1000, len(content) - 5000):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"is a GGUF file that is truncated or damaged"):
            detect(path)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "wan.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\0" * 16)
    with pytest.raises(CheckpointError, match=r"pip install 'mv2v_engine\[gguf\]'"):
        detect(tmp_path / "wan.gguf")


def llama_state() -> State:
    """UMT5's tensors under llama.cpp's names."""
    state = {}
    for name, weight in tiny_model().named_parameters():
        for theirs, ours in (
            ("shared.", "token_embd."),
            ("encoder.final_layer_norm", "enc.output_norm"),
            ("encoder.block.", "enc.blk."),
            ("layer.0.SelfAttention.relative_attention_bias", "attn_rel_b"),
            ("layer.0.SelfAttention.", "attn_"),
            ("layer.0.layer_norm", "attn_norm"),
            ("layer.1.layer_norm", "ffn_norm"),
            ("layer.1.DenseReluDense.wi_0", "ffn_gate"),
            ("layer.1.DenseReluDense.wi_1", "ffn_up"),
            ("layer.1.DenseReluDense.wo", "ffn_down"),
        ):
            name = name.replace(theirs, ours)
        state[name] = weight.data
    return state


def test_a_text_encoder(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "text_encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    path = write_gguf(tmp_path / "umt5.gguf", llama_state(), architecture="t5encoder")
    given: dict[str, Any] = {
        "max_length": 12,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
    }
    expected, found = (
        load_text_encoder(place, tmp_path / "tokenizer", **given).encode("a red ball")
        for place in (tmp_path / "text_encoder", path)
    )
    assert torch.equal(found, expected)
