"""Packaging a training: a folder that loads by itself, with another checkpoint's VAE or its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mv2v_engine
from mv2v_engine import Engine
from mv2v_engine.checkpoints import inspect_checkpoint, load_checkpoint, render_inspection
from mv2v_engine.config import TINY, TINY_EDIT
from mv2v_engine.errors import CheckpointError, TrainingError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.testing import randomise
from mv2v_engine.training import package
from mv2v_engine.training.text import write_text_encoder

NVS = Path(mv2v_engine.__file__).parent / "assets" / "tiny-nvs"
SHARED = "../tiny-nvs/vae"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training's folder `edit` with an average of its own, and `text`."""
    folder = tmp_path_factory.mktemp("runs")
    model = MV2VTransformer(TINY_EDIT)
    randomise(model)
    state = model.state_dict()
    (folder / "edit").mkdir()
    average = {name: p.detach() + 0.25 for name, p in model.named_parameters()}
    torch.save({"model": state, "ema": average}, folder / "edit" / "checkpoint.pt")
    (folder / "edit" / "log.csv").write_text("step,loss,loss_joint\n50,0.9,0.9\n100,0.5,0.5\n")
    write_text_encoder(folder / "text")
    return folder


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    (tmp_path / "tiny-nvs").mkdir()
    (tmp_path / "tiny-nvs" / "vae").symlink_to(NVS / "vae")
    return tmp_path


def test_a_log_that_is_missing_leaves_nothing_behind(
    runs: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = assets / "tiny-edit"
    said: list[Any] = ["--name", "tiny-edit", "--shared-vae", SHARED, "--text", runs / "text"]
    said += ["--dit", runs / "edit", "--out", out, "--earlier", runs / "none" / "log.csv"]
    monkeypatch.setattr("sys.argv", ["package", *map(str, said)])
    with pytest.raises(TrainingError, match="no training log at"):
        package.main()
    assert not out.exists()


def test_an_editing_checkpoint_shares_its_vae(
    runs: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = assets / "tiny-edit"
    said: list[Any] = ["--name", "tiny-edit", "--shared-vae", SHARED, "--text", runs / "text"]
    said += ["--dit", runs / "edit", "--out", out]
    out.mkdir()
    monkeypatch.setattr("sys.argv", ["package", *map(str, said)])
    package.main()
    assert {path.name for path in out.iterdir()} == {
        "mv2v.json",
        "transformer.safetensors",
        "text_encoder",
        "tokenizer",
        "training_log.csv",
        "loss.png",
    }
    # beside 13.5 MB of tiny-nvs in 24 MiB
    assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) < 11e6
    engine = Engine.from_pretrained(out, device="cpu")
    assert engine.text is not None and engine.checkpoint.name == "tiny-edit"
    assert engine.vae.key == Engine.from_pretrained("tiny-nvs", device="cpu").vae.key
    average = torch.load(runs / "edit" / "checkpoint.pt", weights_only=True)["ema"]
    for name, parameter in engine.transformer.named_parameters():
        torch.testing.assert_close(parameter, average[name], rtol=1e-3, atol=1e-4)
    found = inspect_checkpoint(out)
    assert set(found.dtypes) == {"float16", "float32"}
    text = render_inspection(found)
    assert f"vae          {NVS / 'vae'}" in text and "for          run edit" in text


def test_the_runs_own_shape_is_packaged(runs: Path, assets: Path) -> None:
    """Cameras inside attention have no weights that would tell."""
    shape = replace(TINY, camera_attention="prope_fused")
    model = MV2VTransformer(shape)
    dit = assets / "run"
    dit.mkdir()
    state = {"model": model.state_dict(), "ema": {}, "shape": asdict(shape)}
    torch.save(state, dit / "checkpoint.pt")
    package.package("tiny-nvs", dit, assets / "mine", vae=NVS / "vae")
    assert load_checkpoint(assets / "mine").config == shape


def test_a_shared_vae_that_is_not_there(runs: Path, assets: Path) -> None:
    elsewhere = assets / "other" / "tiny-edit"
    with pytest.raises(TrainingError, match="expected a VAE's folder, relative to --out"):
        package.package("tiny-edit", runs / "edit", elsewhere, shared_vae=SHARED)
    assert not elsewhere.parent.exists()
    package.package("tiny-edit", runs / "edit", assets / "tiny-edit", shared_vae=SHARED)
    elsewhere.parent.mkdir()
    shutil.move(assets / "tiny-edit", elsewhere)
    named = elsewhere.parent / "tiny-nvs" / "vae"
    with pytest.raises(CheckpointError, match=f"names {named} as its VAE, and no VAE is there"):
        load_checkpoint(elsewhere)
    found = inspect_checkpoint(elsewhere)
    assert found.vae_path == named and "copy the folder there" in str(found.problem)
    said = json.loads((elsewhere / "mv2v.json").read_text())
    assert said["vae"] == SHARED
    for wrong in (str(NVS / "vae"), "", 5):
        (elsewhere / "mv2v.json").write_text(json.dumps(said | {"vae": wrong}))
        with pytest.raises(CheckpointError, match="no path relative to the folder"):
            load_checkpoint(elsewhere)
    (elsewhere / "mv2v.json").write_text(json.dumps(said | {"vae": None}))
    assert load_checkpoint(elsewhere).vae_path is None


def test_parts_that_are_not_there(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"checkpoint\.pt does not exist"):
        package.package("tiny-nvs", tmp_path, tmp_path / "out", vae=NVS / "vae")
    with pytest.raises(TrainingError, match=r"what mv2v_engine\.training\.text writes"):
        package.package("tiny-edit", runs / "edit", tmp_path / "out", text=tmp_path)
    assert not (tmp_path / "out").exists()


def test_what_was_frozen_is_the_bases(runs: Path, assets: Path) -> None:
    given: dict[str, Any] = {"shared_vae": SHARED, "text": runs / "text"}
    package.package("tiny-edit", runs / "edit", assets / "base", **given)
    state = torch.load(runs / "edit" / "checkpoint.pt", weights_only=True)
    frozen = {name for name in state["model"] if ".ffn." in name}
    for name in ("model", "ema"):
        state[name] = {k: v + 1 for k, v in state[name].items() if k not in frozen}
    (assets / "some").mkdir()
    torch.save(state, assets / "some" / "checkpoint.pt")
    with pytest.raises(TrainingError, match=r"parameters were frozen.*--base"):
        package.package("tiny-edit", assets / "some", assets / "out", **given)
    assert not (assets / "out").exists()
    base = str(assets / "base")
    package.package("tiny-edit", assets / "some", assets / "out", base=base, **given)
    before, after = (
        load_checkpoint(str(assets / name)).transformer.state_dict() for name in ("base", "out")
    )
    for name, value in after.items():
        moved = 0.0 if name in frozen else 1.0
        torch.testing.assert_close(value, before[name] + moved, rtol=1e-2, atol=1e-2)


def test_a_vae_of_its_own(runs: Path, tmp_path: Path) -> None:
    modes = ("joint", "static")
    package.package("tiny-edit", runs / "edit", tmp_path, vae=NVS / "vae", conditioning=modes)
    loaded = load_checkpoint(tmp_path)
    assert loaded.vae_path == tmp_path / "vae" and loaded.conditioning == modes
    assert loaded.text_path is None
    assert (tmp_path / "vae" / "config.json").read_bytes() == (
        NVS / "vae" / "config.json"
    ).read_bytes()
