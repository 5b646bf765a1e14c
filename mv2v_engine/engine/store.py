"""A session's folder: what survives the process.

`session.json` lists the finished turns and is rewritten last, so a kill at any moment loses at
most the turn under way. `turns/turn_NN.safetensors` holds a turn's latents and camera, and the
list their digest, so that a damaged file is found out however it was damaged.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.errors import StorageError
from mv2v_engine.files import save_json, save_tensors, share_file, tensor_digest

_TENSORS = ("latents", "poses", "intrinsics")


@dataclass(frozen=True, eq=False)
class StoredTurn:
    """A turn as it lies on disk, its latents apart."""

    number: int
    trajectory: CameraTrajectory
    report: dict[str, Any]
    digest: str


class SessionFolder(ABC):
    """What every session's folder has: a manifest that is rewritten last, and tensors beside it.

    `identity` is what a resumed session must agree with.
    """

    format: ClassVar[str]
    version: ClassVar[int]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = folder / "session.json"
        self.turns_folder = folder / "turns"

    def exists(self) -> bool:
        return self.manifest.exists()

    def read(self) -> dict[str, Any]:
        """The manifest.

        Raises:
            StorageError: it is no manifest of this format.
        """
        try:
            manifest = json.loads(self.manifest.read_text())
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{self.manifest} cannot be read ({error}); choose another folder"
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
        kinds = {"id": str, "identity": dict, "turns": list}
        for name, kind in kinds.items():
            if not isinstance(manifest.get(name), kind):
                raise StorageError(
                    f"{self.manifest} is damaged: {name} must be a {kind.__name__}, got "
                    f"{manifest.get(name)!r}; choose another folder"
                )
        return manifest

    def create(self, id: str, identity: dict[str, Any]) -> None:
        self._write({"id": id, "identity": identity, "turns": []})

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
        save_json(self.manifest, {**manifest, "format": self.format, "version": self.version})

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
        }
        turns = [turn for turn in manifest["turns"] if turn["number"] != number]
        is_listed = len(turns) < len(manifest["turns"])
        self._list({**manifest, "turns": [*turns, row]}, path, is_listed=is_listed)
        return digest

    def latents(self, number: int, digest: str) -> Tensor:
        """A stored turn's latents, the very ones of which `digest` was taken.

        Raises:
            StorageError: the file is missing, damaged, or another turn's.
        """
        path = self.turn_path(number)
        try:
            tensors, _ = self._read(path, digest)
            return tensors[0]
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"{path} cannot be read again ({error}); restore the file, or go on without what "
                f"turn {number} remembers"
            ) from error

    def turns(self) -> Iterator[tuple[StoredTurn, Tensor]]:
        """Every finished turn in order with its latents, read one by one.

        Raises:
            StorageError: a turn that the manifest names is missing or damaged.
        """
        for row in self.read()["turns"]:
            yield self._load(row)

    def branch(self, folder: Path, *, id: str, count: int) -> None:
        """Begin another session in an empty folder with this one's first turns, their files shared.

        Raises:
            FileNotFoundError: one of the files is not there.
            StorageError: there are fewer turns, or the folder cannot be written.
        """
        manifest, other = self.read(), SessionStore(folder)
        turns = manifest["turns"][:count]
        if len(turns) < count:
            raise StorageError(f"{self.folder} holds {len(turns)} turns, asked were {count}")
        for turn in turns:
            share_file(self.turn_path(turn["number"]), other.turn_path(turn["number"]))
        other._write({"id": id, "identity": manifest["identity"], "turns": turns})

    def listed_files(self) -> set[Path]:
        return {self.turn_path(row["number"]) for row in self.read()["turns"]}

    def turn_path(self, number: int) -> Path:
        """Where a turn's tensors lie."""
        return self.turns_folder / f"turn_{number:02d}.safetensors"

    def _load(self, row: dict[str, Any]) -> tuple[StoredTurn, Tensor]:
        try:
            # rows of before digests were kept have none
            path = self.turn_path(row["number"])
            (latents, poses, intrinsics), digest = self._read(path, row.get("sha256"))
            height, width = row["size"]
            trajectory = CameraTrajectory(poses, intrinsics, (height, width), row["camera"])
            return StoredTurn(row["number"], trajectory, row["report"], digest), latents
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StorageError(
                f"{self.folder} holds a session whose turns cannot be read ({error}); "
                "start again in another folder"
            ) from error

    @staticmethod
    def _read(path: Path, digest: str | None) -> tuple[list[Tensor], str]:
        """A turn's tensors and their digest, which is the one given if one is."""
        with safe_open(str(path), framework="pt") as file:
            tensors = [file.get_tensor(name) for name in _TENSORS]
        found = tensor_digest(*tensors)
        check_digest(path, found, digest)
        return tensors, found


def check_digest(path: Path, found: str, expected: str | None) -> None:
    """Refuse a file of other bits than were stored; of before digests were kept, none is known."""
    if expected is not None and found != expected:
        raise StorageError(
            f"{path.name} holds other bits than were stored: sha256 {found[:12]}, expected "
            f"{expected[:12]}"
        )
