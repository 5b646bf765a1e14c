"""Small random checkpoints of both tasks, an engine, clips, and a long one's finished edit."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor

from mv2v_engine import Engine, EngineConfig, run
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.checkpoints import save_checkpoint
from mv2v_engine.checkpoints.hub import _opened
from mv2v_engine.config import SamplingConfig, StreamConfig, TransformerConfig
from mv2v_engine.files import save_tensors
from mv2v_engine.models.autoencoder import Autoencoder
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.ops.backend import has_bfloat16_products
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import make_world
from mv2v_engine.testing import randomise
from mv2v_engine.video.io import write_video
from tests.checkpoints.small_hub import SmallHub, ask_at, serving

has_products = pytest.mark.skipif(
    not has_bfloat16_products(), reason="this CPU does not multiply bfloat16"
)
NUM_FRAMES, SIZE, FPS = 9, (48, 64), 8
TRANSFORMER = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "ffn_dim": 96,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 16,
    "text_len": 8,
    "freq_dim": 32,
}
VAE = {
    "base_dim": 8,
    "decoder_base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
    "latents_mean": [0.0] * 16,
    "latents_std": [0.3] * 16,
}
WORDS = ("a", "red", "ball", "rolls", "the", "floor")
# Lucy-Edit's pipeline: Wan2.2's VAE of 48 channels and stride 16, 96 channels into the transformer
LUCY_TRANSFORMER = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 48,
    "in_channels": 96,
    "out_channels": 48,
    "text_dim": 16,
    "freq_dim": 32,
    "rope_max_seq_len": 64,
}
LUCY_VAE = VAE | {
    "decoder_base_dim": 16,
    "z_dim": 48,
    "dim_mult": [1, 2, 2, 2],
    "temperal_downsample": [False, True, True],
    "scale_factor_spatial": 16,
    "latents_mean": [0.01 * i for i in range(48)],
    "latents_std": [0.2 + 0.01 * i for i in range(48)],
}


def save_tiny(
    folder: Path,
    *,
    name: str = "tiny",
    has_text: bool = False,
    vae: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    stream: StreamConfig | None = None,
    **transformer: Any,
) -> Path:
    """A whole checkpoint folder of 9 frames of 48x64, random but the same each time."""
    config = TransformerConfig(**TRANSFORMER | transformer)
    fields = {
        "num_frames": NUM_FRAMES,
        "size": SIZE,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "flow_shift": 3.0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _save_vae(folder / "vae", VAE | (vae or {}))
        model = MV2VTransformer(config)
    randomise(model)
    if has_text:
        _save_text(folder, config.text_dim)
    settings = SamplingConfig(**fields | (sampling or {}))
    save_checkpoint(folder, model, config, settings, name, torch.float32, stream=stream)
    return folder


def _save_vae(folder: Path, fields: dict[str, Any]) -> None:
    """Save a VAE as diffusers does, whose import takes longer than most tests."""
    folder.mkdir(parents=True)
    words = json.dumps({"_class_name": "AutoencoderKLWan", **fields})
    (folder / "config.json").write_text(words)
    weights = Autoencoder(fields).state_dict()
    save_tensors(folder / "diffusion_pytorch_model.safetensors", weights)


def _save_text(folder: Path, dim: int) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = UMT5Config(vocab_size=16, d_model=dim, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        UMT5EncoderModel(config).eval().save_pretrained(folder / "text_encoder")


def save_lucy(folder: Path) -> Path:
    """A whole `LucyEditPipeline` folder as diffusers writes it, random but the same each time."""
    from diffusers import (
        AutoencoderKLWan,
        LucyEditPipeline,
        UniPCMultistepScheduler,
        WanTransformer3DModel,
    )
    from transformers import AutoTokenizer, UMT5EncoderModel

    _save_text(folder, LUCY_TRANSFORMER["text_dim"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLWan(**LUCY_VAE)
        transformer = WanTransformer3DModel(**LUCY_TRANSFORMER)
    randomise(transformer)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 4.0}
    LucyEditPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=vae,
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(**flow),
        expand_timesteps=True,
    ).save_pretrained(folder)
    return folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores: tests wait for browsers, workers and Ray."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Look for no garbage in what is imported, now or later: it stays."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that none of them runs alone in the end.

    Processes that take whole files in this order end at almost the same time; pytest-xdist's own
    order puts files of few tests last, which are the slow ones.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    """A hub of the repositories in `served`; what is fetched lies in `cache`, beside it."""
    with serving(tmp_path / "served") as hub:
        ask_at(monkeypatch, hub.address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        _opened.cache_clear()
        yield hub
        _opened.cache_clear()


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    return save_tiny


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def worded_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a text encoder and its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("checkpoint") / "worded", name="worded", has_text=True)


@pytest.fixture(scope="session")
def lucy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `LucyEditPipeline` folder of tiny random components."""
    return save_lucy(tmp_path_factory.mktemp("checkpoint") / "lucy")


