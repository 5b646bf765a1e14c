"""Offloaded blocks of every kind of weights make what resident ones make, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.checkpoints import load_checkpoint
from mv2v_engine.engine.budget import shape_footprint
from mv2v_engine.models.offload import NUM_PLACES, block_bytes
from tests.checkpoints import test_gguf as gguf_files
from tests.checkpoints.test_gguf import write_gguf
from tests.conftest import windowed
from tests.engine import test_bernini as bernini
from tests.engine import test_echo_memory as echo_memory
from tests.engine import test_redirector as redirector
from tests.models.test_vace import _config, _file, _model

base, trained, components = redirector.base, redirector.trained, echo_memory.components
folder, wan256 = bernini.folder, gguf_files.wan256
OFFLOADS = (None, "blocks")


def _all_equal(made: list[list[Tensor]]) -> None:
    whole, offloaded = made
    assert len(whole) == len(offloaded) > 0
    assert all(map(torch.equal, whole, offloaded)) and float(whole[0].float().abs().amax()) > 0


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_state_in_some_of_the_blocks(tmp_path: Path, components: Path, quantize: Any) -> None:
    """Echo-Memory's blocks have other weights where the state runs."""
    weights = echo_memory.state(states=(1,))
    path = echo_memory.saved(tmp_path, weights, "block_wise_ssm_causal_v2")
    frames = torch.randint(0, 255, (9, 32, 48, 3), dtype=torch.uint8)
    made = []
    for offload in OFFLOADS:
        config = EngineConfig(offload=offload, quantize=quantize)
        loaded = Engine.from_pretrained(path, device="cpu", components=components, config=config)
        engine = windowed(loaded)
        session = engine.session(frames)
        asked: dict[str, Any] = {"prompt": "a ball", "num_inference_steps": 2}
        made.append([session.render(camera, **asked).latents for camera in ("pan:-30", "pan:30")])
    _all_equal(made)
    blocks, offload_ = engine.transformer.blocks, engine.transformer.offload
    assert offload_ is not None and block_bytes(blocks[1]) > block_bytes(blocks[0])
    # two places, each large enough for any block
    assert offload_.num_bytes == NUM_PLACES * block_bytes(blocks[1])
    if quantize is None:
        shape, vae = engine.transformer.config, {"base_dim": 8}
        found, whole = (
            shape_footprint(shape, engine.sampling, vae, None, cached=1, offload=offload)
            for offload in ("blocks", None)
        )
        assert whole.transformer - whole.offloadable == found.transformer


def test_redirector(trained: Path, base: Path) -> None:
    frames = torch.randint(0, 255, (9, 32, 48, 3), dtype=torch.uint8)
    made = []
    for offload in OFFLOADS:
        engine = redirector.small_engine(trained, base, offload=offload, memory="retrieved")
        session = engine.session(frames)
        asked: dict[str, Any] = {"prompt": "a ball", "num_inference_steps": 2}
        made.append([session.render(name, **asked).latents for name in ("arc_left", "pan_right")])
    _all_equal(made)


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_bernini(folder: Path, conditioning: Any) -> None:
    frames = torch.randint(0, 255, (18, 32, 48, 3), dtype=torch.uint8)
    made = []
    for offload in OFFLOADS:
        settings: dict[str, Any] = {"conditioning": conditioning, "memory": "retrieved"}
        engine = bernini.small(folder, offload=offload, **settings)
        session = engine.session(frames, cuts=())
        session.edit("a ball", num_inference_steps=2)
        made.append([window.read() for window in session._kept.drafts[0].windows])
    _all_equal(made)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_vace(
    worded_checkpoint: Path,
    moving_frames: Callable[..., Tensor],
    tmp_path: Path,
    quantize: Any,
    conditioning: Any,
) -> None:
    shape = _config(num_attention_heads=2, attention_head_dim=24, text_dim=16, text_len=8)
    path = _file(tmp_path / "vace", _model(shape), layers=[0, 2, 3])
    made = []
    for offload in OFFLOADS:
        config = EngineConfig(
            offload=offload, quantize=quantize, conditioning=conditioning, memory="retrieved"
        )
        given: dict[str, Any] = {"components": worded_checkpoint, "config": config}
        loaded = Engine.from_pretrained(path, device="cpu", **given)
        engine = windowed(loaded, num_frames=5, num_inference_steps=2)
        session = engine.session(moving_frames(9), cuts=())
        session.edit("a red ball", seed=3)
        made.append([window.read() for window in session._kept.drafts[0].windows])
    _all_equal(made)


def test_a_flow_map(make_checkpoint: Any, source_frames: Tensor, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, has_end_time=True, sampling={"scheduler": "flow_map"})
    made = []
    for offload in OFFLOADS:
        engine = Engine.from_pretrained(path, device="cpu", config=EngineConfig(offload=offload))
        session = engine.session(source_frames)
        made.append([session.render("pan_right", num_inference_steps=n).latents for n in (1, 3)])
    _all_equal(made)


@pytest.mark.parametrize("is_editor", [False, True])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_stream(
    causal_folder: Path,
    causal_editor_folder: Path,
    moving_frames: Callable[..., Tensor],
    quantize: Any,
    is_editor: bool,
) -> None:
    path, made = causal_editor_folder if is_editor else causal_folder, []
    for offload in OFFLOADS:
        config = EngineConfig(offload=offload, quantize=quantize)
        engine = Engine.from_pretrained(path, device="cpu", config=config)
        given = {"source": iter(moving_frames(45))} if is_editor else {}
        stream = engine.stream("a red ball", seed=4, **given)
        made.append([block.frames for block in stream.blocks(6)])
    _all_equal(made)


def test_gguf(wan256: dict[str, Tensor], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "wan.gguf", wan256)
    whole, offloaded = (load_checkpoint(path, offload=offload) for offload in OFFLOADS)
    assert offloaded.transformer.offload is not None
    for name, weight in whole.transformer.state_dict().items():
        assert torch.equal(weight, offloaded.transformer.state_dict()[name]), name
