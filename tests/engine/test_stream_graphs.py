"""Captured steps of a stream, on a CPU that acts CUDA's graphs out: replay is eager, to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine
from mv2v_engine.config import WAN_1_3B, StreamConfig
from mv2v_engine.engine.graphs import FLOPS_PER_LAUNCH, Graphs, flops_per_launch
from mv2v_engine.engine.stream import Stream
from mv2v_engine.errors import CancelledError, RequestError
from mv2v_engine.models.stream_cache import StreamCache
from mv2v_engine.progress import CancelToken, StepDone
from tests.conftest import CAUSAL, CAUSAL_EDITOR
from tests.engine.graph_stand_in import StandIn, raising

PROMPTS = ["a red ball"] * 5 + ["the ball rolls"] * 2
FORWARDS = 3  # forwards of a block: two steps, and one that leaves K and V
NUM_FRAMES = 5 + 8 * (len(PROMPTS) - 1)


@pytest.fixture
def causal(causal_folder: Path) -> Engine:
    return Engine.from_pretrained(causal_folder, device="cpu")


@pytest.fixture
def recorder(causal: Engine) -> StandIn:
    recorder = StandIn()
    causal.graphs = Graphs("on", 1 << 30, recorder, None)
    return recorder


@pytest.fixture(scope="module")
def live_map(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]
) -> Path:
    """A causal editor that is a flow map: each of a block's forwards has the time it goes to."""
    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoint") / "live_map",
        name="live_map",
        has_end_time=True,
        **CAUSAL_EDITOR | {"sampling": CAUSAL["sampling"] | {"scheduler": "flow_map"}},
    )


def _config(engine: Engine, **changes: Any) -> StreamConfig:
    assert engine.checkpoint.stream is not None
    return dataclasses.replace(engine.checkpoint.stream, **changes)


def _frames(stream: Stream, *, spoil: bool = False) -> Iterator[Tensor]:
    for prompt in PROMPTS:
        stream.prompt = prompt
        (block,) = stream.blocks(stream.num_blocks + 1)
        yield block.frames
        # nothing may lean on what captured steps share
        for entry in stream.parts.graphs._entries.values():
            for tensor in entry.buffers.tensors() if spoil else ():
                tensor.view(torch.uint8).fill_(0xFF)


def _counts(stream: Stream) -> tuple[int, int, int]:
    report = stream.report()["graphs"]
    return report["eager_steps"], report["captured_steps"], report["replayed_steps"]


@pytest.mark.parametrize(
    ("model", "changes", "seen_again"),
    [
        ("causal_folder", {}, 0),
        ("causal_folder", {"is_adaptive": True}, 0),
        ("causal_folder", {"policy": "window"}, 0),
        ("causal_folder", {"policy": "sink", "averages": "cache"}, 0),
        ("causal_folder", {"recache": True}, 2),
        ("causal_editor_folder", {}, 0),
        ("causal_editor_folder", {"recache": True, "policy": "window"}, 4),
        ("causal_editor_folder", {"recache": True, "policy": "sink"}, 3),
        ("live_map", {"recache": True}, 2),
        ("live_map", {"recache": True, "is_adaptive": True, "policy": "memrope"}, 2),
        ("live_map", {"timesteps": (1000, 750, 250), "is_warped": False}, 0),
    ],
    ids=str,
)
def test_replay_equals_eager(
    model: str,
    changes: dict[str, Any],
    seen_again: int,
    request: pytest.FixtureRequest,
    moving_frames: Callable[..., Tensor],
) -> None:
    """Over rolls of the window and another prompt: nothing of a block is baked in.

    seen_again: forwards of blocks that a new prompt has seen again; all but the last of them see
    less than the window.
    """
    engine = Engine.from_pretrained(request.getfixturevalue(model), device="cpu")
    config = _config(engine, **changes)
    frames = moving_frames(NUM_FRAMES) if engine.is_editor else None
    eager = engine.stream(seed=4, config=config, source=frames)
    expected = list(_frames(eager))
    forwards = len(config.timesteps) + 1
    total = len(PROMPTS) * forwards + seen_again
    assert _counts(eager) == (total, 0, 0)
    assert "graphs need a CUDA device" in eager.report()["graphs"]["reason"]
    engine.graphs = Graphs("on", 1 << 30, recorder := StandIn(), None)
    with engine.stream(seed=4, config=config, source=frames) as stream:
        got = list(_frames(stream, spoil=True))
        filling = config.window // config.block_frames - 1
        # while it fills; one that makes ready what launches wait for; after another prompt, one
        # that reads it, or those that see less, and one more
        first = (filling * forwards) + 1
        eager_steps, captured, replayed = _counts(stream)
        assert (eager_steps, captured) == (first + max(seen_again, 2), 2)
        assert eager_steps + captured + replayed == total
        assert stream.report()["graphs"]["reason"] is None
        assert recorder.captures == 2 and len(recorder.live) == 1 and not recorder.turns
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)
    # a stream that is closed leaves nothing
    assert not recorder.live and not engine.graphs.bytes()["buffers"]