@pytest.fixture(scope="session")
def small_lucy(lucy_folder: Path) -> Engine:
    """That folder's engine for 9 frames of 64 x 96 pixels: 3 latent frames."""
    return windowed(Engine.from_pretrained(lucy_folder, device="cpu"), size=(64, 96))


def configured(checkpoint: Path, **settings: Any) -> Engine:
    """A checkpoint's engine on the CPU."""
    return Engine.from_pretrained(checkpoint, device="cpu", config=EngineConfig(**settings))


def windowed(loaded: Engine, **sampling: Any) -> Engine:
    """That engine for 9 frames of 32 x 48 pixels, and what else is told."""
    changed = replace(loaded.sampling, **{"num_frames": 9, "size": (32, 48)} | sampling)
    checkpoint = replace(loaded.checkpoint, sampling=changed)
    parts = (loaded.vae, loaded.text, loaded.image)
    return Engine(checkpoint, *parts, device=loaded.device, config=loaded.config)


def smooth_frames(count: int, size: tuple[int, int] = (64, 96)) -> Tensor:
    """uint8 [count, *size, 3] that have nothing to do with each other."""
    coarse = torch.rand(count, 3, 4, 6, generator=torch.Generator().manual_seed(5))
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1)


# a causal model of 32x48 pixels that reads 8 tokens: blocks of 2 latent frames, a window of 8, two
# steps; and one with the source's latents beside the target's, as Lucy-Edit has them
CAUSAL: dict[str, Any] = {
    "has_text": True,
    "sampling": {"size": (32, 48), "num_frames": 5},
    "stream": StreamConfig(block_frames=2, window=8, sink_frames=2, timesteps=(1000, 500)),
    "num_layers": 2,
    "camera_conditioning": "none",
    "tokenizers": (),
    "merger": None,
}
CAUSAL_EDITOR = CAUSAL | {"in_channels": 32, "source_channels": 16}


@pytest.fixture(scope="session")
def causal_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("checkpoint") / "causal", name="causal", **CAUSAL)


@pytest.fixture(scope="session")
def causal_editor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "causal_editor"
    return save_tiny(folder, name="causal_editor", **CAUSAL_EDITOR)


@pytest.fixture
def engine(tiny_checkpoint: Path) -> Engine:
    return Engine.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def source_frames() -> Tensor:
    """uint8 [9, 48, 64, 3]: a procedural world, filmed by a static camera."""
    camera = named_trajectory("static", NUM_FRAMES, SIZE)
    return render(make_world(1_000_029), camera).frames


@pytest.fixture(scope="session")
def source_clip(tmp_path_factory: pytest.TempPathFactory, source_frames: Tensor) -> Path:
    path = tmp_path_factory.mktemp("source") / "clip.mp4"
    write_video(path, source_frames, FPS)
    return path


# a model that edits, in windows of 5 frames, and a video of five windows, the last of which
# begins within the fourth
EDIT_WINDOW, EDIT_SIZE, EDIT_FRAMES, EDIT_FPS = 5, (32, 48), 23, 12.5


@pytest.fixture(scope="session")
def moving_frames() -> Callable[..., Tensor]:
    """Makes uint8 [T, 32, 48, 3]: a smooth picture that moves."""

    def make(num_frames: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(1, 3, 4, 6, generator=generator)
        (picture,) = torch.nn.functional.interpolate(coarse, EDIT_SIZE, mode="bilinear")
        frames = torch.stack([picture.roll(number, -1) for number in range(num_frames)])
        return (frames * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    return make


@pytest.fixture(scope="session")
def long_clip(
    tmp_path_factory: pytest.TempPathFactory, moving_frames: Callable[..., Tensor]
) -> Path:
    path = tmp_path_factory.mktemp("clips") / "long.mp4"
    write_video(path, moving_frames(EDIT_FRAMES), EDIT_FPS)
    return path


EDITOR: dict[str, Any] = {
    "name": "editor",
    "has_text": True,
    "sampling": {"num_frames": EDIT_WINDOW, "size": EDIT_SIZE, "num_inference_steps": 2},
    "in_channels": 32,
    "source_channels": 16,
    "camera_conditioning": "none",
}


@pytest.fixture(scope="session")
def editor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model that takes windows of 5 frames and reads 8 tokens."""
    return save_tiny(tmp_path_factory.mktemp("checkpoint") / "editor", **EDITOR)


@pytest.fixture(scope="session")
def finished_edit(
    tmp_path_factory: pytest.TempPathFactory, long_clip: Path, editor_folder: Path
) -> tuple[Path, str]:
    """The folder of an unbroken edit, "a red ball" into edited.mp4, and what `run` printed."""
    folder = tmp_path_factory.mktemp("finished")
    where = ["--out", str(folder / "edited.mp4"), "--checkpoint", str(editor_folder)]
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        words = ["edit", str(long_clip), "--prompt", "a red ball", *where, "--device", "cpu"]
        assert run.main(words) == 0
    assert errors.getvalue() == ""
    return folder, said.getvalue()
