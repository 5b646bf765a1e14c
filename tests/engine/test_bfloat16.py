"""bfloat16 on a CPU: products of rounded factors, all else in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.counting import LiveBytes
from mv2v_engine.errors import RequestError
from mv2v_engine.models.feed_forward import FeedForward, Linear
from mv2v_engine.parallel import device as devices
from mv2v_engine.progress import StageDone, StageStarted
from mv2v_engine.testing import assert_within_budget, randomise
from tests.conftest import has_products


def _engine(path: Path, dtype: torch.dtype, **settings: Any) -> Engine:
    config = EngineConfig(**settings)
    return Engine.from_pretrained(path, device="cpu", dtype=dtype, config=config)


@has_products
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_what_is_narrow(tiny_checkpoint: Path, backend: Any) -> None:
    engine = _engine(tiny_checkpoint, torch.bfloat16, backend=backend)
    narrow = {id(m) for m in engine.transformer.modules() if isinstance(m, Linear)}
    assert len(narrow) == 11 * len(engine.transformer.blocks)
    for module in engine.transformer.modules():
        for name, weight in module._parameters.items():
            assert weight is not None
            expected = torch.bfloat16 if id(module) in narrow else torch.float32
            assert weight.dtype == expected, name
    assert engine.dtype == torch.float32 and engine.describe()["dtype"] == "bfloat16"
    whole = _engine(tiny_checkpoint, torch.float32, backend=backend)
    assert whole.backend == engine.backend
    assert engine.turn_settings() == whole.turn_settings() | {"products": "bfloat16"}


@has_products
@pytest.mark.parametrize("conditioning", ["joint", "static"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_turn_stays_near(
    tiny_checkpoint: Path, source_frames: Tensor, conditioning: Any, quantize: Any
) -> None:
    common: dict[str, Any] = {"conditioning": conditioning, "merge": "conv", "quantize": quantize}
    turns = []
    for dtype in (torch.float32, torch.bfloat16):
        engine = _engine(tiny_checkpoint, dtype, memory="retrieved", **common)
        session = engine.session(source_frames)
        turns.append([session.render(camera).latents for camera in ("pan_right", "arc_left")])
    for exact, found in zip(*turns, strict=True):
        error = (found - exact).square().mean()
        psnr = 10 * torch.log10((exact.max() - exact.min()) ** 2 / error)
        assert found.dtype == torch.float32
        assert 35 < psnr < 120, psnr


def test_a_layer_rounds_its_factors_and_its_sum() -> None:
    layer = Linear(37, 19)
    randomise(layer)
    x = torch.randn(2, 5, 37, generator=torch.Generator().manual_seed(1))
    narrow = Linear(37, 19)
    narrow.load_state_dict(layer.state_dict())
    narrow.to(torch.bfloat16)
    found = narrow(x)
    weight, bias = narrow.weight.double(), narrow.bias.double()
    oracle = nn.functional.linear(x.bfloat16().double(), weight, bias)
    assert found.dtype == torch.float32
    # a sum in float32, and one rounding
    assert ((found - oracle).abs() <= 2.0**-8 * oracle.abs() + 1e-5).all()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("chunk", [None, 7])
@torch.no_grad()
def test_a_feed_forward_gives_its_tokens_dtype(chunk: int | None) -> None:
    """Within twice what plain layers of bfloat16 are off."""
    whole = FeedForward(24, 40)
    randomise(whole)
    x = torch.randn(1, 17, 24, generator=torch.Generator().manual_seed(1))
    oracle = whole.double()(x.double())
    narrow = whole.to(torch.bfloat16)
    eager = narrow(x.to(torch.bfloat16)).float()
    narrow.chunk = chunk
    found = narrow(x)
    assert found.dtype == torch.float32
    assert_within_budget(found, oracle, eager)


def test_a_cpu_without_it(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_bfloat16_products", lambda: False)
    with pytest.raises(RequestError, match=r"needs one that multiplies it \(avx512_bf16 or amx"):
        _engine(tiny_checkpoint, torch.bfloat16)
    _engine(tiny_checkpoint, torch.float32)


@has_products
def test_the_bytes_are_predicted(tiny_checkpoint: Path, source_frames: Tensor) -> None:
    engine = _engine(tiny_checkpoint, torch.bfloat16, memory="retrieved")
    session = engine.session(source_frames)
    counted: dict[str, int] = {}
    for camera in ("pan_right", "arc_left"):
        with LiveBytes() as live:
            for event in session.events(session.request(camera)):
                if isinstance(event, StageStarted):
                    live.peak = live.now
                elif isinstance(event, StageDone):
                    counted[event.stage] = live.peak
    parts, predicted = engine.budget.footprint(), session.turns[-1].report["predicted_peak_bytes"]
    weights = parts.transformer + parts.vae
    assert predicted["sampling"] == pytest.approx(counted["sampling"] + weights, rel=0.1)
