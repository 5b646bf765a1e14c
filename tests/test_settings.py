"""Settings are declared once: fields, options, help and advice say the same of each."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peak_memory import full_size_parts

from mv2v_engine.arguments import fit_fields
from mv2v_engine.config import EngineConfig, LoadConfig, ParallelConfig, SamplingConfig
from mv2v_engine.engine.budget import Budget
from mv2v_engine.errors import RequestError
from mv2v_engine.parser import Parser, option_names
from mv2v_engine.run import _parser
from mv2v_engine.settings import PROGRAMS, add_settings, flags, given, in_options, setting
from mv2v_engine.tokens.plan import novel_view_plan

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "novel-view": ["novel-view", "clip.mp4", "--camera", "pan_left", "--out", "out"],
    "edit": ["edit", "clip.mp4", "--prompt", "a ball", "--out", "out.mp4"],
    "serve": ["serve", "--store", "store"],
}
# what only comparisons set, and what is made of options of its own
NO_OPTION = {
    "memory_tokenizers",
    "merge_scope",
    "parallel",
    "responsiveness_heads",
    "rope",
}


@dataclass(frozen=True, kw_only=True)
class Small:
    """Settings of every kind of bound."""

    share: float = setting(0.5, "numbers", "a share", low=0, high=1)
    count: int | None = setting(3, "numbers", "0: no bound", low=1)
    radius: float = setting(4.0, "lengths", "metres", flag="--far", metavar="R", above=0)
    most_bytes: int = setting(1 << 20, "numbers", "of all")
    hidden: int = setting(1, PROGRAMS, "for programs", low=0)

    def __post_init__(self) -> None:
        fit_fields(self)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"share": 1.5}, "share must lie in 0..1, got 1.5"),
        ({"share": float("nan")}, "share must lie in 0..1, got nan"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"radius": 0}, "radius must be positive, got 0"),
        ({"radius": float("inf")}, "radius must be positive and finite, got inf"),
        ({"hidden": -1}, "hidden must be at least 0, got -1"),
        ({"count": "3"}, "count must be an integer, got '3'"),
    ],
)
def test_bounds(values: dict[str, Any], words: str) -> None:
    assert Small(count=None, share=0, radius=1e-9).count is None
    with pytest.raises(RequestError) as raised:
        Small(**values)
    assert str(raised.value).startswith(words)


def test_options_are_collected_into_the_class() -> None:
    parser = Parser()
    add_settings(parser, Small)
    parse = parser.parse_args
    assert Small(**given(parse([]), Small)) == Small()
    words = ["--share", "1", "--count", "0", "--far", "2", "--most-bytes", "4KiB"]
    found = Small(**given(parse(words), Small))
    assert found == Small(share=1, count=None, radius=2, most_bytes=4096)
    assert flags(Small)["radius"] == "--far" and "hidden" not in flags(Small)
    told = " ".join(parser.format_help().split())
    assert "lengths: --far R metres; 4 if not given" in told and "programs" not in told
    partial = Parser()
    add_settings(partial, Small, without=("share", "lengths"), has_defaults=False)
    args = partial.parse_args([])
    assert not hasattr(args, "share") and args.most_bytes is None and given(args, Small) == {}


def test_every_setting_of_an_engine_has_an_option_or_says_that_it_has_none() -> None:
    fields = {field.name: field.metadata for field in dataclasses.fields(EngineConfig)}
    assert set(fields) - set(flags(EngineConfig)) == NO_OPTION
    for name, metadata in fields.items():
        assert name == "parallel" or metadata["setting"].text, name


def sample(action: argparse.Action) -> tuple[list[str], Any]:
    """Words that give an option a value, and the value."""
    if action.nargs == 0:
        return [], not action.default
    if action.choices is not None:
        value = next(each for each in action.choices if each != action.default)
        return [value], value
    assert callable(action.type)
    texts = {"HxW": "4x6", "N": "2", "FILE[:S]": "file:2", "RATE": "2x2x1"}
    text = texts.get(str(action.metavar), "0.25")
    if action.dest == "history_frames":  # they belong to a history
        return [text, "--history"], 2
    if action.dest == "lora":
        return [text], ((Path("file"), 2.0),)
    return [text], action.type(text)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_reaches_the_configuration(command: str) -> None:
    parser = _parser()
    start = COMMANDS[command]
    names = option_names(parser, start)
    (actions,) = [
        sub.choices[command]._actions
        for sub in parser._actions
        if isinstance(sub, argparse._SubParsersAction)
    ]
    seen = 0
    for kind in (LoadConfig, EngineConfig, SamplingConfig, ParallelConfig):
        for action in actions:
            if action.dest in flags(kind):
                words, value = sample(action)
                args = parser.parse_args([*start, names[action.dest], *words], argparse.Namespace())
                found = given(args, kind)
                assert getattr(kind(**found), action.dest) == value != action.default
                seen += 1
    assert seen >= 33


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("cache_bytes allows 3; raise it", "--cache-bytes allows 3; raise it"),
        ('try graphs="auto" (3) or max_memory=1', "try --graphs auto (3) or --max-memory 1"),
        ("check_weights=False loads them.", "--no-check-weights loads them."),
        ("use dtype=bfloat16 or float32.", "use --dtype bfloat16 or float32."),
        ("size must be two, got 3", "--size must be two, got 3"),
        ("give components=FOLDER, with all", "give --components FOLDER, with all"),
        # a word, a part of a name, a place, what a file says
        ("the size of the memory must be less", None),
        ("num_max_memory=3", None),
        ("/srv/max_memory/clip.mp4 and max_memory/clip.mp4 are gone", None),
        ("'cache_bytes' is no field; model.json is wrong (cache_bytes must be less)", None),
    ],
)
def test_errors_in_options(message: str, expected: str | None) -> None:
    names = option_names(_parser(), ["novel-view"])
    assert in_options(message, names) == (expected or message)
    assert in_options(in_options(message, names), names) == (expected or message)


def literals(tree: ast.AST) -> list[str]:
    """The texts of a module but for its docstrings, with a 1 for whatever is filled in."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    parts = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts = [part.value if isinstance(part, ast.Constant) else "1" for part in node.values]
            found.append("".join(map(str, texts)))
        elif isinstance(node, ast.Constant) and id(node) not in docs | parts:
            found.append(str(node.value))
    return [text for text in found if " " in text]


