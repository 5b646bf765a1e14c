"""The study's two encoders: a state that frames update, and a latent of views in any order."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from memory_encoders import EncoderKind, MemoryEncoder, encoded, view_loss
from torch import Tensor

from mv2v_engine.config import HistoryConfig
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.testing import as_cameras, randomise, tiny_config
from mv2v_engine.training.history import HistoryRecipe, ViewHistorySampler
from mv2v_engine.training.latents import LatentCache
from mv2v_engine.training.losses import flow_loss
from tests.training.conftest import cache, cache_folder

__all__ = ["cache", "cache_folder"]  # fixtures

FRAMES, KINDS = 2, get_args(EncoderKind)
SHAPE = tiny_config(history=HistoryConfig(rates=("2x2x1",)))


def encoder(kind: EncoderKind, tokens: int = 7) -> MemoryEncoder:
    made = MemoryEncoder(SHAPE, kind, tokens, FRAMES).double()
    randomise(made)
    return made


def videos(count: int) -> tuple[Tensor, Tensor]:
    """Latents [1, C, F, H, W] and cameras [1, F, 12] of some videos one after the other."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, count * FRAMES, 4, 6, generator=generator)
    cameras = as_cameras(torch.randn(1, count * FRAMES, 12, generator=generator), SHAPE)
    return latents.double(), cameras.double()


@torch.no_grad()
def test_a_new_video_updates_the_state_and_none_is_read_again() -> None:
    made, (latents, cameras) = encoder("state"), videos(3)
    whole, first = made.read(latents, cameras), made.read(latents[:, :, :4], cameras[:, :4])
    after = made.read(latents[:, :, 4:], cameras[:, 4:], first)
    torch.testing.assert_close(after, whole, rtol=0, atol=0)
    assert after.shape == first.shape == (1, 7, 96)
    # what comes later changes nothing of the state before, and something of the one after
    changed = latents.clone()
    changed[:, :, 5] += 1
    assert torch.equal(made.read(changed[:, :, :4], cameras[:, :4]), first)
    assert not torch.allclose(made.read(changed, cameras), whole, atol=1e-3)
    with pytest.raises(ValueError, match="give all videos at once"):
        encoder("view").read(latents, cameras, first)


@torch.no_grad()
def test_a_latent_of_views_does_not_know_their_order() -> None:
    latents, cameras = videos(3)
    order = torch.tensor([4, 5, 0, 1, 2, 3])  # of whole videos, each frame with its camera
    for kind, is_same in (("view", True), ("state", False)):
        made = encoder(kind)  # type: ignore[arg-type]
        found = made.read(latents[:, :, order], cameras[:, order])
        assert torch.allclose(found, made.read(latents, cameras), atol=1e-6) == is_same
    # a frame with another one's camera is another view
    made = encoder("view")
    swapped = made.read(latents, cameras[:, order])
    assert not torch.allclose(swapped, made.read(latents, cameras), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_view_follows_its_camera(kind: EncoderKind) -> None:
    made, (latents, cameras) = encoder(kind), videos(2)
    state = made.read(latents, cameras)
    views = [made.view(state, cameras[:, each], (4, 6)) for each in (slice(2), slice(2, 4))]
    assert views[0].shape == (1, 4, FRAMES, 4, 6)
    assert not torch.allclose(*views, atol=1e-3)
    alone = made.view(state[:, :, :], cameras[:, 2:4], (4, 6))
    assert torch.equal(alone, views[1])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_trained_whole_at_as_many_tokens(kind: EncoderKind, cache: LatentCache) -> None:
    recipe = HistoryRecipe(
        stage=2, batch=2, min_memory=2, max_memory=2, source_dropped=1.0, frames=(0, 2),
        static_conditioning=0.0, rate="2x2x1",
    )  # fmt: skip
    batch = ViewHistorySampler(cache, SHAPE, recipe).draw(torch.Generator().manual_seed(0))
    made = MemoryEncoder(SHAPE, kind, batch.plan.segments[1].length, FRAMES)
    given, state = encoded(made, batch)
    assert given.plan.length == batch.plan.length
    assert given.plan.segments[1].is_encoded and not batch.plan.segments[1].is_encoded
    # the target's cameras stay; the tokens have the world's
    assert given.cameras is not None and batch.cameras is not None
    assert torch.equal(given.cameras[:, 0], batch.cameras[:, 0])
    assert torch.equal(given.cameras[0, 2, 1], torch.eye(3, 4).flatten())
    model = MV2VTransformer(SHAPE)
    randomise(model)
    loss = flow_loss(
        model, given, torch.Generator().manual_seed(0), flow_shift=3.0, device=torch.device("cpu")
    )
    loss.backward(retain_graph=True)
    by_flow = {n for n, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    assert "begin" in by_flow and not any(name.startswith("reader") for name in by_flow)
    view_loss(made, batch, state).backward()
    idle = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
