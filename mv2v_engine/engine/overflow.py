"""A turn that runs out of memory, or of finite numbers: it says why, and the engine goes on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, TypeVar

import torch

from mv2v_engine.errors import MemoryBudgetError, NotFiniteError, is_out_of_memory
from mv2v_engine.progress import Spans
from mv2v_engine.tokens.plan import TokenPlan

if TYPE_CHECKING:
    from mv2v_engine.engine.engine import Engine


Happening = TypeVar("Happening")
Result = TypeVar("Result")

# what a failed turn is advised to save, of what was predicted
_LESS = 0.9


def guarded(
    engine: Engine,
    turn: Generator[Happening, None, Result],
    spans: Spans,
    plan: Callable[[], TokenPlan],
    *,
    outcome: str,
) -> Generator[Happening, None, Result]:
    """A turn whose want of memory becomes an error with the numbers, and leaves nothing behind.

    outcome: what becomes of the turn, for the message.

    Raises:
        MemoryBudgetError: the device or the host had no memory left.
        NotFiniteError: the turn's own, which says the outcome too.
    """
    try:
        return (yield from turn)
    except NotFiniteError as error:
        error.args = (f"{error}; {outcome}",)
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    # with the error gone, no traceback holds the turn's tensors any more
    raise overflow_error(engine, spans, plan(), reason, outcome)


def overflow_error(
    engine: Engine, spans: Spans, plan: TokenPlan, reason: str, outcome: str
) -> MemoryBudgetError:
    """Give back what a failed turn held, and say what happened. Call it outside the handler."""
    gc.collect()
    engine.graphs.trim()
    holder = "the process"
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()
        holder = "torch"
    stage, found = spans.current, engine.budget.predict(plan)
    return MemoryBudgetError(
        f"{engine.device} had no memory left in the stage {stage!r} ({reason}): "
        f"{spans.peak_bytes.get(stage, 0):,} bytes were held by {holder}, "
        f"{found.by_span().get(stage, found.peak):,} predicted for this engine's tensors; "
        f"{outcome}; {engine.budget.advice(plan, int(_LESS * found.peak))}"
    )
