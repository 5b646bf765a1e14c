"""Fine-tuning a base: what moves and what does not, and one step of the full-size model."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from mv2v_engine.checkpoints import load_checkpoint, save_checkpoint
from mv2v_engine.config import WAN_1_3B, SamplingConfig
from mv2v_engine.errors import CheckpointError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.testing import randomise, tiny_config
from mv2v_engine.tokens.plan import TokenPlan, novel_view_plan
from mv2v_engine.training import finetune
from mv2v_engine.training.finetune import (
    add_memory_modules,
    is_trained,
    make_optimizer,
    prepare,
)
from mv2v_engine.training.latents import LatentCache
from mv2v_engine.training.losses import flow_step
from mv2v_engine.training.recipe import Recipe, SceneSampler
from tests.training.full_size import assert_a_step_fits


def _step(model: MV2VTransformer, cache: LatentCache, steps: int) -> None:
    trained = prepare(model)
    optimizer = make_optimizer(trained, 1e-2)
    sampler = SceneSampler(cache, model.config, Recipe(batch=2, merging=1.0, uniform_tokenizer=0.8))
    step = flow_step(model, sampler, torch.device("cpu"))
    for seed in range(steps):
        step(torch.Generator().manual_seed(seed))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def test_frozen_weights_stay_and_trained_ones_move(cache: LatentCache) -> None:
    model = MV2VTransformer(tiny_config())
    randomise(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _step(model, cache, 8)
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter.detach(), before[name])
        assert moved == is_trained(name), name
    kinds = {re.sub(r"\.\d+", "", name) for name in before if is_trained(name)}
    assert {k.split(".")[1] for k in kinds if k.startswith("blocks")} == {
        "attn1",
        "cam_encoder",
        "projector",
    }
    frozen = {name.split(".")[2] for name in before if name.startswith("blocks.0.")}
    assert frozen - {"attn1", "cam_encoder", "projector"} == {
        "attn2",
        "ffn",
        "norm2",
        "scale_shift_table",
    }


@torch.no_grad()
def test_a_base_is_completed_without_changing_what_it_says() -> None:
    """A plain Wan gets cameras and mergers that leave its own tokens as they were."""
    plain = tiny_config(camera_conditioning="none", merger=None)
    model = MV2VTransformer(plain).eval()
    randomise(model)
    plan = novel_view_plan(memory=0, frames=5, size=(48, 80), shape=plain, merge="off")
    latents = [torch.randn(1, 4, *segment.grid) for segment in plan.segments]
    inputs = torch.tensor([500.0]), torch.randn(1, 6, 10)
    before = model(latents, *inputs, plan=plan)
    shape = add_memory_modules(model)
    assert shape == model.config and shape.has_camera and shape.merger is not None
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in MV2VTransformer(shape).named_parameters()}
    plan = novel_view_plan(memory=0, frames=5, size=(48, 80), shape=shape, merge="off")
    after = model(latents, *inputs, plan=plan, cameras=torch.randn(1, 2, 2, 12))
    torch.testing.assert_close(after, before)
    merged = novel_view_plan(memory=2, frames=5, size=(48, 80), shape=shape, fraction=0.5)
    latents = [torch.randn(1, 4, *segment.grid) for segment in merged.segments]
    out = model(latents, *inputs, plan=merged, cameras=torch.randn(1, 4, 2, 12))
    assert bool(out.isfinite().all())


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["finetune", *map(str, arguments), "--device", "cpu"])
    finetune.main()


def _base(folder: Path, seed: int) -> Path:
    """A base whose conditioning tokens take the target's camera, without mergers."""
    config = tiny_config(camera_conditioning="target", merger=None)
    model = MV2VTransformer(config)
    randomise(model, seed=seed)
    save_checkpoint(folder, model, config, SamplingConfig(), "base", torch.float32)
    return folder


def test_the_command_trains_resumes_and_writes_a_checkpoint(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, base = tmp_path / "out", _base(tmp_path / "base", 0)
    arguments = ["--checkpoint", base, "--latents", cache_folder, "--out", out, "--accumulate", 2]
    _run(monkeypatch, *arguments, "--steps", 2)
    _run(monkeypatch, *arguments, "--steps", 3)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3
    assert all(is_trained(name) for name in [*state["model"], *state["ema"]])

    result = load_checkpoint(out / "model")
    assert result.config.camera_conditioning == "own" and result.config.merger is not None
    assert not result.report.initialised and result.conditioning == ("joint", "static")
    start = dict(load_checkpoint(base).transformer.named_parameters())
    for name, parameter in result.transformer.named_parameters():
        expected = state["ema"][name] if is_trained(name) else start[name].detach()
        assert torch.equal(parameter.detach(), expected.to(parameter.dtype)), name

    # another base's frozen weights are not these trained ones'
    other = _base(tmp_path / "other", 1)
    with pytest.raises(CheckpointError, match=r"frozen weights differ .*--out"):
        _run(monkeypatch, "--checkpoint", other, *arguments[2:], "--steps", 4)


def test_the_empty_prompt_is_the_encoders(worded_checkpoint: Path, tmp_path: Path) -> None:
    base = load_checkpoint(worded_checkpoint)
    text = finetune.empty_text(base, None)
    assert text is not None and text.shape == (1, base.config.text_dim)  # its end alone
    assert text.abs().sum() > 0
    again = finetune.empty_text(base, worded_checkpoint)
    assert again is not None and torch.equal(text, again)
    without = load_checkpoint(_base(tmp_path / "base", 0))
    assert finetune.empty_text(without, None) is None
    with pytest.raises(CheckpointError, match="text_encoder"):
        finetune.empty_text(without, tmp_path)


def test_a_full_size_step() -> None:
    """81 frames of 480x832 and six memory videos on fake tensors, in bytes and names.

    Joint conditioning, which needs more than static does. In six blocks: every other one adds the
    same.
    """
    shape = replace(WAN_1_3B, num_layers=6, merge_blocks=None)
    plan = novel_view_plan(memory=6, fraction=0.3, shape=shape)

    def prepared(model: MV2VTransformer) -> tuple[list[nn.Parameter], Optimizer, TokenPlan]:
        trained = prepare(model)
        return trained, make_optimizer(trained, 1e-4), plan

    model, count = assert_a_step_fits(shape, prepared, cameras=(1, 8, 21, 12))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for kind, times in Counter(re.sub(r"(?<=\.)\d+", "*", name) for name in names).items():
        print(f"  {times:3} x {kind}")

    width, depth = shape.dim, shape.num_layers
    linear = width * width + width
    by_hand = depth * (4 * linear + 2 * width)  # q, k, v, o and the norms of q and k
    by_hand += depth * (linear + 12 * width + width)  # projector and camera encoder
    by_hand += sum(16 * k * k * width + width for k in (2, 4, 8))
    by_hand += 2 * (4 * width * width + width)  # mergers
    assert count == by_hand and all(is_trained(name) for name in names)
