"""Loading an engine: parts that do not fit are refused before a turn has been paid for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.engine.parts import default_memory
from mv2v_engine.errors import (
    CheckpointError,
    KernelUnavailableError,
    MemoryBudgetError,
    RequestError,
    VideoError,
)
from mv2v_engine.ops import native
from mv2v_engine.testing import relative_error, tiny_config

Make = Callable[..., Path]
BACKEND = "reference" if native.missing_reason("cpu") else "native"


def load(path: Path | str, **settings: object) -> Engine:
    components = settings.pop("components", None)
    config = EngineConfig(**settings)
    return Engine.from_pretrained(path, device="cpu", config=config, components=components)


def test_what_an_engine_says_of_itself(tiny_checkpoint: Path) -> None:
    assert load(tiny_checkpoint).describe() == {
        "checkpoint": "tiny",
        "device": "cpu",
        "dtype": "float32",
        "backend": BACKEND,
        "attention": "reference",
        "scheduler": "euler",
        "timesteps": "exact",
        "torch": torch.__version__,
    }


@pytest.mark.skipif(BACKEND == "reference", reason="libmv2v_cpu was not built")
def test_a_native_turn_is_the_references_but_for_rounding(
    tiny_checkpoint: Path, source_frames: Tensor
) -> None:
    latents = []
    for backend in ("native", "reference"):
        engine = load(tiny_checkpoint, backend=backend, merge="conv", memory="retrieved")
        session = engine.session(source_frames)
        for seed, camera in enumerate(("pan_right", "arc_left")):
            result = session.render(camera, seed=seed)
        assert result.report["backend"] == engine.describe()["backend"] == backend
        latents.append(session.turns[-1].latents)
    # the second turn reads the first one's video: two chains of rounding
    assert 0 < relative_error(*latents) < 1e-4
    with pytest.raises(KernelUnavailableError, match="needs float32, this engine runs in float16"):
        Engine.from_pretrained(
            tiny_checkpoint,
            device="cpu",
            dtype=torch.float16,
            config=EngineConfig(backend="native"),
        )


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there(tiny_checkpoint: Path, device: str) -> None:
    with pytest.raises(RequestError, match=f"device '{device}' cannot be used .*give cpu, cuda"):
        Engine.from_pretrained(tiny_checkpoint, device=device)


def test_a_backend_that_cannot_run(tmp_path: Path) -> None:
    # before the checkpoint, which is not even there
    with pytest.raises(KernelUnavailableError, match="'triton' was asked for, but it needs a CUDA"):
        load(tmp_path / "none", backend="triton")
    with pytest.raises(KernelUnavailableError, match=r"'fa3', but it needs a CUDA device"):
        load(tmp_path / "none", attention="fa3")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fov_radius", 0.0),
        ("fov_radius", float("nan")),
        ("fov_blend", 2.0),
        ("max_memory", -1),
        ("merge_fraction", 1.5),
    ],
)
def test_bad_settings(field: str, value: float) -> None:
    with pytest.raises(RequestError, match=field):
        EngineConfig(**{field: value})


def test_a_cache_without_room_for_one_video(tiny_checkpoint: Path) -> None:
    with pytest.raises(MemoryBudgetError, match="one video of tiny is 9,216 bytes"):
        load(tiny_checkpoint, cache_bytes=9_215)
    assert load(tiny_checkpoint, cache_bytes=9_216).cache.capacity_bytes == 9_216


def test_a_checkpoint_without_vae(tmp_path: Path, tiny_checkpoint: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "vae")
    with pytest.raises(CheckpointError, match=r"holds no VAE; give components=FOLDER"):
        load(tmp_path / "bare")


def test_components_from_another_folder(
    tmp_path: Path, tiny_checkpoint: Path, worded_checkpoint: Path, source_frames: Tensor
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "vae")
    engine = load(tmp_path / "bare", components=worded_checkpoint)
    assert engine.text is not None
    engine.session(source_frames).render("pan_right", prompt="a red ball")
    with pytest.raises(CheckpointError, match="lacks a text encoder"):
        load(tmp_path / "bare", components=tiny_checkpoint)


def test_a_vae_of_another_latent_space(tmp_path: Path, make_checkpoint: Make) -> None:
    vae = {"z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}
    with pytest.raises(CheckpointError, match="VAE has 8 latent channels, the transformer takes 1"):
        load(make_checkpoint(tmp_path / "odd", vae=vae))


def test_a_text_encoder_of_another_width(
    tmp_path: Path, make_checkpoint: Make, worded_checkpoint: Path
) -> None:
    make_checkpoint(tmp_path / "odd", text_dim=24)
    with pytest.raises(CheckpointError, match="embeddings of 16, the transformer takes 24"):
        load(tmp_path / "odd", components=worded_checkpoint)


def test_a_window_that_the_vae_cannot_encode(tmp_path: Path, make_checkpoint: Make) -> None:
    folder = make_checkpoint(tmp_path / "odd", sampling={"size": (50, 64)})
    with pytest.raises(VideoError, match="64x50; width and height must be multiples of 8"):
        load(folder)


def test_a_base_without_memory_keeps_its_own_quality(
    tmp_path: Path, make_checkpoint: Make, tiny_checkpoint: Path
) -> None:
    """What the weights never learned is off until it is asked for by name."""
    config = tiny_config()
    assert default_memory(config, ["tokenizers.2.weight", "tokenizers.4.weight"]) == "none"
    assert default_memory(config, []) == "retrieved"
    # nothing that a ranked video could be read with
    assert default_memory(tiny_config(tokenizers=(2,)), []) == "none"
    base = make_checkpoint(tmp_path / "base", merger=None)
    assert (load(base).merge, load(base, merge="conv").merge) == ("off", "conv")
    trained = load(tiny_checkpoint)
    assert (trained.memory_mode, trained.merge) == ("retrieved", "conv")


def test_the_same_weights_under_another_configuration(
    tiny_checkpoint: Path, source_frames: Tensor
) -> None:
    engine = load(tiny_checkpoint)
    static = engine.reconfigured(EngineConfig(conditioning="static"))
    assert static.transformer is engine.transformer and static.vae is engine.vae
    turn = static.session(source_frames).render("pan_right")
    assert turn.report["plan"]["conditioning"] == "static"
    assert len(static.cache) == 1 and len(engine.cache) == 0
    with pytest.raises(RequestError, match=r"responsiveness_heads is shared .* from_pretrained"):
        engine.reconfigured(EngineConfig(responsiveness_heads="mean"))
