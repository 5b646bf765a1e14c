"""Captured steps: a step is recorded once for a token plan, and replayed by every later step.

A turn leases the graphs for as long as it runs; one turn at a time has them. The others meanwhile
run eagerly, on tensors of their own, and their reports say so: waiting would let one long turn hold
up all, and two turns of one thread that take steps by turns would wait for ever.

A forward's first run on a new plan is eager and makes ready what launches wait for: compiled and
tuned kernels, tables, the libraries' own plans. A step of forwards that have all run is captured,
and later ones are replayed: joint turns from the second step on, later turns on the same plan from
the first. With static conditioning the step that fills the kept K and V is always eager.
"""

from __future__ import annotations

import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import torch
from torch import Tensor

from mv2v_engine.config import APPROXIMATE_ATTENTION, EngineConfig, GraphMode
from mv2v_engine.engine.capture import Graph, Recorder, open_recorder
from mv2v_engine.engine.step import AnyBuffers, Buffers, Signature, StepBuffers
from mv2v_engine.errors import KernelUnavailableError, MemoryBudgetError, RequestError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.kept import KeptLayout, KeptStorage
from mv2v_engine.models.rope import table_on
from mv2v_engine.models.stream_cache import StreamCache
from mv2v_engine.tokens.flops import flop_table, kept_flop_table, seen_flops
from mv2v_engine.tokens.plan import TokenPlan

# A forward of the 1.3B shape is 30 blocks of about 30 launches, which the host hands out in about
# as long as an H200 takes for the products of 3,300 tokens: 11 TFLOP, 12.5 GFLOP a launch. Beyond,
# the host is ahead of the device anyway and there is nothing to gain.
LAUNCHES_PER_BLOCK = 30
FLOPS_PER_LAUNCH = 12.5e9
_BUSY = "another turn of this engine is replaying"
_STREAM = ("stream",)
_FILLS = "the window is not full yet"


@dataclass(frozen=True)
class _Key:
    """All that a captured step depends on beside the values of its buffers.

    owner: whose tensors it reads beside them (`StreamCache.era`); None: nobody's.
    """

    plan: TokenPlan
    dtype: torch.dtype
    signature: Signature
    owner: object = None


@dataclass(eq=False)
class Entry(Generic[AnyBuffers]):
    """A key's buffers and graphs, one for each kind of step; what they read lives as long.

    warm: the kinds of forwards that have run eagerly.
    """

    key: _Key
    buffers: AnyBuffers
    kept: KeptStorage | None
    constants: tuple[Tensor, ...]
    graphs: dict[tuple[str, ...], Graph] = field(default_factory=dict)
    warm: set[str] = field(default_factory=set)

    def reset(self) -> None:
        while self.graphs:
            self.graphs.popitem()[1].reset()


