"""A turn's steps over several processes: rank 0 has the turn, the others run what it hands out.

Rank 0 alone encodes, retrieves, guides, moves the latents, decodes and stores. A step begins with
its noisy latents on every rank and ends with all branches' velocities on rank 0. Between two steps
the others wait for its next word, so that a turn that is cancelled, or fails outside a step, leaves
them ready for the next one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from mv2v_engine.config import ParallelConfig
from mv2v_engine.defaults import inference
from mv2v_engine.engine.step import Branch, Conditioning, StepBuffers
from mv2v_engine.errors import RequestError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.kept import ConditioningCache
from mv2v_engine.parallel.context import Shard, head_lengths
from mv2v_engine.parallel.ranks import Ranks, check_launch
from mv2v_engine.parallel.traffic import step_traffic
from mv2v_engine.tokens.flops import Work
from mv2v_engine.tokens.plan import TokenPlan

# shapes and dtypes of the tensors that follow a word
_Spec = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class _Begin:
    """A turn's shapes; its tensors follow, in this order. None: it has no such tensor."""

    plan: TokenPlan
    latents: tuple[_Spec, ...]
    cameras: _Spec | None
    image: _Spec | None
    texts: tuple[_Spec, ...]
    noisy: _Spec
    has_ends: bool


class Team:
    """Rank 0's side of its ranks; what is made from one engine's weights shares it."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.numbers = ranks, count(1)
        # a program that ends without `close` must not leave the others waiting
        self.close = weakref.finalize(self, ranks.close)

    def begin(self, plan: TokenPlan, buffers: StepBuffers) -> SharedTurn:
        """A turn whose steps the ranks share."""
        return SharedTurn(self, plan, buffers)


def open_team(config: ParallelConfig, device: torch.device) -> Team | None:
    """The other processes, met; None where there are none.

    Raises:
        RequestError: this is not rank 0, or others were started than asked for.
        ParallelError: they do not come.
    """
    if config.num_ranks == 1:
        return None
    rank = check_launch(config)
    if rank:
        raise RequestError(
            f"this is rank {rank} of {config.num_ranks}: call Engine.follow with the same "
            "arguments; rank 0 alone has an engine"
        )
    return Team(Ranks(config, device))


class SharedTurn:
    """A turn's steps on rank 0, whose forwards run on all ranks.

    received_bytes: what the other ranks have sent to rank 0 for it.
    """

    def __init__(self, team: Team, plan: TokenPlan, buffers: StepBuffers) -> None:
        self.ranks, self.plan, self._team, self._buffers = team.ranks, plan, team, buffers
        self._num_branches = len(buffers.conditioning.texts)
        self.received_bytes, self._number = 0, 0

    def velocities(
        self, branches: Sequence[Branch], noisy: Tensor, timestep: Tensor, end: Tensor | None
    ) -> list[Tensor]:
        """The velocities of one step, in the branches' order."""
        ranks = self.ranks
        with ranks.together():
            if not self._number:
                self._begin(_spec(noisy), end is not None)
            before = _received(ranks)
            noisy, timestep = noisy.contiguous(), timestep.contiguous()
            ranks.say("step", self._number)
            ranks.share(noisy)
            ranks.share(timestep)
            if end is not None:
                ranks.share(end.contiguous())
            own = _forwards(ranks.own(branches), noisy, timestep, end)
            velocities = ranks.exchange(own, self._num_branches)
            self.received_bytes += _received(ranks) - before
        return velocities

    def _begin(self, noisy: _Spec, has_ends: bool) -> None:
        """Give every rank what all steps of the turn read."""
        ranks, given = self.ranks, self._buffers.conditioning
        texts = given.texts
        more = [each for each in (given.cameras, given.image) if each is not None]
        tensors = [*given.latents, *more, *texts]
        begin = _Begin(
            self.plan,
            tuple(map(_spec, given.latents)),
            None if given.cameras is None else _spec(given.cameras),
            None if given.image is None else _spec(given.image),
            tuple(map(_spec, texts)),
            noisy,
            has_ends,
        )
        number = next(self._team.numbers)
        ranks.say("begin", number, begin)
        for tensor in tensors:
            ranks.share(tensor.contiguous())
        self._number = number

    def work(self, forwards: int) -> dict[Work, int]:
        """The work of so many forwards, on all ranks together."""
        if self.plan.conditioning == "joint" or not forwards:
            return {"whole": forwards}
        # every group of ranks keeps the conditioning for its own branches
        first = self.ranks.groups_of(self._num_branches)
        return {"whole": first, "kept": forwards - first}

    def release(self) -> None:
        """The turn has ended, however it did."""
        ranks, number = self.ranks, self._number
        if number and ranks.failure is None and not ranks.is_closed:
            with ranks.together():
                ranks.say("release", number)
        self._number = 0

    def report(self, element_bytes: int) -> dict[str, Any]:
        """How the turn ran over the ranks, as plain data.

        element_bytes: the size of a token's element.
        """
        ranks, plan = self.ranks, self.plan
        config, groups = ranks.config, ranks.groups_of(self._num_branches)
        heads, tokens = [plan.shape.num_attention_heads], [plan.length]
        if ranks.context is not None:
            heads = head_lengths(plan.shape.num_attention_heads, config.context)
            parts = (plan.target.length, plan.length - plan.target.length)
            tokens = Shard(ranks.context, parts).totals
        idle = (config.guidance - groups) * config.context
        traffic = {}
        if plan.scope == "group" or plan.merge == "off":
            traffic = step_traffic(
                plan,
                guidance=config.guidance,
                context=config.context,
                rank=0,
                element_bytes=element_bytes,
                branches=self._num_branches,
                is_kept=plan.conditioning == "static",
                has_ends=self._buffers.end_timestep is not None,
            )
        return {
            "processes": config.num_ranks,
            "guidance": groups,
            "context": config.context,
            "backend": ranks.backend,
            "tokens_by_rank": tokens,
            "heads_by_rank": heads,
            "idle_processes": idle,
            "reason": "the turn has no guidance: one branch" if idle else None,
            "received_bytes": self.received_bytes,
            "bytes_of_a_later_step": traffic,
        }


