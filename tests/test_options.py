"""What commands share on the command line."""

from __future__ import annotations

from argparse import ArgumentTypeError

import pytest

from mv2v_engine.options import num_bytes


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
