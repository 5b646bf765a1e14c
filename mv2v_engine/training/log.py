"""A training run's log: a CSV row every few steps, one history over all resumptions, its plot."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping
from pathlib import Path

from mv2v_engine.errors import StorageError, TrainingError
from mv2v_engine.files import replacing

Curve = tuple[list[int], list[float]]


class TrainingLog:
    """Rows of numbers by step; a metric that a row lacks leaves its cell empty.

    Rows past the step that a run resumes at are taken back, since it makes those steps again, and
    so is a last line cut short when the run was killed; both are said on stderr.

    Raises:
        TrainingError: the file is no such log, or a line of it is damaged.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        self._columns: list[str] = []
        self._rows: list[dict[str, float]] = []
        if not path.exists():
            if step:
                self._say(f"is missing: it begins anew at step {step}")
            return
        self._columns, rows, is_cut = _parse(path)
        self._rows = [row for row in rows if row["step"] <= step]
        if is_cut:
            self._say("lost its last line, which was cut short")
        if len(self._rows) < len(rows):
            self._say(f"loses {len(rows) - len(self._rows)} rows past step {step}, made again now")
        if is_cut or len(self._rows) < len(rows):
            self._rewrite()

    def append(self, row: Mapping[str, float]) -> None:
        """Write one row, which must hold "step".

        Raises:
            StorageError: the disk is full or the file cannot be written.
        """
        self._rows.append(dict(row))
        new = [name for name in row if name not in self._columns]
        self._columns += new
        if new:
            self._rewrite()
            return
        line = io.StringIO()
        csv.DictWriter(line, self._columns, lineterminator="\n").writerow(row)
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(line.getvalue())
        except OSError as error:
            reason = error.strerror or str(error)
            raise StorageError(f"cannot write {self.path}: {reason}; make room for it") from error

    def curves(self) -> dict[str, Curve]:
        """Steps and values of every metric."""
        return _curves(self._columns, self._rows)

    def _rewrite(self) -> None:
        with (
            replacing(self.path) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows)

    def _say(self, what: str) -> None:
        print(f"{self.path} {what}", file=sys.stderr)


def read_curves(path: Path) -> dict[str, Curve]:
    """Steps and values of every metric of a finished log.

    Raises:
        TrainingError: as `TrainingLog`; also when there is no such file.
    """
    if not path.exists():
        raise TrainingError(f"no training log at {path}; give the --out folder of a training")
    columns, rows, _ = _parse(path)
    return _curves(columns, rows)


def plot_curves(panels: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """One logarithmic panel a title, one line a label, against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (4.5 * len(panels), 3)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=size, layout="constrained", squeeze=False
    )
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for label, (steps, values) in curves.items():
            axis.plot(steps, values, label=label, linewidth=1)
        axis.set_title(title)
        axis.set_yscale("log")
        axis.set_xlabel("step")
        if curves:
            axis.legend()
        axis.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=80)
    pyplot.close(figure)


def _parse(path: Path) -> tuple[list[str], list[dict[str, float]], bool]:
    """Columns, rows in order of step, and whether the last line was cut short."""
    advice = "correct or delete that line, or move the file away to begin a new log"
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise TrainingError(f"cannot read {path}: {error.strerror or error}; {advice}") from error
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path} is no text ({error}): damaged; {advice}") from error
    # a row is written with its line end in one go; csv's own line ends, or a plain newline
    lines = text.replace("\r\n", "\n").split("\n")
    is_cut = lines.pop() != ""
    if not lines:
        return [], [], is_cut
    columns = lines[0].split(",")
    if not {"step", "loss"} <= set(columns):
        raise TrainingError(
            f"{path} begins with {lines[0][:60]!r}; expected a header with step and loss: {advice}"
        )
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split(",")
        try:
            cells_by_name = zip(columns, cells, strict=True)
            row = {name: float(cell) for name, cell in cells_by_name if cell}
            row["step"] = int(row["step"])
        except (ValueError, KeyError) as error:
            raise TrainingError(
                f"line {number} of {path} is {line[:60]!r}; expected {len(columns)} numbers for "
                f"{', '.join(columns)}: {advice}"
            ) from error
        # a run that was killed and resumed made these steps a second time
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    return columns, rows, is_cut


def _curves(columns: list[str], rows: list[dict[str, float]]) -> dict[str, Curve]:
    return {
        name: (
            [int(row["step"]) for row in rows if name in row],
            [row[name] for row in rows if name in row],
        )
        for name in columns
        if name != "step"
    }
