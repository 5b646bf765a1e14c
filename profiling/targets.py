"""What the measured rows should reach on an H200, and what they reached.

A target without rows is neither met nor missed: `measured` and `met` are None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from measure import Ceilings, digits

from mv2v_engine.tokens.plan import novel_view_plan

ELEMENTWISE = ("adaln", "gated_residual", "prope", "qk_norm_rope", "residual_norm", "rope")
Row = dict[str, Any]


def op_targets(rows: Sequence[Row], ceilings: Ceilings) -> list[Row]:
    """Targets of the operations; the slowest shape counts, attention at 90,090 tokens of 1536."""
    turn = novel_view_plan(memory=3)
    # one forward at its floor: every product at the matrix rate
    forward = turn.flops() / ceilings.flops_per_second
    merging = len(turn.merge_steps)

    def of(op: str, *, triton: bool, whole_turns: bool = True) -> list[Row]:
        """Timed rows of an operation; of the turn above alone unless `whole_turns`."""
        return [
            row
            for row in rows
            if row.get("op") == op
            and row.get("ms")
            and (row["implementation"] == "triton") == triton
            and (whole_turns or (row["tokens"], row["width"]) == (turn.length, turn.shape.dim))
        ]

    found = [
        target(f"{op}: % of the copy bandwidth", 80, of(op, triton=True), "percent_of_floor")
        for op in ELEMENTWISE
    ]
    rate = ceilings.flops_per_second / 1e14
    products = [row for row in of("token_merge", triton=True) if _merges_all(row)]
    found.append(
        target("token_merge: % of the matrix rate", 60, products, "tflop_per_s", scale=1 / rate)
    )
    responsive = of("frame_responsiveness", triton=True)
    found.append(
        target("frame_responsiveness: % of its floor", 100 / 3, responsive, "percent_of_floor")
    )
    shares = [
        {"share": 100 * merging * row["ms"] / 1e3 / forward}
        for row in of("frame_responsiveness", triton=True, whole_turns=False)
    ]
    found.append(
        target("frame_responsiveness: % of a forward", 0.1, shares, "share", pick=max, at_most=True)
    )
    for name, wanted, is_triton in (("best library", 550, False), ("Triton", 450, True)):
        timed = of("attention", triton=is_triton, whole_turns=False)
        found.append(target(f"attention, {name}: TFLOP/s", wanted, timed, "tflop_per_s", pick=max))
    return found


def _merges_all(row: Row) -> bool:
    """Whether every frame merges: the product alone, without frames to copy."""
    merged, _, rest = row["workload"].partition(" of ")
    return bool(rest.startswith(f"{merged} frames"))


def target(
    name: str,
    wanted: float,
    rows: Sequence[Row],
    column: str,
    *,
    scale: float = 1.0,
    pick: Callable[[list[float]], float] = min,
    at_most: bool = False,
) -> Row:
    """One target's row: `pick` of a column of the rows that count."""
    values = [scale * row[column] for row in rows if row.get(column) is not None]
    measured = digits(pick(values)) if values else None
    met = None
    if measured is not None:
        met = measured <= wanted if at_most else measured >= wanted
    sign = "<=" if at_most else ">="
    return {"target": name, "wanted": f"{sign} {wanted:.4g}", "measured": measured, "met": met}
