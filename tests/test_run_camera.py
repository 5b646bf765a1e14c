"""`run camera`, and cameras of files on the command line: what is shown, changed, refused, told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mv2v_engine import run
from mv2v_engine.camera.drawing import save_drawing
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.errors import RequestError
from tests.camera import written

Capture = pytest.CaptureFixture[str]


def ends(capsys: Capture, *words: str) -> tuple[int, str, str]:
    code = run.main(["camera", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_moves_are_shown(capsys: Capture) -> None:
    code, out, err = ends(capsys, "tilt:10+pan:30", "zoom:2")
    assert (code, err) == (0, "")
    first, second = out.strip().split("\n\n")
    assert first.startswith("tilt:10+pan:30: 17 frames\nlens: 1.01 of the image's width, 52.7 deg")
    assert first.splitlines()[-1].split() == ["16", "0.00", "0.00", "0.00", "30.0", "10.0", "0.0"]
    assert second.splitlines()[2].startswith("path: 2 metres long, up to 2 metres and 0 degrees")


def test_a_file_is_shown_with_what_was_changed(tmp_path: Path, capsys: Capture) -> None:
    file = written.nerf(tmp_path / "t.json", written.path(81), w=320, h=192, fl_x=384)
    code, out, err = ends(capsys, f"{file}?resample")
    assert (code, err) == (0, "")
    assert "note: it was read as NeRF's transforms (camera-to-world, OpenGL axes)" in out
    assert "note: its 81 poses were resampled to 17, evenly by number" in out
    assert "lens: 1.2 of the image's width" in out
    last = out.rstrip().splitlines()[-1].split()
    assert last[:4] == ["16", "0.90", "-0.40", "0.50"]


def test_what_looks_wrong_is_shown_and_drawn_all_the_same(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    poses = written.path(17)
    poses[:, 2, 3] += 36
    written.npy(tmp_path / "world.npy", poses)
    code, out, err = ends(capsys, "world.npy", "--plot")
    assert code == 2 and err.count("\n") == 1 and "looks wrong: its first pose lies 36" in err
    assert "36.50" in out and out.splitlines()[-1] == "world.npy.png"
    assert (tmp_path / "world.npy.png").is_file()
    code, out, err = ends(capsys, "world.npy?relative", "world.npy?frames=0:5&relative")
    assert code == 2 and "has 5 poses, the video has 17 frames" in err and ": 5 frames" in out
    code, out, err = ends(capsys, "none.npy", "--plot")
    assert code == 2 and out == "" and "cannot read camera file none.npy" in err


def test_a_map_is_to_scale(tmp_path: Path) -> None:
    """To the right is right, forward is up: where the paths' own colours are tells."""
    place = tmp_path / "map.png"
    save_drawing(place, [named_trajectory("translate:2,0,0", 5, (96, 160)),
                         named_trajectory("zoom:-2", 5, (96, 160))])  # fmt: skip
    picture = np.asarray(Image.open(place)).astype(int)[:760]
    blue, orange = (
        np.argwhere(np.abs(picture - colour).sum(2) < 60) for colour in ((0, 92, 184), (200, 80, 0))
    )
    assert len(blue) > 200 and len(orange) > 200
    # one goes to the right of where the other begins, which goes down, and as far
    assert blue[:, 1].max() > orange[:, 1].max() and orange[:, 0].max() > blue[:, 0].max()
    across = blue[blue[:, 0] >= blue[:, 0].max() - 1][:, 1]
    down = orange[:, 0].max() - blue[:, 0].max()
    assert across.max() - across.min() == pytest.approx(down, abs=6)
    with pytest.raises(RequestError, match=r"is a \.png file, got 'clip\.mp4'"):
        save_drawing(tmp_path / "clip.mp4", [named_trajectory("static", 2, (96, 160))])


def test_a_turn_of_a_file(
    tmp_path: Path, source_clip: Path, tiny_checkpoint: Path, capsys: Capture
) -> None:
    world = np.eye(4)
    world[:3, :3], world[:3, 3] = written.turned((0, 1, 0), 140), (30.0, 0.0, 20.0)
    file = written.colmap_text(
        tmp_path / "images.txt", world @ written.path(81), "1 PINHOLE 640 480 600 600 320 240"
    )
    where = ["--out", str(tmp_path / "out"), "--checkpoint", str(tiny_checkpoint)]
    command = ["novel-view", str(source_clip), "--camera", f"{file}?resample", *where]
    assert run.main(command) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "36.1 metres" in message and "140 degrees" in message
    command[3] += "&relative"
    assert run.main([*command, "--source-camera", f"{file}?frames=0:9", "--steps", "1"]) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    notes = report["turns"][0]["notes"]
    assert notes == [
        "it was read as COLMAP's images.txt (world-to-camera, OpenCV axes)",
        "its poses were taken relative to its first",
        "its 81 poses were resampled to 9, evenly by number",
        "its lens counts for what is remembered alone: this model has one of its own",
    ]
    for words in notes:
        assert f"note: the camera of turn 1, images.txt?resample&relative: {words}" in out
    said = "its camera: of its 81 poses 9 were taken (frames=0:9)"
    assert said in report["source"]["notes"] and f"note: {said}" in out
    assert report["turns"][0]["camera"] == "images.txt?resample&relative"
    assert (tmp_path / "out" / "turn_01_images.txt_resample_relative.mp4").is_file()
    # asked again, it is the same turn
    again = ["--source-camera", f"{file}?frames=0:9", "--steps", "1", "--resume"]
    assert run.main([*command, *again]) == 0
