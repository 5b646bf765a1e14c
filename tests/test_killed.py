"""A process killed at any moment: what it had finished is there, and the rest goes on bit for bit.

A process of its own loads all libraries once and forks for every run, so that a run costs what its
turns cost. It has one thread: threads do not survive a fork.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.folders import contents
from tests.launched import script

NUM_KILLS = 5
CAMERAS = ("pan_right", "arc_left", "pan:8")

FORKS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import av, PIL.Image, torch
torch.set_num_threads(1)
from mv2v_engine import Engine, run
from mv2v_engine.engine.folder import SessionFolder

clip, checkpoint, unbroken, out, kills, *cameras = sys.argv[1:]

def child(folder):
    asked = [word for camera in cameras for word in ("--camera", camera)]
    arguments = ["novel-view", clip, *asked, "--out", folder, "--checkpoint", checkpoint,
                 "--device", "cpu", "--quiet", "--resume"]
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(run.main(arguments))
    return pid

def finished(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

# a turn loads and counts what is the same for all
frames = torch.zeros(9, 48, 64, 3, dtype=torch.uint8)
Engine.from_pretrained(checkpoint, device="cpu").session(frames).render("static")
began = time.monotonic()
assert finished(child(unbroken)) == 0
whole = time.monotonic() - began
choose, counts = random.Random(5), []
while len(counts) < int(kills):
    pid = child(out)
    time.sleep(whole * choose.uniform(0.2, 0.8))
    os.kill(pid, signal.SIGKILL)
    if finished(pid) == 0:  # it was through
        if counts:
            break
        whole /= 2  # the machine was busy before, and is not now
        shutil.rmtree(out)
        continue
    store = SessionFolder(Path(out))
    counts.append(len(list(store.drafts())) if store.exists() else 0)
print(json.dumps([counts, finished(child(out))]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_killed_again_and_again(tmp_path: Path, source_clip: Path, tiny_checkpoint: Path) -> None:
    unbroken, out = folders = [tmp_path / name for name in ("unbroken", "out")]
    done = script(FORKS, source_clip, tiny_checkpoint, *folders, NUM_KILLS, *CAMERAS)
    counts, code = json.loads(done.stdout.splitlines()[-1])
    # every finished turn could be read after every kill, and none was lost again
    assert code == 0 and counts and counts == sorted(counts)
    made, expected = contents(out), contents(unbroken)
    assert set(made) == set(expected)
    for name in made:
        if name.endswith((".mp4", ".safetensors", ".png")):
            assert made[name] == expected[name]
