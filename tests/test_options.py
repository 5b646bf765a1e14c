"""What commands share on the command line."""

from __future__ import annotations

import argparse
from argparse import ArgumentTypeError
from collections.abc import Iterator

import pytest

from mv2v_engine.options import default_words, num_bytes
from mv2v_engine.run import _parser


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("1048576", 1 << 20),
        ("4GiB", 4 << 30),
        ("1.5 gb", 1_500_000_000),
        ("500M", 500_000_000),
        ("2Ki", 2048),
        (" 3 TiB ", 3 << 40),
        ("7b", 7),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert num_bytes(text) == value


@pytest.mark.parametrize("text", ["", "-1", "GiB", "4XB", "1e9", "4 GiB more", "iB", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="is no size; give bytes, or a number with KB"):
        num_bytes(text)


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def test_every_help_says_what_every_option_is_if_not_given() -> None:
    parsers = list(commands(_parser()))
    assert len(parsers) > 4
    for parser in parsers:
        told = " ".join(parser.format_help().split())
        for action in parser._actions:
            if not action.option_strings or action.nargs == 0 or action.required:
                continue
            said = action.help or ""
            default = default_words(action)
            name = f"{parser.prog} {action.option_strings[0]}"
            assert said, name
            assert default is not None or "if not given" in said, name
            if "if not given" not in said:
                assert f"{default} if not given" in told, name
