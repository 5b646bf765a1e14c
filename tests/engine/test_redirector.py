"""ReDirector's files in their published layout: a whole turn, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import UMT5EncoderModel

from mv2v_engine import Engine, EngineConfig, run
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.checkpoints import inspect_checkpoint, load_checkpoint, render_inspection
from mv2v_engine.engine.graphs import Graphs
from mv2v_engine.engine.request import Request
from mv2v_engine.errors import CheckpointError, RequestError
from mv2v_engine.image import load_image_encoder
from mv2v_engine.models.autoencoder import Autoencoder
from mv2v_engine.sampling.flow_match import initial_noise
from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.work.protocol import decode, encode, engine_arguments, setup_message
from mv2v_engine.testing import relative_error
from tests.checkpoints.conftest import by_replacement, fill, original_shapes
from tests.checkpoints.redirector_files import SHAPE, base_state, trained_state
from tests.checkpoints.small_hub import SmallHub
from tests.conftest import configured, smooth_frames, windowed
from tests.engine.graph_stand_in import StandIn
from tests.models.test_redirector_parity import rays_of, reference
from tests.test_text import original_t5_name
from tests.test_vae import original_name

State = dict[str, Tensor]
FRAMES, SIZE = 9, (32, 48)
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


def clip_state() -> State:
    """Wan's CLIP file, small: one head of 80, 2 layers, 2x2 patches of 14 pixels."""
    shapes: dict[str, tuple[int, ...]] = {
        "log_scale": (),
        "textual.token_embedding.weight": (5, 8),
        "visual.patch_embedding.weight": (80, 3, 14, 14),
        "visual.cls_embedding": (1, 1, 80),
        "visual.pos_embedding": (1, 5, 80),
        "visual.head": (80, 8),
    }
    sizes = {"to_qkv": (240, 80), "proj": (80, 80)}
    layers = [f"visual.transformer.{n}" for n in range(2)]
    linears = {f"{layer}.attn.{name}": size for layer in layers for name, size in sizes.items()}
    linears |= {
        f"{layer}.mlp.{n}": s for layer in layers for n, s in ((0, (320, 80)), (2, (80, 320)))
    }
    norms = [f"{layer}.norm{n}" for layer in layers for n in (1, 2)]
    for name in (*norms, "visual.pre_norm", "visual.post_norm"):
        linears[name] = (80,)
    for name, size in linears.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = size, size[:1]
    generator = torch.Generator().manual_seed(4)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def clip_tokens(w: State, frame: Tensor) -> Tensor:
    """CLIP's tokens after all layers but the last, by the keys of Wan's file."""

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (80,), w[f"visual.{name}.weight"], w[f"visual.{name}.bias"])

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"visual.{name}.weight"], w[f"visual.{name}.bias"])

    image = frame.permute(2, 0, 1)[None].float() / 127.5 - 1
    image = F.interpolate(image, size=(28, 28), mode="bicubic", align_corners=False) * 0.5 + 0.5
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    image = F.conv2d((image - mean) / std, w["visual.patch_embedding.weight"], stride=14)
    x = torch.cat([w["visual.cls_embedding"], image.flatten(2).transpose(1, 2)], 1)
    x = norm("pre_norm", x + w["visual.pos_embedding"])
    q, k, v = linear("transformer.0.attn.to_qkv", norm("transformer.0.norm1", x)).chunk(3, -1)
    x = x + linear("transformer.0.attn.proj", (q @ k.mT / 80**0.5).softmax(-1) @ v)
    hidden = F.gelu(linear("transformer.0.mlp.0", norm("transformer.0.norm2", x)))
    return x + linear("transformer.0.mlp.2", hidden)


