"""One command from seeds to a checkpoint: what it runs, in which order, and how it stops."""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import pytest

from mv2v_engine.errors import TrainingError
from mv2v_engine.training.embedded import TASKS, Command, Settings, run

SETTINGS = Settings(out=Path("runs"), minutes=100, worlds=8, jobs=2, device="cpu", start_from=None)


class _Parsed(Exception):
    pass


@pytest.mark.parametrize("task", TASKS)
def test_every_command_takes_its_words(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = ArgumentParser.parse_args

    def parse_alone(*arguments: object) -> None:
        parse(*arguments)  # type: ignore[arg-type]
        raise _Parsed

    lines = [line for command in TASKS[task](SETTINGS) for line in command.lines(SETTINGS.jobs)]
    monkeypatch.setattr(ArgumentParser, "parse_args", parse_alone)
    for _, _, module, *words in lines:
        monkeypatch.setattr(sys, "argv", [module, *words])
        with pytest.raises(_Parsed):
            importlib.import_module(module).main()


@pytest.mark.parametrize("task", TASKS)
def test_stages_share_the_minutes_and_go_on_from_one_another(task: str) -> None:
    for settings in (SETTINGS, replace(SETTINGS, start_from="tiny-nvs")):
        words = [command.lines(1)[0][2:] for command in TASKS[task](settings)]
        trainings = [w for w in words if w[0] == "mv2v_engine.training.dit"]
        packages = [w for w in words if w[0] == "mv2v_engine.training.package"]
        assert sum(float(_after(w, "--minutes")) for w in trainings) == pytest.approx(100, abs=0.1)
        starts = [_after(w, "--start-from") if "--start-from" in w else None for w in trainings]
        assert starts == [settings.start_from, *(_after(w, "--out") for w in packages[:-1])]
        assert words[-1][:2] == ["mv2v_engine.run", "evaluate"]
        assert _after(words[-1], "--checkpoint") == _after(packages[-1], "--out")


def test_a_command_that_fails_ends_it_and_is_named() -> None:
    commands = iter([Command("run", ("no-such-command",)), Command("run", ("--version",))])
    with pytest.raises(TrainingError, match="no-such-command"):
        run(commands, 1)
    assert next(commands) == Command("run", ("--version",))


def _after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]
