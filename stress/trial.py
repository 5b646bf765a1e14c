"""A service on a small disk of its own, brought to a moment and met there by a fault."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

# how `run serve` is started is the benchmarks'
sys.path.append(str(Path(__file__).resolve().parents[1] / "profiling"))

import httpx
from faults import Faults, Outcome, children, is_alive, kill_all
from http_service import Served, start, wait_until_ready
from store_check import check_store
from witness import PATIENCE, Witness

Moment = Literal[
    "idle", "loading", "uploading", "sampling", "storing", "listing", "publishing", "deleting"
]
Which = Literal["server", "worker", "prober"]
Space = Literal["disk full", "no inodes"]

# the rename that is held: latents into place, the manifest that lists them, a video, a deletion
HELD: dict[Moment, str] = {
    "uploading": "*/sessions/session_*",
    "storing": "*/turns/turn_*.safetensors",
    "listing": "*/session.json",
    "publishing": "*/results/turn_*.mp4",
    "deleting": "*/trash/*",
}
# denoising steps: a turn that is to be hit in the middle, and any other
LONG, SHORT = 12, 1
STOPPED_SECONDS = 1.0
# turns of a session, after which another one is made
MOST_TURNS = 4
MOST_SESSIONS = 8
# bytes; any process has more already, and gets no more then
NO_MEMORY = 1 << 20
DISK_BYTES, DISK_FILES = 96 << 20, 40_000


class Lost(Exception):
    """Something that a client was told is so no more. what: in words, one by one."""

    def __init__(self, what: list[str]) -> None:
        super().__init__("; ".join(what))
        self.what = what


class Trial:
    """words: of the command line of `run serve`. It needs the right to mount a file system."""

    def __init__(self, folder: Path, clip: bytes, *words: str) -> None:
        self.folder, self.words = folder, words
        self.disk = folder / "disk"
        self.store, self.log = self.disk / "store", folder / "service.log"
        self.disk.mkdir()
        options = f"size={DISK_BYTES},nr_inodes={DISK_FILES}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(self.disk)], check=True)
        self.store.mkdir()
        self.faults = Faults(self.store, folder / "faults")
        self.witness = Witness(self.store, clip)
        self.service: Served | None = None
        self.session: str | None = None
        self._thread = ThreadPoolExecutor(2, "client")

    def close(self) -> None:
        self.kill()
        self._thread.shutdown()
        subprocess.run(["umount", "-l", str(self.disk)], check=True)

    # the service

    def begin(self) -> None:
        """Start it, if it does not run; returns once it listens. Raises NotServed."""
        if self.service is None or self.service.process.poll() is not None:
            # starts are most of the work, and threads that wait for each other are slow beside
            # whatever else runs
            cheap = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
            environment = self.faults.environment | cheap
            # the log is on another disk, for the store's may be full
            self.service = start(self.store, self.log, *self.words, environment=environment)
            self.witness.meet(self.service.address)

    def ready(self) -> None:
        """Begin, and wait until turns are made. Raises NotServed."""
        self.begin()
        assert self.service is not None
        wait_until_ready(self.service)

    def stop(self) -> None:
        if self.service is not None:
            self.service.stop()
            self.service = None

    def kill(self) -> None:
        """All of its processes, at one blow."""
        pids = self.pids()
        kill_all(pids, signal.SIGSTOP)
        kill_all(pids, signal.SIGKILL)
        self.faults.release()
        if self.service is not None:
            self.service.ended()
        while any(map(is_alive, pids)):
            time.sleep(0.01)

    def pids(self) -> list[int]:
        if self.service is None or self.service.process.poll() is not None:
            return []
        server, pids = self.service.process.pid, []
        waiting = [server]
        while waiting:
            pids.append(waiting.pop())
            waiting += children(pids[-1])
        return pids

    def pid(self, which: Which) -> int | None:
        """The process, once it is there; None if the service has ended."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            assert self.service is not None
            server = self.service.process
            if server.poll() is not None:
                return None
            if which == "server":
                return server.pid
            module = {"worker": "serving.work.worker", "prober": "serving.work.probe"}[which]
            for child, words in children(server.pid).items():
                if module in words:
                    return child
            time.sleep(0.005)
        raise TimeoutError(f"there is no {which}")

    # what it does

    def some_session(self) -> str:
        """One with a finished turn, and room for more."""
        known = self.witness.sessions
        if self.session not in known or len(known[self.session].turns) >= MOST_TURNS:
            seen, self.session = self.witness.create()
            if self.session is None:
                raise RuntimeError(f"no session is made: {seen}")
            self.turn(self.session)
        return self.session

    def turn(self, session: str, steps: int = SHORT) -> str:
        """A turn, to its end; what the client sees."""
        seen, job = self.witness.ask(session, steps=steps)
        return seen if job is None else self.witness.follow(job)

    def reach(self, moment: Moment, which: Which = "server") -> Future[str]:
        """Bring the service to a moment, and hold it there; what a client sees of its request."""
        if moment == "loading":
            self.stop()
            self.begin()
            self.pid("worker")
            return _done("")
        self.ready()
        if moment == "idle":
            self.some_session()
            return _done("")
        if which == "prober" and moment == "uploading":
            return self._probing()
        if moment in HELD:
            session = self.some_session() if moment != "deleting" else self.disposable()
            self.faults.hold(HELD[moment])
        if moment == "uploading":
            under_way = self._thread.submit(lambda: self.witness.create()[0])
        elif moment == "deleting":
            under_way = self._thread.submit(lambda: self.witness.delete(session)[0])
        elif moment == "sampling":
            return self._sampling()
        else:
            under_way = self._thread.submit(lambda: self.turn(session))
        if not self.faults.wait_held(PATIENCE, under_way.done):
            raise RuntimeError(f"{moment} was not reached: {under_way.result(PATIENCE)}")
        return under_way

    def disposable(self) -> str:
        """A session with a turn that may go."""
        _, session = self.witness.create()
        assert session is not None
        self.turn(session)
        return session

    def _probing(self) -> Future[str]:
        """The prober has been given an upload; it is stopped until its signal, for it is quick."""
        # one that was killed is started again by the next upload
        self.witness.create()
        prober, uploads = self.pid("prober"), self.store / "uploads"
        assert prober is not None
        os.kill(prober, signal.SIGSTOP)
        under_way = self._thread.submit(lambda: self.witness.create()[0])
        size = len(self.witness.clip)
        self._until(lambda: any(path.stat().st_size == size for path in uploads.iterdir()))
        time.sleep(0.2)
        return under_way

    def _sampling(self) -> Future[str]:
        session, kinds = self.some_session(), list[str]()
        seen, job = self.witness.ask(session, steps=LONG)
        if job is None:
            raise RuntimeError(f"no turn is taken: {seen}")
        under_way = self._thread.submit(self.witness.follow, job, kinds.append)
        self._until(lambda: "step_done" in kinds or under_way.done())
        return under_way

    def _until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            if time.monotonic() > deadline:
                raise TimeoutError("a moment did not come")
            time.sleep(0.002)

    # faults

    def signal(self, sig: signal.Signals, which: Which) -> str:
        """Send it, and let go of what was held; what a client sees at once."""
        pid = self.pid(which)
        if pid is None:
            raise RuntimeError("the service has ended by itself")
        os.kill(pid, sig)
        if which == "prober" and sig != signal.SIGSTOP:
            # it is stopped, as `_probing` left it
            kill_all([pid], signal.SIGCONT)
        seen = ""
        if sig == signal.SIGSTOP:
            self.faults.release()
            time.sleep(STOPPED_SECONDS)
            seen = f"/healthz {self.health(0.5)} meanwhile"
            os.kill(pid, signal.SIGCONT)
        elif sig == signal.SIGKILL:
            while is_alive(pid):
                time.sleep(0.002)
        self.faults.release()
        if which == "server" and sig != signal.SIGSTOP:
            assert self.service is not None
            self.service.ended()
            # an orphan goes on for as long as it takes to see that its server is gone
        return seen

    def health(self, patience: float) -> str:
        try:
            answer = httpx.get(f"{self.witness.address}/healthz", timeout=patience)
            return f"answers {answer.status_code}"
        except httpx.TimeoutException:
            return "does not answer"
        except httpx.TransportError:
            return "is refused"

    def power_cut(self, outcome: Outcome, choose: random.Random) -> None:
        """Make what a power cut now leaves the store; nothing of the service runs any more."""
        left = self.folder / "left"
        self.faults.cut(left, outcome, choose)
        for path in self.store.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(left, self.store, dirs_exist_ok=True)
        shutil.rmtree(left)
        self.faults.settle()

    @contextmanager
    def full(self, what: Space) -> Iterator[None]:
        """A disk that takes no more bytes, or no more names, as long as the block."""
        filler = self.disk / "filler"
        filler.mkdir()
        try:
            if what == "disk full":
                subprocess.run(
                    ["dd", "if=/dev/zero", f"of={filler}/bytes", "bs=4k"], capture_output=True
                )
            else:
                for number in range(DISK_FILES + 1):
                    try:
                        (filler / str(number)).touch()
                    except OSError:
                        break
            yield
        finally:
            shutil.rmtree(filler)

    def locked(self, seconds: float) -> threading.Thread:
        """Lock the database as somebody else who writes to it; ends when it is free again."""
        is_locked = threading.Event()

        def hold() -> None:
            with closing(sqlite3.connect(self.store / "service.sqlite3", timeout=60.0)) as other:
                other.execute("BEGIN IMMEDIATE")
                is_locked.set()
                time.sleep(seconds)

        thread = threading.Thread(target=hold)
        thread.start()
        is_locked.wait(PATIENCE)
        return thread

    @contextmanager
    def short_of_memory(self, which: Which) -> Iterator[None]:
        """A process that gets no more memory, as long as the block: others have it all."""
        pid = self.pid(which)
        assert pid is not None
        before = resource.prlimit(pid, resource.RLIMIT_AS)
        resource.prlimit(pid, resource.RLIMIT_AS, (NO_MEMORY, before[1]))
        try:
            yield
        finally:
            if is_alive(pid):
                resource.prlimit(pid, resource.RLIMIT_AS, before)

    @contextmanager
    def busy(self, choose: random.Random) -> Iterator[None]:
        """A client that does one thing after the other, as long as the block."""
        is_over = threading.Event()
        working = self._thread.submit(self._work, is_over, choose.random())
        try:
            yield
        finally:
            is_over.set()
            working.result()

    def _work(self, is_over: threading.Event, seed: float) -> None:
        choose, witness = random.Random(seed), self.witness
        while not is_over.is_set():
            sessions, kind = list(witness.sessions), choose.random()
            known = [one for one in sessions if 1 in witness.sessions[one].turns]
            if kind < 0.1 and len(sessions) < MOST_SESSIONS:
                witness.create()
            elif kind < 0.2 and known and len(sessions) < MOST_SESSIONS:
                witness.branch(choose.choice(known), 1)
            elif kind < 0.3 and len(sessions) > MOST_SESSIONS // 2:
                witness.delete(choose.choice(sessions))
            else:
                self.turn(choose.choice(sessions), choose.choice((SHORT, LONG)))
            # what gets no answer is not asked again at once
            is_over.wait(0.1)

    # afterwards

    def settled(self) -> list[str]:
        """What is wrong once the service is ready again and has done what it had to do."""
        self.begin()
        wrong = self.witness.lost()
        self.ready()
        self.witness.follow_all()
        wrong += [one for one in self.witness.lost() if one not in wrong]
        wrong += self.witness.wait_published()
        seen = self.turn(self.some_session())
        if seen != "finished":
            wrong.append(f"the next turn: {seen}")
        wrong += self.witness.wait_published()
        try:
            check_store(self.store)
        except AssertionError as error:
            wrong.append(f"files and rows differ: {error}")
        return wrong


def _done(seen: str) -> Future[str]:
    done: Future[str] = Future()
    done.set_result(seen)
    return done