@pytest.fixture
def base(tmp_path: Path, worded_checkpoint: Path) -> Path:
    """`Wan2.1-Fun-V1.1-1.3B-Control-Camera` as it is downloaded."""
    root = tmp_path / "Wan-Fun"
    (root / "google").mkdir(parents=True)
    text = UMT5EncoderModel.from_pretrained(worded_checkpoint / "text_encoder")
    state = {original_t5_name(name): weight.data for name, weight in text.named_parameters()}
    torch.save(state, root / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(clip_state(), root / CLIP)
    shutil.copytree(worded_checkpoint / "tokenizer", root / "google/umt5-xxl")
    torch.manual_seed(0)
    vae = Autoencoder({"base_dim": 8}).state_dict()
    torch.save({original_name(key): value for key, value in vae.items()}, root / "Wan2.1_VAE.pth")
    save_file(base_state(), str(root / "diffusion_pytorch_model.safetensors"))
    words = {"model_type": "i2v", "in_dim": 32, "out_dim": 16, "dim": 256, "num_heads": 2}
    words |= {"add_control_adapter": True, "in_dim_control_adapter": 24, "eps": 1e-6}
    (root / "config.json").write_text(json.dumps({"_class_name": "WanModel", **words}))
    return root


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    path = tmp_path / "ReDirector" / "step20000.safetensors"
    path.parent.mkdir()
    save_file(trained_state(), str(path))
    return path


def small_engine(trained: Path, base: Path, **config: object) -> Engine:
    """An engine of 9 frames of 32x48."""
    return windowed(configured(trained, base=base, **config))


@pytest.fixture
def frames() -> Tensor:
    return smooth_frames(FRAMES, SIZE)


def test_a_turn_is_that_of_the_published_pipeline(
    trained: Path, base: Path, frames: Tensor
) -> None:
    engine = small_engine(trained, base)
    assert engine.checkpoint.name == "step20000 on Wan-Fun" and engine.memory_mode == "none"
    sampling, shape = engine.sampling, engine.transformer.config
    assert (shape.in_channels, shape.image_dim, shape.shared_time) == (16, 80, True)
    assert (sampling.timesteps, sampling.flow_shift, sampling.guidance_scale) == ("bfloat16", 5, 5)
    moving = named_trajectory("tilt_up", FRAMES, SIZE)
    session = engine.session(frames, cameras=moving)
    turn = session.render("arc_left", prompt="a red ball", seed=3, num_inference_steps=4)

    w = base_state() | trained_state()
    source = engine.vae.encode(frames)[None]
    texts = engine.text_embeddings(["a red ball", sampling.negative_prompt])
    image = clip_tokens(clip_state(), frames[0])
    rays = rays_of(named_trajectory("arc_left", FRAMES, SIZE)), rays_of(moving)
    latents = initial_noise((1, *source.shape[1:]), 3)
    levels = torch.linspace(1, 0, 5)
    levels = 5 * levels / (1 + 4 * levels)
    for level, after in pairwise(levels):
        timestep = (1000 * level)[None].bfloat16().float()
        own, other = (reference(w, latents, source, timestep, text, image, rays) for text in texts)
        latents = latents + (after - level) * (other + 5 * (own - other))
    assert relative_error(turn.latents[None], latents) <= 1e-5

    again = session.render("pan_left", memory="previous", num_inference_steps=2)
    assert again.report["plan"]["tokens_by_kind"]["source"] == 3 * 2 * 3
    remembered = session.render("pan_left", memory="retrieved", num_inference_steps=2)
    assert remembered.report["plan"]["memory_tokenizers"] == [4, 4]


def test_image_tokens_of_a_folder_are_those_of_the_file(tmp_path: Path, frames: Tensor) -> None:
    torch.save(clip_state(), tmp_path / CLIP)
    of_file = load_image_encoder(tmp_path / CLIP, device=torch.device("cpu"), dtype=torch.float32)
    assert (of_file.dim, of_file.num_tokens) == (80, 5)
    assert relative_error(of_file(frames[0]), clip_tokens(clip_state(), frames[0])) <= 1e-5
    of_file.model.save_pretrained(tmp_path / "image_encoder")
    of_folder = load_image_encoder(
        tmp_path / "image_encoder", device=torch.device("cpu"), dtype=torch.float32
    )
    assert torch.equal(of_file(frames[0]), of_folder(frames[0]))
    state = clip_state()
    del state["visual.transformer.1.mlp.2.bias"]
    torch.save(state, tmp_path / CLIP)
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of a CLIP .*mlp.fc2.bias"):
        load_image_encoder(tmp_path / CLIP, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"no CLIP image encoder: it lacks visual.patch_em"):
        save_file({"x": torch.ones(1)}, str(tmp_path / "x.safetensors"))
        load_image_encoder(
            tmp_path / "x.safetensors", device=torch.device("cpu"), dtype=torch.float32
        )


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_captured_and_packed_turns_are_those_alone(
    trained: Path, base: Path, frames: Tensor, conditioning: str
) -> None:
    engine = small_engine(trained, base, conditioning=conditioning)
    sampling = engine.sampling
    requests = [
        Request.view(
            camera,
            sampling,
            prompt="a ball",
            seed=seed,
            num_inference_steps=4,
            guidance_scale=5.0,
            memory="none",
        )
        for seed, camera in enumerate(("arc_left", "pan_right"))
    ]
    alone = [engine.session(frames).ask(request).latents for request in requests]
    together = engine.answer_all([(engine.session(frames), request) for request in requests])
    for turn, latents in zip(together, alone, strict=True):
        assert not isinstance(turn, Exception)
        assert relative_error(turn.latents, latents) <= 1e-5
    engine.graphs = Graphs("on", 1 << 30, StandIn(), None)
    captured = engine.session(frames).ask(requests[0])
    assert torch.equal(captured.latents, alone[0])
    assert captured.report["graphs"]["replayed_steps"] > 0


def test_what_is_needed_is_said(
    trained: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = r"ReDirector's trained tensors, .*base=PATH, alibaba-pai/Wan2.1-Fun-V1.1-1.3B-Control"
    for call in (inspect_checkpoint, Engine.from_pretrained):
        with pytest.raises(CheckpointError, match=wanted):
            call(trained)
    assert run.main(["inspect", str(trained)]) == 2
    assert "give the one that they were trained on with --base PATH" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"Wan-Fun is a camera-control \(Wan-Fun; base=PATH"):
        inspect_checkpoint(base)
    with pytest.raises(CheckpointError, match="is a whole transformer, and base is for a file of"):
        inspect_checkpoint(base, base=base)
    text = render_inspection(inspect_checkpoint(trained, base=base))
    assert "a ReDirector transformer: 3 blocks of 256 channels" in text
    assert "rotary phases of cameras in 3 blocks and an adapter of their rays, on Wan-Fun" in text
    assert run.main(["inspect", str(trained), "--base", str(base)]) == 0
    (base / CLIP).rename(tmp_path / CLIP)
    with pytest.raises(CheckpointError, match="reads image tokens, and no image encoder is beside"):
        Engine.from_pretrained(trained, device="cpu", config=EngineConfig(base=base))
    # a base of other depth lacks blocks, or has too many
    state = {k: v for k, v in load_file(str(trained)).items() if not k.startswith("blocks.2.")}
    save_file(state, str(trained))
    assert "blocks.2.attn1.rope_phase_qk.1.weight" in str(
        inspect_checkpoint(trained, base=base).problem
    )


def _other_bases() -> dict[str, tuple[dict[str, Tensor], str]]:
    """Transformers that it was not trained on, and what is said of each."""
    plain = replace(SHAPE, image_dim=0, camera_attention="none", shared_time=False)
    wan = fill(original_shapes(plain, camera=False))
    fun = base_state()
    return {
        "plain": (wan, "neither has condition_embedder.image_embedder"),
        "diffusers": (
            {by_replacement(key): weight for key, weight in wan.items()},
            "neither has proj_out.weight under one kind of names",
        ),
        "deeper": (base_state(replace(SHAPE, num_layers=4, merge_blocks=None)), "2 are in neither"),
        "shallower": (base_state(replace(SHAPE, num_layers=2, merge_blocks=None)), "in neither"),
        "wider": (base_state(replace(SHAPE, num_attention_heads=3)), "have other shapes"),
        "no_adapter": (
            {key: weight for key, weight in fun.items() if "control_adapter" not in key},
            "6 are in neither: control_adapter.conv.weight",
        ),
    }


@pytest.mark.parametrize(
    "name", ["plain", "diffusers", "deeper", "shallower", "wider", "no_adapter"]
)
def test_a_base_that_is_another_is_named(trained: Path, tmp_path: Path, name: str) -> None:
    state, what = _other_bases()[name]
    other = tmp_path / f"{name}_base"
    other.mkdir()
    save_file(state, str(other / "diffusion_pytorch_model.safetensors"))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(trained, base=other)
    said = str(caught.value)
    assert said.startswith(f"{other} is not the base of {trained}: ") and what in said
    assert "base=PATH, alibaba-pai/Wan2.1-Fun-V1.1-1.3B-Control-Camera" in said


def test_names_on_a_hub(hub: SmallHub, trained: Path, base: Path) -> None:
    shutil.copytree(base, hub.root / "pai/fun")
    shutil.copytree(trained.parent, hub.root / "park/ReDirector")
    with pytest.raises(CheckpointError, match="ReDirector's trained tensors"):
        Engine.from_pretrained("park/ReDirector", device="cpu")
    assert inspect_checkpoint("park/ReDirector", base="pai/fun").problem is None
    assert not hub.fetched()
    config = EngineConfig(base="pai/fun")
    engine = Engine.from_pretrained("park/ReDirector", device="cpu", config=config)
    assert engine.checkpoint.name == "step20000 on fun" and engine.image is not None
    assert set(hub.fetched()) >= {
        "park/ReDirector/step20000.safetensors",
        "pai/fun/diffusion_pytorch_model.safetensors",
        f"pai/fun/{CLIP}",
    }
    with pytest.raises(RequestError, match="base is shared by all engines on these weights"):
        engine.reconfigured(EngineConfig())


def test_a_service_tells_its_workers_the_base(base: Path, tmp_path: Path) -> None:
    config = ServingConfig(
        checkpoint="park/ReDirector", store=tmp_path / "s", engine=EngineConfig(base=base)
    )
    setup = decode(encode(setup_message(config.in_cluster())))
    assert engine_arguments(setup)["config"].base == base
    assert SHAPE.has_camera
