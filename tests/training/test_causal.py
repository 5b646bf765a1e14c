"""Causal training: over the cache that a stream has, in three stages, to weights that stream."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine
from mv2v_engine.checkpoints import inspect_checkpoint, load_checkpoint
from mv2v_engine.checkpoints.weights import read_header
from mv2v_engine.config import HistoryConfig, StreamConfig
from mv2v_engine.engine.window import window_seed
from mv2v_engine.errors import CheckpointError, TrainingError
from mv2v_engine.files import save_tensors
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.stream_cache import StreamCache
from mv2v_engine.testing import randomise, tiny_config
from mv2v_engine.tokens.plan import turn_plan
from mv2v_engine.training import causal
from mv2v_engine.training.causal import (
    ClipForward,
    ReturningSampler,
    causal_loss,
    causal_model,
)
from mv2v_engine.training.edit_latents import EditLatents
from mv2v_engine.training.recipe import Batch

CPU = torch.device("cpu")
SHAPE = tiny_config(
    in_channels=8, source_channels=4, camera_conditioning="none", tokenizers=(), merger=None
)
FRAMES, GRID = 6, (4, 6)
POLICIES: list[dict[str, Any]] = [
    {"policy": "window", "window": 3},
    {"policy": "sink", "window": 4, "sink_frames": 1},
    {"policy": "memrope", "window": 5, "sink_frames": 1, "is_adaptive": True},
    {"policy": "all", "window": 2},
    {"policy": "history", "window": 5, "sink_frames": 1, "history_slots": 2},
]
HISTORY = HistoryConfig(rates=("1x1x2",), channels=(4, 4, 8, 8), heads=2)


def make_model(**changes: Any) -> MV2VTransformer:
    model = MV2VTransformer(replace(SHAPE, **changes))
    randomise(model)
    return model


def make_batch(model: MV2VTransformer, frames: int = FRAMES) -> Batch:
    plan = turn_plan(model.config, (frames, *GRID), (), merge="off")
    generator = torch.Generator().manual_seed(0)
    clean, source = torch.randn(2, 2, 4, frames, *GRID, generator=generator).unbind(0)
    text = torch.randn(2, 6, 10, generator=generator)
    return Batch(plan, [clean], None, text, source)


def config_of(**fields: Any) -> StreamConfig:
    return StreamConfig(**{"block_frames": 1, "timesteps": (1000, 500)} | fields)


@pytest.mark.parametrize("fields", POLICIES, ids=lambda fields: fields["policy"])
def test_what_is_trained_is_what_is_run(fields: dict[str, Any]) -> None:
    """The cache that gradients flow through holds what a stream's holds, past its first rolls; a
    block's loss reaches the blocks that it sees, and no others."""
    config = config_of(**fields)
    model = make_model(history=HISTORY if config.policy == "history" else None)
    batch = make_batch(model)
    clean = batch.targets.clone().requires_grad_()
    trained = ClipForward(model, batch, config)
    run = StreamCache(model.config, GRID, config)
    level = torch.tensor([0.4, 0.9])
    for frame in range(FRAMES):
        place = slice(frame, frame + 1)
        source = batch.source[:, :, place]  # type: ignore[index]
        trained.begin_block()
        with torch.no_grad():
            model.begin_block(run)
        for at, latents in ((level, torch.ones_like(source)), (0 * level, clean[:, :, place])):
            found = trained(latents, source, at)
            with torch.no_grad():
                noisy = torch.cat([latents, source], 1)
                expected = model([noisy], at * 1000, batch.text, plan=run.plan, stream=run)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            if at is level:
                noisy_velocity = found
    (gradient,) = torch.autograd.grad(noisy_velocity.sum(), clean)
    reached = [bool(gradient[:, :, frame].any()) for frame in range(FRAMES)]
    # the last block sees the two before it, or all; the sink is seen, or gone, and so is what the
    # averages took; those between have been seen by those that are
    assert reached[FRAMES - 1] is False and reached[FRAMES - 2] and reached[FRAMES - 3]
    if fields["policy"] in ("all", "sink", "memrope", "history"):
        assert reached[0]


