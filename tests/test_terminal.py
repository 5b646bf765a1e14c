"""The bar on a terminal, plain lines elsewhere, and tables that line up."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mv2v_engine.errors import CancelledError
from mv2v_engine.progress import (
    Event,
    Preview,
    StageDone,
    StageStarted,
    StepDone,
    WindowDone,
    WindowStarted,
)
from mv2v_engine.terminal import (
    ECHO_SECONDS,
    blocks,
    can_preview,
    cancel_on_interrupt,
    clock,
    edit_table,
    table,
    turn_progress,
    turn_table,
)

STAGES = "vae s text s memory s sampling s"


def on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ci: str
) -> tuple[str, str]:
    """What a turn shows on stderr, a terminal, and on stdout."""
    monkeypatch.setenv("CI", ci)
    with terminal(monkeypatch) as read, turn_progress("turn 1/2 pan", 4) as show:
        show(StageStarted("sampling"))
        for step in (1, 2, 3, 4):
            show(StepDone("sampling", step, 4, 60.0 * (4 - step)))
        show(StageStarted("vae"))
    return read(), capsys.readouterr().out


@contextlib.contextmanager
def terminal(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int] = (20, 100)
) -> Iterator[Callable[[], str]]:
    """stderr is a terminal of so many lines and columns; after the block, what was written."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))
    shown: list[bytes] = []

    def listen() -> None:
        # what was written arrives by and by; at the end Linux has an error
        with contextlib.suppress(OSError):
            while some := os.read(leader, 1 << 16):
                shown.append(some)
        os.close(leader)

    def read() -> str:
        reader.join()
        return b"".join(shown).decode()

    # a terminal that nobody reads takes a page of text, then whoever writes waits
    reader = threading.Thread(target=listen, daemon=True)
    reader.start()
    with monkeypatch.context() as patch, os.fdopen(follower, "w") as stream:
        patch.setattr("sys.stderr", stream)
        yield read


class Screen:
    """What a terminal without an end shows of a text; colours are left out."""

    def __init__(self, text: str) -> None:
        self.lines: list[list[str]] = [[]]
        self.row = self.column = 0
        for part in re.finditer(r"\x1b\[([0-9;]*)([A-Za-z])|(.)", text, re.DOTALL):
            if part[2]:
                self._command(part[2], int(part[1] or 1) if part[2] == "A" else 0)
            else:
                self._write(part[3])

    def _command(self, name: str, count: int) -> None:
        if name == "A":
            self.row -= count
            assert self.row >= 0
        elif name == "J":
            del self.lines[self.row + 1 :]
        if name in "JK":
            del self.lines[self.row][self.column :]
        assert name in "AJKm"

    def _write(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row += 1
            if self.row == len(self.lines):
                self.lines.append([])
        else:
            line = self.lines[self.row]
            line += " " * (self.column + 1 - len(line))
            line[self.column] = character
            self.column += 1

    @property
    def text(self) -> list[str]:
        return ["".join(line).rstrip() for line in self.lines]


PICTURE = torch.zeros(24, 32, 3, dtype=torch.uint8)


def draw(show: Callable[[Event], None], steps: int) -> None:
    show(StageStarted("sampling"))
    for step in range(1, steps + 1):
        show(StepDone("sampling", step, 4, 60.0))
        show(Preview(step, 4, PICTURE))


def test_previews_are_drawn_below_the_bar_and_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "")
    with terminal(monkeypatch) as read, turn_progress("turn", 4) as show:
        draw(show, 4)
        print("\x07", end="", file=sys.stderr)  # a mark
    during, after = read().split("\x07")
    lines = Screen(during).text
    assert lines[0].startswith("turn  sampling |")
    # 20 lines have room for 18, which are 36 pixels high and 48 wide
    assert lines[1:] == ["\u2580" * 48] * 18
    final = Screen(during + after)
    assert final.text[0].startswith("turn  done |") and final.text[1:] == [""]
    assert (final.row, final.column) == (1, 0)


def test_a_preview_goes_with_a_turn_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "")
    with (
        terminal(monkeypatch) as read,
        pytest.raises(CancelledError),
        turn_progress("turn", 4) as show,
    ):
        draw(show, 2)
        raise CancelledError("enough")
    assert Screen(read()).text[1:] == [""]


def test_a_terminal_without_room_has_no_preview(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "")
    with terminal(monkeypatch, (4, 100)) as read, turn_progress("turn", 4) as show:
        draw(show, 4)
    assert "\u2580" not in read()


