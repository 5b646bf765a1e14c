"""The cache of finished videos' latents, under byte budgets that hold at every moment.

Room is made before an entry is moved in, never after, so that a device sized to the budget does
not run out while an entry is added.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mv2v_engine.errors import MemoryBudgetError, RequestError, StorageError
from mv2v_engine.memory.entry import LatentKind, MemoryEntry
from mv2v_engine.memory.tiers import Arena, Lane, Loose, Tier

_Rank = tuple[bool, float]
_HIGHEST: _Rank = (True, math.inf)


@dataclass(eq=False)
class _Held:
    """An entry, its tier (None: on disk alone) and when it was last used."""

    entry: MemoryEntry
    level: int | None
    used: int


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
        self._entries: OrderedDict[str, _Held] = OrderedDict()
        self._pins: Counter[str] = Counter()
        self._clock = 0
        # moves call back into `evict`; a disk read holds up the other sessions for milliseconds
        self._lock = threading.RLock()

    @property
    def bytes_used(self) -> int:
        """Bytes that latents occupy in memory, at most `capacity_bytes`."""
        with self._lock:
            return sum(tier.bytes_used for tier in self._tiers)

    def bytes_by_tier(self) -> dict[str, int]:
        """Bytes occupied in each tier, fastest first."""
        with self._lock:
            return {tier.name: tier.bytes_used for tier in self._tiers}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, id: object) -> bool:
        return id in self._entries

    def ids(self) -> tuple[str, ...]:
        """Ids from the least to the most recently used: the order of eviction."""
        with self._lock:
            return tuple(self._entries)

    def entries(self, key: str | LatentKind | None = None) -> tuple[MemoryEntry, ...]:
        """Entries in the order of `ids`, of one VAE or of one kind; does not count as use.

        Latents in an arena or on disk are on the meta device: shape and dtype, no bits.
        """
        with self._lock:
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
        with self._lock:
            largest = max(tier.capacity_bytes for tier in self._tiers)
            if self._tiers[0].size_of(entry) > largest:
                raise MemoryBudgetError(
                    f"memory {entry.id!r} needs {entry.num_bytes:,} bytes, the cache holds "
                    f"{largest:,} at most; raise cache_bytes or make a shorter video"
                )
            if entry.id in self:
                self.evict(entry.id)
            evicted: list[str] = []
            level, victims = self._place(entry)
            for victim in victims:
                self._demote(victim, evicted)
            kept = self._tiers[level].keep(entry)
            self._entries[entry.id] = _Held(kept, level, self._now())
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
                place = self._promotion(held, ids)
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

    def _find(self, id: str) -> _Held:
        if id not in self._entries:
            held = ", ".join(self._entries) or "nothing"
            raise RequestError(
                f"no memory {id!r}; the cache holds {held}. It was never added, or it was evicted"
            )
        return self._entries[id]

    def _now(self) -> int:
        self._clock += 1
        return self._clock

    def _use(self, id: str) -> _Held:
        held = self._entries[id]
        held.used = self._now()
        self._entries.move_to_end(id)
        return held

    def _get(self, id: str, keep: Collection[str]) -> MemoryEntry:
        held = self._find(id)
        try:
            bits = self._read(held)
        except StorageError:
            self.evict(id)
            raise
        self._use(id)
        place = self._promotion(held, keep)
        if place is not None:
            self._promote(held, bits, place)
        return replace(held.entry, latents=self._lane.hand_over(bits))

    def _read(self, held: _Held) -> Tensor:
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
        with self._lane.moving():
            return latents.to(self.device, non_blocking=True)

    def _rank(self, held: _Held) -> _Rank:
        """What goes first has the lowest."""
        return held.entry.id in self._pins, held.used

    def _victims(
        self, level: int, num_bytes: int, than: _Rank, keep: Collection[str] = ()
    ) -> list[_Held] | None:
        """Who leaves a tier so that `num_bytes` are free, lowest rank first, all below `than`.

        None if that does not suffice.
        """
        tier, victims = self._tiers[level], []
        missing = num_bytes - (tier.capacity_bytes - tier.bytes_used)
        if missing > 0:
            here = [held for held in self._entries.values() if held.level == level]
            for held in sorted(here, key=self._rank):
                if missing <= 0 or self._rank(held) >= than:
                    break
                if held.entry.id not in keep:
                    victims.append(held)
                    missing -= tier.size_of(held.entry)
        return victims if missing <= 0 else None

    def _place(self, entry: MemoryEntry) -> tuple[int, list[_Held]]:
        """The fastest tier for a new entry, and who leaves it; pinned ones only if they must."""
        for than in ((entry.id in self._pins, math.inf), _HIGHEST):
            for level, tier in enumerate(self._tiers):
                victims = self._victims(level, tier.size_of(entry), than)
                if victims is not None:
                    return level, victims
        raise AssertionError("an entry that fits alone finds no room")

    def _demote(self, held: _Held, evicted: list[str]) -> None:
        """Move an entry to the next tier that takes it, else to disk, else out."""
        assert held.level is not None
        above = self._tiers[held.level]
        for level in range(held.level + 1, len(self._tiers)):
            below = self._tiers[level]
            victims = self._victims(level, below.size_of(held.entry), self._rank(held))
            if victims is None:
                continue
            for victim in victims:
                self._demote(victim, evicted)
            assert isinstance(above, Arena) and isinstance(below, Arena)
            below.take_over(held.entry, above)
            above.drop(held.entry)
            held.level = level
            return
        if held.entry.reload is None:
            self.evict(held.entry.id)
            evicted.append(held.entry.id)
        else:
            above.drop(held.entry)
            held.entry, held.level = held.entry.outlined(), None

    def _promotion(self, held: _Held, keep: Collection[str]) -> tuple[int, list[_Held]] | None:
        """The fastest tier above an entry's own that takes it without any loss, and who leaves."""
        own = len(self._tiers) if held.level is None else held.level
        for level in range(own):
            num_bytes = self._tiers[level].size_of(held.entry)
            victims = self._victims(level, num_bytes, self._rank(held), keep)
            if victims is not None and self._loses_nothing(victims, level, held):
                return level, victims
        return None

    def _loses_nothing(self, victims: list[_Held], level: int, leaving: _Held) -> bool:
        """Whether the tiers below take the victims into free room, or all there can be reread."""
        below = range(level + 1, len(self._tiers))
        free = sum(self._tiers[i].capacity_bytes - self._tiers[i].bytes_used for i in below)
        if leaving.level is not None:
            free += self._tiers[leaving.level].size_of(leaving.entry)
        if sum(self._tiers[level].size_of(victim.entry) for victim in victims) <= free:
            return True
        concerned = [*victims, *(held for held in self._entries.values() if held.level in below)]
        return all(held.entry.reload is not None for held in concerned)

    def _promote(self, held: _Held, bits: Tensor, place: tuple[int, list[_Held]]) -> None:
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
