"""Echo-Memory's files: cameras as actions of frames, attention over frames, a causal state.

The reference is written from the paper and the keys of its files. A linear layer of a frame's
twelve numbers is added to the frame's tokens; attention over frames, place by place and without
positions, sees the sum, and its result is added to the tokens before; self-attention is Wan's, with
the context behind the target (before it where a state runs); after it, the state.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import conv3d, gelu, layer_norm, silu
from torch.utils.flop_counter import FlopCounterMode

from mv2v_engine import Engine
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.checkpoints import inspect_checkpoint, load_checkpoint
from mv2v_engine.engine.graphs import Graphs
from mv2v_engine.errors import CheckpointError, RequestError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.sample import Sample
from mv2v_engine.sampling.flow_match import initial_noise
from mv2v_engine.testing import cpu_flops, relative_error
from mv2v_engine.tokens.flops import flop_table
from mv2v_engine.tokens.plan import turn_plan
from tests.checkpoints.conftest import SMALL, original_shapes
from tests.checkpoints.redirector_files import _filled
from tests.conftest import VAE, _save_text, _save_vae, windowed
from tests.engine.graph_stand_in import StandIn
from tests.models.test_recammaster_parity import _attention, _linear, _rms, _rotate

State = dict[str, Tensor]
SHAPE = replace(SMALL, num_attention_heads=2, in_channels=16, out_channels=16, text_dim=16)
EPS, HEADS, FRAMES, SIZE = 1e-6, 2, 9, (32, 48)
STATES = (1,)


def state(*, attends: bool = True, states: tuple[int, ...] = ()) -> State:
    """`context_k1/epoch-0.safetensors`, or with states `block_wise_ssm_causal_v2`'s."""
    c = SHAPE.dim
    shapes = original_shapes(SHAPE, camera=False)

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    for n in range(SHAPE.num_layers):
        linear(f"blocks.{n}.action_mlp.proj", c, 12)
        if attends:
            name = f"blocks.{n}.self_attn_with_action"
            for p in "qkvo":
                linear(f"{name}.{p}", c, c)
            shapes[f"{name}.norm_q.weight"] = shapes[f"{name}.norm_k.weight"] = (c,)
        if n in states:
            name = f"blocks.{n}.block_wise_ssm"
            linear(f"{name}.in_proj", 2 * c, c)
            linear(f"{name}.out_proj", c, c)
            shapes[f"{name}.decay_logit"], shapes[f"{name}.residual_logit"] = (c,), (1,)
            shapes[f"{name}.norm.weight"] = shapes[f"{name}.norm.bias"] = (c,)
    weights = _filled(shapes, 3)
    # translations are centimetres: as small as a trained layer's
    return {k: v * 0.01 if "action_mlp.proj.weight" in k else v for k, v in weights.items()}


def table(times: list[int], rows: int, columns: int) -> Tensor:
    """complex128 [L, 1, D / 2] of frames at any times."""
    dim = SHAPE.dim // HEADS
    third = 2 * (dim // 6)

    def axis(size: int, at: Tensor) -> Tensor:
        angles = torch.outer(at.double(), 10000 ** -(torch.arange(0, size, 2).double() / size))
        return torch.polar(torch.ones_like(angles), angles)

    grid = (len(times), rows, columns)
    f = axis(dim - 2 * third, torch.tensor(times))[:, None, None].expand(*grid, -1)
    h = axis(third, torch.arange(rows))[None, :, None].expand(*grid, -1)
    w = axis(third, torch.arange(columns))[None, None].expand(*grid, -1)
    return torch.cat([f, h, w], -1).flatten(0, 2)[:, None]


def recurrent(w: State, name: str, x: Tensor) -> Tensor:
    """x [P, F, C] of all frames in order of time, place by place."""
    hidden = layer_norm(x, x.shape[-1:], w[f"{name}.norm.weight"], w[f"{name}.norm.bias"])
    update, gate = _linear(w, f"{name}.in_proj", hidden).chunk(2, -1)
    decay, out = w[f"{name}.decay_logit"].sigmoid(), []
    for n in range(x.shape[1]):  # the state in closed form
        powers = [decay ** (n - m) * (1 - decay) * update[:, m].tanh() for m in range(n + 1)]
        out.append(torch.stack(powers).sum(0))
    y = _linear(w, f"{name}.out_proj", torch.stack(out, 1) * gate.sigmoid())
    return x + (0.1 + 0.1 * w[f"{name}.residual_logit"].sigmoid()) * y


def reference(
    w: State, target: Tensor, context: Tensor, t: Tensor, text: Tensor, actions: Tensor
) -> Tensor:
    """Velocity [1, C, F, H, W]. actions: [F + 1, 12] of the target's frames and the context's."""
    video = torch.cat([target, context], 2)
    x = conv3d(video, w["patch_embedding.weight"], w["patch_embedding.bias"], stride=(1, 2, 2))
    frames, rows, columns = target.shape[2], *x.shape[3:]
    has_state = any("block_wise_ssm" in key for key in w)
    times = [*range(frames), -1 if has_state else frames]
    positions = table(times, rows, columns)
    x = x.flatten(2).transpose(1, 2)
    rates = 10000 ** -(torch.arange(SHAPE.freq_dim // 2).double() / (SHAPE.freq_dim // 2))
    angles = torch.outer(t.double(), rates)
    time = torch.cat([angles.cos(), angles.sin()], 1).float()
    time = _linear(w, "time_embedding.2", silu(_linear(w, "time_embedding.0", time)))
    modulation = _linear(w, "time_projection.1", silu(time)).unflatten(1, (6, -1))
    text = _linear(w, "text_embedding.0", text)
    text = _linear(w, "text_embedding.2", gelu(text, approximate="tanh"))
    places = rows * columns

    def by_place(y: Tensor) -> Tensor:
        return y.reshape(frames + 1, places, -1).transpose(0, 1)

    for n in range(SHAPE.num_layers):
        b, a, c = f"blocks.{n}", f"blocks.{n}.self_attn", f"blocks.{n}.cross_attn"
        own = _linear(w, f"{b}.action_mlp.proj", actions)
        moved = x + own.repeat_interleave(places, 0)[None]
        over = f"{b}.self_attn_with_action"
        if f"{over}.q.weight" in w:
            h = by_place(moved)
            q = _rms(_linear(w, f"{over}.q", h), w[f"{over}.norm_q.weight"])
            k = _rms(_linear(w, f"{over}.k", h), w[f"{over}.norm_k.weight"])
            made = _linear(w, f"{over}.o", _attention(q, k, _linear(w, f"{over}.v", h), HEADS))
            x = x + made.transpose(0, 1).reshape(x.shape)
        else:
            x = moved
        shift, scale, gate, shift_f, scale_f, gate_f = (w[f"{b}.modulation"] + modulation).chunk(
            6, 1
        )
        h = layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift
        q = _rotate(_rms(_linear(w, f"{a}.q", h), w[f"{a}.norm_q.weight"]), positions, HEADS)
        k = _rotate(_rms(_linear(w, f"{a}.k", h), w[f"{a}.norm_k.weight"]), positions, HEADS)
        x = x + gate * _linear(w, f"{a}.o", _attention(q, k, _linear(w, f"{a}.v", h), HEADS))
        if f"{b}.block_wise_ssm.decay_logit" in w:
            ordered = by_place(x).roll(1, 1)  # the context is first in time
            ordered = recurrent(w, f"{b}.block_wise_ssm", ordered).roll(-1, 1)
            x = ordered.transpose(0, 1).reshape(x.shape)
        h = layer_norm(x, x.shape[-1:], w[f"{b}.norm3.weight"], w[f"{b}.norm3.bias"], EPS)
        q = _rms(_linear(w, f"{c}.q", h), w[f"{c}.norm_q.weight"])
        k = _rms(_linear(w, f"{c}.k", text), w[f"{c}.norm_k.weight"])
        x = x + _linear(w, f"{c}.o", _attention(q, k, _linear(w, f"{c}.v", text), HEADS))
        h = layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale_f) + shift_f
        x = x + gate_f * _linear(
            w, f"{b}.ffn.2", gelu(_linear(w, f"{b}.ffn.0", h), approximate="tanh")
        )
    shift, scale = (w["head.modulation"] + time[:, None]).chunk(2, 1)
    x = layer_norm(x[:, : frames * places], x.shape[-1:], eps=EPS) * (1 + scale) + shift
    patches = _linear(w, "head.head", x).unflatten(1, (frames, rows, columns))
    patches = patches.unflatten(-1, (2, 2, -1))
    return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def turning(angles: list[float]) -> Tensor:
    """Twelve numbers of cameras that turn about their place, to the left in degrees."""
    rows = []
    for angle in map(math.radians, angles):
        cos, sin = math.cos(angle), math.sin(angle)
        rows.append([0.0, 0, 0, cos, -sin, 0, sin, cos, 0, 0, 0, 1])
    return torch.tensor(rows)


@pytest.fixture
def components(tmp_path: Path) -> Path:
    root = tmp_path / "wan"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _save_vae(root / "vae", VAE)
    _save_text(root, 16)
    return root


def saved(folder: Path, weights: State, row: str = "context_k1") -> Path:
    path = folder / row / "epoch-0.safetensors"
    path.parent.mkdir(parents=True)
    save_file(weights, str(path))
    return path


def small(path: Path, components: Path) -> Engine:
    return windowed(Engine.from_pretrained(path, device="cpu", components=components))


@pytest.mark.parametrize("states", [(), STATES])
def test_a_turn_is_that_of_the_published_pipeline(
    tmp_path: Path, components: Path, states: tuple[int, ...]
) -> None:
    weights = state(states=states)
    row = "block_wise_ssm_causal_v2" if states else "context_k1"
    engine = small(saved(tmp_path, weights, row), components)
    sampling = engine.sampling
    assert (sampling.flow_shift, sampling.timesteps) == (15, "bfloat16")
    assert engine.checkpoint.sampling.size == SIZE and engine.transformer.config.tokenizers == (2,)
    frames = torch.randint(0, 255, (FRAMES, *SIZE, 3), dtype=torch.uint8)
    turn = engine.session(frames).render("pan:-30", prompt="a ball", num_inference_steps=3)
    context = engine.vae.encode(frames[:1])[None]
    texts = engine.text_embeddings(["a ball", sampling.negative_prompt])
    # the first, middle and last of nine frames; a negative pan looks left
    actions = turning([0, 15, 30, 0])
    latents = initial_noise((1, 16, 3, 4, 6), 0)
    levels = torch.linspace(1, 0, 4)
    levels = 15 * levels / (1 + 14 * levels)
    for level, after in pairwise(levels):
        t = (1000 * level)[None].bfloat16().float()
        own, other = (reference(weights, latents, context, t, text, actions) for text in texts)
        latents = latents + (after - level) * (other + 5 * (own - other))
    assert relative_error(turn.latents[None], latents) <= 1e-5
    engine.graphs = Graphs("on", 1 << 30, StandIn(), None)
    again = engine.session(frames).render("pan:-30", prompt="a ball", num_inference_steps=3)
    assert torch.equal(again.latents, turn.latents)


@torch.no_grad()
@pytest.mark.parametrize("attends", [True, False])
def test_samples_share_a_pack(tmp_path: Path, attends: bool) -> None:
    path = saved(tmp_path, state(attends=attends, states=STATES), "x")
    model = load_checkpoint(path).transformer
    assert model.config.action_attention == attends
    samples = []
    for seed, grid in enumerate([(3, 4, 6), (2, 6, 4)]):
        plan = turn_plan(model.config, grid, (), merge="off")
        assert [s.tau for s in plan.segments] == [0, -1] and plan.segments[1].grid[0] == 1
        generator = torch.Generator().manual_seed(seed)
        samples.append(
            Sample(
                latents=[torch.randn(1, 16, *s.grid, generator=generator) for s in plan.segments],
                timestep=torch.tensor([300.0]),
                encoder_hidden_states=torch.randn(1, 4 + seed, 16, generator=generator),
                plan=plan,
                cameras=torch.stack(
                    [
                        named_trajectory(n, 4 * grid[0] - 3, SIZE).vectors(12)
                        for n in ("arc_left", "pan_right")
                    ]
                )[None],
            )
        )
    for sample, velocity in zip(samples, model.forward_samples(samples), strict=True):
        alone = model.forward_samples([sample])[0]
        torch.testing.assert_close(velocity, alone, rtol=1e-4, atol=1e-5)
    sample = samples[0]
    with FlopCounterMode(display=False, custom_mapping=cpu_flops()) as counter:
        text = torch.zeros(1, model.config.text_len, 16)
        model.forward_samples([replace(sample, encoder_hidden_states=text)])
    assert counter.get_total_flops() == sum(flop_table(sample.plan).values())


def test_what_is_told_and_refused(tmp_path: Path) -> None:
    found = inspect_checkpoint(saved(tmp_path, state(states=STATES), "block_wise_ssm_causal_v2"))
    assert found.format == "echo_memory" and found.problem is None
    assert "actions in 3 blocks, attention over frames in 3, a state-space memory in 1" in (
        found.reason
    )
    rows = ("context_k20", "context_k5", "framepack_len_r8")
    for row in rows:
        with pytest.raises(CheckpointError, match=rf"by its name, Echo-Memory's {row}"):
            inspect_checkpoint(saved(tmp_path, state(), row))
    others: dict[str, str] = {
        "spatial_memory_module.spatial_to_tokens": "spatial memory",
        "blocks.0.videossm_hybrid.gate": "hybrid state-space",
        "blocks.0.block_wise_ssm.gate": "state-space memory of the first version",
    }
    for number, (key, what) in enumerate(others.items()):
        weights = state() | {key: torch.ones(1)}
        with pytest.raises(CheckpointError, match=rf"is a {what}.* \(Echo-Memory\)"):
            inspect_checkpoint(saved(tmp_path, weights, f"row{number}"))
    model: MV2VTransformer = load_checkpoint(tmp_path / "block_wise_ssm_causal_v2").transformer
    asked: list[tuple[dict[str, Any], str]] = [
        (
            {"conditioning": "static"},
            'operations over all frames of a place .*takes conditioning="j',
        ),
        ({"tokenizers": (4,)}, "memory asks for tokenizer 1x4x4; this model has"),
    ]
    for changes, message in asked:
        with pytest.raises(RequestError, match=message):
            turn_plan(
                model.config, **({"grid": (3, 4, 6), "tokenizers": (), "merge": "off"} | changes)
            )
    assert json.dumps(list(model.config.state_space)) == "[1]"
