"""What a turn is asked for, checked before anything is computed."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch

from mv2v_engine import arguments
from mv2v_engine.camera.files import Camera, resolve_camera
from mv2v_engine.camera.poses import default_intrinsics, normalised_intrinsics
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.checkpoints.load import Checkpoint
from mv2v_engine.config import (
    MAX_GUIDANCE_SCALE,
    MAX_STEPS,
    MemoryMode,
    SamplingConfig,
    TransformerConfig,
)
from mv2v_engine.errors import CameraError, RequestError
from mv2v_engine.sampling.guidance import needs_guidance

# beyond these, float32 has no digits left for one camera's place in another's image
MAX_SCENE_SCALES = 100
MAX_LENS = 20
# metres, or the sine of an angle, that are taken for none
_LEVEL = 1e-3
# what follows a checkpoint's name where it is asked for what it cannot do
NO_VIEWS = (
    "edits by instruction, frame by frame, and no camera moves its source; ask it for an edit, or "
    "use a checkpoint for novel views, such as tiny-nvs"
)
NO_EDITS = (
    "renders novel views and takes no instruction; ask it for a camera, or use a checkpoint that "
    "edits, as Lucy-Edit and Bernini-R do"
)

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_SHOWN_WORDS, _SHOWN_LETTERS = 5, 30

# the memory modes of an edit, whose windows remember each other
_EDIT_MODES: tuple[MemoryMode, ...] = ("retrieved", "none")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one turn is asked for: a novel view by its camera, an edit by its prompt.

    camera: poses relative to the source's first frame, one a frame; None for an edit. Two equal
    requests give the same edit.
    """

    prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    memory: MemoryMode
    camera: CameraTrajectory | None = None

    @classmethod
    def view(
        cls,
        camera: Camera,
        sampling: SamplingConfig,
        *,
        memory: MemoryMode,
        prompt: str = "",
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Request:
        """A novel view as a user asks for it; None takes the checkpoint's default.

        Args:
            camera: a preset ("pan_right"), moves ("arc:-40+tilt:5"), a camera file with its
                options, a trajectory, or poses [T, 3, 4] or [T, 4, 4].

        Raises:
            CameraError, RequestError: what the checkpoint cannot serve.
        """
        trajectory = resolve_camera(camera, sampling.num_frames, sampling.size)
        return cls(
            camera=trajectory,
            prompt=arguments.text("prompt", prompt),
            memory=arguments.choice("memory", memory, get_args(MemoryMode)),
            **sampled(sampling, seed, num_inference_steps, guidance_scale),
        )

    @classmethod
    def edit(
        cls,
        prompt: str,
        sampling: SamplingConfig,
        *,
        memory: MemoryMode,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Request:
        """An edit as a user asks for it; None takes the checkpoint's default.

        Raises:
            RequestError: no instruction, or what no checkpoint can serve.
        """
        if not arguments.text("prompt", prompt).strip():
            raise RequestError(
                f"an edit needs an instruction, got the prompt {arguments.shown(prompt)}; say what "
                "to change"
            )
        return cls(
            prompt=str(prompt),
            memory=arguments.choice("memory", memory, _EDIT_MODES),
            **sampled(sampling, seed, num_inference_steps, guidance_scale),
        )

    @classmethod
    def of_report(cls, report: Mapping[str, Any], camera: CameraTrajectory | None) -> Request:
        """The request that a finished turn's report answers, unchecked."""
        memory = report.get("memory")
        mode = memory.get("mode") if isinstance(memory, Mapping) else None
        words = {name: report.get(name) for name in _NAMES}
        return cls(**{**words, "memory": mode, "camera": camera})  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the camera as plain data, for a folder's manifest."""
        return {name: getattr(self, name) for name in _NAMES}

    def difference(
        self, report: Mapping[str, Any], trajectory: CameraTrajectory | None
    ) -> str | None:
        """How a finished turn differs from this request, in words; None if it answers it.

        trajectory: the finished turn's camera.
        """
        asked: dict[str, Any] = self.to_dict()
        done = {**report, "memory": report["memory"]["mode"]}
        if self.camera is not None:
            asked = {"camera": self.camera.name, **asked}
        for name, value in asked.items():
            if done[name] != value:
                return f"{name} {done[name]!r} instead of {value!r}"
        if self.camera is None or trajectory is None:
            return None
        if not torch.equal(trajectory.poses, self.camera.poses):
            return f"other poses under the name {self.camera.name!r}"
        lenses = trajectory.intrinsics, self.camera.intrinsics
        if not torch.equal(*torch.broadcast_tensors(*lenses)):
            return f"another lens under the name {self.camera.name!r}"
        return None


_NAMES = ("seed", "num_inference_steps", "memory", "guidance_scale", "prompt")


def sampled(
    sampling: SamplingConfig,
    seed: int,
    num_inference_steps: int | None,
    guidance_scale: float | None,
) -> dict[str, Any]:
    """The numbers of a request by their names, checked; None takes the checkpoint's default.

    Raises:
        RequestError: one is no number, out of the range that a checkpoint can serve, or no fit for
            a scheduler of few steps.
    """
    steps = sampling.num_inference_steps if num_inference_steps is None else num_inference_steps
    scale = sampling.guidance_scale if guidance_scale is None else guidance_scale
    steps = arguments.integer("num_inference_steps", steps, 1, MAX_STEPS)
    scale = arguments.number("guidance_scale", scale, 0, MAX_GUIDANCE_SCALE)
    sampling.check_few_steps(steps, scale)
    return {
        "seed": arguments.integer("seed", seed, 0, 2**63 - 1),
        "num_inference_steps": steps,
        "guidance_scale": scale,
    }


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
            f"{name} was trained without text and has no text encoder, got the prompt "
            f"{arguments.shown(prompt)}; leave it out"
        )
    if needs_guidance(guidance_scale):
        raise RequestError(
            f"{name} has no text encoder, so guidance changes nothing, got guidance_scale "
            f"{guidance_scale}; use 1"
        )


def prompt_warnings(checkpoint: Checkpoint, prompt: str) -> tuple[str, ...]:
    """A sentence that names the words that the weights never read in training, else nothing."""
    known = set(checkpoint.knowledge.words)
    if not known:
        return ()
    # an accent of its own would cut a word in two
    words = {word.lower(): word for word in _WORD.findall(unicodedata.normalize("NFC", prompt))}
    found = [word for lower, word in words.items() if lower not in known]
    if not found:
        return ()
    shown = ", ".join(repr(word[:_SHOWN_LETTERS]) for word in found[:_SHOWN_WORDS])
    more = len(found) - _SHOWN_WORDS
    return (
        f"{checkpoint.name} was trained without the word{'s' * (len(found) > 1)} {shown}"
        f"{f' and {more} more' if more > 0 else ''}, and does not know what is meant",
    )


def check_camera(camera: CameraTrajectory, config: TransformerConfig) -> None:
    """Refuse a camera too far away, or of too strange a lens, for a model's `camera_attention`.

    camera: relative to the source's first frame.

    Raises:
        CameraError: it is beyond `MAX_SCENE_SCALES` or `MAX_LENS`.
    """
    if config.camera_attention == "none":
        return
    farthest = float(camera.poses[..., 3].norm(dim=-1).max())
    reach = MAX_SCENE_SCALES * config.scene_scale
    if farthest > reach:
        raise CameraError(
            f"camera {camera.name!r} is {farthest:g} metres from the source's first frame: "
            f"attention of this model compares cameras within {reach:g}, {MAX_SCENE_SCALES} times "
            "its scene_scale; give poses in metres, relative to the source's first frame"
        )
    lens = normalised_intrinsics(camera.intrinsics, camera.size)
    focal = lens[..., :2]
    if float(lens.abs().max()) > MAX_LENS or float(focal.min()) < 1 / MAX_LENS:
        raise CameraError(
            f"camera {camera.name!r} has focal lengths of {float(focal.min()):g} to "
            f"{float(focal.max()):g} images and a principal point up to "
            f"{float(lens[..., 2:].abs().max()):g} off the centre: attention of this model takes "
            f"1/{MAX_LENS} to {MAX_LENS}, and {MAX_LENS}; are the intrinsics pixels of `size`?"
        )


def camera_notes(camera: CameraTrajectory, config: TransformerConfig) -> list[str]:
    """What was changed of a camera, and what this model does not take of it, in words."""
    notes, default = list(camera.notes), default_intrinsics(*camera.size)
    if config.camera_actions:
        vertical = camera.poses[:, 1, 2:].abs().max()  # its direction and its position
        if float(vertical) > _LEVEL:
            notes.append("this model's cameras move and turn in a plane: height and pitch left out")
    has_lens = not torch.allclose(camera.intrinsics, default.expand_as(camera.intrinsics))
    if has_lens and config.camera_attention == "none":
        notes.append("its lens counts for what is remembered alone: this model has one of its own")
    return notes


def require_task(config: TransformerConfig, name: str, *, edits: bool) -> None:
    """Refuse what a model does not do. edits: whether it has to edit by instruction.

    Raises:
        RequestError: it does the other task.
    """
    if config.is_editor != edits:
        raise RequestError(f"{name} {NO_EDITS if edits else NO_VIEWS}")
