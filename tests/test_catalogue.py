"""The table of known checkpoints: its numbers against what is published, its commands' grammar."""

from __future__ import annotations

import shlex

import pytest
import torch
import transformers

from mv2v_engine import run
from mv2v_engine.catalogue import KnownModel, known_models
from mv2v_engine.checkpoints.hub import hub_name
from mv2v_engine.shapes import UMT5_XXL

MODELS = {model.name: model for model in known_models()}


def test_sizes_are_those_of_the_published_files() -> None:
    """Bytes of step20000.ckpt, Wan2.1_VAE.pth, and models_t5_umt5-xxl-enc-bf16.pth as listed."""
    disk = MODELS["KlingTeam/ReCamMaster-Wan2.1"].disk_bytes
    assert disk is not None
    assert disk == pytest.approx(2.981e9 + 0.508e9 + 11.36e9, rel=2e-3)
    assert MODELS["decart-ai/Lucy-Edit-Dev"].disk_bytes is None


def test_the_text_encoders_parameters_are_transformers_own() -> None:
    fields = {name: getattr(UMT5_XXL, name) for name in UMT5_XXL.__dataclass_fields__}
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(transformers.UMT5Config(**fields))
    assert UMT5_XXL.num_parameters == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_its_command_is_one(model: KnownModel) -> None:
    words = shlex.split(model.command)
    assert words[:3] == ["python", "-m", "mv2v_engine.run"]
    args = run._parser().parse_args(words[3:])
    assert args.checkpoint == model.name
    named = [name for name in (model.name, model.components) if name]
    assert bool(model.files) != all(hub_name(name) is not None for name in named)


def test_costs_grow_with_the_memory() -> None:
    model = MODELS["DHCAI/Memory-V2V:memoryv2v.ckpt"]
    none, ten = model.cost(0), model.cost(10)
    assert none["tokens"] == 2 * 32_760 and ten["tokens"] > none["tokens"]
    assert ten["pflop"] > none["pflop"] and ten["peak_gib"] > none["peak_gib"]
    assert none["peak_gib"] < none["peak_gib_text_resident"]


@pytest.mark.slow
def test_all_of_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["models"]) == 0
    told = capsys.readouterr().out
    for model in MODELS.values():
        assert model.command in told
    assert "licence   not told" in told and "on disk   14.9 GB" in told
