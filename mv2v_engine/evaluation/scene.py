"""One scene measured: every row's turns, with whatever rows have in common computed once.

The truth is rendered once, the source encoded once, and a turn that several rows would answer
with the same plan on the same videos is denoised once: the first turn of most rows, and a
later one where two ways of remembering chose the same. Turns go by their names in the protocol;
the last ones are answered by sessions that have taken over all turns before.

T frames.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.engine.engine import Engine
from mv2v_engine.engine.request import Request
from mv2v_engine.engine.session import Session
from mv2v_engine.engine.turn import Turn
from mv2v_engine.evaluation.alignment import camera_error
from mv2v_engine.evaluation.consistency import View, consistency, film, overlap
from mv2v_engine.evaluation.images import (
    flicker,
    gradient_energy,
    masked_psnr,
    structural_similarity,
)
from mv2v_engine.evaluation.perceptual import PerceptualDistance, load_perceptual_distance
from mv2v_engine.evaluation.protocol import (
    RETURN,
    ROWS,
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
from mv2v_engine.vae import VideoVAE

_FPS = 8.0
_RECORDED_STEPS = 4  # noise levels at which responsiveness is compared

Measures = dict[str, Any]
# frames uint8 [T, height, width, 3] by the turn's name
Videos = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class SceneResult:
    """`measures` is plain data, what a scene's file holds; the rest is for pictures.

    frames: by row, the references among them. views: by the turn's name.
    """

    measures: Measures
    frames: dict[str, Videos]
    views: dict[str, View]


class SceneEvaluator:
    """Measures scenes on one checkpoint. `engine` gives the weights; rows configure their own."""

    def __init__(self, engine: Engine, protocol: Protocol) -> None:
        self.engine, self.protocol = engine, protocol
        names = {name for row in protocol.chosen_rows for name in (row.name, row.after)}
        self.rows = {row.name: row for row in ROWS if row.name in names}
        self.engines = {
            name: engine.reconfigured(row.configure(engine.config))
            for name, row in self.rows.items()
        }
        self.perception = load_perceptual_distance()

    def measure(self, seed: int) -> SceneResult:
        """Every row on the world of a seed."""
        protocol, sampling = self.protocol, self.engine.sampling
        world = make_world(seed, protocol.grade)
        source = film(world, named_trajectory("static", sampling.num_frames, sampling.size))
        cameras = scene_trajectories(seed, sampling, protocol.turns)
        views = {name: film(world, camera, source) for name, camera in cameras.items()}
        scene = _Scene(seed, source, views, protocol, self.engine.vae, self.perception)
        frames = dict(scene.references)
        rows: dict[str, Measures] = {}
        for row in protocol.chosen_rows:
            turns = self._turns(scene, row)
            own = protocol.last if row.after else tuple(turns)
            rows[row.name] = scene.measure(turns, own)
            frames[row.name] = {name: turns[name].frames for name in own}
        return SceneResult(
            {
                "seed": seed,
                "rows": rows,
                "references": scene.measure_references(),
                "responsiveness": scene.agreement,
            },
            frames,
            views,
        )

    def _turns(self, scene: _Scene, row: Row) -> dict[str, Turn]:
        """All turns of a row: those before the last, then each of the last ones after them."""
        protocol, first = self.protocol, self.rows[row.after or row.name]
        with closing(self._session(scene, first)) as session:
            for name in protocol.before:
                scene.answer(session, self._request(scene, first, name), name)
            before = list(session.turns)
        turns = dict(zip(protocol.before, before, strict=True))
        for name in protocol.last:
            request = self._request(scene, row, name)
            with closing(self._session(scene, row)) as session:
                for turn in before:
                    session.adopt(turn)
                if row.ranking == "oracle":
                    _remember_alone(session, scene.best_memory(name, row.max_memory))
                if row.ranking == "responsiveness":
                    found = self._most_responsive(scene, before, first, request, row.max_memory)
                    _remember_alone(session, found)
                if row.name == "memory" and name == protocol.last[0]:
                    scene.agreement = _agreement(session, request)
                scene.answer(session, request, name)
                turns[name] = session.turns[-1]
        return turns

    def _most_responsive(
        self, scene: _Scene, before: Sequence[Turn], row: Row, request: Request, count: int
    ) -> set[str]:
        """The turns whose frames the blocks respond to most, where a row remembers all of them."""
        with closing(self._session(scene, row)) as session:
            for turn in before:
                session.adopt(turn)
            retrieval, plan = session.plan_turn(request)
            scores = torch.stack(_responses(session, request)).sum((0, 1))
        frames = [span.segment for span in plan.frame_table if span.segment]
        totals: dict[str, float] = {}
        memory = [i for i, segment in enumerate(plan.segments) if segment.role == "memory"]
        for number, turn_number in zip(memory, retrieval.turns, strict=True):
            own = [score for score, owner in zip(scores, frames, strict=True) if owner == number]
            totals[str(turn_number)] = float(sum(own))
        return set(sorted(totals, key=lambda name: -totals[name])[:count])

    def _session(self, scene: _Scene, row: Row) -> Session:
        return self.engines[row.name].session(
            scene.source.truth.frames, fps=_FPS, source_latents=scene.source_latents
        )

    def _request(self, scene: _Scene, row: Row, name: str) -> Request:
        return Request.view(
            scene.views[name].camera,
            self.engine.sampling,
            memory=row.memory,
            seed=turn_seed(scene.seed, list(scene.views).index(name) + 1),
            num_inference_steps=self.protocol.steps,
        )


class _Scene:
    """The geometry of one scene, what is true of it, and the turns already denoised in it.

    agreement: of the blocks' responsiveness, once it has been measured.
    """

    def __init__(
        self,
        seed: int,
        source: View,
        views: dict[str, View],
        protocol: Protocol,
        vae: VideoVAE,
        perception: PerceptualDistance | None,
    ) -> None:
        self.seed, self.source, self.views, self.protocol = seed, source, views, protocol
        self.agreement: dict[str, dict[str, float]] = {}
        self.source_latents = vae.encode(source.truth.frames)
        truth = {name: view.truth.frames for name, view in views.items()}
        # the floor of the consistency measure, the best that any denoiser could do, and what one
        # gets for nothing: the source's own frames for every request
        self.references: dict[str, Videos] = {
            "truth": truth,
            "vae": {name: vae.decode(vae.encode(frames)) for name, frames in truth.items()},
            "source": dict.fromkeys(views, source.truth.frames),
        }
        self.overlaps = {
            (earlier, later): overlap(views[later], views[earlier], of_unshown=later == RETURN)
            for earlier, later in protocol.pairs
        }
        self._perception = perception
        self._looks = {
            name: perception.features(frames)
            for name, frames in truth.items()
            if perception is not None
        }
        self._answers: dict[tuple[object, ...], Turn] = {}
        self._measured: dict[Turn, Measures] = {}

    def answer(self, session: Session, request: Request, name: str) -> None:
        """The session's next turn, adopted where another row has made the same one."""
        retrieval, plan = session.plan_turn(request)
        turns = session.turns
        source = turns[-1] if request.memory == "previous" and turns else None
        # camera, noise and steps follow from the name
        key = (name, plan, source, *(turns[number - 1] for number in retrieval.turns))
        if key in self._answers:
            session.adopt(self._answers[key])
        else:
            self._answers[key] = session.ask(request)

    def best_memory(self, name: str, count: int) -> set[str]:
        """Which earlier turns show most of what a turn must invent: one after the other, each by
        what neither the source nor those before it show, as long as that is anything."""
        left, chosen = self.views[name].invented, set[str]()
        masks = {
            earlier: shared.projection.seen
            for (earlier, later), shared in self.overlaps.items()
            if later == name
        }
        while len(chosen) < count:
            best = max(masks, key=lambda earlier: int((masks[earlier] & left).sum()))
            if not bool((masks[best] & left).any()):
                break
            chosen.add(best)
            left = left & ~masks[best]
        return chosen

    def measure(self, turns: dict[str, Turn], own: Sequence[str]) -> Measures:
        """A row: quality and cost of its own turns, consistency with all turns before them."""
        for name in own:
            if turns[name] not in self._measured:
                report = turns[name].report
                self._measured[turns[name]] = {
                    **self._quality(turns[name].frames, name),
                    "tokens": report["plan"]["tokens"],
                    "flops": report["flops"],
                    "seconds": report["seconds"]["sampling"],
                    "memory": len(report["plan"]["memory_tokenizers"]),
                    "retrieved": [row["turn"] for row in report["memory"]["retrieved"]],
                }
        return {
            "turns": [self._measured[turns[name]] for name in own],
            "pairs": self._consistency({n: turn.frames for n, turn in turns.items()}, own),
        }

    def measure_references(self) -> Measures:
        return {
            name: {
                "turns": [self._quality(frames, turn) for turn, frames in made.items()],
                "pairs": self._consistency(made, list(made)),
            }
            for name, made in self.references.items()
        }

    def _consistency(self, videos: Videos, own: Sequence[str]) -> Measures:
        rows = {}
        for (earlier, later), shared in self.overlaps.items():
            if later in own and shared.is_measurable:
                l1, features = consistency(videos[later], videos[earlier], shared)
                pixels = int(shared.mask.sum())
                rows[pair_name(earlier, later)] = {"l1": l1, "features": features, "pixels": pixels}
        return rows

    def _quality(self, frames: Tensor, name: str) -> Measures:
        """A turn against the truth; None where the scene has nothing to measure."""
        view = self.views[name]
        truth = view.truth.frames
        error = camera_error(frames, view)
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
            "energy": gradient_energy(frames),
            "source_energy": gradient_energy(frames, view.seen),
            "unseen_energy": gradient_energy(frames, view.invented),
        }
        if self._perception is not None:
            looks = self._perception.features(frames)
            values["st_lpips"] = self._perception.distance(looks, self._looks[name])
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        return {"turn": name, "camera": view.camera.name, **finite}


def _remember_alone(session: Session, names: set[str]) -> None:
    """Make a session forget all turns but these; it is the only one of its engine."""
    cache = session.parts.cache
    for entry in cache.entries():
        if str(entry.turn) not in names:
            cache.evict(entry.id)


def _agreement(session: Session, request: Request) -> dict[str, dict[str, float]]:
    """How the blocks agree."""
    return mean_agreement([block_agreement(scores) for scores in _responses(session, request)])


def _responses(session: Session, request: Request) -> list[Tensor]:
    """Responsiveness [blocks, frames] of the conditioning at a few noise levels, in a turn that is
    given up before it is decoded, to time none of it."""
    few = dataclasses.replace(request, num_inference_steps=_RECORDED_STEPS)
    with recorded_responsiveness(session.parts.transformer) as forwards:
        events = session.events(few)
        for event in events:
            if isinstance(event, StepDone) and event.step == event.total:
                break
        events.close()
    return forwards
