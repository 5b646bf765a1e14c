"""Streams that edit frames as they come: without seams, to the same bits however they are cut."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.config import StreamConfig
from mv2v_engine.counting import vae_stream_bytes
from mv2v_engine.engine.budget import module_bytes
from mv2v_engine.engine.stream import Stream, StreamBlock, block_steps, block_velocity
from mv2v_engine.engine.stream_folder import StreamFolder
from mv2v_engine.engine.window import window_seed
from mv2v_engine.errors import (
    CancelledError,
    MemoryBudgetError,
    RequestError,
    StorageError,
    VideoError,
)
from mv2v_engine.models.stream_cache import StreamCache
from mv2v_engine.progress import CancelToken, StepDone
from mv2v_engine.sampling.flow_match import RenoisingSolver, listed_sigmas, turn_noise
from mv2v_engine.video.io import write_video
from mv2v_engine.video.live import LiveFrames

PROMPTS = ["a red ball"] * 3 + ["the ball rolls"] * 4
# five frames of the first block, then eight each; the last block has three
NUM_FRAMES = 5 + 5 * 8 + 3
COUNT = len(PROMPTS)
Frames = Callable[..., Tensor]


@pytest.fixture(scope="module")
def editor(causal_editor_folder: Path) -> Engine:
    return Engine.from_pretrained(causal_editor_folder, device="cpu")


@pytest.fixture(scope="module")
def config(editor: Engine) -> StreamConfig:
    assert editor.checkpoint.stream is not None
    return dataclasses.replace(editor.checkpoint.stream, snapshot_blocks=3)


@pytest.fixture(scope="module")
def frames(moving_frames: Frames) -> Tensor:
    return moving_frames(NUM_FRAMES)


def _made(stream: Stream, count: int = COUNT) -> Iterator[StreamBlock]:
    """Blocks up to `count`, each asked for with its prompt."""
    while stream.num_blocks < count:
        stream.prompt = PROMPTS[stream.num_blocks]
        yield from stream.blocks(stream.num_blocks + 1)


@pytest.fixture(scope="module")
def unbroken(editor: Engine, config: StreamConfig, frames: Tensor) -> list[StreamBlock]:
    return list(_made(editor.stream(seed=4, config=config, source=iter(frames))))


def _same(blocks: list[StreamBlock], others: list[StreamBlock]) -> bool:
    return all(
        torch.equal(block.frames, others[block.number - 1].frames)
        and block.prompt == others[block.number - 1].prompt
        for block in blocks
    )


def test_it_is_what_the_whole_source_gives(
    editor: Engine, config: StreamConfig, frames: Tensor, unbroken: list[StreamBlock]
) -> None:
    """The source encoded at once, its latents cut into blocks, all results decoded at once."""
    whole = torch.cat([frames, frames[-1:].expand(5, -1, -1, -1)])
    source = editor.vae.encode(whole)[None]
    cache, made = StreamCache(editor.checkpoint.config, (4, 6), config), list[Tensor]()
    sigmas, model = listed_sigmas(config.timesteps, editor.sampling.flow_shift), editor.transformer
    for number, part in enumerate(source.split(2, dim=2)):
        if number in (0, 3):
            cache.clear_text()
        text = editor.text_embedding(PROMPTS[number])
        noise, generator = turn_noise((1, 16, 2, 4, 6), window_seed(4, number))
        cache.begin_block()
        solver = RenoisingSolver(sigmas, generator)
        *_, latents = block_steps(model, cache, solver, noise, text, part)
        block_velocity(model, cache, latents, 0.0, text, part)
        made.append(latents[0])
    expected = editor.vae.decode(torch.cat(made, 1))
    got = torch.cat([block.frames for block in unbroken])
    assert len(got) == NUM_FRAMES and [len(block.frames) for block in unbroken] == [
        5,
        *[8] * 5,
        3,
    ]
    assert int((got.int() - expected[:NUM_FRAMES].int()).abs().max()) <= 1
    # and the source decides what it is
    other = list(_made(editor.stream(seed=4, config=config, source=255 - frames)))
    assert not torch.equal(other[0].frames, unbroken[0].frames)


@pytest.mark.parametrize(
    ("kind", "stop"), [*(("once", stop) for stop in range(1, COUNT)), ("file", 5)]
)
def test_it_goes_on_wherever_it_was_killed(
    editor: Engine,
    config: StreamConfig,
    frames: Tensor,
    unbroken: list[StreamBlock],
    tmp_path: Path,
    kind: str,
    stop: int,
) -> None:
    """Of frames that come once none is needed again, those of the block under way included."""
    once = iter(frames)
    source: Any = once if kind == "once" else frames
    options: dict[str, Any] = {"seed": 4, "config": config, "store": tmp_path, "source": source}
    stream = editor.stream(**options)
    assert len(list(_made(stream, stop))) == stop
    stream.prompt = PROMPTS[stop]
    events = stream.events()
    while not isinstance(next(events), StepDone):
        pass
    stream.close()
    with editor.stream(**options, resume=True) as stream:
        assert stream.num_blocks == stop - stop % 3
        again = list(_made(stream)) + list(stream.blocks())
        assert stream.num_frames == NUM_FRAMES == stream.report()["frames"]
    assert [block.number for block in again] == list(range(stop - stop % 3 + 1, COUNT + 1))
    assert _same(again, unbroken)
    kept = sorted(path.name for path in StreamFolder(tmp_path).source_folder.iterdir())
    assert kept == ["frames_0000007.safetensors"]  # the block behind the last snapshot
    if stop < COUNT - 1:
        return
    # a stream that is finished hands over what lies there, and no more
    with editor.stream(**options, resume=True) as stream:
        stream.rewind()
        everything = list(stream.blocks())
    assert len(everything) == COUNT and _same(everything, unbroken)


@pytest.mark.parametrize("kind", ["once", "file", "gone", "cut"])
def test_a_lost_snapshot(
    editor: Engine,
    config: StreamConfig,
    frames: Tensor,
    unbroken: list[StreamBlock],
    tmp_path: Path,
    kind: str,
) -> None:
    """What can be read again is; what cannot is asked for by name."""
    once = iter(frames)
    source: Any = frames if kind == "file" else once
    options: dict[str, Any] = {"seed": 4, "config": config, "store": tmp_path, "source": source}
    with editor.stream(**options) as stream:
        list(_made(stream, 5))
    StreamFolder(tmp_path).snapshot.unlink()
    # a function whose frames are not kept for ever
    if kind in ("gone", "cut"):
        options["source"] = lambda first: frames[first : 3 if kind == "cut" else 0]
    with editor.stream(**options, resume=True) as stream:
        assert stream.num_blocks == 0
        if kind == "file":
            assert _same(list(_made(stream)), unbroken)
        else:
            said = "gives each frame once" if kind == "once" else "frames 0 to 4 .* not all there"
            with pytest.raises(StorageError, match=f"{said}; begin the stream anew"):
                list(_made(stream))


def test_a_cancelled_block_is_made_again(
    editor: Engine, config: StreamConfig, frames: Tensor, unbroken: list[StreamBlock]
) -> None:
    """Cancelled between two steps, and while its frames are waited for."""
    gate = threading.Event()

    def arriving() -> Iterator[Tensor]:
        yield from frames[:21]
        gate.wait(600)
        yield from frames[21:]

    stream = editor.stream(seed=4, config=config, source=LiveFrames(arriving(), fps=8))
    assert stream.fps == 8
    made, token = list(_made(stream, 2)), CancelToken()
    with pytest.raises(CancelledError):
        for event in stream.events(3, token):
            if isinstance(event, StepDone):
                token.cancel()
    made += _made(stream, 3)
    stream.prompt, token = PROMPTS[3], CancelToken()
    threading.Timer(0.3, token.cancel).start()
    with pytest.raises(CancelledError):
        list(stream.blocks(4, token))
    assert stream.num_blocks == 3
    gate.set()
    made += _made(stream)
    assert len(made) == COUNT and _same(made, unbroken)
    report = stream.report()["source"]
    assert report["frames_read"] == NUM_FRAMES and report["frames_dropped"] == 0
    assert report["waited_seconds"] > 0.2
    assert stream.report()["latency"]["block_seconds_max"] < report["waited_seconds"] + 60


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1]), (5, [5]), (6, [5, 1]), (13, [5, 8]), (20, [5, 8, 7])]
)
def test_the_video_ends_with_the_source(
    editor: Engine, moving_frames: Frames, count: int, sizes: list[int]
) -> None:
    frames = moving_frames(count)
    stream = editor.stream("a red ball", source=frames.numpy())
    blocks = list(stream.blocks())
    assert [len(block.frames) for block in blocks] == sizes
    assert list(stream.blocks()) == [] and stream.num_frames == count
    # what is cut off is what the last frame, held on, would have given
    held = torch.cat([frames, frames[-1:].expand(8, -1, -1, -1)])
    longer = list(editor.stream("a red ball", source=held).blocks(len(sizes)))
    assert all(
        torch.equal(one.frames, other.frames[: len(one.frames)])
        for one, other in zip(blocks, longer, strict=True)
    )


def test_a_file_keeps_its_rate(editor: Engine, moving_frames: Frames, tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", moving_frames(9), 12.5)
    stream = editor.stream("a red ball", source=tmp_path / "clip.mp4")
    assert [len(block.frames) for block in stream.blocks()] == [5, 4]
    report = stream.report()
    assert report["fps"] == 12.5 and report["source"]["name"] == "clip.mp4"
    assert report["latency"]["first_frame_seconds"] > 0 and report["encoder_bytes"] > 0


def test_frames_of_other_sizes(editor: Engine, moving_frames: Frames) -> None:
    small = moving_frames(13)
    large = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    mixed = [*small[:3], *large[3:9].numpy(), small[9:]]
    stream = editor.stream("a red ball", source=iter(mixed))
    assert len(list(stream.blocks())) == 2
    assert stream.report()["source"]["size_changes"] == 2
    wrong = editor.stream("a red ball", source=iter([small[0], np.zeros((4, 4), np.uint8)]))
    with pytest.raises(VideoError, match=r"a frame of the source must be uint8 \[height"):
        next(wrong.blocks())
    float_frame = editor.stream("a red ball", source=iter([small[0].float()]))
    with pytest.raises(VideoError, match="frames must be uint8"):
        next(float_frame.blocks())


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_frames_that_may_not_be_written_to(editor: Engine, moving_frames: Frames) -> None:
    frames = moving_frames(5)
    kept = frames.numpy().copy()
    kept.flags.writeable = False
    (block,) = editor.stream("a red ball", source=iter(kept)).blocks()
    (expected,) = editor.stream("a red ball", source=frames).blocks()
    assert torch.equal(block.frames, expected.frames)


def test_a_source_that_breaks_off_goes_on_behind_the_last_whole_block(
    editor: Engine, moving_frames: Frames, tmp_path: Path
) -> None:
    frames, asked = moving_frames(21), []
    options: dict[str, Any] = {"prompt": "a red ball", "store": tmp_path / "s"}

    def broken() -> Iterator[Tensor]:
        yield from frames[:11]
        raise OSError("the camera is gone")

    with (
        editor.stream(source=broken(), **options) as stream,
        pytest.raises(OSError, match="is gone"),
    ):
        list(stream.blocks())

    def from_frame(first: int) -> Iterator[Tensor]:
        asked.append(first)
        return iter(frames[first:])

    with editor.stream(source=from_frame, resume=True, **options) as stream:
        again = torch.cat([block.frames for block in stream.blocks()])
    assert asked == [5]
    expected = [block.frames for block in editor.stream("a red ball", source=frames).blocks()]
    assert torch.equal(again, torch.cat(expected))


def test_a_camera_does_not_wait(editor: Engine, moving_frames: Frames) -> None:
    """The oldest waiting frames give way; the newest are there, in their order."""
    frames, begun, seen = moving_frames(40), threading.Event(), threading.Event()

    def camera() -> Iterator[Tensor]:
        yield frames[0]
        begun.wait(600)
        yield from frames[1:39]
        seen.wait(600)
        yield frames[39]

    live = LiveFrames(camera(), drops=True, room=8)
    assert torch.equal(live.read(lambda: None), frames[0])
    begun.set()
    while live._num_read < 39:
        time.sleep(0.01)
    got = [live.read(lambda: None) for _ in range(8)]
    assert all(map(torch.equal, got, frames[31:39]))
    assert live.report() == {"frames_read": 39, "frames_dropped": 30}
    seen.set()
    assert torch.equal(live.read(lambda: None), frames[39])
    assert live.read(lambda: None) is None
    # a source that waits loses nothing
    patient = LiveFrames(iter(frames), room=4)
    assert all(torch.equal(patient.read(lambda: None), frame) for frame in frames)
    assert patient.num_dropped == 0


def test_what_a_source_raises_comes_behind_its_frames(
    editor: Engine, moving_frames: Frames
) -> None:
    def breaking() -> Iterator[Tensor]:
        yield from moving_frames(7)
        raise VideoError("the camera is gone")

    for source in (LiveFrames(breaking()), breaking()):
        blocks = editor.stream("a red ball", source=source).blocks()
        assert len(next(blocks).frames) == 5
        with pytest.raises(VideoError, match="the camera is gone"):
            next(blocks)


def test_what_is_refused(
    editor: Engine,
    causal_folder: Path,
    editor_folder: Path,
    frames: Tensor,
    config: StreamConfig,
    tmp_path: Path,
) -> None:
    with pytest.raises(RequestError, match="causal_editor edits by instruction, and there is"):
        editor.stream("a red ball")
    maker = Engine.from_pretrained(causal_folder, device="cpu")
    with pytest.raises(RequestError, match="causal makes video from a prompt alone, and takes no"):
        maker.stream("a red ball", source=frames)
    whole = Engine.from_pretrained(editor_folder, device="cpu")
    with pytest.raises(RequestError, match=r"editor looks at all frames at once .*causal=True"):
        whole.stream("a red ball", source=frames)
    with pytest.raises(RequestError, match="the prompt has 10 tokens"):
        editor.stream("ball " * 9, source=frames)
    with pytest.raises(VideoError, match="source must be a video file"):
        editor.stream("a red ball", source=7)
    with pytest.raises(VideoError, match="does not exist"):
        editor.stream("a red ball", source=tmp_path / "none.mp4")
    options: dict[str, Any] = {"config": config, "store": tmp_path / "s"}
    with editor.stream("a red ball", source=frames, **options) as stream:
        next(stream.blocks())
    with pytest.raises(StorageError, match="whose source is"):
        editor.stream("a red ball", source=255 - frames, resume=True, **options)


@pytest.mark.parametrize("policy", ["memrope", "sink", "window"])
def test_a_new_prompt_has_the_recent_frames_seen_again(
    editor: Engine, config: StreamConfig, frames: Tensor, tmp_path: Path, policy: Any
) -> None:
    plain = dataclasses.replace(config, policy=policy, snapshot_blocks=2)
    again = dataclasses.replace(plain, recache=True)
    first = list(_made(editor.stream(seed=4, config=plain, source=frames)))
    other = list(_made(editor.stream(seed=4, config=again, source=frames)))
    assert _same(other[:3], first) and not torch.equal(other[3].frames, first[3].frames)
    for stop in (3, 4):
        options: dict[str, Any] = {"seed": 4, "config": again, "source": frames}
        store = tmp_path / str(stop)
        stream = editor.stream(**options, store=store)
        list(_made(stream, stop))
        # a block that was begun keeps its prompt
        events = stream.events()
        stream.prompt = PROMPTS[stop]
        while not isinstance(next(events), StepDone):
            pass
        stream.prompt = "a ball"
        events.close()
        assert next(stream.blocks(stop + 1)).prompt == PROMPTS[stop]
        stream.close()
        with editor.stream(**options, store=store, resume=True) as stream:
            assert _same(list(_made(stream)), other)


def test_recaching_is_a_forward_of_the_clean_latents(editor: Engine, config: StreamConfig) -> None:
    """K and V of the blocks that are held whole become what the new prompt gives them."""
    model, shape = editor.transformer, editor.checkpoint.config
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 1, 32, 2, 4, 6, generator=generator)
    texts = [editor.text_embedding(words) for words in ("a red ball", "the ball rolls")]
    config = dataclasses.replace(config, policy="window", window=6)
    caches = [StreamCache(shape, (4, 6), config) for _ in texts]
    for cache, text in zip(caches, texts, strict=True):
        for part in latents:
            cache.begin_block()
            block_velocity(model, cache, part, 0.0, text)
    changed, expected = caches
    changed.clear_text()
    for later, part in zip((2, 1, 0), latents, strict=True):
        with changed.before(2 * later):
            block_velocity(model, changed, part, 0.0, texts[1])
    assert changed.num_frames == 6
    stored, wanted = changed.tensors(), expected.tensors()
    assert all(torch.equal(stored[name], wanted[name]) for name in wanted)


def test_a_stream_that_does_not_fit(
    editor: Engine, causal_editor_folder: Path, config: StreamConfig, frames: Tensor
) -> None:
    """Refused before it begins, with the window that would fit; what is kept is as predicted."""
    wide = dataclasses.replace(config, window=40, recache=True)
    stages = dict.fromkeys((8, 20, 40), 0)
    for window in stages:
        found = editor.budget.predict_stream(dataclasses.replace(wide, window=window))
        stages[window] = found.peak
    assert stages[8] < stages[20] < stages[40]
    tight = EngineConfig(memory_limit_bytes=stages[20])
    engine = Engine.from_pretrained(causal_editor_folder, device="cpu", config=tight)
    with pytest.raises(MemoryBudgetError, match=r"this stream needs [\d,]+ bytes .*window=20 fits"):
        engine.stream("a red ball", config=wide, source=frames)
    fits = dataclasses.replace(wide, window=20)
    stream = engine.stream("a red ball", config=fits, source=frames)
    list(stream.blocks(3))
    kept = vae_stream_bytes(engine.vae, 2, (32, 48))
    assert stream.encoder is not None
    assert stream.encoder.num_bytes == kept.encoder_past
    assert stream.decoder.num_bytes == kept.decoder_past
    # all of the cache is in the prediction, beside the weights
    weights = module_bytes(engine.transformer) + module_bytes(engine.vae.model)
    assert stages[20] > weights + stream.cache.num_bytes + kept.encoder_past
    tiny = EngineConfig(memory_limit_bytes=stages[8] // 2)
    engine = Engine.from_pretrained(causal_editor_folder, device="cpu", config=tiny)
    with pytest.raises(MemoryBudgetError, match="no smaller window fits either"):
        engine.stream("a red ball", source=frames)
