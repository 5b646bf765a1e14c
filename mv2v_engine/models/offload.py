"""Blocks whose weights wait on the host: two places on the device take them by turns.

While a block computes in one place, the weights of the next one are copied into the other, on a
stream of their own. Events order the two streams; the host waits for neither.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Protocol

import torch
from torch import Tensor, nn

NUM_PLACES = 2
# torch's allocator places tensors so, and libraries choose their algorithms by it
_ALIGNMENT = 512
# the names, dtypes and shapes of a block's tensors
_Layout = tuple[tuple[str, torch.dtype, torch.Size], ...]


class Copies(Protocol):
    """The order of what fills a place and of what reads it."""

    def fill(self, place: int, target: Tensor, source: Tensor) -> None:
        """Queue a copy, behind all that was queued when the place was last left."""

    def ready(self, place: int) -> None:
        """What the caller queues from now on finds the place filled."""

    def leave(self, place: int) -> None:
        """The caller has queued the last that reads the place."""


class _AtOnce:
    """A copy is done when it returns."""

    def fill(self, place: int, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def ready(self, place: int) -> None:
        pass

    def leave(self, place: int) -> None:
        pass


class CudaCopies:
    """Copies on a stream of their own, beside the caller's."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        # a place's memory may have been another tensor's, which is still being read
        self._left = [self._current().record_event() for _ in range(NUM_PLACES)]
        self._filled: dict[int, torch.cuda.Event] = {}

    def _current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def fill(self, place: int, target: Tensor, source: Tensor) -> None:
        self._stream.wait_event(self._left[place])
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._filled[place] = self._stream.record_event()

    def ready(self, place: int) -> None:
        self._current().wait_event(self._filled[place])

    def leave(self, place: int) -> None:
        self._left[place] = self._current().record_event()


class BlockOffload:
    """Blocks that run one after the other, in two places on a device.

    places: the modules that run, in each place one for every layout of weights; what they hold is
    the block that was last copied there.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], device: torch.device, copies: Copies | None = None
    ) -> None:
        """Move the blocks' weights into one buffer a block, pinned beside CUDA.

        blocks: on the host; not all need have the same weights. device: where they run. copies:
        None takes the device's.
        """
        is_cuda = device.type == "cuda"
        self._sources = []
        for block in blocks:
            # torch rounds a pinned buffer up to a power of two
            host = next(block.parameters()).device
            size = block_bytes(block)
            buffer = torch.empty(size, dtype=torch.uint8, device=host, pin_memory=is_cuda)
            _lay_out(block, buffer, is_copied=True)
            self._sources.append(buffer)
        size = max(buffer.nbytes for buffer in self._sources)
        self._targets = [
            torch.empty(size, dtype=torch.uint8, device=device) for _ in blocks[:NUM_PLACES]
        ]
        self._layouts = [_layout(block) for block in blocks]
        self._modules: dict[tuple[int, _Layout], nn.Module] = {}
        for layout, block in dict(zip(self._layouts, blocks, strict=True)).items():
            for place, target in enumerate(self._targets):
                module = self._modules[place, layout] = deepcopy(block)
                _lay_out(module, target, is_copied=False)
        self.places = list(self._modules.values())
        self._copies: Copies = copies or (CudaCopies(device) if is_cuda else _AtOnce())
        self._held: list[int | None] = [None] * len(self._targets)
        # forwards of several threads share the places
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes of the places on the device."""
        return sum(target.nbytes for target in self._targets)

    def resident(self) -> Iterator[nn.Module]:
        """The blocks in order, each with its weights on the device until the next is asked for.

        A forward takes all of them; another thread's waits until it is through.
        """
        count = len(self._sources)
        with self._lock:
            place = self._fetch(0)
            for index in range(count):
                # after the last one comes the next forward's first
                following = self._fetch((index + 1) % count, beside=place)
                self._copies.ready(place)
                try:
                    yield self._modules[place, self._layouts[index]]
                finally:
                    self._copies.leave(place)
                place = following

    def _fetch(self, index: int, beside: int = 1) -> int:
        """The place that gets the weights of a block, or has them. beside: one that is in use."""
        if index in self._held:
            return self._held.index(index)
        place = 1 - beside
        self._held[place] = None
        source = self._sources[index]
        self._copies.fill(place, self._targets[place][: source.nbytes], source)
        self._held[place] = index
        return place


def places_bytes(blocks: Sequence[nn.Module]) -> int:
    """Bytes of the places of such blocks; they may be without memory."""
    return max(map(block_bytes, blocks)) * min(len(blocks), NUM_PLACES)


def block_bytes(block: nn.Module) -> int:
    """Bytes of a buffer of a block's weights."""
    return buffer_bytes(tensor.nbytes for _, _, tensor in _tensors(block))


def buffer_bytes(sizes: Iterable[int]) -> int:
    """Bytes of a buffer of tensors of such bytes, each aligned."""
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


def _layout(block: nn.Module) -> _Layout:
    """What tells apart blocks that cannot run in one module."""
    names = {id(module): name for name, module in block.named_modules()}
    return tuple(
        (f"{names[id(module)]}.{name}", tensor.dtype, tensor.shape)
        for module, name, tensor in _tensors(block)
    )


def _tensors(block: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Parameters and buffers, with the modules that own them and their names there."""
    for module in block.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield module, name, tensor


def _lay_out(block: nn.Module, buffer: Tensor, *, is_copied: bool) -> None:
    """Let a block's tensors lie in a buffer, with the values that they have or with none."""
    start = 0
    for module, name, tensor in list(_tensors(block)):
        part = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += buffer_bytes([tensor.nbytes])
        if is_copied:
            part.copy_(tensor.detach())
        if name in module._parameters:
            # as it was: torch sums a product otherwise where a weight could be trained
            module._parameters[name] = nn.Parameter(part, requires_grad=tensor.requires_grad)
        else:
            module._buffers[name] = part
