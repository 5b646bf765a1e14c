"""A session's folder: what survives the process.

    session.json                            the turns, with the digest of each of their windows
    turns/turn_01.safetensors               a novel view: latents and camera
    turns/turn_01/window_00001.safetensors  a window of an edit: latents, its source's descriptor,
                                            and its report

The manifest is rewritten last, so a kill at any moment loses at most the window under way; it has a
digest of its own, so that damage to any file is found out. A novel view whose file is damaged is
lost alone: the manifest still has its report and its camera. An edit goes on behind the window
before the damaged one: made again, that one and those behind it get the same bits.

C F H W latents, D numbers of a descriptor.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.engine.request import Request
from mv2v_engine.engine.turn import Draft, KeptWindow
from mv2v_engine.errors import RequestError, StorageError
from mv2v_engine.files import remove_matching, save_json, save_tensors, share_file, tensor_digest
from mv2v_engine.locks import WriterLock
from mv2v_engine.ops.finite import is_finite

FORMAT, VERSION = "mv2v-session", 2
# before, the two tasks had formats of their own
_FORMATS = {(FORMAT, VERSION), (FORMAT, 1), ("mv2v-edit-session", 1)}
# in a turn's report: why the folder has not taken it; why it can no longer be read from there
STORAGE_ERROR, LOST = "storage_error", "lost"
# the tensors of a file, in the order in which its digest is taken
_TENSORS = ("latents", "descriptor", "poses", "intrinsics")
_ROW: dict[str, type] = {"number": int, "request": dict, "settings": dict, "windows": list}
# what files.replacing leaves behind when the process is killed while it writes
_UNFINISHED = re.compile(r"\.(session-\w{8}\.json|(turn|window)_\d+-\w{8}\.safetensors)")


class KeptFolder:
    """A folder of one writer, with a manifest that has a digest of its words.

    `identity` in the manifest is what a resumed session must agree with.

    format, version: what is written. formats: what is read. of: what errors call the content.
    """

    format: ClassVar[str]
    version: ClassVar[int]
    formats: ClassVar[Set[tuple[str, int]]]
    of: ClassVar[str]

    def __init__(self, folder: Path, manifest: str) -> None:
        self.folder = folder
        self.manifest = folder / manifest

    def exists(self) -> bool:
        return self.manifest.exists()

    @property
    def is_writable(self) -> bool:
        """Whether this process may write here, as far as permissions and the disk's kind tell."""
        return os.access(self.folder, os.W_OK)

    def lock(self) -> WriterLock:
        """Keep every other writer out, until the lock is released or gone.

        Raises:
            StorageError: another one has the folder.
        """
        lock = WriterLock(self.folder)
        lock.take()
        return lock

    def read(self) -> dict[str, Any]:
        """The manifest.

        Raises:
            StorageError: it is no manifest of this format, or damaged.
        """
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise StorageError(
                f"{self.manifest} cannot be read ({error}); restore it, or choose another folder"
            ) from error
        known = {name for name, _ in self.formats}
        if not isinstance(manifest, dict) or manifest.get("format") not in known:
            raise StorageError(
                f"{self.manifest} is no {self.of} of this engine; choose another folder"
            )
        if (manifest["format"], manifest.get("version")) not in self.formats:
            raise StorageError(
                f"{self.manifest} has version {manifest.get('version')}, this engine reads up to "
                f"{self.version}; continue it with the engine that wrote it"
            )
        # a manifest from before there were digests has none
        expected = manifest.pop("sha256", None)
        if expected is not None and expected != _words_digest(manifest):
            raise self._damaged("it holds other words than were stored")
        self._check_kinds(manifest, {"id": str, "identity": dict}, "")
        return manifest

    def _check_kinds(self, values: dict[str, Any], kinds: dict[str, type], whose: str) -> None:
        for name, kind in kinds.items():
            if not isinstance(values.get(name), kind):
                raise self._damaged(
                    f"{whose}{name} must be a {kind.__name__}, got {values.get(name)!r}"
                )

    def _damaged(self, what: str) -> StorageError:
        return StorageError(
            f"{self.manifest} is damaged: {what}; restore it, or choose another folder"
        )

    def write(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, with a digest of its words.

        Raises:
            StorageError: the folder does not take it, and has the manifest that it had.
        """
        content = {**manifest, "format": self.format, "version": self.version}
        content.pop("sha256", None)
        save_json(self.manifest, {**content, "sha256": _words_digest(content)})

    def check_identity(self, manifest: dict[str, Any], identity: dict[str, Any]) -> None:
        """Refuse to continue a session of another clip or checkpoint.

        Raises:
            StorageError: so it is; it names the first thing that differs, of settings each one.
        """
        for name, value in identity.items():
            stored = manifest["identity"].get(name)
            if stored == value:
                continue
            had, given = {name: stored}, {name: value}
            if isinstance(stored, dict) and isinstance(value, dict):
                had, given = stored, value
            shown = [
                [repr(side[each]) if each in side else "not set" for side in (had, given)]
                for each in had | given
            ]
            said = "; whose ".join(
                f"{each} is {before}, this one's is {now}"
                for each, (before, now) in zip(had | given, shown, strict=True)
                if before != now
            )
            raise StorageError(
                f"{self.folder} holds a {self.of} whose {said}; give the same input, or choose "
                "another folder"
            )


class SessionFolder(KeptFolder):
    """A manifest that is rewritten last, and tensors beside it.

    Folders that the version before wrote are read as they are, and become this version's at the
    next write.
    """

    format, version, formats, of = FORMAT, VERSION, _FORMATS, "session"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "session.json")
        self.turns_folder = folder / "turns"

    def read(self) -> dict[str, Any]:
        """The manifest, its rows as `current_row` makes them.

        Raises:
            StorageError: it is no manifest of this format, or damaged.
        """
        manifest = super().read()
        self._check_kinds(manifest, {"turns": list}, "")
        for place, row in enumerate(manifest["turns"], 1):
            if not isinstance(row, dict):
                raise self._damaged(f"turn {place} must be a dict, got {row!r}")
            manifest["turns"][place - 1] = row = current_row(row)
            self._check_kinds(row, _ROW, f"turn {place}'s ")
            if row.setdefault("camera", None) is not None:
                self._check_kinds(row, {"camera": dict, "report": dict}, f"turn {place}'s ")
            if row["number"] != place:
                raise self._damaged(f"turn {place} has the number {row['number']}")
        return manifest

    def create(
        self, id: str, identity: dict[str, Any], turns: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Write the manifest anew. turns: its rows, as they were read before it was lost."""
        self.write({"id": id, "identity": identity, "turns": list(turns)})

    def append(self, draft: Draft, window: int, latents: Tensor) -> str:
        """Keep a finished window, counted from 1: its tensors first, then the manifest.

        latents: [C, F, H, W].

        Returns:
            the digest that `latents` asks for.

        Raises:
            StorageError: the folder does not take it, and is as it was.
        """
        manifest, kept, camera = self.read(), draft.windows[window - 1], draft.request.camera
        tensors, words = {"latents": latents.cpu()}, None
        if camera is None:
            assert kept.descriptor is not None
            tensors["descriptor"] = kept.descriptor
            words = json.dumps(kept.report)
        else:
            tensors |= {"poses": camera.poses, "intrinsics": camera.intrinsics}
        row = _row(manifest, draft)
        path = self.window_path(row, window)
        save_tensors(path, tensors, {} if words is None else {"report": words})
        digest = _digest(tensors, words)
        is_listed = len(row["windows"]) >= window
        # a window that is made again is followed by others that are
        row["windows"] = [*row["windows"][: window - 1], digest]
        row["report"] = _stored_report(draft)
        try:
            self.write(manifest)
        except StorageError:
            if not is_listed:  # a file that the manifest never named
                with suppress(OSError):
                    path.unlink()
            raise
        return digest

    def finish(self, draft: Draft) -> None:
        """Keep the report of a turn whose windows are all there.

        Raises:
            StorageError: the folder does not take it.
        """
        manifest = self.read()
        _row(manifest, draft)["report"] = _stored_report(draft)
        self.write(manifest)

    def drafts(self) -> Iterator[tuple[Draft, Tensor | None]]:
        """Every turn in order, its windows read once and checked; a novel view with its latents.

        A turn ends before its first window that is missing or damaged, and says why; a novel view
        keeps its place.

        Raises:
            StorageError: the manifest is damaged, or a turn is lost whose camera only its file had.
        """
        for row in self.read()["turns"]:
            yield self._view(row) if row["camera"] is not None else (self._edit(row), None)

    def _edit(self, row: dict[str, Any]) -> Draft:
        number, report = row["number"], row.get("report")
        try:
            draft = Draft(number, Request(**row["request"]), row["settings"], report=report)
        except TypeError as error:
            raise self._damaged(f"turn {number} lacks or misnames {error}") from error
        for window, digest in enumerate(row["windows"], 1):
            try:
                tensors, words = self._read(row, window, digest)
            except StorageError as error:
                draft.lost, draft.report = str(error), None
                break
            read = partial(self.latents, row, window, digest)
            draft.windows.append(KeptWindow(words, None, tensors["descriptor"], read))
        draft.num_stored = draft.num_done
        return draft

    def _view(self, row: dict[str, Any]) -> tuple[Draft, Tensor | None]:
        number, lost, tensors = row["number"], None, dict[str, Tensor]()
        digest = row["windows"][0] if row["windows"] else None
        try:
            with self._reading(row, 1):
                # where the latents alone are bad, the file's own camera is good
                tensors, _ = self._tensors(row, 1, digest)
                digest = _digest(tensors, None)
                _check_finite(self.window_path(row, 1), tensors["latents"])
        except StorageError as error:
            if not tensors and "poses" not in row["camera"]:
                raise
            lost = str(error)
        try:
            camera = row["camera"]
            poses, intrinsics = (
                tensors[name] if tensors else _unpacked(camera[name]) for name in _TENSORS[2:]
            )
            height, width = camera["size"]
            trajectory = CameraTrajectory(poses, intrinsics, (height, width), camera["name"])
            request = replace(Request(**row["request"]), camera=trajectory)
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"turn {number}'s camera is none ({error})") from error
        report = row["report"] if lost is None else {**row["report"], LOST: lost}
        read = partial(self.latents, row, 1, digest)
        kept = KeptWindow(report, None, read_stored=read)
        draft = Draft(number, request, row["settings"], [kept], report, num_stored=1, lost=lost)
        return draft, tensors["latents"] if lost is None else None

    def latents(self, row: Mapping[str, Any], window: int, digest: str | None) -> Tensor:
        """The latents [C, F, H, W] of a stored window, the very ones of which `digest` was taken.

        row: the turn's, of the manifest.

        Raises:
            StorageError: the file is missing, damaged, another window's, or not finite.
        """
        return self._read(row, window, digest)[0]["latents"]

    def window_reports(self, number: int) -> list[dict[str, Any]]:
        """The reports of an edit's finished windows in order; their tensors are not read.

        Raises:
            StorageError: a window that the manifest names is missing or damaged, or the manifest.
        """
        row = next((row for row in self.read()["turns"] if row["number"] == number), None)
        found = []
        for window in range(1, 1 + len(row["windows"] if row else ())):
            path = self.window_path(row or {}, window)
            with self._reading(row or {}, window), safe_open(str(path), framework="pt") as file:
                found.append(json.loads((file.metadata() or {})["report"]))
        return found

    def branch(self, folder: Path, *, id: str, count: int, without: Set[int] = frozenset()) -> None:
        """Begin another session in an empty folder with this one's first turns, their files shared.

        without: numbers of turns whose files are gone, which are not remembered there either.

        Raises:
            FileNotFoundError: one of the files is not there.
            StorageError: there are fewer turns, the folder is in use, holds a session already, or
                cannot be written.
        """
        manifest, other = self.read(), SessionFolder(folder)
        rows = manifest["turns"][:count]
        if len(rows) < count:
            raise StorageError(f"{self.folder} holds {len(rows)} turns, asked were {count}")
        with other.lock():
            if other.exists():
                raise StorageError(
                    f"{folder} already holds a session; choose another folder for the branch"
                )
            for path in _paths(self, [row for row in rows if row["number"] not in without]):
                share_file(path, folder / path.relative_to(self.folder))
            other.create(id, manifest["identity"], rows)

    def listed_files(self) -> set[Path]:
        """The files of tensors that the manifest names.

        Raises:
            StorageError: as `read`.
        """
        return set(_paths(self, self.read()["turns"]))

    def window_path(self, row: Mapping[str, Any], window: int) -> Path:
        """Where a window of a turn lies. row: the turn's, of the manifest."""
        turn = self.turns_folder / f"turn_{row['number']:02d}"
        if row["camera"] is not None:
            return turn.with_suffix(".safetensors")
        return turn / f"window_{window:05d}.safetensors"

    def remove_unfinished(self) -> None:
        """Remove the temporary files of a process that was killed while it wrote."""
        turns = self.turns_folder
        remove_matching((self.folder, turns, *turns.glob("turn_*/")), _UNFINISHED)

    def _read(
        self, row: Mapping[str, Any], window: int, digest: str | None
    ) -> tuple[dict[str, Tensor], Any]:
        with self._reading(row, window):
            tensors, words = self._tensors(row, window, digest)
            _check_finite(self.window_path(row, window), tensors["latents"])
            return tensors, None if words is None else json.loads(words)

    def _tensors(
        self, row: Mapping[str, Any], window: int, digest: str | None
    ) -> tuple[dict[str, Tensor], str | None]:
        """The tensors and the report of a file, of which `digest` was taken."""
        path = self.window_path(row, window)
        names = _TENSORS[:2] if row["camera"] is None else (_TENSORS[0], *_TENSORS[2:])
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in names}
            words = (file.metadata() or {})["report"] if row["camera"] is None else None
        found = _digest(tensors, words)
        # a row from before there were digests has none
        if digest is not None and found != digest:
            raise StorageError(
                f"{path.name} holds other bits than were stored: sha256 {found[:12]}, expected "
                f"{digest[:12]}"
            )
        return tensors, words

    @contextmanager
    def _reading(self, row: Mapping[str, Any], window: int) -> Iterator[None]:
        """What a window's file may be found to be, as one error."""
        try:
            yield
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            found = f"{self.window_path(row, window)} cannot be read again ({error}); restore the "
            if row["camera"] is not None:
                raise StorageError(
                    f"turn {row['number']} is lost: {found}file, or go on without it"
                ) from error
            raise StorageError(
                f"{found}file, or resume the edit, which makes its window and those behind it again"
            ) from error


