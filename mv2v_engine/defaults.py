"""What a program has set for torch as a whole, kept out of what the engine computes.

The engine's own tensors name their dtype and their device. These two are for the rest: autocast,
which changes operations wherever they stand, and libraries, whose tensors name neither.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def inference(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function so that it runs without gradients, in the dtypes that it names."""

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.no_grad(), ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
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
