"""What is measured: the scenes, the turns of each, and the methods that answer them (METHOD 14).

A scene is a held-out world filmed by a static camera. Three turns move to the same side of it in
different ways, so that each reveals part of what the others do. Of five, the fourth looks the other
way, and the last is asked in three ways of the same four turns before it: the first turn's place
again (loop closure), the first turn's very path (replay), and further the same way, where what the
source shows nothing of must come back (open-domain return). Of nine, eight are in store, and the
last closes the loop or takes a path that none of them took (detour): enough to choose from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal, get_args

from mv2v_engine.camera.trajectories import CameraTrajectory, named_trajectory
from mv2v_engine.config import (
    ConditioningMode,
    EngineConfig,
    MemoryMode,
    MemoryRanking,
    MemoryTokenizers,
    MergeMode,
    SamplingConfig,
)
from mv2v_engine.errors import RequestError, nearest_names
from mv2v_engine.synthetic.worlds import HELD_OUT, Grade

FIRST_SCENE = HELD_OUT + 1_000_000  # behind the worlds that the VAE is measured on
NumTurns = Literal[3, 5, 9]
SIDE_BY_SIDE = "side_by_side.png"

# The extents are ReCamMaster's own, by family; those of pans and arcs turn with the scene's side.
_MOVES = (
    ("pan", 19.88),
    ("arc", -29.82),
    ("zoom", -1.988),
    ("pan", -19.88),
    ("tilt", 9.94),
    ("tilt", -9.94),
    ("crane", 0.994),
    ("zoom", 1.988),
)
_SIDED = ("pan", "arc")
_CLOSURE = ("pan", 14.91)
REPLAY, RETURN, DETOUR = "replay", "return", "detour"
# the last turns by number of turns, each asked of the same turns before it
_LAST: dict[int, dict[str, tuple[str, float]]] = {
    3: {"3": _MOVES[2]},
    5: {"5": _CLOSURE, REPLAY: _MOVES[0], RETURN: ("pan", 23.86)},
    9: {"9": _CLOSURE, DETOUR: ("arc", 22.37)},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One method: how each of its turns remembers, and how its engine is configured.

    ranking: the engine's; the oracle, which knows the world: the videos that show most of what
    the source and those already chosen do not; or responsiveness: those whose frames the blocks
    respond to most, with all videos before them. history: the rate of the one history that all
    remembered videos make, None for tokens of their own; history_frames: how many of its last
    frames are whole. after: the row that makes all turns but the last ones; None is this one.
    """

    name: str
    label: str
    memory: MemoryMode = "retrieved"
    merge: MergeMode = "off"
    conditioning: ConditioningMode = "joint"
    ranking: MemoryRanking | Literal["oracle", "responsiveness"] = "fov"
    tokenizers: MemoryTokenizers = "ranked"
    history: str | None = None
    history_frames: int = 0
    max_memory: int = 10
    after: str | None = None

    def configure(self, config: EngineConfig) -> EngineConfig:
        """The configuration of this method's engine; what it does not name stays."""
        return replace(
            config,
            merge=self.merge,
            conditioning=self.conditioning,
            max_memory=self.max_memory,
            # where the evaluation itself chooses, nothing else is in memory: any ranking takes all
            memory_ranking="fov"
            if self.ranking == "oracle" or self.ranking == "responsiveness"
            else self.ranking,
            memory_tokenizers=self.tokenizers,
            history=self.history,
            history_frames=self.history_frames,
        )


