"""A turn's bytes before it runs: what is predicted, what is refused, where the text waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peak_memory import full_size_parts
from torch import Tensor

from mv2v_engine import EngineConfig
from mv2v_engine.counting import LiveBytes
from mv2v_engine.engine.budget import Budget, Footprint, predict
from mv2v_engine.engine.request import Request
from mv2v_engine.errors import MemoryBudgetError, RequestError
from mv2v_engine.progress import StageDone, StageStarted
from mv2v_engine.tokens.plan import novel_view_plan
from tests.conftest import configured

GIB = 1 << 30


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_a_turns_own_bytes(
    worded_checkpoint: Path, source_frames: Tensor, conditioning: Any
) -> None:
    """All that a real turn makes, stage by stage, beside the weights that were there before."""
    engine = configured(worded_checkpoint, conditioning=conditioning, memory="retrieved")
    session = engine.session(source_frames)
    # the first two make what the host keeps for later ones: a sphere's points, a fingerprint
    for camera in ("pan_right", "arc_left", "pan_left"):
        counted: dict[str, int] = {}
        with LiveBytes() as live:
            for event in session.events(session.request(camera, guidance_scale=3.0)):
                if isinstance(event, StageStarted):
                    live.peak = live.now
                elif isinstance(event, StageDone):
                    counted[event.stage] = live.peak
    parts, report = engine.budget.footprint(), session.turns[-1].report
    weights = parts.transformer + parts.vae + parts.text
    predicted = report["predicted_peak_bytes"]
    # what a CPU's process holds is not beside it under its name
    assert "peak_bytes" not in report
    assert set(predicted) == set(report["process_peak_bytes"]) == set(counted)
    for stage in ("vae", "text", "sampling"):  # retrieval is the host's
        assert predicted[stage] == pytest.approx(counted[stage] + weights, rel=0.1), stage
    assert len(report["memory"]["retrieved"]) == 2


def test_a_turn_that_cannot_fit_is_refused_before_it_runs(
    tiny_checkpoint: Path, source_frames: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = configured(tiny_checkpoint, merge="off", conditioning="static")
    session = engine.session(source_frames)
    session.render("pan_right", memory="retrieved")
    request = Request.view("arc_left", engine.sampling, memory="retrieved")
    found = engine.budget.predict(session.plan_turn(request)[1])
    for limit, refused in ((found.peak, False), (found.peak - 1, True)):
        small = engine.reconfigured(replace(engine.config, memory_limit_bytes=limit))
        other = small.session(source_frames)
        other.adopt(session.turns[0])
        if not refused:
            other.ask(request)
            continue
        monkeypatch.setattr(engine.vae, "encode", None)
        with pytest.raises(MemoryBudgetError) as caught:
            other.ask(request)
        said = str(caught.value)
        assert f"needs {found.peak:,} bytes of cpu in its stage {found.fullest!r}" in said
        assert f"{limit:,} are available" in said
        assert len(other.turns) == 1


def test_what_a_refusal_advises(full_size: Footprint) -> None:
    """Static without merging is what needs the text encoder out of the way."""
    plan = novel_view_plan(memory=10, conditioning="static", merge="off")
    budget = _budget(full_size)
    with pytest.raises(MemoryBudgetError) as caught:
        budget.check(plan)
    said = str(caught.value)
    assert "in its stage 'sampling', 25,769,803,776 are available; try " in said
    for setting in ('text_offload="always"', 'merge="conv"', 'conditioning="joint"', "max_memory="):
        assert setting in said
    assert "feed_forward_chunk" not in said  # it would not suffice
    budget.parts.config = EngineConfig(memory_limit_bytes=4 * GIB)
    with pytest.raises(MemoryBudgetError, match=r"no single setting brings it there, text_offload"):
        budget.check(plan)
    light = replace(full_size, is_text_offloaded=True)
    _budget(light).check(plan)


@pytest.fixture(scope="module")
def full_size() -> Footprint:
    return full_size_parts()


class _Device:
    """An engine of which a budget asks for nothing but its device and configuration."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.config = EngineConfig(memory_limit_bytes=24 * GIB)


