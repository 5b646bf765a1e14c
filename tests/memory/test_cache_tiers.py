"""A cache over tiers, two CPU arenas and a disk: where entries lie, and that bits survive moves."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.errors import MemoryBudgetError, RequestError, StorageError
from mv2v_engine.memory.cache import MemoryCache
from mv2v_engine.memory.entry import MemoryEntry
from mv2v_engine.memory.tiers import Arena, Lane

TRAJECTORY = named_trajectory("static", 1, (8, 8))
PAGE = 32


def random_latents(pages: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    count = int(pages * PAGE) // dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, 1, 1, generator=generator, dtype=torch.float64).to(dtype)


def make_entry(
    id: str,
    pages: float = 1,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    reload: Callable[[], Tensor] | None = None,
) -> MemoryEntry:
    latents = random_latents(pages, seed, dtype)
    return MemoryEntry(id, seed, latents, TRAJECTORY, "vae", reload)


def make_cache(device_pages: int, host_pages: int) -> MemoryCache:
    capacity = (device_pages + host_pages) * PAGE
    return MemoryCache(capacity, device_bytes=device_pages * PAGE, page_bytes=PAGE)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def tiers(cache: MemoryCache) -> dict[str, str]:
    return {id: cache.tier_of(id) for id in sorted(cache.ids())}


def test_what_the_device_has_no_room_for_moves_to_the_host_and_back() -> None:
    cache = make_cache(2, 2)
    for seed, id in enumerate("abcd"):
        assert cache.add(make_entry(id, seed=seed)) == ()
    assert tiers(cache) == {"a": "host", "b": "host", "c": "device", "d": "device"}
    assert cache.bytes_by_tier() == {"device": 2 * PAGE, "host": 2 * PAGE}
    # both are full, so "a" trades places with the least recently used one on the device
    assert same_bits(cache.get("a").latents, random_latents(1, 0))
    assert tiers(cache) == {"a": "device", "b": "host", "c": "host", "d": "device"}
    assert cache.bytes_used == cache.capacity_bytes == 4 * PAGE
    for seed, id in enumerate("abcd"):
        assert same_bits(cache.get(id).latents, random_latents(1, seed))
    # a fifth evicts the least recently used of all
    assert cache.add(make_entry("e")) == ("a",)


def test_an_entry_on_disk_is_evicted_from_memory_alone() -> None:
    cache = make_cache(1, 1)
    for seed, id in enumerate("abc"):
        on_disk = random_latents(1, seed)
        assert cache.add(make_entry(id, seed=seed, reload=on_disk.clone)) == ()
    assert tiers(cache) == {"a": "disk", "b": "host", "c": "device"}
    assert same_bits(cache.get("a").latents, random_latents(1, 0))
    assert tiers(cache) == {"a": "device", "b": "disk", "c": "host"}
    cache.evict("b")
    assert "b" not in cache


def test_a_get_loses_no_other_entry() -> None:
    cache = make_cache(1, 0)
    cache.add(make_entry("a", reload=lambda: random_latents(1, 0)))
    assert cache.add(make_entry("b", seed=1)) == ()
    # "b" lies nowhere but here, so "a" is read from disk and stays there
    assert same_bits(cache.get("a").latents, random_latents(1, 0))
    assert tiers(cache) == {"a": "disk", "b": "device"}


def test_the_flat_cache_reads_again_from_disk() -> None:
    cache = MemoryCache(PAGE)
    for seed, id in enumerate("ab"):
        cache.add(make_entry(id, seed=seed, reload=random_latents(1, seed).clone))
    assert tiers(cache) == {"a": "disk", "b": "loose"}
    assert same_bits(cache.get("a").latents, random_latents(1, 0))
    assert tiers(cache) == {"a": "loose", "b": "disk"}
    assert cache.bytes_used == PAGE


def test_what_a_get_gave_is_the_callers_own() -> None:
    cache = make_cache(1, 0)
    cache.add(make_entry("a", seed=1))
    latents = cache.get("a").latents
    cache.evict("a")
    cache.add(make_entry("b", seed=2))
    assert same_bits(latents, random_latents(1, 1))
    latents.zero_()
    assert same_bits(cache.get("b").latents, random_latents(1, 2))


def test_a_whole_arena_serves_any_mixture_of_sizes() -> None:
    cache = make_cache(6, 0)
    for id in "abcdef":
        cache.add(make_entry(id))
    for id in "ace":  # every second page
        cache.evict(id)
    assert cache.add(make_entry("g", 2.5, seed=7)) == ()
    assert cache.bytes_used == cache.capacity_bytes
    assert same_bits(cache.get("g").latents, random_latents(2.5, 7))
    assert same_bits(cache.get("d").latents, random_latents(1, 0))


def test_too_large_for_the_device_lies_on_the_host() -> None:
    cache = make_cache(1, 3)
    cache.add(make_entry("a", 3, seed=4))
    assert tiers(cache) == {"a": "host"}
    assert same_bits(cache.get("a").latents, random_latents(3, 4))
    assert tiers(cache) == {"a": "host"}
    with pytest.raises(MemoryBudgetError, match=r"'b' needs 128 bytes, the cache holds 96"):
        cache.add(make_entry("b", 4))


def test_pinned_entries_go_last() -> None:
    cache = make_cache(2, 1)
    for id in "abc":
        cache.add(make_entry(id))
    with cache.pinned(["a", "c"]), cache.pinned(["a"]):
        assert cache.get("a") is not None
        assert tiers(cache) == {"a": "device", "b": "host", "c": "device"}
        # a newcomer does not push pinned entries off the device
        assert cache.add(make_entry("d")) == ("b",)
        assert tiers(cache) == {"a": "device", "c": "device", "d": "host"}
        # nor does reading it
        cache.get("d")
        assert tiers(cache) == {"a": "device", "c": "device", "d": "host"}
        # one that fits nowhere else does, and takes the unpinned first
        assert cache.add(make_entry("e", 2)) == ("d", "c")
    assert tiers(cache) == {"a": "host", "e": "device"}
    # "e" is larger than the host's tier
    assert cache.add(make_entry("f", 2)) == ("e",)


def test_prefetch_brings_what_fits_together() -> None:
    cache = make_cache(2, 3)
    for seed, id in enumerate("abcde"):
        cache.add(make_entry(id, seed=seed))
    cache.prefetch(["b", "a", "c", "nobody"])
    assert tiers(cache) == {"a": "device", "b": "device", "c": "host", "d": "host", "e": "host"}
    entries, lost = cache.gather(["c", "b", "a"])
    assert lost == {}
    for entry, seed in zip(entries, (2, 1, 0), strict=True):
        assert same_bits(entry.latents, random_latents(1, seed))
    assert tiers(cache)["c"] == "host"


def test_listed_latents_have_a_kind_and_no_bits() -> None:
    cache = make_cache(2, 0)
    entry = make_entry("a", 2, dtype=torch.bfloat16)
    cache.add(entry)
    (listed,) = cache.entries(entry.kind)
    assert listed.latents.is_meta and listed.kind == entry.kind
    assert listed.num_bytes == entry.num_bytes == 2 * PAGE
    for other in (make_entry("a", 2), make_entry("a", 1, dtype=torch.bfloat16)):
        assert cache.entries(other.kind) == ()
    assert cache.entries(entry.kind._replace(key="other")) == ()
    with pytest.raises(RequestError, match=r"'a' is a listed entry without bits; .* get\('a'\)"):
        cache.add(listed)


def test_a_copy_that_fails_gives_its_pages_back() -> None:
    cpu = torch.device("cpu")
    arena = Arena("host", 2 * PAGE, PAGE, cpu, Lane(cpu))
    with pytest.raises(RuntimeError, match="meta tensor; no data"):
        arena.keep(make_entry("a").outlined())
    assert arena.bytes_used == 0
    arena.keep(make_entry("a", 2, seed=3))
    assert same_bits(arena.read(make_entry("a", 2)), random_latents(2, 3))


def fail() -> Tensor:
    raise StorageError("the file is gone")


@pytest.mark.parametrize(
    ("reload", "words"),
    [
        (fail, "the file is gone"),
        (lambda: random_latents(2, 0), r"was torch.float32 \[1, 8, 1, 1\], its file holds"),
        (lambda: random_latents(2, 0, torch.float64), r"torch.float64 \[1, 8, 1, 1\]"),
    ],
)
def test_what_cannot_be_read_again_is_said_and_forgotten(
    reload: Callable[[], Tensor], words: str
) -> None:
    cache = make_cache(1, 0)
    cache.add(make_entry("a", reload=reload))
    cache.add(make_entry("b", seed=5, reload=lambda: random_latents(1, 5)))
    cache.prefetch(["a"])
    assert tiers(cache) == {"a": "disk", "b": "device"}
    entries, lost = cache.gather(["a", "b", "c"])
    assert [entry.id for entry in entries] == ["b"]
    assert list(lost) == ["a", "c"] and "no memory 'c'" in lost["c"]
    with pytest.raises(StorageError, match=words):
        raise StorageError(lost["a"])
    assert cache.ids() == ("b",)
    with pytest.raises(RequestError, match="no memory 'a'"):
        cache.get("a")


def test_an_interrupted_move_costs_the_moving_entry_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(1, 1)
    for seed, id in enumerate("ab"):
        cache.add(make_entry(id, seed=seed))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Arena, "take_over", interrupt)
        cache.get("a")
    assert cache.bytes_used == PAGE
    entries, lost = cache.gather(["a", "b"])
    assert "'a' was lost while it moved" in lost["a"] and cache.ids() == ("b",)
    assert same_bits(entries[0].latents, random_latents(1, 1))
    cache.add(make_entry("a", seed=2))
    assert same_bits(cache.get("a").latents, random_latents(1, 2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device_bytes": 65}, r"0\.\.64, the budget of all latents, got 65"),
        ({"device_bytes": -1}, "got -1"),
        ({"page_bytes": 0}, "page_bytes must be positive, got 0"),
    ],
)
def test_budgets_that_contradict_each_other(arguments: dict[str, int], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        MemoryCache(64, **arguments)


def test_an_arena_that_cannot_be_had() -> None:
    with pytest.raises(MemoryBudgetError, match=r"device tier .* lower device_cache_bytes"):
        MemoryCache(1 << 60, device_bytes=1 << 60, page_bytes=1 << 30)


def test_many_threads_share_one_cache() -> None:
    cache, failures = make_cache(3, 3), []

    def session(name: int) -> None:
        try:
            for turn in range(40):
                seed = 100 * name + turn
                latents = random_latents(1, seed)
                cache.add(make_entry(f"{name}/{turn}", seed=seed, reload=latents.clone))
                back = range(max(0, turn - 4), turn + 1)
                with cache.pinned([f"{name}/{i}" for i in back]):
                    cache.prefetch([f"{name}/{i}" for i in back])
                    for i in back:
                        got = cache.get(f"{name}/{i}").latents
                        assert same_bits(got, random_latents(1, 100 * name + i))
                assert cache.bytes_used <= cache.capacity_bytes
        except (AssertionError, RequestError, StorageError, KeyError, RuntimeError) as error:
            failures.append(error)

    threads = [threading.Thread(target=session, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(cache) == 120


@pytest.fixture
def cuda_cache() -> Iterator[MemoryCache]:
    page = 1 << 20
    yield MemoryCache(4 * page, "cuda", device_bytes=2 * page, page_bytes=page)


@pytest.mark.gpu
def test_bits_survive_moves_that_overlap_the_callers_work(cuda_cache: MemoryCache) -> None:
    cache, device = cuda_cache, torch.device("cuda")
    originals = {
        id: torch.randn(4, 5, 64, 64, generator=torch.Generator().manual_seed(seed))
        for seed, id in enumerate("abcd")
    }
    for id, latents in originals.items():
        # made on the caller's stream just before
        cache.add(MemoryEntry(id, 1, latents.to(device, non_blocking=True), TRAJECTORY, "vae"))
    weights = torch.randn(2048, 2048, device=device)
    for _ in range(20):
        for id in "adbc":
            weights = weights @ weights / 50  # keeps the caller's stream busy
            cache.prefetch([id])
            doubled = cache.get(id).latents * 2
            assert doubled.device.type == "cuda"
            assert torch.equal(doubled.cpu(), originals[id] * 2)
    assert cache.bytes_by_tier() == {"device": 2 << 20, "host": 2 << 20}
    assert cache._tiers[1]._buffer.is_pinned()


def test_every_move_is_counted() -> None:
    cache = make_cache(1, 1)
    counted = cache.counters()
    assert set(counted) == {"hits", "misses", "reloads", "demotions", "evictions"}

    def changes() -> dict[str, int]:
        before = dict(counted)
        counted.update(cache.counters())
        return {
            name: counted[name] - before[name] for name in counted if counted[name] > before[name]
        }

    bits = random_latents(1, 0)
    cache.add(make_entry("a", reload=lambda: bits))
    assert changes() == {}
    cache.add(make_entry("b"))  # "a" to the host
    assert changes() == {"demotions": 1}
    cache.add(make_entry("c"))  # "b" to the host, "a" to disk alone
    assert changes() == {"demotions": 2}
    cache.add(make_entry("d"))  # "c" to the host, "b" nowhere
    assert changes() == {"demotions": 1, "evictions": 1}
    cache.get("d")
    assert changes() == {"hits": 1}
    cache.get("a")  # from disk; moving it up would lose another
    assert changes() == {"misses": 1, "reloads": 1}
    with pytest.raises(RequestError):
        cache.get("b")
    assert changes() == {"misses": 1}
    cache.evict("c")
    cache.prefetch(["a"])  # there is room on the host, so up it goes, and "d" down
    cache.get("a")
    found = changes()
    assert found["reloads"] == found["hits"] == 1 and "misses" not in found
    cache.evict("a")
    assert changes() == {}


def test_an_owners_entries_go_together() -> None:
    cache, mine = make_cache(2, 2), object()
    for seed, id in enumerate("abc"):
        entry = make_entry(id, seed=seed)
        cache.add(dataclasses.replace(entry, owner=mine if id != "b" else object()))
    # a finalizer does it like this, in the midst of another use
    cache.abandon(mine)
    assert "a" in cache and cache.ids() == ("b",) and cache.bytes_used == PAGE
    cache.add(dataclasses.replace(make_entry("d"), owner=mine))
    cache.forget(mine)
    assert cache.ids() == ("b",)
