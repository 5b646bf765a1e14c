"""Where an engine runs, and where its parts lie."""

from __future__ import annotations

from pathlib import Path

import torch

from mv2v_engine.errors import CheckpointError, RequestError


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device to run on, tried with an allocation."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(
            f"device {str(name)!r} cannot be used ({reason}); give cpu, cuda or cuda:N"
        ) from error
    return place


def component(folder: Path | None, name: str) -> Path | None:
    """A sub-folder of the given components, which must exist if a folder was given."""
    if folder is None:
        return None
    path = folder / name
    if not path.is_dir():
        raise CheckpointError(f"{folder} has no folder {name!r}; expected a Wan diffusers folder")
    return path