class Lease(Generic[AnyBuffers]):
    """Made by `Graphs.lease`. Without an entry every step runs eagerly; reason: why."""

    def __init__(
        self, graphs: Graphs | None, entry: Entry[AnyBuffers] | None, reason: str | None
    ) -> None:
        self._graphs, self.entry, self.reason = graphs, entry, reason
        self._captured = self._replayed = 0

    @property
    def buffers(self) -> AnyBuffers | None:
        """The tensors that the steps have to work on; None: the turn's own."""
        return None if self.entry is None else self.entry.buffers

    @property
    def kept(self) -> KeptStorage | None:
        """The place where conditioning has to be kept; None: anywhere."""
        return None if self.entry is None else self.entry.kept

    @property
    def awaits_capture(self) -> bool:
        """Whether steps are eager so far, but need not stay so."""
        return self.entry is not None and self.reason is None and not self.entry.graphs

    def run(self, kinds: tuple[str, ...] | None, step: Callable[[], Iterable[str]]) -> None:
        """Run a step.

        Args:
            kinds: the kinds of its forwards, equal for steps that launch the same; None for a step
                that cannot be repeated as it is.
            step: gives the kinds of the forwards that it ran.

        Raises:
            KernelUnavailableError: graphs="on", and it cannot be captured.
        """
        graphs, entry = self._graphs, self.entry
        if graphs is None or entry is None or self.reason is not None:
            step()
            return
        if kinds is None or not entry.warm.issuperset(kinds):
            entry.warm.update(step())
            return
        if kinds in entry.graphs:
            self._replayed += 1
        else:
            self.reason = graphs.capture(entry, kinds, step)
            if self.reason is not None:
                step()
                return
            self._captured += 1
        graphs.replay(entry.graphs[kinds])

    def report(self, total: int) -> dict[str, Any]:
        """How a turn of so many steps ran, and what all graphs hold."""
        return {
            "mode": "off" if self._graphs is None else self._graphs.mode,
            "eager_steps": total - self._captured - self._replayed,
            "captured_steps": self._captured,
            "replayed_steps": self._replayed,
            "bytes": {} if self._graphs is None else self._graphs.bytes(),
            "reason": self.reason,
        }

    def release(self) -> None:
        """The turn has ended, however it did."""
        entry, self.entry = self.entry, None
        if entry is not None and self._graphs is not None:
            self._graphs.release(entry)


def flops_per_launch(plan: TokenPlan, held: int = 0) -> float:
    """FLOPs a launch of the forward that a plan's steps repeat.

    held: further tokens that self-attention sees.
    """
    table = kept_flop_table(plan) if plan.conditioning == "static" else flop_table(plan)
    return (sum(table.values()) + seen_flops(plan, held)) / (
        LAUNCHES_PER_BLOCK * plan.shape.num_layers
    )


def open_graphs(config: EngineConfig, device: torch.device) -> Graphs:
    """An engine's graphs, or none with the reason.

    Raises:
        KernelUnavailableError: graphs="on" where there are none.
    """
    if config.graphs == "off":
        return Graphs("off", 0, None, "graphs are off")
    if config.offload is not None:
        return Graphs(config.graphs, 0, None, "the blocks' weights come from the host every step")
    if config.attention in APPROXIMATE_ATTENTION:
        reason = f"attention by {config.attention} is not known to replay rightly"
        return Graphs("auto", 0, None, reason)
    try:
        return Graphs(config.graphs, config.graph_bytes, open_recorder(device), None)
    except KernelUnavailableError as error:
        if config.graphs == "on":
            raise KernelUnavailableError(
                f'graphs="on" was asked for, but {error}; use "auto" or "off"'
            ) from error
        return Graphs("auto", 0, None, str(error))


