"""What the training commands share: seeds and shards as options, and how an error ends them."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

from mv2v_engine.config import LoadConfig
from mv2v_engine.errors import MV2VError
from mv2v_engine.parser import mistaken
from mv2v_engine.settings import flags, in_options
from mv2v_engine.synthetic.worlds import HELD_OUT

_PAIR = re.compile(r"([0-9]{1,15})[:/]([0-9]{1,15})")


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main function; exit code 2 and one line for an `MV2VError`."""
    try:
        main()
    except MV2VError as error:
        print(f"error: {in_options(str(error), flags(LoadConfig))}", file=sys.stderr)
        sys.exit(2)


def seeds(text: str) -> range:
    """Seeds to train on, "first:last" without the last one, as an option's type.

    Raises:
        ArgumentTypeError: it is none, or they are held out for measuring.
    """
    first, last = _pair(text, ":")
    if first >= last:
        raise mistaken("first:last, two seeds, of which the last is not taken, as 0:300", text)
    if last > HELD_OUT:
        raise argparse.ArgumentTypeError(
            f"seeds from {HELD_OUT} on are held out for measuring, got {text}"
        )
    return range(first, last)


def shard(text: str) -> slice:
    """Every n-th of some things from the i-th on, "i/n", as an option's type.

    Raises:
        ArgumentTypeError: it is none, or i is not below n.
    """
    index, number = _pair(text, "/")
    if index >= number:
        raise mistaken("i/n with i from 0 to n - 1, as 0/2 and 1/2", text)
    return slice(index, None, number)


def _pair(text: str, mark: str) -> tuple[int, int]:
    """Two numbers with a mark between them; 0 and 0 if it is something else."""
    match = _PAIR.fullmatch(text) if mark in text else None
    return (0, 0) if match is None else (int(match[1]), int(match[2]))
