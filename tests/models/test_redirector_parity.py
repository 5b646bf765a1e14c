"""ReDirector written again from its paper (2511.19827) and Wan-Fun's camera control, by the keys of
their files.

Every pixel's ray (o x d, d) of a latent frame's four frames goes through an 8x8 unshuffle, a 2x2
convolution and a residual block; the result is added to the patches of target and source, whose
other 16 channels are zero. Both have the same positions. In every block two bias-free layers make
phases of SiLU of the same result: q and k turn by positions and the first, v by minus the second,
what the output projection gives by the second; the time pairs by none. The text has CLIP's tokens
beside it, with keys and values of their own. Rotary factors are complex128.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import (
    conv2d,
    conv3d,
    gelu,
    layer_norm,
    linear,
    pixel_unshuffle,
    relu,
    silu,
)
from torch.utils.flop_counter import FlopCounterMode

from mv2v_engine.camera.trajectories import CameraTrajectory, named_trajectory
from mv2v_engine.checkpoints import load_checkpoint
from mv2v_engine.config import ConditioningMode, TransformerConfig
from mv2v_engine.errors import RequestError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.kept import ConditioningCache, TargetResidual
from mv2v_engine.models.sample import Sample
from mv2v_engine.shapes import IMAGE_TOKENS
from mv2v_engine.testing import as_cameras, cpu_flops, randomise, relative_error, tiny_config
from mv2v_engine.tokens.flops import flop_table
from mv2v_engine.tokens.plan import turn_plan
from tests.checkpoints.redirector_files import SHAPE, base_state, trained_state

State = dict[str, Tensor]
EPS = 1e-6
HEADS, HEAD_DIM = SHAPE.num_attention_heads, SHAPE.attention_head_dim


def _linear(w: State, name: str, x: Tensor) -> Tensor:
    return linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def rays_of(camera: CameraTrajectory) -> Tensor:
    """[24, F, H, W] in float64, pixel by pixel from the pinhole."""
    height, width = camera.size
    frames = []
    for pose, k in zip(
        camera.poses.double(),
        camera.intrinsics.double().expand(camera.num_frames, 3, 3),
        strict=True,
    ):
        v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        pixels = torch.stack([u, v, torch.ones_like(u)], -1).double()
        direction = pixels @ torch.linalg.inv(k).mT @ pose[:, :3].mT
        direction = direction / direction.norm(dim=-1, keepdim=True)
        origin = pose[:, 3].expand_as(direction)
        frames.append(torch.cat([torch.linalg.cross(origin, direction), direction], -1))
    video = torch.stack([*frames[:1] * 3, *frames])  # [4F, H, W, 6]
    return video.unflatten(0, (-1, 4)).permute(4, 1, 0, 2, 3).flatten(0, 1)


def adapted(w: State, rays: Tensor) -> Tensor:
    """[1, C, F, rows, columns]."""
    name = "control_adapter"
    x = pixel_unshuffle(rays.float().transpose(0, 1), 8)
    x = conv2d(x, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], stride=2)
    block = f"{name}.residual_blocks.0"
    y = relu(conv2d(x, w[f"{block}.conv1.weight"], w[f"{block}.conv1.bias"], padding=1))
    x = x + conv2d(y, w[f"{block}.conv2.weight"], w[f"{block}.conv2.bias"], padding=1)
    return x.transpose(0, 1)[None]


def _positions(frames: int, rows: int, columns: int) -> Tensor:
    """exp(i angle) of every token [L, 1, D / 2], complex128."""

    def axis(dim: int, end: int) -> Tensor:
        rates = 1 / 10000 ** (torch.arange(0, dim, 2).double() / dim)
        angles = torch.outer(torch.arange(end).double(), rates)
        return torch.polar(torch.ones_like(angles), angles)

    third, grid = 2 * (HEAD_DIM // 6), (frames, rows, columns)
    f = axis(HEAD_DIM - 2 * third, frames)[:, None, None].expand(*grid, -1)
    h = axis(third, rows)[None, :, None].expand(*grid, -1)
    w = axis(third, columns)[None, None].expand(*grid, -1)
    return torch.cat([f, h, w], -1).reshape(frames * rows * columns, 1, -1)


def _turn(x: Tensor, factors: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:2], HEADS, -1, 2))
    return torch.view_as_real(pairs * factors).flatten(2).to(x.dtype)


def _phase_factors(w: State, name: str, rays: Tensor) -> Tensor:
    phases = linear(silu(rays), w[f"{name}.1.weight"]).unflatten(-1, (HEADS, -1)).double()
    time = torch.zeros(*phases.shape[:3], HEAD_DIM // 2 - phases.shape[3], dtype=torch.float64)
    phases = torch.cat([time, phases], -1)
    return torch.polar(torch.ones_like(phases), phases)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    shares = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (shares @ v).transpose(1, 2).flatten(2)


def reference(
    w: State,
    target: Tensor,
    source: Tensor,
    timestep: Tensor,
    text: Tensor,
    image: Tensor,
    rays: tuple[Tensor, Tensor],
) -> Tensor:
    """Velocity [1, C, F, H, W]. rays: of target and source, as `rays_of`."""
    video = torch.cat([target, source], 2)
    video = torch.cat([video, torch.zeros_like(video)], 1)
    camera = torch.cat([adapted(w, each) for each in rays], 2)
    x = conv3d(video, w["patch_embedding.weight"], w["patch_embedding.bias"], stride=(1, 2, 2))
    x = x + camera
    frames, rows, columns = x.shape[2] // 2, *x.shape[3:]
    x, cam = (each.flatten(2).transpose(1, 2) for each in (x, camera))
    positions = _positions(frames, rows, columns).repeat(2, 1, 1)
    rates = 10000 ** -(torch.arange(SHAPE.freq_dim // 2).double() / (SHAPE.freq_dim // 2))
    angles = torch.outer(timestep.double(), rates)
    time = torch.cat([angles.cos(), angles.sin()], 1).float()
    time = _linear(w, "time_embedding.2", silu(_linear(w, "time_embedding.0", time)))
    modulation = _linear(w, "time_projection.1", silu(time)).unflatten(1, (6, -1))
    text = _linear(w, "text_embedding.0", text)
    text = _linear(w, "text_embedding.2", gelu(text, approximate="tanh"))
    img = "img_emb.proj"
    image = layer_norm(image, image.shape[-1:], w[f"{img}.0.weight"], w[f"{img}.0.bias"])
    image = _linear(w, f"{img}.3", gelu(_linear(w, f"{img}.1", image)))
    image = layer_norm(image, image.shape[-1:], w[f"{img}.4.weight"], w[f"{img}.4.bias"])
    for n in range(SHAPE.num_layers):
        b, a, c = f"blocks.{n}", f"blocks.{n}.self_attn", f"blocks.{n}.cross_attn"
        shift, scale, gate, shift_f, scale_f, gate_f = (w[f"{b}.modulation"] + modulation).chunk(
            6, 1
        )
        hidden = layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift
        qk, vo = (_phase_factors(w, f"{a}.rope_phase_{kind}", cam) for kind in ("qk", "vo"))
        q = _turn(_rms(_linear(w, f"{a}.q", hidden), w[f"{a}.norm_q.weight"]), positions * qk)
        k = _turn(_rms(_linear(w, f"{a}.k", hidden), w[f"{a}.norm_k.weight"]), positions * qk)
        v = _turn(_linear(w, f"{a}.v", hidden), vo.conj())
        x = x + gate * _turn(_linear(w, f"{a}.o", _attention(q, k, v)), vo)
        hidden = layer_norm(x, x.shape[-1:], w[f"{b}.norm3.weight"], w[f"{b}.norm3.bias"], EPS)
        q = _rms(_linear(w, f"{c}.q", hidden), w[f"{c}.norm_q.weight"])
        k = _rms(_linear(w, f"{c}.k", text), w[f"{c}.norm_k.weight"])
        k_img = _rms(_linear(w, f"{c}.k_img", image), w[f"{c}.norm_k_img.weight"])
        seen = _attention(q, k, _linear(w, f"{c}.v", text))
        seen = seen + _attention(q, k_img, _linear(w, f"{c}.v_img", image))
        x = x + _linear(w, f"{c}.o", seen)
        hidden = layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale_f) + shift_f
        hidden = _linear(
            w, f"{b}.ffn.2", gelu(_linear(w, f"{b}.ffn.0", hidden), approximate="tanh")
        )
        x = x + gate_f * hidden
    shift, scale = (w["head.modulation"] + time[:, None]).chunk(2, 1)
    x = layer_norm(x[:, : x.shape[1] // 2], x.shape[-1:], eps=EPS) * (1 + scale) + shift
    patches = _linear(w, "head.head", x).unflatten(1, (frames, rows, columns))
    patches = patches.unflatten(-1, (2, 2, -1))
    return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


@pytest.mark.parametrize("zoomed", [False, True])
def test_the_velocity_is_that_of_the_files(tmp_path: Path, zoomed: bool) -> None:
    base, trained = base_state(), trained_state()
    save_file(base, str(tmp_path / "base.safetensors"))
    save_file(trained, str(tmp_path / "step20000.safetensors"))
    model = load_checkpoint(
        tmp_path / "step20000.safetensors", base=tmp_path / "base.safetensors"
    ).transformer
    grid, size = (3, 4, 6), (32, 48)
    cameras = [named_trajectory(name, 9, size) for name in ("arc_left", "pan_right")]
    if zoomed:
        lens = cameras[0].intrinsics.clone().expand(9, 3, 3).clone()
        lens[:, 0, 0] *= torch.linspace(1, 2, 9)
        lens[:, 0, 2] += 5
        cameras[0] = CameraTrajectory(cameras[0].poses, lens, size)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    target, source = draw(1, 16, *grid), draw(1, 16, *grid)
    text, image = draw(1, 5, SHAPE.text_dim), draw(1, 17, SHAPE.image_dim)
    timestep = torch.tensor([437.0])
    plan = turn_plan(model.config, grid, ())
    assert [segment.tau for segment in plan.segments] == [0, 0]
    tracks = torch.stack([camera.vectors(64) for camera in cameras])[None]
    with torch.no_grad():
        got = model([target, source], timestep, text, plan=plan, cameras=tracks, image=image)
        rays = (rays_of(cameras[0]), rays_of(cameras[1]))
        wanted = reference(base | trained, target, source, timestep, text, image, rays)
    assert relative_error(got, wanted) <= 1e-5


def _sample(config: TransformerConfig, seed: int, **arguments: Any) -> Sample:
    """Latents, cameras, text and image tokens of its own."""
    plan = turn_plan(config, **({"grid": (3, 6, 10)} | arguments))
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    drawn = draw(1, len(plan.segments), plan.target.num_frames, 12)
    return Sample(
        latents=[draw(1, config.in_channels, *segment.grid) for segment in plan.segments],
        timestep=1000 * torch.rand(1, generator=generator),
        encoder_hidden_states=draw(1, 3 + seed, config.text_dim),
        plan=plan,
        cameras=as_cameras(drawn, config),
        records=[],
        image=draw(1, 4 + seed, config.image_dim),
    )


def _filled(model: MV2VTransformer, sample: Sample) -> Sample:
    """The sample over what a forward of another step has kept."""
    cache = ConditioningCache(sample.plan)
    noise = torch.zeros_like(sample.latents[0])
    first = replace(sample, latents=[noise, *sample.latents[1:]], kept=cache, records=[])
    model.forward_samples([first])
    return replace(sample, latents=sample.latents[:1], cameras=None, kept=cache)


@torch.no_grad()
def test_it_packs_merges_keeps_and_skips() -> None:
    config = tiny_config(
        camera_attention="phases", camera_conditioning="none", shared_time=True, image_dim=8
    )
    model = MV2VTransformer(config).eval()
    randomise(model)
    joint = [
        _sample(config, 0, tokenizers=(), merge="off"),
        _sample(config, 1, tokenizers=(4, 8), fraction=0.5),
        _sample(config, 2, tokenizers=(2,), merge="discard", fraction=0.5, grid=(2, 4, 6)),
    ]
    static = _sample(config, 3, tokenizers=(4,), conditioning="static", fraction=0.5)
    samples = [*joint, _filled(model, static)]
    packed = model.forward_samples(samples)
    for sample, velocity in zip(samples, packed, strict=True):
        alone = model.forward_samples([replace(sample, records=[])])[0]
        torch.testing.assert_close(velocity, alone, rtol=1e-4, atol=1e-5)
        assert sample.image is not None
        other = replace(sample, image=-sample.image, records=[])
        assert not torch.allclose(model.forward_samples([other])[0], alone, atol=1e-2)
    # over kept K and V the target is what a whole static forward makes of it
    whole = replace(static, plan=replace(static.plan, merge="off"), records=[])
    expected = model.forward_samples([whole])[0]
    got = model.forward_samples([_filled(model, whole)])[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # a step without blocks adds what the others added to the patches, the rays too
    residual = TargetResidual()
    velocity = model.forward_samples([replace(joint[1], residual=residual, records=[])])[0]
    again = model.forward_residual(
        joint[1].latents[0], joint[1].timestep, plan=joint[1].plan, residual=residual
    )
    torch.testing.assert_close(again, velocity, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_the_counted_flops_are_those_of_a_forward(conditioning: ConditioningMode) -> None:
    plan = turn_plan(SHAPE, (3, 4, 6), (), merge="off", conditioning=conditioning)
    model = MV2VTransformer(SHAPE).eval()
    latents = [torch.zeros(1, 16, 3, 4, 6)] * 2
    text, image = torch.zeros(1, SHAPE.text_len, 16), torch.zeros(1, IMAGE_TOKENS, 80)
    given = {"plan": plan, "cameras": torch.ones(1, 2, 3, 64), "image": image}
    with FlopCounterMode(display=False, custom_mapping=cpu_flops()) as counter:
        model(latents, torch.zeros(1), text, **given)
    assert counter.get_total_flops() == sum(flop_table(plan).values())


def test_image_tokens_and_cameras_are_asked_for() -> None:
    config = tiny_config(camera_attention="phases", camera_conditioning="none", image_dim=8)
    model, sample = MV2VTransformer(config), _sample(config, 0, tokenizers=(), merge="off")
    with pytest.raises(ValueError, match="image tokens are missing, but the model's image_dim is"):
        model.forward_samples([replace(sample, image=None)])
    with pytest.raises(ValueError, match=r"has 64 numbers, its pose, .* of each of its frames"):
        model.forward_samples([replace(sample, cameras=torch.zeros(1, 2, 3, 12))])
    with pytest.raises(RequestError, match="rays in place of camera_conditioning, got 'own'"):
        tiny_config(camera_attention="phases")
