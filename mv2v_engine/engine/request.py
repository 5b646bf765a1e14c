"""What a turn is asked for, checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch

from mv2v_engine.camera.files import resolve_camera
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.config import (
    MAX_GUIDANCE_SCALE,
    MAX_STEPS,
    MemoryMode,
    SamplingConfig,
    TransformerConfig,
    check_number,
)
from mv2v_engine.errors import CameraError, RequestError
from mv2v_engine.sampling.guidance import needs_guidance

# what follows a checkpoint's name where it is asked for what it cannot do
NO_VIEWS = (
    "edits by instruction: its source lies on the target's channels, frame by frame, and no camera "
    "moves it; edit with it, or give a checkpoint for novel views, such as tiny-nvs"
)
NO_EDITS = (
    "renders novel views and takes no instruction; render with it, or give a checkpoint that "
    "edits: one whose source lies on the target's channels, as Lucy-Edit's does"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class TurnRequest:
    """One novel-view turn. camera: poses relative to the source's first frame, one per frame."""

    camera: CameraTrajectory
    prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    memory: MemoryMode

    @classmethod
    def of(
        cls,
        camera: str | CameraTrajectory,
        sampling: SamplingConfig,
        *,
        memory: MemoryMode,
        prompt: str = "",
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> TurnRequest:
        """A request as a user makes it; None takes the checkpoint's default.

        Args:
            camera: a preset ("pan_right"), a move ("arc:-40"), a camera file, or a trajectory.

        Raises:
            CameraError, RequestError: what the checkpoint cannot serve.
        """
        if isinstance(camera, str):
            camera = resolve_camera(camera, sampling.num_frames, sampling.size)
        steps, guidance = num_inference_steps, guidance_scale
        request = cls(
            camera=camera.resized(sampling.size),
            prompt=prompt,
            seed=seed,
            num_inference_steps=sampling.num_inference_steps if steps is None else steps,
            guidance_scale=sampling.guidance_scale if guidance is None else guidance,
            memory=memory,
        )
        request._check(sampling)
        return request

    def _check(self, sampling: SamplingConfig) -> None:
        check_sampling(self.num_inference_steps, self.guidance_scale, self.seed)
        if self.memory not in get_args(MemoryMode):
            known = ", ".join(map(repr, get_args(MemoryMode)))
            raise RequestError(f"memory must be one of {known}, got {self.memory!r}")
        if self.camera.num_frames != sampling.num_frames:
            raise CameraError(
                f"the camera has {self.camera.num_frames} poses, a window of this model has "
                f"{sampling.num_frames} frames: give one pose a frame"
            )

    def difference(self, trajectory: CameraTrajectory, report: dict[str, Any]) -> str | None:
        """How a finished turn differs from this request, in words; None if it answers it."""
        asked = {
            "camera": self.camera.name,
            "seed": self.seed,
            "num_inference_steps": self.num_inference_steps,
            "memory": self.memory,
            "guidance_scale": self.guidance_scale,
            "prompt": self.prompt,
        }
        done = {**report, "memory": report["memory"]["mode"]}
        for name, value in asked.items():
            if done[name] != value:
                return f"{name} {done[name]!r} instead of {value!r}"
        if not torch.equal(trajectory.poses, self.camera.poses):
            return f"other poses under the name {self.camera.name!r}"
        return None


def check_sampling(num_inference_steps: int, guidance_scale: float, seed: int) -> None:
    """Refuse numbers that no checkpoint can serve.

    Raises:
        RequestError: one is out of its range.
    """
    check_number("num_inference_steps", num_inference_steps, 1, MAX_STEPS, whole=True)
    check_number("guidance_scale", guidance_scale, 0, MAX_GUIDANCE_SCALE)
    check_number("seed", seed, 0, 2**63 - 1, whole=True)


def check_text(name: str, prompt: str, guidance_scale: float, *, has_text: bool) -> None:
    """Refuse a prompt that nothing could read, and guidance towards nothing.

    name: the checkpoint's. has_text: whether it has a text encoder.

    Raises:
        RequestError: it has none, and one is asked for.
    """
    if has_text:
        return
    if prompt.strip():
        raise RequestError(
            f"{name} was trained without text and has no text encoder, got the prompt {prompt!r}; "
            "leave it out"
        )
    if needs_guidance(guidance_scale):
        raise RequestError(
            f"{name} has no text encoder, so guidance changes nothing, got guidance_scale "
            f"{guidance_scale}; use 1"
        )


def require_novel_view(config: TransformerConfig, name: str) -> None:
    """Refuse turns with a camera of a model that edits by instruction.

    Raises:
        RequestError: it takes the source on the target's channels.
    """
    if config.source_channels:
        raise RequestError(f"{name} {NO_VIEWS}")


def require_editing(config: TransformerConfig, name: str) -> None:
    """Refuse edits of a model that renders novel views.

    Raises:
        RequestError: its source is tokens of its own.
    """
    if not config.source_channels:
        raise RequestError(f"{name} {NO_EDITS}")
