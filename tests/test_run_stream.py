"""`run stream`: an mp4 that grows, the folder beside it, and what ends a stream."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import av
import pytest
import torch

from mv2v_engine import Engine, run
from mv2v_engine.engine.stream_folder import StreamFolder
from mv2v_engine.video.fragments import fragment_ends
from mv2v_engine.video.io import VideoReader

Capture = pytest.CaptureFixture[str]
# 5 frames, then 8 a block, at 16 a second: two seconds are 37 frames, in five blocks
WORDS = ["stream", "--prompt", "a red ball", "--then", "1", "the ball rolls", "--device", "cpu"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, causal_folder: Path) -> Path:
    """A folder with video.mp4 and its stream, of one run."""
    folder = tmp_path_factory.mktemp("unbroken")
    where = ["--out", str(folder / "video.mp4"), "--checkpoint", str(causal_folder)]
    assert run.main([*WORDS, *where, "--seconds", "2", "--quiet"]) == 0
    return folder


def test_a_video_and_its_report(unbroken: Path) -> None:
    video, store = unbroken / "video.mp4", StreamFolder(unbroken / "video.stream")
    about = VideoReader(video).info
    assert (about.num_frames, about.fps, about.width, about.height) == (37, 16, 48, 32)
    assert len(fragment_ends(video)) == store.num_blocks == 5
    # 16 frames in: the block that begins at frame 21 is the first of the second prompt
    assert [store.read_block(n)[1] for n in (1, 3, 4, 5)] == [
        *["a red ball"] * 2,
        *["the ball rolls"] * 2,
    ]
    report = json.loads((store.folder / "report.json").read_text())
    assert report["frames"] == 37 and report["made_now"]["blocks"] == 5
    assert report["latency"]["block_seconds_p99"] > 0


def test_it_goes_on_with_the_same_bytes(
    unbroken: Path, causal_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    where = ["--out", str(tmp_path / "video.mp4"), "--checkpoint", str(causal_folder)]
    assert run.main([*WORDS, *where, "--seconds", "1", "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / "video.mp4"),
        str(tmp_path / "video.stream" / "report.json"),
    ]
    # the last fragment is torn, as by a kill while it was written
    video = tmp_path / "video.mp4"
    video.write_bytes(video.read_bytes()[:-50])
    assert run.main([*WORDS, *where, "--seconds", "2", "--resume"]) == 0
    assert video.read_bytes() == (unbroken / "video.mp4").read_bytes()
    # what is gone is made again from the folder
    video.unlink()
    assert run.main([*WORDS, *where, "--seconds", "2", "--resume"]) == 0
    assert video.read_bytes() == (unbroken / "video.mp4").read_bytes()


def test_a_prompt_that_comes_too_late(
    unbroken: Path, causal_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Nothing is left to make for it, which is said, and all stays as it was."""
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    files = [tmp_path / "video.mp4", tmp_path / "video.stream" / "report.json"]
    before = [path.read_bytes() for path in files]
    where = ["--out", str(files[0]), "--checkpoint", str(causal_folder), "--resume"]
    words = ["a blue box" if word == "the ball rolls" else word for word in WORDS]
    assert run.main([*words, *where, "--seconds", "2"]) == 2
    said = capsys.readouterr().err
    assert "last block was made for 'the ball rolls', so the prompt 'a blue box' changes" in said
    assert [path.read_bytes() for path in files] == before
    # of a stream that grows it holds for what is made
    assert run.main([*words, *where, "--seconds", "2.5", "--quiet"]) == 0
    assert StreamFolder(tmp_path / "video.stream").read_block(6).prompt == "a blue box"


