"""Predicted bytes against a GPU's own count, and what a full GPU does to an engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.config import WAN_1_3B
from mv2v_engine.counting import vae_peak_bytes
from mv2v_engine.engine.budget import CUBLAS_WORKSPACE, module_bytes
from mv2v_engine.errors import MemoryBudgetError
from mv2v_engine.models.autoencoder import Autoencoder
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.kept import ConditioningCache
from mv2v_engine.ops.backend import resolve
from mv2v_engine.tokens.peak import Execution, forward_peak_bytes
from mv2v_engine.tokens.plan import novel_view_plan
from mv2v_engine.vae import VideoVAE
from tests.torch_state import default_dtype

pytestmark = pytest.mark.gpu

CUDA, FRAMES, SIZE = "cuda", 81, (480, 832)


@pytest.fixture(autouse=True)
def an_empty_gpu() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def model() -> Iterator[MV2VTransformer]:
    """Random weights at full size: bytes do not depend on them."""
    with default_dtype(torch.bfloat16), torch.device(CUDA):
        model = MV2VTransformer(WAN_1_3B).requires_grad_(False)
    model.set_backend(resolve("auto", torch.device(CUDA)))
    model.set_feed_forward_chunk(EngineConfig().feed_forward_chunk)
    yield model


@pytest.mark.parametrize("conditioning", ["joint", "static"])
@pytest.mark.parametrize(("memory", "merge"), [(0, "off"), (3, "conv")])
@torch.no_grad()
def test_a_full_size_forward(
    model: MV2VTransformer, memory: int, merge: Any, conditioning: Any
) -> None:
    plan = novel_view_plan(memory=memory, merge=merge, conditioning=conditioning)
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": CUDA}
    given = [torch.randn(1, 16, *s.grid, device=CUDA) for s in plan.segments]
    cameras = torch.randn(1, len(given), plan.target.num_frames, 12, **half)
    text, timestep = torch.randn(1, 512, 4096, **half), torch.tensor([500.0], device=CUDA)
    keep = ConditioningCache(plan) if conditioning == "static" else None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(given, timestep, text, plan=plan, cameras=cameras, kept=keep)
    if keep is not None:
        model([given[0]], timestep, text, plan=plan, kept=keep)
    measured = torch.cuda.max_memory_allocated() - before
    is_fused = model.backend != "reference"
    execution = Execution(2, EngineConfig().feed_forward_chunk, is_fused)
    found = forward_peak_bytes(plan, execution) + CUBLAS_WORKSPACE
    print(f"\n{measured:,} bytes measured, {found / measured:.3f} of them predicted")
    assert found == pytest.approx(measured, rel=0.1)


def test_a_full_size_vae() -> None:
    with torch.device(CUDA):
        vae = VideoVAE(Autoencoder().to(torch.bfloat16), torch.bfloat16)
    weights = module_bytes(vae.model)
    measured = []
    torch.cuda.reset_peak_memory_stats()
    latents = vae.encode(torch.zeros(FRAMES, *SIZE, 3, dtype=torch.uint8))
    measured.append(torch.cuda.max_memory_allocated() - weights)
    torch.cuda.reset_peak_memory_stats()
    vae.decode(latents)
    measured.append(torch.cuda.max_memory_allocated() - weights)
    found = vae_peak_bytes(vae, FRAMES, SIZE)
    print(f"\nencode, decode: {measured} bytes measured, {found} predicted")
    assert found == pytest.approx(measured, rel=0.1)


def test_offloaded_text_leaves_the_device(worded_checkpoint: Path) -> None:
    embeddings, held = [], []
    for mode in ("never", "always"):
        config = EngineConfig(text_offload=mode)
        engine = Engine.from_pretrained(worded_checkpoint, device=CUDA, config=config)
        assert engine.text is not None
        embeddings.append(engine.text_embedding("a red ball"))
        held.append(sum(w.is_cuda for w in engine.text.model.parameters()))
    assert torch.equal(*embeddings)
    assert held[0] > 0 and held[1] == 0


def test_a_full_gpu_fails_the_turn_and_not_the_next(
    tiny_checkpoint: Path, source_frames: Tensor
) -> None:
    engine = Engine.from_pretrained(tiny_checkpoint, device=CUDA)
    session = engine.session(source_frames)
    session.render("pan_right")
    torch.cuda.empty_cache()
    held, total = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(held / total)
    with pytest.raises(MemoryBudgetError, match=r"cuda had no memory left .*earlier ones are kept"):
        session.render("arc_left")
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert session.render("arc_left").number == 2


def test_what_is_free_is_the_limit(tiny_checkpoint: Path) -> None:
    engine = Engine.from_pretrained(tiny_checkpoint, device=CUDA)
    limit, (free, total) = engine.budget.limit(), torch.cuda.mem_get_info()
    assert limit is not None and free <= limit <= total
    hog = torch.empty(free // 2, dtype=torch.uint8, device=CUDA)
    lower = engine.budget.limit()
    assert lower is not None and lower < limit - hog.numel() // 2