def test_a_picture_in_blocks_has_its_colours_and_its_shape() -> None:
    picture = torch.zeros(4, 4, 3, dtype=torch.uint8)
    picture[:2, :, 0], picture[2:, :, 2] = 200, 90
    upper, lower = blocks(picture, 4, 99)
    cell = "\x1b[38;2;{0}m\x1b[48;2;{0}m\u2580"
    assert upper == cell.format("200;0;0") * 4 + "\x1b[0m"
    assert lower == cell.format("0;0;90") * 4 + "\x1b[0m"
    for columns, lines in ((60, 10), (10, 60)):
        drawn = blocks(torch.zeros(60, 104, 3, dtype=torch.uint8), columns, lines)
        width = drawn[0].count("\u2580")
        assert len(drawn) <= lines and width <= columns
        assert width == columns or len(drawn) == lines
        assert abs(width / (2 * len(drawn)) / (104 / 60) - 1) < 0.2
    assert len(blocks(picture, 99, 99)) == picture.shape[0]  # larger it shows no more


@pytest.mark.parametrize(
    ("colours", "forbidden", "ci", "expected"),
    [
        ("truecolor", "", "", True),
        ("24bit", "", "", True),
        ("", "", "", False),
        ("truecolor", "1", "", False),
        ("truecolor", "", "true", False),
    ],
)
def test_previews_need_colours(
    monkeypatch: pytest.MonkeyPatch, colours: str, forbidden: str, ci: str, expected: bool
) -> None:
    for name, value in (("COLORTERM", colours), ("NO_COLOR", forbidden), ("CI", ci)):
        monkeypatch.setenv(name, value)
    assert not can_preview()  # no terminal
    with terminal(monkeypatch):
        assert can_preview() == expected


def test_a_terminal_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, printed = on_a_terminal(monkeypatch, capsys, "")
    assert printed == ""
    states = [state.strip() for state in shown.replace("\n", "\r").split("\r") if state.strip()]
    assert states[0].startswith("turn 1/2 pan |") and "0/4" in states[0]
    assert states[-1].startswith("turn 1/2 pan  done |") and states[-1].endswith("4/4")


def test_continuous_integration_gets_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, printed = on_a_terminal(monkeypatch, capsys, "true")
    assert shown == ""
    assert printed.splitlines() == [
        "turn 1/2 pan  sampling",
        "turn 1/2 pan  sampling 1/4, 3:00 left",
        "turn 1/2 pan  sampling 2/4, 2:00 left",
        "turn 1/2 pan  sampling 3/4, 1:00 left",
        "turn 1/2 pan  sampling 4/4, 0:00 left",
        "turn 1/2 pan  vae",
    ]


@pytest.mark.parametrize(("rank", "patience"), [(None, 0.0), ("0", ECHO_SECONDS)])
def test_a_second_interrupt_does_not_wait_and_torchruns_echo_is_none(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, patience: float
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
        if rank is not None:
            monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else rank)
    now = 100.0
    monkeypatch.setattr("mv2v_engine.terminal.time", SimpleNamespace(monotonic=lambda: now))
    with pytest.raises(KeyboardInterrupt), cancel_on_interrupt() as token:
        assert not token.cancelled
        signal.raise_signal(signal.SIGINT)
        assert token.cancelled
        if patience:
            now += patience / 2
            signal.raise_signal(signal.SIGINT)
        now += patience / 2
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it was not interrupted")
    assert now == 100.0 + patience


def test_many_steps_make_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with turn_progress("turn", 57) as show:
        show(StageStarted("sampling"))
        for step in range(1, 58):
            show(StepDone("sampling", step, 57, 1.0))
        show(StageDone("sampling", 3.0))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and lines[-1] == "turn  sampling 57/57, 0:01 left"


WINDOWS = [
    WindowStarted(3, 5),
    StageStarted("sampling"),
    StepDone("sampling", 1, 2, 3.0),
    StepDone("sampling", 2, 2, 0.0),
    WindowDone(3, 5, 14.0),
    WindowStarted(4, 5),
    StepDone("sampling", 1, 2, 3.0),
]


class Bar:
    """tqdm's, without a terminal."""

    def __init__(self, total: int, **kwargs: Any) -> None:
        self.n, self.total, self.said, self.left = 0, total, "", ""

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None: ...

    def update(self, steps: int) -> None:
        self.n += steps

    def set_description_str(self, said: str) -> None:
        self.said = said

    def set_postfix_str(self, left: str, refresh: bool = True) -> None:
        self.left = left


