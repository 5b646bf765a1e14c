"""A store on a disk that is full, on a real one of a few megabytes, which only root can mount."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mv2v_engine.errors import StorageError
from mv2v_engine.serving.store.folders import Spare
from tests.serving.fake_backend import FakeBackend
from tests.serving.in_process import (
    TURN,
    abandon,
    asked,
    begun,
    ended,
    in_loop,
    new_session,
    refused,
    serving,
    started,
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.decode()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> None:
    """Fill a disk until not one more byte fits."""
    with (disk / "filler").open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    with (disk / "filler").open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1))
    assert shutil.disk_usage(disk).free == 0


@pytest.mark.parametrize("has_log", [True, False])
@pytest.mark.parametrize("has_spare", [True, False])
@in_loop
async def test_deleting_works_on_a_full_disk(disk: Path, has_log: bool, has_spare: bool) -> None:
    """Whether or not the database's log has room of its own, and bytes are kept for it."""
    store = disk / "store"
    async with serving(store) as (service, _):
        sessions = [await new_session(service) for _ in range(3)]
        await ended(service, await asked(service, sessions[0]))
    async with serving(store) as (service, _):
        if has_log:
            await asked(service, sessions[1])
        if not has_spare:
            (store / "spare").unlink()
            video = await service.turn_file("", sessions[0].id, 1, "video")
            video.write_bytes(bytes(1 << 20))
        fill(disk)
        error = await refused(service.submit("", sessions[2].id, TURN | {"prompt": " " * 100_000}))
        assert error.code == "disk_full"
        # what there is can be read
        assert (await service.turn_file("", sessions[0].id, 1, "thumbnail")).stat().st_size
        await service.delete_session("", sessions[0].id)
        assert (await refused(service.session("", sessions[0].id))).code == "not_found"
        assert not service.store.session(sessions[0].id).exists()
        await service.delete_session("", sessions[1].id)
        assert [s.id for s in (await service.sessions("")).items] == [sessions[2].id]
        (disk / "filler").unlink()
        assert (await ended(service, await asked(service, sessions[2]))).number == 1
    async with serving(store) as (service, _):
        assert [s.id for s in (await service.sessions("")).items] == [sessions[2].id]
        assert (store / "spare").stat().st_size == Spare.size


@pytest.mark.parametrize("has_spare", [True, False])
@in_loop
async def test_a_start_with_a_running_job_works_on_a_full_disk(
    disk: Path, has_spare: bool, held: FakeBackend
) -> None:
    """Or, without the bytes that are kept for it, says in one line that there is no room."""
    store = disk / "store"
    service = await started(store, held)
    session, (job,) = await begun(service)
    await abandon(service)
    if not has_spare:
        (store / "spare").unlink()
    fill(disk)
    before = {path: path.stat().st_size for path in store.rglob("*")}
    if not has_spare:
        for _ in range(2):
            with pytest.raises(StorageError, match=r"full|No space") as caught:
                await started(store, FakeBackend())
            assert "\n" not in str(caught.value)
        now = {path: path.stat().st_size for path in store.rglob("*")}
        assert {p: n for p, n in now.items() if "service" not in p.name and p.is_file()} == {
            p: n for p, n in before.items() if "service" not in p.name and p in now and p.is_file()
        }
        (disk / "filler").unlink()
    async with serving(store) as (service, _):
        assert (await service.job("", job.id)).attempts >= 1
        await service.delete_session("", session.id)
        (disk / "filler").unlink(missing_ok=True)
        again = await new_session(service)
        assert (await ended(service, await asked(service, again))).number == 1
        # what was given up for the start is there for the next time
        assert (store / "spare").stat().st_size == Spare.size


@in_loop
async def test_a_sweep_of_old_sessions_makes_room_on_a_full_disk(disk: Path) -> None:
    async with serving(disk / "store", keep_bytes=7) as (service, _):
        sessions = [await new_session(service) for _ in range(2)]
        fill(disk)
        assert await service._retention.sweep() == [sessions[0].id]
        (disk / "filler").unlink()
    async with serving(disk / "store") as (service, _):
        assert [s.id for s in (await service.sessions("")).items] == [sessions[1].id]
        await asyncio.sleep(0)
