"""TinyHistory's encoder against its description written out in float64, and part by part."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, conv3d, layer_norm, linear, pad, silu
from torch.utils.flop_counter import FlopCounterMode

from mv2v_engine.config import HistoryConfig, TransformerConfig
from mv2v_engine.errors import RequestError
from mv2v_engine.models.attention import HistoryAttention
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.history import HistoryEncoder, HistoryState, HistoryTokens
from mv2v_engine.models.kept import ConditioningCache
from mv2v_engine.models.sample import Sample
from mv2v_engine.testing import assert_within_budget, cpu_flops, randomise, tiny_config
from mv2v_engine.tokens.encoders import history_flops
from mv2v_engine.tokens.flops import flop_table, kept_flop_table
from mv2v_engine.tokens.plan import Segment, TokenPlan, history_segments
from mv2v_engine.tokens.tokenizers import init_from_base

CHANNELS, HEADS = (6, 8, 10, 16), 4


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


# rates, and latents whose sides and frames they do not divide
CASES = [("4x4x2", (5, 19, 9)), ("2x2x2", (7, 5, 11)), ("2x2x1", (3, 9, 4)), ("2x2x4", (9, 4, 7))]


def shape(rate: str, **changes: Any) -> TransformerConfig:
    history = HistoryConfig(rates=(rate,), channels=CHANNELS, heads=HEADS, **changes)
    return tiny_config(history=history)


def encoder(rate: str, **changes: Any) -> tuple[HistoryEncoder, nn.Conv3d]:
    """With random weights, and a patch embedding of two more channels than latents have."""
    made, base = (
        HistoryEncoder(shape(rate, **changes), rate),
        nn.Conv3d(6, 24, (1, 2, 2), (1, 2, 2)),
    )
    randomise(made)
    randomise(base, seed=1)
    return made, base


def explicit(
    made: HistoryEncoder,
    base: nn.Conv3d,
    latents: Tensor,
    dtype: torch.dtype,
    by_taps: bool = True,
) -> Tensor:
    """The tokens [L, D] of one history, tap by tap, frame by frame.

    by_taps: else the library convolves, as the budget is drawn.
    """
    weights = {name: tensor.to(dtype) for name, tensor in made.state_dict().items()}
    rows, frames = int(made.rate[0]), int(made.rate[-1])
    patch = 2 * rows
    x = latents[0].to(dtype)
    while x.shape[1] % frames:
        x = torch.cat([x, x[:, -1:]], 1)
    x = x[:, :, : x.shape[2] // patch * patch, : x.shape[3] // patch * patch]
    low = []
    for t in range(0, x.shape[1], frames):
        for r in range(0, x.shape[2], patch):
            for c in range(0, x.shape[3], patch):
                cell = x[:, t : t + frames, r : r + patch, c : c + patch].mean(1)
                small = cell.reshape(-1, 2, rows, 2, rows).mean((2, 4))
                kernel = base.weight[:, :4, 0].to(dtype)
                assert base.bias is not None
                low.append(torch.einsum("dcyx,cyx->d", kernel, small) + base.bias.to(dtype))
    times, spaces = int(math.log2(frames)), int(math.log2(patch))
    for layer in range(4):
        step = 2 if layer < times else 1
        side = 2 if times <= layer < times + spaces else 1
        weight, bias = weights[f"convs.{layer}.weight"], weights[f"convs.{layer}.bias"]
        if not by_taps:
            padded = pad(x, (1, 1, 1, 1, 3 - step, 0))
            x = silu(conv3d(padded[None], weight, bias, stride=(step, side, side))[0])
            continue
        height, width = (size // side for size in x.shape[2:])
        out = x.new_zeros(len(bias), x.shape[1] // step, height, width)
        out += bias[:, None, None, None]
        for t in range(out.shape[1]):
            for k in range(3):
                # the last input of an output is the last of its own
                frame = t * step + step - 3 + k
                if frame < 0:
                    continue
                for dy in range(3):
                    for dx in range(3):
                        for row in range(height):
                            for column in range(width):
                                y, z = row * side + dy - 1, column * side + dx - 1
                                if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]:
                                    tap = weight[:, :, k, dy, dx]
                                    out[:, t, row, column] += tap @ x[:, frame, y, z]
        x = silu(out)
    high = []
    for t in range(x.shape[1]):
        tokens = x[:, t].flatten(1).T
        normed = layer_norm(
            tokens, (CHANNELS[-1],), weights["norm.weight"], weights["norm.bias"], 1e-6
        )

        def of(name: str, normed: Tensor = normed) -> Tensor:
            return linear(
                normed, weights[f"attention.{name}.weight"], weights[f"attention.{name}.bias"]
            )

        def heads(value: Tensor) -> Tensor:
            return value.reshape(len(value), HEADS, -1).transpose(0, 1)

        def rms(value: Tensor, name: str) -> Tensor:
            scale = (value.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
            return value * scale * weights[f"attention.{name}.weight"]

        q, k = heads(rms(of("to_q"), "norm_q")), heads(rms(of("to_k"), "norm_k"))
        shares = (q @ k.mT / math.sqrt(CHANNELS[-1] / HEADS)).softmax(-1)
        mixed = (shares @ heads(of("to_v"))).transpose(0, 1).flatten(1)
        out = linear(
            mixed, weights["attention.to_out.0.weight"], weights["attention.to_out.0.bias"]
        )
        high.append(linear(tokens + out, weights["proj.weight"], weights["proj.bias"]))
    return torch.stack(low) + torch.cat(high)


@pytest.mark.parametrize(("rate", "grid"), CASES)
@torch.no_grad()
def test_tokens_are_the_description_s(rate: str, grid: tuple[int, int, int]) -> None:
    made, base = encoder(rate)
    latents = torch.randn(1, 4, *grid)
    found = made(latents, base).tokens[0]
    oracle = explicit(made, base, latents, torch.float64)
    assert_within_budget(found, oracle, explicit(made, base, latents, torch.float32, False))
    made, base = made.double(), base.double()
    # attention's norms are of float32 in any dtype
    torch.testing.assert_close(made(latents.double(), base).tokens[0], oracle, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rate", "grid"), CASES)
@torch.no_grad()
def test_parts_encoded_alone_are_the_whole(rate: str, grid: tuple[int, int, int]) -> None:
    """Whatever the lengths of the parts; and a longer history than is encoded at once."""
    made, base = (module.double() for module in encoder(rate))
    latents = torch.randn(2, 4, 67, *grid[1:], dtype=torch.float64)
    whole = made(latents, base)
    parts, state, last, first = [], HistoryState(), None, 0
    for count in (1, 5, 4, 3, 20, 34):
        part, last, state = made.append(latents[:, :, first : first + count], base, state)
        first += count
        parts.append(part)
        seen = made(latents[:, :, :first], base)
        ends = [*parts, last] if last is not None else parts
        for name in ("tokens", "hidden"):
            joined = torch.cat([getattr(end, name) for end in ends], 1)
            torch.testing.assert_close(joined, getattr(seen, name), rtol=1e-6, atol=1e-6)
    assert whole.tokens.shape[1] == seen.tokens.shape[1] and torch.equal(whole.tokens, seen.tokens)
    with torch.enable_grad():
        at_once = made(latents, base).tokens
    torch.testing.assert_close(whole.tokens, at_once.detach(), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_history_that_grows_is_encoded_from_where_it_was() -> None:
    """Videos of three frames at two a token: what is pending is made anew, the rest is kept."""
    made, base = (module.double() for module in encoder("2x2x2"))
    videos = {id: torch.randn(4, 3, 9, 13, dtype=torch.float64) for id in "abcd"}
    history, oracle = HistoryTokens(made, base, with_hidden=True), copy.deepcopy(made)
    given: list[str] = []
    append = made.append
    made.append = lambda latents, *rest: (  # type: ignore[method-assign]
        given.append(next(i for i, v in videos.items() if torch.equal(v, latents[0]))),
        append(latents, *rest),
    )[1]
    for ids, new in (("a", "a"), ("abc", "bc"), ("abc", ""), ("abd", "d"), ("bd", "bd")):
        given.clear()
        tokens = history.of([(id, videos[id]) for id in ids])
        assert "".join(given) == new
        whole = torch.cat([videos[id] for id in ids], 1)[None]
        expected = torch.cat(list(oracle(whole, base)), 2)
        torch.testing.assert_close(tokens, expected.float(), rtol=1e-5, atol=1e-6)
    history.forget("d")
    history.forget("a")
    given.clear()
    history.of([("b", videos["b"]), ("d", videos["d"])])
    assert given[0] == "d" and len(given) == 1


@torch.no_grad()
def test_it_begins_as_the_low_resolution_branch_which_is_the_repeated_kernel() -> None:
    base = nn.Conv3d(4, 24, (1, 2, 2), stride=(1, 2, 2))
    latents = torch.randn(1, 4, 6, 12, 16)
    both, low, kernel = (
        HistoryEncoder(shape("2x2x2", branches=branches), "2x2x2")
        for branches in ("both", "lr", "kernel")
    )
    assert not list(low.parameters())
    kernel.begin_as(base)
    expected = conv3d(avg_pool3d(latents, 2), base.weight, base.bias, stride=(1, 2, 2))
    for made in (both, low, kernel):
        tokens = made(latents, base).tokens
        torch.testing.assert_close(tokens, expected.flatten(2).mT, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("branches", ["both", "hr", "lr", "kernel"])
@pytest.mark.parametrize(("rate", "grid"), CASES)
@torch.no_grad()
def test_it_costs_what_is_said(rate: str, grid: tuple[int, int, int], branches: str) -> None:
    made, base = encoder(rate, branches=branches)
    with FlopCounterMode(display=False, custom_mapping=cpu_flops()) as counter:
        made(torch.randn(1, 4, *grid), base)
    size = (grid, made.patch, made.frames)
    assert counter.get_total_flops() == history_flops(made.config, 4, 24, *size)


def test_what_it_cannot_encode() -> None:
    made, base = encoder("4x4x2")
    with pytest.raises(RequestError, match=r"latents of 16 channels.* takes 4; .* VAE"):
        made(torch.zeros(1, 16, 4, 16, 16), base)
    with pytest.raises(RequestError, match="8x8 cells"):
        made(torch.zeros(1, 4, 4, 7, 16), base)
    with pytest.raises(RequestError, match="4x4x2"):
        HistoryConfig(rates=("4x2x2",))
    with pytest.raises(RequestError, match="powers of two"):
        HistoryConfig(rates=("8x8x2",))


@pytest.mark.parametrize("conditioning", ["joint", "static"])
@pytest.mark.parametrize("camera", ["own", "none"])
@torch.no_grad()
def test_at_rate_one_it_is_a_plain_memory_video(conditioning: Any, camera: Any) -> None:
    """The plan, its positions and its cameras are those of 1x2x2 tokens at the same ids."""
    history = HistoryConfig(rates=("1x1x1",), channels=CHANNELS, heads=HEADS)
    config = tiny_config(camera_conditioning=camera, history=history)
    model = MV2VTransformer(config).double().eval()
    randomise(model)
    for name, parameter in model.history_encoders.named_parameters():
        if ".proj." in name:
            parameter.zero_()
    init_from_base(model.tokenizers["2"], model.patch_embedding)  # type: ignore[arg-type]
    grid, track = (7, 4, 6), 2 if camera == "own" else None
    first = Segment(role="target", grid=(3, 4, 6), camera=None if track is None else 0)
    plans = [
        TokenPlan(segments=(first, *past), shape=config, merge="off", conditioning=conditioning)
        for past in (
            tuple(history_segments(config, grid, "1x1x1")),
            (Segment(role="memory", grid=grid, tau=-7, camera=track),),
        )
    ]
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    latents = [draw(1, 4, *segment.grid) for segment in plans[0].segments]
    given = (torch.tensor([400.0]), draw(1, 6, 10))
    cameras = None if track is None else draw(1, 3, 7, 12)
    one, other = (model(latents, *given, plan=plan, cameras=cameras) for plan in plans)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    if conditioning == "static":
        kept = ConditioningCache(plans[0])
        model(latents, *given, plan=plans[0], cameras=cameras, kept=kept)
        later = model(latents[:1], *given, plan=plans[0], kept=kept)
        torch.testing.assert_close(later, one, rtol=1e-6, atol=1e-6)


def attending(blocks: tuple[int, ...]) -> tuple[MV2VTransformer, TokenPlan, list[Tensor]]:
    """A model of which these blocks attend to a history's hidden states, a plan, and latents."""
    history = HistoryConfig(
        rates=("2x2x2",), channels=CHANNELS, heads=HEADS, cross_attention=blocks
    )
    config = tiny_config(camera_conditioning="none", history=history)
    model = MV2VTransformer(config).eval()
    randomise(model)
    past = tuple(history_segments(config, (5, 8, 12), "2x2x2"))
    target = Segment(role="target", grid=(2, 8, 12))
    plan = TokenPlan(segments=(target, *past), shape=config, merge="off")
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(1, 4, *s.grid, generator=generator) for s in plan.segments]
    return model, plan, latents


