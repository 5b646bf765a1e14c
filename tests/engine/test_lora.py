"""A LoRA in an engine: other weights than without it, to sessions, reports, and whoever shares."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mv2v_engine import Engine, EngineConfig, run
from mv2v_engine.checkpoints.detect import OWN_WEIGHTS
from mv2v_engine.errors import RequestError, StorageError
from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.work.protocol import decode, encode, engine_arguments, setup_message

MODULE = "blocks.1.attn1.to_v"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA of the tiny checkpoint: 48 channels."""
    generator = torch.Generator().manual_seed(7)
    path = tmp_path / "style.safetensors"
    factors = {
        f"transformer.{MODULE}.lora_A.weight": torch.randn(2, 48, generator=generator),
        f"transformer.{MODULE}.lora_B.weight": torch.randn(48, 2, generator=generator),
    }
    save_file(factors, str(path))
    return path


def test_turns_are_those_of_weights_merged_by_hand(
    tmp_path: Path, tiny_checkpoint: Path, lora: Path, source_frames: Tensor
) -> None:
    factors = load_file(str(lora))
    down, up = factors.values()
    folder = tmp_path / "merged"
    folder.mkdir()
    for file in tiny_checkpoint.iterdir():
        if file.name != OWN_WEIGHTS:
            (folder / file.name).symlink_to(file)
    weights = load_file(str(tiny_checkpoint / OWN_WEIGHTS))
    weights[f"{MODULE}.weight"] += 0.5 * (up @ down)
    save_file(weights, str(folder / OWN_WEIGHTS))
    by_hand = Engine.from_pretrained(folder, device="cpu")
    config = EngineConfig(lora=((lora, 0.5),))
    merged = Engine.from_pretrained(tiny_checkpoint, device="cpu", config=config)
    plain = Engine.from_pretrained(tiny_checkpoint, device="cpu")
    latents = [
        engine.session(source_frames).render("pan_right").latents
        for engine in (by_hand, merged, plain)
    ]
    torch.testing.assert_close(latents[0], latents[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(latents[1], latents[2], atol=1e-2)
    said = merged.describe()
    assert said["lora"] == [
        {"file": "style.safetensors", "sha256": said["lora"][0]["sha256"], "strength": 0.5}
    ]
    assert re.fullmatch(r"tiny\+style:0.5@[0-9a-f]{8}", said["checkpoint"])
    assert "lora" not in plain.describe()


def test_a_session_goes_on_with_the_same_one_alone(
    tmp_path: Path, tiny_checkpoint: Path, lora: Path, source_frames: Tensor
) -> None:
    def engine(*pairs: tuple[Path, float]) -> Engine:
        config = EngineConfig(lora=pairs)
        return Engine.from_pretrained(tiny_checkpoint, device="cpu", config=config)

    store = tmp_path / "session"
    session = engine((lora, 0.5)).session(source_frames, store=store)
    session.render("pan_right")
    session.close()
    for other in (engine(), engine((lora, 0.6)), engine((lora, 0.5), (lora, 0.5))):
        with pytest.raises(StorageError, match=r"a session whose checkpoint is 'tiny\+style:0.5@"):
            other.session(source_frames, store=store, resume=True)
    session = engine((lora, 0.5)).session(source_frames, store=store, resume=True)
    assert [turn.number for turn in session.turns] == [1]


def test_engines_on_the_same_weights_have_the_same(tiny_checkpoint: Path, lora: Path) -> None:
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu")
    with pytest.raises(RequestError, match="lora is shared by all engines on these weights"):
        engine.reconfigured(EngineConfig(lora=((lora, 1.0),)))


def test_a_services_worker_gets_them(tmp_path: Path, lora: Path) -> None:
    config = ServingConfig(store=tmp_path, engine=EngineConfig(lora=((lora, 0.5),)))
    told = engine_arguments(decode(encode(setup_message(config))))["config"]
    assert told.lora == ((lora, 0.5),)


def test_replicas_elsewhere_get_whole_paths(
    tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lora.parent)
    pairs = ((lora.name, 1.0), ("owner/name:file", 1.0))
    config = ServingConfig(store=tmp_path, engine=EngineConfig(lora=pairs)).in_cluster()
    assert config.engine.lora == ((lora, 1.0), (Path("owner/name:file"), 1.0))


def test_the_command_line(
    tmp_path: Path,
    tiny_checkpoint: Path,
    lora: Path,
    source_clip: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["novel-view", str(source_clip), "--camera", "pan_right", "--device", "cpu"]
    words += ["--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "out")]
    assert run.main([*words, "--lora", f"{lora}:0.5", "--lora", str(lora), "--quiet"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    told = json.dumps(report)
    assert "tiny+style:0.5@" in told and "+style:1@" in told
    # resumed without them, and before anything is loaded
    assert run.main([*words, "--resume"]) == 2
    assert "a session whose checkpoint is 'tiny+style:0.5@" in capsys.readouterr().err
    assert run.main([*words, "--overwrite", "--lora", str(tmp_path / "none.pt")]) == 2
    assert "error: no LoRA at" in capsys.readouterr().err
    assert run.main(["inspect", str(lora)]) == 0
    printed = capsys.readouterr().out
    assert f"{lora} is a LoRA under diffusers' names: 1 products of rank 2" in printed