def _budget(footprint: Footprint) -> Budget:
    budget = Budget(_Device())  # type: ignore[arg-type]
    budget.footprint = lambda: footprint  # type: ignore[method-assign]
    budget.limit = lambda: budget.parts.config.memory_limit_bytes  # type: ignore[method-assign]
    return budget


@pytest.mark.parametrize(
    ("conditioning", "merge", "resident", "offloaded"),
    [
        ("joint", "conv", 17.8, 14.0),
        ("joint", "off", 17.8, 14.0),
        ("static", "conv", 22.4, 14.0),
        ("static", "off", 27.6, 17.0),
    ],
)
def test_ten_memories_in_24_gib(
    full_size: Footprint, conditioning: Any, merge: Any, resident: float, offloaded: float
) -> None:
    """81 frames of 480x832, 1.3B: all fit without the text encoder; with it, all but one.

    The forwards' part of it is counted in tests/tokens/test_peak.py, the VAE's in test_vae_bytes.
    """
    plan = novel_view_plan(memory=10, conditioning=conditioning, merge=merge)
    found = predict(full_size, plan)
    light = predict(replace(full_size, is_text_offloaded=True), plan)
    print(f"\n{found.stages}\n{light.stages}")
    assert found.peak / GIB == pytest.approx(resident, abs=0.1)
    assert light.peak / GIB == pytest.approx(offloaded, abs=0.1)
    assert light.peak <= 24 * GIB
    assert (found.peak <= 24 * GIB) == ((conditioning, merge) != ("static", "off"))


@pytest.mark.parametrize(("mode", "limit", "expected"), [
    ("always", None, True),
    ("never", 1, False),
    ("auto", None, False),
    ("auto", 24 * GIB, True),
    ("auto", 30 * GIB, False),
])  # fmt: skip
def test_where_the_text_encoder_waits(
    full_size: Footprint, mode: Any, limit: int | None, expected: bool
) -> None:
    budget = _budget(full_size)
    engine: Any = budget.parts
    engine.config = EngineConfig(text_offload=mode, memory_limit_bytes=limit)
    plan = novel_view_plan(memory=10, conditioning="static", merge="off")
    budget.largest_plan = lambda: plan  # type: ignore[method-assign]
    placed: list[bool] = []
    engine.text = type("Text", (), {"offload": staticmethod(placed.append)})()
    budget.place_text()
    assert placed == [expected]


def test_an_engine_with_offloaded_text_renders_the_same(
    worded_checkpoint: Path, source_frames: Tensor
) -> None:
    turns = []
    for mode in ("never", "always"):
        engine = configured(worded_checkpoint, text_offload=mode)
        assert engine.text is not None and engine.text.is_offloaded == (mode == "always")
        session = engine.session(source_frames)
        turns.append(session.render("pan_right", prompt="a red ball", guidance_scale=3.0))
    assert torch.equal(turns[0].latents, turns[1].latents)
    with pytest.raises(RequestError, match="text_offload is shared by all engines"):
        engine.reconfigured(EngineConfig())


def test_the_largest_plan_is_the_one_of_a_full_memory(
    make_checkpoint: Callable[..., Path], tiny_checkpoint: Path
) -> None:
    engine = configured(tiny_checkpoint, memory="retrieved", max_memory=4)
    plan = engine.budget.largest_plan()
    assert plan.num_memory == 4 and plan.target.grid == engine.latent_kind.shape[1:]
    forgetful = configured(tiny_checkpoint, memory="none").budget.largest_plan()
    assert forgetful.num_memory == 0


@pytest.mark.parametrize("field", ["feed_forward_chunk", "memory_limit_bytes"])
def test_bounds_must_be_positive(field: str) -> None:
    with pytest.raises(RequestError, match=f"{field} must be at least 1"):
        EngineConfig(**{field: 0})


def test_the_arenas_count_whole(tiny_checkpoint: Path) -> None:
    """A CPU's two arenas are one memory; loose latents count as they come, with one to come."""
    video = configured(tiny_checkpoint).video_bytes
    loose = configured(tiny_checkpoint).budget.footprint()
    assert (loose.cache, loose.copies_memory) == (video, False)
    tiers = configured(tiny_checkpoint, cache_bytes=10 * video, device_cache_bytes=3 * video)
    assert (tiers.budget.footprint().cache, tiers.budget.footprint().copies_memory) == (
        10 * video,
        True,
    )
