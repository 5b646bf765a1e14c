"""Offloaded blocks from the door to the report: the same turns, in the bytes that are predicted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mv2v_engine import EngineConfig, run
from mv2v_engine.config import WAN_1_3B, SamplingConfig
from mv2v_engine.counting import LiveBytes
from mv2v_engine.defaults import without_memory
from mv2v_engine.engine.budget import module_bytes, shape_footprint
from mv2v_engine.errors import RequestError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.quantized import quantize_linears
from mv2v_engine.tokens.peak import Execution, forward_peak_bytes
from mv2v_engine.tokens.plan import novel_view_plan
from tests.conftest import configured
from tests.torch_state import default_dtype

CPU = torch.device("cpu")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    generator, name = torch.Generator().manual_seed(0), "blocks.1.attn2.to_v"
    halves = {
        f"{name}.lora_A.weight": torch.randn(2, 48, generator=generator),
        f"{name}.lora_B.weight": torch.randn(48, 2, generator=generator),
    }
    save_file(halves, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"conditioning": "static"},
        {"merge": "conv", "quantize": "int8"},
        {"quantize": "fp8", "conditioning": "static"},
        {"step_cache": 10.0, "merge": "off"},
        {"feed_forward_chunk": 50, "fast": "lightx2v"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "joint",
)
def test_turns_are_the_same(
    tiny_checkpoint: Path, source_frames: Tensor, settings: dict[str, Any]
) -> None:
    """To the bit, from the first turn to one that remembers it."""
    turns = []
    for offload in (None, "blocks"):
        engine = configured(tiny_checkpoint, memory="retrieved", offload=offload, **settings)
        session = engine.session(source_frames)
        for camera in ("pan_right", "arc_left"):
            turn = session.render(camera)
        turns.append(turn)
    assert torch.equal(turns[0].latents, turns[1].latents)
    assert "offload" not in turns[0].report
    assert turns[1].report["offload"] == "blocks"
    assert turns[1].report["checkpoint"] == turns[0].report["checkpoint"]
    approximations = [turn.report["approximations"] for turn in turns]
    assert approximations[0] == approximations[1]


def test_after_loras(tiny_checkpoint: Path, source_frames: Tensor, lora: Path) -> None:
    latents = [
        configured(tiny_checkpoint, lora=((lora, 0.5),), offload=offload)
        .session(source_frames)
        .render("pan_right")
        .latents
        for offload in (None, "blocks")
    ]
    plain = configured(tiny_checkpoint).session(source_frames).render("pan_right").latents
    assert torch.equal(latents[0], latents[1]) and not torch.equal(latents[0], plain)


def test_several_turns_at_once(tiny_checkpoint: Path, source_frames: Tensor) -> None:
    found = []
    for offload in (None, "blocks"):
        engine = configured(tiny_checkpoint, offload=offload, batch_tokens=10_000)
        sessions = [engine.session(source_frames) for _ in range(2)]
        asked = [(each, each.request("pan_right", seed=n)) for n, each in enumerate(sessions)]
        found.append([turn.latents for turn in engine.answer_all(asked)])  # type: ignore[union-attr]
    assert all(map(torch.equal, *found))


def test_a_stream(causal_folder: Path) -> None:
    found = []
    for offload in (None, "blocks"):
        with configured(causal_folder, offload=offload).stream("a red ball", seed=4) as stream:
            found.append([block.frames for block in stream.blocks(3)])
    assert len(found[0]) == 3 and all(map(torch.equal, *found))


def test_what_cannot_be(tiny_checkpoint: Path) -> None:
    with pytest.raises(RequestError, match=r'graphs="on" cannot be met with offload="blocks"'):
        EngineConfig(graphs="on", offload="blocks")
    with pytest.raises(RequestError, match=r"offload must be .*'blocks'"):
        EngineConfig(offload="layers")  # type: ignore[arg-type]
    engine = configured(tiny_checkpoint, offload="blocks")
    with pytest.raises(RequestError, match="offload is shared by all engines on these weights"):
        engine.reconfigured(EngineConfig())
    assert engine.graphs._reason == "the blocks' weights come from the host every step"


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_tenth_of_the_weights_is_on_the_device(quantize: Any) -> None:
    """Two of thirty blocks, and what is in none; a forward takes no more memory than ever."""
    with default_dtype(torch.bfloat16):
        with without_memory(), torch.no_grad():
            model = MV2VTransformer(WAN_1_3B)
            if quantize is not None:
                quantize_linears(model, quantize)
        plan = novel_view_plan(memory=1, shape=WAN_1_3B, frames=5, size=(96, 160))
        model.set_backend("auto")
        whole, blocks = module_bytes(model), module_bytes(model.blocks)
        with torch.device("meta"), torch.no_grad():
            model.offload_blocks(torch.device("meta"))
            assert model.offload is not None
            given = [torch.empty(1, 16, *s.grid) for s in plan.segments]
            size = (1, len(plan.segments), plan.target.num_frames, WAN_1_3B.camera_dim)
            cameras = torch.empty(size, dtype=torch.float32)
            text = torch.empty(1, WAN_1_3B.text_len, WAN_1_3B.text_dim)
            with LiveBytes() as live:
                model(given, torch.empty(1), text, plan=plan, cameras=cameras)
    resident = whole - blocks + model.offload.num_bytes
    assert resident < whole / 5
    assert live.peak == pytest.approx(
        forward_peak_bytes(plan, Execution(2, is_quantized=quantize is not None)), rel=0.02
    )
    sampling = SamplingConfig()
    found, all_there = (
        shape_footprint(WAN_1_3B, sampling, {}, None, cached=1, quantize=quantize, offload=offload)
        for offload in ("blocks", None)
    )
    # what is float32 beside bfloat16 is so here, too
    assert found.transformer == pytest.approx(resident, rel=0.05)
    assert all_there.transformer - all_there.offloadable == found.transformer
    assert found.offloadable == 0


def test_the_bytes_of_an_engine(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, make_checkpoint: Callable[..., Path]
) -> None:
    """On a CPU the blocks wait where they run; on another device they do not."""
    whole, offloaded = (configured(tiny_checkpoint, offload=value) for value in (None, "blocks"))
    places = offloaded.transformer.offload
    assert places is not None and len(places.places) == 2
    before, after = (engine.budget.footprint() for engine in (whole, offloaded))
    assert after.transformer == before.transformer + places.num_bytes
    plan = whole.plan_of(0)
    assert "offload" not in whole.budget.advice(plan, 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    for engine in (whole, offloaded):
        engine.device = torch.device("cuda")
    before, after = (engine.budget.footprint() for engine in (whole, offloaded))
    blocks = module_bytes(whole.transformer.blocks)
    assert after.transformer == before.transformer - blocks + places.num_bytes
    assert after.transformer == before.transformer - before.offloadable
    assert (before.offloadable > 0, after.offloadable) == (True, 0)
    needed = offloaded.budget.predict(plan).peak
    assert f'offload="blocks" ({needed:,})' in whole.budget.advice(plan, needed)


def test_on_the_command_line(
    tiny_checkpoint: Path, source_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["novel-view", str(source_clip), "--out", str(tmp_path / "out"), "--device", "cpu"]
    words += ["--camera", "pan_right", "--checkpoint", str(tiny_checkpoint), "--steps", "2"]
    assert run.main([*words, "--offload", "blocks", "--quiet"]) == 0
    # what was asked for and cannot be had is said to who wants to hear nothing, too
    said = capsys.readouterr().err
    assert said == (
        "note: offload='blocks' runs and saves nothing here: the memory of cpu is the host's\n"
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["turns"][0]["offload"] == "blocks"
    # it is the same turn, so it may be taken up without
    assert run.main([*words, "--camera", "arc_left", "--resume"]) == 0
    assert "saves nothing" not in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert ["offload" in turn for turn in report["turns"]] == [True, False]
