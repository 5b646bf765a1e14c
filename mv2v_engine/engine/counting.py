"""Bytes of the tensors that live at once, counted as they are made and freed.

Exact on any device, also on fake and meta tensors, which have sizes and no memory. What a library
allocates inside an operation is not seen.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages made inside the block, in the thread that entered it.

    now: bytes of those that still live. peak: the most there were at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler, to keep it out of here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self.call(func, args, kwargs or {})
        if not gives_its_input(func):
            for leaf in [out] if isinstance(out, Tensor) else tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._see(leaf)
        return out

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation gives."""
        return func(*args, **kwargs)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            weakref.finalize(storage, self._freed, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@lru_cache(maxsize=4096)
def gives_its_input(func: Any) -> bool:
    """Whether an operation returns a view of what it was given, or that itself."""
    return any(value.alias_info is not None for value in func._schema.returns)
