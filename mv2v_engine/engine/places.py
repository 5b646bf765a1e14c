"""Where an engine runs, and where its parts lie."""

from __future__ import annotations

from pathlib import Path

import torch

from mv2v_engine.config import ParallelConfig
from mv2v_engine.envs import local_rank
from mv2v_engine.errors import CheckpointError, RequestError


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device to run on, tried with an allocation."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
        torch.empty(0, dtype=torch.float32, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(
            f"device {str(name)!r} cannot be used ({reason}); give cpu, cuda or cuda:N"
        ) from error
    return place


def rank_device(device: torch.device | str | None, parallel: ParallelConfig) -> torch.device:
    """As `usable_device`; of several processes each takes the GPU of its place on the machine.

    Raises:
        RequestError: no such device, or one GPU for all of them.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if parallel.num_ranks == 1 or not str(name).startswith("cuda"):
        return usable_device(device)
    if ":" in str(name):
        raise RequestError(
            f"each of {parallel.num_ranks} processes takes a GPU of its own, got device "
            f"{str(name)!r}; give cuda, and CUDA_VISIBLE_DEVICES to choose among them"
        )
    return usable_device(f"cuda:{local_rank()}")


def default_dtype(place: torch.device) -> torch.dtype:
    """Of a transformer."""
    return torch.bfloat16 if place.type == "cuda" else torch.float32


def component(folder: Path | None, name: str) -> Path | None:
    """A sub-folder of the given components, which must exist if a folder was given."""
    if folder is None:
        return None
    path = folder / name
    if not path.is_dir():
        raise CheckpointError(f"{folder} has no folder {name!r}; expected a Wan diffusers folder")
    return path
