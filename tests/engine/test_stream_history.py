"""Streams with a history in place of averages: the same bits however they are cut, and captured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.checkpoints import inspect_checkpoint
from mv2v_engine.config import HistoryConfig, StreamConfig
from mv2v_engine.engine.graphs import Graphs
from mv2v_engine.engine.stream import StreamBlock, refused_policies
from mv2v_engine.errors import CancelledError, MemoryBudgetError, RequestError
from mv2v_engine.progress import CancelToken, StepDone
from tests.conftest import CAUSAL, CAUSAL_EDITOR
from tests.engine.graph_stand_in import StandIn

# latents of 4x6 cells: a token of 1x1x2 is one of 2x3, in two slots lie those of four frames
STREAM = dataclasses.replace(CAUSAL["stream"], policy="history", window=7, sink_frames=1)
ENCODER = HistoryConfig(rates=("1x1x2",), channels=(4, 4, 8, 8), heads=2)
COUNT, STEPS = 10, 2
NUM_FRAMES = 5 + 8 * (COUNT - 1)
PROMPTS = ["a red ball"] * 7 + ["the ball rolls"] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    fields = CAUSAL_EDITOR | {"stream": STREAM, "history": ENCODER}
    place = tmp_path_factory.mktemp("checkpoint") / "remembering"
    return make_checkpoint(place, name="remembering", **fields)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def options(moving_frames: Callable[..., Tensor]) -> dict[str, Any]:
    config = dataclasses.replace(STREAM, snapshot_blocks=3)
    return {"seed": 4, "config": config, "source": moving_frames(NUM_FRAMES)}


def _made(stream: Any, count: int = COUNT) -> list[StreamBlock]:
    found = list[StreamBlock]()
    while stream.num_blocks < count:
        stream.prompt = PROMPTS[stream.num_blocks]
        found += stream.blocks(stream.num_blocks + 1)
    return found


@pytest.fixture(scope="module")
def unbroken(engine: Engine, options: dict[str, Any]) -> list[StreamBlock]:
    return _made(engine.stream(**options))


def _same(mine: list[StreamBlock], theirs: list[StreamBlock]) -> bool:
    pairs = zip(mine, theirs, strict=True)
    return all(a.number == b.number and torch.equal(a.frames, b.frames) for a, b in pairs)


@pytest.mark.parametrize("stop", range(1, COUNT))
def test_resumed_after_any_block(
    engine: Engine,
    options: dict[str, Any],
    unbroken: list[StreamBlock],
    tmp_path: Path,
    stop: int,
) -> None:
    """Before the history begins, while it grows and once it is full; with a block under way."""
    stream = engine.stream(**options, store=tmp_path)
    assert _same(_made(stream, stop), unbroken[:stop])
    token, stream.prompt = CancelToken(), PROMPTS[stop]
    with pytest.raises(CancelledError):
        for event in stream.events(stop + 1, token):
            if isinstance(event, StepDone):
                token.cancel()
    stream.close()
    with engine.stream(**options, store=tmp_path, resume=True) as stream:
        again = _made(stream)
        assert not stream.lost and _same(again, unbroken[-len(again) :])
        assert sum(block.is_again for block in again) == stop % 3


def test_a_cancelled_block_is_made_again(
    engine: Engine, options: dict[str, Any], unbroken: list[StreamBlock]
) -> None:
    """The frames that left for it have become tokens once."""
    with engine.stream(**options) as stream:
        made = _made(stream, 5)
        for step in (1, 2):
            token, seen = CancelToken(), 0
            with pytest.raises(CancelledError):
                for event in stream.events(6, token):
                    seen += isinstance(event, StepDone)
                    if seen == step:
                        token.cancel()
        assert _same(made + _made(stream), unbroken)


def test_replay_equals_eager(
    folder: Path, options: dict[str, Any], unbroken: list[StreamBlock]
) -> None:
    """Steps are captured once window and history are full, over rolls and another prompt."""
    engine = Engine.from_pretrained(folder, device="cpu")
    engine.graphs = Graphs("on", 1 << 30, recorder := StandIn(), None)
    with engine.stream(**options) as stream:
        made = list[StreamBlock]()
        for number in range(COUNT):
            stream.prompt = PROMPTS[number]
            made += stream.blocks(number + 1)
            for entry in engine.graphs._entries.values():
                for tensor in entry.buffers.tensors():
                    tensor.view(torch.uint8).fill_(0xFF)
        told = stream.report()["graphs"]
    assert _same(made, unbroken)
    # five whole frames, and tokens of four: full with the fourth block, after which one forward
    # makes ready what launches wait for, and two are eager after another prompt
    assert told["eager_steps"] == 3 * (STEPS + 1) + 1 + 2 and recorder.captures == 2
    assert sum(told[f"{how}_steps"] for how in ("eager", "captured", "replayed")) == 30
    assert told["reason"] is None and not recorder.live


def test_memory_is_flat_and_told(engine: Engine, options: dict[str, Any]) -> None:
    stream, sizes = engine.stream(**options), list[int]()
    for _ in stream.blocks(COUNT):
        sizes.append(stream.cache.num_bytes)
    assert len(set(sizes[4:])) == 1
    found = stream.report()
    json.dumps(found)
    assert found["cache_bytes"] == sizes[-1]
    assert found["settings"]["policy"] == "history"
    assert found["cache"]["tokens_seen"] == 7 * 6 and found["cache"]["tokens"] == 2 * 6
    told = found["cache"]["history"]
    assert (told["rate"], told["tokens"], told["latent_frames"]) == ("1x1x2", 12, 4)
    assert found["cache"]["forward_flops"] > told["flops"] > 0
    # another policy's blocks cost what they did, and its folders say what they said
    plain = engine.stream(**options | {"config": dataclasses.replace(STREAM, policy="memrope")})
    list(plain.blocks(1))
    report = plain.report()
    assert report["cache"]["tokens_seen"] == 42 and "history" not in report["cache"]
    assert not {"history_rate", "history_slots"} & set(report["settings"])


def test_the_bytes_are_predicted(engine: Engine, folder: Path, options: dict[str, Any]) -> None:
    config = dataclasses.replace(options["config"], history_slots=20, window=60)
    peak = engine.budget.predict_stream(config).peak
    smaller = dataclasses.replace(config, window=40)
    tight = EngineConfig(memory_limit_bytes=engine.budget.predict_stream(smaller).peak)
    other = Engine.from_pretrained(folder, device="cpu", config=tight)
    with pytest.raises(MemoryBudgetError, match=r"this stream needs [\d,]+ .*window=40 fits"):
        other.stream(**options | {"config": config})
    stream = engine.stream(**options)
    list(stream.blocks(COUNT))
    history, found = stream.cache.history, engine.budget.predict_stream(STREAM)
    assert history is not None
    kept, made = history.peak_bytes(engine.transformer.config, 4)
    assert kept == history.num_bytes and made > 0
    assert found.peak < peak
    # nothing fits: windows that the tokens' frames leave no room for are not asked
    nothing = Engine.from_pretrained(
        folder, device="cpu", config=EngineConfig(memory_limit_bytes=1)
    )
    with pytest.raises(MemoryBudgetError, match="no smaller window fits"):
        nothing.stream(**options)


def test_a_new_prompt_has_the_whole_frames_seen_again(
    engine: Engine, options: dict[str, Any], unbroken: list[StreamBlock], tmp_path: Path
) -> None:
    config = dataclasses.replace(options["config"], recache=True)
    given = options | {"config": config}
    other = _made(engine.stream(**given))
    assert _same(other[:7], unbroken[:7])
    assert not torch.equal(other[7].frames, unbroken[7].frames)
    stream = engine.stream(**given, store=tmp_path)
    _made(stream, 8)
    stream.close()
    with engine.stream(**given, store=tmp_path, resume=True) as stream:
        again = _made(stream)
        assert _same(again, other[-len(again) :])


def test_weights_without_an_encoder(
    engine: Engine, folder: Path, causal_folder: Path, tmp_path: Path
) -> None:
    causal = Engine.from_pretrained(causal_folder, device="cpu")
    config = StreamConfig(policy="history")
    words = "policy='history' takes a history encoder, and causal has none; .*training.causal"
    with pytest.raises(RequestError, match=words):
        causal.stream(config=config, store=tmp_path / "s")
    assert not (tmp_path / "s").exists()
    stream = causal.checkpoint.stream
    assert stream is not None and set(refused_policies(causal, stream)) == {"history"}
    assert not refused_policies(engine, STREAM)
    coarse = dataclasses.replace(STREAM, history_rate="2x2x2")
    with pytest.raises(RequestError, match=r"of rate 2x2x2, and remembering has .* 1x1x2 alone"):
        engine.stream("a", source=torch.zeros(5, 32, 48, 3).byte(), config=coarse)
    told = inspect_checkpoint(folder)
    assert told.problem is None
