"""An operation inside `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def assert_compiles(run: Callable[[Tensor], Any], x: Tensor) -> None:
    """As one graph, of the same outputs bit for bit."""
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x), rtol=0, atol=0)
