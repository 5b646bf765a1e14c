"""The cache of finished videos' latents, under a byte budget that holds at every moment.

Room is made before an entry is moved in, never after, so that a device sized to the budget does
not run out while an entry is added.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from mv2v_engine.errors import MemoryBudgetError, RequestError
from mv2v_engine.memory.entry import MemoryEntry


class MemoryCache:
    """Entries by id, on one device, least recently used first to go.

    Adding and getting an entry is using it; listing is not.

    Args:
        capacity_bytes: budget of all latents together.
        device: where the latents live.
    """

    def __init__(self, capacity_bytes: int, device: torch.device | str = "cpu") -> None:
        if capacity_bytes < 0:
            raise RequestError(f"capacity_bytes must not be negative, got {capacity_bytes}")
        self.capacity_bytes = capacity_bytes
        self.device = torch.device(device)
        self._entries: OrderedDict[str, MemoryEntry] = OrderedDict()
        self._bytes_used = 0

    @property
    def bytes_used(self) -> int:
        """Bytes of all latents held, at most `capacity_bytes`."""
        return self._bytes_used

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, id: object) -> bool:
        return id in self._entries

    def ids(self) -> tuple[str, ...]:
        """Ids from the least to the most recently used: the order of eviction."""
        return tuple(self._entries)

    def entries(self, key: str | None = None) -> tuple[MemoryEntry, ...]:
        """Entries in the order of `ids`, of one VAE if `key` is given; does not count as use."""
        held = self._entries.values()
        return tuple(entry for entry in held if key is None or entry.key == key)

    def add(self, entry: MemoryEntry) -> tuple[str, ...]:
        """Keep an entry, in place of one with its id, and evict others until it fits.

        Returns:
            ids of the others that were evicted, first evicted first.

        Raises:
            MemoryBudgetError: the entry alone exceeds the budget; the cache is unchanged.
        """
        if entry.num_bytes > self.capacity_bytes:
            raise MemoryBudgetError(
                f"memory {entry.id!r} needs {entry.num_bytes:,} bytes, the cache holds "
                f"{self.capacity_bytes:,} in all; raise cache_bytes or make a shorter video"
            )
        if entry.id in self:
            self.evict(entry.id)
        evicted: list[str] = []
        while self._bytes_used + entry.num_bytes > self.capacity_bytes:
            evicted.append(next(iter(self._entries)))
            self.evict(evicted[-1])
        self._entries[entry.id] = entry.stored_on(self.device)
        self._bytes_used += entry.num_bytes
        return tuple(evicted)

    def get(self, id: str) -> MemoryEntry:
        """The entry of an id, now the most recently used.

        Raises:
            RequestError: no such entry.
        """
        entry = self._held(id)
        self._entries.move_to_end(id)
        return entry

    def evict(self, id: str) -> None:
        """Drop one entry.

        Raises:
            RequestError: no such entry.
        """
        entry = self._held(id)
        del self._entries[id]
        self._bytes_used -= entry.num_bytes

    def _held(self, id: str) -> MemoryEntry:
        if id not in self._entries:
            held = ", ".join(self._entries) or "nothing"
            raise RequestError(
                f"no memory {id!r}; the cache holds {held}. It was never added, or it was evicted"
            )
        return self._entries[id]