def named(text: str) -> list[tuple[str, str | None]]:
    """The settings that a text names, and the value that it gives them."""
    fields = {
        field.name for kind in (EngineConfig, LoadConfig) for field in dataclasses.fields(kind)
    }
    found = re.findall(r"""(?<![\w/.'"(`-])(\w+)(?:=("\w+"|[\w.]+))?(?!\w)""", text)
    return [(name, value) for name, value in found if name in fields and (value or "_" in name)]


def check_settable(name: str, value: str) -> None:
    """Every command that has an option for a setting takes what the advice becomes there."""
    parser, doors = _parser(), 0
    for start in COMMANDS.values():
        options = option_names(parser, start)
        if name not in options:
            continue
        words = shlex.split(in_options(f"{name}={value}", options))
        args = parser.parse_args([*start, *words], argparse.Namespace())
        assert str(getattr(args, name)) == value.strip('"'), words
        doors += 1
    assert doors, name


def test_whatever_is_advised_can_be_set() -> None:
    """Read from the source, so that advice which no test meets counts, too."""
    advice = {
        (name, value)
        for path in (ROOT / "mv2v_engine").rglob("*.py")
        if not path.is_relative_to(ROOT / "mv2v_engine" / "training")  # has options of its own
        for text in literals(ast.parse(path.read_text(encoding="utf-8")))
        for name, value in named(text)
    }
    assert len(advice) > 15
    # whoever reads of these has set them in a program
    inner = {name for name, _ in advice} & NO_OPTION
    assert inner == {"merge_scope"}
    for name, value in advice:
        if name not in NO_OPTION:
            # FILE stands for any, 1 for what is filled in
            if value and value != "1" and not value.isupper():
                check_settable(name, value)
            else:
                assert name in flags(EngineConfig) | flags(LoadConfig), name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_budget_advises_can_be_set(device: str) -> None:
    plan = novel_view_plan(memory=3, conditioning="static", merge="off")
    parts = SimpleNamespace(device=torch.device(device), config=EngineConfig())
    budget, footprint = Budget(parts), full_size_parts()  # type: ignore[arg-type]
    budget.footprint = lambda: footprint  # type: ignore[method-assign]
    advised = [words for words, _ in budget._changes(footprint, plan, 0)]
    assert len(advised) == (9 if device == "cuda" else 7)
    for words in advised:
        name, _, value = words.partition("=")
        assert getattr(replace(EngineConfig(), **{name: ast.literal_eval(value)}), name) is not None
        check_settable(name, value)


def test_every_option_that_the_guides_name_is_there() -> None:
    # the last three are of other programs
    parser, known = _parser(), {"--help", "--build-arg", "--edit", "--dry-run"}
    for command in (*COMMANDS, "stream", "evaluate", "camera", "store", "inspect", "models"):
        known |= set(option_names(parser, [command]).values())
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        told = set(re.findall(r"`(--[a-z][a-z-]+)", path.read_text(encoding="utf-8")))
        assert path.name == "training.md" or told <= known, (path.name, told - known)
