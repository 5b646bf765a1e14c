"""Which turns share the next pack: first come, first served, by tokens."""

from __future__ import annotations

from collections.abc import Iterable

OVERTAKING = 4


def admit(tokens: Iterable[int], budget: int, *, overtaking: int = OVERTAKING) -> list[int]:
    """The places of the turns that run now, of turns in the order in which they came.

    The oldest runs, whatever its size; one larger than the budget runs alone. Of the others each
    runs if it fits beside the older ones that do, so none is ever held up by a younger one. Only
    the `overtaking` places behind the first that does not fit are looked at: turns that ran
    before it and then have to make room for it are no more than that.

    Args:
        tokens: of every turn's part of a pack, oldest first; read no further than needed.
        budget: tokens of a pack.
    """
    admitted: list[int] = []
    used, waiting = 0, None
    for place, size in enumerate(tokens):
        if not admitted or used + size <= budget:
            admitted.append(place)
            used += size
        elif waiting is None:
            waiting = place
        if used >= budget or (waiting is not None and place - waiting >= overtaking):
            break
    return admitted
