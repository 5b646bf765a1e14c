"""Streams: the same bits however they are cut, kept or resumed, and one cost for every block."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.checkpoints.names import to_original
from mv2v_engine.config import StreamConfig
from mv2v_engine.engine.stream import Stream, StreamBlock
from mv2v_engine.engine.stream_folder import StreamFolder
from mv2v_engine.errors import CancelledError, CheckpointError, RequestError, StorageError
from mv2v_engine.files import save_tensors
from mv2v_engine.progress import CancelToken, StepDone
from tests.conftest import has_products

PROMPTS = ["a red ball"] * 3 + ["the ball rolls"] * 5
COUNT = len(PROMPTS)


@pytest.fixture(scope="module")
def causal(causal_folder: Path) -> Engine:
    return Engine.from_pretrained(causal_folder, device="cpu")


@pytest.fixture(scope="module")
def config(causal: Engine) -> StreamConfig:
    assert causal.checkpoint.stream is not None
    return dataclasses.replace(causal.checkpoint.stream, snapshot_blocks=3)


def _made(stream: Stream, count: int = COUNT) -> Iterator[StreamBlock]:
    """Blocks up to `count`, each asked for with its prompt."""
    while stream.num_blocks < count:
        stream.prompt = PROMPTS[stream.num_blocks]
        yield from stream.blocks(stream.num_blocks + 1)


@pytest.fixture(scope="module")
def unbroken(causal: Engine, config: StreamConfig) -> list[StreamBlock]:
    return list(_made(causal.stream(seed=4, config=config)))


def _latents(folder: Path) -> list[Tensor]:
    store = StreamFolder(folder)
    return [store.read_block(number + 1)[0] for number in range(store.num_blocks)]


def test_blocks_have_no_seams(
    causal: Engine, config: StreamConfig, unbroken: list[StreamBlock], tmp_path: Path
) -> None:
    with causal.stream(seed=4, config=config, store=tmp_path / "s") as stream:
        blocks = list(_made(stream))
    assert [block.number for block in blocks] == list(range(1, COUNT + 1))
    assert [len(block.frames) for block in blocks] == [5] + [8] * (COUNT - 1)
    assert [block.first_frame for block in blocks] == [0, *range(5, 5 + 8 * (COUNT - 1), 8)]
    assert [stream.block_of(frame) for frame in (0, 4, 5, 12, 13)] == [1, 1, 2, 2, 3]
    whole = causal.vae.decode(torch.cat(_latents(tmp_path / "s"), 1))
    assert torch.equal(torch.cat([block.frames for block in blocks]), whole)
    for block, other in zip(blocks, unbroken, strict=True):
        assert torch.equal(block.frames, other.frames) and block.prompt == other.prompt


def test_a_prompt_changes_what_follows_alone(
    causal: Engine, config: StreamConfig, unbroken: list[StreamBlock]
) -> None:
    stream = causal.stream(PROMPTS[0], seed=4, config=config)
    same = list(stream.blocks(4))
    assert all(torch.equal(same[n].frames, unbroken[n].frames) for n in range(3))
    assert not torch.equal(same[3].frames, unbroken[3].frames)
    other = next(causal.stream(PROMPTS[0], seed=5, config=config).blocks(1))
    assert not torch.equal(other.frames, same[0].frames)


@pytest.mark.parametrize("stop", range(1, COUNT))
def test_a_stream_goes_on_wherever_it_was_killed(
    causal: Engine, config: StreamConfig, unbroken: list[StreamBlock], tmp_path: Path, stop: int
) -> None:
    """Cut off before its next step, as a process that is killed leaves its folder."""
    stream = causal.stream(seed=4, config=config, store=tmp_path)
    assert len(list(_made(stream, stop))) == stop
    stream.prompt = PROMPTS[stop]
    events = stream.events()
    while not isinstance(next(events), StepDone):
        pass
    stream.close()  # the lock alone: what is in memory is not used any more
    (tmp_path / "blocks" / ".block_0000009-abcdefgh.safetensors").write_bytes(b"cut off")
    with causal.stream(seed=4, config=config, store=tmp_path, resume=True) as stream:
        assert stream.num_blocks == (stop if stop % 3 == 0 else stop - stop % 3)
        again = list(_made(stream))
    assert not list(tmp_path.rglob(".block*"))
    assert [block.is_again for block in again] == [b.number <= stop for b in again]
    for block in again:
        expected = unbroken[block.number - 1]
        assert torch.equal(block.frames, expected.frames) and block.prompt == expected.prompt


@pytest.mark.parametrize("harm", ["none", "damaged", "ahead"])
def test_every_block_can_be_handed_over_again(
    causal: Engine,
    config: StreamConfig,
    unbroken: list[StreamBlock],
    tmp_path: Path,
    harm: str,
) -> None:
    """From the start, and without a snapshot that can be used."""
    options: dict[str, Any] = {"seed": 4, "config": config, "store": tmp_path}
    with causal.stream(**options) as stream:
        list(_made(stream, 7))
    store = StreamFolder(tmp_path)
    if harm == "damaged":
        taken, tensors = store.read_snapshot()
        tensors["cache.0.keys"][0, 0, 0, 0] += 1
        words = {"stream": f'{{"num_blocks": {taken}, "sha256": "0"}}'}
        save_tensors(store.snapshot, tensors, words)
    elif harm == "ahead":
        for number in (6, 7):
            store.block_path(number).unlink()
    with causal.stream(**options, resume=True) as stream:
        if harm == "none":
            assert stream.num_blocks == 6
            stream.rewind()
        assert stream.num_blocks == 0
        assert [words.split(":")[0] for words in stream.lost] == (
            ["the snapshot is left out"] if harm == "damaged" else []
        )
        again = list(_made(stream))
    assert all(map(torch.equal, (b.frames for b in again), (b.frames for b in unbroken)))


def test_a_damaged_block_is_refused(causal: Engine, config: StreamConfig, tmp_path: Path) -> None:
    with causal.stream(seed=4, config=config, store=tmp_path) as stream:
        list(_made(stream, 2))
    path = StreamFolder(tmp_path).block_path(2)
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with causal.stream(seed=4, config=config, store=tmp_path, resume=True) as stream:
        blocks = stream.blocks()
        assert next(blocks).is_again
        with pytest.raises(StorageError, match=r"block_0000002.* other bits .*remove it and"):
            next(blocks)


def test_a_cancelled_block_is_made_again(
    causal: Engine, config: StreamConfig, unbroken: list[StreamBlock]
) -> None:
    stream = causal.stream(seed=4, config=config)
    made = list(_made(stream, 5))
    for steps in (1, 2):
        token, seen = CancelToken(), 0
        stream.prompt = PROMPTS[5]
        with pytest.raises(CancelledError):
            for event in stream.events(6, token):
                seen += isinstance(event, StepDone)
                if seen == steps:
                    token.cancel()
        assert stream.num_blocks == 5
    made += _made(stream)
    assert all(map(torch.equal, (b.frames for b in made), (b.frames for b in unbroken)))


def test_a_cancelled_stream_goes_on_from_its_folder(
    causal: Engine, config: StreamConfig, unbroken: list[StreamBlock], tmp_path: Path
) -> None:
    """What comes out of `blocks` is `CancelledError`, again as long as the token is the same."""
    token, made = CancelToken(), []
    with causal.stream(seed=4, config=config, store=tmp_path) as stream:
        made += _made(stream, 4)
        stream.prompt = PROMPTS[4]
        events = stream.events(5, token)
        while not isinstance(next(events), StepDone):
            pass
        token.cancel()
        with pytest.raises(CancelledError, match="what was finished before is kept"):
            list(events)
        with pytest.raises(CancelledError):
            next(stream.blocks(5, token))
        assert stream.num_blocks == 4
    with causal.stream(seed=4, config=config, store=tmp_path, resume=True) as stream:
        made += [block for block in _made(stream) if not block.is_again]
    assert len(made) == COUNT
    assert all(map(torch.equal, (b.frames for b in made), (b.frames for b in unbroken)))


@pytest.mark.parametrize("policy", ["memrope", "sink", "window"])
def test_memory_is_flat(causal: Engine, policy: Any) -> None:
    settings = StreamConfig(
        block_frames=1, window=4, sink_frames=1, policy=policy, timesteps=(1000,)
    )
    stream, sizes = causal.stream(config=settings), list[tuple[int, int]]()
    for _ in stream.blocks(24):
        sizes.append((stream.cache.num_bytes, stream.decoder.num_bytes))
    assert len(set(sizes[4:])) == 1
    report = stream.report()
    assert report["blocks"] == 24 and report["frames"] == 1 + 23 * 4
    latency = report["latency"]
    assert latency["block_seconds_median"] <= latency["block_seconds_p99"]
    assert latency["frames_per_second"] > 0 and latency["first_frame_seconds"] > 0
    assert (report["cache_bytes"], report["decoder_bytes"]) == sizes[-1]


def test_without_end(causal: Engine) -> None:
    blocks = causal.stream().blocks()
    assert [next(blocks).number for _ in range(3)] == [1, 2, 3]


def test_what_a_stream_refuses(
    causal: Engine, engine: Engine, editor_folder: Path, causal_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="tiny renders novel views, and streams are made fr"):
        engine.stream()
    editor = Engine.from_pretrained(editor_folder, device="cpu")
    with pytest.raises(RequestError, match="editor looks at all frames at once"):
        editor.stream("a red ball")
    long = " ".join(["ball"] * 9)
    with pytest.raises(RequestError, match="the prompt has 10 tokens, the model reads 8"):
        causal.stream(long)
    stream = causal.stream("a ball")
    with pytest.raises(RequestError, match="the prompt has 10 tokens"):
        stream.prompt = long
    assert stream.prompt == "a ball"
    with pytest.raises(RequestError, match="seed must be an integer, got 'x'"):
        causal.stream(seed="x")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="config must be a StreamConfig"):
        causal.stream(config={})  # type: ignore[arg-type]
    for name, config in (
        ("step_cache", EngineConfig(step_cache=0.1)),
        ("scheduler", EngineConfig(scheduler="euler")),
    ):
        other = Engine.from_pretrained(causal_folder, device="cpu", config=config)
        with pytest.raises(RequestError, match=f"{name} cannot be met: "):
            other.stream()
    with pytest.raises(RequestError, match="resume needs"):
        causal.stream(resume=True)
    with pytest.raises(StorageError, match="holds no stream; start one there"):
        causal.stream(store=tmp_path, resume=True)


def _generator(causal_folder: Path, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The causal model as Self-Forcing saves one, and its weights by our names."""
    with safe_open(str(causal_folder / "transformer.safetensors"), "pt") as file:
        own = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names = {name: f"model.{to_original(name)}" for name in own}
    path = folder / "self_forcing_dmd.pt"
    torch.save({"generator_ema": {names[name]: own[name] for name in own}}, path)
    words = {"num_heads": 2, "dim": 48, "text_len": 8}
    (folder / "config.json").write_text(json.dumps({"_class_name": "CausalWanModel", **words}))
    return path, own


