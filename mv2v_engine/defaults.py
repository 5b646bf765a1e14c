"""What holds for torch as a whole while a piece of code runs: gradients, defaults, the device.

The engine's own tensors name their dtype and their device. `inference` and `torch_defaults` keep
out what a program has set for the rest: autocast, which changes operations wherever they stand, and
libraries, whose tensors name neither.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextmanager
def no_gradients() -> Iterator[None]:
    """Run a block without gradients, in the dtypes that it names."""
    with torch.no_grad(), ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def inference(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function so that it runs under `no_gradients`."""

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with no_gradients():
            return function(*args, **kwargs)

    return run


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Run a library's code with torch's own defaults: new tensors are float32, on the CPU.

    The default dtype belongs to the process. Where it is another one, other threads see it change
    for as long as the block runs, so a block holds no more than the library's call.
    """
    dtype = torch.get_default_dtype()
    with torch.device("cpu"):
        if dtype == torch.float32:
            yield
            return
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


class _Uninitialised(TorchFunctionMode):
    """An operation that writes into a tensor without memory does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        name = getattr(func, "__name__", "")
        is_in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        written = named.get("out")
        if is_in_place:  # torch.nn.init passes its tensor by name
            written = args[0] if args else named.get("tensor")
        if isinstance(written, Tensor) and written.is_meta:
            return written
        return func(*args, **named)


@contextmanager
def without_memory() -> Iterator[None]:
    """Build modules whose tensors have shapes and no memory, for weights that are assigned later.

    The values that a module begins with are not computed: torch would import its compiler for it,
    which takes longer than building a small model.
    """
    with torch.device("meta"), _Uninitialised():
        yield
