"""Scaled float8: a weight is its number times its scale, or it is refused; never bare."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mv2v_engine.checkpoints import inspect_checkpoint, load_checkpoint, render_inspection
from mv2v_engine.errors import CheckpointError

State = dict[str, Tensor]
Rename = Callable[[str], str]
E4M3 = torch.float8_e4m3fn


def quantised(wan: State, scale_leaf: str, *, rows: tuple[int, ...] | None = ()) -> State:
    """The blocks' linear weights as float8; rows: a scale's shape, None: [rows, 1]."""
    state = {}
    for key, value in wan.items():
        if key.startswith("blocks.") and key.endswith(".weight") and value.ndim == 2:
            shape = (len(value), 1) if rows is None else rows
            scale = value.abs().amax(dim=1, keepdim=True) / 448
            scale = scale if rows is None else scale.amax()
            state[key] = (value / scale).to(E4M3)
            state[f"{key.removesuffix('weight')}{scale_leaf}"] = scale.reshape(shape)
        else:
            state[key] = value
    return state


def products(state: State, scale_leaf: str, renamed: Rename) -> State:
    """What the weights are, by our names."""
    values = {}
    for key, value in state.items():
        if value.dtype == E4M3 and value.numel() > 2:
            scale = state[f"{key.removesuffix('weight')}{scale_leaf}"]
            value = value.float() * scale.reshape(-1, 1)
        if not key.endswith(("scale_weight", "weight_scale", "input_scale", "comfy_quant")):
            values[renamed(key)] = value
    return values


@pytest.mark.parametrize("name", ["wan.safetensors", "wan.pth"])
@pytest.mark.parametrize(
    ("leaf", "rows"), [("scale_weight", ()), ("scale_weight", (1,)), ("weight_scale", None)]
)
def test_weights_are_their_products(
    tmp_path: Path, wan: State, renamed: Rename, name: str, leaf: str, rows: tuple[int, ...] | None
) -> None:
    state = quantised(wan, leaf, rows=rows)
    expected = products(state, leaf, renamed)
    module = "blocks.0.self_attn.q"
    # what lies beside them for eight-bit products, under ComfyUI's prefix
    extra = {"scaled_fp8": torch.zeros(2, dtype=E4M3)} if leaf == "scale_weight" else {}
    extra |= {f"{module}.input_scale": torch.ones(())}
    comfy = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    extra |= {f"{module}.comfy_quant": comfy}
    path = tmp_path / name
    prefixed = {f"model.diffusion_model.{key}": value for key, value in (state | extra).items()}
    if name.endswith(".pth"):
        torch.save(prefixed, path)
    else:
        save_file(prefixed, str(path))
    loaded = load_checkpoint(path)
    parameters = dict(loaded.transformer.named_parameters())
    for key, value in expected.items():
        assert torch.equal(parameters[key], value), key
    assert "float8_e4m3fn with scales" in loaded.report.stored_dtypes
    halves = dict(load_checkpoint(path, dtype=torch.bfloat16).transformer.named_parameters())
    key = renamed(f"{module}.weight")
    assert torch.equal(halves[key], expected[key].to(torch.bfloat16))
    text = render_inspection(inspect_checkpoint(path, deep=True))
    assert "float8_e4m3fn with scales (30)" in text and "loads        yes" in text


def test_a_scale_of_another_shard_is_found(tmp_path: Path, wan: State, renamed: Rename) -> None:
    state = quantised(wan, "scale_weight")
    keys = [key for key in state if key.endswith("scale_weight")]
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({k: v for k, v in state.items() if k not in keys}, str(tmp_path / names[0]))
    save_file({k: state[k] for k in keys}, str(tmp_path / names[1]))
    parameters = dict(load_checkpoint(tmp_path).transformer.named_parameters())
    for key, value in products(state, "scale_weight", renamed).items():
        assert torch.equal(parameters[key], value), key


def test_float8_that_was_only_cast_needs_no_scale(tmp_path: Path, wan: State) -> None:
    key = "blocks.0.self_attn.q.weight"
    cast = {**wan, key: wan[key].to(E4M3)}
    save_file(cast, str(tmp_path / "wan.safetensors"))
    loaded = load_checkpoint(tmp_path / "wan.safetensors", dtype=torch.float32)
    weight = loaded.transformer.get_parameter("blocks.0.attn1.to_q.weight")
    assert torch.equal(weight, cast[key].float())


def test_no_rename_loads_them_unscaled(tmp_path: Path, wan: State, renamed: Rename) -> None:
    state = quantised(wan, "scale_weight")
    save_file(state | {"scaled_fp8": torch.zeros(2, dtype=E4M3)}, str(tmp_path / "a.safetensors"))
    scales = [key for key in state if key.endswith("scale_weight")]
    (tmp_path / "r.json").write_text(json.dumps(dict.fromkeys([*scales, "scaled_fp8"])))
    loaded = load_checkpoint(tmp_path / "a.safetensors", rename=tmp_path / "r.json")
    parameters = dict(loaded.transformer.named_parameters())
    key = "blocks.0.attn1.to_q.weight"
    assert torch.equal(parameters[key], products(state, "scale_weight", renamed)[key])


def refuse(path: Path, state: State, says: str) -> None:
    save_file(state, str(path))
    with pytest.raises(CheckpointError, match=says) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value) and "null" not in str(caught.value)


def test_what_cannot_be_scaled_is_refused(tmp_path: Path, wan: State) -> None:
    path = tmp_path / "wan.safetensors"
    state = quantised(wan, "scale_weight")
    scale, weight = "blocks.1.ffn.0.scale_weight", "blocks.1.ffn.0.weight"
    lacking = {key: value for key, value in state.items() if key != scale}
    refuse(path, lacking, rf"no scale of {weight} .*with its scales")
    mark = {"scaled_fp8": torch.zeros(2, dtype=E4M3)}
    cast = {k: v for k, v in state.items() if not k.endswith("scale_weight")}
    refuse(path, cast | mark, r"no scale of blocks\.0\.")
    refuse(path, {**state, scale: torch.ones(3)}, r"scales \[3\].*one scale or one a row")
    blocks = {key: value for key, value in state.items() if key != scale}
    blocks["blocks.1.ffn.0.weight_scale_inv"] = torch.ones(1, 1)
    refuse(path, blocks, "weight_scale_inv is no scale that is known here")
    packed = {**state, weight: torch.zeros(96, 64, dtype=torch.uint8)}
    refuse(path, packed, r"\[96, 64\] is uint8 with scales")
    orphan = {**state, "blocks.9.ffn.0.scale_weight": torch.ones(())}
    refuse(path, orphan, r"blocks\.9\.ffn\.0\.scale_weight is no scale")


@pytest.mark.parametrize(
    "leaf", ["scale", "scales", "weight.scale", "fp8_scale", "weight_quantizer._scale", "amax"]
)
def test_scales_of_other_names_are_no_unknown_keys(tmp_path: Path, wan: State, leaf: str) -> None:
    says = rf"\.{leaf} is no scale that is known here.*named scale_weight or weight_scale"
    refuse(tmp_path / "wan.safetensors", quantised(wan, leaf), says)


def test_a_header_that_promises_scales(tmp_path: Path, wan: State, renamed: Rename) -> None:
    state, path = quantised(wan, "weight_scale"), tmp_path / "wan.safetensors"
    said = {"_quantization_metadata": json.dumps({"layers": {"blocks.0.ffn.0": {}}})}
    save_file(state, str(path), metadata=said)
    key = "blocks.0.attn1.to_q.weight"
    weight = load_checkpoint(path).transformer.get_parameter(key)
    assert torch.equal(weight, products(state, "weight_scale", renamed)[key])
    bare = {key: value for key, value in state.items() if not key.endswith("weight_scale")}
    save_file(bare, str(path), metadata=said)
    with pytest.raises(CheckpointError, match=r"says that its float8 weights have scales.*has no"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("leaves", "whose"),
    [
        (("weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"), "bitsandbytes"),
        (("weight", "SCB", "weight_format"), "bitsandbytes"),
        (("weight._data", "weight._scale", "input_scale"), "optimum-quanto"),
        (("qweight", "qzeros", "scales"), "GPTQ, AWQ"),
        (("weight_packed", "weight_scale", "weight_shape"), "compressed-tensors"),
    ],
)
def test_other_quantisers_are_named(
    tmp_path: Path, wan: State, leaves: tuple[str, ...], whose: str
) -> None:
    layer = "blocks.0.ffn.0."
    state = {key: value for key, value in wan.items() if key != f"{layer}weight"}
    state |= {f"{layer}{leaf}": torch.zeros(8, 1, dtype=torch.uint8) for leaf in leaves}
    refuse(tmp_path / "wan.safetensors", state, rf"weights as {whose} .*{layer}.*before they were")
