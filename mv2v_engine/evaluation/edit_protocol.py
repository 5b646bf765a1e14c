"""What is measured of long edits: the clips, and the methods that edit them (METHOD 14).

A clip is a held-out world filmed by a moving camera for five windows of the model, every fourth
round of clips for eight; the five kinds of instruction take turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mv2v_engine.errors import RequestError
from mv2v_engine.evaluation.editing_measures import FIRST_EDIT_CLIP
from mv2v_engine.evaluation.protocol import Row, check_rows
from mv2v_engine.synthetic.instructions import KINDS, EditKind
from mv2v_engine.synthetic.worlds import HELD_OUT, Grade

SHORT, LONG = 5, 8  # windows
_LONG_EVERY = 4  # rounds of kinds
Method = Literal["session", "one_noise", "fifo"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EditRow(Row):
    """One method. method: an edit session as the row configures it; every window a clip of its
    own, all with the same noise; or diagonal denoising of the whole clip."""

    method: Method = "session"


EDIT_ROWS: tuple[EditRow, ...] = (
    EditRow(name="independent", label="independent windows", memory="none"),
    EditRow(name="one_noise", label="independent, one noise", memory="none", method="one_noise"),
    EditRow(name="fifo", label="FIFO diagonal denoising", memory="none", method="fifo"),
    EditRow(name="memory", label="memory, joint"),
    EditRow(name="memory_merged", label="memory, joint + merging", merge="conv"),
    EditRow(name="static", label="memory, static", conditioning="static"),
    EditRow(name="history", label="memory, one history", history="default"),
    EditRow(
        name="history_1",
        label="one history, its last frame whole",
        history="default",
        history_frames=1,
    ),
    EditRow(name="recent_1", label="most recent window alone", max_memory=1),
    EditRow(name="recent_2", label="at most two windows", max_memory=2),
    EditRow(name="recent_4", label="at most four windows", max_memory=4),
)
MAIN_EDIT_ROWS = ("independent", "one_noise", "fifo", "memory", "memory_merged", "static")


@dataclass(frozen=True, kw_only=True, slots=True)
class EditProtocol:
    """A measurement: equal protocols give equal numbers on the same weights.

    grade: of the rooms. windows: of every clip; None is five, and eight for some. steps: denoising
    steps of a window; None takes the checkpoint's. first_clip: seed of the first world. dino, clip:
    transformers folders of networks whose frame consistency is measured, None for none.
    """

    clips: int = 40
    grade: Grade = "textured"
    windows: int | None = None
    steps: int | None = 10
    rows: tuple[str, ...] = MAIN_EDIT_ROWS
    first_clip: int = FIRST_EDIT_CLIP
    dino: str | None = None
    clip: str | None = None

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise RequestError(f"an evaluation needs at least 1 clip, got {self.clips}")
        if self.grade not in get_args(Grade):
            raise RequestError(f"a clip's grade is one of {get_args(Grade)}, got {self.grade!r}")
        if self.windows is not None and self.windows < 2:
            raise RequestError(
                f"windows agree with each other if there are at least 2, got {self.windows}"
            )
        if self.first_clip < HELD_OUT:
            raise RequestError(
                f"clips from {HELD_OUT} on are never trained on, got {self.first_clip}"
            )
        check_rows(self.rows, EDIT_ROWS)

    @property
    def chosen_rows(self) -> tuple[EditRow, ...]:
        return tuple(row for row in EDIT_ROWS if row.name in self.rows)

    @property
    def seeds(self) -> range:
        return range(self.first_clip, self.first_clip + self.clips)

    def kind_of(self, seed: int) -> EditKind:
        """The kind of the instruction of a seed's clip."""
        return KINDS[(seed - self.first_clip) % len(KINDS)]

    def windows_of(self, seed: int) -> int:
        """How many windows the clip is long."""
        if self.windows is not None:
            return self.windows
        is_long = (seed - self.first_clip) // len(KINDS) % _LONG_EVERY == _LONG_EVERY - 1
        return LONG if is_long else SHORT

    @property
    def drawn(self) -> dict[int, str]:
        """The first clip of each kind, and the picture that shows it."""
        return {seed: picture_of(self.kind_of(seed)) for seed in self.seeds[: len(KINDS)]}


# The protocol of `--quick`: a check that everything runs, not a measurement.
QUICK_EDITS = EditProtocol(clips=5, windows=3, steps=5)


def picture_of(kind: EditKind) -> str:
    return f"windows_{kind}.png"
