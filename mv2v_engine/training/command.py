"""How the training commands end: an error that a user can meet is one line, not a trace."""

from __future__ import annotations

import sys
from collections.abc import Callable

from mv2v_engine.config import LoadConfig
from mv2v_engine.errors import MV2VError
from mv2v_engine.settings import flags, in_options


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main function; exit code 2 and one line for an `MV2VError`."""
    try:
        main()
    except MV2VError as error:
        print(f"error: {in_options(str(error), flags(LoadConfig))}", file=sys.stderr)
        sys.exit(2)
