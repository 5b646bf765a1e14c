"""The command line end to end, in this process and in others."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mv2v_engine import run
from mv2v_engine.camera.files import save_trajectory
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.video.io import read_video, write_video
from tests.conftest import has_products
from tests.folders import DAMAGES, contents
from tests.torch_state import num_threads

ROOT = Path(__file__).resolve().parents[1]
CAMERAS = ("pan_right", "arc_left", "pan_right")
VIDEOS = ("turn_01_pan_right.mp4", "turn_02_arc_left.mp4", "turn_03_pan_right.mp4")
BESIDE = ("overview.png", "report.json", "session.json")
GIB = 1 << 30

Capture = pytest.CaptureFixture[str]
Render = Callable[..., int]


def novel_view(
    clip: Path, checkpoint: Path, out: Path, cameras: Sequence[str] = CAMERAS, *more: str
) -> list[str]:
    asked = [word for camera in cameras for word in ("--camera", camera)]
    where = ["--out", str(out), "--checkpoint", str(checkpoint), "--device", "cpu"]
    return ["novel-view", str(clip), *asked, *where, *more]


def in_process(arguments: list[str], **changes: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "mv2v_engine.run", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MV2V_NUM_THREADS": str(torch.get_num_threads())},
        **changes,
    )


@pytest.fixture
def render(source_clip: Path, tiny_checkpoint: Path) -> Callable[..., int]:
    """Runs novel-view; returns its exit code."""

    def do(out: Path, cameras: Sequence[str] = CAMERAS, *more: str) -> int:
        return run.main(novel_view(source_clip, tiny_checkpoint, out, cameras, *more))

    return do


def latents(out: Path) -> list[Tensor]:
    return [load_file(path)["latents"] for path in sorted((out / "turns").iterdir())]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, source_clip: Path, tiny_checkpoint: Path
) -> Path:
    """The folder of three turns, made without interruption."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run.main(novel_view(source_clip, tiny_checkpoint, out)) == 0
    return out


def test_three_turns(finished: Path) -> None:
    turns = {f"turns/turn_{number:02d}.safetensors" for number in (1, 2, 3)}
    assert set(contents(finished)) == {*VIDEOS, *turns, *BESIDE}
    report = json.loads((finished / "report.json").read_text())
    remembered = [[row["turn"] for row in turn["memory"]["retrieved"]] for turn in report["turns"]]
    assert remembered == [[], [1], [1, 2]]
    assert [turn["file"] for turn in report["turns"]] == list(VIDEOS)
    for video in VIDEOS:
        assert read_video(finished / video).frames.shape == (9, 48, 64, 3)


def test_another_process_gives_the_same_in_little_memory(
    finished: Path, tmp_path: Path, source_clip: Path, tiny_checkpoint: Path
) -> None:
    process = in_process(novel_view(source_clip, tiny_checkpoint, tmp_path / "out"))
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and errors == ""
    for name in VIDEOS:
        assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes()
        assert str(tmp_path / "out" / name) in output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["peak_host_bytes"] < 1.5 * GIB


def test_what_is_printed(tmp_path: Path, render: Render, capsys: Capture) -> None:
    assert render(tmp_path / "out", CAMERAS, "--steps", "2") == 0
    output = capsys.readouterr().out
    assert "source clip.mp4: all 9 frames; 64x48 to 64x48: unscaled, nothing cropped" in output
    assert re.search(r"^turn 2/3 arc_left  sampling 1/2, 0:00 left$", output, re.M)
    header, first, _, third = re.findall(r"^ ? ? ?(?:turn|[123])  \S.*s?$", output, re.M)[-4:]
    for title in ("camera", "retrieved (score)", "target", "memory", "merged at 1", "sampling s"):
        assert title in header
    assert "none: the cache is empty" in first
    assert re.search(r"pan_right  1 \(1\.00\), 2 \(0\.\d\d\) +36 +36 +24", third)


