"""Long edits: every frame once, windows with noise of their own, what is refused and kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mv2v_engine import CancelToken, Engine, EngineConfig
from mv2v_engine.engine.source import open_long_source
from mv2v_engine.engine.turn import FinishedWindow
from mv2v_engine.engine.window import window_seed
from mv2v_engine.errors import CancelledError, MemoryBudgetError, RequestError, VideoError
from mv2v_engine.progress import Event, Preview, StepDone, WindowDone, WindowStarted
from mv2v_engine.sampling.flow_match import initial_noise
from mv2v_engine.video.io import VideoReader, probe_video, read_video, write_video
from mv2v_engine.video.transforms import cover_and_crop
from mv2v_engine.video.windows import edit_windows
from tests.engine.editing.conftest import SIZE, WINDOW, long_clip
from tests.engine.test_faults import Countdown
from tests.video.conftest import write_clip

PROMPT = "a red ball"


@pytest.mark.parametrize(("num_frames", "fps"), [(1, 8), (3, 25), (5, 12.5), (6, 8), (13, 24)])
def test_as_many_frames_as_the_source_and_as_fast(
    editor: Engine, tmp_path: Path, num_frames: int, fps: float
) -> None:
    clip, out = tmp_path / "clip.mp4", tmp_path / "out.mp4"
    write_video(clip, long_clip(num_frames), fps)
    session = editor.session(clip, cuts=())
    turn = session.edit(PROMPT, num_inference_steps=1, out=out)
    assert turn.frames.shape == (num_frames, *SIZE, 3) and turn.fps == fps
    assert turn.latents.shape == (-(-num_frames // WINDOW), 16, 2, 4, 6)
    turn.save(tmp_path / "saved.mp4")
    assert out.read_bytes() == (tmp_path / "saved.mp4").read_bytes()
    found = probe_video(out)
    assert (found.num_frames, found.fps) == (num_frames, fps)
    assert turn.trajectory is None and session.turns == [turn]


def test_windows_are_stitched_without_a_frame_twice(editor: Engine) -> None:
    seen: list[FinishedWindow] = []
    session = editor.session(long_clip(13), cuts=())
    turn = session.edit(PROMPT, on_window=seen.append)
    assert [each.window for each in seen] == list(session.windows)
    assert [(each.window.start, len(each.new_frames)) for each in seen] == [(0, 5), (5, 5), (8, 3)]
    for number, each in enumerate(seen):
        assert torch.equal(each.latents, turn.latents[number])
        assert torch.equal(each.frames, editor.vae.decode(each.latents))
        assert each.report is turn.report["windows"][number]
    assert torch.equal(turn.frames, torch.cat([each.new_frames for each in seen]))


@pytest.mark.parametrize("size", [SIZE, (50, 90)], ids=["same size", "scaled"])
def test_a_stream_gives_the_frames_that_a_whole_reading_does(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, long_clip(29, size=size), 12)
    whole, _ = cover_and_crop(read_video(path).frames, SIZE)
    settings = {"size": SIZE, "fps": None, "own_fps": 8.0, "max_pixels": 1 << 20}
    windows = edit_windows(29, WINDOW, cuts=(3, 11))
    for source in (path, read_video(path).frames, read_video(path).frames.numpy()):
        video = open_long_source(source, **settings)
        # in order, from the middle of it on, and back
        for window in (*windows, *windows[4:], windows[1]):
            assert torch.equal(video.window(window), whole[list(window.indices)])
            assert len(video._held) <= WINDOW
    assert video.fps == 8.0 and len(list(VideoReader(path).frames(20))) == 9


def test_windows_have_noise_of_their_own(editor: Engine) -> None:
    shape = (1, 16, 2, 4, 6)
    noises = [
        initial_noise(shape, window_seed(seed, number)) for seed in (0, 1) for number in range(50)
    ]
    assert len({noise.numpy().tobytes() for noise in noises}) == 100
    # a source that stands still differs by nothing else
    still = long_clip(5)[:1].expand(10, -1, -1, -1)
    first, second = editor.session(still, cuts=()).edit(PROMPT, memory="none").latents
    assert not torch.equal(first, second)
    one, again, other = (
        editor.session(still, cuts=()).edit(PROMPT, seed=seed).latents for seed in (0, 0, 1)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_the_words_and_the_source_count(editor: Engine) -> None:
    session = editor.session(long_clip(10), cuts=())
    red = session.edit(PROMPT)
    floor = session.edit("the floor")
    assert [turn.number for turn in session.turns] == [1, 2]
    assert not torch.equal(red.latents[0], floor.latents[0])
    # asked again, a finished edit is given again
    assert session.edit(PROMPT) is red
    other = editor.session(long_clip(10, seed=1), cuts=()).edit(PROMPT)
    assert not torch.equal(red.latents[0], other.latents[0])
    guided = session.edit(PROMPT, guidance_scale=3.0)
    assert not torch.equal(red.latents[0], guided.latents[0])
    assert guided.report["windows"][0]["forwards"] == 4


def test_progress_runs_over_all_windows(editor: Engine) -> None:
    events: list[Event] = []
    editor.session(long_clip(13), cuts=()).edit(PROMPT, on_progress=events.append)
    started = [event for event in events if isinstance(event, WindowStarted)]
    done = [event for event in events if isinstance(event, WindowDone)]
    assert [(each.number, each.total) for each in started] == [(1, 3), (2, 3), (3, 3)]
    assert [each.number for each in done] == [1, 2, 3]
    assert done[0].seconds_left > 0 and done[-1].seconds_left == 0
    assert sum(isinstance(event, StepDone) for event in events) == 6
    assert isinstance(events[0], WindowStarted) and isinstance(events[-1], WindowDone)


def test_every_window_has_previews(editor: Engine) -> None:
    events: list[Event] = []
    session = editor.session(long_clip(13), cuts=())
    turn = session.edit(PROMPT, on_progress=events.append, previews=True)
    pictures = [event.picture for event in events if isinstance(event, Preview)]
    assert len(pictures) == 6 and session._runner.fitted is not None
    for window, latents in enumerate(turn.latents):
        expected = session._runner.fitted.picture(latents[:, latents.shape[1] // 2])
        assert int((pictures[2 * window + 1].int() - expected.int()).abs().max()) <= 1


def test_the_report_says_what_every_window_did(editor: Engine) -> None:
    session = editor.session(long_clip(17), cuts=(12,), fps=6.0)
    report = session.edit(PROMPT, seed=3).report
    assert report["prompt"] == PROMPT and report["seed"] == 3
    assert report["source"]["frames"] == 17 and report["source"]["cuts"] == [12]
    assert report["source"]["fps"] == 6.0
    assert (report["num_windows"], report["window_starts"]) == (4, [0, 5, 7, 12])
    assert (report["shots"], report["window_frames"]) == (2, WINDOW)
    assert report["memory"]["descriptor"] == {"kind": "latents"}
    rows = report["windows"]
    assert [row["new_frames"] for row in rows] == [[0, 5], [5, 10], [10, 12], [12, 17]]
    assert [row["shot"] for row in rows] == [1, 1, 1, 2]
    assert [len(row["memory"]["retrieved"]) for row in rows] == [0, 1, 2, 0]
    assert rows[2]["plan"]["tokens_by_kind"] == {"target": 12, "source": 0, "memory": 8}
    assert set(rows[2]["merged_frames"][0]["frames"]) <= {"window 1", "window 2"}
    assert report["flops"] == sum(row["flops"] for row in rows)
    for stage in ("video", "vae", "text", "memory", "sampling"):
        total = sum(row["seconds"][stage] for row in rows)
        assert report["seconds"][stage] == pytest.approx(total, abs=1e-3)
    alone, remembering, _ = report["full_size"]
    assert (alone["memory"], alone["windows"], alone["tokens"]) == (0, 2, 8190)
    # 21 latent frames of 30 x 52, padded to 1x4x4
    assert remembering["tokens"] == 8190 + 21 * 8 * 13
    assert (remembering["memory"], remembering["windows"]) == (1, 1)
    assert remembering["flops"] > alone["flops"] > 1e14


def test_a_cut_at_every_frame_makes_every_frame_a_window(editor: Engine) -> None:
    turn = editor.session(long_clip(4), cuts=(1, 2, 3)).edit(PROMPT, num_inference_steps=1)
    assert turn.frames.shape[0] == 4 and turn.report["num_windows"] == 4
    assert not any(row["memory"]["retrieved"] for row in turn.report["windows"])


def test_a_frame_of_another_size_ends_the_edit_and_no_window_is_lost(
    editor: Engine, tmp_path: Path
) -> None:
    # two streams of different sizes, one after the other in one file
    parts = [
        write_clip(tmp_path / f"{number}.h264", num_frames=10, size=size, options={"bf": "0"})
        for number, size in enumerate([SIZE, (64, 64)])
    ]
    clip = tmp_path / "clip.h264"
    clip.write_bytes(b"".join(part.read_bytes() for part in parts))
    words = r"changes its frame size from 48x32 to 64x64; re-encode it at one size"
    with pytest.raises(VideoError, match=words):
        editor.session(clip)
    session = editor.session(clip, cuts=())
    for _ in range(2):
        with pytest.raises(VideoError, match=words):
            session.edit(PROMPT, num_inference_steps=1, out=tmp_path / "out.mp4")
        ((request, done),) = session.unfinished
        assert request.prompt == PROMPT and done == 2 and not session.turns
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.h264", "1.h264", "clip.h264"]


def test_what_an_editor_refuses(editor: Engine, engine: Engine, tmp_path: Path) -> None:
    session = editor.session(long_clip(5), cuts=())
    for prompt in ("", "  \n"):
        with pytest.raises(RequestError, match="an edit needs an instruction, got the prompt"):
            session.edit(prompt)
    with pytest.raises(RequestError, match="the prompt has 9 tokens, the model reads 8; shorten"):
        session.edit("the red ball rolls the red ball rolls")
    assert session.edit("the red ball rolls the red ball", num_inference_steps=1)
    with pytest.raises(RequestError, match="memory must be one of 'retrieved', 'none'"):
        session.edit(PROMPT, memory="previous")
    with pytest.raises(RequestError, match="num_inference_steps must lie in"):
        session.edit(PROMPT, num_inference_steps=0)
    with pytest.raises(RequestError, match=r"editor edits by instruction.*tiny-nvs"):
        session.render("pan_right")
    with pytest.raises(RequestError, match="editor edits by instruction, leave out window"):
        editor.session(long_clip(5), window="first")
    views = engine.session(long_clip(9, size=(48, 64)))
    with pytest.raises(RequestError, match="tiny renders novel views and takes no instruction"):
        views.edit(PROMPT)
    with pytest.raises(RequestError, match="tiny renders novel views, leave out cuts"):
        engine.session(long_clip(9, size=(48, 64)), cuts=())
    with pytest.raises(VideoError, match="with at least 1 frame"):
        editor.session(long_clip(5)[:0])
    with pytest.raises(VideoError, match=r"cuts must increase within 1\.\.4"):
        editor.session(long_clip(5), cuts=(5,))
    with pytest.raises(RequestError, match="resume needs the session's folder"):
        editor.session(long_clip(5), resume=True)
    drawing = editor.reconfigured(EngineConfig(memory_ranking="random"))
    with pytest.raises(RequestError, match="memory_ranking='random' draws novel views"):
        drawing.session(long_clip(5))
    with pytest.raises(VideoError, match="does not exist"):
        editor.session(tmp_path / "none.mp4")


def test_an_editor_without_words_is_refused(editor_folder: Path) -> None:
    loaded = Engine.from_pretrained(editor_folder, device="cpu")
    wordless = Engine(
        loaded.checkpoint, loaded.vae, None, device=loaded.device, config=EngineConfig()
    )
    with pytest.raises(RequestError, match="editor has no text encoder, and an edit needs"):
        wordless.session(long_clip(5))


def test_cancelled_anywhere_it_goes_on_to_the_same_bits(editor: Engine, tmp_path: Path) -> None:
    frames, out = long_clip(8), tmp_path / "out.mp4"
    expected = editor.session(frames, cuts=()).edit(PROMPT, num_inference_steps=1, out=out)
    whole = out.read_bytes()
    out.unlink()
    checks, seen = 0, set()
    while True:
        checks += 5
        session = editor.session(frames, cuts=())
        try:
            session.edit(PROMPT, num_inference_steps=1, out=out, cancel=Countdown(checks))
            break
        except CancelledError:
            pass
        assert not list(tmp_path.iterdir()) and not len(editor.cache)
        seen.add(sum(done for _, done in session.unfinished))
        events: list[Event] = []
        turn = session.edit(PROMPT, num_inference_steps=1, out=out, on_progress=events.append)
        assert torch.equal(turn.latents, expected.latents) and out.read_bytes() == whole
        assert not session.unfinished
        # finished windows are not run again
        left = 2 - sum(isinstance(event, WindowDone) for event in events)
        assert left in seen
        out.unlink()
    assert seen == {0, 1, 2} and checks > 20


def test_the_look_for_cuts_ends_when_cancelled(editor: Engine, tmp_path: Path) -> None:
    frames, token = long_clip(12), Countdown(4)
    with pytest.raises(CancelledError):
        editor.session(frames, store=tmp_path / "edits", cancel=token)
    # at the very frame, and nothing is begun in the folder
    assert token.left == 0
    session = editor.session(frames, store=tmp_path / "edits", cancel=CancelToken())
    assert session.cuts == editor.session(frames).cuts


def test_an_edit_that_is_let_go_of_leaves_nothing_behind(editor: Engine, tmp_path: Path) -> None:
    session = editor.session(long_clip(10), cuts=())
    events = session.events(session.request(prompt=PROMPT), out=tmp_path / "out.mp4")
    while not isinstance(next(events), WindowDone):
        pass
    assert len(editor.cache) == 1 and len(list(tmp_path.iterdir())) == 1
    events.close()
    assert not len(editor.cache) and not list(tmp_path.iterdir())
    assert session.unfinished[0][1] == 1


def test_a_window_that_cannot_fit_is_refused_before_it_runs(editor_folder: Path) -> None:
    loaded = Engine.from_pretrained(editor_folder, device="cpu")
    plans = loaded.session(long_clip(15), cuts=()).plans()
    assert [plan.num_memory for plan in plans] == [0, 1, 2]
    assert [row["tokens"] for row in loaded.warmup(plans)] == [20, 16, 12]
    need = [loaded.budget.predict(plan).stages["sampling"] for plan in plans]
    assert need[0] < need[2] <= loaded.budget.predict(loaded.budget.largest_plan()).peak
    tight = loaded.reconfigured(EngineConfig(memory_limit_bytes=1 << 10))
    session = tight.session(long_clip(15), cuts=())
    with pytest.raises(MemoryBudgetError, match=r"needs .* bytes of cpu in its stage"):
        session.edit(PROMPT)
    assert not session.unfinished


def test_memory_that_ends_in_the_midst_of_a_window(
    editor: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = editor.session(long_clip(10), cuts=())
    encode, calls = editor.vae.encode, []

    def failing(*given: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return encode(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(editor.vae, "encode", failing)
    words = r"no memory left in the stage 'vae'.*window 2 is dropped, finished ones are kept"
    with pytest.raises(MemoryBudgetError, match=words):
        session.edit(PROMPT)
    assert session.unfinished[0][1] == 1
    turn = session.edit(PROMPT)
    expected = editor.session(long_clip(10), cuts=()).edit(PROMPT)
    assert torch.equal(turn.latents, expected.latents)


def test_every_frame_and_the_sound_of_a_clip_with_a_pause(editor: Engine, tmp_path: Path) -> None:
    clip, out = tmp_path / "clip.mkv", tmp_path / "out.mp4"
    stamps = [40 * index + 480 * (index > 6) for index in range(13)]
    write_clip(clip, num_frames=13, size=SIZE, stamps_ms=stamps, audio=True)
    session = editor.session(clip, cuts=())
    turn = session.edit(PROMPT, num_inference_steps=1, out=out)
    turn.save(tmp_path / "saved.mp4")
    assert out.read_bytes() == (tmp_path / "saved.mp4").read_bytes()
    found = VideoReader(out)
    assert (found.info.num_frames, found.info.fps) == (25, 25)
    assert found.sound is not None and found.sound.codec == "aac"
    assert turn.report["source"]["notes"] == [
        "its frame rate varies: at 25 frames a second, held frames are repeated (13 became 25)",
        "its sound (aac) is copied",
    ]
    slower = editor.session(clip, cuts=(), fps=12.5)
    assert slower.source.sound is None
    assert slower.source.describe()["notes"][1:] == [
        "its 25 frames a second are taken for 12.5",
        "its sound does not fit another rate, and is dropped",
    ]


def test_sizes_are_those_of_the_weights(editor: Engine, tmp_path: Path) -> None:
    clip = long_clip(5, size=(48, 32))
    config = editor.config
    boxed = editor.reconfigured(replace(config, source_fit="letterbox")).session(clip, cuts=())
    assert "between black bars of" in boxed.source.describe()["crop"]
    whole = editor.session(clip, cuts=())
    assert boxed.source.fingerprint != whole.source.fingerprint
    turned = SIZE[::-1]
    with pytest.raises(RequestError, match=rf"was made for {SIZE[0]}x{SIZE[1]} .height x width."):
        editor.reconfigured(replace(config, size=turned))
    sampling = replace(editor.checkpoint.sampling, sizes=(turned,))
    either = Engine(
        replace(editor.checkpoint, sampling=sampling),
        editor.vae,
        editor.text,
        device=editor.device,
        config=replace(config, size=turned),
    )
    turn = either.session(clip, cuts=()).edit(PROMPT, num_inference_steps=1)
    assert turn.frames.shape == (5, *turned, 3)
    # sessions of both kinds on one engine, which share its memory
    other = either.session(clip, cuts=(), size=SIZE)
    assert other.edit(PROMPT, num_inference_steps=1).frames.shape == (5, *SIZE, 3)
    assert other.parts.cache is either.cache and either.sampling.size == turned
    with pytest.raises(RequestError, match="was made for"):
        either.session(clip, size=(16, 16))