_OTHER_RANKINGS: dict[MemoryRanking | Literal["oracle", "responsiveness"], str] = {
    "random": "at random",
    "coverage": "by residual coverage",
    "responsiveness": "by responsiveness",
    "learned": "by a learned ranking",
    "oracle": "by an oracle",
}
ROWS: tuple[Row, ...] = (
    Row(name="independent", label="independent turns", memory="none"),
    Row(name="previous", label="previous output as source", memory="previous"),
    Row(name="memory", label="memory, joint"),
    Row(name="memory_merged", label="memory, joint + merging", merge="conv"),
    Row(name="static", label="memory, static", conditioning="static"),
    Row(name="discard", label="discard instead of merge", merge="discard"),
    Row(name="uniform", label="uniform 1x2x2 tokens", tokenizers="uniform"),
    Row(name="no_source", label="no source (memory alone)", memory="alone"),
    Row(name="retrieved_2", label="two videos, retrieved", max_memory=2, after="memory"),
    *(
        Row(name=f"{by}_2", label=f"two videos, {how}", max_memory=2, ranking=by, after="memory")
        for by, how in _OTHER_RANKINGS.items()
    ),
)
MAIN_ROWS = ("independent", "previous", "memory", "memory_merged", "static")


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """A measurement: equal protocols give equal numbers on the same weights.

    grade: the worlds'. turns: 3; 5, where the last is asked in three ways; 9, where eight are in
    store. steps: denoising steps of a turn; None takes the checkpoint's. rows: None are all that
    the number of turns is for. first_scene: seed of the first world.
    """

    scenes: int = 40
    grade: Grade = "plain"
    turns: NumTurns = 3
    steps: int | None = 10
    rows: tuple[str, ...] | None = None
    first_scene: int = FIRST_SCENE

    def __post_init__(self) -> None:
        if self.scenes < 1 or self.turns not in _LAST:
            raise RequestError(
                "an evaluation needs at least 1 scene of 3, 5 or 9 turns, got "
                f"{self.scenes} scenes of {self.turns}"
            )
        if self.grade not in get_args(Grade):
            raise RequestError(f"a scene's grade is one of {get_args(Grade)}, got {self.grade!r}")
        if self.first_scene < HELD_OUT:
            raise RequestError(
                f"scenes from {HELD_OUT} on are never trained on, got {self.first_scene}"
            )
        if self.rows is not None:
            check_rows(self.rows, ROWS)

    @property
    def chosen_rows(self) -> tuple[Row, ...]:
        """The rows in their own order, so that shared turns are made by the plainest of them."""
        if self.rows is not None:
            return tuple(row for row in ROWS if row.name in self.rows)
        if self.turns == 9:
            rows = (row for row in ROWS if row.after or row.name in ("independent", "memory"))
            # few checkpoints have one: it is asked for by name
            return tuple(row for row in rows if row.ranking != "learned")
        return tuple(row for row in ROWS if not row.after)

    @property
    def seeds(self) -> range:
        return range(self.first_scene, self.first_scene + self.scenes)

    @property
    def drawn(self) -> dict[int, str]:
        """The first scene, and the picture that shows it."""
        return {self.first_scene: SIDE_BY_SIDE}

    @property
    def before(self) -> tuple[str, ...]:
        """The turns before the last ones, by name, in order."""
        return tuple(str(number) for number in range(1, self.turns))

    @property
    def last(self) -> tuple[str, ...]:
        """The last turns, each asked of the same turns before it."""
        return tuple(_LAST[self.turns])

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Pairs of turns, the earlier first."""
        return (
            *combinations(self.before, 2),
            *((earlier, last) for last in self.last for earlier in self.before),
        )


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


def pair_name(earlier: str, later: str) -> str:
    return f"{earlier}-{later}"


def scene_trajectories(
    seed: int, sampling: SamplingConfig, turns: int = 3
) -> dict[str, CameraTrajectory]:
    """The cameras of a scene's turns by name, "1" to `turns` first; even seeds look to the right,
    odd ones to the left."""
    side = 1 if seed % 2 == 0 else -1
    numbered = {str(number): move for number, move in enumerate(_MOVES[: turns - 1], 1)}
    cameras = {}
    for name, (kind, amount) in (numbered | _LAST[turns]).items():
        spec = f"{kind}:{amount * side if kind in _SIDED else amount:g}"
        cameras[name] = named_trajectory(spec, sampling.num_frames, sampling.size)
    return cameras


def turn_seed(scene: int, number: int) -> int:
    """Seed of a turn's noise: its own for every turn, the same for all rows.

    number: from 1, the turn's place among `scene_trajectories`.
    """
    return scene * 16 + number
