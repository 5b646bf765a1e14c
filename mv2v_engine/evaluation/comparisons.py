"""Values an item as means with intervals, as comparisons with targets, and as cells of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mv2v_engine.evaluation import bootstrap
from mv2v_engine.evaluation.bootstrap import Estimate

Values = list[float | None]
# a table's columns: title, measure, digits, whether its interval is shown
Columns = Sequence[tuple[str, str, int, bool]]
# estimates from one row, from two, from three
_OF_COUNTS: tuple[Callable[..., Estimate | None], ...] = (
    bootstrap.mean,
    bootstrap.ratio,
    bootstrap.share,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A row's value, or rows compared item by item, that is met within its bounds.

    rows: one gives its mean, two their ratio, three how far the second is from the first on the
    way to the third. values: a row's, given what the task calls a row.
    for_interval: the whole interval must lie within the bounds.
    """

    name: str
    rows: tuple[str, ...]
    values: Callable[[Any], Values]
    at_most: float | None = None
    at_least: float | None = None
    for_interval: bool = False

    def is_met(self, estimate: Estimate) -> bool | None:
        """Whether the bounds are met; None without bounds: the value is told, and not judged."""
        if self.at_most is None and self.at_least is None:
            return None
        low, high = estimate.value, estimate.value
        if self.for_interval:
            low, high = estimate.low, estimate.high
        return (self.at_most is None or high <= self.at_most) and (
            self.at_least is None or low >= self.at_least
        )


def compared(
    targets: Sequence[Target], values: Callable[[Target, str], Values | None]
) -> dict[str, Any]:
    """Value, interval, bounds and whether they are met, by the comparison's name.

    values: of a target's row, None if that was not measured; such a comparison is left out.
    """
    table = {}
    for target in targets:
        columns = [column for name in target.rows if (column := values(target, name)) is not None]
        if len(columns) < len(target.rows):
            continue
        estimate = _OF_COUNTS[len(columns) - 1](*columns)
        if estimate is not None:
            bounds = {"at_most": target.at_most, "at_least": target.at_least}
            table[target.name] = {
                **described(estimate),
                **{name: bound for name, bound in bounds.items() if bound is not None},
                **({"for_interval": True} if target.for_interval else {}),
                "met": target.is_met(estimate),
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
    judged = {True: "yes", False: "no", None: "-"}
    for name, target in targets.items():
        low, high = target["ci"]
        bounds = [
            f"{sign} {target[key]:g}"
            for key, sign in (("at_least", "≥"), ("at_most", "≤"))
            if key in target
        ]
        bound = ", ".join(bounds) + (", all of it" if "for_interval" in target else "")
        lines.append(
            f"| {name} | {target['value']:.3f} | {low:.3f} to {high:.3f} "
            f"| {bound or '-'} | {judged[target['met']]} |"
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


def _cell(row: dict[str, Any], measure: str, digits: int, has_interval: bool) -> str:
    if has_interval:
        return with_interval(row, measure, digits)
    value = row.get(measure)
    if measure == "flops" and value is not None:
        value /= 1e9
    return number(value, digits)


def measures_table(columns: Columns, rows: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Lines of Markdown. rows: a label and its summary."""
    cells = [(label, [_cell(row, *column[1:]) for column in columns]) for label, row in rows]
    return table([title for title, *_ in columns], cells)


def table(
    titles: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], *, corner: str = ""
) -> list[str]:
    """Lines of Markdown. rows: a label and its cells."""
    return [
        f"| {corner} | {' | '.join(titles)} |",
        "|---" * (len(titles) + 1) + "|",
        *(f"| {label} | {' | '.join(cells)} |" for label, cells in rows),
    ]


def steps_words(settings: Mapping[str, Any]) -> str:
    """How many steps a turn took, and what integrated them where that is not Euler's method."""
    scheduler = settings.get("scheduler", "euler")
    return f"{settings['steps']} denoising steps" + (
        "" if scheduler == "euler" else f" of {scheduler}"
    )