@pytest.mark.parametrize("longest", [None, 1.0])
@pytest.mark.parametrize("rolls_out", [False, True])
@pytest.mark.parametrize("fields", POLICIES[1::3], ids=lambda fields: fields["policy"])
def test_the_losses_train(longest: float | None, rolls_out: bool, fields: dict[str, Any]) -> None:
    """Every parameter, the history encoder's among them."""
    config = config_of(**fields)
    history = HISTORY if config.policy == "history" else None
    model = make_model(has_end_time=longest is not None, history=history)
    found = causal_loss(
        model,
        make_batch(model),
        torch.Generator().manual_seed(1),
        config,
        flow_shift=3.0,
        longest=longest,
        rolls_out=rolls_out,
        device=CPU,
    )
    found["loss"].backward()
    assert set(found) == ({"loss"} if longest is None else {"loss", "loss_plain", "loss_map"})
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        # a bias of keys moves no attention
        assert bool(parameter.grad.any()) or name.endswith("to_k.bias"), name


def test_a_block_sees_what_the_model_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config, seen = make_model(), config_of(**POLICIES[1]), {}
    batch = make_batch(model)
    given = ClipForward.__call__

    def watched(
        self: ClipForward, latents: Tensor, source: Tensor, level: Tensor, *end: Any
    ) -> Any:
        if not level.any():
            seen[name].append(latents)
            assert torch.is_grad_enabled() is (name == "filmed")
        return given(self, latents, source, level, *end)

    monkeypatch.setattr(ClipForward, "__call__", watched)
    for name, rolls_out in (("filmed", False), ("made", True)):
        seen[name] = []
        generator = torch.Generator().manual_seed(1)
        causal_loss(
            model, batch, generator, config, flow_shift=3.0, rolls_out=rolls_out, device=CPU
        )
    filmed, made = (torch.cat(seen[name], 2) for name in ("filmed", "made"))
    # none follows the last block, so nothing is left of it
    assert torch.equal(filmed, batch.targets[:, :, : FRAMES - 1])
    assert made.shape == filmed.shape and not torch.allclose(made, filmed)
    assert not made.requires_grad


def test_what_cannot_be_made_causal(tiny_checkpoint: Path) -> None:
    with pytest.raises(TrainingError, match="cannot be made causal: expected an editor whose"):
        causal_model(load_checkpoint(tiny_checkpoint))
    model = make_model()
    with pytest.raises(TrainingError, match=r"clips of two blocks at least.* got 1 latent frames"):
        causal_loss(
            model,
            make_batch(model, 1),
            torch.Generator(),
            config_of(window=2, policy="window"),
            flow_shift=3.0,
            device=CPU,
        )


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    """Four clips of one window of four latent frames, for the small editor."""
    folder, generator = tmp_path / "latents", torch.Generator().manual_seed(0)
    folder.mkdir()
    for clip in range(4):
        source, edited = torch.randn(2, 1, 16, 4, 4, 6, generator=generator).half()
        tensors = {
            "source": source,
            "edited": edited,
            "mask": torch.zeros(1, 4, 4, 6).half(),
            "text": torch.randn(2, 16, generator=generator).bfloat16(),
        }
        save_tensors(folder / f"edit_{clip:07d}.safetensors", tensors)
    return folder


