"""A stream's folder: what survives the process, at a cost that does not grow with the stream.

    stream.json                       the seed and the settings; never rewritten
    blocks/block_0000001.safetensors  every block's latents and its prompt; of an edit its source's
                                      latents, too, and how many of its frames there are
    source/frames_0000001.safetensors frames that a block edits, until a snapshot holds what they
                                      leave in the VAE's encoder
    state.safetensors                 a snapshot: all that the blocks before it left behind

A block's file is written when the block is finished, and how many there are is how far the stream
is. The snapshot is replaced every so many blocks; the blocks behind it are enough to make the rest
of the state again, to the same bits. Every file has a digest of its tensors.

C F H W latents of a block.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mv2v_engine.engine.folder import KeptFolder
from mv2v_engine.errors import StorageError
from mv2v_engine.files import remove_empty, remove_matching, save_tensors, tensor_digest

_UNFINISHED = re.compile(
    r"\.((stream|report)-\w{8}\.json|(block_\d+|frames_\d+|state)-\w{8}\.safetensors)"
)

_ADVICE = "restore it, or remove it and the blocks behind it, which are made again then"


class StoredBlock(NamedTuple):
    """A finished block: its latents, and its source's, [C, F, H, W].

    num_frames: of the video, which ends with fewer than a whole block's; None: all.
    """

    latents: Tensor
    prompt: str
    source: Tensor | None = None
    num_frames: int | None = None


class StreamFolder(KeptFolder):
    """The folder of one stream, with one writer at a time."""

    format, version, of = "mv2v-stream", 1, "stream"
    formats = frozenset({(format, version)})

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "stream.json")
        self.blocks_folder, self.snapshot = folder / "blocks", folder / "state.safetensors"
        self.source_folder = folder / "source"

    def create(self, id: str, identity: dict[str, Any]) -> None:
        """Begin a stream."""
        self.write({"id": id, "identity": identity})

    @property
    def num_blocks(self) -> int:
        """Finished blocks, from the first one on without a gap."""
        names = set()
        if self.blocks_folder.is_dir():
            names = {path.name for path in self.blocks_folder.iterdir()}
        return next(n for n in count() if self.block_path(n + 1).name not in names)

    def block_path(self, number: int) -> Path:
        """Where a block lies, counted from 1."""
        return self.blocks_folder / f"block_{number:07d}.safetensors"

    def save_block(
        self,
        number: int,
        latents: Tensor,
        prompt: str,
        *,
        source: Tensor | None = None,
        num_frames: int | None = None,
    ) -> None:
        """Keep a finished block; the arguments as `StoredBlock` has them.

        Raises:
            StorageError: the folder does not take it, and is as it was.
        """
        tensors, words = {"latents": latents.cpu()}, dict[str, Any](prompt=prompt)
        if source is not None:
            tensors["source"], words["num_frames"] = source.cpu(), num_frames
        _save(self.block_path(number), tensors, words)

    def read_block(self, number: int) -> StoredBlock:
        """A finished block.

        Raises:
            StorageError: it is missing, damaged, or not the one that was stored.
        """
        tensors, words = _read(self.block_path(number))
        return StoredBlock(
            tensors["latents"], words["prompt"], tensors.get("source"), words.get("num_frames")
        )

    def source_path(self, number: int) -> Path:
        """Where the frames lie that a block edits."""
        return self.source_folder / f"frames_{number:07d}.safetensors"

    def save_source(self, number: int, frames: Tensor) -> None:
        """Keep the frames uint8 [T, height, width, 3] of a block that begins.

        Raises:
            StorageError: the folder does not take them, and is as it was.
        """
        _save(self.source_path(number), {"frames": frames}, {})

    def read_source(self, number: int) -> Tensor | None:
        """The frames that a block edits; None: they are not here.

        Raises:
            StorageError: they are damaged.
        """
        path = self.source_path(number)
        return _read(path)[0]["frames"] if path.exists() else None

    def remove_source(self, number: int) -> None:
        """Let go of the frames of a block and of those before it."""
        with suppress(OSError):
            for path in self.source_folder.glob("frames_*.safetensors"):
                if path.name <= self.source_path(number).name:
                    path.unlink(missing_ok=True)

    def save_snapshot(self, num_blocks: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep what so many blocks left, in place of the snapshot before.

        Raises:
            StorageError: the folder does not take it, and has the snapshot that it had.
        """
        kept = {name: tensor.cpu() for name, tensor in tensors.items()}
        _save(self.snapshot, kept, {"num_blocks": num_blocks})

    def read_snapshot(self) -> tuple[int, dict[str, Tensor]]:
        """After how many blocks the snapshot was taken, and its tensors; 0 of none.

        Raises:
            StorageError: it is damaged.
        """
        if not self.snapshot.exists():
            return 0, {}
        tensors, words = _read(self.snapshot)
        return words["num_blocks"], tensors

    def remove_unfinished(self) -> None:
        """Remove the temporary files of a process that was killed while it wrote."""
        remove_matching((self.folder, self.blocks_folder, self.source_folder), _UNFINISHED)

    def clear(self) -> None:
        """Remove the stream, the manifest last, and nothing else that lies there.

        Raises:
            StorageError: a file cannot be removed, or stream.json is of another program.
        """
        if self.exists():
            self.read()
        try:
            for number in range(1, self.num_blocks + 1):
                self.block_path(number).unlink(missing_ok=True)
            for path in (self.snapshot, self.manifest):
                path.unlink(missing_ok=True)
            for path in self.source_folder.glob("frames_*.safetensors"):
                path.unlink(missing_ok=True)
            remove_empty(self.blocks_folder, self.source_folder)
        except OSError as error:
            raise StorageError(
                f"cannot remove the stream in {self.folder}: {error}; choose another folder"
            ) from error


def _save(path: Path, tensors: Mapping[str, Tensor], words: dict[str, Any]) -> None:
    said = json.dumps({**words, "sha256": _digest(tensors, words)})
    save_tensors(path, tensors, {"stream": said})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file and what is said beside them, which its digest was taken of."""
    try:
        with safe_open(str(path), framework="pt") as file:
            words = json.loads((file.metadata() or {})["stream"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        expected = words.pop("sha256")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StorageError(f"{path} cannot be read again ({error}); {_ADVICE}") from error
    if _digest(tensors, words) != expected:
        raise StorageError(f"{path} holds other bits than were stored; {_ADVICE}")
    return tensors, words


def _digest(tensors: Mapping[str, Tensor], words: dict[str, Any]) -> str:
    names = sorted(tensors)
    said = json.dumps([names, words], sort_keys=True)
    bits = tensor_digest(*(tensors[name] for name in names))
    return hashlib.sha256(f"{bits} {said}".encode()).hexdigest()
