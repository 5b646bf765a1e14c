"""Errors that a user can meet: each message names what was got, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class MV2VError(Exception):
    """Base of every error that the engine raises on purpose; `run` prints it as one line."""


class VideoError(MV2VError, ValueError):
    """A video file or frame array cannot be used as asked."""


class VideoRangeError(VideoError):
    """A whole video whose rate or shape of frames is outside of what is taken."""


class CameraError(MV2VError, ValueError):
    """A camera name, pose, trajectory or camera file is unusable."""


class CheckpointError(MV2VError, ValueError):
    """A checkpoint is missing, of unknown format, incomplete, or of the wrong shapes."""


class DamagedFileError(CheckpointError):
    """A weight file cannot be read: it is cut off, damaged, or its content is of another kind."""


class RequestError(MV2VError, ValueError):
    """A turn was requested with arguments that the model or session cannot serve."""


class MemoryBudgetError(MV2VError, ValueError):
    """Bytes that do not fit: an entry the memory cache's budget, or a turn the device."""


class StorageError(MV2VError, OSError):
    """A result could not be written; nothing half-written was left behind."""


class InUseError(StorageError):
    """Another process or another session writes into a folder. holder: who, in words."""

    def __init__(self, message: str, holder: str = "") -> None:
        super().__init__(message)
        self.holder = holder


class TrainingError(MV2VError, ValueError):
    """A training set, its latent cache or a training log cannot be used as asked."""


class KernelUnavailableError(MV2VError, RuntimeError):
    """An explicitly requested backend cannot run here; the message names the reason."""


class ParallelError(MV2VError, RuntimeError):
    """Processes that share a forward have parted: one failed, or was not heard of in time."""


class NotFiniteError(MV2VError, FloatingPointError):
    """A computation gave NaN or infinity; nothing of it was stored or remembered."""


class CancelledError(MV2VError, RuntimeError):
    """The caller cancelled the turn, or a stream's block; what was finished before is kept."""


# oneDNN had no memory for the code of a shape; it remembers, and fails for it in this process
NO_PRIMITIVE = "could not create a primitive"
# torch reports a full host, and a library its own failed allocation, as a plain RuntimeError
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "STATUS_ALLOC_FAILED",
    NO_PRIMITIVE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no memory left."""
    import torch  # not above: a client of the service raises errors without it

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


def first_of(keys: Sequence[str], count: int = 4) -> str:
    """The first few of some keys, and how many more there are."""
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more


def nearest_names(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """The known names closest to a misspelt one, as a phrase for an error message."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=count, cutoff=0.4) or known[:count]
    return " or ".join(near) if len(near) < 3 else ", ".join(near[:-1]) + " or " + near[-1]