@pytest.mark.slow
def test_from_an_editor_to_a_stream(
    tmp_path: Path,
    edits: Path,
    editor_folder: Path,
    moving_frames: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "causal"

    def train(*more: object) -> None:
        words = ["--edits", edits, "--text", editor_folder, "--start-from", editor_folder]
        words += ["--out", out, "--steps", 10, "--batch", 2, *more]
        monkeypatch.setattr("sys.argv", ["causal", *map(str, words)])
        causal.main()

    train()
    states = {name: torch.load(out / name / "checkpoint.pt", weights_only=True)
              for name in ("forcing", "map", "rollout")}  # fmt: skip
    assert {name: state["step"] for name, state in states.items()} == {
        "forcing": 5,
        "map": 3,
        "rollout": 2,
    }
    maps = {name: state["shape"]["has_end_time"] for name, state in states.items()}
    assert maps == {"forcing": False, "map": True, "rollout": True}
    found = load_checkpoint(out / "model", dtype=torch.float32)
    assert found.stream == causal.TINY_STREAM and found.name == "editor-causal"
    assert found.config.has_end_time and not found.config.tokenizers
    assert found.vae_path is not None and found.text_path is not None
    average = states["rollout"]["ema"]
    for name, parameter in found.transformer.named_parameters():
        torch.testing.assert_close(parameter, average[name], rtol=1e-3, atol=1e-4)
    # again: all of it is there, and nothing moves
    before = (out / "model" / "transformer.safetensors").read_bytes()
    train()
    assert (out / "model" / "transformer.safetensors").read_bytes() == before
    # a stage alone goes on from what there is
    out = tmp_path / "rollout"
    monkeypatch.setattr(causal, "TINY_STREAM", replace(causal.TINY_STREAM, timesteps=(1000,)))
    editor_folder = tmp_path / "causal" / "model"
    train("--stages", "rollout")
    assert not (out / "map").exists()
    assert load_checkpoint(out / "model").stream.timesteps == (1000,)  # type: ignore[union-attr]
    # frames as they come, blocks in the steps of the map
    engine = Engine.from_pretrained(tmp_path / "causal" / "model", device="cpu")
    frames = moving_frames(21)
    with engine.stream("a red ball", seed=3, source=iter(frames)) as stream:
        made = torch.cat([block.frames for block in stream.blocks()])
        first = engine.vae.encode(frames[:1])[None]
    assert made.shape == frames.shape and stream.num_blocks == 6
    # the first block is what training's own forward samples
    model, text = engine.transformer, engine.text_embedding("a red ball")
    batch = Batch(turn_plan(model.config, (1, 4, 6), (), merge="off"), [first], None, text, first)
    clip = ClipForward(model, batch, found.stream)  # type: ignore[arg-type]
    clip.cache.begin_block()
    generator = torch.Generator().manual_seed(window_seed(3, 0))
    latents = clip.sampled(first, generator, found.sampling.flow_shift)
    expected = engine.vae.decode(latents[0])
    assert int((made[:1].int() - expected.int()).abs().max()) <= 1


def test_a_base_keeps_what_is_not_trained(
    tmp_path: Path, edits: Path, editor_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only named parameters move and are written; the rest is the base's, which must be there as
    it was."""
    out = tmp_path / "causal"
    base_folder = shutil.copytree(editor_folder, tmp_path / "editor")
    words = ["--edits", edits, "--text", base_folder, "--start-from", base_folder, "--out", out]
    words += ["--steps", 6, "--batch", 2, "--train", "attn1", "bias", "--name", "streamer"]
    words += ["--policies", "memrope", "window", "--window", 4, "--sink", 0]
    monkeypatch.setattr("sys.argv", ["causal", *map(str, words)])
    causal.main()
    written = read_header(out / "model" / "transformer.safetensors")
    names = {name.removesuffix("scale_weight") for name in written}
    assert all("attn1" in n or "bias" in n or "end_time" in n for n in names)
    assert not (out / "model" / "text_encoder").exists()
    base, found = load_checkpoint(base_folder), load_checkpoint(out / "model")
    assert found.name == "streamer" and found.text_path == base.text_path
    assert inspect_checkpoint(out / "model").problem is None
    state = torch.load(out / "rollout" / "checkpoint.pt", weights_only=True)["ema"]
    weights = base.transformer.state_dict()
    moved = 0
    for name, parameter in found.transformer.named_parameters():
        if name not in state:
            assert torch.equal(parameter, weights[name].to(parameter.dtype)), name
            continue
        moved += name in weights and not torch.equal(parameter, weights[name].to(parameter))
        # three bits of a float8's fraction, one scale a row
        most = state[name].abs().amax() if state[name].ndim < 2 else state[name].abs().amax(1)
        error = (parameter.detach().float() - state[name]).abs().max()
        assert float(error) <= float(most.max()) / 16
    assert moved > 10
    # weights that are not those that were trained on
    changed = {name: weight + 1 for name, weight in weights.items()}
    save_tensors(base_folder / "transformer.safetensors", changed)
    with pytest.raises(CheckpointError, match="was trained on other weights than those in"):
        load_checkpoint(out / "model")
    (base_folder / "transformer.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has the others is not at"):
        load_checkpoint(out / "model")


@pytest.mark.parametrize("more", [[], ["--train", "attn1"]], ids=["whole", "by reference"])
def test_a_stream_with_a_history_is_trained(
    tmp_path: Path,
    edits: Path,
    editor_folder: Path,
    moving_frames: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
) -> None:
    """A model without an encoder gets one, whose weights move, are written, and stream."""
    out = tmp_path / "causal"
    words = ["--edits", edits, "--text", editor_folder, "--start-from", editor_folder, "--out", out]
    words += ["--stages", "forcing", "--steps", 3, "--batch", 2, "--warmup", 1, *more]
    words += ["--policy", "history", "--history-rate", "1x1x2", "--window", 5]
    words += ["--channels", 4, 4, 8, 8, "--heads", 2]
    monkeypatch.setattr("sys.argv", ["causal", *map(str, words)])
    causal.main()
    found = load_checkpoint(out / "model", dtype=torch.float32)
    assert found.config.history is not None and found.config.history.rates == ("1x1x2",)
    assert found.stream is not None and found.stream.policy == "history"
    average = torch.load(out / "forcing" / "checkpoint.pt", weights_only=True)["ema"]
    encoder = found.transformer.history_encoders["1x1x2"]
    # its last layer begins at zero
    assert bool(encoder.proj.weight.any())  # type: ignore[union-attr]
    for name, parameter in encoder.named_parameters():
        expected = average[f"history_encoders.1x1x2.{name}"]
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-4)
    # again: all of it is there, and nothing moves
    before = (out / "model" / "transformer.safetensors").read_bytes()
    causal.main()
    assert (out / "model" / "transformer.safetensors").read_bytes() == before
    engine, frames = Engine.from_pretrained(out / "model", device="cpu"), moving_frames(29)
    with engine.stream("a red ball", seed=3, source=iter(frames)) as stream:
        made = torch.cat([block.frames for block in stream.blocks()])
        assert made.shape == frames.shape and stream.cache.history_length == 12


def test_clips_that_leave_time_out(tmp_path: Path) -> None:
    """Windows of one edit in their order, the later ones without their first latent frame."""
    folder = tmp_path / "latents"
    folder.mkdir()
    source = torch.arange(4.0).reshape(4, 1, 1, 1, 1) * 10 + torch.arange(3.0).reshape(
        1, 1, 3, 1, 1
    )
    source = source.expand(4, 16, 3, 4, 6)
    tensors = {
        "source": source.half(),
        "edited": -source.half(),
        "mask": torch.zeros(4, 3, 4, 6).half(),
        "text": torch.ones(2, 16).bfloat16(),
    }
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(folder / "edit_0000000.safetensors", tensors)
    shape = tiny_config(
        in_channels=32,
        out_channels=16,
        source_channels=16,
        camera_conditioning="none",
        text_dim=16,
    )
    recipe = replace(causal.TINY_EDIT_RECIPE, batch=8)
    given = {"empty_text": torch.zeros(1, 16)}
    latents = EditLatents(folder)
    sampler = ReturningSampler(latents, shape, recipe, windows=2, **given)
    batch = sampler.draw(torch.Generator().manual_seed(0))
    assert batch.targets.shape == (8, 16, 5, 4, 6) and batch.source is not None
    assert torch.equal(batch.targets, -batch.source)
    found = {tuple(clip[0, :, 0, 0].int().tolist()) for clip in batch.source}
    possible = {
        (10 * first, 10 * first + 1, 10 * first + 2, 10 * later + 1, 10 * later + 2)
        for first in range(4)
        for later in range(first + 1, 4)
    }
    assert found <= possible and len(found) > 2
    with pytest.raises(TrainingError, match="no clip has 5 windows, the longest of 1 has 4"):
        ReturningSampler(latents, shape, recipe, windows=5, **given)