def test_a_generator_of_self_forcing(causal_folder: Path, tmp_path: Path) -> None:
    """A file of original names, which says neither what it is nor how many heads it has."""
    path, own = _generator(causal_folder, tmp_path)
    options: dict[str, Any] = {"device": "cpu", "components": causal_folder}
    with pytest.raises(CheckpointError, match="run stream --causal"):
        Engine.from_pretrained(path, **options)
    engine = Engine.from_pretrained(path, causal=True, **options)
    stream = engine.stream("a red ball")
    assert stream.config == StreamConfig() and stream.cache.plan.target.grid == (3, 60, 104)
    loaded = engine.transformer.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in own.items())


def test_the_lora_of_a_generator(causal_folder: Path, tmp_path: Path) -> None:
    """LongLive saves it below a name of the trainer's, in PEFT's words, with a critic's beside
    it; its scale is 1."""
    path, own = _generator(causal_folder, tmp_path)
    generator, products = torch.Generator().manual_seed(0), dict[str, Tensor]()
    saved: dict[str, dict[str, Tensor]] = {"generator_lora": {}, "critic_lora": {}}
    for name, weight in own.items():
        if not name.startswith("blocks.") or weight.ndim != 2:
            continue
        up = torch.randn(len(weight), 3, generator=generator)
        down = torch.randn(3, weight.shape[1], generator=generator)
        module = to_original(name).removesuffix(".weight").replace("blocks.0.", "blocks.0._fsdp_.")
        for side, factor in (("A", down), ("B", up)):
            key = f"base_model.model.{module}.lora_{side}.weight"
            saved["generator_lora"][key], saved["critic_lora"][key] = factor, 0 * factor + 1
        products[name] = weight + up @ down
    torch.save(saved, tmp_path / "lora.pt")
    config = EngineConfig(lora=((tmp_path / "lora.pt", 1.0),))
    options: dict[str, Any] = {"device": "cpu", "components": causal_folder, "causal": True}
    engine = Engine.from_pretrained(path, config=config, **options)
    assert engine.stream("a red ball").config == StreamConfig()
    loaded = engine.transformer.state_dict()
    assert len(products) == 20
    for name, weight in own.items():
        torch.testing.assert_close(loaded[name], products.get(name, weight), rtol=1e-6, atol=2e-6)


