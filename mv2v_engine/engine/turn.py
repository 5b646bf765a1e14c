"""A finished turn and its report.

T pixel frames, C latent channels, F H W latent grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.models.token_merge import MergeRecord
from mv2v_engine.tokens.flops import flop_table, kept_flop_table
from mv2v_engine.tokens.layout import MergeStep
from mv2v_engine.tokens.plan import TokenPlan
from mv2v_engine.video.io import write_video


@dataclass(frozen=True, eq=False)
class Turn:
    """One edit. `frames` decode on first use, so a resumed session opens without the VAE's work."""

    number: int
    trajectory: CameraTrajectory
    latents: Tensor
    fps: float
    report: dict[str, Any]
    decode: Callable[[Tensor], Tensor] = field(repr=False)

    @cached_property
    def frames(self) -> Tensor:
        """uint8 [T, height, width, 3] on the CPU."""
        return self.decode(self.latents)

    def save(self, path: Path | str) -> None:
        """Write the frames as H.264 mp4, whole or not at all.

        Raises:
            StorageError: the place cannot be written.
        """
        write_video(path, self.frames, self.fps)


def segment_names(plan: TokenPlan, memory_turns: Sequence[int]) -> list[str]:
    """What a report calls each segment: target, source, turn N."""
    turns = iter(memory_turns)
    return [
        f"turn {next(turns)}" if segment.role == "memory" else segment.role
        for segment in plan.segments
    ]


def turn_flops(plan: TokenPlan, steps: Sequence[MergeStep], num_forwards: int) -> dict[str, Any]:
    """FLOPs by part of a turn's first forward and of each later one, and of all forwards together.

    With static conditioning the later ones run the target alone. steps: the merges that happened.
    """
    first = flop_table(plan, steps)
    later = kept_flop_table(plan, steps) if plan.conditioning == "static" else first
    return {
        "flops_first_forward": first,
        "flops_per_forward": later,
        "flops": sum(first.values()) + (num_forwards - 1) * sum(later.values()),
    }


def merge_report(
    plan: TokenPlan, records: Sequence[MergeRecord], memory_turns: Sequence[int]
) -> list[dict[str, Any]]:
    """Which latent frames each merging block fused, by video: in the last step, or for good."""
    names, table = segment_names(plan, memory_turns), plan.frame_table
    rows = []
    for record in records:
        by_video: dict[str, list[int]] = {}
        for index in sorted(record.merged[0].tolist()):
            span = table[index]
            by_video.setdefault(names[span.segment], []).append(span.frame)
        rows.append(
            {
                "block": record.step.block,
                "frames": by_video,
                "tokens_before": record.step.before.length,
                "tokens_after": record.step.after.length,
            }
        )
    return rows
