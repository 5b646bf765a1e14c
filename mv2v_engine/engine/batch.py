"""Turns of several sessions at once: every tick packs their next steps into one forward.

A turn enters when there is room for its tokens and leaves when it is done, whatever the others do.
What it does besides its steps (encode, recall, decode, store) runs between two ticks, one turn
after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from itertools import count, islice

from mv2v_engine import arguments
from mv2v_engine.defaults import inference
from mv2v_engine.engine.denoise import Denoiser, StepDue
from mv2v_engine.engine.parts import Parts
from mv2v_engine.engine.recall import Ranked
from mv2v_engine.engine.request import Request, require_task
from mv2v_engine.engine.session import Session
from mv2v_engine.engine.turn import Turn
from mv2v_engine.errors import (
    CancelledError,
    KernelUnavailableError,
    MV2VError,
    RequestError,
    is_out_of_memory,
)
from mv2v_engine.models.sample import Sample
from mv2v_engine.progress import CancelToken, Event, cancel_token
from mv2v_engine.sampling.guidance import needs_guidance

# younger turns that may run before an older one for which there is no room
OVERTAKING = 4
# tokens of one forward on a GPU: one full-size target, or a hundred small turns
TOKENS = 32_768
# what a request, a file or a device may bring about; anything else is a fault of the program, and
# ends the batch
FAILURES = (MV2VError, RuntimeError, ValueError, OSError, MemoryError)


def admit(tokens: Iterable[int], budget: int, *, overtaking: int = OVERTAKING) -> list[int]:
    """The places of the turns that run now, of turns in the order in which they came.

    The oldest runs, whatever its size; one larger than the budget runs alone. Of the others each
    runs if it fits beside the older ones that do, so none is ever held up by a younger one. Only
    the `overtaking` places behind the first that does not fit are looked at: turns that ran
    before it and then have to make room for it are no more than that.

    Args:
        tokens: of every turn's part of a pack, oldest first; read no further than needed.
        budget: tokens of a pack.
    """
    admitted: list[int] = []
    used, waiting = 0, None
    for place, size in enumerate(tokens):
        if not admitted or used + size <= budget:
            admitted.append(place)
            used += size
        elif waiting is None:
            waiting = place
        if used >= budget or (waiting is not None and place - waiting >= overtaking):
            break
    return admitted


@dataclass(frozen=True, slots=True)
class TurnEvent:
    """What happened to one turn. turn: its number in the batch, from 0; session: its id."""

    turn: int
    session: str
    event: Event


class BatchedTurn:
    """One turn of a batch, from `TurnBatch.add` on.

    result: the `Turn`, or what it failed with; None until it is done. tokens: its part of a pack,
    0 until it is known. Its work runs in the context (`contextvars`) in which it was added, so that
    logs and traces tell turns apart.
    """

    def __init__(
        self,
        number: int,
        session: Session,
        request: Request,
        cancel: CancelToken,
        on_progress: Callable[[TurnEvent], None] | None,
        previews: bool,
    ) -> None:
        self.number, self.session, self.request = number, session, request
        self.cancel, self._on_progress, self._previews = cancel, on_progress, previews
        self.result: Turn | Exception | None = None
        self.tokens = self._num_turns = 0
        self._ranked: Ranked | None = None
        self._context = copy_context()
        self._events: Generator[Event | StepDue, None, Turn] | None = None

    @property
    def is_done(self) -> bool:
        return self.result is not None

    def plan(self) -> None:
        """Find out how many tokens its forwards have in one step; a first static one runs alone."""
        if not self.tokens:
            self._ranked = self.session.plan_turn(self.request)
            self._num_turns, plan = len(self.session.turns), self._ranked[1]
            length = plan.length if plan.conditioning == "joint" else plan.target.length
            self.tokens = length * (2 if needs_guidance(self.request.guidance_scale) else 1)

    def go_on(self, error: Exception | None = None) -> Denoiser | None:
        """Run the turn to its next step, which is the caller's to run, or to its end (None).

        error: what the step failed with; the turn raises it as its own.
        """
        return self._context.run(self._advance, error)

    def _advance(self, error: Exception | None) -> Denoiser | None:
        if self._events is None:
            if error is not None:
                raise error
            # the session may have been given a turn by hand since
            is_new = self._num_turns == len(self.session.turns)
            ranked = self._ranked if is_new else None
            self._events = self.session.hand_over(
                self.request, self.cancel, ranked, previews=self._previews
            )
        try:
            event = next(self._events) if error is None else self._events.throw(error)
            while not isinstance(event, StepDue):
                if self._on_progress is not None:
                    self._on_progress(TurnEvent(self.number, self.session.id, event))
                event = next(self._events)
        except StopIteration as stop:
            self.result = stop.value
            return None
        return event.denoiser

    def fail(self, error: Exception) -> None:
        """Let go of everything; the error is the result."""
        self.result = error
        if self._events is not None:
            self._context.run(self._events.close)


class TurnBatch:
    """Turns of one engine's sessions. One thread ticks; any thread may add turns at any time.

    token_budget: of one forward; None takes the configuration's `batch_tokens`. Halved when a
    forward of several turns runs out of device memory, 1 where the attention library that was
    asked for by name takes no packs. failures: the errors that end one turn and leave the others;
    any other one ends the batch. pack_failure: what the last pack that did not run said.

    Turns of one session run in the order in which they were added, each remembering the ones
    before. One that fails or is cancelled leaves the others, its session's too, as they were.
    """

    def __init__(
        self,
        engine: Parts,
        token_budget: int | None = None,
        failures: tuple[type[Exception], ...] = FAILURES,
    ) -> None:
        self.engine, self._failures = engine, failures
        if engine.team is not None:
            raise RequestError(
                f"turns of several sessions share a forward in one process, got "
                f"{engine.config.parallel.num_ranks}; run them one after the other, or an engine "
                "for each process"
            )
        if token_budget is None:
            token_budget = engine.config.batch_tokens
        if token_budget is None:
            token_budget = TOKENS if engine.device.type == "cuda" else 1
        self.token_budget = arguments.integer("token_budget", token_budget)
        if self.token_budget < 1:
            raise RequestError(f"token_budget must be at least 1, got {self.token_budget}")
        self._turns: list[BatchedTurn] = []  # not done yet, oldest first
        self._due: dict[BatchedTurn, Denoiser] = {}  # those under way
        self._numbers = count()
        self.pack_failure: str | None = None

    def add(
        self,
        session: Session,
        request: Request,
        *,
        cancel: CancelToken | None = None,
        on_progress: Callable[[TurnEvent], None] | None = None,
        previews: bool = False,
    ) -> BatchedTurn:
        """Queue a turn. previews: as `Session.render`.

        Raises:
            RequestError: the session is of an engine with other weights.
        """
        arguments.instance("session", session, Session, "a session of novel views")
        arguments.instance("request", request, Request, "a Request")
        arguments.callback("on_progress", on_progress)
        require_task(session.parts.transformer.config, session.parts.checkpoint.name, edits=False)
        if session.parts.transformer is not self.engine.transformer:
            raise RequestError(
                f"session {session.id} runs on {session.parts.checkpoint.name} as another engine "
                "loaded it; a batch takes sessions of one engine"
            )
        token = cancel_token(cancel)
        turn = BatchedTurn(next(self._numbers), session, request, token, on_progress, previews)
        self._turns.append(turn)
        return turn

    def answer_all(
        self,
        turns: Sequence[tuple[Session, Request]],
        *,
        cancels: Sequence[CancelToken | None] | None = None,
        on_progress: Callable[[TurnEvent], None] | None = None,
    ) -> list[Turn | Exception]:
        """Add turns and run everything: each gets what its own `answer` gives, within rounding.

        Args:
            cancels: a token for each turn.

        Returns:
            In the order of the requests, the turn, or the error that it failed with.

        Raises:
            RequestError: a session is of another engine, or there are other than one token a turn.
        """
        pairs = list(arguments.sequence("turns", turns, tuple, "pairs (session, Request)"))
        if any(len(pair) != 2 for pair in pairs):
            raise RequestError(
                "turns must be pairs (session, Request), got tuples of other lengths"
            )
        if cancels is not None and (isinstance(cancels, str) or not isinstance(cancels, Sequence)):
            raise arguments.mistaken("cancels", cancels, "a token, or None, for each turn")
        tokens = [None] * len(pairs) if cancels is None else cancels
        if len(tokens) != len(pairs):
            raise RequestError(f"{len(pairs)} turns need as many cancel tokens, got {len(tokens)}")
        added = [
            self.add(session, request, cancel=cancel, on_progress=on_progress)
            for (session, request), cancel in zip(pairs, tokens, strict=True)
        ]
        self.run()
        return [turn.result for turn in added if turn.result is not None]

    def run(self) -> None:
        """Tick until every turn is done."""
        try:
            while self.tick():
                pass
        finally:
            self.close()

    def tick(self) -> bool:
        """One step of every turn that has room; whether turns are left."""
        for turn in list(self._turns):
            self._attempt(turn, turn.cancel.check)
        self._step([turn for turn in self._admitted() if turn in self._due or self._go_on(turn)])
        return bool(self._turns)

    def close(self) -> None:
        """Give up what is not done."""
        for turn in list(self._turns):
            self._fail(turn, CancelledError(f"turn {turn.number} was given up: the batch closed"))

    def _admitted(self) -> list[BatchedTurn]:
        """The turns whose next step runs now."""
        seen: list[BatchedTurn] = []

        def sizes() -> Iterator[int]:
            for turn in self._heads():
                if self._attempt(turn, turn.plan):
                    seen.append(turn)
                    yield turn.tokens

        return [seen[place] for place in admit(sizes(), self.token_budget)]

    def _heads(self) -> Iterator[BatchedTurn]:
        """The oldest turn of each session, oldest first."""
        sessions: set[int] = set()
        for turn in list(self._turns):
            if id(turn.session) not in sessions:
                sessions.add(id(turn.session))
                yield turn

    def _step(self, turns: list[BatchedTurn]) -> None:
        """The next step of each, in one pack as far as they can be packed."""
        samples = {turn: self._due[turn].samples() for turn in turns}
        packed = {turn: own for turn, own in samples.items() if own is not None}
        if len(packed) < 2 or not self._step_packed(packed):
            packed = {}
        for turn in turns:
            if turn.is_done or not (turn in packed or self._attempt(turn, self._due[turn].step)):
                continue
            self._go_on(turn)

    @inference
    def _step_packed(self, packed: dict[BatchedTurn, list[Sample]]) -> bool:
        """Whether the pack ran; if not, each turn's own step shows which of them is at fault."""
        everything = [sample for samples in packed.values() for sample in samples]
        try:
            velocities = iter(self.engine.transformer.forward_samples(everything))
        except self._failures as error:
            self.pack_failure = str(error)
            if isinstance(error, KernelUnavailableError):
                self.token_budget = 1
            if is_out_of_memory(error):
                self.token_budget = max(sum(sample.num_tokens for sample in everything) // 2, 1)
            return False
        for turn, samples in packed.items():
            denoiser, own = self._due[turn], list(islice(velocities, len(samples)))
            denoiser.packed_steps += 1
            self._attempt(turn, partial(denoiser.advance, own))
        return True

    def _attempt(self, turn: BatchedTurn, work: Callable[[], object]) -> bool:
        """Whether a turn's work is done; its error ends that turn alone."""
        try:
            work()
        except self._failures as error:
            self._go_on(turn, error)
            return False
        return True

    def _go_on(self, turn: BatchedTurn, error: Exception | None = None) -> bool:
        """Take a turn to its next step; whether it has one."""
        try:
            denoiser = turn.go_on(error)
        except self._failures as failure:
            self._fail(turn, failure)
            return False
        if denoiser is None:
            self._forget(turn)
            return False
        self._due[turn] = denoiser
        return True

    def _fail(self, turn: BatchedTurn, error: Exception) -> None:
        turn.fail(error)
        self._forget(turn)

    def _forget(self, turn: BatchedTurn) -> None:
        self._turns.remove(turn)
        self._due.pop(turn, None)
