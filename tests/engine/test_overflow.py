"""Out of memory in the middle of a turn: numbers, nothing left behind, and the next turn."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine
from mv2v_engine.counting import LiveBytes
from mv2v_engine.engine.request import Request
from mv2v_engine.engine.session import Session
from mv2v_engine.errors import MemoryBudgetError, is_out_of_memory
from mv2v_engine.models import rope
from mv2v_engine.ops import attention as attention_op
from mv2v_engine.progress import Event, StageStarted, StepDone

DEVICE = (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 1.83 GiB.\nGPU 0 has")
HOST = (RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
Failure = tuple[type[Exception], str]


class _Allocations(LiveBytes):
    """Every storage made inside; after `fail`, the operation after `skip` others raises."""

    def __init__(self) -> None:
        super().__init__()
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
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _see(self, tensor: Tensor) -> None:
        super()._see(tensor)
        self.made.append(weakref.ref(tensor.untyped_storage()))

    def alive(self) -> list[int]:
        """Bytes of every storage that still lives."""
        rope.table_on.cache_clear()  # a few plans' tables stay, whatever becomes of a turn
        return [storage.nbytes() for each in self.made if (storage := each()) is not None]


def _request(session: Session) -> Request:
    return Request.view("arc_left", session.parts.sampling, memory="retrieved")


def _fail(
    session: Session, failure: Failure, when: Callable[[Event], bool], *, skip: int = 60
) -> str:
    """Let an operation fail soon after an event; what the turn says, when it has left nothing."""
    request, allocations = _request(session), _Allocations()
    session.plan_turn(request)  # what retrieval keeps for all turns
    with allocations, pytest.raises(MemoryBudgetError) as caught:
        for event in session.events(request):
            if when(event):
                allocations.fail(failure, skip)
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    said = str(caught.value)
    assert failure[1].split("\n")[0] in said and "\n" not in said
    assert len(allocations.made) > skip // 5 and allocations.alive() == []
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
    plan = session.plan_turn(_request(session))[1]
    predicted = engine.budget.predict(plan).by_span()["sampling"]
    assert "in the stage 'sampling'" in said and f"{predicted:,} predicted" in said
    assert "bytes were held by the process" in said and "earlier ones are kept" in said
    assert len(session.turns) == 1 and len(engine.cache) == 2
    again, expected = (each.ask(_request(session)) for each in (session, untroubled))
    assert again.number == 2 and torch.equal(again.latents, expected.latents)


def test_in_the_encoder_and_in_the_decoder(engine: Engine, source_frames: Tensor) -> None:
    """A VAE that is interrupted between two chunks holds no features of the last one."""
    session = engine.session(source_frames)

    def at_vae(event: Event) -> bool:
        return isinstance(event, StageStarted) and event.stage == "vae"

    assert "in the stage 'vae'" in _fail(session, HOST, at_vae, skip=600)
    assert session.turns == [] and len(engine.cache) == 0
    session.render("pan_right")  # the source is encoded now: the next VAE stage is the decoder's
    assert "in the stage 'vae'" in _fail(session, HOST, at_vae, skip=600)
    assert session.ask(_request(session)).number == 2


def test_other_failures_stay_what_they_are(engine: Engine, source_frames: Tensor) -> None:
    session, allocations = engine.session(source_frames), _Allocations()
    with allocations, pytest.raises(RuntimeError, match="shapes differ") as caught:
        for event in session.events(_request(session)):
            if isinstance(event, StepDone):
                allocations.fail((RuntimeError, "shapes differ"), skip=60)
    assert type(caught.value) is RuntimeError


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DEVICE[0](DEVICE[1]), True),
        (HOST[0](HOST[1]), True),
        (MemoryError(), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_means_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_attention_that_runs_out_is_not_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: Any) -> Tensor:
        raise DEVICE[0](DEVICE[1])

    monkeypatch.setattr(attention_op.F, "scaled_dot_product_attention", allocate)
    q = torch.zeros(1, attention_op.MATH_LIMIT + 1, 1, 8)
    with pytest.raises(torch.OutOfMemoryError):
        attention_op.attention(q, q, q)
