"""Training from scratch: a loss that goes down, how it begins, who moves what."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from mv2v_engine.config import TINY, TransformerConfig
from mv2v_engine.errors import TrainingError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.testing import as_cameras, tiny_config
from mv2v_engine.tokens.plan import turn_plan
from mv2v_engine.training.dit import compile_blocks, initialise, make_optimizers, train_alone
from mv2v_engine.training.losses import flow_loss
from mv2v_engine.training.recipe import Batch


def test_the_loss_goes_down() -> None:
    torch.manual_seed(0)
    model = MV2VTransformer(tiny_config())
    initialise(model)
    optimizers = make_optimizers(model, 1e-2, 1e-2)
    plan = turn_plan(model.config, (2, 6, 10), (4,), fraction=0.5)
    latents = [torch.randn(2, 4, *segment.grid) for segment in plan.segments]
    batch = Batch(plan, latents, torch.randn(2, 3, 2, 12), torch.zeros(2, 6, 10))
    losses = []
    for step in range(80):
        generator = torch.Generator().manual_seed(step % 8)
        loss = flow_loss(model, batch, generator, flow_shift=3.0, device=torch.device("cpu"))
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])


# one block's kernels, each of which costs a C++ compiler a second; and all there is before them
# for every block, whose shapes differ once tokens are merged
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "num_layers", "attention"),
    [("inductor", 1, "none"), ("aot_eager", 3, "none"), ("aot_eager", 3, "prope_fused")],
)
def test_compiled_blocks_compute_what_they_compute(
    monkeypatch: pytest.MonkeyPatch, backend: str, num_layers: int, attention: str
) -> None:
    if backend == "inductor":
        if shutil.which("g++") is None:
            pytest.skip("torch compiles for CPUs with a C++ compiler, and there is none")
        from torch._inductor import config

        # processes that each load torch take longer than so few kernels
        monkeypatch.setattr(config, "compile_threads", 1)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.manual_seed(0)
    model = MV2VTransformer(tiny_config(num_layers=num_layers, camera_attention=attention))
    plan = turn_plan(model.config, (2, 6, 10), (4,), fraction=0.5)
    latents = [torch.randn(2, 4, *segment.grid) for segment in plan.segments]
    cameras = as_cameras(torch.randn(2, 3, 2, 12), model.config)
    batch = Batch(plan, latents, cameras, torch.zeros(2, 6, 10))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        generator = torch.Generator().manual_seed(1)
        loss = flow_loss(model, batch, generator, flow_shift=3.0, device=torch.device("cpu"))
        loss.backward()  # type: ignore[no-untyped-call]
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    compile_blocks(model)
    compiled = gradients()
    assert plain.keys() == compiled.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-4)


def test_a_part_is_trained_alone() -> None:
    model = MV2VTransformer(tiny_config())
    train_alone(model, ["attn1", "bias"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "attn1" in n or "bias" in n}
    with pytest.raises(TrainingError, match=r"--train attn9 is in no parameter's name"):
        train_alone(model, ["bias", "attn9"])


def test_every_parameter_has_one_optimizer() -> None:
    model = MV2VTransformer(TINY)
    muon, adam = make_optimizers(model, 1e-3, 2e-3)
    ids = [id(p) for optimizer in (muon, adam) for g in optimizer.param_groups for p in g["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert "blocks.0.attn1.to_q.weight" in matrices and "blocks.0.projector.weight" in matrices
    assert not any("cam_encoder" in name or "tokenizers" in name for name in matrices)


@pytest.mark.parametrize("shape", [TINY, replace(TINY, camera_attention="prope")])
def test_attention_begins_local(shape: TransformerConfig) -> None:
    """Fresh, a target query prefers the source token of its own place."""
    from mv2v_engine.models.rope import rotary_table
    from mv2v_engine.ops.qk_norm_rope import qk_norm_rope

    torch.manual_seed(0)
    model = MV2VTransformer(shape).requires_grad_(False)
    initialise(model)
    plan = turn_plan(shape, (2, 12, 20), (), merge="off")
    attention = model.blocks[0].attn1  # type: ignore[union-attr]
    rope = rotary_table(plan)[None]
    hidden = torch.zeros(1, plan.length, TINY.dim)  # what the biases alone say
    q, k = (
        qk_norm_rope(layer(hidden), torch.ones(TINY.dim), rope, num_heads=3)  # type: ignore[operator]
        for layer in (attention.to_q, attention.to_k)  # type: ignore[union-attr]
    )
    scores = torch.einsum("lnd,snd->ls", q[0, :120], k[0, 120:])
    best = scores[:60].unflatten(1, (2, 60)).amax(1).argmax(-1)
    assert torch.equal(best, torch.arange(60))