class Graphs:
    """All graphs of an engine, least recently used first, under one byte budget.

    The budget covers the pool of all graphs, their buffers, and an arena for the K and V that
    static conditioning keeps, which all plans share: only one turn uses it at a time. An arena that
    must grow takes the graphs along that point into it, and doubles.
    """

    def __init__(
        self, mode: GraphMode, capacity_bytes: int, recorder: Recorder | None, reason: str | None
    ) -> None:
        self.mode, self.capacity_bytes = mode, capacity_bytes
        self._recorder, self._reason = recorder, reason
        self._entries: OrderedDict[_Key, Entry[Any]] = OrderedDict()
        self._arena: Tensor | None = None
        self._refused: dict[_Key, str] = {}
        self._gone = set[object]()
        self._leased = threading.Lock()

    def bytes(self) -> dict[str, int]:
        """The bytes held on the device now: the pool, the arena, and the graphs' buffers."""
        pool = 0 if self._recorder is None else self._recorder.pool_bytes()
        arena = 0 if self._arena is None else self._arena.nbytes
        buffers = sum(entry.buffers.num_bytes for entry in list(self._entries.values()))
        return {"pool": pool, "arena": arena, "buffers": buffers}

    def __len__(self) -> int:
        """Captured steps."""
        return sum(len(entry.graphs) for entry in list(self._entries.values()))

    def clear(self) -> None:
        """Give everything back, and try again what could not be captured. Waits for a lease."""
        with self._leased:
            self._refused.clear()
            self._drop_all()

    def trim(self) -> None:
        """Give everything back, unless a turn has the graphs: memory is wanted now."""
        if self._leased.acquire(blocking=False):
            try:
                self._drop_all()
            finally:
                self._leased.release()

    def forget(self, owner: object) -> None:
        """Give back what an owner's steps hold: now, or when the turn that has the graphs ends."""
        self._gone.add(owner)
        if self._leased.acquire(blocking=False):
            try:
                self._drop_gone()
            finally:
                self._leased.release()

    def lease(
        self,
        transformer: MV2VTransformer,
        plan: TokenPlan,
        own: AnyBuffers,
        *,
        owner: object = None,
        held: int = 0,
    ) -> Lease[AnyBuffers]:
        """A turn's way to its steps: buffers to work on and graphs to replay, or a reason why not.

        own: the turn's tensors, whose values the leased buffers take. owner: whose tensors steps
        read beside them, and keeps alive until `forget`. held: of `flops_per_launch`.

        Raises:
            KernelUnavailableError: graphs="on", and this plan cannot have any.
        """
        key = _Key(plan, transformer.patch_embedding.weight.dtype, own.signature, owner)
        reason = self._reason or self._unserved(plan, held) or self._refused.get(key)
        if reason is not None:
            self._require(reason)
            return Lease(self, None, reason)
        if not self._leased.acquire(blocking=False):
            return Lease(self, None, _BUSY)
        try:
            assert self._recorder is not None
            self._recorder.enter()
            entry = self._entry(transformer, key, own)
            entry.buffers.load(own)
        except (RuntimeError, MemoryBudgetError) as error:
            self._leased.release()
            return Lease(self, None, self._refuse(key, error))
        except BaseException:
            self._leased.release()
            raise
        return Lease(self, entry, None)

    def capture(
        self, entry: Entry[Any], kinds: tuple[str, ...], step: Callable[[], object]
    ) -> str | None:
        """Record a step of a leased entry; the reason why that cannot be, if graphs need not be.

        Raises:
            KernelUnavailableError: graphs="on", and it cannot be.
        """
        assert self._recorder is not None
        try:
            entry.graphs[kinds] = self._recorder.capture(step)
            if not self._shrink(entry):
                # graphs that are gone may have sized the pool: begin one with this step's alone
                entry.reset()
                entry.graphs[kinds] = self._recorder.capture(step)
                self._check_fits(sum(self.bytes().values()))
        except (RuntimeError, MemoryBudgetError) as error:
            entry.reset()
            return self._refuse(entry.key, error)
        except BaseException:
            entry.reset()
            raise
        return None

    def replay(self, graph: Graph) -> None:
        assert self._recorder is not None
        graph.replay()
        self._recorder.pace()

    def release(self, entry: Entry[Any]) -> None:
        """The turn that leased the entry has ended."""
        assert self._recorder is not None
        try:
            self._recorder.leave()
            if entry.key in self._refused and entry.key in self._entries:
                self._drop(entry.key)
            self._drop_gone()
        finally:
            self._leased.release()

    def serves(self, plan: TokenPlan) -> bool:
        """Whether steps of the plan are captured, as far as a plan can tell.

        They then hold a pool of about what an eager step makes, and the arena
        (`KeptLayout.num_bytes`) in the place of the turn's own K and V.
        """
        return (self._reason or self._unserved(plan)) is None

    def _unserved(self, plan: TokenPlan, held: int = 0) -> str | None:
        if plan.scope == "joint" and plan.merge != "off":
            return 'with scope="joint" the data decide how many tokens a block sees'
        if self.mode == "auto" and (flops := flops_per_launch(plan, held)) > FLOPS_PER_LAUNCH:
            return (
                f"products bound a step of this plan, not launches: {flops / 1e9:,.1f} GFLOP a "
                f"launch, graphs gain below {FLOPS_PER_LAUNCH / 1e9:g}"
            )
        return None

    def _require(self, reason: str, cause: BaseException | None = None) -> None:
        """Raise unless the mode leaves graphs to the engine."""
        if self.mode == "on":
            raise KernelUnavailableError(
                f'graphs="on" was asked for, but {reason}; use "auto" or "off"'
            ) from cause

    def _refuse(self, key: _Key, error: RuntimeError | MemoryBudgetError) -> str:
        """Why a key's steps stay eager from now on, until `clear`.

        Raises:
            KernelUnavailableError: graphs="on".
        """
        # the frames hold what the step had made until then
        traceback.clear_frames(error.__traceback__)
        said = " ".join(str(error).split())[:300] or type(error).__name__
        self._refused[key] = reason = f"a step of this plan could not be captured ({said})"
        self._require(reason, error)
        return reason

    def _entry(self, transformer: MV2VTransformer, key: _Key, own: AnyBuffers) -> Entry[AnyBuffers]:
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        layout = None
        if key.plan.conditioning == "static":
            cameras = own.conditioning.cameras if isinstance(own, StepBuffers) else None
            layout = KeptLayout(key.plan, key.dtype, None if cameras is None else cameras.dtype)
        device = own.latents.device
        self._make_room(own.num_bytes, 0 if layout is None else layout.num_bytes, device)
        entry = Entry(
            key,
            own.reserved(key.plan),
            None if layout is None or self._arena is None else layout.storage(self._arena),
            (table_on(key.plan, device),),
        )
        self._entries[key] = entry
        return entry

    def _make_room(self, buffers: int, arena: int, device: torch.device) -> None:
        """Room for new buffers and an arena of so many bytes at least; and that arena.

        Raises:
            MemoryBudgetError: there is none, with all else gone.
        """
        self._check_fits(buffers + arena)
        held = 0 if self._arena is None else self._arena.nbytes
        if held < arena:
            for key in [key for key, entry in self._entries.items() if entry.kept is not None]:
                self._drop(key)
        while self._entries and self._total(buffers, arena) > self.capacity_bytes:
            self._drop(next(iter(self._entries)))
        if arena and self._arena is None:
            # a session's memory grows from turn to turn: grow seldom, if the budget lets us
            size = max(arena, 2 * held)
            size = size if self._total(buffers, size) <= self.capacity_bytes else arena
            self._arena = torch.empty(size, dtype=torch.uint8, device=device)

    def _total(self, buffers: int, arena: int) -> int:
        """Bytes with new buffers, and with an arena if there is none yet."""
        held = self.bytes()
        return held["pool"] + held["buffers"] + buffers + (held["arena"] or arena)

    def _check_fits(self, needed: int) -> None:
        if needed > self.capacity_bytes:
            raise MemoryBudgetError(
                f"its graphs need {needed:,} bytes, graph_bytes allows {self.capacity_bytes:,}"
            )

    def _shrink(self, spared: Entry[Any]) -> bool:
        """Drop the others, least recently used first, until the budget holds; whether it does."""
        while sum(self.bytes().values()) > self.capacity_bytes:
            key = next((key for key, entry in self._entries.items() if entry is not spared), None)
            if key is None:
                return False
            self._drop(key)
        return True

    def _drop_gone(self) -> None:
        gone = set(self._gone)
        for key in [key for key in self._entries if key.owner in gone]:
            self._drop(key)
        for key in [key for key in self._refused if key.owner in gone]:
            del self._refused[key]
        self._gone -= gone

    def _drop_all(self) -> None:
        for key in list(self._entries):
            self._drop(key)

    def _drop(self, key: _Key) -> None:
        self._entries.pop(key).reset()
        if not any(entry.kept is not None for entry in self._entries.values()):
            self._arena = None


