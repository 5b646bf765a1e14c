"""Out of memory in the middle of a turn: numbers, nothing left behind, and the next turn."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mv2v_engine import Engine
from mv2v_engine.engine.session import Session
from mv2v_engine.errors import KernelUnavailableError, MemoryBudgetError, is_out_of_memory
from mv2v_engine.models import dit
from mv2v_engine.ops import attention as attention_op
from mv2v_engine.progress import Event, StageStarted, StepDone

DEVICE = (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 1.83 GiB.\nGPU 0 has")
HOST = (RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
Failure = tuple[type[Exception], str]


class _Allocations(TorchDispatchMode):
    """Every storage made inside; after `fail`, the operation after `skip` others raises."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[weakref.ref[torch.UntypedStorage]] = []
        self.failure: Failure | None = None
        self.skip = 0

    def fail(self, failure: Failure, skip: int) -> None:
        self.failure, self.skip = failure, skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.failure is not None:
            if self.skip == 0:
                (kind, said), self.failure = self.failure, None
                raise kind(said)
            self.skip -= 1
        out = func(*args, **(kwargs or {}))
        stored = [leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.made.extend(weakref.ref(storage) for storage in stored)
        return out

    def alive(self) -> list[int]:
        """Bytes of every storage that still lives."""
        dit._rotary_table.cache_clear()  # a few plans' tables are kept, whatever becomes of a turn
        found = [storage for each in self.made if (storage := each()) is not None]
        return [storage.nbytes() for storage in found]


def _fail(session: Session, failure: Failure, when: Callable[[Event], bool]) -> str:
    """Let an operation fail soon after an event; what the turn says, when it has left nothing."""
    allocations = _Allocations()
    gc.collect()
    with allocations, pytest.raises(MemoryBudgetError) as caught:
        for event in session.events("arc_left", memory="retrieved"):
            if when(event):
                # deep in the stage, where dozens of tensors are alive
                allocations.fail(failure, skip=60)
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    said = str(caught.value)
    assert failure[1].split("\n")[0] in said and "\n" not in said
    from collections import Counter
    print("ALIVE", Counter(allocations.alive()))
    assert len(allocations.made) > 60 and allocations.alive() == []
    return said


@pytest.mark.parametrize("conditioning", ["joint", "static"])
@pytest.mark.parametrize("failure", [DEVICE, HOST], ids=["device", "host"])
def test_in_a_step(
    engine: Engine, source_frames: Tensor, failure: Failure, conditioning: Any
) -> None:
    engine = engine.reconfigured(replace(engine.config, conditioning=conditioning))
    session, untroubled = engine.session(source_frames), engine.session(source_frames)
    for each in (session, untroubled):
        each.render("pan_right", memory="retrieved")
    said = _fail(session, failure, lambda event: isinstance(event, StepDone))
    predicted = engine.budget.predict(_plan(session)).by_span()["sampling"]
    assert "in the stage 'sampling'" in said and f"{predicted:,} predicted" in said
    assert "bytes were held by the process" in said and "earlier ones are kept" in said
    assert "max_memory=0" in said
    assert len(session.turns) == 1 and len(engine.cache) == 2
    again, expected = (each.render("arc_left", memory="retrieved") for each in (session, untroubled))
    assert again.number == 2 and torch.equal(again.latents, expected.latents)


def _plan(session: Session) -> Any:
    from mv2v_engine.engine.request import TurnRequest

    request = TurnRequest.of("arc_left", session.engine.sampling, memory="retrieved")
    return session.plan_turn(request)[1]
