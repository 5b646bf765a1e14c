"""What a stream's cache holds, block after block: by policy, by slot, in bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mv2v_engine.config import StreamConfig, TransformerConfig
from mv2v_engine.errors import RequestError
from mv2v_engine.models.attention import SelfAttention
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.stream_cache import StreamCache
from mv2v_engine.testing import randomise, relative_error, tiny_config
from mv2v_engine.tokens.plan import turn_plan

GRID = (4, 6)  # 6 tokens a frame
SHAPE = tiny_config(camera_conditioning="none", tokenizers=(), merger=None, num_layers=2)
HEADS, DIM = SHAPE.num_attention_heads, SHAPE.attention_head_dim


def _cache(shape: TransformerConfig = SHAPE, **config: Any) -> StreamCache:
    return StreamCache(shape, GRID, StreamConfig(**config))


def _blocks(cache: StreamCache, count: int, *, seed: int = 0) -> Tensor:
    """Fill the first layer with so many blocks; the K of all frames [frames, P, N, D]."""
    generator, made = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        cache.begin_block()
        keys = torch.randn(1, cache.plan.length, HEADS, DIM, generator=generator)
        for layer in cache.layers:
            layer.put(keys, 2 * keys)
        made.append(keys)
    frames: Tensor = torch.cat(made, 1)[0].unflatten(0, (-1, cache.tokens_per_frame))
    return frames


def _held(cache: StreamCache) -> Tensor:
    """K of every slot of the first layer [slots, P, N, D]."""
    tensors, frames = cache.tensors(), (-1, cache.tokens_per_frame)
    held: Tensor = tensors["0.keys"][0].unflatten(0, frames)
    assert torch.equal(tensors["0.values"][0].unflatten(0, frames), 2 * held)
    return held


@pytest.mark.parametrize("policy", ["window", "sink", "all"])
def test_what_a_policy_holds(policy: Any) -> None:
    cache = _cache(policy=policy, window=7, sink_frames=2)
    frames = _blocks(cache, 5)
    kept = {"window": range(8, 15), "sink": [0, 1, *range(10, 15)], "all": range(15)}[policy]
    assert torch.equal(_held(cache), frames[list(kept)])


@pytest.mark.parametrize("is_adaptive", [False, True])
def test_frames_under_the_averages_are_lost_at_the_first_roll(is_adaptive: bool) -> None:
    cache = _cache(is_adaptive=is_adaptive)
    full = _blocks(cache, 4)
    assert torch.equal(_held(cache), full)
    frames = torch.cat([full, _blocks(cache, 1, seed=1)])
    held, dims = _held(cache), (0,) if is_adaptive else (0, 1)
    assert torch.equal(held[:3], frames[:3]) and torch.equal(held[5:], frames[8:])
    # video frames 5, 6, 7: neither 3 nor 4, whose slots are taken
    expected = frames[5:8].double().mean(dims).expand_as(held[3])
    for slot in (3, 4):
        torch.testing.assert_close(held[slot].double(), expected, atol=1e-6, rtol=0)


def _expected_averages(frames: Tensor, count: int, *, is_adaptive: bool) -> list[Tensor]:
    """Long and short of K and V [P, N, D] after so many blocks, in float64, V twice K."""
    long, short = list[Tensor](), list[Tensor]()
    for block in range(4, count):
        gone = frames.double()[3 * block - 7 : 3 * block - 4]
        mean = gone.mean(0) if is_adaptive else gone.mean((0, 1)).expand_as(gone[0])
        if not long:
            long, short = [mean, 2 * mean], [mean, 2 * mean]
            continue
        alpha = torch.full((6, 1, 1), 0.1).double()
        if is_adaptive:
            change = torch.stack([(mean - short[0])[:, n].norm(dim=-1) for n in range(HEADS)])
            share = change.mean(0) / (change.mean(0).max() + 1e-8)
            alpha = (0.01 + share * (0.5 - 0.01))[:, None, None]
        for place, new in enumerate((mean, 2 * mean)):
            long[place] = 0.01 * new + 0.99 * long[place]
            short[place] = alpha * new + (1 - alpha) * short[place]
    return [*long, *short]


@pytest.mark.parametrize("is_adaptive", [False, True])
def test_running_averages(is_adaptive: bool) -> None:
    cache = _cache(is_adaptive=is_adaptive)
    frames = _blocks(cache, 9)
    expected = _expected_averages(frames, 9, is_adaptive=is_adaptive)
    for average, oracle in zip(cache.layers[0].averages, expected, strict=True):
        assert average.dtype == torch.float32
        assert relative_error(average[0].expand_as(oracle), oracle) < 1e-6
    held = _held(cache)
    assert relative_error(held[3], expected[0]) < 1e-6
    assert relative_error(held[4], expected[2]) < 1e-6


def test_small_steps_are_lost_where_averages_are_rounded() -> None:
    """In bfloat16 one hundredth of a difference of a tenth is no step from one."""
    found = {}
    for averages in ("float32", "cache"):
        cache = _cache(averages=averages)
        for block in range(40):
            cache.begin_block()
            value = torch.full((1, cache.plan.length, HEADS, DIM), 1.0 if block < 6 else 1.1)
            for layer in cache.layers:
                layer.put(value.bfloat16(), value.bfloat16())
        assert cache.layers[0].stored[0].dtype == torch.bfloat16
        found[averages] = float(cache.layers[0].averages[0].mean())
    assert found["cache"] == 1.0
    assert 1.02 < found["float32"] < 1.04


@pytest.mark.parametrize("policy", ["memrope", "sink", "window"])
def test_positions_and_memory_are_bounded(policy: Any) -> None:
    cache = _cache(policy=policy)
    _blocks(cache, 20)
    before = cache.num_bytes
    _blocks(cache, 980)
    assert cache.num_blocks == 1000 and cache.num_frames == 12
    assert cache.num_bytes == before
    whole = _cache(policy="all", window=12)
    _blocks(whole, 4)
    device = torch.device("cpu")
    # slots 0 to 11, of which the new frames have the last three
    assert torch.equal(cache.rope(device), whole.rope(device))
    assert torch.equal(cache.new_rope(device), cache.rope(device)[:, 54:])


def _model(shape: TransformerConfig = SHAPE) -> MV2VTransformer:
    model = MV2VTransformer(shape).eval().requires_grad_(False)
    randomise(model)
    return model


def _forward(
    model: MV2VTransformer, cache: StreamCache, latents: Tensor, time: float, text: Tensor
) -> Tensor:
    result: Tensor = model([latents], torch.tensor([time]), text, plan=cache.plan, stream=cache)
    return result


def _inputs(frames: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, SHAPE.in_channels, frames, *GRID, generator=generator)
    return latents, torch.randn(1, SHAPE.text_len, SHAPE.text_dim, generator=generator)


def test_blocks_are_one_forward_under_a_block_causal_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (latents, text), cache = _model(), _inputs(9), _cache(policy="all", window=3)
    velocities = []
    for number, block in enumerate(latents.split(3, dim=2)):
        cache.begin_block()
        velocities.append(_forward(model, cache, block, 0.0 if number < 2 else 700.0, text))
    frame = torch.arange(9).repeat_interleave(6) // 3
    mask = frame[:, None] >= frame

    def masked(self: SelfAttention, q: Tensor, k: Tensor, v: Tensor, pack: object) -> Tensor:
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    monkeypatch.setattr(SelfAttention, "attend", masked)
    times = torch.tensor([[0.0] * 6 + [700.0] * 3])
    plan = turn_plan(SHAPE, (9, *GRID), (), source=False)
    whole = model([latents], times, text, plan=plan)
    assert relative_error(torch.cat(velocities, 2), whole) < 1e-5


def test_forwards_of_a_block_overwrite_its_frames_alone() -> None:
    model, (latents, text), cache = _model(), _inputs(15), _cache()
    *blocks, last = latents.split(3, dim=2)
    for block in blocks:
        cache.begin_block()
        _forward(model, cache, block, 0.0, text)
    cache.begin_block()
    velocity = _forward(model, cache, last, 900.0, text)
    before = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    _forward(model, cache, 2 * last, 300.0, text)
    after, new = cache.tensors(), cache.plan.length
    assert all(torch.equal(before[name][:, :-new], after[name][:, :-new]) for name in before)
    assert not torch.equal(before["1.keys"][:, -new:], after["1.keys"][:, -new:])
    # so that a step that is made again gives the same bits
    assert torch.equal(_forward(model, cache, last, 900.0, text), velocity)


@pytest.mark.parametrize("policy", ["memrope", "all"])
@pytest.mark.parametrize("count", [1, 4, 6])
def test_a_stored_cache_goes_on_bit_for_bit(count: int, policy: Any) -> None:
    model, (latents, text), cache = _model(), _inputs(24), _cache(policy=policy, window=9)
    blocks = latents.split(3, dim=2)
    for block in blocks[:count]:
        cache.begin_block()
        _forward(model, cache, block, 0.0, text)
    stored = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    other = _cache(policy=policy, window=9)
    other.load(stored, count, torch.device("cpu"))
    for block in blocks[count:]:
        results = []
        for each in (cache, other):
            each.begin_block()
            results.append(_forward(model, each, block, 500.0, text))
        assert torch.equal(*results)
    with pytest.raises(ValueError, match=r"block 0 must have shape \[B, \d+, 2, 12\], got"):
        _cache(policy=policy, window=12).load(stored, 9, torch.device("cpu"))


def test_a_prompt_is_read_once_and_cleared() -> None:
    model, (latents, text), cache = _model(), _inputs(3), _cache()
    cache.begin_block()
    first = _forward(model, cache, latents, 500.0, text)
    assert torch.equal(_forward(model, cache, latents, 500.0, -text), first)
    cache.clear_text()
    assert relative_error(_forward(model, cache, latents, 500.0, -text), first) > 1e-3


def test_what_a_forward_refuses() -> None:
    model, (latents, text), cache = _model(), _inputs(3), _cache()
    with pytest.raises(ValueError, match="no block yet; call begin_block"):
        _forward(model, cache, latents, 500.0, text)
    cache.begin_block()
    other = turn_plan(SHAPE, (2, *GRID), (), source=False)
    with pytest.raises(ValueError, match="takes the plan of its cache"):
        model([latents[:, :, :2]], torch.zeros(1), text, plan=other, stream=cache)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"window": 7}, "cannot hold the 5 that policy 'memrope' always keeps and 3 new ones"),
        ({"policy": "sink", "sink_frames": 10}, "cannot hold the 10"),
        ({"block_frames": 0}, "block_frames must be at least 1"),
        ({"long_alpha": 1.5}, "long_alpha must lie in 0..1"),
        ({"timesteps": (1000, 1000)}, "timesteps must fall"),
        ({"timesteps": ()}, "timesteps must fall"),
        ({"timesteps": (1000, 0)}, "stay above 0"),
        ({"policy": "fifo"}, "policy must be one of"),
    ],
)
def test_a_configuration_that_cannot_be(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        StreamConfig(**wrong)
