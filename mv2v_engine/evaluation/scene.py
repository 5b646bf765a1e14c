"""One scene measured: every row's turns, with whatever rows have in common computed once.

The truth is rendered once, the source encoded once, and a turn that several rows would answer
with the same plan on the same videos is denoised once: the first turn of most rows, and a
later one where two ways of remembering chose the same.

T frames.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.engine.engine import Engine
from mv2v_engine.engine.request import TurnRequest
from mv2v_engine.engine.turn import ViewTurn
from mv2v_engine.engine.view_session import ViewSession
from mv2v_engine.evaluation.alignment import camera_error
from mv2v_engine.evaluation.consistency import Overlap, View, consistency, film, overlap
from mv2v_engine.evaluation.images import flicker, masked_psnr, structural_similarity
from mv2v_engine.evaluation.protocol import (
    Protocol,
    Row,
    pair_name,
    scene_trajectories,
    turn_seed,
)
from mv2v_engine.evaluation.responsiveness import (
    block_agreement,
    mean_agreement,
    recorded_responsiveness,
)
from mv2v_engine.progress import StepDone
from mv2v_engine.synthetic.worlds import make_world

_FPS = 8.0
_RECORDED_STEPS = 4  # noise levels at which responsiveness is compared

Measures = dict[str, Any]


@dataclass(frozen=True, eq=False)
class SceneResult:
    """`measures` is plain data, what a scene's file holds; the rest is for pictures.

    frames: by row, one tensor [T, height, width, 3] a turn; "truth" among them.
    """

    measures: Measures
    frames: dict[str, list[Tensor]]
    views: list[View]


class SceneEvaluator:
    """Measures scenes on one checkpoint. `engine` gives the weights; rows configure their own."""

    def __init__(self, engine: Engine, protocol: Protocol) -> None:
        self.engine, self.protocol = engine, protocol
        self.engines = {
            row.name: engine.reconfigured(row.configure(engine.config))
            for row in protocol.chosen_rows
        }

    def measure(self, seed: int) -> SceneResult:
        """Every row on the world of a seed."""
        engine, protocol = self.engine, self.protocol
        world, sampling = make_world(seed), engine.sampling
        source = film(world, named_trajectory("static", sampling.num_frames, sampling.size))
        cameras = scene_trajectories(seed, sampling, protocol.turns)
        scene = _Scene(seed, source, [film(world, camera, source) for camera in cameras], protocol)
        latents = engine.vae.encode(source.truth.frames)
        frames = {"truth": [view.truth.frames for view in scene.views]}
        rows: dict[str, Measures] = {}
        agreement: dict[str, dict[str, float]] = {}
        for row in protocol.chosen_rows:
            session = self.engines[row.name].view_session(
                source.truth.frames, fps=_FPS, source_latents=latents
            )
            for number in range(1, protocol.turns + 1):
                request = self._request(scene, row, number)
                if row.name == "memory" and number == protocol.turns:
                    agreement = _agreement(session, request)
                scene.answer(session, request)
            rows[row.name] = scene.measure(session.turns)
            frames[row.name] = [turn.frames for turn in session.turns]
            session.close()
        return SceneResult(
            {
                "seed": seed,
                "rows": rows,
                "references": self._references(scene, frames["truth"]),
                "responsiveness": agreement,
            },
            frames,
            scene.views,
        )

    def _request(self, scene: _Scene, row: Row, number: int) -> TurnRequest:
        return TurnRequest.of(
            scene.views[number - 1].camera,
            self.engine.sampling,
            memory=row.memory,
            seed=turn_seed(scene.seed, number),
            num_inference_steps=self.protocol.steps,
        )

    def _references(self, scene: _Scene, truth: list[Tensor]) -> Measures:
        """What no method can pass, and what one gets for nothing.

        truth: the floor of the consistency measure. vae: the true views through the VAE, the
        best that any denoiser could do. source: the source's own frames for every request.
        """
        vae = self.engine.vae
        still = [scene.source.truth.frames] * len(truth)
        return {
            "truth": scene.measure_frames(truth),
            "vae": scene.measure_frames([vae.decode(vae.encode(frames)) for frames in truth]),
            "source": scene.measure_frames(still),
        }


class _Scene:
    """The geometry of one scene and the turns already denoised in it."""

    def __init__(self, seed: int, source: View, views: list[View], protocol: Protocol) -> None:
        self.seed, self.source, self.views = seed, source, views
        self.overlaps: dict[tuple[int, int], Overlap] = {}
        for earlier, later in protocol.pairs:
            shared = overlap(views[later - 1], views[earlier - 1])
            if shared.is_measurable:
                self.overlaps[earlier, later] = shared
        self._answers: dict[tuple[object, ...], ViewTurn] = {}
        self._measured: dict[ViewTurn, Measures] = {}

    def answer(self, session: ViewSession, request: TurnRequest) -> None:
        """The session's next turn, adopted where another row has made the same one."""
        retrieval, plan = session.plan_turn(request)
        turns = session.turns
        source = turns[-1] if request.memory == "previous" and turns else None
        # camera, noise and steps follow from the number
        key = (len(turns) + 1, plan, source, *(turns[number - 1] for number in retrieval.turns))
        if key in self._answers:
            session.adopt(self._answers[key])
        else:
            self._answers[key] = session.answer(request)

    def measure(self, turns: Sequence[ViewTurn]) -> Measures:
        """A row: quality and cost of every turn, consistency of every pair."""
        for turn, view in zip(turns, self.views, strict=True):
            if turn not in self._measured:
                self._measured[turn] = {**_quality(turn.frames, view), **_cost(turn)}
        return {
            "turns": [self._measured[turn] for turn in turns],
            "pairs": self._consistency([turn.frames for turn in turns]),
        }

    def measure_frames(self, videos: Sequence[Tensor]) -> Measures:
        """A row of frames that no turn made."""
        return {
            "turns": [
                _quality(frames, view) for frames, view in zip(videos, self.views, strict=True)
            ],
            "pairs": self._consistency(videos),
        }

    def _consistency(self, videos: Sequence[Tensor]) -> Measures:
        rows = {}
        for (earlier, later), shared in self.overlaps.items():
            l1, features = consistency(videos[later - 1], videos[earlier - 1], shared)
            rows[pair_name((earlier, later))] = {"l1": l1, "features": features}
        return rows


