"""A session's folder: what survives the process.

`session.json` lists the finished turns and is rewritten last, so a kill at any moment loses at
most the turn under way. `turns/turn_NN.safetensors` holds a turn's latents and camera, and the
list their digest and its own, so that damage to any file is found out. A turn whose file is damaged
is lost alone: the list still has its report and its camera.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.errors import StorageError
from mv2v_engine.files import save_json, save_tensors, share_file, tensor_digest
from mv2v_engine.finite import is_finite
from mv2v_engine.locks import WriterLock

_TENSORS = ("latents", "poses", "intrinsics")


@dataclass(frozen=True, eq=False)
class StoredTurn:
    """A turn as it lies on disk, its latents apart.

    digest: of its file's tensors; None if the folder never knew it. lost: why its file cannot be
    read, if it cannot.
    """

    number: int
    trajectory: CameraTrajectory
    report: dict[str, Any]
    digest: str | None
    lost: str | None = None


class SessionFolder(ABC):
    """What every session's folder has: a manifest that is rewritten last, and tensors beside it.

    `identity` is what a resumed session must agree with.
    """

    format: ClassVar[str]
    version: ClassVar[int]
    # what each row of the list must have
    row_kinds: ClassVar[dict[str, type]]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = folder / "session.json"
        self.turns_folder = folder / "turns"

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
        if not isinstance(manifest, dict) or manifest.get("format") != self.format:
            raise StorageError(
                f"{self.manifest} is no session of this engine; choose another folder"
            )
        if manifest.get("version") != self.version:
            raise StorageError(
                f"{self.manifest} has version {manifest.get('version')}, this engine reads "
                f"{self.version}; continue it with the engine that wrote it"
            )
        # of before the list had its own digest, none is known
        expected = manifest.pop("sha256", None)
        if expected is not None and expected != _words_digest(manifest):
            raise self._damaged("it holds other words than were stored")
        self._check_kinds(manifest, {"id": str, "identity": dict, "turns": list}, "")
        for place, row in enumerate(manifest["turns"], 1):
            if not isinstance(row, dict):
                raise self._damaged(f"turn {place} must be a dict, got {row!r}")
            self._check_kinds(row, self.row_kinds, f"turn {place}'s ")
            if row["number"] != place:
                raise self._damaged(f"turn {place} has the number {row['number']}")
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

    def create(
        self, id: str, identity: dict[str, Any], turns: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Write the manifest anew. turns: its rows, as they were read before it was lost."""
        self._write({"id": id, "identity": identity, "turns": list(turns)})

    @abstractmethod
    def listed_files(self) -> set[Path]:
        """The files of tensors that the manifest names.

        Raises:
            StorageError: as `read`.
        """

    def check_identity(self, manifest: dict[str, Any], identity: dict[str, Any]) -> None:
        """Refuse to continue a session of another clip or checkpoint."""
        for name, value in identity.items():
            stored = manifest["identity"].get(name)
            if stored != value:
                raise StorageError(
                    f"{self.folder} holds a session whose {name} is {stored!r}, this one's is "
                    f"{value!r}; give the same input, or choose another folder"
                )

    def _write(self, manifest: dict[str, Any]) -> None:
        content = {**manifest, "format": self.format, "version": self.version}
        save_json(self.manifest, {**content, "sha256": _words_digest(content)})

    def _list(self, manifest: dict[str, Any], path: Path, *, is_listed: bool) -> None:
        """Rewrite the manifest that names a file; one that it never named goes if it fails."""
        try:
            self._write(manifest)
        except StorageError:
            if not is_listed:
                with suppress(OSError):
                    path.unlink()
            raise


