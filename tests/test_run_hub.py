"""Commands and engines on hub names: what is refused, in which order, and that turns come out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mv2v_engine import run
from mv2v_engine.checkpoints.hub import hub_name
from mv2v_engine.serving.config import ServingConfig
from tests.checkpoints.small_hub import SmallHub

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def tiny(hub: SmallHub, tiny_checkpoint: Path) -> str:
    """A repository of this project's format, with weights of another program's beside it."""
    shutil.copytree(tiny_checkpoint, hub.root / "me/tiny")
    (hub.root / "me/tiny/onnx").mkdir()
    (hub.root / "me/tiny/onnx/model.safetensors").write_bytes(bytes(3000))
    return "me/tiny"


def test_a_turn_of_a_named_checkpoint(
    hub: SmallHub, tiny: str, source_clip: Path, capsys: Capture
) -> None:
    words = ["novel-view", "--camera", "pan_right", "--out", "out", "--steps", "1"]
    words += ["--device", "cpu", "--checkpoint", tiny]
    # what is wrong with the rest of a command is told before anything large is fetched
    assert run.main([*words, "none.mp4"]) == 2
    assert "none.mp4 does not exist" in capsys.readouterr().err and not hub.fetched()
    assert run.main([*words, str(source_clip)]) == 0
    assert len(list(Path("out").glob("turn*.mp4"))) == 1
    assert "me/tiny/transformer.safetensors" in hub.fetched()
    assert not [name for name in hub.fetched() if "onnx" in name]


def test_a_cluster_is_told_the_name() -> None:
    """The name, and not a path of the machine where it was typed."""
    config = ServingConfig(store=Path("s"), checkpoint="a/b", components=Path("c/d@v1"))
    there = config.in_cluster()
    assert there.checkpoint == "a/b" and there.components == Path("c/d@v1")
    assert there.components is not None and hub_name(there.components) is not None
