"""One turn's use of an engine's graphs: each step run eagerly, captured, or replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from mv2v_engine.engine.buffers import StepBuffers
from mv2v_engine.models.static_cache import KeptStorage

if TYPE_CHECKING:
    from mv2v_engine.engine.graphs import Entry, Graphs


class Lease:
    """Made by `Graphs.lease`. Without an entry every step runs eagerly; reason: why."""

    def __init__(self, graphs: Graphs | None, entry: Entry | None, reason: str | None) -> None:
        self._graphs, self._entry, self.reason = graphs, entry, reason
        self._captured = self._replayed = 0

    @property
    def buffers(self) -> StepBuffers | None:
        """What the steps have to work on; None: the turn's own."""
        return None if self._entry is None else self._entry.buffers

    @property
    def kept(self) -> KeptStorage | None:
        """Where conditioning has to be kept; None: anywhere."""
        return None if self._entry is None else self._entry.kept

    @property
    def awaits_capture(self) -> bool:
        """Whether steps are eager so far, but need not stay so."""
        return self._entry is not None and self.reason is None and not self._entry.graphs

    def run(self, kinds: tuple[str, ...] | None, step: Callable[[], Iterable[str]]) -> None:
        """Run a step.

        Args:
            kinds: of its forwards, equal for steps that launch the same; None for one that cannot
                be repeated as it is.
            step: gives the kinds of the forwards that it ran.

        Raises:
            KernelUnavailableError: graphs="on", and it cannot be captured.
        """
        graphs, entry = self._graphs, self._entry
        if graphs is None or entry is None or self.reason is not None:
            step()
            return
        if kinds is None or not entry.warm.issuperset(kinds):
            entry.warm.update(step())
            return
        if kinds in entry.graphs:
            self._replayed += 1
        else:
            self.reason = graphs.capture(entry, kinds, step)
            if self.reason is not None:
                step()
                return
            self._captured += 1
        graphs.replay(entry.graphs[kinds])

    def report(self, total: int) -> dict[str, Any]:
        """How a turn of so many steps ran, and what all graphs hold."""
        return {
            "mode": "off" if self._graphs is None else self._graphs.mode,
            "eager_steps": total - self._captured - self._replayed,
            "captured_steps": self._captured,
            "replayed_steps": self._replayed,
            "bytes": {} if self._graphs is None else self._graphs.bytes(),
            "reason": self.reason,
        }

    def release(self) -> None:
        """The turn has ended, however it did."""
        entry, self._entry = self._entry, None
        if entry is not None and self._graphs is not None:
            self._graphs.release(entry)
