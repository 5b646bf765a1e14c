"""What the training commands leave in folders for each other: safetensors files, one a scene."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mv2v_engine.errors import TrainingError


def stored_in(folder: Path, kind: str, maker: str) -> list[Path]:
    """The files of a kind, "scene" or "edit", in a folder, sorted; there is one at least.

    maker: the module of `mv2v_engine.training` whose command makes such files.

    Raises:
        TrainingError: there is none.
    """
    found = sorted(folder.glob(f"{kind}_*.safetensors"))
    if not found:
        raise TrainingError(
            f"{folder} holds no {kind}_*.safetensors; make some with "
            f"python -m mv2v_engine.training.{maker}"
        )
    return found


@contextmanager
def reading(path: Path, what: str, maker: str) -> Iterator[Any]:
    """A stored file, open; what it may be found to be is one error. what: it should be.

    Raises:
        TrainingError: it is damaged or holds something else.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise TrainingError(
            f"{path} is no {what} ({error}): damaged or of another kind; delete it and run "
            f"mv2v_engine.training.{maker} again"
        ) from error
