"""An edited video as its user sees it: the mp4, and beside it the folder that its edit is kept in.

    edited.mp4
    edited.edit/session.json  turns/turn_01/window_00001.safetensors ...    what is resumed from
    edited.edit/overview.png  report.json

Every file is whole or absent, and the mp4 is there when the last window is finished. The session
holds this one edit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mv2v_engine.engine.editing.request import EditRequest
from mv2v_engine.engine.editing.session import EditSession
from mv2v_engine.engine.editing.store import EditStore
from mv2v_engine.engine.turn import Turn
from mv2v_engine.errors import RequestError, StorageError
from mv2v_engine.files import file_digest, require_writable, save_json
from mv2v_engine.progress import peak_host_bytes
from mv2v_engine.video.contact_sheet import Strip, make_strip, save_contact_sheet, spaced_frames
from mv2v_engine.video.io import VideoReader

FORMAT, VERSION = "mv2v-edit-report", 1
# what the overview shows of a long video, evenly spaced, so that it can be looked at
MAX_WINDOWS = 12
COLUMNS = 5
# what files.replacing leaves behind when the process is killed while it writes
_UNFINISHED = re.compile(r"\.(report|overview)-\w{8}\.(json|png)")


class EditResults:
    """Where one edit is written. video: the mp4.

    Raises:
        RequestError: it is named otherwise.
    """

    def __init__(self, video: Path) -> None:
        if video.suffix.lower() != ".mp4":
            raise RequestError(
                f"--out must name an mp4 to write, got {video}; try {video.with_suffix('.mp4')}"
            )
        self.video, self.folder = video, video.with_name(f"{video.stem}.edit")
        self.store = EditStore(self.folder)
        self.overview, self.report = self.folder / "overview.png", self.folder / "report.json"

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

    def check_free(self) -> None:
        """Refuse places that hold something already.

        Raises:
            StorageError: they do.
        """
        if self.store.exists():
            raise StorageError(
                f"{self.folder} already holds an edit of {self.num_kept} windows; continue it "
                "with --resume, replace it with --overwrite, or choose another --out"
            )
        for path in (self.video, self.overview, self.report):
            if path.exists():
                raise StorageError(
                    f"{path} exists and belongs to no edit; replace it with --overwrite, or "
                    "choose another --out"
                )

    def check_resumable(self, request: EditRequest) -> None:
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
        try:
            return digest is not None and self.video.exists() and file_digest(self.video) == digest
        except OSError as error:
            raise StorageError(
                f"cannot read {self.video}: {error.strerror}; move it away, and it is made again"
            ) from error

    def _reported(self) -> dict[str, Any]:
        """The report; nothing of one that is not there, damaged or another program's."""
        try:
            content = json.loads(self.report.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        is_ours = isinstance(content, dict) and content.get("format") == FORMAT
        return content if is_ours else {}

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Refuse to continue an edit under other settings of the engine.

        Raises:
            StorageError: they differ from those that it began with.
        """
        for row in self.store.read()["turns"]:
            self._require_same(row["settings"], settings)

    def _require_same(self, begun: dict[str, Any], asked: dict[str, Any]) -> None:
        for name, value in asked.items():
            if begun.get(name) != value:
                raise StorageError(
                    f"{self.folder} cannot be resumed: its edit has {name} {begun.get(name)!r} "
                    f"instead of {value!r}; ask for the same edit, or choose another --out"
                )

    def check_replaceable(self, source: Path) -> None:
        """Refuse a source that `clear` would remove, and another program's session.

        Raises:
            StorageError: that is what lies there.
        """
        if source.resolve() in {path.resolve() for path in self._files()}:
            raise StorageError(
                f"{source} belongs to the edit that --overwrite would remove; choose another --out"
            )

    def clear(self) -> None:
        """Remove an earlier edit's files, and nothing else that lies there.

        Raises:
            StorageError: one cannot be removed, or session.json is another program's.
        """
        try:
            for path in self._files():
                path.unlink(missing_ok=True)
            turns = self.store.turns_folder
            for folder in (*turns.glob("turn_*"), turns, self.folder):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        except OSError as error:
            raise StorageError(
                f"cannot remove earlier results: {error}; choose another --out"
            ) from error

    @property
    def num_kept(self) -> int:
        """Finished windows in the folder."""
        return sum(len(row["windows"]) for row in self.store.read()["turns"])

    def _files(self) -> Iterator[Path]:
        """Every file of the edit, the session last: while it is there it tells what belongs."""
        rows = self.store.read()["turns"] if self.store.exists() else []
        yield from (self.video, self.overview, self.report)
        for row in rows:
            # and the one whose writing a kill may have cut off from the manifest
            for window in range(1, len(row["windows"]) + 2):
                yield self.store.window_path(row["number"], window)
        yield self.store.window_path(len(rows) + 1, 1)
        yield self.store.manifest

    def remove_unfinished(self) -> None:
        """Remove the temporary files of a process that was killed while it wrote."""
        video = re.compile(rf"\.{re.escape(self.video.stem)}-\w{{8}}\.mp4", re.IGNORECASE)
        for folder, pattern in ((self.folder, _UNFINISHED), (self.video.parent, video)):
            for path in folder.iterdir() if folder.is_dir() else ():
                if pattern.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def publish(self, session: EditSession, turn: Turn, *, version: str) -> list[Path]:
        """Write what a finished edit's mp4 is accompanied by.

        Returns:
            every file a user may want to open.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
            VideoError: the source or the mp4 is no longer what it was.
        """
        named, rows = [], []
        for index, strip in enumerate(self._rows(session, turn)):
            named += [] if index % 2 else [index]
            rows.append(strip)
        save_contact_sheet(self.overview, rows, named=named)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "session": session.id,
            "engine": {"version": version, **session.engine.describe()},
            "file": self.video.name,
            "file_bytes": self.video.stat().st_size,
            "file_sha256": file_digest(self.video),
            **turn.report,
            "peak_host_bytes": peak_host_bytes(),
        }
        save_json(self.report, content)
        return [self.video, self.overview, self.report]

    def _rows(self, session: EditSession, turn: Turn) -> Iterator[Strip]:
        """Two rows a window, its source above its edit."""
        reports: Sequence[dict[str, Any]] = turn.report["windows"]
        shown = spaced_frames(len(reports), MAX_WINDOWS)
        after = VideoReader(self.video)
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
            label = f"edited, {_remembered(report['memory'])}"
            yield make_strip(label, after.read(numbers), columns=COLUMNS, numbers=numbers)


def _remembered(memory: dict[str, Any]) -> str:
    rows = [f"{row['turn']} ({row['score']:.2f})" for row in memory["retrieved"]]
    return f"remembers window {', '.join(rows)}" if rows else f"no memory: {memory['reason']}"
