"""Whoever reads what `run` prints may leave: the work goes on, and its files are written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launched import script

# what reads the output, if anything does: one line, or nothing; and the numbers of closed outputs
LINE, NOTHING, NO_STDOUT, NO_STDERR = "import sys; sys.stdin.readline()", "", "1", "2"
# where stdout goes, whether stderr goes there, too, and the exit code
OUTPUTS: dict[str, tuple[str, bool, int]] = {
    "a reader of one line": (LINE, False, 0),
    "no reader": (NOTHING, False, 0),
    "no reader of either": (NOTHING, True, 0),
    "a full disk": ("/dev/full", False, 3),
    "no stdout": (NO_STDOUT, False, 0),
    "no stderr": (NO_STDERR, False, 0),
}
PRINTING = ("--help", "info", "inspect tiny-nvs", "novel-view --help")

# a process that has loaded all libraries forks for every command, and each ends as Python does
FORKS = """
import json, os, subprocess, sys
from pathlib import Path
import av, PIL.Image, torch
torch.set_num_threads(1)
from mv2v_engine import Engine, run

# a turn loads and counts what is the same for all
frames = torch.zeros(9, 48, 64, 3, dtype=torch.uint8)
Engine.from_pretrained(sys.argv[1], device="cpu").session(frames).render("static")
codes = {}
for folder, words, target, is_both in json.loads(sys.argv[2]):
    os.makedirs(folder)
    closed = target if target.isdecimal() else ""
    if target.startswith("/") or closed:
        output, reader = os.open(os.devnull if closed else target, os.O_WRONLY), None
    else:
        end, output = os.pipe()
        reader = subprocess.Popen([sys.executable, "-S", "-c", target], stdin=end)
        os.close(end)
        if not target:
            reader.wait()  # gone before the first word
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(f"{folder}/stderr", os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(output, 1)
        if is_both:
            os.dup2(output, 2)
        os.close(output)
        if closed:  # as Python finds it where it is closed when it starts
            os.close(int(closed))
            name = "stdout" if closed == "1" else "stderr"
            setattr(sys, name, None)
            setattr(sys, f"__{name}__", None)
        os.chdir(folder)
        sys.exit(run.main(words))
    os.close(output)
    codes[folder] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if reader is not None:
        reader.wait()
print(json.dumps(codes))
"""


def _words(source_clip: Path, tiny_checkpoint: Path) -> list[str]:
    words = ["novel-view", str(source_clip), "--camera", "pan_left", "--camera", "static"]
    words += ["--checkpoint", str(tiny_checkpoint), "--device", "cpu"]
    return [*words, "--out", "out", "--steps", "1"]


def _check_work(folder: Path, code: int, stderr: str) -> None:
    assert "Traceback" not in stderr and "Exception ignored" not in stderr
    assert len(list((folder / "out").glob("turn_*.mp4"))) == 2
    assert (folder / "out" / "report.json").is_file()
    if code:
        assert stderr.startswith("error: stdout is not complete: No space left")


@pytest.fixture(scope="module")
def ended(
    tmp_path_factory: pytest.TempPathFactory, source_clip: Path, tiny_checkpoint: Path
) -> dict[str, tuple[Path, int, str]]:
    """Folder, exit code and stderr of every command, by its output or its words."""
    root, view = tmp_path_factory.mktemp("pipes"), _words(source_clip, tiny_checkpoint)
    commands = {name: (view, target, is_both) for name, (target, is_both, _) in OUTPUTS.items()} | {
        words: (words.split(), NOTHING, False) for words in PRINTING
    }
    commands["an error"] = (["inspect", "nothing"], NO_STDERR, False)
    folders = {name: root / str(number) for number, name in enumerate(commands)}
    asked = [[str(folders[name]), *command] for name, command in commands.items()]
    codes = json.loads(script(FORKS, tiny_checkpoint, json.dumps(asked)).stdout)
    return {
        name: (folder, codes[str(folder)], (folder / "stderr").read_text())
        for name, folder in folders.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTPUTS)
def test_the_work_goes_on(ended: dict[str, tuple[Path, int, str]], name: str) -> None:
    folder, code, stderr = ended[name]
    assert code == OUTPUTS[name][2], stderr
    _check_work(folder, code, stderr)


@pytest.mark.slow
def test_the_work_goes_on_without_outputs(
    source_clip: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """In a process of its own: what is closed when Python starts is none of its files."""
    words = " ".join(_words(source_clip, tiny_checkpoint))
    command = f"'{sys.executable}' -m mv2v_engine.run {words} >&- 2>&- <&-"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, timeout=600)
    assert done.returncode == 0
    _check_work(tmp_path, 0, "")


@pytest.mark.parametrize("words", PRINTING)
def test_what_only_prints_ends_quietly(ended: dict[str, tuple[Path, int, str]], words: str) -> None:
    _, code, stderr = ended[words]
    assert (code, stderr) == (0, "")


def test_an_error_that_nobody_reads_keeps_its_code(
    ended: dict[str, tuple[Path, int, str]],
) -> None:
    assert ended["an error"][1:] == (2, "")
