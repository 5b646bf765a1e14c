"""A session: one source, many turns, each remembering the ones before (METHOD 1).

A turn is a generator of progress events; `render` drives it. The world frame of a session is
the source's first camera: every pose, asked or remembered, is relative to it (METHOD 5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from mv2v_engine.camera.poses import default_intrinsics, identity_poses, pose_vectors, relative_to
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.config import MemoryMode
from mv2v_engine.engine.request import TurnRequest
from mv2v_engine.engine.runner import Conditioning, Denoised, denoise
from mv2v_engine.engine.source import Source
from mv2v_engine.engine.store import SessionStore
from mv2v_engine.engine.turn import Turn, merge_report, turn_flops
from mv2v_engine.errors import CameraError, RequestError
from mv2v_engine.memory.entry import MemoryEntry
from mv2v_engine.memory.retrieval import Retrieval, rank_memory
from mv2v_engine.progress import CancelToken, Event, Spans
from mv2v_engine.sampling.flow_match import initial_noise, make_solver
from mv2v_engine.sampling.guidance import needs_guidance
from mv2v_engine.tokens.flops import conditioning_bytes
from mv2v_engine.tokens.plan import TokenPlan, turn_plan

if TYPE_CHECKING:
    from mv2v_engine.engine.engine import Engine

Result = TypeVar("Result")


class Session:
    """Made by `Engine.session`; not thread-safe, one turn at a time.

    turns: finished ones in order. source: what the model sees of the clip.
    """

    def __init__(
        self,
        engine: Engine,
        source: Source,
        *,
        id: str,
        cameras: CameraTrajectory | None,
        store: SessionStore | None,
        source_latents: Tensor | None = None,
    ) -> None:
        self.engine, self.source, self.id = engine, source, id
        self.turns: list[Turn] = []
        self._store = store
        self._source_latents = source_latents
        self._source_camera = self._source_trajectory(cameras)

    def render(
        self,
        camera: str | CameraTrajectory,
        *,
        prompt: str = "",
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        memory: MemoryMode | None = None,
        on_progress: Callable[[Event], None] | None = None,
        cancel: CancelToken | None = None,
    ) -> Turn:
        """Re-render the source from another camera, remembering this session's earlier turns.

        Args:
            camera: a preset ("pan_right"), a move ("arc:-40"), a camera file, or a trajectory
                whose poses are relative to the source's first frame.
            memory: "retrieved" by field-of-view overlap; "alone" the same and no source, once
                something is remembered; "previous" takes the last turn as the source; "none"
                forgets. None takes the engine's default (see `EngineConfig`).

        Raises:
            CameraError, RequestError: the request does not fit the checkpoint.
            CancelledError: the token was set; the session is as it was.
        """
        events = self.events(
            camera,
            prompt=prompt,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            memory=memory,
            cancel=cancel,
        )
        return _driven(events, on_progress)

    def answer(
        self, request: TurnRequest, on_progress: Callable[[Event], None] | None = None
    ) -> Turn:
        """As `render`, of a request that is already made."""
        return _driven(self.perform(request), on_progress)

    def events(
        self,
        camera: str | CameraTrajectory,
        *,
        prompt: str = "",
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        memory: MemoryMode | None = None,
        cancel: CancelToken | None = None,
    ) -> Generator[Event, None, Turn]:
        """The turn as an iterator of progress events that returns the `Turn`."""
        request = TurnRequest.of(
            camera,
            self.engine.sampling,
            prompt=prompt,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            memory=memory or self.engine.memory,
        )
        return self.perform(request, cancel)

    def perform(
        self, request: TurnRequest, cancel: CancelToken | None = None
    ) -> Generator[Event, None, Turn]:
        """As `events`, of a request that is already made."""
        self.engine.check_text(request.prompt, request.guidance_scale)
        return self._turn(request, cancel or CancelToken())

    def plan_turn(self, request: TurnRequest) -> tuple[Retrieval, TokenPlan]:
        """What a turn would remember and the plan it would run, without running it."""
        retrieval = self._retrieve(request)
        return retrieval, self._plan(request, retrieval)

    def _turn(self, request: TurnRequest, cancel: CancelToken) -> Generator[Event, None, Turn]:
        engine, spans = self.engine, Spans(self.engine.device)
        cancel.check()
        source = self._source_latents
        if source is None:
            source = yield from _staged(spans, "vae", lambda: engine.vae.encode(self.source.frames))
            self._source_latents = source
            cancel.check()
        text, negative_text = yield from _staged(spans, "text", lambda: self._text(request))
        cancel.check()
        retrieval, plan, videos, cameras = yield from _staged(
            spans, "memory", lambda: self._condition(request, source)
        )
        with spans.stage("sampling") as started:
            yield started
            denoised = yield from denoise(
                engine.transformer,
                plan,
                Conditioning(videos, cameras, text, negative_text),
                initial_noise((1, *source.shape), request.seed),
                make_solver(
                    engine.config.scheduler,
                    request.num_inference_steps,
                    engine.sampling.flow_shift,
                ),
                guidance_scale=request.guidance_scale,
                cancel=cancel,
            )
        yield spans.done("sampling")
        latents = denoised.latents.cpu()
        frames = yield from _staged(spans, "vae", lambda: engine.vae.decode(latents))
        report = self._report(request, retrieval, plan, denoised, spans)
        turn = self._turn_of(len(self.turns) + 1, request.camera, latents, report)
        turn.__dict__["frames"] = frames  # decoded already
        self._keep(turn)
        return turn

    def _text(self, request: TurnRequest) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the prompt and, with guidance, of the negative prompt."""
        text = self.engine.text_embedding(request.prompt)
        if not needs_guidance(request.guidance_scale):
            return text, None
        return text, self.engine.text_embedding(self.engine.sampling.negative_prompt)

    def _condition(
        self, request: TurnRequest, source: Tensor
    ) -> tuple[Retrieval, TokenPlan, list[Tensor], Tensor | None]:
        """What is remembered, its plan, and latents [1, C, F, H, W] and cameras [1, V, F, 12]."""
        retrieval, plan = self.plan_turn(request)
        source_camera = self._source_camera
        if request.memory == "previous" and self.turns:
            source, source_camera = self.turns[-1].latents, self.turns[-1].trajectory
        entries = [self.engine.cache.get(id) for id in retrieval.ids]
        cameras = self._cameras(
            plan, [request.camera, source_camera, *(entry.trajectory for entry in entries)]
        )
        device = self.engine.device
        has_source = any(segment.role == "source" for segment in plan.segments)
        videos = [*([source] if has_source else []), *(entry.latents for entry in entries)]
        return (
            retrieval,
            plan,
            [video.to(device)[None] for video in videos],
            None if cameras is None else cameras.to(device)[None],
        )

    def _retrieve(self, request: TurnRequest) -> Retrieval:
        """What this turn remembers, best first."""
        config = self.engine.config
        if request.memory not in ("retrieved", "alone"):
            reason = "memory is off"
            if request.memory == "previous":
                reason = "the last turn is the source" if self.turns else "this is the first turn"
            return Retrieval((), (), (), (), len(self.turns), reason)
        held = [
            entry
            for entry in self.engine.cache.entries(self.engine.vae.key)
            if entry.id.startswith(f"{self.id}/")
        ]
        shuffle = None
        if config.memory_ranking == "random":
            shuffle = torch.Generator().manual_seed(request.seed)
        return rank_memory(
            request.camera,
            held,
            top_k=config.max_memory if self.engine.transformer.config.tokenizers else 0,
            radius=config.fov_radius,
            blend=config.fov_blend,
            # trajectories lie on the CPU, whatever runs the model
            backend="reference" if config.backend == "reference" else "auto",
            tokenizers=config.memory_tokenizers,
            shuffle=shuffle,
        )

    def _plan(self, request: TurnRequest, retrieval: Retrieval) -> TokenPlan:
        config, sampling = self.engine.config, self.engine.sampling
        _, *grid = self.engine.vae.latent_shape(sampling.num_frames, sampling.size)
        frames, rows, columns = grid
        return turn_plan(
            self.engine.transformer.config,
            (frames, rows, columns),
            retrieval.tokenizers,
            source=not (request.memory == "alone" and retrieval.ids),
            merge=self.engine.merge,
            scope=config.merge_scope,
            fraction=config.merge_fraction,
            conditioning=config.conditioning,
            rope=config.rope,
        )

    def _cameras(self, plan: TokenPlan, trajectories: list[CameraTrajectory]) -> Tensor | None:
        """Camera tracks [V, F, 12] in the order that the plan's segments name them."""
        mode = plan.shape.camera_conditioning
        if mode == "none":
            return None
        stride = self.engine.vae.temporal_stride
        if mode == "target":
            # stock ReCamMaster: the target's camera for all, relative to its own first frame
            poses = trajectories[0].poses
            return pose_vectors(relative_to(poses, poses[0]), stride=stride)[None]
        return torch.stack([pose_vectors(t.poses, stride=stride) for t in trajectories])

    def _source_trajectory(self, cameras: CameraTrajectory | None) -> CameraTrajectory:
        """The source's own path relative to its first frame; a static one if it is unknown."""
        num_frames, size = self.engine.sampling.num_frames, self.engine.sampling.size
        if cameras is None:
            poses, intrinsics = identity_poses(num_frames), default_intrinsics(*size)
            return CameraTrajectory(poses, intrinsics, size, "source")
        if cameras.num_frames != num_frames:
            raise CameraError(
                f"the source's camera has {cameras.num_frames} poses, a window of this model has "
                f"{num_frames} frames: give one pose a frame"
            )
        cameras = cameras.resized(size)
        poses = relative_to(cameras.poses, cameras.poses[0])
        return dataclasses.replace(cameras, poses=poses)

    def _turn_of(
        self, number: int, trajectory: CameraTrajectory, latents: Tensor, report: dict[str, Any]
    ) -> Turn:
        decode = self.engine.vae.decode
        return Turn(number, trajectory, latents, self.source.fps, report, decode)

    def adopt(self, turn: Turn) -> None:
        """Take a finished turn of another session of the same source as this one's next turn.

        Raises:
            RequestError: it was another session's turn of another number.
        """
        if turn.number != len(self.turns) + 1:
            raise RequestError(
                f"this session's next turn is number {len(self.turns) + 1}, got a turn that was "
                f"number {turn.number}; adopt turns in their order"
            )
        self._keep(turn)

    def _keep(self, turn: Turn) -> None:
        """Store, remember, list: a turn that cannot be stored is not remembered either."""
        if self._store is not None:
            self._store.append(turn.number, turn.latents, turn.trajectory, turn.report)
        self._remember(turn)
        self.turns.append(turn)

    def _remember(self, turn: Turn) -> None:
        entry = MemoryEntry(
            id=f"{self.id}/{turn.number}",
            turn=turn.number,
            latents=turn.latents,
            trajectory=turn.trajectory,
            key=self.engine.vae.key,
        )
        self.engine.cache.add(entry)

    def restore(self) -> None:
        """Take up the turns of the session's folder."""
        if self._store is None:
            raise RequestError("this session has no folder to restore from; give it a store")
        for stored in self._store.turns():
            turn = self._turn_of(stored.number, stored.trajectory, stored.latents, stored.report)
            self._remember(turn)
            self.turns.append(turn)

    def close(self) -> None:
        """Forget this session's memory; its folder stays."""
        for turn in self.turns:
            if f"{self.id}/{turn.number}" in self.engine.cache:
                self.engine.cache.evict(f"{self.id}/{turn.number}")

    def _report(
        self,
        request: TurnRequest,
        retrieval: Retrieval,
        plan: TokenPlan,
        denoised: Denoised,
        spans: Spans,
    ) -> dict[str, Any]:
        """Everything about a turn as plain data (ARCHITECTURE, contracts)."""
        steps = [record.step for record in denoised.records]
        return {
            "turn": len(self.turns) + 1,
            "camera": request.camera.name,
            "seed": request.seed,
            "prompt": request.prompt,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "memory": {
                "mode": request.memory,
                "ranking": self.engine.config.memory_ranking,
                **retrieval.to_dict(),
            },
            "plan": plan.describe(),
            "merged_frames": merge_report(plan, denoised.records, retrieval.turns),
            "forwards": denoised.num_forwards,
            **turn_flops(plan, steps, denoised.num_forwards),
            "conditioning_bytes": conditioning_bytes(plan, self.engine.dtype.itemsize, steps),
            "seconds": {name: round(value, 4) for name, value in spans.seconds.items()},
            "peak_bytes": dict(spans.peak_bytes),
            "cache_bytes": self.engine.cache.bytes_used,
            **self.engine.describe(),
        }


def _driven(
    events: Generator[Event, None, Turn], on_progress: Callable[[Event], None] | None
) -> Turn:
    """Run a turn to its end."""
    while True:
        try:
            event = next(events)
        except StopIteration as stop:
            turn: Turn = stop.value
            return turn
        if on_progress is not None:
            on_progress(event)


def _staged(spans: Spans, name: str, work: Callable[[], Result]) -> Generator[Event, None, Result]:
    """Do a stage's work between its two events."""
    with spans.stage(name) as started:
        yield started
        result = work()
    yield spans.done(name)
    return result
