"""The calls that a turn's time is made of, on a CPU: what the gate and pytest-benchmark time.

Each maker prepares its inputs and returns the call. Every case is on `tiny-nvs` but for the
full-size plan and the ranking, which need no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import cycle, islice
from typing import Any

import torch
from forwards import Inputs, Setting, embedded

from mv2v_engine.camera.trajectories import PRESETS, named_trajectory
from mv2v_engine.memory.cache import MemoryCache
from mv2v_engine.memory.entry import MemoryEntry
from mv2v_engine.memory.retrieval import rank_memory
from mv2v_engine.models.rope import rotary_table
from mv2v_engine.ops.token_merge import token_merge
from mv2v_engine.tokens.plan import novel_view_plan, turn_plan

CPU = torch.device("cpu")
Call = Callable[[], Any]


@cache
def _setting() -> Setting:
    return embedded(CPU)


def target_only() -> Call:
    setting = _setting()
    grid = setting.plan("dynamic", 0).target.grid
    plan = turn_plan(setting.transformer.config, grid, (), source=False)
    return Inputs(setting, plan).first


def merged_forward() -> Call:
    """Three memory videos, with merging."""
    setting = _setting()
    return Inputs(setting, setting.plan("merged", 3)).first


def static_step() -> Call:
    """Ten memory videos, their K and V kept."""
    setting = _setting()
    given = Inputs(setting, setting.plan("static", 10))
    given.later()
    return given.later


def plan_and_table() -> Call:
    """A full-size plan with ten memory videos, its merges, FLOPs and rotary table."""

    def build() -> Any:
        plan = novel_view_plan(memory=10)
        return plan.merge_steps, plan.flops(), rotary_table(plan)

    return build


def _entries(count: int, num_frames: int, latent: tuple[int, ...]) -> list[MemoryEntry]:
    entries = []
    for turn, camera in enumerate(islice(cycle(PRESETS), count), start=1):
        trajectory = named_trajectory(camera, num_frames, (480, 832))
        latents = torch.full(latent, float(turn))
        entries.append(
            MemoryEntry(
                id=f"s/{turn}", turn=turn, latents=latents, trajectory=trajectory, key="vae"
            )
        )
    return entries


def ranking() -> Call:
    """VideoFOV over ten videos of 81 frames."""
    entries = _entries(10, 81, (16, 2, 2, 2))
    camera = named_trajectory("arc_left", 81, (480, 832))
    return lambda: rank_memory(camera, entries, top_k=10, backend="reference")


def merging() -> Call:
    """Half of 30 frames of 60 tokens, as wide as the embedded model."""
    generator = torch.Generator().manual_seed(0)
    frames, rows, columns, width, dim = 30, 6, 10, 144, 48
    x = torch.randn(1, frames, rows * columns, width, generator=generator)
    rope = torch.randn(1, frames, rows * columns, dim, generator=generator)
    weight = torch.randn(width, width, 2, 2, generator=generator)
    kept, merged = torch.arange(frames)[None].split(frames // 2, 1)
    return lambda: token_merge(
        x, rope, kept, merged, grid=(rows, columns), kernel=(2, 2), weight=weight, bias=None
    )


def caching() -> Call:
    """Twenty full-size videos through a cache with room for ten, each read once."""
    entries = _entries(20, 9, (16, 3, 60, 104))
    size = entries[0].latents.nbytes

    def run() -> int:
        cache = MemoryCache(10 * size, CPU)
        for entry in entries:
            cache.add(entry)
            cache.get(entry.id)
        return cache.bytes_used

    return run


CASES: dict[str, Callable[[], Call]] = {
    "target only": target_only,
    "3 memory videos, merged": merged_forward,
    "10 memory videos, static step": static_step,
    "plan and rotary table": plan_and_table,
    "VideoFOV ranking": ranking,
    "token merge": merging,
    "cache add and get": caching,
}
