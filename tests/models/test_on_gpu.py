"""The embedded transformer on a GPU: float32 as exact as a CPU's, bfloat16 as eager torch's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine.checkpoints import Checkpoint, load_checkpoint
from mv2v_engine.models.kept import ConditioningCache
from mv2v_engine.models.merging import MergeRecord
from mv2v_engine.models.sample import Sample
from mv2v_engine.testing import FACTOR, relative_error
from mv2v_engine.tokens.plan import TokenPlan, novel_view_plan

pytestmark = pytest.mark.gpu


def _plan(checkpoint: Checkpoint, merge: Any) -> TokenPlan:
    sampling = checkpoint.sampling
    return novel_view_plan(
        memory=4,
        frames=sampling.num_frames,
        size=sampling.size,
        shape=checkpoint.config,
        merge=merge,
        fraction=0.5,
    )


@torch.inference_mode()
def _velocity(
    checkpoint: Checkpoint, merge: Any, backend: str, dtype: torch.dtype
) -> tuple[Tensor, list[MergeRecord]]:
    """One forward of inputs that are the same on every device, in float64 if asked."""
    model, plan = checkpoint.transformer, _plan(checkpoint, merge)
    model.set_backend(backend)
    device = model.patch_embedding.weight.device
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        # rounded alike for every dtype, so that only the forward's own error counts
        return torch.randn(shape, generator=generator).bfloat16().to(device, dtype)

    config, records = checkpoint.config, []
    latents = [new(1, config.in_channels, *segment.grid) for segment in plan.segments]
    text = new(1, config.text_len, config.text_dim)
    cameras = new(1, len(plan.segments), plan.target.num_frames, 12)
    timestep = torch.tensor([500.0], device=device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        velocity = model(latents, timestep, text, plan=plan, cameras=cameras, records=records)
    return velocity.cpu(), records


def _load(device: str, dtype: torch.dtype) -> Checkpoint:
    return load_checkpoint("tiny-nvs", device=device, dtype=dtype)


@pytest.mark.parametrize("merge", ["conv", "off"])
def test_float32_is_the_cpus(merge: str) -> None:
    exact, _ = _velocity(_load("cpu", torch.float64), merge, "reference", torch.float64)
    plain, chosen = _velocity(_load("cpu", torch.float32), merge, "reference", torch.float32)
    got, records = _velocity(_load("cuda", torch.float32), merge, "triton", torch.float32)
    assert relative_error(got, exact) <= FACTOR * relative_error(plain, exact) + 1e-6
    assert len(records) == len(chosen)
    for record, expected in zip(records, chosen, strict=True):
        assert torch.equal(record.merged.cpu(), expected.merged)


def test_bfloat16_is_as_exact_as_eager_torch() -> None:
    """Without merging: a rounded score may rank two frames the other way round, rightly."""
    half = _load("cuda", torch.bfloat16)
    eager, _ = _velocity(half, "off", "reference", torch.bfloat16)
    got, _ = _velocity(half, "off", "triton", torch.bfloat16)
    # the same rounded weights, widened
    exact, _ = _velocity(_widened(half), "off", "reference", torch.float64)
    error, plain = relative_error(got, exact), relative_error(eager, exact)
    print(f"bfloat16: kernels {error:.3g}, eager torch {plain:.3g}")
    assert 0 < error <= FACTOR * plain


@torch.inference_mode()
def _pack(checkpoint: Checkpoint, dtype: torch.dtype) -> list[Sample]:
    """The next step of three joint and two static turns, the same on every device."""
    model, config, sampling = checkpoint.transformer, checkpoint.config, checkpoint.sampling
    device = model.patch_embedding.weight.device
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device, dtype)

    samples = []
    for memory, mode in ((4, "joint"), (0, "joint"), (1, "joint"), (2, "static"), (0, "static")):
        plan = novel_view_plan(
            memory=memory,
            frames=sampling.num_frames,
            size=sampling.size,
            shape=config,
            merge="off",
            conditioning=mode,
        )
        sample = Sample(
            latents=[new(1, config.in_channels, *segment.grid) for segment in plan.segments],
            timestep=torch.tensor([900.0 - 150 * memory], device=device),
            encoder_hidden_states=new(1, config.text_len, config.text_dim),
            plan=plan,
            cameras=new(1, len(plan.segments), plan.target.num_frames, 12),
        )
        if mode == "static":
            cache = ConditioningCache(plan)
            inputs = sample.latents, sample.timestep, sample.encoder_hidden_states
            with torch.backends.cudnn.flags(allow_tf32=False):
                model(*inputs, plan=plan, cameras=sample.cameras, kept=cache)
            sample = replace(sample, latents=sample.latents[:1], kept=cache)
        samples.append(sample)
    return samples


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_pack_is_as_exact_as_its_samples_alone(dtype: torch.dtype) -> None:
    checkpoint = _load("cuda", dtype)
    wide = _widened(checkpoint)
    run, exactly = checkpoint.transformer.forward_samples, wide.transformer.forward_samples
    wide.transformer.set_backend("reference")
    checkpoint.transformer.set_backend("triton")
    samples, oracles = _pack(checkpoint, dtype), _pack(wide, torch.float64)
    with torch.backends.cudnn.flags(allow_tf32=False):
        packed, alone = run(samples), [run([sample])[0] for sample in samples]
    for value, own, oracle in zip(packed, alone, oracles, strict=True):
        exact = exactly([oracle])[0]
        error, plain = relative_error(value.cpu(), exact), relative_error(own.cpu(), exact)
        print(f"{dtype}: packed {error:.3g}, alone {plain:.3g}")
        assert error <= FACTOR * plain + 1e-6


@torch.inference_mode()
def test_a_pack_never_waits_for_the_device() -> None:
    checkpoint = _load("cuda", torch.bfloat16)
    checkpoint.transformer.set_backend("triton")
    samples = _pack(checkpoint, torch.bfloat16)
    checkpoint.transformer.forward_samples(samples)  # compiles; makes the tables of positions
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        checkpoint.transformer.forward_samples(samples)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _widened(checkpoint: Checkpoint) -> Checkpoint:
    wide = _load("cpu", torch.float64)
    weights = {name: w.cpu().double() for name, w in checkpoint.transformer.state_dict().items()}
    wide.transformer.load_state_dict(weights)
    return wide


def test_a_forward_repeats_bit_for_bit() -> None:
    half = _load("cuda", torch.bfloat16)
    first, _ = _velocity(half, "conv", "triton", torch.bfloat16)
    for _ in range(3):
        assert torch.equal(_velocity(half, "conv", "triton", torch.bfloat16)[0], first)