class _Share:
    """Another rank's part of a turn: the branches that it runs, if any."""

    def __init__(self, ranks: Ranks, transformer: MV2VTransformer, begin: _Begin) -> None:
        def receive(spec: _Spec) -> Tensor:
            return ranks.share(torch.empty(spec[0], dtype=spec[1], device=ranks.device))

        self.ranks, self.noisy, self.has_ends = ranks, begin.noisy, begin.has_ends
        latents = [receive(spec) for spec in begin.latents]
        cameras = None if begin.cameras is None else receive(begin.cameras)
        image = None if begin.image is None else receive(begin.image)
        texts = [receive(spec) for spec in begin.texts]
        self.num_branches = len(texts)
        plan = begin.plan
        cache = ConditioningCache(plan) if plan.conditioning == "static" else None
        given = Conditioning(latents, cameras, texts[0], None, image=image)
        self.branches = [
            Branch(transformer, plan, given, text, cache, ranks.context)
            for text in ranks.own(texts)
        ]

    def step(self) -> None:
        ranks, device = self.ranks, self.ranks.device
        noisy = ranks.share(torch.empty(self.noisy[0], dtype=self.noisy[1], device=device))
        timestep = ranks.share(torch.empty(1, dtype=torch.float32, device=device))
        end = None
        if self.has_ends:
            end = ranks.share(torch.empty(1, dtype=torch.float32, device=device))
        own = _forwards(self.branches, noisy, timestep, end)
        ranks.exchange(own, self.num_branches)

    def release(self) -> None:
        for branch in self.branches:
            branch.release()


@inference
def serve(ranks: Ranks, transformer: MV2VTransformer) -> None:
    """Do what rank 0 says, until it lets go.

    Raises:
        ParallelError: another rank failed, or rank 0 is gone.
    """
    shares: dict[int, _Share] = {}
    while True:
        word, *more = ranks.hear()
        if word == "end":
            ranks.close()
            return
        with ranks.together():
            if word == "begin":
                shares[more[0]] = _Share(ranks, transformer, more[1])
            elif word == "step":
                shares[more[0]].step()
            else:
                shares.pop(more[0]).release()


def _forwards(
    branches: Sequence[Branch], noisy: Tensor, timestep: Tensor, end: Tensor | None
) -> list[Tensor]:
    samples = [[branch.sample(noisy, timestep, end)] for branch in branches]
    return [b.transformer.forward_samples(s)[0] for b, s in zip(branches, samples, strict=True)]


def _spec(tensor: Tensor) -> _Spec:
    return tuple(tensor.shape), tensor.dtype


def _received(ranks: Ranks) -> int:
    return ranks.received_bytes + (0 if ranks.context is None else ranks.context.received_bytes)
