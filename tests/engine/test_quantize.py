"""Weights of eight bits from the door to the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mv2v_engine import Engine, EngineConfig, run
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.checkpoints import load_checkpoint, save_checkpoint
from mv2v_engine.checkpoints.load import stored_dtype
from mv2v_engine.config import TINY, SamplingConfig
from mv2v_engine.engine.budget import module_bytes, shape_footprint
from mv2v_engine.errors import CheckpointError, RequestError, StorageError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.quantized import QuantizedLinear, large_linears, quantize_linears
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import make_world


@pytest.mark.parametrize(("kind", "least"), [("int8", 45), ("fp8", 40)])
def test_the_embedded_models_latents(kind: str, least: float) -> None:
    """Peak signal-to-noise ratio against float32 after a whole turn."""
    turns, sizes = [], []
    for quantize in (None, kind):
        config = EngineConfig(quantize=quantize)
        engine = Engine.from_pretrained(
            "tiny-nvs", device="cpu", dtype=torch.float32, config=config
        )
        sampling = engine.sampling
        camera = named_trajectory("static", sampling.num_frames, sampling.size)
        session = engine.session(render(make_world(7), camera).frames, fps=8.0)
        turns.append(session.render("pan_right", num_inference_steps=2).latents)
        sizes.append(module_bytes(engine.transformer))
    exact, rounded = turns
    peak = exact.max() - exact.min()
    found = float(10 * torch.log10(peak**2 / (rounded - exact).square().mean()))
    assert least <= found < 90, found
    # the blocks are most of it, a byte where there were four
    assert sizes[1] < 0.45 * sizes[0]


def test_sessions_and_reports_say_it(
    tiny_checkpoint: Path, source_frames: Tensor, tmp_path: Path
) -> None:
    config = EngineConfig(quantize="int8")
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", config=config)
    session = engine.session(source_frames, store=tmp_path / "session")
    report = session.render("pan_right").report
    session.close()
    assert report["quantize"] == "int8"
    assert "the blocks' weights rounded to int8" in report["approximations"]
    other = Engine.from_pretrained(tiny_checkpoint, device="cpu")
    assert "quantize" not in other.describe()
    with pytest.raises(StorageError, match=r"checkpoint.*tiny \(int8\)"):
        other.session(source_frames, store=tmp_path / "session", resume=True)
    with pytest.raises(RequestError, match="quantize is shared by all engines on these weights"):
        engine.reconfigured(EngineConfig(quantize="fp8"))
    again = engine.session(source_frames, store=tmp_path / "session", resume=True)
    assert len(again.turns) == 1


def test_the_file_is_rounded_once(tiny_checkpoint: Path) -> None:
    """Rounded is what the file holds, whatever the tokens' dtype, which small layers keep."""
    whole = load_checkpoint(tiny_checkpoint).transformer
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_checkpoint(tiny_checkpoint, dtype=dtype, quantize="int8")
        model = loaded.transformer
        assert loaded.report.num_parameters == sum(p.numel() for p in whole.parameters())
        for name, linear in large_linears(whole).items():
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantizedLinear) and layer.bias.dtype == dtype
            error = (layer.stored * layer.scale - linear.weight).abs()
            assert (error <= 0.5001 * layer.scale).all(), name
        assert model.patch_embedding.weight.dtype == model.proj_out.weight.dtype == dtype


