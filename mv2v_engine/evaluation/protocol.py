"""What is measured: the scenes, the turns of each, and the methods that answer them (METHOD 14).

A scene is a held-out world filmed by a static camera. Three turns move to the same side of it in
different ways, so that each reveals part of what the others do; a fourth looks the other way, and
a fifth comes back to where the first was, when four videos are in memory (Table 4's point). The
three-turn protocol is the first three of the five.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from mv2v_engine.camera.trajectories import CameraTrajectory, named_trajectory
from mv2v_engine.config import (
    Conditioning,
    EngineConfig,
    MemoryMode,
    MemoryRanking,
    MemoryTokenizers,
    MergeMode,
    SamplingConfig,
)
from mv2v_engine.errors import RequestError, nearest_names
from mv2v_engine.synthetic.worlds import HELD_OUT

FIRST_SCENE = HELD_OUT + 1_000_000  # apart from the worlds that the VAE is measured on
MAIN_TURNS = 3
NumTurns = Literal[3, 5]

# The extents are ReCamMaster's own, by family; the sign is the side of the scene.
_MOVES = ("pan:{:.2f}", "arc:{:.2f}", "zoom:{:.3f}", "pan:{:.2f}", "pan:{:.2f}")
_AMOUNTS = (19.88, -29.82, -1.988, -19.88, 14.91)
_SIDED = (True, True, False, True, True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One method: how each of its turns remembers, and how its engine is configured."""

    name: str
    label: str
    memory: MemoryMode = "retrieved"
    merge: MergeMode = "off"
    conditioning: Conditioning = "joint"
    ranking: MemoryRanking = "fov"
    tokenizers: MemoryTokenizers = "ranked"
    max_memory: int = 10

    def configure(self, config: EngineConfig) -> EngineConfig:
        """The configuration of this method's engine; what it does not name stays."""
        return replace(
            config,
            merge=self.merge,
            conditioning=self.conditioning,
            max_memory=self.max_memory,
            memory_ranking=self.ranking,
            memory_tokenizers=self.tokenizers,
        )


ROWS: tuple[Row, ...] = (
    Row(name="independent", label="independent turns", memory="none"),
    Row(name="previous", label="previous output as source", memory="previous"),
    Row(name="memory", label="memory, joint"),
    Row(name="memory_merged", label="memory, joint + merging", merge="conv"),
    Row(name="static", label="memory, static", conditioning="static"),
    Row(name="discard", label="discard instead of merge", merge="discard"),
    Row(name="uniform", label="uniform 1x2x2 tokens", tokenizers="uniform"),
    Row(name="retrieved_1", label="one video, retrieved", max_memory=1),
    Row(name="random_1", label="one video, at random", max_memory=1, ranking="random"),
    Row(name="no_source", label="no source (memory alone)", memory="alone"),
)
MAIN_ROWS = ("independent", "previous", "memory", "memory_merged", "static")


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """A measurement: equal protocols give equal numbers on the same weights.

    first_scene: seed of the first world. turns: 3, or 5 with the first and fifth overlapping.
    steps: denoising steps of a turn; None takes the checkpoint's.
    """

    scenes: int = 40
    turns: NumTurns = 3
    steps: int | None = 10
    rows: tuple[str, ...] = tuple(row.name for row in ROWS)
    first_scene: int = FIRST_SCENE

    def __post_init__(self) -> None:
        if self.scenes < 1 or self.turns not in (3, 5):
            raise RequestError(
                "an evaluation needs at least 1 scene of 3 or 5 turns, got "
                f"{self.scenes} scenes of {self.turns}"
            )
        if self.first_scene < HELD_OUT:
            raise RequestError(
                f"scenes from {HELD_OUT} on are never trained on, got {self.first_scene}"
            )
        check_rows(self.rows, ROWS)

    @property
    def chosen_rows(self) -> tuple[Row, ...]:
        """The rows in their own order, so that shared turns are made by the plainest of them."""
        return tuple(row for row in ROWS if row.name in self.rows)

    @property
    def seeds(self) -> range:
        return range(self.first_scene, self.first_scene + self.scenes)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Pairs of turns, the earlier first, numbered from 1."""
        return tuple(combinations(range(1, self.turns + 1), 2))


def check_rows(names: tuple[str, ...], rows: Sequence[Row]) -> None:
    """Refuse names that are none of the rows', and a name twice."""
    known = {row.name for row in rows}
    for name in names:
        if name not in known:
            near = nearest_names(name, known)
            raise RequestError(f"no row {name!r}; nearest: {near}")
    if not names or len(set(names)) != len(names):
        raise RequestError(f"rows must be named once each, got {names}")


# The protocol of `--quick`: a check that everything runs, not a measurement.
QUICK = Protocol(scenes=4, steps=4, rows=MAIN_ROWS)


def pair_name(pair: tuple[int, int]) -> str:
    return f"{pair[0]}-{pair[1]}"


def scene_trajectories(
    seed: int, sampling: SamplingConfig, turns: int = MAIN_TURNS
) -> list[CameraTrajectory]:
    """The cameras of a scene's turns; even seeds look to the right, odd ones to the left."""
    side = 1 if seed % 2 == 0 else -1
    cameras = []
    for move, amount, sided in zip(_MOVES[:turns], _AMOUNTS, _SIDED, strict=False):
        spec = move.format(amount * side if sided else amount)
        cameras.append(named_trajectory(spec, sampling.num_frames, sampling.size))
    return cameras


def turn_seed(scene: int, number: int) -> int:
    """Seed of a turn's noise: its own for every turn, the same for all rows."""
    return scene * 16 + number