def test_killed_and_resumed(unbroken: Path, causal_folder: Path, tmp_path: Path) -> None:
    """Killed without warning once two blocks are there."""
    video = tmp_path / "video.mp4"
    words = [*WORDS, "--out", str(video), "--checkpoint", str(causal_folder), "--quiet"]
    command = [sys.executable, "-m", "mv2v_engine.run", *words, "--resume"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _await_blocks(video, 2)
        process.kill()
    assert StreamFolder(tmp_path / "video.stream").num_blocks >= 2
    # so much there is to play, whatever a player makes of the fragment that is torn
    with av.open(str(video)) as file:
        assert sum(1 for _ in file.decode(video=0)) >= 5 + 8
    assert run.main([*words, "--resume", "--seconds", "2"]) == 0
    expected = (unbroken / "video.mp4").read_bytes()
    assert video.read_bytes()[: len(expected)] == expected


def test_interrupted_and_resumed(
    unbroken: Path, causal_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Ctrl-C between two steps; the video plays while it grows."""
    video = tmp_path / "video.mp4"
    words = [*WORDS, "--out", str(video), "--checkpoint", str(causal_folder), "--quiet"]
    seen: list[float] = []

    def press() -> None:
        _await_blocks(video, 2)
        with av.open(str(video)) as file:
            seen.extend(float(frame.time) for frame in file.decode(video=0))
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    code = run.main(words)
    presser.join()
    said = capsys.readouterr().err
    assert code == 130 and said.startswith("interrupted: "), said
    assert "continue with: python -m mv2v_engine.run stream" in said
    assert len(seen) >= 13 and seen == pytest.approx([n / 16 for n in range(len(seen))])
    assert run.main([*words, "--resume", "--seconds", "2"]) == 0
    expected = (unbroken / "video.mp4").read_bytes()
    assert video.read_bytes()[: len(expected)] == expected


def _await_blocks(video: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(fragment_ends(video)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_a_user_says_is_causal(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    shape = {"camera_conditioning": "none", "tokenizers": (), "merger": None, "num_layers": 1}
    folder = make_checkpoint(tmp_path / "plain", name="plain", has_text=True, **shape)
    where = ["--out", str(tmp_path / "video.mp4"), "--checkpoint", str(folder), "--causal"]
    more = ["--seconds", "0.5", "--policy", "sink", "--sink", "1", "--window", "6"]
    assert run.main([*WORDS, *where, *more]) == 0
    assert VideoReader(tmp_path / "video.mp4").info.num_frames == 9
    report = json.loads((tmp_path / "video.stream" / "report.json").read_text())
    settings = report["settings"]
    assert [settings[name] for name in ("policy", "sink_frames", "window")] == ["sink", 1, 6]


def test_a_reader_who_leaves_ends_the_stream(causal_folder: Path, tmp_path: Path) -> None:
    words = [*WORDS, "--out", "-", "--store", str(tmp_path / "s"), "--checkpoint"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mv2v_engine.run", *words, str(causal_folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    begin = process.stdout.read(2000)
    assert begin[4:8] == b"ftyp"
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait() == 0
    assert "the reader has left: " in said and "continue with: python -m" in said
    assert "Traceback" not in said and "Exception" not in said
    store = StreamFolder(tmp_path / "s")
    assert store.num_blocks >= 1
    for number in range(1, store.num_blocks + 1):
        store.read_block(number)


@pytest.fixture
def refused(tmp_path: Path, causal_folder: Path, capsys: Capture) -> Callable[..., str]:
    """Runs the command with something wrong; returns the one line that it ends with."""

    def check(*more: str, out: str = "video.mp4", checkpoint: Path = causal_folder) -> str:
        before = sorted(tmp_path.rglob("*"))
        where = ["--out", out if out == "-" else str(tmp_path / out)]
        where += ["--checkpoint", str(checkpoint), "--seconds", "1"]
        code = run.main([*WORDS, *where, *more])
        captured = capsys.readouterr()
        assert code == 2 and captured.out == "", captured
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        assert sorted(tmp_path.rglob("*")) == before
        return captured.err

    return check


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--prompt", "a red ball " * 4], "the prompt has 13 tokens, the model reads 8"),
        (["--then", "2", "ball " * 9], "the prompt has 10 tokens, the model reads 8"),
        (["--then", "1", "again"], "each from a later second; got 1 after 1"),
        (["--then", "soon", "a ball"], "--then: the second must be a finite number, got 'soon'"),
        (["--seconds", "0"], "must be more than 0 seconds, got '0'"),
        (["--window", "4"], "a window of 4 latent frames cannot hold the 4"),
        (["--policy", "fifo"], "invalid choice: 'fifo'"),
        (["--policy", "history"], "--policy history takes a history encoder, and causal has none"),
        (["--history-rate", "4x2x2"], "a rate of history tokens is ROWSxCOLUMNSxFRAMES"),
        (["--seed", "-1"], "seed must lie in 0"),
        (["--device", "tpu"], "device 'tpu' cannot be used"),
    ],
)
def test_what_is_refused(refused: Callable[..., str], more: list[str], said: str) -> None:
    assert said in refused(*more)


def test_a_model_or_a_place_that_is_refused(
    refused: Callable[..., str],
    tiny_checkpoint: Path,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    unbroken: Path,
) -> None:
    assert "tiny renders novel views" in refused(checkpoint=tiny_checkpoint)
    plain = {"camera_conditioning": "none", "tokenizers": (), "merger": None}
    folder = make_checkpoint(tmp_path_factory.mktemp("plain") / "plain", name="plain", **plain)
    words = refused(checkpoint=folder)
    assert "plain looks at all frames at once" in words
    assert words.rstrip().endswith("load it with --causal")
    assert "written as H.264 in .mp4" in refused(out="video.mov")
    assert "name a folder with --store" in refused("--resume", out="-")
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    assert "already holds a stream; continue it with --resume" in refused()
    assert "a stream whose seed is 0, this one's is 1" in refused("--resume", "--seed", "1")
    shutil.rmtree(tmp_path / "video.stream")
    assert "video.mp4 exists and belongs to no stream" in refused()


EDIT = ["--prompt", "a red ball", "--then", "1", "the ball rolls", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def edited(
    tmp_path_factory: pytest.TempPathFactory, causal_editor_folder: Path, long_clip: Path
) -> Path:
    """A folder with video.mp4 and its stream: 23 frames at 12.5 a second, the last block's 2."""
    folder = tmp_path_factory.mktemp("edited")
    where = ["--out", str(folder / "video.mp4"), "--checkpoint", str(causal_editor_folder)]
    assert run.main(["stream", str(long_clip), *EDIT, *where]) == 0
    return folder


def test_a_file_is_edited_to_its_end(
    edited: Path, causal_editor_folder: Path, long_clip: Path, tmp_path: Path
) -> None:
    about = VideoReader(edited / "video.mp4").info
    assert (about.num_frames, about.fps, about.width, about.height) == (23, 12.5, 48, 32)
    store = StreamFolder(edited / "video.stream")
    assert [store.read_block(n)[1] for n in (2, 3, 4)] == [
        "a red ball",
        "the ball rolls",
        "the ball rolls",
    ]
    report = json.loads((store.folder / "report.json").read_text())
    assert report["frames"] == 23 and report["source"]["name"] == "long.mp4"
    # stopped on the way and taken up
    where = ["--out", str(tmp_path / "video.mp4"), "--checkpoint", str(causal_editor_folder)]
    words = ["stream", str(long_clip), *EDIT, *where]
    assert run.main([*words, "--seconds", "1"]) == 0
    assert VideoReader(tmp_path / "video.mp4").info.num_frames == 13
    assert run.main([*words, "--resume"]) == 0
    assert (tmp_path / "video.mp4").read_bytes() == (edited / "video.mp4").read_bytes()


@pytest.fixture
def piped(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Callable[..., tuple[int, bytes, str]]:
    """Runs the command with bytes that come by a pipe: the exit code, stdout, stderr."""

    def call(data: bytes, *words: str) -> tuple[int, bytes, str]:
        reads, writes = os.pipe()

        def send() -> None:
            with suppress(BrokenPipeError), os.fdopen(writes, "wb") as file:
                file.write(data)

        sender = threading.Thread(target=send)
        sender.start()
        with os.fdopen(reads, "r") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            code = run.main(["stream", "-", *EDIT, *words])
        sender.join()
        captured = capfdbinary.readouterr()
        return code, captured.out, captured.err.decode()

    return call


def test_pipes(
    piped: Callable[..., tuple[int, bytes, str]],
    edited: Path,
    causal_editor_folder: Path,
    long_clip: Path,
    tmp_path: Path,
) -> None:
    """Raw frames in and out of a pipe, and an encoded video into one."""
    frames = VideoReader(long_clip).read(range(23))
    raw = frames.numpy().tobytes()
    model = ["--checkpoint", str(causal_editor_folder)]
    more = ["--source-size", "48x32", "--fps", "12.5", "--out", "-", "--raw"]
    code, out, said = piped(raw + b"cut off", *model, *more)
    assert (code, said) == (0, "raw frames: rgb24, 48x32, 12.5 a second\n")
    got = torch.frombuffer(bytearray(out), dtype=torch.uint8).reshape(23, 32, 48, 3)
    # to the bit what the file gave
    shutil.copytree(edited / "video.stream", tmp_path / "s")
    engine = Engine.from_pretrained(causal_editor_folder, device="cpu")
    options = {"source": long_clip, "store": tmp_path / "s", "resume": True}
    with engine.stream("a red ball", **options) as stream:
        stream.rewind()
        assert torch.equal(got, torch.cat([block.frames for block in stream.blocks()]))
    # a fragmented mp4, as this program writes it, is read without going back
    encoded = (edited / "video.mp4").read_bytes()
    code, _, said = piped(encoded, *model, "--out", str(tmp_path / "again.mp4"))
    assert (code, said) == (0, "")
    about = VideoReader(tmp_path / "again.mp4").info
    assert (about.num_frames, about.fps) == (23, 12.5)
    for nothing in (b"no video", b""):
        code, out, said = piped(nothing, *model, "--out", "-")
        assert (code, out) == (2, b"") and "cannot be read as video" in said


def test_what_an_edit_refuses(
    refused: Callable[..., str],
    causal_editor_folder: Path,
    long_clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = refused(checkpoint=causal_editor_folder)
    expected = "and there is nothing to edit; give it a source: a video, or frames as they come"
    assert f"causal_editor edits by instruction, {expected}\n" in said
    assert "takes no source" in refused(str(long_clip))
    assert "give --out -" in refused("--raw")
    assert "and there is none" in refused("--source-size", "48x32")
    assert "must be WIDTHxHEIGHT, as 832x480, got '48'" in refused("--source-size", "48")
    gone = str(tmp_path / "gone.mp4")
    assert "does not exist; give a video file" in refused(gone, checkpoint=causal_editor_folder)
    null = refused("/dev/null", checkpoint=causal_editor_folder)
    assert "/dev/null cannot be read as video" in null
    raw = ["--source-size", "48x32"]
    folder = refused(str(tmp_path), *raw, out="-", checkpoint=causal_editor_folder)
    assert "raw frames cannot be read any further: Is a directory" in folder
    monkeypatch.setattr(sys, "stdin", None)
    assert "stdin is closed" in refused("-", *raw, checkpoint=causal_editor_folder)


def test_a_stdout_that_is_closed(causal_folder: Path) -> None:
    """It was closed before the program began: nothing is made for nobody."""
    words = [sys.executable, "-m", "mv2v_engine.run", "stream", "--prompt", "a ball", "--out", "-"]
    words += ["--checkpoint", str(causal_folder), "--seconds", "1"]
    close = 'exec "$@" >&-'
    ended = subprocess.run(["sh", "-c", close, "sh", *words], stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert "--out - writes to stdout, and it is closed; give it a pipe" in ended.stderr