def test_after_loras(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What is rounded is the merged weight; the name tells of both."""
    name, generator = "blocks.1.attn2.to_v", torch.Generator().manual_seed(0)
    dim = load_checkpoint(tiny_checkpoint).config.dim
    halves = {
        f"{name}.lora_A.weight": torch.randn(2, dim, generator=generator),
        f"{name}.lora_B.weight": torch.randn(dim, 2, generator=generator),
    }
    save_file(halves, tmp_path / "style.safetensors")
    lora = [(tmp_path / "style.safetensors", 0.5)]
    merged = load_checkpoint(tiny_checkpoint, lora=lora).transformer
    loaded = load_checkpoint(tiny_checkpoint, lora=lora, quantize="int8")
    assert loaded.name.startswith("tiny+style:0.5@") and loaded.name.endswith(" (int8)")
    layer, linear = loaded.transformer.get_submodule(name), merged.get_submodule(name)
    assert isinstance(layer, QuantizedLinear) and isinstance(linear, torch.nn.Linear)
    error = (layer.stored * layer.scale - linear.weight).abs()
    assert (error <= 0.5001 * layer.scale).all()


def test_the_bytes_are_predicted(tiny_checkpoint: Path) -> None:
    """Eight bits are advised where they would suffice."""
    whole = Engine.from_pretrained(tiny_checkpoint, device="cpu")
    small = Engine.from_pretrained(
        tiny_checkpoint, device="cpu", config=EngineConfig(quantize="int8")
    )
    before, after = (each.budget.footprint() for each in (whole, small))
    assert after.transformer == before.transformer - before.quantizable < before.transformer
    assert after.quantizable == 0 and after.execution.is_quantized
    plan = whole.plan_of(0)
    needed = small.budget.predict(plan).peak
    assert f'quantize="int8" ({needed:,})' in whole.budget.advice(plan, needed)
    assert "quantize" not in small.budget.advice(plan, needed - 1)


def test_the_bytes_of_a_shape() -> None:
    """Those of the modules, which nobody has loaded."""
    shape, sampling = TINY, SamplingConfig()
    with torch.device("meta"):
        model = MV2VTransformer(shape)
        quantize_linears(model, "fp8")
    counts = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        wide = stored_dtype(model, name, torch.bfloat16).itemsize
        is_own = name.endswith((".stored", ".scale"))
        counts += tensor.numel() * (tensor.itemsize if is_own else wide)
    found = shape_footprint(shape, sampling, {}, None, cached=1, quantize="fp8")
    assert found.transformer == counts
    assert found.execution.is_quantized


def test_the_text_encoder(
    worded_checkpoint: Path,
    tiny_checkpoint: Path,
    source_frames: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its bytes are known and advised, reports say it, and who has none is refused."""
    whole, small = (
        Engine.from_pretrained(
            worded_checkpoint, device="cpu", config=EngineConfig(quantize_text=kind)
        )
        for kind in (None, "int8")
    )
    before, after = (engine.budget.footprint() for engine in (whole, small))
    assert after.text == before.text - before.text_quantizable < before.text
    assert after.text_quantizable == 0 and after.embed >= before.embed
    plan = whole.plan_of(0)
    advised = dict(whole.budget._changes(before, plan, 0))
    assert advised['quantize_text="int8"'][0].text == after.text
    turns = [
        engine.session(source_frames).render("pan_right", prompt="a red ball", guidance_scale=2.0)
        for engine in (whole, small)
    ]
    assert not torch.equal(turns[0].latents, turns[1].latents)
    assert turns[1].report["quantize_text"] == "int8"
    assert "the text encoder's weights rounded to int8" in turns[1].report["approximations"]
    # before any weight is read
    monkeypatch.setattr("mv2v_engine.checkpoints.load._fill", None)
    with pytest.raises(RequestError, match=r"tiny has no text encoder, got quantize_text='fp8'"):
        Engine.from_pretrained(
            tiny_checkpoint, device="cpu", config=EngineConfig(quantize_text="fp8")
        )


def test_what_cannot_be(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_checkpoint(tiny_checkpoint, quantize="fp8")
    model = loaded.transformer
    with pytest.raises(CheckpointError, match=r"tiny \(fp8\) holds weights in eight bits"):
        save_checkpoint(
            tmp_path / "x", model, loaded.config, loaded.sampling, loaded.name, torch.float32
        )
    assert not (tmp_path / "x").exists()
    with pytest.raises(RequestError, match=r"quantize must be one of .*int8.*fp8"):
        EngineConfig(quantize="int4")  # type: ignore[arg-type]


def test_on_the_command_line(
    tiny_checkpoint: Path, source_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["novel-view", str(source_clip), "--out", str(tmp_path / "out")]
    words += ["--camera", "pan_right", "--checkpoint", str(tiny_checkpoint), "--steps", "2"]
    assert run.main([*words, "--quantize", "int8", "--device", "cpu"]) == 0
    (path,) = (tmp_path / "out").glob("report.json")
    assert json.loads(path.read_text())["turns"][0]["quantize"] == "int8"
    # the same turns by other weights are not the same
    capsys.readouterr()
    assert run.main([*words, "--resume", "--device", "cpu"]) == run.REFUSED
    assert "tiny (int8)" in capsys.readouterr().err
    assert run.main(["inspect", str(tiny_checkpoint)]) == 0
    assert "MB with --quantize int8 or fp8" in capsys.readouterr().out
