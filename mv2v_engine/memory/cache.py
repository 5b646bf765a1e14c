"""The cache of finished videos' latents, under byte budgets that hold at every moment.

Room is made before an entry is moved in, never after, so that a device sized to the budget does
not run out while an entry is added.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import Tensor

from mv2v_engine.errors import MemoryBudgetError, RequestError, StorageError
from mv2v_engine.memory.entry import LatentKind, MemoryEntry
from mv2v_engine.memory.placement import Held, Placement
from mv2v_engine.memory.tiers import Arena, Lane, Loose, Tier

# what `MemoryCache.counters` counts
COUNTERS = ("hits", "misses", "reloads", "demotions", "evictions")


class MemoryCache:
    """Entries by id, least recently used first to go; shared by the threads of many sessions.

    Adding and getting an entry is using it; listing is not. Without `device_bytes` the latents are
    tensors on the device. With it they lie in two arenas: the device's, and the host's, pinned
    where the device is CUDA. What the device has no room for moves to the host, and what the host
    has none for is dropped, or stays listed if the entry can be read again (`MemoryEntry.reload`).
    A `get` brings it back with the same bits.

    Pinned entries are the last to go, and go only for entries that are worth as much.

    Args:
        capacity_bytes: budget of all latents in memory together.
        device: where the model wants the latents.
        device_bytes: how many of them one preallocated arena on the device holds.
        page_bytes: unit of an arena's accounting, best the bytes of one video.

    Raises:
        RequestError: budgets that contradict each other.
        MemoryBudgetError: an arena cannot be allocated.
    """

    def __init__(
        self,
        capacity_bytes: int,
        device: torch.device | str = "cpu",
        *,
        device_bytes: int | None = None,
        page_bytes: int = 1 << 20,
    ) -> None:
        if capacity_bytes < 0:
            raise RequestError(f"capacity_bytes must not be negative, got {capacity_bytes}")
        if page_bytes < 1:
            raise RequestError(f"page_bytes must be positive, got {page_bytes}")
        self.capacity_bytes = capacity_bytes
        self.device = torch.device(device)
        self._tiers: list[Tier]
        if device_bytes is None:
            # one tier, whose copies stay in the caller's own order
            self._lane = Lane(torch.device("cpu"))
            self._tiers = [Loose(capacity_bytes, self.device)]
        else:
            if not 0 <= device_bytes <= capacity_bytes:
                raise RequestError(
                    f"device_bytes must lie in 0..{capacity_bytes:,}, the budget of all latents, "
                    f"got {device_bytes:,}"
                )
            self._lane = Lane(self.device)
            host_bytes, host = capacity_bytes - device_bytes, torch.device("cpu")
            self._tiers = [
                Arena("device", device_bytes, page_bytes, self.device, self._lane),
                Arena("host", host_bytes, page_bytes, host, self._lane),
            ]
        self._entries: OrderedDict[str, Held] = OrderedDict()
        self._pins: Counter[str] = Counter()
        self._placement = Placement(self._tiers, self._entries, self._pins)
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._abandoned: deque[object] = deque()
        self._clock = 0
        # moves call back into `evict`; a disk read holds up the other sessions for milliseconds
        self._lock = threading.RLock()

    @property
    def bytes_used(self) -> int:
        """Bytes that latents occupy in memory, at most `capacity_bytes`."""
        with self._swept():
            return sum(tier.bytes_used for tier in self._tiers)

    def bytes_by_tier(self) -> dict[str, int]:
        """Bytes occupied in each tier, fastest first."""
        with self._swept():
            return {tier.name: tier.bytes_used for tier in self._tiers}

    def counters(self) -> dict[str, int]:
        """What has happened since the cache was made.

        hits, misses: entries asked of `get` or `gather` that memory had, and had not; a miss was
        read from disk, or could not be had. reloads: entries read from disk, by those or ahead of
        them by `prefetch`. demotions: moves to a slower tier or to disk alone, evictions: entries
        forgotten, both to make room.
        """
        with self._lock:
            return dict(self._counts)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, id: object) -> bool:
        return id in self._entries

    def ids(self) -> tuple[str, ...]:
        """Ids from the least to the most recently used: the order of eviction."""
        with self._swept():
            return tuple(self._entries)

    def entries(self, key: str | LatentKind | None = None) -> tuple[MemoryEntry, ...]:
        """Entries in the order of `ids`, of one VAE or of one kind; does not count as use.

        Latents in an arena or on disk are on the meta device: shape and dtype, no bits.
        """
        with self._swept():
            held = [held.entry for held in self._entries.values()]
        if isinstance(key, LatentKind):
            return tuple(entry for entry in held if entry.kind == key)
        return tuple(entry for entry in held if key is None or entry.key == key)

    def tier_of(self, id: str) -> str:
        """The name of the tier that holds an entry; "disk" if none does.

        Raises:
            RequestError: no such entry.
        """
        with self._lock:
            level = self._find(id).level
            return "disk" if level is None else self._tiers[level].name

    def add(self, entry: MemoryEntry) -> tuple[str, ...]:
        """Keep an entry, in place of one with its id, and make room until it fits.

        Returns:
            ids of the others that were evicted, first evicted first; what moved to a slower tier
            or can be read from disk was not evicted.

        Raises:
            MemoryBudgetError: the entry alone exceeds every tier; the cache is unchanged.
            RequestError: a listed entry, whose latents have no bits.
        """
        if entry.latents.is_meta:
            raise RequestError(
                f"memory {entry.id!r} is a listed entry without bits; "
                f"add what get({entry.id!r}) gives"
            )
        with self._swept():
            largest = max(tier.capacity_bytes for tier in self._tiers)
            if self._tiers[0].size_of(entry) > largest:
                raise MemoryBudgetError(
                    f"memory {entry.id!r} needs {entry.num_bytes:,} bytes, the cache holds "
                    f"{largest:,} at most; raise cache_bytes or make a shorter video"
                )
            if entry.id in self:
                self.evict(entry.id)
            evicted: list[str] = []
            level, victims = self._placement.place(entry)
            for victim in victims:
                self._demote(victim, evicted)
            kept = self._tiers[level].keep(entry)
            self._entries[entry.id] = Held(kept, level, self._now())
            return tuple(evicted)

    def get(self, id: str) -> MemoryEntry:
        """The entry of an id with its latents on the device, now the most recently used.

        From an arena the latents are a copy, the caller's own. An entry of a slower tier moves up
        if no other entry is lost by that, and is read from where it lies if one would be.

        Raises:
            RequestError: no such entry.
            StorageError: it lay on disk and is lost or damaged; it is evicted.
        """
        with self._lock:
            return self._get(id, keep=())

    def gather(self, ids: Collection[str]) -> tuple[list[MemoryEntry], dict[str, str]]:
        """`get` of several ids at one moment, and why the others cannot be had, by id.

        None of them pushes another of them out of its tier.
        """
        found: list[MemoryEntry] = []
        lost: dict[str, str] = {}
        with self._lock:
            for id in ids:
                try:
                    found.append(self._get(id, keep=ids))
                except (RequestError, StorageError) as error:
                    lost[id] = str(error)
        return found, lost

    def prefetch(self, ids: Collection[str]) -> None:
        """Begin to bring entries to the device, as far as it has room for all of them together.

        On CUDA the copies are queued on a stream of their own and the caller goes on; a later
        `get` waits for them. What is lost or damaged is left for that `get` to report. This is
        use.
        """
        with self._lock:
            for id in ids:
                if id not in self._entries:
                    continue
                held = self._use(id)
                place = self._placement.promotion(held, ids)
                if place is not None:
                    with suppress(StorageError):
                        self._promote(held, self._read(held), place)

    @contextmanager
    def pinned(self, ids: Iterable[str]) -> Iterator[None]:
        """Make ids the last to go while the block runs, held or not yet; pins add up."""
        ids = tuple(ids)
        with self._lock:
            self._pins.update(ids)
        try:
            yield
        finally:
            with self._lock:
                self._pins.subtract(ids)
                for id in ids:
                    if not self._pins[id]:
                        del self._pins[id]

    def evict(self, id: str) -> None:
        """Forget one entry; its file, if it has one, stays.

        Raises:
            RequestError: no such entry.
        """
        with self._lock:
            held = self._find(id)
            del self._entries[id]
            if held.level is not None:
                self._tiers[held.level].drop(held.entry)

    def forget(self, owner: object) -> None:
        """Evict every entry of an owner."""
        with self._lock:
            self._evict_of(owner)

    def abandon(self, owner: object) -> None:
        """Forget an owner's entries when the cache is next used.

        Takes no lock: a finalizer may call it while this very thread is in the midst of a move.
        """
        self._abandoned.append(owner)

    @contextmanager
    def _swept(self) -> Iterator[None]:
        """Hold the lock, with nothing left of owners that are gone."""
        with self._lock:
            while self._abandoned:
                self._evict_of(self._abandoned.popleft())
            yield

    def _evict_of(self, owner: object) -> None:
        for id in [id for id, held in self._entries.items() if held.entry.owner is owner]:
            self.evict(id)

    def _find(self, id: str) -> Held:
        if id not in self._entries:
            held = ", ".join(self._entries) or "nothing"
            raise RequestError(
                f"no memory {id!r}; the cache holds {held}. It was never added, or it was evicted"
            )
        return self._entries[id]

    def _now(self) -> int:
        self._clock += 1
        return self._clock

    def _use(self, id: str) -> Held:
        held = self._entries[id]
        held.used = self._now()
        self._entries.move_to_end(id)
        return held

    def _get(self, id: str, keep: Collection[str]) -> MemoryEntry:
        in_memory = id in self._entries and self._entries[id].level is not None
        self._counts["hits" if in_memory else "misses"] += 1
        held = self._find(id)
        try:
            bits = self._read(held)
        except StorageError:
            self.evict(id)
            raise
        self._use(id)
        place = self._placement.promotion(held, keep)
        if place is not None:
            self._promote(held, bits, place)
        return replace(held.entry, latents=self._lane.hand_over(bits))

    def _read(self, held: Held) -> Tensor:
        """The latents on the device, queued on the lane."""
        if held.level is not None:
            return self._tiers[held.level].read(held.entry)
        if held.entry.reload is None:
            # the process was interrupted between leaving one tier and entering another
            raise StorageError(f"memory {held.entry.id!r} was lost while it moved; it is left out")
        latents = held.entry.reload()
        kind = held.entry.kind
        if (tuple(latents.shape), latents.dtype) != (kind.shape, kind.dtype):
            raise StorageError(
                f"memory {held.entry.id!r} was {kind.dtype} {list(kind.shape)}, its file holds "
                f"{latents.dtype} {list(latents.shape)}; it is left out"
            )
        self._counts["reloads"] += 1
        with self._lane.moving():
            return latents.to(self.device, non_blocking=True)

    def _demote(self, held: Held, evicted: list[str]) -> None:
        """Move an entry to the next tier that takes it, else to disk, else out."""
        assert held.level is not None
        above = self._tiers[held.level]
        for level in range(held.level + 1, len(self._tiers)):
            below = self._tiers[level]
            victims = self._placement.victims(
                level, below.size_of(held.entry), self._placement.rank(held)
            )
            if victims is None:
                continue
            for victim in victims:
                self._demote(victim, evicted)
            assert isinstance(above, Arena) and isinstance(below, Arena)
            below.take_over(held.entry, above)
            above.drop(held.entry)
            held.level = level
            self._counts["demotions"] += 1
            return
        if held.entry.reload is None:
            self.evict(held.entry.id)
            evicted.append(held.entry.id)
            self._counts["evictions"] += 1
        else:
            self._counts["demotions"] += 1
            above.drop(held.entry)
            held.entry, held.level = held.entry.outlined(), None

    def _promote(self, held: Held, bits: Tensor, place: tuple[int, list[Held]]) -> None:
        """Move an entry up; its own pages are free for those that leave in its place."""
        level, victims = place
        if held.level is not None:
            self._tiers[held.level].drop(held.entry)
        # interrupted from here on, it is lost rather than half held
        held.level = None
        for victim in victims:
            self._demote(victim, [])
        held.entry = self._tiers[level].keep(replace(held.entry, latents=bits), is_queued=True)
        held.level = level
