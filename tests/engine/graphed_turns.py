"""Turns of one small model on one set of graphs, held against the same turns without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mv2v_engine import CancelToken
from mv2v_engine.config import GraphMode
from mv2v_engine.engine.capture import Recorder
from mv2v_engine.engine.denoise import Denoised, Denoiser, denoise
from mv2v_engine.engine.graphs import Graphs
from mv2v_engine.engine.step import Conditioning
from mv2v_engine.models.latent_rgb import LatentRGB
from mv2v_engine.sampling.flow_match import make_solver
from mv2v_engine.testing import as_cameras, tiny_config
from mv2v_engine.tokens.plan import TokenPlan, turn_plan
from tests.engine.graph_stand_in import StandIn
from tests.models.drawn import random_model

GRID = (3, 6, 10)


@dataclass(frozen=True)
class Asked:
    """A turn: everything in it but the plan depends on the seed."""

    seed: int = 0
    steps: int = 3
    scale: float = 1.0
    solver: Any = "euler"
    step_cache: float | None = None


PLAIN = Asked()


class GraphedTurns:
    """device, dtype: of the model. shape: what differs from `tiny_config`."""

    def __init__(
        self,
        recorder: Recorder,
        mode: GraphMode = "on",
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        **shape: Any,
    ) -> None:
        self.config = tiny_config(**shape)
        self.model = random_model(self.config).to(device, dtype)
        self.model.set_backend("auto", "auto" if device == "cuda" else "reference")
        self.device = device
        self.graphs = Graphs(mode, 1 << 30, recorder, None)

    def plan(self, conditioning: Any = "joint", memory: int = 2, **changes: Any) -> TokenPlan:
        fields = {"merge": "conv", "fraction": 0.5} | changes
        return turn_plan(self.config, GRID, (4,) * memory, conditioning=conditioning, **fields)

    def denoiser(
        self,
        plan: TokenPlan,
        asked: Asked,
        graphs: Graphs | None,
        previews: LatentRGB | None = None,
    ) -> Denoiser:
        generator = torch.Generator().manual_seed(asked.seed)
        latents = [torch.randn(1, 4, *s.grid, generator=generator) for s in plan.segments]
        cameras = torch.randn(1, len(plan.segments), GRID[0], 12, generator=generator)
        text, negative = torch.randn(2, 1, 6, 10, generator=generator).unbind()
        noise, *others = [latent.to(self.device) for latent in latents]
        given = None
        if plan.shape.has_camera:
            given = as_cameras(cameras, plan.shape).to(self.device)
        text, negative = text.to(self.device), negative.to(self.device)
        return Denoiser(
            transformer=self.model,
            plan=plan,
            conditioning=Conditioning(others, given, text, negative),
            noise=noise,
            solver=make_solver(asked.solver, asked.steps, 3.0, generator=generator),
            guidance_scale=asked.scale,
            graphs=graphs,
            previews=previews,
            step_cache=asked.step_cache,
        )

    def run(self, plan: TokenPlan, asked: Asked, graphs: Graphs | None) -> Denoised:
        turn = denoise(self.denoiser(plan, asked, graphs), CancelToken())
        while True:
            try:
                next(turn)
            except StopIteration as stop:
                result: Denoised = stop.value
                return result

    def check(self, plan: TokenPlan, asked: Asked = PLAIN) -> dict[str, Any]:
        """Run a turn with graphs and without, to the same bits; how its steps ran."""
        expected, got = self.run(plan, asked, None), self.run(plan, asked, self.graphs)
        # neither the result nor a later turn may lean on what captured steps share
        self.spoil()
        assert torch.equal(got.latents, expected.latents) and got.latents.isfinite().all()
        assert got.num_forwards == expected.num_forwards
        for ours, theirs in zip(got.records, expected.records, strict=True):
            assert ours.step == theirs.step
            for name in ("merged", "responsiveness", "frames"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name))
        return got.graphs

    def spoil(self) -> None:
        """Overwrite with NaN all that captured steps read and a turn has to provide."""
        for entry in self.graphs._entries.values():
            for tensor in entry.buffers.tensors():
                tensor.view(torch.uint8).fill_(0xFF)
        if self.graphs._arena is not None:
            self.graphs._arena.fill_(0xFF)


def steps(report: dict[str, Any]) -> tuple[int, int, int]:
    """Eager, captured and replayed ones."""
    return (report["eager_steps"], report["captured_steps"], report["replayed_steps"])


class StandInTurns(GraphedTurns):
    """On the stand-in."""

    def __init__(self, mode: GraphMode = "on", **shape: Any) -> None:
        self.recorder = StandIn()
        super().__init__(self.recorder, mode, **shape)

    def check(self, plan: TokenPlan, asked: Asked = PLAIN) -> dict[str, Any]:
        report = super().check(plan, asked)
        assert not self.recorder.turns
        return report
