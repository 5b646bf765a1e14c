"""Weights that are not finite: refused by name when they are loaded, told by an inspection."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mv2v_engine import Engine, EngineConfig, run
from mv2v_engine.checkpoints import inspect_checkpoint, load_checkpoint, render_inspection
from mv2v_engine.errors import CheckpointError, NotFiniteError
from mv2v_engine.vae import load_vae

# the file of each component and one of its tensors; not to_q, whose NaN torch's attention turns
# into zeros where there are fewer than 16 keys and AVX-512
PARTS = {
    "transformer": ("transformer.safetensors", "blocks.1.attn1.to_v.weight"),
    "vae": ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.weight"),
    "text_encoder": ("text_encoder/model.safetensors", "encoder.final_layer_norm.weight"),
}
Capture = pytest.CaptureFixture[str]


def damaged(checkpoint: Path, folder: Path, part: str, *values: float) -> tuple[Path, str, Tensor]:
    """A copy with some numbers changed; the tensor that has them, and what it was."""
    shutil.copytree(checkpoint, folder)
    file, name = PARTS[part]
    tensors = load_file(folder / file)
    whole = tensors[name].clone()
    for place, value in enumerate(values):
        tensors[name].view(-1)[place] = value
    save_file(tensors, folder / file, {"format": "pt"})
    return folder, name, whole


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("part", PARTS)
def test_one_number_is_found_by_loading_and_by_inspecting(
    worded_checkpoint: Path, source_frames: Tensor, tmp_path: Path, part: str, bad: float
) -> None:
    folder, name, whole = damaged(worded_checkpoint, tmp_path / "damaged", part, bad, 0.0, bad)
    said = rf"1 tensor has .*: {name} \(2 of {whole.numel():,} in float32\); copy or download"
    with pytest.raises(CheckpointError, match=said):
        Engine.from_pretrained(folder, device="cpu")
    found = inspect_checkpoint(folder)
    assert found.numbers is None and "by its headers" in render_inspection(found)
    found = inspect_checkpoint(folder, deep=True)
    assert found.numbers is not None and found.problem is not None
    assert [numbers.component for numbers in found.numbers if numbers.faults] == [part]
    text = render_inspection(found)
    assert f"{part}: 1 of" in text and f"not finite   1\n             {name} (2 of" in text
    assert "loads        no: " in text
    # asked for all the same, the turn says it
    config = EngineConfig(check_weights=False)
    engine = Engine.from_pretrained(folder, device="cpu", config=config)
    session = engine.session(source_frames)
    with pytest.raises(NotFiniteError, match="turn 1 is dropped"):
        session.render("pan_right", prompt="a ball")
    assert not session.turns and not len(engine.cache)


def test_what_has_no_room_in_a_dtype_is_told(
    worded_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder, name, _ = damaged(worded_checkpoint, tmp_path / "large", "transformer", 1.0, -7e4)
    with pytest.raises(CheckpointError, match=rf"{name} \(up to 7e\+04, too large for float16\)"):
        load_checkpoint(folder, dtype=torch.float16)
    for dtype in (None, torch.bfloat16, torch.float32):
        load_checkpoint(folder, dtype=dtype)
    load_checkpoint(folder, dtype=torch.float16, check_weights=False)
    assert run.main(["inspect", str(folder), "--deep"]) == 0
    text = capsys.readouterr().out
    assert f"all finite, up to 7e+04 ({name}), too large for float16" in text
    assert text.endswith("loads        yes\n")
    folder, name, _ = damaged(worded_checkpoint, tmp_path / "vae", "vae", 7e4)
    place = torch.device("cpu")
    load_vae(folder, device=place, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=rf"{name} \(up to 7e\+04, too large for float16\)"):
        load_vae(folder, device=place, dtype=torch.float16)
    folder, name, _ = damaged(worded_checkpoint, tmp_path / "text", "text_encoder", 7e4)
    with pytest.raises(CheckpointError, match=rf"{name} \(1 of 16 in float16\).*float16 has no"):
        Engine.from_pretrained(folder, device="cpu", dtype=torch.float16)


@pytest.mark.parametrize("statistic", [{"latents_mean": math.nan}, {"latents_std": 0.0}])
def test_a_latent_space_that_is_none(
    tiny_checkpoint: Path, tmp_path: Path, statistic: dict[str, float]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "vae" / "config.json").read_text())
    ((name, value),) = statistic.items()
    config[name][3] = value
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"latents_mean that are not finite, or latents_std"):
        load_vae(folder, device=torch.device("cpu"), dtype=torch.float32)


def test_the_command_line_says_it_in_a_line_and_writes_nothing(
    tiny_checkpoint: Path, source_clip: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder, name, _ = damaged(tiny_checkpoint, tmp_path / "damaged", "transformer", math.nan)
    out = tmp_path / "out"
    words = ["novel-view", str(source_clip), "--camera", "pan_right", "--out", str(out)]
    words += ["--checkpoint", str(folder), "--device", "cpu"]
    assert run.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and name in said and said.count("\n") == 1
    assert "--no-check-weights" in said and not out.exists()
    assert run.main([*words, "--no-check-weights"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: step 1 of 3 gave latents that are not finite")
    # not even a folder that the same command would be refused for
    assert not out.exists()
    assert run.main(["inspect", str(folder), "--deep"]) == 2
    captured = capsys.readouterr()
    assert name in captured.out and name in captured.err and captured.err.count("\n") == 1


def test_an_edit_that_replaces_another_and_fails_leaves_nothing_half(
    editor_folder: Path, long_clip: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder, _, _ = damaged(editor_folder, tmp_path / "damaged", "transformer", math.nan)
    out = tmp_path / "out" / "edited.mp4"
    words = ["edit", str(long_clip), "--prompt", "a red ball", "--out", str(out), "--quiet"]
    words += ["--device", "cpu", "--checkpoint"]
    assert run.main([*words, str(editor_folder)]) == 0
    assert run.main([*words, str(folder), "--no-check-weights", "--overwrite"]) == 2
    assert "window 1 is dropped" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []
    assert run.main([*words, str(editor_folder)]) == 0