class SessionStore(SessionFolder):
    """The folder of one session of novel views."""

    format, version = "mv2v-session", 1
    row_kinds: ClassVar[dict[str, type]] = {
        "number": int,
        "camera": str,
        "size": list,
        "report": dict,
    }

    def append(
        self, number: int, latents: Tensor, trajectory: CameraTrajectory, report: dict[str, Any]
    ) -> str:
        """Keep a finished turn: its tensors first, then the manifest that names them.

        Returns:
            the digest that `latents` asks for.

        Raises:
            StorageError: the folder does not take it, and is as it was.
        """
        manifest = self.read()
        values = (latents.cpu(), trajectory.poses, trajectory.intrinsics)
        digest = tensor_digest(*values)
        path = self.turn_path(number)
        save_tensors(path, dict(zip(_TENSORS, values, strict=True)))
        row = {
            "number": number,
            "camera": trajectory.name,
            "size": list(trajectory.size),
            "report": report,
            "sha256": digest,
            # what is left of the camera if the file is lost
            "path": {"poses": _packed(values[1]), "intrinsics": _packed(values[2])},
        }
        turns = [turn for turn in manifest["turns"] if turn["number"] != number]
        is_listed = len(turns) < len(manifest["turns"])
        self._list({**manifest, "turns": [*turns, row]}, path, is_listed=is_listed)
        return digest

    def latents(self, number: int, digest: str | None) -> Tensor:
        """A stored turn's latents, the very ones of which `digest` was taken.

        Raises:
            StorageError: the file is missing, damaged, another turn's, or not finite.
        """
        with self._reading(number):
            latents = self._tensors(number, digest)[0]
            check_finite(self.turn_path(number), latents)
        return latents

    def turns(self) -> Iterator[tuple[StoredTurn, Tensor | None]]:
        """Every finished turn in order with its latents, read one by one; None: they are lost.

        Raises:
            StorageError: the manifest is damaged, or a turn is lost whose camera only its file had.
        """
        for row in self.read()["turns"]:
            yield self._load(row)

    def branch(self, folder: Path, *, id: str, count: int) -> None:
        """Begin another session in an empty folder with this one's first turns, their files shared.

        Raises:
            FileNotFoundError: one of the files is not there.
            StorageError: there are fewer turns, the folder is in use, holds a session already, or
                cannot be written.
        """
        manifest, other = self.read(), SessionStore(folder)
        turns = manifest["turns"][:count]
        if len(turns) < count:
            raise StorageError(f"{self.folder} holds {len(turns)} turns, asked were {count}")
        with other.lock():
            if other.exists():
                raise StorageError(
                    f"{folder} already holds a session; choose another folder for the branch"
                )
            for turn in turns:
                share_file(self.turn_path(turn["number"]), other.turn_path(turn["number"]))
            other._write({"id": id, "identity": manifest["identity"], "turns": turns})

    def listed_files(self) -> set[Path]:
        return {self.turn_path(row["number"]) for row in self.read()["turns"]}

    def turn_path(self, number: int) -> Path:
        """Where a turn's tensors lie."""
        return self.turns_folder / f"turn_{number:02d}.safetensors"

    def _load(self, row: dict[str, Any]) -> tuple[StoredTurn, Tensor | None]:
        # rows of before digests were kept have none
        number, digest, lost = row["number"], row.get("sha256"), None
        tensors: list[Tensor] = []
        try:
            with self._reading(number):
                tensors = self._tensors(number, digest)
                digest = tensor_digest(*tensors)
                check_finite(self.turn_path(number), tensors[0])
        except StorageError as error:
            # where the latents alone are bad, the file's own camera is good
            if not tensors and "path" not in row:
                raise
            lost = str(error)
        try:
            if not tensors:
                tensors = [_unpacked(row["path"][name]) for name in _TENSORS[1:]]
            height, width = row["size"]
            poses, intrinsics = tensors[-2:]
            trajectory = CameraTrajectory(poses, intrinsics, (height, width), row["camera"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"turn {number}'s camera is none ({error})") from error
        stored = StoredTurn(number, trajectory, row["report"], digest, lost)
        return stored, tensors[0] if lost is None else None

    def _tensors(self, number: int, digest: str | None) -> list[Tensor]:
        """Latents, poses and intrinsics, of which `digest` was taken."""
        path = self.turn_path(number)
        with safe_open(str(path), framework="pt") as file:
            tensors = [file.get_tensor(name) for name in _TENSORS]
        check_digest(path, tensor_digest(*tensors), digest)
        return tensors

    @contextmanager
    def _reading(self, number: int) -> Iterator[None]:
        """What a turn's file may be found to be, as one error."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"turn {number} is lost: {self.turn_path(number)} cannot be read again ({error}); "
                "restore the file, or go on without it"
            ) from error


def check_digest(path: Path, found: str, expected: str | None) -> None:
    """Refuse a file of other bits than were stored; of before digests were kept, none is known."""
    if expected is not None and found != expected:
        raise StorageError(
            f"{path.name} holds other bits than were stored: sha256 {found[:12]}, expected "
            f"{expected[:12]}"
        )


def check_finite(path: Path, latents: Tensor) -> None:
    """Refuse latents of before they were checked: they would spoil all turns that remember them."""
    if not bool(is_finite(latents)):
        raise StorageError(f"{path.name} holds latents that are not finite")


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
