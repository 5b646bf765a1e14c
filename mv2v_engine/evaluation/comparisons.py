"""Values an item as means with intervals, as comparisons with targets, and as cells of a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mv2v_engine.evaluation import bootstrap
from mv2v_engine.evaluation.bootstrap import Estimate

Values = list[float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A comparison of two rows, item by item, that is met within its bounds.

    values: a row's, given what the task calls a row.
    """

    name: str
    rows: tuple[str, str]
    values: Callable[[Any], Values]
    at_most: float | None = None
    at_least: float | None = None
    compare: Callable[[Values, Values], Estimate | None] = bootstrap.ratio

    def is_met(self, value: float) -> bool:
        return (self.at_most is None or value <= self.at_most) and (
            self.at_least is None or value >= self.at_least
        )


def compared(
    targets: Sequence[Target], values: Callable[[Target, str], Values | None]
) -> dict[str, Any]:
    """Value, interval, bounds and whether they are met, by the comparison's name.

    values: of a target's row, None if that was not measured; such a comparison is left out.
    """
    table = {}
    for target in targets:
        first, second = (values(target, name) for name in target.rows)
        estimate = None
        if first is not None and second is not None:
            estimate = target.compare(first, second)
        if estimate is not None:
            bounds = {"at_most": target.at_most, "at_least": target.at_least}
            table[target.name] = {
                **described(estimate),
                **{name: bound for name, bound in bounds.items() if bound is not None},
                "met": target.is_met(estimate.value),
            }
    return table


def add(summary: dict[str, Any], name: str, values: Values) -> None:
    """Put a measure's mean and its interval into a row's summary."""
    estimate = bootstrap.mean(values)
    summary[name] = estimate and rounded(estimate.value)
    summary[f"{name}_ci"] = estimate and [rounded(estimate.low), rounded(estimate.high)]


def described(estimate: Estimate | None) -> dict[str, Any]:
    """An estimate as plain data."""
    if estimate is None:
        return {"value": None, "ci": None, "scenes": 0}
    return {
        "value": rounded(estimate.value),
        "ci": [rounded(estimate.low), rounded(estimate.high)],
        "scenes": estimate.count,
    }


def rounded(value: float) -> float:
    """Six significant digits: more says nothing and makes files that differ by nothing."""
    return float(f"{value:.6g}")


def targets_table(targets: dict[str, Any]) -> list[str]:
    """Lines of Markdown, none without targets."""
    if not targets:
        return []
    lines = ["", "| comparison | value | 95 % interval | target | met |", "|---|---|---|---|---|"]
    for name, target in targets.items():
        low, high = target["ci"]
        bounds = [
            f"{sign} {target[key]:g}"
            for key, sign in (("at_least", "≥"), ("at_most", "≤"))
            if key in target
        ]
        lines.append(
            f"| {name} | {target['value']:.3f} | {low:.3f} to {high:.3f} "
            f"| {', '.join(bounds)} | {'yes' if target['met'] else 'no'} |"
        )
    return lines


def number(value: float | None, digits: int) -> str:
    """A cell; a dash where nothing was measured."""
    return "-" if value is None else f"{value:,.{digits}f}"


def with_interval(row: dict[str, Any], name: str, digits: int) -> str:
    """A cell of a row's mean and its interval."""
    if row.get(name) is None:
        return "-"
    low, high = row[f"{name}_ci"]
    return f"{row[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
