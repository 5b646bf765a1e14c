"""A session's folder: what survives the process.

`session.json` lists the finished turns and is rewritten last, so a kill at any moment loses at
most the turn under way. `turns/turn_NN.safetensors` holds a turn's latents and camera, and the
list their digest, so that a damaged file is found out however it was damaged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.errors import StorageError
from mv2v_engine.files import save_json, save_tensors, tensor_digest

FORMAT, VERSION = "mv2v-session", 1
_TENSORS = ("latents", "poses", "intrinsics")


@dataclass(frozen=True, eq=False)
class StoredTurn:
    """A turn as it lies on disk, its latents apart."""

    number: int
    trajectory: CameraTrajectory
    report: dict[str, Any]
    digest: str


class SessionStore:
    """The folder of one session. `identity` is what a resumed session must agree with."""

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
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise StorageError(
                f"{self.manifest} is no session of this engine; choose another folder"
            )
        if manifest.get("version") != VERSION:
            raise StorageError(
                f"{self.manifest} has version {manifest.get('version')}, this engine reads "
                f"{VERSION}; continue it with the engine that wrote it"
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

    def check_identity(self, manifest: dict[str, Any], identity: dict[str, Any]) -> None:
        """Refuse to continue a session of another clip or checkpoint."""
        for name, value in identity.items():
            stored = manifest["identity"].get(name)
            if stored != value:
                raise StorageError(
                    f"{self.folder} holds a session whose {name} is {stored!r}, this one's is "
                    f"{value!r}; give the same input, or choose another folder"
                )

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
        try:
            self._write({**manifest, "turns": [*turns, row]})
        except StorageError:
            if len(turns) == len(manifest["turns"]):
                with suppress(OSError):
                    path.unlink()
            raise
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
        if digest is not None and found != digest:
            raise StorageError(
                f"{path.name} holds other bits than were stored: sha256 {found[:12]}, expected "
                f"{digest[:12]}"
            )
        return tensors, found

    def _write(self, manifest: dict[str, Any]) -> None:
        save_json(self.manifest, {**manifest, "format": FORMAT, "version": VERSION})
