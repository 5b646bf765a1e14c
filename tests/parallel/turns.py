"""Run by two processes: turns over both, one cancelled, one in which the second process fails.

    turns.py CHECKPOINT CLIP OUT

The first process writes OUT/told.json; the second one ends as its failure leaves it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mv2v_engine import CancelToken, Engine, EngineConfig
from mv2v_engine.config import ParallelConfig
from mv2v_engine.engine.request import Request
from mv2v_engine.envs import launched_rank
from mv2v_engine.errors import MV2VError
from mv2v_engine.models.block import Block
from mv2v_engine.progress import Event, StepDone

STATIC: dict[str, Any] = {"conditioning": "static", "memory": "retrieved", "merge": "conv"}
CONFIG = EngineConfig(
    **STATIC, offload="blocks", parallel=ParallelConfig(context=2, timeout_seconds=240)
)


def said(work: Callable[[], object]) -> str:
    try:
        work()
    except MV2VError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def cancelled_after_a_step(render: Callable[..., object]) -> str:
    token = CancelToken()

    def watch(event: Event) -> None:
        if isinstance(event, StepDone):
            token.cancel()

    return said(lambda: render("pan_right", on_progress=watch, cancel=token))


def lead(checkpoint: str, clip: str, out: Path) -> dict[str, Any]:
    told: dict[str, Any] = {}
    with Engine.from_pretrained(checkpoint, device="cpu", config=CONFIG) as engine:
        session = engine.session(clip, store=out / "session")
        told["cancelled"] = cancelled_after_a_step(session.render)
        turns = [session.render(camera, seed=3) for camera in ("pan_right", "arc_left")]
        told["parallel"] = turns[-1].report["parallel"]
        told["work"] = turns[-1].report["work"]
        request = Request.view("pan_right", engine.sampling, memory="retrieved")
        told["warmed"] = engine.warmup([session.plan_turn(request)[1]])
        told["batch"] = said(lambda: engine.answer_all([]))
        files = (out / "session").rglob("*")
        told["files"] = sorted(path.name for path in files if path.suffix != ".lock")
        alone = Engine.from_pretrained(checkpoint, device="cpu", config=EngineConfig(**STATIC))
        one = alone.session(clip)
        for turn, camera in zip(turns, ("pan_right", "arc_left"), strict=True):
            expected = one.render(camera, seed=3)
            told.setdefault("differences", []).append(
                float((turn.latents - expected.latents).norm() / expected.latents.norm())
            )
            told.setdefault("merged", []).append(
                turn.report["merged_frames"] == expected.report["merged_frames"]
            )
        # its noise is the first process's alone
        both, one_alone = (
            of.reconfigured(replace(of.config, fast="fastwan"))
            .session(clip)
            .render("tilt_up", seed=5)
            for of in (engine, alone)
        )
        apart = (both.latents - one_alone.latents).norm() / one_alone.latents.norm()
        told["few_steps"] = [float(apart), both.report["scheduler"], both.report["forwards"]]
        whole, session._runner.source_latents = (
            session._runner.source_latents,
            torch.full((16, 3, 6, 8), nan),
        )
        told["not_finite"] = said(lambda: session.render("pan_left", seed=3))
        told["turns_then"] = len(session.turns)
        session._runner.source_latents = whole
        healed = alone.session(clip)
        for camera in ("pan_right", "arc_left"):
            healed.render(camera, seed=3)
        expected, turn = (each.render("pan_left", seed=3) for each in (healed, session))
        told["healed"] = float((turn.latents - expected.latents).norm() / turn.latents.norm())
        (out / "fail").touch()
        told["failed"] = said(lambda: session.render("pan_left"))
        told["after"] = said(lambda: session.render("pan_left"))
        told["turns"] = len(session.turns)
    return told


def main() -> None:
    checkpoint, clip, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    rank, _ = launched_rank() or (0, 1)
    if rank == 0:
        (out / "told.json").write_text(json.dumps(lead(checkpoint, clip, out)))
        return
    given = Block.forward

    def failing(self: Block, *arguments: Any) -> Tensor:
        if (out / "fail").exists():
            raise RuntimeError("device on fire")
        return given(self, *arguments)

    Block.forward = failing  # type: ignore[method-assign]
    Engine.follow(checkpoint, device="cpu", config=CONFIG)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
