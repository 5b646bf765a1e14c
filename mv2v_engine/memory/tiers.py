"""Where a cache's latents lie: loose tensors on a device, or one preallocated arena of pages.

Pages make any free ones as good as any others, so an arena cannot fragment: what is free in sum
can be used. Bytes move on one `Lane`, in the order in which they were asked to move, so a page
may be written again as soon as its last reader is queued.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mv2v_engine.errors import MemoryBudgetError
from mv2v_engine.memory.entry import MemoryEntry


class Lane:
    """The order in which bytes move to, from and within one device.

    On CUDA a stream of its own, so that copies run beside the model; on a CPU a copy is done when
    it returns. All that is special about CUDA lies here and in `Arena`'s pinned buffer.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def moving(self, source: Tensor | None = None) -> Iterator[None]:
        """Queue the block's copies here, after what the caller has queued that makes `source`."""
        if self.stream is None:
            yield
            return
        if source is not None and source.is_cuda:
            self.stream.wait_stream(torch.cuda.current_stream(source.device))
            source.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            yield

    def hand_over(self, tensor: Tensor) -> Tensor:
        """A tensor filled on the lane, for the caller's stream; the caller's thread goes on."""
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self.stream.record_event())
            tensor.record_stream(current)
        return tensor

    def wait(self) -> None:
        """Return when everything queued is done: before the CPU itself touches pinned bytes."""
        if self.stream is not None:
            self.stream.synchronize()


class Loose:
    """Tensors on a device as they come, one allocation each; the whole of a cache without tiers."""

    name = "loose"

    def __init__(self, capacity_bytes: int, device: torch.device) -> None:
        self.capacity_bytes, self.device = capacity_bytes, device
        self.bytes_used = 0

    def size_of(self, entry: MemoryEntry) -> int:
        """Bytes that an entry occupies here."""
        return entry.num_bytes

    def keep(self, entry: MemoryEntry, *, is_queued: bool = False) -> MemoryEntry:
        """The entry as it is kept; room was made."""
        kept = entry.stored_on(self.device)
        self.bytes_used += kept.num_bytes
        return kept

    def read(self, entry: MemoryEntry) -> Tensor:
        """The kept tensor itself, which nothing overwrites."""
        return entry.latents

    def drop(self, entry: MemoryEntry) -> None:
        self.bytes_used -= entry.num_bytes


class Arena:
    """One buffer of equal pages and the table of who has which.

    An entry occupies whole pages, in any order; a page is best the size of one video. Entries
    that are kept here have latents on the meta device, since bytes in pages are not a tensor.

    Args:
        name: of the tier, for reports.
        capacity_bytes: budget; the buffer is as many whole pages as fit.
        device: of the buffer. A CPU buffer that serves a CUDA lane is pinned; torch may round its
            allocation up, so that the process holds more than is ever used.

    Raises:
        MemoryBudgetError: the device cannot give the buffer.
    """

    def __init__(
        self, name: str, capacity_bytes: int, page_bytes: int, device: torch.device, lane: Lane
    ) -> None:
        self.name, self.page_bytes, self.lane = name, page_bytes, lane
        num_pages = capacity_bytes // page_bytes
        self.capacity_bytes = num_pages * page_bytes
        self.is_pinned = device.type == "cpu" and lane.device.type == "cuda"
        try:
            with lane.moving():
                self._buffer = torch.empty(
                    (num_pages, page_bytes),
                    dtype=torch.uint8,
                    device=device,
                    pin_memory=self.is_pinned,
                )
        except RuntimeError as error:  # out of memory, of either kind
            reason = str(error).splitlines()[0]
            kind = "pinned memory" if self.is_pinned else str(device)
            raise MemoryBudgetError(
                f"the {name} tier of the memory cache needs {self.capacity_bytes:,} bytes of "
                f"{kind} at once, which could not be had ({reason}); lower device_cache_bytes or "
                "cache_bytes"
            ) from error
        # the lowest page is taken first
        self._free = list(range(num_pages - 1, -1, -1))
        self._pages: dict[str, tuple[int, ...]] = {}

    @property
    def bytes_used(self) -> int:
        """The bytes of the pages that are taken."""
        return self.capacity_bytes - len(self._free) * self.page_bytes

    def size_of(self, entry: MemoryEntry) -> int:
        """Bytes that an entry occupies here: whole pages."""
        return -(-entry.num_bytes // self.page_bytes) * self.page_bytes

    def keep(self, entry: MemoryEntry, *, is_queued: bool = False) -> MemoryEntry:
        """Copy the latents into free pages; room was made.

        is_queued: the latents are filled on the lane, which then need not wait for the caller.
        """
        source = entry.latents.detach().contiguous()
        if self.is_pinned and not source.is_cuda:
            self.lane.wait()  # this thread writes, and copies that are queued may still read
        with self._taking(entry) as pages, self.lane.moving(None if is_queued else source):
            for page, part in self._parts(pages, source):
                page.copy_(part, non_blocking=True)
        return entry.outlined()

    def read(self, entry: MemoryEntry) -> Tensor:
        """A copy on the lane's device, queued on the lane; pages may be written again after it."""
        with self.lane.moving():
            latents = torch.empty_like(entry.latents, device=self.lane.device)
            for page, part in self._parts(self._pages[entry.id], latents):
                part.copy_(page, non_blocking=True)
        return latents

    def take_over(self, entry: MemoryEntry, other: Arena) -> None:
        """Copy into free pages what lies in another arena of equal pages; room was made."""
        with self._taking(entry) as pages, self.lane.moving():
            for mine, theirs in zip(pages, other._pages[entry.id], strict=True):
                self._buffer[mine].copy_(other._buffer[theirs], non_blocking=True)

    def drop(self, entry: MemoryEntry) -> None:
        """Free an entry's pages."""
        self._free.extend(self._pages.pop(entry.id))

    @contextmanager
    def _taking(self, entry: MemoryEntry) -> Iterator[tuple[int, ...]]:
        """Pages for an entry, which are free again if the block fails."""
        count = self.size_of(entry) // self.page_bytes
        assert entry.id not in self._pages and count <= len(self._free)
        self._pages[entry.id] = tuple(self._free.pop() for _ in range(count))
        try:
            yield self._pages[entry.id]
        except BaseException:
            self.drop(entry)
            raise

    def _parts(self, pages: tuple[int, ...], latents: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The used bytes of each page beside the bytes of contiguous latents that belong there."""
        flat = latents.flatten().view(torch.uint8)
        for index, page in enumerate(pages):
            part = flat[index * self.page_bytes : (index + 1) * self.page_bytes]
            yield self._buffer[page, : len(part)], part


Tier = Loose | Arena