@torch.no_grad()
def test_attention_to_hidden_states_is_the_description_s_and_zero_at_the_start() -> None:
    made = HistoryAttention(24, 2, 1e-6, 16)
    x, hidden = torch.randn(1, 5, 24), torch.randn(1, 7, 16)
    assert not made(x, hidden).any()
    randomise(made)

    def written_out(dtype: torch.dtype) -> Tensor:
        w = {name: tensor.to(dtype) for name, tensor in made.state_dict().items()}

        def of(name: str, value: Tensor) -> Tensor:
            return value.to(dtype) @ w[f"{name}.weight"].T + w[f"{name}.bias"]

        def normed(name: str, value: Tensor) -> Tensor:
            scale = (value.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
            return (value * scale * w[f"{name}.weight"]).reshape(-1, 2, 12).transpose(0, 1)

        q, k = normed("norm_q", of("to_q", x[0])), normed("norm_k", of("to_k", hidden[0]))
        v = of("to_v", hidden[0]).reshape(-1, 2, 12).transpose(0, 1)
        mixed = (q @ k.mT / math.sqrt(12)).softmax(-1) @ v
        return of("to_out.0", mixed.transpose(0, 1).flatten(1))

    oracle = written_out(torch.float64)
    assert_within_budget(made(x, hidden)[0], oracle, written_out(torch.float32))


@torch.no_grad()
def test_blocks_attend_to_hidden_states() -> None:
    """Alone, over kept K and V, and packed with a sample that has no history."""
    model, plan, latents = attending((0, 2))
    text, timestep = torch.randn(1, 6, 10), torch.tensor([400.0])
    whole = model(latents, timestep, text, plan=plan)
    without, plain_plan, _ = attending(())
    without.load_state_dict(model.state_dict(), strict=False)
    plain = without(latents, timestep, text, plan=plain_plan)
    assert not torch.allclose(whole, plain, atol=1e-3)

    static = replace(plan, conditioning="static")
    kept = ConditioningCache(static)
    first = model(latents, timestep, text, plan=static, kept=kept)
    later = model(latents[:1], timestep, text, plan=static, kept=kept)
    torch.testing.assert_close(later, first, rtol=1e-4, atol=1e-5)

    alone = replace(plan, segments=plan.segments[:1])
    samples = [
        Sample(latents=given, timestep=timestep, encoder_hidden_states=text, plan=of)
        for given, of in ((latents, plan), (latents[:1], alone))
    ]
    both = model.forward_samples(samples)
    torch.testing.assert_close(both[0], whole, rtol=1e-4, atol=1e-5)
    own = model(latents[:1], timestep, text, plan=alone)
    torch.testing.assert_close(both[1], own, rtol=1e-4, atol=1e-5)

    for name, parameter in model.named_parameters():
        if "attn_history.to_out" in name:
            parameter.zero_()
    torch.testing.assert_close(model(latents, timestep, text, plan=plan), plain)


@pytest.mark.parametrize("conditioning", ["joint", "static"])
@torch.no_grad()
def test_a_forward_with_a_history_costs_what_the_plan_says(conditioning: Any) -> None:
    model, plan, latents = attending((1,))
    plan = replace(plan, conditioning=conditioning)
    kept = ConditioningCache(plan) if conditioning == "static" else None
    given = (torch.tensor([400.0]), torch.randn(1, 6, 10))
    tables = [flop_table, kept_flop_table] if kept is not None else [flop_table]
    for table in tables:
        with FlopCounterMode(display=False, custom_mapping=cpu_flops()) as counter:
            model(latents, *given, plan=plan, kept=kept)
        assert sum(table(plan).values()) == counter.get_total_flops()
