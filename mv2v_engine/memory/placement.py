"""Who leaves which tier of a cache so that an entry fits. Decides, moves nothing."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mv2v_engine.memory.entry import MemoryEntry
from mv2v_engine.memory.tiers import Tier

Rank = tuple[bool, float]
_HIGHEST: Rank = (True, math.inf)


@dataclass(eq=False)
class Held:
    """An entry, its tier (None: on disk alone) and when it was last used."""

    entry: MemoryEntry
    level: int | None
    used: int


class Placement:
    """The rules of a cache. tiers: fastest first. entries, pins: the cache's own, read here."""

    def __init__(
        self, tiers: Sequence[Tier], entries: Mapping[str, Held], pins: Mapping[str, int]
    ) -> None:
        self._tiers, self._entries, self._pins = tiers, entries, pins

    def rank(self, held: Held) -> Rank:
        """The rank of an entry; the one with the lowest goes first."""
        return held.entry.id in self._pins, held.used

    def victims(
        self, level: int, num_bytes: int, than: Rank, keep: Collection[str] = ()
    ) -> list[Held] | None:
        """Who leaves a tier so that `num_bytes` are free, lowest rank first, all below `than`.

        None if that does not suffice.
        """
        tier, victims = self._tiers[level], []
        missing = num_bytes - (tier.capacity_bytes - tier.bytes_used)
        if missing > 0:
            here = [held for held in self._entries.values() if held.level == level]
            for held in sorted(here, key=self.rank):
                if missing <= 0 or self.rank(held) >= than:
                    break
                if held.entry.id not in keep:
                    victims.append(held)
                    missing -= tier.size_of(held.entry)
        return victims if missing <= 0 else None

    def place(self, entry: MemoryEntry) -> tuple[int, list[Held]]:
        """The fastest tier for a new entry, and who leaves it; pinned ones only if they must."""
        for than in ((entry.id in self._pins, math.inf), _HIGHEST):
            for level, tier in enumerate(self._tiers):
                victims = self.victims(level, tier.size_of(entry), than)
                if victims is not None:
                    return level, victims
        raise AssertionError("an entry that fits alone finds no room")

    def promotion(self, held: Held, keep: Collection[str]) -> tuple[int, list[Held]] | None:
        """The fastest tier above an entry's own that takes it without any loss, and who leaves."""
        own = len(self._tiers) if held.level is None else held.level
        for level in range(own):
            num_bytes = self._tiers[level].size_of(held.entry)
            victims = self.victims(level, num_bytes, self.rank(held), keep)
            if victims is not None and self._loses_nothing(victims, level, held):
                return level, victims
        return None

    def _loses_nothing(self, victims: list[Held], level: int, leaving: Held) -> bool:
        """Whether the tiers below take the victims into free room, or all there can be reread."""
        below = range(level + 1, len(self._tiers))
        free = sum(self._tiers[i].capacity_bytes - self._tiers[i].bytes_used for i in below)
        if leaving.level is not None:
            free += self._tiers[leaving.level].size_of(leaving.entry)
        if sum(self._tiers[level].size_of(victim.entry) for victim in victims) <= free:
            return True
        concerned = [*victims, *(held for held in self._entries.values() if held.level in below)]
        return all(held.entry.reload is not None for held in concerned)
