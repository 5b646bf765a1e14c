"""The results of a session as its user sees them: videos, a picture, and the report.

Of novel views, all in the folder of the session:

    session.json  turns/turn_01.safetensors ...     what a session is resumed from (folder.py)
    turn_01_pan_right.mp4 ...  overview.png  report.json

Of one edit, the mp4, and beside it the folder that the edit is kept in:

    edited.mp4
    edited.edit/session.json  turns/turn_01/window_00001.safetensors ...    what is resumed from
    edited.edit/overview.png  report.json

Every file is whole or absent, and all but what a session is resumed from can be made again from it:
so is a video that is not the one whose digest the report has.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mv2v_engine.engine.folder import LOST, SessionFolder
from mv2v_engine.engine.request import Request
from mv2v_engine.engine.session import Session
from mv2v_engine.engine.source import LongSource, Source
from mv2v_engine.engine.turn import Turn
from mv2v_engine.errors import RequestError, StorageError
from mv2v_engine.files import (
    file_digest,
    remove_empty,
    remove_matching,
    require_writable,
    save_json,
)
from mv2v_engine.progress import peak_host_bytes
from mv2v_engine.video.contact_sheet import Strip, make_strip, save_contact_sheet, spaced_frames
from mv2v_engine.video.io import VideoReader

VERSION = 1
_MAX_NAME = 60
# newest turns that the overview shows, so that neither it nor its making grows without end
MAX_ROWS = 24
# what the overview shows of a long video, evenly spaced, so that it can be looked at
MAX_WINDOWS = 12
COLUMNS = 5
_VIDEO = re.compile(r"turn_\d+_[A-Za-z0-9._-]*\.mp4")


class Results(ABC):
    """The overview and the report of a session, and the folder that it is kept in.

    format: the report's. of, elsewhere: what errors call the results, and advise.
    """

    format: ClassVar[str]
    of: ClassVar[str]
    elsewhere: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, SessionFolder(folder)
        self.overview, self.report = folder / "overview.png", folder / "report.json"
        # what must not be there when a session begins
        self.places = [self.overview, self.report]

    @abstractmethod
    def _held(self) -> str:
        """What the folder holds, in words."""

    @abstractmethod
    def _files(self) -> Iterator[Path]:
        """Every file of the results and their session, its manifest last."""

    @abstractmethod
    def _strays(self) -> Iterator[tuple[Path, str]]:
        """The folders in which files of these names are written, as patterns."""

    def check_free(self) -> None:
        """Refuse places that hold something already.

        Raises:
            StorageError: they do.
        """
        if self.store.exists():
            raise StorageError(
                f"{self.folder} already holds {self._held()}; continue it with --resume, replace "
                f"it with --overwrite, or {self.elsewhere}"
            )
        for path in self.places:
            if path.exists():
                raise StorageError(
                    f"{path} exists and belongs to no {self.of}; replace it with --overwrite, or "
                    f"{self.elsewhere}"
                )

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Refuse to continue under other settings of the engine.

        Raises:
            StorageError: they differ from those that its turns began with.
        """
        for row in self.store.read()["turns"]:
            # views of before they were kept have none
            self._require_same(row["settings"] or settings, settings)

    def _require_same(self, begun: dict[str, Any], asked: dict[str, Any]) -> None:
        # what is left as it was stands in neither
        for name in (*asked, *begun):
            value = asked.get(name)
            if begun.get(name) != value:
                raise StorageError(
                    f"{self.folder} cannot be resumed: its {self.of} has {name} "
                    f"{begun.get(name)!r} instead of {value!r}; ask for the same {self.of}, or "
                    f"{self.elsewhere}"
                )

    def check_replaceable(self, source: Path) -> None:
        """Refuse a source that `clear` would remove, and another program's session.

        Raises:
            StorageError: that is what lies there.
        """
        if source.resolve() in {path.resolve() for path in self._files()}:
            raise StorageError(
                f"{source} belongs to the {self.of} that --overwrite would remove; {self.elsewhere}"
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
            remove_empty(*turns.glob("turn_*/"), turns)
        except OSError as error:
            raise StorageError(
                f"cannot remove earlier results: {error}; {self.elsewhere}"
            ) from error

    def remove_unfinished(self) -> None:
        """Remove the temporary files of a process that was killed while it wrote."""
        self.store.remove_unfinished()
        for folder, name in [(self.folder, r"(report|overview)"), *self._strays()]:
            pattern = re.compile(rf"\.{name}-\w{{8}}\.(json|png|mp4)", re.IGNORECASE)
            remove_matching([folder], pattern)

    def _reported(self) -> dict[str, Any]:
        """The report; nothing of one that is not there, damaged or another program's."""
        try:
            content = json.loads(self.report.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        is_ours = isinstance(content, dict) and content.get("format") == self.format
        return content if is_ours else {}

    def _content(self, session: Session, version: str) -> dict[str, Any]:
        """What every report says of the session."""
        return {
            "format": self.format,
            "version": VERSION,
            "session": session.id,
            "engine": {"version": version, **session.parts.describe()},
            "peak_host_bytes": peak_host_bytes(),
        }


def _digest_of(video: Path) -> str | None:
    """The digest of a video; None if there is none.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        return file_digest(video) if video.exists() else None
    except OSError as error:
        raise StorageError(
            f"cannot read {video}: {error.strerror}; move it away, and it is made again"
        ) from error


class ViewResults(Results):
    """The folder of a session of novel views."""

    format, of, elsewhere = "mv2v-report", "session", "choose another folder"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # videos that are what was written, by name
        self._digests: dict[str, str] = {}
        # what the overview shows of a turn does not change, and decoding it again is dear
        self._strips: WeakKeyDictionary[Turn, Strip] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"ViewResults({str(self.folder)!r})"

    def check_writable(self) -> None:
        """Try to write in the folder, or in what it would be made in; leaves nothing.

        Raises:
            StorageError: that is not possible.
        """
        require_writable(self.folder)

    def check_resumable(self, requests: Sequence[Request], identity: dict[str, str]) -> None:
        """Refuse to continue a session that `requests` would not have begun.

        Raises:
            StorageError: another clip or checkpoint, or turns that answer other requests.
        """
        self.store.check_identity(self.store.read(), identity)
        done = [(draft, draft.request.camera) for draft, _ in self.store.drafts()]
        if len(done) > len(requests):
            names = ", ".join(camera.name for _, camera in done if camera is not None)
            raise StorageError(
                f"{self.folder} holds {len(done)} finished turns ({names}), only {len(requests)} "
                "are asked for; name those cameras first, or choose another folder"
            )
        for (draft, camera), request in zip(done, requests, strict=False):
            difference = request.difference(draft.report or {}, camera)
            if difference:
                raise StorageError(
                    f"{self.folder} cannot be resumed: its turn {draft.number} has {difference}; "
                    "ask for the same turns first, or choose another folder"
                )

    def publish(
        self, session: Session, *, version: str, check: Callable[[], None] | None = None
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
        videos, reported = self.videos(session), self._reported_videos()
        for turn, video in zip(session.turns, videos, strict=True):
            if not self._is_whole(video, reported):
                with attempt():
                    turn.save(video)
                    self._digests[video.name] = file_digest(video)
        with attempt():
            save_contact_sheet(self.overview, self._rows(session))
        with attempt():
            rows = [
                {**turn.report, "file": v.name, "file_sha256": self._digests.get(v.name)}
                for turn, v in zip(session.turns, videos, strict=True)
            ]
            spent = round(sum(sum(row["seconds"].values()) for row in rows), 3)
            content = {"source": session.source.describe(), "turns": rows, "seconds": spent}
            save_json(self.report, self._content(session, version) | content)
        if failures:
            raise failures[0]
        return [*videos, self.overview, self.report]

    def videos(self, session: Session) -> list[Path]:
        """Where each turn's video is written."""
        return [self._video(turn.number, turn.camera.name) for turn in session.turns]

    def _is_whole(self, video: Path, reported: dict[str, str | None]) -> bool:
        """Whether a video is there as it was written, by this process or the one that reported it.

        Raises:
            StorageError: it cannot be read.
        """
        if video.exists() and video.name in self._digests:
            return True
        digest = _digest_of(video)
        if digest is None or reported.get(video.name) != digest:
            return False
        self._digests[video.name] = digest
        return True

    def _rows(self, session: Session) -> list[Strip]:
        """The overview: the source, and the newest turns."""
        hidden = max(len(session.turns) - MAX_ROWS, 0)
        name = f"source  {session.source.describe()['name']}"
        name += f"  (turns 1 to {hidden} are not shown)" if hidden else ""
        assert isinstance(session.source, Source)
        shown, source = session.turns[hidden:], session.source.frames
        strips = WeakKeyDictionary(
            {turn: self._strips.get(turn) or self._strip(turn, source) for turn in shown}
        )
        self._strips = strips
        return [make_strip(name, source), *(strips[turn] for turn in shown)]

    def _strip(self, turn: Turn, source: Tensor) -> Strip:
        """The row of a turn; of a lost one, its place."""
        report = turn.report
        label = f"turn {report['turn']}  {report['camera']}"
        if remembered := _remembered(report["memory"], "turn "):
            label += f"  remembers {remembered}"
        if LOST in report:
            return make_strip(f"{label}  lost", torch.full_like(source, 128))
        return make_strip(label, turn.frames)

    def _video(self, number: int, camera: str) -> Path:
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", camera).strip("_")[:_MAX_NAME]
        return self.folder / f"turn_{number:02d}_{name}.mp4"

    def _held(self) -> str:
        return f"a session of {len(self.store.read()['turns'])} turns"

    def _strays(self) -> Iterator[tuple[Path, str]]:
        yield self.folder, r"turn_\d+.*"

    def _files(self) -> Iterator[Path]:
        if self.store.exists():
            rows = self.store.read()["turns"]
            for row in rows:
                yield self._video(row["number"], row["camera"]["name"])
            # and the one whose writing a kill may have cut off from the manifest
            for number in range(1, len(rows) + 2):
                yield self.store.window_path({"number": number, "camera": {}}, 1)
        # those of turns that had no room beside their videos are in the report alone
        yield from (self.folder / name for name in self._reported_videos())
        yield self.overview
        yield self.report
        yield self.store.manifest

    def _reported_videos(self) -> dict[str, str | None]:
        """The digests of the videos in the report, by name; None of one that was not whole."""
        try:
            rows = self._reported().get("turns", [])
            # reports of before there were digests have none
            digests = {str(row["file"]): row.get("file_sha256") for row in rows}
        except (KeyError, TypeError, AttributeError):
            return {}
        return {name: digest for name, digest in digests.items() if _VIDEO.fullmatch(name)}


class EditResults(Results):
    """The results of one edit, which is all that its session holds. video: the mp4.

    Raises:
        RequestError: it is named otherwise.
    """

    format, of, elsewhere = "mv2v-edit-report", "edit", "choose another --out"

    def __init__(self, video: Path) -> None:
        if video.suffix.lower() != ".mp4":
            raise RequestError(
                f"--out must name an mp4 to write, got {video}; try {video.with_suffix('.mp4')}"
            )
        self.video = video
        super().__init__(video.with_name(f"{video.stem}.edit"))
        self.places.insert(0, video)

    def __repr__(self) -> str:
        return f"EditResults({str(self.video)!r})"

    def check_writable(self, source: Path) -> None:
        """Refuse places that cannot be written, and the source's own; leaves nothing.

        Raises:
            StorageError: what is in the way.
        """
        if self.video.resolve() == source.resolve():
            raise StorageError(f"{self.video} is the source itself; choose another --out")
        for place in (self.video, self.folder):
            is_wrong = place.exists() and place.is_dir() != (place is self.folder)
            if is_wrong:
                raise StorageError(f"{place} is in the way; choose another --out")
        require_writable(self.folder)

    def check_resumable(self, request: Request) -> None:
        """Refuse to continue an edit that `request` did not begin.

        Raises:
            StorageError: it asked for something else, or an mp4 of another origin is in the way.
        """
        rows = self.store.read()["turns"]
        for row in rows:
            self._require_same(row["request"], request.to_dict())
        if not self.video.exists() or self.has_video():
            return
        if not any(row.get("report") for row in rows):
            raise StorageError(
                f"{self.video} exists, and the edit in {self.folder} is not finished; move that "
                "video away, or begin anew with --overwrite"
            )
        written = self._reported().get("file_bytes")
        if isinstance(written, int) and self.video.stat().st_size > written:
            raise StorageError(
                f"{self.video} is not the video that its edit wrote: it has "
                f"{self.video.stat().st_size:,} bytes instead of {written:,}; move it away, and "
                "the edit's is made again"
            )

    def has_video(self) -> bool:
        """Whether the mp4 is there as this edit wrote it, by the report's digest.

        Raises:
            StorageError: it cannot be read.
        """
        digest = self._reported().get("file_sha256")
        return digest is not None and _digest_of(self.video) == digest

    def clear(self) -> None:
        """Remove the results, and the folder too if nothing else lies there."""
        super().clear()
        remove_empty(self.folder)

    @property
    def num_kept(self) -> int:
        """Finished windows in the folder."""
        return sum(len(row["windows"]) for row in self.store.read()["turns"])

    def _held(self) -> str:
        return f"an edit of {self.num_kept} windows"

    def _strays(self) -> Iterator[tuple[Path, str]]:
        yield self.video.parent, re.escape(self.video.stem)

    def _files(self) -> Iterator[Path]:
        rows = self.store.read()["turns"] if self.store.exists() else []
        yield from self.places
        for row in rows:
            # and the one whose writing a kill may have cut off from the manifest
            for window in range(1, len(row["windows"]) + 2):
                yield self.store.window_path(row, window)
        yield self.store.window_path({"number": len(rows) + 1, "camera": None}, 1)
        yield self.store.manifest

    def publish(self, session: Session, turn: Turn, *, version: str) -> list[Path]:
        """Write what a finished edit's mp4 is accompanied by.

        Returns:
            every file a user may want to open.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
            VideoError: the source or the mp4 is no longer what it was.
        """
        rows = list(self._rows(session, turn))
        save_contact_sheet(self.overview, rows, named=range(0, len(rows), 2))
        content = {
            "file": self.video.name,
            "file_bytes": self.video.stat().st_size,
            "file_sha256": file_digest(self.video),
            **turn.report,
        }
        save_json(self.report, self._content(session, version) | content)
        return [self.video, self.overview, self.report]

    def _rows(self, session: Session, turn: Turn) -> Iterator[Strip]:
        """Two rows a window, its source above its edit."""
        reports: Sequence[dict[str, Any]] = turn.report["windows"]
        shown = spaced_frames(len(reports), MAX_WINDOWS)
        after = VideoReader(self.video)
        assert isinstance(session.source, LongSource)
        for place, index in enumerate(shown):
            report = reports[index]
            first, stop = report["new_frames"]
            numbers = [first + frame for frame in spaced_frames(stop - first, COLUMNS)]
            name = f"window {report['window']} of {len(reports)}"
            name += f"  shot {report['shot']}" if turn.report["shots"] > 1 else ""
            if not place and len(shown) < len(reports):
                name += f"  ({len(shown)} of them are shown)"
            frames = session.source.read(numbers)
            yield make_strip(name, frames, columns=COLUMNS, numbers=numbers)
            remembered = _remembered(report["memory"])
            label = f"remembers window {remembered}"
            label = label if remembered else f"no memory: {report['memory']['reason']}"
            yield make_strip(
                f"edited, {label}", after.read(numbers), columns=COLUMNS, numbers=numbers
            )


def _remembered(memory: dict[str, Any], name: str = "") -> str:
    """What was remembered, with its scores, in words; nothing if it was nothing."""
    rows: Iterable[dict[str, Any]] = memory["retrieved"]
    return ", ".join(f"{name}{row['turn']} ({row['score']:.2f})" for row in rows)