def _quality(frames: Tensor, view: View) -> Measures:
    """A turn against the truth; None where the scene has nothing to measure."""
    truth, error = view.truth.frames, camera_error(frames, view)
    values: dict[str, float | None] = {
        "psnr": masked_psnr(frames, truth),
        "source_psnr": masked_psnr(frames, truth, view.seen),
        "unseen_psnr": masked_psnr(frames, truth, view.invented),
        "ssim": structural_similarity(frames, truth),
        "flicker": flicker(frames),
        "seen_fraction": float(view.seen.float().mean()),
        "camera_error": None if error is None else error.pixels,
        "rotation_error": None if error is None else error.degrees,
        "translation_error": None if error is None else error.metres,
    }
    finite = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
    return {"camera": view.camera.name, **finite}


def _cost(turn: ViewTurn) -> Measures:
    report = turn.report
    return {
        "tokens": report["plan"]["tokens"],
        "flops": report["flops"],
        "seconds": report["seconds"]["sampling"],
        "memory": len(report["plan"]["memory_tokenizers"]),
        "retrieved": [row["turn"] for row in report["memory"]["retrieved"]],
    }


def _agreement(session: ViewSession, request: TurnRequest) -> dict[str, dict[str, float]]:
    """How the blocks agree in a turn that is given up before it is decoded, to time none of it."""
    few = dataclasses.replace(request, num_inference_steps=_RECORDED_STEPS)
    with recorded_responsiveness(session.engine.transformer) as forwards:
        events = session.perform(few)
        for event in events:
            if isinstance(event, StepDone) and event.step == event.total:
                break
        events.close()
    return mean_agreement([block_agreement(scores) for scores in forwards])