def test_quiet_prints_the_paths_alone(tmp_path: Path, render: Render, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert render(out, ["static"], "--quiet") == 0
    written = [out / name for name in ("turn_01_static.mp4", "overview.png", "report.json")]
    captured = capsys.readouterr()
    assert captured.out.split() == [str(path) for path in written] and captured.err == ""


def test_a_preview_that_cannot_be_drawn_is_said(
    finished: Path, tmp_path: Path, render: Render, capsys: Capture
) -> None:
    assert render(tmp_path / "out", CAMERAS[:1], "--preview") == 0
    assert "no preview is drawn" in capsys.readouterr().err
    assert (tmp_path / "out" / VIDEOS[0]).read_bytes() == (finished / VIDEOS[0]).read_bytes()


def test_seeds(finished: Path, tmp_path: Path, render: Render) -> None:
    for seed in ("0", "1"):
        assert render(tmp_path / seed, CAMERAS[:1], "--seed", seed) == 0
    frames = (finished / VIDEOS[0]).read_bytes()
    assert (tmp_path / "0" / VIDEOS[0]).read_bytes() == frames
    assert not torch.equal(latents(tmp_path / "1")[0], latents(finished)[0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--memory", "none"], {"memory": "none", "retrieved": 0}),
        (["--memory", "previous"], {"memory": "previous", "retrieved": 0}),
        (["--max-memory", "1"], {"memory": "retrieved", "retrieved": 1}),
        (["--merge", "off"], {"merge": "off", "merged": 0}),
        (["--merge", "discard", "--merge-fraction", "0.5"], {"merge": "discard", "fraction": 0.5}),
        (["--scheduler", "unipc", "--fov-radius", "2"], {"scheduler": "unipc"}),
        (["--timesteps", "bfloat16"], {"timesteps": "bfloat16"}),
        (["--source-camera", "zoom_in", "--guidance", "1"], {}),
        (
            ["--cache-bytes", "27KiB", "--device-cache-bytes", "9 KiB", "--max-memory", "1"],
            {"tiers": {"device": 9216, "host": 9216}},
        ),
        pytest.param(
            ["--dtype", "bfloat16", "--backend", "reference"],
            {"dtype": "bfloat16"},
            marks=has_products,
        ),
        (["--conditioning", "static"], {"conditioning": "static", "whole": 1}),
        (["--step-cache", "9"], {"whole": 2, "computed": 2}),
    ],
)
def test_options_reach_the_turns(
    tmp_path: Path,
    render: Render,
    finished: Path,
    options: list[str],
    expected: dict[str, Any],
    capsys: Capture,
) -> None:
    out = tmp_path / "out"
    assert render(out, CAMERAS, *options) == 0
    turn = json.loads((out / "report.json").read_text())["turns"][2]
    found = {
        "memory": turn["memory"]["mode"],
        "retrieved": len(turn["memory"]["retrieved"]),
        "merge": turn["plan"]["merge"],
        "fraction": turn["plan"]["merge_fraction"],
        "merged": len(turn["merged_frames"]),
        "scheduler": turn["scheduler"],
        "timesteps": turn["timesteps"],
        "conditioning": turn["plan"]["conditioning"],
        "computed": len(turn.get("reuse", {}).get("steps_computed", ())),
        "whole": turn["work"]["whole"],
        "dtype": turn["dtype"],
        "tiers": turn["cache_bytes_by_tier"],
    }
    assert found | expected == found
    assert ("approximate:" in capsys.readouterr().out) == bool(turn["approximations"])
    assert not torch.equal(latents(out)[2], latents(finished)[2])


def test_prompts(tmp_path: Path, source_clip: Path, worded_checkpoint: Path) -> None:
    results = []
    for prompt in ("a red ball", "the floor"):
        out = tmp_path / prompt.replace(" ", "_")
        arguments = novel_view(source_clip, worded_checkpoint, out, ["static"])
        assert run.main([*arguments, "--prompt", prompt, "--guidance", "3"]) == 0
        results.append(latents(out)[0])
    assert not torch.equal(*results)


@pytest.mark.parametrize("window", ["first", "middle", "last", "even", "7"])
def test_windows(tmp_path: Path, tiny_checkpoint: Path, source_frames: Tensor, window: str) -> None:
    write_video(tmp_path / "long.mp4", source_frames.repeat(2, 1, 1, 1)[:17], 8)
    out = tmp_path / "out"
    arguments = novel_view(tmp_path / "long.mp4", tiny_checkpoint, out, ["static"])
    assert run.main([*arguments, "--window", window, "--steps", "1"]) == 0
    source = json.loads((out / "report.json").read_text())["source"]
    assert "17" in source["window"]


def test_camera_files(tmp_path: Path, render: Render) -> None:
    save_trajectory(tmp_path / "mine.json", named_trajectory("pan_right", 9, (480, 640)))
    cameras = [str(tmp_path / "mine.json"), "translate:0.5,0,1"]
    out = tmp_path / "out"
    assert render(out, cameras) == 0
    turns = json.loads((out / "report.json").read_text())["turns"]
    assert [turn["file"] for turn in turns] == [
        "turn_01_mine.json.mp4",
        "turn_02_translate_0.5_0_1.mp4",
    ]


def test_resuming_remakes_what_is_missing_and_goes_on(
    finished: Path, tmp_path: Path, render: Render, capsys: Capture
) -> None:
    out = tmp_path / "out"
    # nothing there yet: begins
    assert render(out, CAMERAS[:2], "--resume") == 0
    for name in (VIDEOS[0], "overview.png", "report.json"):
        (out / name).unlink()
    assert render(out, CAMERAS, "--resume") == 0
    assert "resumed after 2 finished turns" in capsys.readouterr().out
    made, expected = contents(out), contents(finished)
    assert set(made) == set(expected)
    for name in set(expected) - set(BESIDE):
        assert made[name] == expected[name]


def test_turns_of_other_steps_are_not_resumed(
    tmp_path: Path, source_clip: Path, tiny_checkpoint: Path, capsys: Capture
) -> None:
    """Two families of as many steps differ in their solver and shift alone."""
    out = tmp_path / "out"

    def command(*more: str) -> list[str]:
        return novel_view(source_clip, tiny_checkpoint, out, CAMERAS[:1], *more)

    assert run.main(command("--fast", "lightx2v")) == 0
    before = contents(out)
    capsys.readouterr()
    assert run.main(command("--fast", "turbo", "--resume")) == run.REFUSED
    said = capsys.readouterr().err
    assert "its session has scheduler 'lightx2v' instead of 'rcm'; ask for the same" in said
    assert contents(out) == before
    assert run.main(command("--fast", "lightx2v", "--resume")) == 0
    # a folder of before they were kept is taken as it is
    manifest = out / "session.json"
    content = json.loads(manifest.read_text())
    content["turns"][0]["settings"] = {}
    content.pop("sha256")
    manifest.write_text(json.dumps(content))
    assert run.main(command("--fast", "turbo", "--resume")) == 0


@pytest.mark.parametrize("damage", DAMAGES)
def test_resuming_finds_every_damaged_file(
    finished: Path, tmp_path: Path, render: Render, capsys: Capture, damage: str
) -> None:
    """Each is made again, or named as lost; none is taken for what it was."""
    before = contents(finished)
    for name, content in before.items():
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(finished, out)
        (out / name).write_bytes(DAMAGES[damage](content))
        found = contents(out)
        code = render(out, CAMERAS, "--resume", "--quiet")
        said = capsys.readouterr().err
        after = contents(out)
        if name == "session.json" and damage != "short":
            assert code == run.REFUSED and said.count("\n") == 1
            assert said.startswith(f"error: {out / name} ") and after == found
            continue
        assert code == 0, (name, said)
        rows = json.loads(after["report.json"])["turns"]
        for video, row in zip(VIDEOS, rows, strict=True):
            assert after[video] == before[video]
            assert row["file_sha256"] == hashlib.sha256(after[video]).hexdigest()
        if "safetensors" in name:
            number = int(Path(name).stem[-1])
            assert said.startswith(f"turn {number} is lost: {out / name} cannot be read again")
            assert ["lost" in row for row in rows] == [turn == number for turn in (1, 2, 3)]
        else:
            assert not said and after["overview.png"] == before["overview.png"]


def test_a_lost_turn_whose_video_is_lost_too(
    finished: Path, tmp_path: Path, render: Render, capsys: Capture
) -> None:
    out, asked = tmp_path / "out", ([*CAMERAS, "static"], "--resume", "--quiet")
    shutil.copytree(finished, out)
    for name in (VIDEOS[1], "turns/turn_02.safetensors"):
        (out / name).write_bytes(b"")
    assert render(out, *asked) == run.PARTIAL
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("turn 2 is lost: ") and last.startswith("error: turn 2 is lost: ")
    rows = json.loads((out / "report.json").read_text())["turns"]
    assert [row["file_sha256"] is None for row in rows] == [False, True, False, False]
    # the new turn remembers the two that there are
    assert {row["turn"] for row in rows[3]["memory"]["retrieved"]} == {1, 3}
    # restored, all of it is made
    shutil.copy(finished / "turns" / "turn_02.safetensors", out / "turns")
    assert render(out, *asked) == 0
    assert (out / VIDEOS[1]).read_bytes() == (finished / VIDEOS[1]).read_bytes()


def test_overwriting_replaces(finished: Path, render: Render) -> None:
    out = finished.parent / "copy"
    shutil.copytree(finished, out)
    (out / "mine.txt").write_text("mine")
    assert render(out, ["static"], "--overwrite") == 0
    made = {"mine.txt", "turn_01_static.mp4", "turns/turn_01.safetensors"}
    assert set(contents(out)) == made | set(BESIDE)


def interrupted_in_the_second_turn(arguments: list[str]) -> tuple[int, str]:
    """Press Ctrl-C as soon as the second turn denoises; returns exit code and stderr."""
    process = in_process(arguments)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("turn 2/3") and "sampling" in line and "/" in line.split()[-3]:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    return process.returncode, errors


def test_interrupting_keeps_the_finished_turns(
    tmp_path: Path, source_clip: Path, tiny_checkpoint: Path
) -> None:
    out = tmp_path / "out"
    arguments = [*novel_view(source_clip, tiny_checkpoint, out), "--steps", "150"]
    code, errors = interrupted_in_the_second_turn(arguments)
    assert code == 130
    assert errors == "interrupted: finished turns are kept; continue with --resume\n"
    assert len(json.loads((out / "session.json").read_text())["turns"]) == 1
    assert set(contents(out)) == {VIDEOS[0], "turns/turn_01.safetensors", *BESIDE}


@contextmanager
def address_space(spare: int) -> Iterator[None]:
    """Let this process grow by at most `spare` bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
def test_out_of_memory_is_one_line(
    tmp_path: Path, source_clip: Path, make_checkpoint: Callable[..., Path], capsys: Capture
) -> None:
    large = make_checkpoint(tmp_path / "large", sampling={"size": (4096, 4096)})
    with address_space(spare=GIB // 2):
        assert run.main(novel_view(source_clip, large, tmp_path / "out", ["static"])) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: out of memory: ") and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_info(capsys: Capture) -> None:
    assert run.main(["info"]) == 0
    output = capsys.readouterr().out
    for fact in (f"torch {torch.__version__}", "cpu: ", "cuda:", "reference: every operation"):
        assert fact in output
    assert "MV2V_NUM_THREADS" in output
    if not torch.cuda.is_available():
        assert "triton: every operation missing: it needs a CUDA device" in output
        assert "auto: reference (dense), reference (packed) on cpu" in output
        names = "fa3, fa4, fa2, torch, cudnn (dense), xformers, triton"
        approximate = (f"{name} (approximate, by name alone)" for name in ("sage", "sparge"))
        assert f"{names}, {', '.join(approximate)} missing" in output
        assert "no step is captured: graphs need a CUDA device" in output


def test_inspect(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run.main(["inspect", str(tiny_checkpoint)]) == 0
    assert "loads        yes" in capsys.readouterr().out
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    tensors = load_file(broken / "transformer.safetensors")
    del tensors["proj_out.weight"]
    save_file(tensors, broken / "transformer.safetensors")
    assert run.main(["inspect", str(broken)]) == 2
    captured = capsys.readouterr()
    assert "missing      1" in captured.out
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_threads_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    with num_threads(torch.get_num_threads()):
        monkeypatch.setenv("MV2V_NUM_THREADS", "3")
        assert run.main(["info"]) == 0
        assert "cpu: 3 threads" in capsys.readouterr().out
        monkeypatch.setenv("MV2V_NUM_THREADS", "many")
        assert run.main(["info"]) == 2
        assert "MV2V_NUM_THREADS must be a positive integer" in capsys.readouterr().err


def test_help_and_version(capsys: Capture) -> None:
    for arguments in (["--help"], ["edit", "--help"], ["novel-view", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as stop:
            run.main(arguments)
        assert stop.value.code == 0
    assert "pan_right" in capsys.readouterr().out
