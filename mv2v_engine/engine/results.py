"""A session's folder as its user sees it: videos, a picture of the newest turns, and the report.

    session.json  turns/turn_01.safetensors ...     what a session is resumed from (store.py)
    turn_01_pan_right.mp4 ...  overview.png  report.json

Every file is whole or absent, and all but the first line can be made again from it: so is a video
that is not the one whose digest the report has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mv2v_engine.engine.keeper import LOST
from mv2v_engine.engine.request import TurnRequest
from mv2v_engine.engine.store import SessionStore
from mv2v_engine.engine.turn import ViewTurn
from mv2v_engine.engine.view_session import ViewSession
from mv2v_engine.errors import StorageError
from mv2v_engine.files import file_digest, require_writable, save_json
from mv2v_engine.progress import peak_host_bytes
from mv2v_engine.video.contact_sheet import Strip, make_strip, save_contact_sheet

FORMAT, VERSION = "mv2v-report", 1
_MAX_NAME = 60
# newest turns that the overview shows, so that neither it nor its making grows without end
MAX_ROWS = 24
_VIDEO = re.compile(r"turn_\d+_[A-Za-z0-9._-]*\.mp4")
# what files.replacing leaves behind when the process is killed while it writes
_UNFINISHED = re.compile(
    r"\.(session|report|overview|turn_\d+.*)-\w{8}\.(json|png|mp4|safetensors)"
)


class ResultFolder:
    """The folder of one session's results."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, SessionStore(folder)
        self.overview, self.report = folder / "overview.png", folder / "report.json"
        # videos that are what was written, by name
        self._digests: dict[str, str] = {}
        # what the overview shows of a turn does not change, and decoding it again is dear
        self._strips: WeakKeyDictionary[ViewTurn, Strip] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"ResultFolder({str(self.folder)!r})"

    def check_writable(self) -> None:
        """Try to write in the folder, or in what it would be made in; leaves nothing.

        Raises:
            StorageError: that is not possible.
        """
        require_writable(self.folder)

    def check_free(self) -> None:
        """Refuse a folder that already holds results.

        Raises:
            StorageError: it does.
        """
        if self.store.exists():
            count = len(self.store.read()["turns"])
            raise StorageError(
                f"{self.folder} already holds a session of {count} turns; continue it with "
                "--resume, replace it with --overwrite, or choose another folder"
            )
        for path in (self.overview, self.report):
            if path.exists():
                raise StorageError(
                    f"{path} exists and belongs to no session; replace it with --overwrite, or "
                    "choose another folder"
                )

    def check_resumable(self, requests: Sequence[TurnRequest], identity: dict[str, str]) -> None:
        """Refuse to continue a session that `requests` would not have begun.

        Raises:
            StorageError: another clip or checkpoint, or turns that answer other requests.
        """
        self.store.check_identity(self.store.read(), identity)
        turns = [turn for turn, _ in self.store.turns()]
        if len(turns) > len(requests):
            names = ", ".join(turn.trajectory.name for turn in turns)
            raise StorageError(
                f"{self.folder} holds {len(turns)} finished turns ({names}), only {len(requests)} "
                "are asked for; name those cameras first, or choose another folder"
            )
        for turn, request in zip(turns, requests, strict=False):
            difference = request.difference(turn.trajectory, turn.report)
            if difference:
                raise StorageError(
                    f"{self.folder} cannot be resumed: its turn {turn.number} has {difference}; "
                    "ask for the same turns first, or choose another folder"
                )

    def check_not_inside(self, clip: Path) -> None:
        """Refuse a source that `clear` would remove.

        Raises:
            StorageError: it is one of this folder's results.
        """
        if clip.resolve() in {path.resolve() for path in self._files()}:
            raise StorageError(
                f"{clip} is itself a result in {self.folder}, which --overwrite would remove; "
                "choose another folder"
            )

    def clear(self) -> None:
        """Remove the results, and nothing else that lies there.

        Raises:
            StorageError: a file cannot be removed, or session.json is of another program.
        """
        try:
            # the session last: as long as it is there it tells what belongs to it
            for path in self._files():
                path.unlink(missing_ok=True)
            turns = self.store.turns_folder
            if turns.is_dir() and not any(turns.iterdir()):
                turns.rmdir()
        except OSError as error:
            raise StorageError(
                f"cannot remove earlier results: {error}; choose another folder"
            ) from error

    def publish(
        self, session: ViewSession, *, version: str, check: Callable[[], None] | None = None
    ) -> list[Path]:
        """Write what lacks of the session's turns and videos, and the overview and report anew.

        A video that was cut short or changed since it was reported lacks, too.

        check: called before every file; what it raises ends the work.

        Returns:
            every file a user may want to open.

        Raises:
            StorageError: the disk is full or the folder cannot be written, or the latents of a
                video that lacks are lost; all that could be written is, and the next call writes
                the rest.
        """
        failures: list[StorageError] = []

        @contextmanager
        def attempt() -> Iterator[None]:
            if check is not None:
                check()
            try:
                yield
            except StorageError as error:
                failures.append(error)

        with attempt():
            session.store_missing()
        videos, reported = self.videos(session), self._reported()
        for turn, video in zip(session.turns, videos, strict=True):
            if not self._is_whole(video, reported):
                with attempt():
                    turn.save(video)
                    self._digests[video.name] = file_digest(video)
        with attempt():
            save_contact_sheet(self.overview, self._rows(session))
        with attempt():
            save_json(self.report, self._content(session, videos, version))
        if failures:
            raise failures[0]
        return [*videos, self.overview, self.report]

    def videos(self, session: ViewSession) -> list[Path]:
        """Where each turn's video is written."""
        return [self._video(turn.number, turn.trajectory.name) for turn in session.turns]

    def _is_whole(self, video: Path, reported: dict[str, str | None]) -> bool:
        """Whether a video is there as it was written, by this process or the one that reported it.

        Raises:
            StorageError: it cannot be read.
        """
        if not video.exists():
            return False
        if video.name in self._digests:
            return True
        try:
            digest = file_digest(video)
        except OSError as error:
            raise StorageError(
                f"cannot read {video}: {error.strerror}; move it away, and it is made again"
            ) from error
        if reported.get(video.name) != digest:
            return False
        self._digests[video.name] = digest
        return True

    def _rows(self, session: ViewSession) -> list[Strip]:
        """The overview: the source, and the newest turns."""
        hidden = max(len(session.turns) - MAX_ROWS, 0)
        name = f"source  {session.source.description['name']}"
        name += f"  (turns 1 to {hidden} are not shown)" if hidden else ""
        shown = session.turns[hidden:]
        source = session.source.frames
        strips = WeakKeyDictionary(
            {turn: self._strips.get(turn) or self._strip(turn, source) for turn in shown}
        )
        self._strips = strips
        return [make_strip(name, source), *(strips[turn] for turn in shown)]

    def _strip(self, turn: ViewTurn, source: Tensor) -> Strip:
        """A turn's row; of one that is lost, its place."""
        if LOST in turn.report:
            return make_strip(f"{_label(turn.report)}  lost", torch.full_like(source, 128))
        return make_strip(_label(turn.report), turn.frames)

    def _content(self, session: ViewSession, videos: list[Path], version: str) -> dict[str, Any]:
        """The report."""
        reports = [
            {
                **turn.report,
                "file": video.name,
                "file_sha256": self._digests.get(video.name),
            }
            for turn, video in zip(session.turns, videos, strict=True)
        ]
        return {
            "format": FORMAT,
            "version": VERSION,
            "session": session.id,
            "engine": {"version": version, **session.engine.describe()},
            "source": session.source.description,
            "turns": reports,
            "seconds": round(sum(sum(report["seconds"].values()) for report in reports), 3),
            "peak_host_bytes": peak_host_bytes(),
        }

    def remove_unfinished(self) -> None:
        """Remove the temporary files of a process that was killed while it wrote."""
        for folder in (self.folder, self.store.turns_folder):
            for path in folder.iterdir() if folder.is_dir() else ():
                if _UNFINISHED.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def _video(self, number: int, camera: str) -> Path:
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", camera).strip("_")[:_MAX_NAME]
        return self.folder / f"turn_{number:02d}_{name}.mp4"

    def _files(self) -> Iterator[Path]:
        """Every file that this folder's session wrote, its manifest last."""
        if self.store.exists():
            rows = self.store.read()["turns"]
            for row in rows:
                yield self._video(row["number"], row["camera"])
            # and the one whose writing a kill may have cut off from the manifest
            for number in range(1, len(rows) + 2):
                yield self.store.turn_path(number)
        yield from self._reported_videos()
        yield self.overview
        yield self.report
        yield self.store.manifest

    def _reported_videos(self) -> Iterator[Path]:
        """Those of turns that had no room beside their videos are in the report alone."""
        yield from (self.folder / name for name in self._reported())

    def _reported(self) -> dict[str, str | None]:
        """The digests of the videos in the report, by name; none of one that was not whole."""
        try:
            content = json.loads(self.report.read_text(encoding="utf-8"))
            rows = content["turns"] if content["format"] == FORMAT else []
            # of before the report had digests, none is known
            digests = {str(row["file"]): row.get("file_sha256") for row in rows}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return {name: digest for name, digest in digests.items() if _VIDEO.fullmatch(name)}


def _label(report: dict[str, Any]) -> str:
    remembered = [
        f"turn {row['turn']} ({row['score']:.2f})" for row in report["memory"]["retrieved"]
    ]
    text = f"turn {report['turn']}  {report['camera']}"
    return text + (f"  remembers {', '.join(remembered)}" if remembered else "")