def test_what_is_cut_goes_on(causal: Engine, recorder: StandIn, tmp_path: Path) -> None:
    """Cancelled within a block, resumed from a folder, begun again."""
    config = _config(causal, snapshot_blocks=3)
    plain = Graphs("off", 0, None, "graphs are off")
    graphs, causal.graphs = causal.graphs, plain
    expected = list(causal.stream("a", seed=2, config=config).blocks(7))
    causal.graphs = graphs
    with causal.stream("a", seed=2, config=config, store=tmp_path) as stream:
        for block in stream.blocks(5):
            assert torch.equal(block.frames, expected[block.number - 1].frames)
        token = CancelToken()
        with pytest.raises(CancelledError):
            for event in stream.events(6, token):
                if isinstance(event, StepDone) and event.step == 2:
                    token.cancel()
        assert not recorder.turns
        (block,) = stream.blocks(6)
        assert torch.equal(block.frames, expected[5].frames) and recorder.replays
    with causal.stream("a", seed=2, config=config, store=tmp_path, resume=True) as stream:
        for _ in range(2):
            for block in stream.blocks(7):
                assert torch.equal(block.frames, expected[block.number - 1].frames)
            stream.rewind()
    assert not recorder.live


def test_two_streams_have_graphs_of_their_own(causal: Engine, recorder: StandIn) -> None:
    """Block by block in turns, each on its own K and V."""
    config = _config(causal)
    graphs, causal.graphs = causal.graphs, Graphs("off", 0, None, "graphs are off")
    expected = [list(causal.stream(seed=seed, config=config).blocks(7)) for seed in (1, 2)]
    causal.graphs = graphs
    streams = [causal.stream(seed=seed, config=config) for seed in (1, 2)]
    for number in range(1, 8):
        for stream, blocks in zip(streams, expected, strict=True):
            (block,) = stream.blocks(number)
            assert torch.equal(block.frames, blocks[number - 1].frames)
    assert len(recorder.live) == 2
    streams[0].close()
    assert len(recorder.live) == 1
    # while somebody has the graphs they are given back by who ends
    causal.graphs._leased.acquire()
    streams[1].close()
    assert len(recorder.live) == 1
    causal.graphs._leased.release()
    causal.graphs.forget(object())
    assert not recorder.live


def test_a_step_that_cannot_be_captured_runs_eagerly(causal: Engine, recorder: StandIn) -> None:
    config = _config(causal)
    expected = list(causal.stream(seed=1, config=config).blocks(6))
    recorder.fail = raising(RuntimeError("operation not permitted"))
    causal.graphs = Graphs("auto", 1 << 30, recorder, None)
    stream = causal.stream(seed=1, config=config)
    for block, other in zip(stream.blocks(6), expected, strict=True):
        assert torch.equal(block.frames, other.frames)
    assert _counts(stream) == (6 * FORWARDS, 0, 0) and not recorder.turns
    assert "operation not permitted" in stream.report()["graphs"]["reason"]


def test_what_a_window_sees_counts() -> None:
    """At the published size products bound a step, at a quarter of it launches do."""
    shape = dataclasses.replace(WAN_1_3B, camera_conditioning="none", tokenizers=(), merger=None)
    for grid, is_bound in (((60, 104), True), ((30, 52), False)):
        cache = StreamCache(shape, grid, StreamConfig())
        held = 9 * cache.tokens_per_frame
        more = flops_per_launch(cache.plan, held) - flops_per_launch(cache.plan)
        assert more == 4 * cache.plan.length * held * 1536 / 30
        assert (flops_per_launch(cache.plan, held) > FLOPS_PER_LAUNCH) == is_bound


def test_what_grows_is_not_captured(causal: Engine, recorder: StandIn) -> None:
    with pytest.raises(RequestError, match='graphs="on" cannot be met by a stream of policy "all"'):
        causal.stream(config=_config(causal, policy="all"))
    causal.graphs = Graphs("auto", 1 << 30, recorder, None)
    stream = causal.stream(config=_config(causal, policy="all"))
    list(stream.blocks(2))
    assert stream.report()["graphs"]["reason"] == "every block sees more than the one before"
    assert not recorder.captures
