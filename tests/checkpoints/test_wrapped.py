"""Keys as wrappers, exporters and trainers leave them, and files that hold several models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mv2v_engine.checkpoints import detect, load_checkpoint
from mv2v_engine.checkpoints.names import translate
from mv2v_engine.config import StreamConfig
from mv2v_engine.errors import CheckpointError
from tests.checkpoints.conftest import State, write

KEY, QUERY = "blocks.0.self_attn.q.weight", "blocks.0.attn1.to_q.weight"


@pytest.mark.parametrize(
    "insert",
    [
        ("", ""),
        ("blocks.0.", "blocks.0._orig_mod."),
        ("blocks.", "_fsdp_wrapped_module.blocks."),
        ("self_attn.", "self_attn._fsdp_wrapped_module._checkpoint_wrapped_module."),
        (".weight", "._orig_mod.weight"),
        ("blocks.1.", "blocks.1.module."),
        ("blocks.", "_forward_module.blocks."),
        ("blocks.1.", "blocks.1._fpw_module._original_module."),
    ],
)
@pytest.mark.parametrize(
    "prefix", ["", "module._orig_mod.", "module.model.diffusion_model.", "pipe.dit."]
)
def test_wrappers_are_seen_through_wherever_they_stand(
    wan: State, insert: tuple[str, str], prefix: str
) -> None:
    plain = translate(wan)
    wrapped = translate(prefix + key.replace(*insert) for key in wan)
    assert list(wrapped.names.values()) == list(plain.names.values())
    assert not wrapped.unknown and wrapped.naming == "original"


def test_a_wrapped_file_loads(tmp_path: Path, wan: State) -> None:
    wrapped = {key.replace("blocks.2.", "blocks.2._orig_mod."): value for key, value in wan.items()}
    save_file(wrapped, str(tmp_path / "a.safetensors"))
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    weight = loaded.transformer.get_parameter("blocks.2.attn1.to_q.weight")
    assert torch.equal(weight, wan["blocks.2.self_attn.q.weight"])


def test_the_average_is_taken_and_the_other_by_name(tmp_path: Path, wan: State) -> None:
    averaged = {key: value + 1 for key, value in wan.items()}
    path = write(tmp_path / "step.pt", {"model": wan, "ema": averaged, "step": 3})
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.transformer.get_parameter(QUERY), averaged[KEY])
    assert "under 'ema', averaged over training (EMA)" in loaded.report.reason
    assert "'model' left aside" in loaded.report.reason
    other = load_checkpoint(f"{path}#model")
    assert torch.equal(other.transformer.get_parameter(QUERY), wan[KEY])
    with pytest.raises(CheckpointError, match=r"no transformer 'mdl' \(there: 'ema', 'model'\)"):
        detect(f"{path}#mdl")
    flat = {f"student.{k}": v for k, v in wan.items()} | {f"twin.{k}": v for k, v in wan.items()}
    save_file({key: value.clone() for key, value in flat.items()}, str(tmp_path / "b.safetensors"))
    with pytest.raises(CheckpointError, match=r"several transformers \(there: 'student', 'twin'\)"):
        detect(tmp_path / "b.safetensors")
    assert len(detect(f"{tmp_path / 'b.safetensors'}#twin").tensors) == len(wan)


def test_averages_in_other_forms(tmp_path: Path, wan: State) -> None:
    averaged = {key: value + 1 for key, value in wan.items()}

    def loaded(value: Any) -> tuple[Tensor, str]:
        checkpoint = load_checkpoint(write(tmp_path / "step.pt", value))
        return checkpoint.transformer.get_parameter(QUERY), checkpoint.report.reason

    weight, reason = loaded({"model": wan, "EMA": averaged})
    assert torch.equal(weight, averaged[KEY]) and "'model' left aside" in reason
    # torch's AveragedModel: the average itself, with a count
    counted = {f"module.{key}": value for key, value in averaged.items()}
    weight, reason = loaded({"n_averaged": torch.tensor(9)} | counted)
    assert torch.equal(weight, averaged[KEY]) and "averaged over training" in reason
    # those that do not name their weights: a list, and names without dots
    shadows = {"decay": 0.9, "shadow_params": list(averaged.values())}
    flat = {f"model.{key}": value for key, value in wan.items()}
    flat |= {"ema." + key.replace(".", ""): value for key, value in averaged.items()}
    for value in ({"model": wan, "ema": shadows}, flat | {"ema.decay": torch.ones(())}):
        weight, reason = loaded(value)
        assert torch.equal(weight, wan[KEY])
        assert "under 'model', 'ema', an average that does not name its weights, left" in reason
    with pytest.raises(CheckpointError, match=r"no transformer 'ema' \(there: 'model'\)"):
        detect(f"{tmp_path / 'step.pt'}#ema")


@pytest.mark.parametrize("inner", [{}, {"critic": 1}])
def test_generators_are_named_and_run_only_on_a_users_word(
    tmp_path: Path, wan: State, inner: dict[str, int]
) -> None:
    wrapped = {f"model.{key}": value for key, value in wan.items()}
    value = {"generator": wrapped, "generator_ema": wrapped} | dict.fromkeys(inner, wrapped)
    path = write(tmp_path / "causal.pt", value)
    with pytest.raises(CheckpointError, match=r"generator_ema\.model.*causal.*causal\.pt#gen"):
        detect(path)
    assert not detect(f"{path}#generator_ema").translation.unknown
    alone = write(tmp_path / "alone.pt", {"generator": wan})
    with pytest.raises(CheckpointError, match=r"'generator'.*alone\.pt#generator"):
        detect(alone)
    assert len(load_checkpoint(f"{alone}#generator").transformer.blocks) == 3


def test_causal_configs_are_refused_by_name(tmp_path: Path, wan: State) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "CausalWanModel"}))
    save_file(wan, str(tmp_path / "a.safetensors"))
    with pytest.raises(CheckpointError, match=r"describes a CausalWanModel.*run stream"):
        detect(tmp_path)
    assert load_checkpoint(tmp_path, causal=True).stream == StreamConfig()


def test_a_causal_generator_is_its_average(tmp_path: Path, wan: State) -> None:
    """Self-Forcing and LongLive save them like this, sharded and not."""
    inside = {key: key.replace("blocks.0.", "blocks.0._fsdp_wrapped_module.") for key in wan}
    sharded = {f"model._fsdp_wrapped_module.{inside[key]}": 2 * wan[key] for key in wan}
    plain = {f"model.{key}": value for key, value in wan.items()}
    both = {"generator": plain, "critic": plain, "generator_ema": sharded}
    path = write(tmp_path / "sf.pt", both)
    loaded = load_checkpoint(path, causal=True)
    assert loaded.stream == StreamConfig()
    assert torch.equal(loaded.transformer.get_parameter(QUERY), 2 * wan[KEY])
    alone = load_checkpoint(write(tmp_path / "ll.pt", {"generator": plain}), causal=True)
    assert torch.equal(alone.transformer.get_parameter(QUERY), wan[KEY])
    assert load_checkpoint(f"{path}#generator_ema").stream is None


@pytest.mark.parametrize(
    ("own", "vae", "text"),
    [
        ("model.diffusion_model.", "vae.", "text_encoders.umt5xxl.transformer."),
        ("model.diffusion_model.", "first_stage_model.", "cond_stage_model."),
        ("pipe.dit.", "pipe.vae.model.", "pipe.text_encoder."),
        ("", "vae.", "text_encoder."),
    ],
)
def test_all_in_one_files(tmp_path: Path, wan: State, own: str, vae: str, text: str) -> None:
    state = {f"{own}{key}": value for key, value in wan.items()}
    state[f"{vae}decoder.middle.0.residual.0.gamma"] = torch.ones(2)
    state[f"{vae}conv2.weight"] = torch.ones(2)
    state[f"{text}encoder.block.0.layer.0.SelfAttention.q.weight"] = torch.ones(2)
    if text.startswith("text_encoders."):
        state["text_encoders.umt5xxl.logit_scale"] = torch.ones(1)
    path = tmp_path / "all.safetensors"
    save_file(state, str(path))
    found = detect(path)
    assert found.format == "wan_original" and len(found.tensors) == len(wan)
    assert found.translation.parts == {"vae": vae, "text_encoder": text}
    assert "vae and text_encoder in the same file" in found.reason
    loaded = load_checkpoint(path).transformer.get_parameter(QUERY)
    assert torch.equal(loaded, wan[KEY])


def test_keys_outside_of_the_transformer_are_not_left_out_in_silence(wan: State) -> None:
    found = translate([*(f"dit.{key}" for key in wan), "embedders.0.weight"])
    assert found.unknown == ("embedders.0.weight",)


def test_a_trainers_own_tensors_are_left_aside(tmp_path: Path, wan: State) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "named": {"a": torch.ones(2)}}
    value = {"state_dict": wan, "optimizer": optimizer, "rng_state": torch.ones(3)}
    found = detect(write(tmp_path / "a.ckpt", value))
    assert set(found.tensors) == set(wan) and not found.translation.prefix