def test_another_stream_is_not_continued(
    causal: Engine, config: StreamConfig, tmp_path: Path
) -> None:
    with causal.stream(seed=4, config=config, store=tmp_path) as stream:
        next(stream.blocks())
        with pytest.raises(StorageError, match="is in use"):
            causal.stream(seed=4, config=config, store=tmp_path, resume=True)
    with pytest.raises(StorageError, match="already holds a stream; resume it"):
        causal.stream(seed=4, config=config, store=tmp_path)
    with pytest.raises(StorageError, match="a stream whose seed is 4, this one's is 5"):
        causal.stream(seed=5, config=config, store=tmp_path, resume=True)
    # of the settings those that differ, and no others
    other = dataclasses.replace(config, window=10, policy="sink")
    said = (
        f"{tmp_path} holds a stream whose policy is 'memrope', this one's is 'sink'; whose window "
        f"is {config.window}, this one's is 10; give the same input, or choose another folder"
    )
    with pytest.raises(StorageError) as caught:
        causal.stream(seed=4, config=other, store=tmp_path, resume=True)
    assert str(caught.value) == said


def test_rounded_weights_are_another_stream(
    causal: Engine, causal_folder: Path, config: StreamConfig, tmp_path: Path
) -> None:
    """Those of the text encoder, too, and in both directions."""
    settings = EngineConfig(quantize_text="int8")
    rounded = Engine.from_pretrained(causal_folder, device="cpu", config=settings)
    for number, (one, other) in enumerate([(causal, rounded), (rounded, causal)]):
        store = tmp_path / str(number)
        with one.stream("a ball", config=config, store=store) as stream:
            next(stream.blocks())
        with pytest.raises(StorageError, match="a stream whose quantize_text is"):
            other.stream("a ball", config=config, store=store, resume=True)


@has_products
def test_narrow_products_are_another_stream(
    causal: Engine, causal_folder: Path, config: StreamConfig, tmp_path: Path
) -> None:
    with causal.stream("a ball", config=config, store=tmp_path) as stream:
        next(stream.blocks())
    narrow = Engine.from_pretrained(causal_folder, device="cpu", dtype=torch.bfloat16)
    with pytest.raises(StorageError, match=r"dtype is 'float32', this one's is 'bfloat16'"):
        narrow.stream("a ball", config=config, store=tmp_path, resume=True)


def test_a_model_that_is_not_causal(make_checkpoint: Any, tmp_path: Path) -> None:
    shape = {"camera_conditioning": "none", "tokenizers": (), "merger": None, "num_layers": 1}
    folder = make_checkpoint(tmp_path / "plain", name="plain", **shape)
    plain = Engine.from_pretrained(folder, device="cpu")
    with pytest.raises(RequestError, match=r"plain looks at all frames at once.*causal=True"):
        plain.stream()
    said = Engine.from_pretrained(folder, device="cpu", causal=True)
    assert said.checkpoint.stream == StreamConfig()
    assert len(next(said.stream().blocks()).frames) == 9
