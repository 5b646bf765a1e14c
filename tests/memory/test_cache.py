"""The cache's budget, order and replacement, against a plain list under hostile sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.errors import MemoryBudgetError, RequestError
from mv2v_engine.memory.cache import MemoryCache
from mv2v_engine.memory.entry import MemoryEntry

TRAJECTORY = named_trajectory("static", 1, (8, 8))
UNIT = 16  # bytes of the smallest entry: four floats


def make_entry(id: str, units: int = 1, *, turn: int = 0, key: str = "vae") -> MemoryEntry:
    return MemoryEntry(id, turn, torch.full((1, units, 2, 2), float(turn)), TRAJECTORY, key)


def test_add_and_get_return_the_same_latents() -> None:
    cache = MemoryCache(4 * UNIT)
    entry = make_entry("a", 2, turn=7)
    assert cache.add(entry) == ()
    assert torch.equal(cache.get("a").latents, entry.latents)
    assert cache.get("a").turn == 7
    assert (len(cache), cache.bytes_used, "a" in cache, "b" in cache) == (1, 2 * UNIT, True, False)


def test_the_least_recently_used_goes_first() -> None:
    cache = MemoryCache(3 * UNIT)
    for id in "abc":
        cache.add(make_entry(id))
    cache.get("a")
    assert cache.ids() == ("b", "c", "a")
    assert cache.add(make_entry("d", 2)) == ("b", "c")
    assert cache.ids() == ("a", "d")


def test_listing_is_not_use() -> None:
    cache = MemoryCache(2 * UNIT)
    cache.add(make_entry("a", key="one"))
    cache.add(make_entry("b", key="two"))
    assert [entry.id for entry in cache.entries()] == ["a", "b"]
    assert [entry.id for entry in cache.entries("two")] == ["b"]
    assert cache.entries("three") == ()
    assert "a" in cache
    assert cache.add(make_entry("c")) == ("a",)


def test_adding_an_id_again_replaces_it_and_spares_the_others() -> None:
    cache = MemoryCache(3 * UNIT)
    cache.add(make_entry("a", 2, turn=1))
    cache.add(make_entry("b", 1))
    assert cache.add(make_entry("a", 2, turn=5)) == ()
    assert cache.get("a").turn == 5
    assert cache.bytes_used == 3 * UNIT
    assert len(cache) == 2


def test_an_entry_larger_than_the_cache_changes_nothing() -> None:
    cache = MemoryCache(3 * UNIT)
    cache.add(make_entry("a", 1, turn=1))
    cache.add(make_entry("b", 2))
    with pytest.raises(MemoryBudgetError, match=r"'a' needs 64 bytes, the cache holds 48"):
        cache.add(make_entry("a", 4, turn=2))
    assert cache.ids() == ("a", "b")
    assert cache.get("a").turn == 1
    assert cache.bytes_used == 3 * UNIT


def test_an_exact_fit_is_kept() -> None:
    cache = MemoryCache(3 * UNIT)
    cache.add(make_entry("a", 3))
    assert cache.bytes_used == cache.capacity_bytes


@pytest.mark.parametrize("action", ["get", "evict"])
def test_an_unknown_id_names_what_is_held(action: str) -> None:
    cache = MemoryCache(3 * UNIT)
    cache.add(make_entry("first"))
    with pytest.raises(RequestError, match=r"no memory 'second'; the cache holds first"):
        getattr(cache, action)("second")


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(RequestError, match="-1"):
        MemoryCache(-1)


class _WatchedCache(MemoryCache):
    """Checks the budget at the moment an entry is dropped too, not only between calls."""

    def evict(self, id: str) -> None:
        super().evict(id)
        check_budget(self)


def check_budget(cache: MemoryCache) -> None:
    held = sum(entry.latents.untyped_storage().nbytes() for entry in cache.entries())
    assert cache.bytes_used == held <= cache.capacity_bytes


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["add", "get", "evict"]), st.sampled_from("abcdef"), st.integers(0, 5)
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(actions=ACTIONS, capacity=st.integers(0, 8))
def test_any_sequence_keeps_the_budget_and_the_order(
    actions: list[tuple[str, str, int]], capacity: int
) -> None:
    cache = _WatchedCache(capacity * UNIT)
    model: list[tuple[str, int, int]] = []  # (id, units, turn), least recently used first
    for turn, (action, id, units) in enumerate(actions):
        held = [row for row in model if row[0] == id]
        if action == "add" and units > capacity:
            with pytest.raises(MemoryBudgetError):
                cache.add(make_entry(id, units, turn=turn))
        elif action == "add":
            model = [row for row in model if row[0] != id]
            evicted = []
            while sum(row[1] for row in model) + units > capacity:
                evicted.append(model.pop(0)[0])
            model.append((id, units, turn))
            assert cache.add(make_entry(id, units, turn=turn)) == tuple(evicted)
        elif not held:
            with pytest.raises(RequestError):
                cache.get(id) if action == "get" else cache.evict(id)
        else:
            model.remove(held[0])
            if action == "get":
                assert cache.get(id).turn == held[0][2]
                model.append(held[0])
            else:
                cache.evict(id)
        check_budget(cache)
        assert cache.ids() == tuple(row[0] for row in model)
