"""The processes of one torchrun: who they are, and what passes between them outside a forward.

They form a mesh of two dimensions. "guidance" has the groups that run one guidance branch each,
"context" the ranks that share a forward's tokens. Rank 0 leads: it alone has sessions, and says
what comes next over a control group on the CPU, where the others may wait for as long as it
likes. Within a step no rank waits for another beyond the configured time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from mv2v_engine.config import ParallelConfig
from mv2v_engine.envs import launched_rank
from mv2v_engine.errors import ParallelError, RequestError
from mv2v_engine.parallel.context import ContextGroup

Item = TypeVar("Item")

_FAILURE = "failure"
# gloo knows no endless wait; between turns the leader may be silent for as long as a service runs
_IDLE = timedelta(days=3650)
_AGAIN = "this turn is lost, finished ones are kept; start all processes again"


def check_launch(config: ParallelConfig) -> int:
    """This process's rank, if what torchrun started is what the configuration asks for.

    Raises:
        RequestError: it is not.
    """
    asked, launched = config.num_ranks, launched_rank()
    found = 1 if launched is None else launched[1]
    if launched is None or found != asked:
        raise RequestError(
            f"guidance={config.guidance} and context={config.context} need {asked} processes, got "
            f"{found}; start the same command with python -m torch.distributed.run "
            f"--nproc-per-node {asked} -m ..., or ask for as many as there are"
        )
    return launched[0]


class Ranks:
    """Made by every process at the same time.

    context: None where every rank has all tokens. received_bytes: what guidance has sent to this
    rank so far.

    Raises:
        RequestError: other processes were started than the configuration asks for, or this one
            uses torch.distributed already.
        ParallelError: they do not meet in time.
    """

    def __init__(self, config: ParallelConfig, device: torch.device) -> None:
        self.rank, self.config, self.device = check_launch(config), config, device
        if dist.is_initialized():
            raise RequestError(
                "this process uses torch.distributed already, and an engine over several processes "
                "makes groups of its own; make the engine first, or run it in one process"
            )
        self.received_bytes = 0
        self.failure: str | None = None
        self.is_closed = False
        # a command and what belongs to it are one
        self.lock = threading.RLock()
        wait = timedelta(seconds=config.timeout_seconds)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            self._meet(wait)
        except RuntimeError as error:
            raise ParallelError(
                f"rank {self.rank} did not meet the other {config.num_ranks - 1} within "
                f"{config.timeout_seconds:g} s ({_first_line(error)}); see what they said"
            ) from error

    def _meet(self, wait: timedelta) -> None:
        config = self.config
        self._store, rank, size = next(iter(rendezvous("env://", timeout=wait)))
        backend = "cpu:gloo,cuda:nccl" if self.backend == "nccl" else "gloo"
        dist.init_process_group(
            backend,
            store=PrefixStore("groups", self._store),
            rank=rank,
            world_size=size,
            timeout=wait,
        )
        grid = torch.arange(size, device="cpu").view(config.guidance, config.context)
        # made by hand, since a mesh's own groups would not take the time limit
        by_guidance, _ = dist.new_subgroups_by_enumeration(grid.T.tolist(), timeout=wait)
        by_context, _ = dist.new_subgroups_by_enumeration(grid.tolist(), timeout=wait)
        self.mesh = DeviceMesh.from_group(
            [by_guidance, by_context],
            self.device.type,
            mesh=grid,
            mesh_dim_names=("guidance", "context"),
        )
        self._control = dist.new_group(backend="gloo", timeout=_IDLE)
        shared = config.context > 1
        self.context = ContextGroup(self.mesh.get_group("context")) if shared else None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def groups_of(self, num_branches: int) -> int:
        """How many groups of ranks a turn's guidance branches keep at work."""
        return min(self.config.guidance, num_branches)

    def own(self, branches: Sequence[Item]) -> list[Item]:
        """Those of a turn's guidance branches that this rank runs; they may be none."""
        if self.groups_of(len(branches)) == 1:
            return list(branches) if self.mesh.get_local_rank("guidance") == 0 else []
        return [branches[self.mesh.get_local_rank("guidance")]]

    def exchange(self, own: Sequence[Tensor], num_branches: int) -> list[Tensor]:
        """The velocities of all branches in order, from this rank's; every rank calls it.

        Ranks that have run none are given none.
        """
        if self.groups_of(num_branches) == 1:
            return list(own)
        (velocity,) = own
        everyone = [torch.empty_like(velocity) for _ in range(num_branches)]
        dist.all_gather(everyone, velocity.contiguous(), group=self.mesh.get_group("guidance"))
        self.received_bytes += (num_branches - 1) * velocity.nbytes
        return everyone

    def say(self, *words: Any) -> None:
        """Rank 0: tell the others what comes next."""
        dist.broadcast_object_list([words], 0, group=self._control)

    def hear(self) -> tuple[Any, ...]:
        """What rank 0 says next; waits for it.

        Raises:
            ParallelError: it is gone.
        """
        heard: list[Any] = [None]
        with self.together():
            dist.broadcast_object_list(heard, 0, group=self._control)
        words: tuple[Any, ...] = heard[0]
        return words

    def share(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor into every rank's of the same shape."""
        dist.broadcast(tensor, 0)
        return tensor

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all ranks do: one that fails says so, and the others do not go on.

        Raises:
            ParallelError: another rank failed, or was not heard of in time.
        """
        with self.lock:
            if self.failure is not None:
                raise ParallelError(f"the processes have parted: {self.failure}")
            if self.is_closed:
                raise ParallelError("the engine was closed, and the other processes have gone")
            try:
                yield
            except BaseException as error:
                self._part(error)
                raise

    def _part(self, error: BaseException) -> None:
        """Say why this rank leaves, unless another one said so first."""
        lost = is_of_the_group(error)
        said = None if not lost else self._said()
        if said is None:
            why = "lost another" if lost else "failed"
            said = f"rank {self.rank} {why} ({type(error).__name__}: {_first_line(error)})"
            self._tell(said)
        self.failure = said
        # pending calls of the others end at once
        self._leave()
        if lost:
            raise ParallelError(f"{said}; {_AGAIN}") from error

    def _said(self) -> str | None:
        try:
            return self._store.get(_FAILURE).decode() if self._store.check([_FAILURE]) else None
        except RuntimeError:
            return None  # the process that kept the store is gone

    def _tell(self, said: str) -> None:
        # whoever kept the store may be gone
        with suppress(RuntimeError):
            self._store.set(_FAILURE, said)

    def close(self) -> None:
        """Part from the others; rank 0 lets them go first. Harmless where it has been done."""
        with self.lock:
            if self.is_closed or self.failure is not None:
                self.is_closed = True
                return
            self.is_closed = True
            if self.leads:
                # one that is gone already needs no word, and what is finished is finished
                with suppress(RuntimeError):
                    self.say("end")
            self._leave()

    def _leave(self) -> None:
        self.context = self._control = None
        del self.mesh
        dist.destroy_process_group()


def is_of_the_group(error: BaseException) -> bool:
    """Whether an error is of talking to other ranks; gloo's are plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:300] if str(error) else "no reason given"