def test_a_bar_runs_over_all_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed at the third of five windows of two steps, three seconds a step."""
    bars: list[Bar] = []
    now = iter(range(0, 100, 3))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("mv2v_engine.terminal.is_ci", lambda: False)
    monkeypatch.setattr(
        "mv2v_engine.terminal.tqdm", lambda **given: bars.append(Bar(**given)) or bars[0]
    )
    monkeypatch.setattr("mv2v_engine.terminal.time", SimpleNamespace(monotonic=lambda: next(now)))
    states = []
    with turn_progress("edit", 2) as show:
        for event in WINDOWS:
            show(event)
            states.append((bars[0].n, bars[0].left))
        assert bars[0].total == 10 and bars[0].said == "edit  window 3/5  sampling"
    assert states == [
        (4, ""),
        (4, ""),
        (5, "0:15 left"),
        (6, "0:12 left"),
        (6, "0:14 left"),
        (6, "0:14 left"),
        (7, "0:09 left"),
    ]


def test_windows_make_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    with turn_progress("edit", 2) as show:
        for event in WINDOWS:
            show(event)
    assert capsys.readouterr().out == "edit  window 3/5, 0:14 left\n"


def test_clock() -> None:
    assert [clock(s) for s in (0, 9.6, 61, 3600, 7325)] == [
        "0:00",
        "0:10",
        "1:01",
        "1:00:00",
        "2:02:05",
    ]


def test_tables_line_up() -> None:
    text = table(["turn", "name"], [["1", "pan"], ["12", "arc_left"]])
    assert text.splitlines() == ["turn  name", "   1  pan", "  12  arc_left"]


def report(flops: int, merged: list[dict[str, object]]) -> dict[str, object]:
    return {
        "turn": 2,
        "camera": "pan",
        "memory": {"retrieved": [{"turn": 1, "score": 0.875}], "reason": None},
        "plan": {"tokens_by_kind": {"target": 32760, "source": 32760, "memory": 8190}},
        "merged_frames": merged,
        "flops": flops,
        "seconds": {"text": 0.5, "sampling": 61.25},
    }


def test_a_window_in_a_row() -> None:
    row = report(10**12, []) | {"window": 3, "shot": 2, "new_frames": [40, 57]}
    header, cells = edit_table([row]).splitlines()
    kinds = "window shot frames retrieved (score) target memory"
    assert " ".join(header.split()) == f"{kinds} TFLOP video s {STAGES}"
    assert cells.split()[:7] == ["3", "2", "40-56", "1", "(0.88)", "32760", "8190"]


@pytest.mark.parametrize(
    ("flops", "unit", "shown"),
    [
        (2_500_000, "GFLOP", "0.0025"),
        (1_230_000_000_000, "TFLOP", "1.23"),
        (123_456_000_000_000_000, "PFLOP", "123"),
        (2_345_678_000_000_000_000, "PFLOP", "2346"),
    ],
)
def test_a_turn_in_a_row(flops: int, unit: str, shown: str) -> None:
    merged = [{"block": 10, "frames": {"source": [1, 2], "turn 1": [0]}}]
    header, row = turn_table([report(flops, merged)]).splitlines()
    kinds = "turn camera retrieved (score) target source memory merged at 10"
    assert " ".join(header.split()) == f"{kinds} {unit} {STAGES}"
    cells = ["2", "pan", "1", "(0.88)", "32760", "32760", "8190", "3", shown]
    assert row.split() == [*cells, "0.00", "0.50", "0.00", "61.25"]


def test_memory_that_disk_lost_is_named() -> None:
    row = report(1, [])
    row["memory"] = {"retrieved": [], "reason": "the cache is empty", "lost": {"s/1": "gone"}}
    assert "none: the cache is empty; unreadable: s/1" in turn_table([row])


def test_reuse_is_told_beside_turns_without_it() -> None:
    exact, skipped, static = (report(1, []) for _ in range(3))
    for row in (exact, skipped, static):
        row["num_inference_steps"] = 20
        row["plan"] |= {"conditioning": "joint"}  # type: ignore[operator]
    skipped["reuse"] = {"steps_computed": [0, 1, 5, 19]}
    static["plan"] |= {"conditioning": "static"}  # type: ignore[operator]
    static["reuse"] = {"steps_computed": [0, 1, 5, 19]}
    header, *rows = turn_table([exact, skipped, static]).splitlines()
    assert "steps computed  conditioning computed" in header
    cells = [row.split("8190")[1].split()[:6] for row in rows]
    assert [" ".join(each) for each in cells] == [
        "20 of 20 20 of 20",
        "4 of 20 4 of 20",
        "4 of 20 1 of 20",
    ]


def test_turns_that_merged_nothing() -> None:
    merged = [{"block": 3, "frames": {"source": [0]}}]
    _, plain, merging = turn_table([report(1, []), report(1, merged)]).splitlines()
    assert plain.split()[7] == "0" and merging.split()[7] == "1"