@contextmanager
def kept_for_one(
    folder: KeptFolder | None, *, resume: bool, is_locked: bool
) -> Iterator[WriterLock | None]:
    """Open a folder under the lock of its one writer, which is let go of if the block fails.

    A folder on a read-only disk is resumed without one: its turns can be read, and no new one is
    stored.

    Raises:
        RequestError: there is no folder to resume.
        StorageError: another session has it open, it does not hold what is to be resumed, or it
            holds a session already.
    """
    lock = None
    if folder is None:
        if resume:
            raise RequestError("resume needs the session's folder: give a store")
    elif not resume or folder.exists():
        lock = None if is_locked or (resume and not folder.is_writable) else folder.lock()
    try:
        if folder is not None and folder.exists() != resume:
            found = f"already holds a {folder.of}" if folder.exists() else f"holds no {folder.of}"
            advice = "resume it, or choose another folder" if folder.exists() else "start one there"
            raise StorageError(f"{folder.folder} {found}; {advice}")
        yield lock
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def current_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a manifest as this version has it, from one of this version or the one before.

    number, request (without its camera), settings (`Draft.settings`), camera (None for an edit),
    windows (their digests), report (None until every window is finished).
    """
    if "windows" in row:
        return {"camera": None, **row}
    if not isinstance(row.get("camera"), str):
        return dict(row)  # a row of neither version, which the check will say
    report = row.get("report")
    request = Request.of_report(report if isinstance(report, Mapping) else {}, None)
    path = row.get("path")
    return {
        "number": row.get("number"),
        "request": request.to_dict(),
        "settings": {},
        "camera": {
            "name": row["camera"],
            "size": row.get("size"),
            **(path if isinstance(path, Mapping) else {}),
        },
        "windows": [row.get("sha256")],
        "report": report,
    }


def _row(manifest: dict[str, Any], draft: Draft) -> dict[str, Any]:
    """The turn's row of a manifest, as the draft has it but for the windows that are stored."""
    row: dict[str, Any] = {
        "number": draft.number,
        "request": draft.request.to_dict(),
        "settings": draft.settings,
        "camera": None,
        "windows": [],
        "report": None,
    }
    camera = draft.request.camera
    if camera is not None:
        # what is left of the camera if the file is lost
        poses, intrinsics = _packed(camera.poses), _packed(camera.intrinsics)
        row["camera"] = {"name": camera.name, "size": list(camera.size)}
        row["camera"] |= {"poses": poses, "intrinsics": intrinsics}
    rows = manifest["turns"]
    for place, known in enumerate(rows):
        if known["number"] == draft.number:
            rows[place] = row | {"windows": known["windows"]}
            return rows[place]  # type: ignore[no-any-return]
    rows.append(row)
    return row


