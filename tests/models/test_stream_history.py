"""A stream's history: tokens of what left the window, encoded part by part, in bounded memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mv2v_engine.config import HistoryConfig, StreamConfig, TransformerConfig
from mv2v_engine.errors import RequestError
from mv2v_engine.models.block import Block
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.history import HistoryEncoder
from mv2v_engine.models.rope import axis_dims
from mv2v_engine.models.stream_cache import StreamCache
from mv2v_engine.models.stream_history import StreamHistory, check_history
from mv2v_engine.testing import cpu_flops, randomise, relative_error, tiny_config

GRID = (8, 12)  # 24 tokens a frame; 6 of 2x2xt
ENCODERS = HistoryConfig(rates=("2x2x2", "2x2x1"), channels=(4, 4, 8, 8), heads=2)
SHAPE = tiny_config(
    camera_conditioning="none", tokenizers=(), merger=None, num_layers=2, history=ENCODERS
)
# block frames, window, sink, slots, rate: blocks shorter than a token's frames, as long, and longer
CONFIGS: list[dict[str, Any]] = [
    {"block_frames": 1, "window": 5, "sink_frames": 1, "history_slots": 1},
    {"block_frames": 2, "window": 6, "sink_frames": 0, "history_slots": 1},
    {"block_frames": 3, "window": 9, "sink_frames": 1, "history_slots": 1},
    {"block_frames": 1, "window": 4, "sink_frames": 2, "history_slots": 1, "history_rate": "2x2x1"},
]


def _config(**fields: Any) -> StreamConfig:
    return StreamConfig(policy="history", **fields)


def _model(shape: TransformerConfig = SHAPE) -> MV2VTransformer:
    model = MV2VTransformer(shape).eval().requires_grad_(False)
    randomise(model)
    return model


class Run:
    """Blocks of clean latents, one forward each."""

    def __init__(self, model: MV2VTransformer, config: StreamConfig) -> None:
        self.model, self.cache = model, StreamCache(model.config, GRID, config)
        self.latents = list[Tensor]()
        self.generator = torch.Generator().manual_seed(3)
        self.text = torch.randn(1, SHAPE.text_len, SHAPE.text_dim, generator=self.generator)

    def block(self, latents: Tensor | None = None, time: float = 0.0) -> Tensor:
        if latents is None:
            size = (1, SHAPE.in_channels, self.cache.config.block_frames, *GRID)
            latents = torch.randn(size, generator=self.generator)
        self.latents.append(latents)
        self.model.begin_block(self.cache)
        return self.forward(latents, time)

    def forward(self, latents: Tensor, time: float) -> Tensor:
        times, plan = torch.tensor([time]), self.cache.plan
        found: Tensor = self.model([latents], times, self.text, plan=plan, stream=self.cache)
        return found


@pytest.mark.parametrize("fields", CONFIGS, ids=lambda fields: str(fields["block_frames"]))
def test_what_left_the_window_is_in_the_history(fields: dict[str, Any]) -> None:
    """In the first block of the transformer, whose keys follow from tokens alone, the history holds
    the newest tokens of all frames behind the sink as if they were encoded at once, and the last
    frame that is no longer whole is among them."""
    run = Run(_model(), config := _config(**fields))
    history, encoder = run.cache.history, None
    assert history is not None
    lengths = []
    for number in range(1, 16):
        # what a block's steps leave is overwritten
        run.block(time=700.0)
        run.forward(run.latents[-1], 0.0)
        lengths.append(run.cache.history_length)
        gone = max(0, number * config.block_frames - config.whole_frames)
        made = -(-gone // history.frames)
        assert run.cache.history_length == min(6 * made, history.most_tokens)
        if not made:
            continue
        encoder = cast(HistoryEncoder, run.model.history_encoders[history.rate])
        video = torch.cat(run.latents, 2)[:, :, config.sink_frames :]
        whole = encoder(video[:, :, : made * history.frames], run.model.patch_embedding).tokens
        expected = _first_keys(run.model, whole)[:, -history.most_tokens :]
        layer = run.cache.layers[0]
        held = layer.held()[0]
        assert relative_error(held[:, : run.cache.history_length], expected) < 1e-5
        # the whole frames behind it: the sink, then the newest
        assert held.shape[1] == run.cache.history_length + 24 * run.cache.num_frames
    assert lengths[-1] == history.most_tokens and run.cache.is_full


def _first_keys(model: MV2VTransformer, tokens: Tensor) -> Tensor:
    """Unrotated K of tokens in the first transformer block at timestep 0 [B, L, N, D]."""
    block = cast(Block, model.blocks[0])
    _, temb_6 = model.condition_embedder.time(torch.zeros(1))
    shift, scale = (block.scale_shift_table + temb_6)[:, :2].unbind(1)
    normed = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=block.eps)
    keys: Tensor = block.attn1.keys_values(normed * (1 + scale) + shift, None)[0]
    return keys


def test_new_tokens_see_the_frames_that_they_stand_for() -> None:
    """In the second transformer block a token knows what is whole, and what the prompt is not."""
    model, config = _model(), _config(**CONFIGS[0])
    runs = [Run(model, config) for _ in range(3)]
    for number in range(5):
        for index, run in enumerate(runs):
            latents = torch.full((1, SHAPE.in_channels, 1, *GRID), 0.1 * number)
            if index == 1 and number == 3:  # still whole when the first token is made
                latents = latents + 1
            run.text = runs[0].text * (-1 if index == 2 and number == 4 else 1)
            if index == 2 and number == 4:
                run.cache.clear_text()
            run.block(latents)
    first, seen, told = (run.cache.layers[1].held()[0][:, :6] for run in runs)
    assert relative_error(seen, first) > 1e-3
    assert torch.equal(told, first)


def test_positions_are_means_over_frames_and_cells() -> None:
    cache = Run(_model(), _config(**CONFIGS[0])).cache
    history = cache.history
    assert history is not None
    cache.num_blocks, cache.num_frames = 99, cache.capacity
    table = cache.rope(torch.device("cpu"))[0]
    assert len(table) == cache.num_tokens == history.most_tokens + 4 * 24
    time, space, _ = axis_dims(12)
    # the newest token of the history covers the two ids before the recent frames, which begin at
    # 1: -1 and 0; rows 2, 3 and columns 4, 5 for the last of its frame's 2x3 tokens
    angle = torch.tensor([[-1.0, 0.0], [2.0, 3.0], [4.0, 5.0]], dtype=torch.float64)
    wanted = []
    for cells, dim in zip(angle, (time, space, space), strict=True):
        rates = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        wanted.append((cells[:, None] * rates).cos().mean(0))
    got = table[history.most_tokens - 1, :6].double()
    torch.testing.assert_close(got, torch.cat(wanted), rtol=0, atol=1e-6)
    # whole frames have their slots' places, the history's next tokens come behind it
    plain = StreamCache(SHAPE, GRID, StreamConfig(block_frames=1, policy="window", window=4))
    plain.num_frames = 4
    assert torch.equal(table[history.most_tokens :], plain.rope(torch.device("cpu"))[0])
    new = history.new_table(cache.plan, 1, torch.device("cpu"))
    assert history.segment.tau == 1 - 2 * history.most_tokens // 6
    rates = 10000.0 ** (-torch.arange(0, time, 2, dtype=torch.float64) / time)
    mean = (torch.tensor([[1.0], [2.0]], dtype=torch.float64) * rates).cos().mean(0)
    torch.testing.assert_close(new[-1, : time // 2].double(), mean, rtol=0, atol=1e-6)


def test_memory_and_cost_are_bounded() -> None:
    run = Run(_model(), _config(**CONFIGS[0]))
    sizes, flops = list[int](), list[int]()
    for _ in range(60):
        counter = FlopCounterMode(display=False, custom_mapping=cpu_flops())
        with counter:
            run.block()
        sizes.append(run.cache.num_bytes)
        flops.append(counter.get_total_flops())
    # the encoder's past is there from the first token on
    assert len(set(sizes[4:])) == 1
    # every second block brings in a token's two frames
    assert flops[30:32] * 14 == flops[32:]
    assert flops[30] != flops[31]
    told = run.cache.describe()
    assert told["tokens_seen"] == 24 * 5 and told["history"]["tokens"] == 24
    assert told["history"]["latent_frames"] == 8
    assert abs(flops[31] - flops[30]) == told["history"]["flops"]
    # the text's k and v are made once a prompt, the plan counts them in every forward
    text = 4 * SHAPE.text_len * SHAPE.dim**2 * SHAPE.num_layers
    text += 2 * SHAPE.text_len * (SHAPE.text_dim * SHAPE.dim + SHAPE.dim**2)
    assert min(flops[30:32]) == told["forward_flops"] - text


@pytest.mark.parametrize("fields", CONFIGS, ids=lambda fields: str(fields["block_frames"]))
@pytest.mark.parametrize("count", [1, 4, 5, 6, 12])
def test_a_stored_cache_goes_on_bit_for_bit(fields: dict[str, Any], count: int) -> None:
    """Before the history begins, while it grows, and once it is full."""
    run = Run(_model(), config := _config(**fields))
    for _ in range(count):
        run.block()
    stored = {name: tensor.clone() for name, tensor in run.cache.tensors().items()}
    other = Run(run.model, config)
    other.cache.load(stored, count, torch.device("cpu"))
    for _ in range(4):
        velocity = run.block(time=500.0)
        assert torch.equal(other.block(run.latents[-1], time=500.0), velocity)
    stored["history.latents"] = stored["history.latents"][:, :1]
    with pytest.raises(ValueError, match=r"history's latents must have shape \[B, 4, \d, 8, 12\]"):
        StreamCache(SHAPE, GRID, config).load(stored, count, torch.device("cpu"))


@pytest.mark.parametrize(
    ("shape", "fields", "words"),
    [
        ({"history": None}, {}, "takes a history encoder, and a has none; .*training.causal"),
        ({}, {"history_rate": "4x4x2"}, "of rate 4x4x2, and a has .* 2x2x2 and 2x2x1 alone"),
        (
            {"history": replace(ENCODERS, cross_attention=(1,))},
            {},
            "blocks 1 of a attend to what history tokens were made of",
        ),
    ],
)
def test_weights_that_cannot_have_a_history(
    shape: dict[str, Any], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        check_history(replace(SHAPE, **shape), "a", _config(**fields))


@pytest.mark.parametrize(
    ("grid", "fields", "words"),
    [
        ((2, 12), {}, "covers 4x4 latent cells, the video has 2x12; use a finer rate"),
        (
            GRID,
            {"window": 4, "sink_frames": 1, "history_slots": 1, "block_frames": 2},
            "keeps 3 whole, and tokens of 2 frames beside a sink of 1 and blocks of 2 need 4",
        ),
        (
            (4, 4),
            {"block_frames": 9, "window": 20, "sink_frames": 0, "history_slots": 1},
            "have room for the tokens of 4 times 2 latent frames, and a block can bring those of 5",
        ),
    ],
)
def test_grids_and_windows_that_cannot_have_one(
    grid: tuple[int, int], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        StreamHistory(SHAPE, grid, _config(**fields))


def test_only_the_model_can_make_room() -> None:
    run = Run(_model(), _config(**CONFIGS[0]))
    for _ in range(4):
        run.block()
    with pytest.raises(ValueError, match="let the model make room"):
        run.cache.begin_block()
    assert run.cache.num_blocks == 4
    run.block()


def test_settings_that_cannot_be() -> None:
    with pytest.raises(RequestError, match="cannot hold the 5 that policy 'history' always keeps"):
        _config(window=7)
    with pytest.raises(RequestError, match="rate of history tokens is ROWSxCOLUMNSxFRAMES"):
        _config(history_rate="3x3x3")
    with pytest.raises(RequestError, match="history_slots must be at least 1"):
        _config(history_slots=0)
