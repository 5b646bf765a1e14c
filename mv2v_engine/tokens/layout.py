"""Layouts: which frames of which token grid a sequence holds at a depth, and how merging moves it.

Pure Python and hashable. A layout is a row of runs; a run is `num_frames` frames of the same
token grid. Merging sorts the runs so that every length stays known in advance: the target,
the runs left alone, then for each group its kept frames and its merged ones (METHOD 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mv2v_engine.errors import RequestError

EncoderName = Literal["patches", "history"]
Grid = tuple[int, int, int]


def encoded_grid(encoder: EncoderName, grid: Grid, patch: int, frames: int) -> Grid:
    """Token (frames, rows, columns) of a video of a latent grid.

    patch, frames: the spatial patch of a token, and the latent frames that it covers. Patches are
    padded to whole ones; of a history, rows and columns that fill no whole patch are cut off, at
    the bottom and on the right, and its last frame is repeated.
    """
    count, rows, columns = grid
    if encoder == "history":
        return -(-count // frames), rows // patch, columns // patch
    return -(-count // frames), -(-rows // patch), -(-columns // patch)


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive frames of one token grid (rows x columns)."""

    rows: int
    columns: int
    num_frames: int
    mergeable: bool

    @property
    def tokens_per_frame(self) -> int:
        return self.rows * self.columns

    @property
    def length(self) -> int:
        return self.num_frames * self.tokens_per_frame


@dataclass(frozen=True, slots=True)
class MergeGroup:
    """Candidates of equal token grid: the layout's runs they fill, and how many of them merge."""

    runs: tuple[int, ...]
    rows: int
    columns: int
    num_frames: int
    num_merged: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The runs of a sequence in order; the first is the target."""

    runs: tuple[Run, ...]

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return sum(run.length for run in self.runs)

    @property
    def target_length(self) -> int:
        return self.runs[0].length

    @property
    def num_frames(self) -> int:
        """Frames of all runs, target included."""
        return sum(run.num_frames for run in self.runs)

    def groups(self) -> tuple[MergeGroup, ...]:
        """Candidate frames by token grid, in order of first appearance; nothing merged yet."""
        by_grid: dict[tuple[int, int], list[int]] = {}
        for index, run in enumerate(self.runs):
            if run.mergeable and run.num_frames:
                by_grid.setdefault((run.rows, run.columns), []).append(index)
        return tuple(
            MergeGroup(tuple(runs), *grid, sum(self.runs[i].num_frames for i in runs), 0)
            for grid, runs in by_grid.items()
        )


@dataclass(frozen=True, slots=True)
class MergeStep:
    """What happens before one block's attention: groups with their counts, layout before, after."""

    block: int
    groups: tuple[MergeGroup, ...]
    before: Layout
    after: Layout


def merge_step(
    block: int,
    before: Layout,
    counts: Sequence[int],
    *,
    kernel: tuple[int, int],
    discard: bool,
) -> MergeStep:
    """The step that merges `counts[g]` frames of each group of `before`.

    Raises:
        RequestError: the counts do not fit the groups.
    """
    groups = tuple(
        MergeGroup(group.runs, group.rows, group.columns, group.num_frames, count)
        for group, count in zip(before.groups(), counts, strict=True)
    )
    if any(not 0 <= group.num_merged <= group.num_frames for group in groups):
        raise RequestError(f"cannot merge {tuple(counts)} frames of {before.groups()}")
    active = [group for group in groups if group.num_merged]
    moved = {index for group in active for index in group.runs}
    runs = [run for index, run in enumerate(before.runs) if index not in moved]
    for group in active:
        kept = group.num_frames - group.num_merged
        if kept:
            runs.append(Run(group.rows, group.columns, kept, True))
        if not discard:
            rows, columns = -(-group.rows // kernel[0]), -(-group.columns // kernel[1])
            runs.append(Run(rows, columns, group.num_merged, False))
    return MergeStep(block, tuple(active), before, Layout(tuple(runs)))
