"""What every command's parser does: errors in one wording, and help that has the defaults."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from mv2v_engine.arguments import shown
from mv2v_engine.errors import RequestError

_INTEGER = re.compile(r"[-+]?[0-9]{1,100}")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_SIZE = re.compile(r"\s*([0-9]{1,100}(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


class _Help(argparse.HelpFormatter):
    """Says every option's default, unless its own words do."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said, default = action.help or "", default_words(action)
        if default is None or "if not given" in said or not action.option_strings:
            return said.replace("%", "%%")
        return f"{said}; {default} if not given".removeprefix("; ").replace("%", "%%")


def default_words(action: argparse.Action) -> str | None:
    """What an option is without being given, as a user would write it; None if nothing says it."""
    value = action.default
    if action.nargs == 0 or action.required or value in (None, argparse.SUPPRESS, [], ""):
        return None
    if action.type is num_bytes:
        units = ((1 << 30, "GiB"), (1 << 20, "MiB"))
        return next((f"{value // u}{n}" for u, n in units if value and not value % u), str(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `RequestError`s, and whose help has the defaults.

    Of an option whose type is `int` or `float`, it takes what `integer` and `number` do.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Help} | options)
        self.register("type", int, integer)
        self.register("type", float, number)

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def option_names(parser: argparse.ArgumentParser, words: Sequence[str] = ()) -> dict[str, str]:
    """The options of a parser, by the names of what they set.

    words: a command line, whose first word is the command if there are several.
    """
    names: dict[str, str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            if words and words[0] in action.choices:
                names |= option_names(action.choices[words[0]])
        elif action.option_strings:
            names[action.dest] = action.option_strings[0]
    return names


def integer(text: str) -> int:
    """An integer in decimal digits, as an option's type.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not _INTEGER.fullmatch(text):
        raise mistaken("an integer", text)
    return int(text)


def number(text: str) -> float:
    """A finite number, as an option's type.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        raise mistaken("a finite number", text)
    return float(text)


def count(text: str) -> int:
    """An integer of at least 1, as an option's type.

    Raises:
        ArgumentTypeError: it is none.
    """
    value = integer(text)
    if value < 1:
        raise mistaken("at least 1", text)
    return value


def positive(text: str) -> float:
    """A finite number above 0, as an option's type.

    Raises:
        ArgumentTypeError: it is none.
    """
    value = number(text)
    if value <= 0:
        raise mistaken("above 0", text)
    return value


def mistaken(expected: str, text: str) -> argparse.ArgumentTypeError:
    """The error for an option's value; the option's name comes before it."""
    return argparse.ArgumentTypeError(f"must be {expected}, got {shown(text)}")


def num_bytes(text: str) -> int:
    """A number of bytes as a user writes it: 4GiB, 1.5 GB, 500m, 1048576.

    Raises:
        ArgumentTypeError: it is no such number.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise mistaken("a number of bytes, or one with KB, MB, GB, TB, KiB, MiB, GiB, TiB", text)
    power = " kmgt".index(match[2].lower() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