@dataclass(frozen=True, eq=False)
class StreamBuffers(Buffers):
    """A stream's: what its forward takes, and the velocity [B, C, F, H, W] that it gives."""

    timestep: Tensor
    text: Tensor
    velocity: Tensor
    end_timestep: Tensor | None


class StreamForward:
    """A causal model's forward, captured once its stream's window is full.

    Called as the transformer is; the graphs are leased from call to call. From then on a block's
    forwards differ in numbers alone: K and V are written to the same places and seen with the same
    positions. A stream that fills its window, or reads a new prompt, runs eagerly. A graph reads
    the stream's own cache, so it is of one stream and one prompt.

    Raises:
        RequestError: graphs="on", and the cache grows with every block.
    """

    def __init__(self, transformer: MV2VTransformer, graphs: Graphs, policy: str) -> None:
        if graphs.mode == "on" and policy == "all":
            raise RequestError(
                'graphs="on" cannot be met by a stream of policy "all", whose blocks see more and '
                'more; use another policy, or graphs="auto"'
            )
        self._transformer, self._graphs, self._grows = transformer, graphs, policy == "all"
        self._owner: object = None
        self._reason: str | None = _FILLS
        self._steps = {"eager_steps": 0, "captured_steps": 0, "replayed_steps": 0}

    def __call__(
        self,
        latents: Sequence[Tensor],
        timestep: Tensor,
        text: Tensor,
        *,
        plan: TokenPlan,
        stream: StreamCache,
        end_timestep: Tensor | None = None,
    ) -> Tensor:
        """The velocity of a stream's newest block [B, C, F, H, W].

        Raises:
            KernelUnavailableError: graphs="on", and it cannot be captured.
        """
        if self._owner is not stream.era:
            self.close()
            self._owner = stream.era
        if end_timestep is None and self._transformer.config.has_end_time:
            # plain flow, in the words of the block's other forwards
            end_timestep = timestep
        shape, dtype = self._transformer.config, self._transformer.patch_embedding.weight.dtype
        batch, _, *size = latents[0].shape
        velocity = latents[0].new_empty((batch, shape.out_channels, *size), dtype=dtype)
        own = StreamBuffers(latents[0], timestep, text, velocity, end_timestep)
        if self._grows or not stream.is_full or stream.text is None:
            self._reason = "every block sees more than the one before" if self._grows else _FILLS
            self._steps["eager_steps"] += 1
            return self._velocity(own, stream)
        held = stream.num_tokens - plan.length
        lease = self._graphs.lease(self._transformer, plan, own, owner=stream.era, held=held)
        try:
            buffers = lease.buffers or own

            def forward() -> tuple[str, ...]:
                buffers.velocity.copy_(self._velocity(buffers, stream))
                return _STREAM

            lease.run(_STREAM, forward)
            report = lease.report(1)
            self._reason = report["reason"]
            for name in self._steps:
                self._steps[name] += report[name]
            # the next forward writes over it
            return buffers.velocity.clone()
        finally:
            lease.release()

    def _velocity(self, buffers: StreamBuffers, stream: StreamCache) -> Tensor:
        velocity: Tensor = self._transformer(
            [buffers.latents],
            buffers.timestep,
            buffers.text,
            plan=stream.plan,
            stream=stream,
            end_timestep=buffers.end_timestep,
        )
        return velocity

    def report(self) -> dict[str, Any]:
        """How the forwards ran, what all graphs of the engine hold, and why the last one was not
        captured."""
        return {
            "mode": self._graphs.mode,
            **self._steps,
            "bytes": self._graphs.bytes(),
            "reason": self._reason,
        }

    def close(self) -> None:
        """Give back the graphs of this stream."""
        if self._owner is not None:
            self._graphs.forget(self._owner)
        self._owner = None
