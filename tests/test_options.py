"""What commands share on the command line."""

from __future__ import annotations

import argparse
from argparse import SUPPRESS, ArgumentTypeError
from collections.abc import Iterator

import pytest

from mv2v_engine.errors import RequestError
from mv2v_engine.parser import default_words, num_bytes
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


@pytest.mark.parametrize(
    "text", ["", "-1", "GiB", "4XB", "1e9", "4 GiB more", "iB", "nan", "9" * 400, "\uff11"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="must be a number of bytes, or one with KB"):
        num_bytes(text)


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


@pytest.mark.parametrize(
    "text", ["many", "1_0", "", "0x10", "\uff11", "1e400", "nan", "inf", "9" * 9999]
)
def test_every_number_that_is_none_is_refused_in_one_wording(text: str) -> None:
    seen = 0
    for parser in commands(_parser()):
        for action in parser._actions:
            if action.type not in (int, float):
                continue
            seen += 1
            expected = "an integer" if action.type is int else "a finite number"
            with pytest.raises(RequestError) as raised:
                parser.parse_args([f"{action.option_strings[0]}={text}"])
            name = "/".join(action.option_strings)
            assert str(raised.value).startswith(f"{name}: must be {expected}, got '{text[:9]}")
            assert len(str(raised.value)) < 200
    assert seen > 30


def test_every_help_says_what_every_option_is_if_not_given() -> None:
    parsers = list(commands(_parser()))
    assert len(parsers) > 4
    for parser in parsers:
        told = " ".join(parser.format_help().split())
        for action in parser._actions:
            if action.help == SUPPRESS:  # gone, and said so where it is given
                continue
            if not action.option_strings or action.nargs == 0 or action.required:
                continue
            said = action.help or ""
            default = default_words(action)
            name = f"{parser.prog} {action.option_strings[0]}"
            assert said, name
            assert default is not None or "if not given" in said, name
            if "if not given" not in said:
                assert f"{default} if not given" in told, name
