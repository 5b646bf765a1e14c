"""Processes of a test: one of a script, or two by torchrun or as it does, which costs less."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

# far beyond what anything takes: a hang fails the test
_PATIENCE = 600
_ROOT = Path(__file__).resolve().parents[1]


def _succeeds(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
    )
    assert done.returncode == 0, done.stderr[:5000]
    return done


def script(
    code: str, *arguments: object, within: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """A script in a process of one thread, by another command if within one; it must succeed."""
    command = [*within, sys.executable, "-c", code, *map(str, arguments)]
    return _succeeds(command, MV2V_NUM_THREADS="1")


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A script or module in two processes; it must succeed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return _succeeds([*command, "--nproc-per-node", "2", *arguments])


def both(*arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """A script in two processes that nobody watches over: each ends as it does by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command, running = [sys.executable, *arguments], []
    for rank in (0, 1):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        place |= {"TORCHELASTIC_RUN_ID": "none"}
        running.append(
            subprocess.Popen(
                command,
                cwd=_ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | place,
            )
        )
    try:
        said = [process.communicate(timeout=_PATIENCE) for process in running]
    finally:
        for process in running:
            process.kill()
    return [
        subprocess.CompletedProcess(command, process.returncode, *words)
        for process, words in zip(running, said, strict=True)
    ]


def both_succeed(*arguments: str) -> tuple[str, str]:
    """What each of `both` printed; both must succeed."""
    first, second = both(*arguments)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr[:5000] + second.stderr
    return first.stdout, second.stdout
