"""The transformer's recipe: what batches hold, and a loss that goes down."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine.config import TINY
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.testing import randomise, tiny_config
from mv2v_engine.tokens.plan import turn_plan
from mv2v_engine.training.dit import (
    Batch,
    Recipe,
    SceneSampler,
    flow_loss,
    initialise,
    make_optimizers,
)
from mv2v_engine.training.latents import LatentScene

CAMERAS, SCENES, FRAMES = 10, 4, 3
CPU = torch.device("cpu")


def _scenes() -> list[LatentScene]:
    """Latents say which scene and camera they are: 20 * scene + camera, in every cell.

    A camera stands still, its number in metres to the right, its scene's number down.
    """
    scenes = []
    for scene in range(SCENES):
        number = 20 * scene + torch.arange(CAMERAS)
        latents = number[:, None, None, None, None].expand(-1, 4, FRAMES, 12, 20).half()
        poses = torch.eye(3, 4).repeat(CAMERAS, 4 * FRAMES - 3, 1, 1)
        poses[:, :, 0, 3] = torch.arange(CAMERAS)[:, None].float()
        poses[:, :, 1, 3] = 100.0 * scene
        scenes.append(LatentScene(latents, poses))
    return scenes


def _draws(count: int, recipe: Recipe | None = None) -> list[Batch]:
    sampler = SceneSampler(_scenes(), tiny_config(), recipe or Recipe(batch=3))
    return [sampler.draw(torch.Generator().manual_seed(seed)) for seed in range(count)]


def _numbers(latents: Tensor) -> list[int]:
    """Which track every sample of a batch is, seen through the noise on memory."""
    return [round(value) for value in latents.mean((1, 2, 3, 4)).tolist()]


def test_videos_of_a_sample_are_different_cameras_of_one_scene() -> None:
    for batch in _draws(60):
        assert len(batch.latents) == len(batch.plan.segments)
        tracks = torch.tensor([_numbers(latents) for latents in batch.latents]).T
        assert tracks.shape[0] == 3
        for sample in tracks.tolist():
            assert len({number // 20 for number in sample}) == 1
            assert len(set(sample)) == len(sample)


def test_every_segment_gets_the_camera_of_its_own_video() -> None:
    for batch in _draws(60):
        for latents, segment in zip(batch.latents, batch.plan.segments, strict=True):
            assert segment.camera is not None
            cameras = batch.cameras[:, segment.camera].unflatten(-1, (3, 4))
            assert cameras.shape == (3, FRAMES, 3, 4)
            # poses are relative to the source's first frame, whether or not it is shown
            source = torch.tensor([0.0] * 3)
            if len(batch.plan.segments) > 1 and batch.plan.segments[1].role == "source":
                source = torch.tensor(_numbers(batch.latents[1])) % 20
                place = torch.tensor(_numbers(latents)) % 20 - source
                torch.testing.assert_close(cameras[:, 0, 0, 3], place.float())
            assert torch.equal(cameras[:, 0, 1, 3], torch.zeros(3))


def test_the_sources_own_camera_is_the_identity() -> None:
    for batch in _draws(20):
        source = batch.cameras[:, 1].unflatten(-1, (3, 4))
        torch.testing.assert_close(source, torch.eye(3, 4).expand_as(source))


def test_the_odds_are_the_recipes() -> None:
    batches = _draws(600, Recipe(batch=1))
    plans = [batch.plan for batch in batches]
    counts = Counter(plan.num_memory for plan in plans)
    assert set(counts) == {0, 1, 2, 3} and abs(counts[0] / 600 - 0.25) < 0.06
    merging = [plan for plan in plans if plan.merge == "conv"]
    assert abs(len(merging) / 600 - 0.5) < 0.07
    assert all(0.3 <= plan.merge_fraction <= 0.7 for plan in plans)
    assert len({plan.fraction for plan in plans}) > 20
    with_memory = [plan for plan in plans if plan.num_memory]
    dropped = [plan for plan in with_memory if plan.segments[1].role != "source"]
    assert abs(len(dropped) / len(with_memory) - 0.1) < 0.05
    assert all(plan.segments[1].role == "source" for plan in plans if not plan.num_memory)
    rates = Counter(s.tokenizer for plan in with_memory for s in plan.segments if s.tau == 6)
    assert set(rates) == {2, 4, 8} and rates[4] > rates[2] and rates[4] > rates[8]


def test_the_source_stands_still_in_most_samples() -> None:
    # track 0 is a scene's static camera, as a user's clip of unknown camera is taken to be
    shown = [batch for batch in _draws(150) if batch.plan.segments[-1].role != "target"]
    sources = [
        number % 20
        for batch in shown
        if batch.plan.segments[1].role == "source"
        for number in _numbers(batch.latents[1])
    ]
    share = sources.count(0) / len(sources)
    assert 0.76 < share < 0.87  # four fifths, and a tenth of the rest


def test_memory_alone_is_perturbed_and_only_beside_a_source() -> None:
    for batch in _draws(60):
        has_source = any(segment.role == "source" for segment in batch.plan.segments)
        for latents, segment in zip(batch.latents, batch.plan.segments, strict=True):
            spread = float(latents.flatten(1).std(1).mean())
            expected = 0.1 if segment.role == "memory" and has_source else 0.0
            assert spread == pytest.approx(expected, abs=0.01)


def test_a_batch_follows_from_its_generator() -> None:
    for first, second in zip(_draws(10), _draws(10), strict=True):
        assert first.plan == second.plan
        assert torch.equal(first.cameras, second.cameras)
        for a, b in zip(first.latents, second.latents, strict=True):
            assert torch.equal(a, b)
    drawn = {(batch.plan, *_numbers(batch.latents[0])) for batch in _draws(10)}
    assert len(drawn) == 10


def test_an_empty_cache_says_what_to_run() -> None:
    with pytest.raises(ValueError, match="latents first"):
        SceneSampler([], tiny_config(), Recipe())


def _batch(model: MV2VTransformer) -> Batch:
    plan = turn_plan(model.config, (2, 6, 10), (4,), fraction=0.5)
    torch.manual_seed(0)
    latents = [torch.randn(2, 4, *segment.grid) for segment in plan.segments]
    return Batch(plan, latents, torch.randn(2, 3, 2, 12))


def test_the_loss_is_the_velocitys_squared_error() -> None:
    model = MV2VTransformer(tiny_config())
    randomise(model)
    initialise(model)  # a zero head: the velocity is nothing, the error is all of it
    batch, generator = _batch(model), torch.Generator().manual_seed(3)
    loss = flow_loss(model, batch, generator, flow_shift=3.0, device=CPU)
    generator.manual_seed(3)
    torch.rand(2, generator=generator)
    noise = torch.randn(batch.latents[0].shape, generator=generator)
    torch.testing.assert_close(loss, (noise - batch.latents[0]).pow(2).mean())


class _Watching(MV2VTransformer):
    """A model that keeps what it was asked."""

    def forward(self, latents: Any, timestep: Tensor, text: Tensor, **rest: Any) -> Tensor:
        self.asked = (latents, timestep, text)
        return super().forward(latents, timestep, text, **rest)


@torch.no_grad()
def test_the_target_alone_is_noised_to_the_level_the_model_is_told() -> None:
    model = _Watching(tiny_config())
    batch, generator = _batch(model), torch.Generator().manual_seed(3)
    flow_loss(model, batch, generator, flow_shift=3.0, device=CPU)
    latents, timestep, text = model.asked
    generator.manual_seed(3)
    uniform = torch.rand(2, generator=generator)
    noise = torch.randn(batch.latents[0].shape, generator=generator)
    sigma = 3 * uniform / (1 + 2 * uniform)
    torch.testing.assert_close(timestep, 1000 * sigma)
    level = sigma[:, None, None, None, None]
    torch.testing.assert_close(latents[0], (1 - level) * batch.latents[0] + level * noise)
    assert all(torch.equal(a, b) for a, b in zip(latents[1:], batch.latents[1:], strict=True))
    assert text.shape == (2, 6, 10) and not text.any()


def test_the_loss_goes_down() -> None:
    torch.manual_seed(0)
    model = MV2VTransformer(tiny_config())
    initialise(model)
    optimizers = make_optimizers(model, 1e-2, 1e-2)
    batch, losses = _batch(model), []
    for step in range(80):
        generator = torch.Generator().manual_seed(step % 8)
        loss = flow_loss(model, batch, generator, flow_shift=3.0, device=CPU)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])


def test_every_parameter_has_one_optimizer() -> None:
    model = MV2VTransformer(TINY)
    muon, adam = make_optimizers(model, 1e-3, 2e-3)
    ids = [id(p) for optimizer in (muon, adam) for g in optimizer.param_groups for p in g["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert "blocks.0.attn1.to_q.weight" in matrices and "blocks.0.projector.weight" in matrices
    assert not any("cam_encoder" in name or "tokenizers" in name for name in matrices)


def test_attention_begins_local() -> None:
    """Fresh, a target query prefers the source token of its own place."""
    from mv2v_engine.models.rope import rotary_table
    from mv2v_engine.ops.qk_norm_rope import qk_norm_rope

    torch.manual_seed(0)
    model = MV2VTransformer(TINY).requires_grad_(False)
    initialise(model)
    plan = turn_plan(TINY, (2, 12, 20), (), merge="off")
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
