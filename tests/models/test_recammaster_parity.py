"""ReCamMaster written again from BASE_MODELS 2, in original Wan's parameter names.

Target and source are concatenated on the frame axis and share one patch embedding and one
timestep; positions run on over both; the target's cameras are added to both halves after
modulation; `projector` follows self-attention before the gate; the prediction is cut to the
target. Rotary factors are complex128.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv3d, gelu, layer_norm, linear, silu

from mv2v_engine.checkpoints.names import to_original
from mv2v_engine.testing import relative_error, tiny_config
from mv2v_engine.tokens.plan import turn_plan
from tests.models.drawn import random_inputs, random_model

State = dict[str, Tensor]
EPS = 1e-6


def _linear(w: State, name: str, x: Tensor) -> Tensor:
    return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def _frequencies(head_dim: int, frames: int, rows: int, columns: int) -> Tensor:
    """exp(i position / theta^(2j / dim)) of every token [L, 1, D / 2], complex128."""

    def axis(dim: int, end: int) -> Tensor:
        rates = 1 / 10000 ** (torch.arange(0, dim, 2).double() / dim)
        angles = torch.outer(torch.arange(end).double(), rates)
        return torch.polar(torch.ones_like(angles), angles)

    third = 2 * (head_dim // 6)
    grid = (frames, rows, columns)
    f = axis(head_dim - 2 * third, frames)[:, None, None].expand(*grid, -1)
    h = axis(third, rows)[None, :, None].expand(*grid, -1)
    w = axis(third, columns)[None, None].expand(*grid, -1)
    return torch.cat([f, h, w], -1).reshape(frames * rows * columns, 1, -1)


def _rotate(x: Tensor, frequencies: Tensor, heads: int) -> Tensor:
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:2], heads, -1, 2))
    return torch.view_as_real(pairs * frequencies).flatten(2).to(x.dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    shares = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (shares @ v).transpose(1, 2).flatten(2)


def _block(
    w: State,
    n: int,
    x: Tensor,
    t_mod: Tensor,
    text: Tensor,
    camera: Tensor,
    turn: Tensor,
    heads: int,
) -> Tensor:
    name, width = f"blocks.{n}", (x.shape[-1],)
    mod = (w[f"{name}.modulation"] + t_mod).chunk(6, dim=1)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = mod
    h = layer_norm(x, width, eps=EPS) * (1 + scale_msa) + shift_msa
    # the target's poses serve both halves, one embedding a frame, spread over its tokens
    embedded = _linear(w, f"{name}.cam_encoder", camera).repeat(1, 2, 1)
    h = h + embedded.repeat_interleave(x.shape[1] // embedded.shape[1], dim=1)
    q = _rms(_linear(w, f"{name}.self_attn.q", h), w[f"{name}.self_attn.norm_q.weight"])
    k = _rms(_linear(w, f"{name}.self_attn.k", h), w[f"{name}.self_attn.norm_k.weight"])
    v = _linear(w, f"{name}.self_attn.v", h)
    attended = _attention(_rotate(q, turn, heads), _rotate(k, turn, heads), v, heads)
    attended = _linear(w, f"{name}.self_attn.o", attended)
    x = x + gate_msa * _linear(w, f"{name}.projector", attended)
    h = layer_norm(x, width, w[f"{name}.norm3.weight"], w[f"{name}.norm3.bias"], EPS)
    q = _rms(_linear(w, f"{name}.cross_attn.q", h), w[f"{name}.cross_attn.norm_q.weight"])
    k = _rms(_linear(w, f"{name}.cross_attn.k", text), w[f"{name}.cross_attn.norm_k.weight"])
    v = _linear(w, f"{name}.cross_attn.v", text)
    x = x + _linear(w, f"{name}.cross_attn.o", _attention(q, k, v, heads))
    h = layer_norm(x, width, eps=EPS) * (1 + scale_mlp) + shift_mlp
    h = _linear(w, f"{name}.ffn.2", gelu(_linear(w, f"{name}.ffn.0", h), approximate="tanh"))
    return x + gate_mlp * h


def recammaster(
    w: State, target: Tensor, source: Tensor, timestep: Tensor, text: Tensor, camera: Tensor,
    *, heads: int, freq_dim: int, depth: int,
) -> Tensor:  # fmt: skip
    """Velocity of the target [B, C, F, H, W]; target, source alike; camera [B, F, 12]."""
    half = freq_dim // 2
    rates = torch.pow(10000.0, -torch.arange(half).double() / half)
    angles = torch.outer(timestep.double(), rates)
    sinusoid = torch.cat([angles.cos(), angles.sin()], -1).to(target.dtype)
    t = _linear(w, "time_embedding.2", silu(_linear(w, "time_embedding.0", sinusoid)))
    t_mod = _linear(w, "time_projection.1", silu(t)).unflatten(1, (6, -1))
    context = gelu(_linear(w, "text_embedding.0", text), approximate="tanh")
    context = _linear(w, "text_embedding.2", context)

    latents = torch.cat([target, source], dim=2)
    patches = conv3d(
        latents, w["patch_embedding.weight"], w["patch_embedding.bias"], stride=(1, 2, 2)
    )
    frames, rows, columns = patches.shape[2:]
    x = patches.flatten(2).transpose(1, 2)
    turn = _frequencies(x.shape[-1] // heads, frames, rows, columns)
    for n in range(depth):
        x = _block(w, n, x, t_mod, context, camera, turn, heads)

    shift, scale = (w["head.modulation"] + t[:, None]).chunk(2, dim=1)
    x = layer_norm(x, (x.shape[-1],), eps=EPS) * (1 + scale) + shift
    x = _linear(w, "head.head", x).unflatten(1, (frames, rows, columns)).unflatten(-1, (2, 2, -1))
    video = x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
    return video[:, :, : target.shape[2]]


@pytest.mark.parametrize("grid", [(1, 2, 2), (3, 6, 10), (5, 12, 20), (2, 14, 26)], ids=str)
@pytest.mark.parametrize("head_dim", [12, 24])
def test_the_recammaster_plan(head_dim: int, grid: tuple[int, int, int]) -> None:
    config = tiny_config(
        camera_conditioning="target", tokenizers=(2,), merger=None, attention_head_dim=head_dim
    )
    model = random_model(config)
    weights = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("tokenizers."):
            original = to_original(name)
            assert original is not None
            weights[original] = tensor
    # ReCamMaster has one patch embedding for both
    model.tokenizers["2"].load_state_dict(model.patch_embedding.state_dict())

    generator = torch.Generator().manual_seed(sum(grid))
    target, source = torch.randn(2, 2, config.in_channels, *grid, generator=generator).unbind()
    text = torch.randn(2, config.text_len, config.text_dim, generator=generator)
    camera = torch.randn(2, grid[0], 12, generator=generator)
    timestep = torch.tensor([1000.0, 412.25])
    expected = recammaster(
        weights, target, source, timestep, text, camera,
        heads=config.num_attention_heads, freq_dim=config.freq_dim, depth=config.num_layers,
    )  # fmt: skip
    plan = turn_plan(config, grid, (), merge="off")
    got = model([target, source], timestep, text, plan=plan, cameras=camera[:, None])
    assert got.shape == target.shape
    assert relative_error(got, expected) <= 1e-5


def test_the_source_matters() -> None:
    """The parity above would hold for a model that ignores its source; this one does not."""
    config = tiny_config(camera_conditioning="target", tokenizers=(2,), merger=None)
    model, plan = random_model(config), turn_plan(config, (3, 6, 10), (), merge="off")
    (target, source), timestep, text, camera = random_inputs(plan)
    first, second = (
        model([target, video], timestep, text, plan=plan, cameras=camera)
        for video in (source, -source)
    )
    assert relative_error(second, first) > 1e-2
