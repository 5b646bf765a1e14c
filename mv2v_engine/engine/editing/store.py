"""A folder of long edits: every finished window survives the process.

    session.json                            the edits, with the digest of each of their windows
    turns/turn_01/window_00001.safetensors  latents, the source's descriptor, and the report

The manifest is rewritten last, so a kill at any moment loses at most the window under way.

C F H W latents, D numbers of a descriptor.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mv2v_engine.engine.editing.edit import Edit, KeptWindow
from mv2v_engine.engine.editing.request import EditRequest
from mv2v_engine.engine.store import SessionFolder, check_digest, check_finite
from mv2v_engine.errors import StorageError
from mv2v_engine.files import save_tensors, tensor_digest

_TENSORS = ("latents", "descriptor")
# what files.replacing leaves behind when the process is killed while it writes
_UNFINISHED = re.compile(r"\.(session-\w{8}\.json|window_\d+-\w{8}\.safetensors)")


class EditStore(SessionFolder):
    """The folder of one session of edits."""

    format, version = "mv2v-edit-session", 1
    row_kinds: ClassVar[dict[str, type]] = {
        "number": int,
        "request": dict,
        "settings": dict,
        "windows": list,
    }

    def append(
        self, edit: Edit, window: int, latents: Tensor, descriptor: Tensor, report: dict[str, Any]
    ) -> str:
        """Keep a finished window, counted from 1: its tensors first, then the manifest.

        Returns:
            the digest that `latents` asks for.

        Raises:
            StorageError: the folder does not take it, and is as it was.
        """
        manifest, words = self.read(), json.dumps(report)
        digest = _digest(latents, descriptor, words)
        path = self.window_path(edit.number, window)
        values = dict(zip(_TENSORS, (latents.cpu(), descriptor), strict=True))
        save_tensors(path, values, {"report": words})
        row = self._row(manifest, edit)
        is_listed = len(row["windows"]) >= window
        # one that is made again is followed by others that are
        row["windows"], row["report"] = [*row["windows"][: window - 1], digest], None
        self._list(manifest, path, is_listed=is_listed)
        return digest

    def finish(self, edit: Edit, report: dict[str, Any]) -> None:
        """Keep the report of an edit whose windows are all there.

        Raises:
            StorageError: the folder does not take it.
        """
        manifest = self.read()
        self._row(manifest, edit)["report"] = report
        self._write(manifest)

    def edits(self) -> Iterator[Edit]:
        """Every edit, its windows read once and checked, one after the other.

        An edit ends before its first window that is missing or damaged: made again, that one and
        those behind it get the same bits, so nothing is lost but time.

        Raises:
            StorageError: the manifest is damaged.
        """
        for row in self.read()["turns"]:
            try:
                number, digests, report = row["number"], row["windows"], row["report"]
                edit = Edit(number, EditRequest(**row["request"]), row["settings"], report=report)
            except (KeyError, TypeError) as error:
                raise self._damaged(f"turn {row['number']} lacks or misnames {error}") from error
            for window, digest in enumerate(digests, 1):
                try:
                    _, descriptor, words = self.window(number, window, digest)
                except StorageError as error:
                    edit.lost, edit.report = str(error), None
                    break
                read = partial(self.latents, number, window, digest)
                edit.windows.append(KeptWindow(words, descriptor, None, read))
            yield edit

    def latents(self, number: int, window: int, digest: str) -> Tensor:
        """A stored window's latents [C, F, H, W], the very ones of which `digest` was taken.

        Raises:
            StorageError: the file is missing, damaged, or another window's.
        """
        return self.window(number, window, digest)[0]

    def window_reports(self, number: int) -> list[dict[str, Any]]:
        """The reports of an edit's finished windows in order; their tensors are not read.

        Raises:
            StorageError: a window that the manifest names is missing or damaged, or the manifest.
        """
        row = next((row for row in self.read()["turns"] if row["number"] == number), None)
        found = []
        for window in range(1, 1 + len(row["windows"] if row else ())):
            path = self.window_path(number, window)
            with _reading(path), safe_open(str(path), framework="pt") as file:
                found.append(json.loads((file.metadata() or {})["report"]))
        return found

    def window(self, number: int, window: int, digest: str) -> tuple[Tensor, Tensor, Any]:
        """As `latents`, with the descriptor [D] and the report."""
        path = self.window_path(number, window)
        with _reading(path):
            with safe_open(str(path), framework="pt") as file:
                latents, descriptor = (file.get_tensor(name) for name in _TENSORS)
                words = (file.metadata() or {})["report"]
            check_digest(path, _digest(latents, descriptor, words), digest)
            check_finite(path, latents)
            return latents, descriptor, json.loads(words)

    def listed_files(self) -> set[Path]:
        return {
            self.window_path(row["number"], window)
            for row in self.read()["turns"]
            for window in range(1, len(row["windows"]) + 1)
        }

    def window_path(self, number: int, window: int) -> Path:
        """Where a window of an edit lies."""
        return self.turns_folder / f"turn_{number:02d}" / f"window_{window:05d}.safetensors"

    def remove_unfinished(self) -> None:
        """Remove the temporary files of a process that was killed while it wrote."""
        for folder in (self.folder, *self.turns_folder.glob("turn_*")):
            for path in folder.iterdir():
                if _UNFINISHED.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    @staticmethod
    def _row(manifest: dict[str, Any], edit: Edit) -> dict[str, Any]:
        """The edit's row of a manifest, new if there is none."""
        for row in manifest["turns"]:
            if row["number"] == edit.number:
                found: dict[str, Any] = row
                return found
        fresh: dict[str, Any] = {
            "number": edit.number,
            "request": edit.request.to_dict(),
            "settings": edit.settings,
            "windows": [],
            "report": None,
        }
        manifest["turns"].append(fresh)
        return fresh


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What a window's file may be found to be, as one error."""
    try:
        yield
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StorageError(
            f"{path} cannot be read again ({error}); restore the file, or resume the edit, which "
            "makes its window and those behind it again"
        ) from error


def _digest(latents: Tensor, descriptor: Tensor, report: str) -> str:
    tensors = tensor_digest(latents, descriptor)
    return hashlib.sha256(f"{tensors} {report}".encode()).hexdigest()
