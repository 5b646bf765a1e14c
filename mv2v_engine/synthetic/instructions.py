"""What an edit can ask for, in words: a closed language.

A prompt is a template with a noun phrase and, where the kind has one, a value ("red", "stripes").
Every word that can occur is in `vocabulary()`, every prompt in `all_prompts()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from mv2v_engine.errors import RequestError, nearest_names
from mv2v_engine.synthetic.colours import COLOUR_NAMES

EditKind = Literal["colour", "paint", "pattern", "hat", "remove"]
Pattern = Literal["striped", "checked"]

# the nouns of an object's kind, in the order of worlds.SPHERE, BOX, CYLINDER
OBJECT_NOUNS: tuple[tuple[str, ...], ...] = (
    ("sphere", "ball"),
    ("box", "block"),
    ("cylinder", "drum"),
)
WALL_NOUNS: dict[str, int] = {"back wall": 5, "floor": 4}  # and their surfaces
PATTERNS: tuple[Pattern, ...] = ("striped", "checked")
_PATTERN_NOUNS = {"striped": "stripes", "checked": "checks"}

# {np}: the noun phrase; {value}: a colour, or a pattern as an adjective; {noun}: as a noun
TEMPLATES: dict[EditKind, tuple[str, ...]] = {
    "colour": (
        "make {np} {value}",
        "turn {np} {value}",
        "paint {np} {value}",
        "change {np} to {value}",
    ),
    "paint": (
        "paint {np}",
        "repaint {np}",
        "give {np} a new colour",
        "change the colour of {np}",
    ),
    "pattern": (
        "make {np} {value}",
        "paint {noun} on {np}",
        "give {np} {noun}",
        "cover {np} with {noun}",
    ),
    "hat": (
        "add a hat to {np}",
        "put a hat on {np}",
        "give {np} a hat",
        "place a hat on top of {np}",
    ),
    "remove": ("remove {np}", "take {np} away", "delete {np}", "erase {np}"),
}
KINDS: tuple[EditKind, ...] = tuple(TEMPLATES)
_VALUES: dict[EditKind, tuple[str, ...]] = {"colour": COLOUR_NAMES, "pattern": PATTERNS}
_ON_WALLS: tuple[EditKind, ...] = ("colour", "paint")


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """One edit in words.

    kind: what is done. target: the noun phrase without its article, "tall box" or "back wall".
    value: the colour or the pattern asked for; "" where the kind has none.
    phrasing: which of the kind's templates says it.
    """

    kind: EditKind
    target: str
    value: str = ""
    phrasing: int = 0

    def __post_init__(self) -> None:
        if self.kind not in TEMPLATES:
            near = nearest_names(self.kind, KINDS)
            raise RequestError(f"no kind of edit {self.kind!r}; nearest: {near}")
        values = _VALUES.get(self.kind, ("",))
        if self.value not in values:
            raise RequestError(
                f"an edit of kind {self.kind!r} takes a value of {values}, got {self.value!r}"
            )
        if not 0 <= self.phrasing < len(TEMPLATES[self.kind]):
            raise RequestError(
                f"kind {self.kind!r} has phrasings 0..{len(TEMPLATES[self.kind]) - 1}, "
                f"got {self.phrasing}"
            )

    @property
    def prompt(self) -> str:
        noun = _PATTERN_NOUNS.get(self.value, "")
        template = TEMPLATES[self.kind][self.phrasing]
        return template.format(np=f"the {self.target}", value=self.value, noun=noun)

    @property
    def is_open(self) -> bool:
        """Whether the words leave a choice that all windows have to make alike."""
        return self.kind != "remove"


def values_of(kind: EditKind) -> tuple[str, ...]:
    """The values that a kind takes, ("",) if none."""
    return _VALUES.get(kind, ("",))


def object_phrases() -> tuple[str, ...]:
    """Every noun phrase that can name an object."""
    nouns = [noun for synonyms in OBJECT_NOUNS for noun in synonyms]
    tall = [f"tall {noun}" for synonyms in OBJECT_NOUNS[1:] for noun in synonyms]
    coloured = [f"{colour} {noun}" for colour, noun in product(COLOUR_NAMES, nouns)]
    return (*nouns, *tall, *coloured)


def all_instructions() -> Iterator[Instruction]:
    """The whole language, in a fixed order."""
    for kind in KINDS:
        targets = (*object_phrases(), *(WALL_NOUNS if kind in _ON_WALLS else ()))
        for target, value, phrasing in product(
            targets, values_of(kind), range(len(TEMPLATES[kind]))
        ):
            yield Instruction(kind=kind, target=target, value=value, phrasing=phrasing)


def all_prompts() -> tuple[str, ...]:
    """Every prompt, once, in a fixed order."""
    return tuple(dict.fromkeys(instruction.prompt for instruction in all_instructions()))


def vocabulary() -> tuple[str, ...]:
    """Every word of every prompt, sorted."""
    return tuple(sorted({word for prompt in all_prompts() for word in prompt.split()}))
