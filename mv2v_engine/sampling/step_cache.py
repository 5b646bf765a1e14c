"""Which steps run the transformer's blocks: fixed before a turn, from its timesteps alone.

A block sees the timestep through its modulation. Where that has hardly changed since the last
step that ran the blocks, what they added then is added again (the idea of TeaCache, on the
modulation itself, so that the schedule depends on no latents).

N steps of a turn.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def relative_changes(modulation_N: Tensor) -> list[float]:
    """Mean |change| of each step's modulation [N, ...] from the one before, relative to that: the
    N - 1 of steps 1 and on."""
    flat = modulation_N.float().flatten(1)
    change = (flat[1:] - flat[:-1]).abs().mean(1) / flat[:-1].abs().mean(1)
    changes: list[float] = change.tolist()
    return changes


def computed_steps(changes: Sequence[float], threshold: float) -> tuple[bool, ...]:
    """Whether the blocks of each of N steps run, given the N - 1 changes between them.

    A step is skipped while the changes since the last computed one add up to less than the
    threshold. The first and the last are computed: there is nothing to reuse, and nothing after it
    to make an error good.
    """
    computed, total, last = [True], 0.0, len(changes)
    for step, change in enumerate(changes, 1):
        total += change
        runs = total >= threshold or step == last
        computed.append(runs)
        total = 0.0 if runs else total
    return tuple(computed)
