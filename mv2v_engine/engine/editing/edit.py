"""One edit of a session as far as it has come: the windows that are finished, wherever they lie.

C F H W latents, D numbers of a descriptor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mv2v_engine.engine.editing.request import EditRequest

if TYPE_CHECKING:
    from mv2v_engine.engine.editing.store import EditStore


@dataclass(eq=False)
class KeptWindow:
    """A finished window. latents: [C, F, H, W], None once a folder has them.

    descriptor: of its source, [D].
    """

    report: dict[str, Any]
    descriptor: Tensor
    latents: Tensor | None
    read_stored: Callable[[], Tensor] | None = None

    def read(self) -> Tensor:
        """The latents, float32 on the CPU.

        Raises:
            StorageError: they were stored, and are lost or damaged.
        """
        if self.latents is not None:
            return self.latents
        assert self.read_stored is not None
        return self.read_stored()


@dataclass(eq=False)
class Edit:
    """number: the turn's. settings: the engine's, on which the latents depend.

    report: of the whole, None until every window is finished. lost: why its folder's next window
    cannot be read, if it had one.
    """

    number: int
    request: EditRequest
    settings: dict[str, Any]
    windows: list[KeptWindow] = field(default_factory=list)
    report: dict[str, Any] | None = None
    lost: str | None = None

    @property
    def num_done(self) -> int:
        """Windows that are finished."""
        return len(self.windows)

    def answers(self, request: EditRequest, settings: dict[str, Any]) -> bool:
        """Whether the request is this edit's."""
        return (self.request, self.settings) == (request, settings)

    def store_missing(self, store: EditStore) -> None:
        """Give the folder what it lacks of the finished windows, in order.

        Raises:
            StorageError: it does not take one; that one and the later ones stay in memory.
        """
        for number, kept in enumerate(self.windows, 1):
            if kept.latents is None:
                continue
            digest = store.append(self, number, kept.latents, kept.descriptor, kept.report)
            kept.read_stored = partial(store.latents, self.number, number, digest)
            kept.latents = None