def _paths(folder: SessionFolder, rows: Sequence[Mapping[str, Any]]) -> Iterator[Path]:
    for row in rows:
        for window in range(1, len(row["windows"]) + 1):
            yield folder.window_path(row, window)


def _stored_report(draft: Draft) -> dict[str, Any] | None:
    if draft.report is None:
        return None
    return {name: value for name, value in draft.report.items() if name != STORAGE_ERROR}


def _check_finite(path: Path, latents: Tensor) -> None:
    """Refuse latents of before they were checked: they would spoil all turns that remember them."""
    if not bool(is_finite(latents)):
        raise StorageError(f"{path.name} holds latents that are not finite")


def _digest(tensors: Mapping[str, Tensor], report: str | None) -> str:
    """The digest of a file's tensors, and of its report if it has one."""
    found = tensor_digest(*tensors.values())
    return found if report is None else hashlib.sha256(f"{found} {report}".encode()).hexdigest()


def _words_digest(content: dict[str, Any]) -> str:
    """SHA-256 of what a manifest says, however it is laid out."""
    words = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()


def _packed(tensor: Tensor) -> dict[str, Any]:
    """A float32 tensor as JSON, to the bit."""
    data = tensor.contiguous().numpy().astype("<f4").tobytes()
    return {"shape": list(tensor.shape), "float32": base64.b64encode(data).decode()}


def _unpacked(words: dict[str, Any]) -> Tensor:
    data = np.frombuffer(base64.b64decode(words["float32"], validate=True), "<f4")
    return torch.from_numpy(data.astype(np.float32)).reshape(words["shape"])
