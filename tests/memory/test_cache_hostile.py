"""Hostile sequences of adds, gets, pins, damage and evictions on a cache over tiers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from mv2v_engine.errors import MemoryBudgetError, RequestError, StorageError
from mv2v_engine.memory.entry import MemoryEntry
from tests.memory.test_cache_tiers import PAGE, TRAJECTORY, make_cache, random_latents

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


IDS = st.sampled_from("abcdefgh")


class HostileUse(RuleBasedStateMachine):
    """Any sequence of uses; the model is what each id's bits must be, and what is on disk."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = make_cache(4, 3)
        self.bits: dict[str, Tensor] = {}
        self.disk: dict[str, Tensor | None] = {}
        self.seed = 0
        self.pins: list[tuple[tuple[str, ...], ExitStack]] = []
        self.asked = self.reloads = self.evictions = 0

    def _reload(self, id: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            kept = self.disk[id]
            if kept is None:
                raise StorageError("damaged")
            self.reloads += 1
            return kept.clone()

        return read

    @rule(
        id=IDS,
        quarters=st.integers(0, 20),
        dtype=st.sampled_from(DTYPES),
        is_stored=st.booleans(),
    )
    def add(self, id: str, quarters: int, dtype: torch.dtype, is_stored: bool) -> None:
        self.seed += 1
        latents = random_latents(quarters / 4, self.seed, dtype)
        reload = self._reload(id) if is_stored else None
        entry = MemoryEntry(id, self.seed, latents, TRAJECTORY, "vae", reload)
        before = self.cache.ids()
        if quarters > 16:
            with pytest.raises(MemoryBudgetError):
                self.cache.add(entry)
            assert self.cache.ids() == before
            return
        evicted = self.cache.add(entry)
        self.evictions += len(evicted)
        for other in evicted:
            # nothing that can be read again is forgotten
            assert other != id and other not in self.disk
            del self.bits[other]
        self.bits[id] = latents.clone()
        self.disk.pop(id, None)
        if is_stored:
            self.disk[id] = latents.clone()
        assert self.cache.ids() == (*(i for i in before if i != id and i not in evicted), id)

    @rule(id=IDS)
    def get(self, id: str) -> None:
        self.asked += 1
        if id not in self.bits:
            with pytest.raises(RequestError):
                self.cache.get(id)
            return
        was_on_disk = self.cache.tier_of(id) == "disk"
        if was_on_disk and self.disk[id] is None:
            with pytest.raises(StorageError):
                self.cache.get(id)
            del self.bits[id], self.disk[id]
            return
        latents = self.cache.get(id).latents
        assert latents.dtype == self.bits[id].dtype and torch.equal(latents, self.bits[id])
        latents.zero_()
        assert self.cache.ids()[-1] == id

    @rule(ids=st.lists(IDS, max_size=6, unique=True))
    def prefetch_and_gather(self, ids: list[str]) -> None:
        self.cache.prefetch(ids)
        lost = {
            id
            for id in ids
            if id not in self.bits or (self.cache.tier_of(id) == "disk" and self.disk[id] is None)
        }
        self.asked += len(ids)
        entries, missing = self.cache.gather(ids)
        assert set(missing) == lost
        assert [entry.id for entry in entries] == [id for id in ids if id not in lost]
        for entry in entries:
            assert torch.equal(entry.latents, self.bits[entry.id])
        for id in lost & self.bits.keys():
            del self.bits[id], self.disk[id]

    @rule(ids=st.lists(IDS, max_size=8))
    def pin(self, ids: list[str]) -> None:
        stack = ExitStack()
        stack.enter_context(self.cache.pinned(ids))
        self.pins.append((tuple(ids), stack))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        _, stack = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        stack.close()

    @rule(id=IDS)
    def evict(self, id: str) -> None:
        if id not in self.bits:
            with pytest.raises(RequestError):
                self.cache.evict(id)
            return
        self.cache.evict(id)
        del self.bits[id]
        self.disk.pop(id, None)

    @precondition(lambda self: self.disk)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        self.disk[data.draw(st.sampled_from(sorted(self.disk)))] = None

    @invariant()
    def budgets_hold_and_nothing_else_is_known(self) -> None:
        assert set(self.cache.ids()) == set(self.bits)
        expected = {"device": 0, "host": 0, "disk": 0}
        for id, latents in self.bits.items():
            pages = -(-latents.numel() * latents.element_size() // PAGE)
            expected[self.cache.tier_of(id)] += pages * PAGE
        expected.pop("disk")
        assert self.cache.bytes_by_tier() == expected
        assert expected["device"] <= 4 * PAGE and expected["host"] <= 3 * PAGE
        assert self.cache.bytes_used == sum(expected.values()) <= self.cache.capacity_bytes

    @invariant()
    def uses_are_counted(self) -> None:
        counters = self.cache.counters()
        assert counters["hits"] + counters["misses"] == self.asked
        assert (counters["reloads"], counters["evictions"]) == (self.reloads, self.evictions)

    @invariant()
    def pins_are_counted(self) -> None:
        counts: dict[str, int] = {}
        for ids, _ in self.pins:
            for id in ids:
                counts[id] = counts.get(id, 0) + 1
        assert dict(self.cache._pins) == counts

    def teardown(self) -> None:
        for _, stack in self.pins:
            stack.close()
        assert not self.cache._pins


TestHostileUse = HostileUse.TestCase
TestHostileUse.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    actions=st.lists(st.tuples(st.sampled_from(["add", "get", "pin", "unpin"]), IDS), max_size=40),
    pages=st.tuples(st.integers(1, 3), st.integers(0, 3)),
)
def test_a_pinned_entry_goes_only_when_no_other_is_left(
    actions: list[tuple[str, str]], pages: tuple[int, int]
) -> None:
    cache, pins = make_cache(*pages), ExitStack()
    pinned: set[str] = set()
    for seed, (action, id) in enumerate(actions):
        on_device = {id for id in cache.ids() if cache.tier_of(id) == "device"}
        if action == "add":
            latents = random_latents(1, seed)
            evicted = cache.add(MemoryEntry(id, seed, latents, TRAJECTORY, "vae"))
            assert not pinned & {*evicted} or {*cache.ids()} <= {*pinned, id}
        elif action == "get" and id in cache:
            cache.get(id)
            left = on_device - {id for id in cache.ids() if cache.tier_of(id) == "device"}
            assert not pinned & left or id in pinned
        elif action == "pin":
            pins.enter_context(cache.pinned([id]))
            pinned.add(id)
        elif action == "unpin":
            pins.close()
            pinned.clear()
