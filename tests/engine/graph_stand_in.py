"""CUDA's graphs acted out on a CPU: capture executes nothing, a replay reruns what was captured.

Every operation is recorded with the tensors that it was given and made. A replay runs each again
on those tensors and writes what it makes into the same storages, so views alias as they did and
writes in place happen again; no Python between the operations runs. What a real capture does not
do is undone: writes to tensors from before the capture are taken back, and all that the capture
made is overwritten with NaN, so that nothing can live on what it computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# what waits for the device, or moves data to or from the host
FORBIDDEN = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.lift_fresh.default,
}


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors(tree: Any) -> Iterator[Tensor]:
    """Those in what an operation takes or gives: tuples, lists and a dictionary of keywords."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list, dict)):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(branch)


def written(operation: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes to."""
    found: list[Tensor] = []
    for index, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = keywords.get(argument.name)
            if index < len(arguments):
                given = arguments[index]
            found += tensors(given)
    return found


class Recording(TorchDispatchMode):
    """Executes, and keeps what it takes to execute again. before: values of what was written to.

    calls: operations that make or write something, each with what it is given and the results that
        are no views of that, by their places among all its results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], dict[int, Tensor]]] = []
        self.made: dict[int, Tensor] = {}
        self.read: dict[int, Tensor] = {}
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FORBIDDEN:
            raise RuntimeError(f"{func} is not permitted while a stream is captured")
        given = {storage(tensor): tensor for tensor in tensors((args, kwargs))}
        self.read |= {key: tensor for key, tensor in given.items() if key not in self.made}
        changed = written(func, args, kwargs)
        for tensor in changed:
            key = storage(tensor)
            if key not in self.made and key not in self.before:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[key] = (whole, whole.clone())
        result = func(*args, **kwargs)
        fresh = {i: t for i, t in enumerate(tensors(result)) if storage(t) not in given}
        self.made |= {storage(tensor): tensor for tensor in fresh.values()}
        # a view is one still when its call is not made again
        if fresh or changed:
            self.calls.append((func, args, kwargs, fresh))
        return result

    def undo(self) -> None:
        """Take back what was executed."""
        for whole, value in self.before.values():
            whole.copy_(value)
        for tensor in self.made.values():
            torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(0xFF)


class StandInGraph:
    """read: what the captured function found made, by storage. num_bytes: what it made."""

    def __init__(self, recorder: StandIn, recording: Recording) -> None:
        self.recorder = recorder
        self.calls = recording.calls
        self.read = recording.read
        self.num_bytes = sum(t.untyped_storage().nbytes() for t in recording.made.values())

    def replay(self) -> None:
        assert self.calls, "this graph was reset"
        self.recorder.replays += 1
        for func, args, kwargs, fresh in self.calls:
            again = list(tensors(func(*args, **kwargs)))
            for place, tensor in fresh.items():
                tensor.copy_(again[place])

    def reset(self) -> None:
        assert self.calls, "a graph is reset once"
        self.calls, self.read = [], {}
        self.recorder.live.remove(self)
        if not self.recorder.live:
            self.recorder.pool = 0


class StandIn:
    """A recorder whose pool grows to its largest graph and is given back with the last one.

    fail: called within a capture, after what is captured.
    """

    def __init__(self, fail: Callable[[], None] | None = None) -> None:
        self.fail = fail
        self.live: list[StandInGraph] = []
        self.pool = self.captures = self.replays = self.paced = 0
        self.turns = 0

    def capture(self, run: Callable[[], object]) -> StandInGraph:
        self.captures += 1
        recording = Recording()
        try:
            with recording:
                run()
                if self.fail is not None:
                    self.fail()
        finally:
            recording.undo()
        graph = StandInGraph(self, recording)
        self.live.append(graph)
        self.pool = max(self.pool, graph.num_bytes)
        return graph

    def pool_bytes(self) -> int:
        return self.pool

    def enter(self) -> None:
        assert not self.turns, "two turns have the graphs"
        self.turns += 1

    def pace(self) -> None:
        self.paced += 1

    def leave(self) -> None:
        self.turns -= 1


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail
