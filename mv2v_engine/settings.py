"""A setting, declared once: a dataclass's field, its bounds, its option, and its name in errors.

    max_memory: int = setting(10, MEMORY, "videos that a turn remembers at most", low=0)

`add_settings` makes options of a class's settings, `given` collects what the command line said of
them, and `in_options` says an error's `max_memory=3` as `--max-memory 3`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from mv2v_engine.arguments import hints
from mv2v_engine.errors import RequestError
from mv2v_engine.parser import mistaken, num_bytes

# the group of settings that a program can set, and no option
PROGRAMS = "programs"
_METAVARS = {int: "N", float: "X", Path: "PATH"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a field's annotation and default leave open.

    group: the title that its option stands under. text: what it is; if the default is None, also
    what that means, as "...; the checkpoint's if not given". flag: the option, where it is not the
    field's name. low, high, above: bounds of a number, the last without the bound itself.
    """

    group: str
    text: str
    flag: str | None = None
    metavar: str | None = None
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf

    def check(self, name: str, value: Any) -> None:
        """Refuse a number that is out of bounds, or not finite where there are bounds.

        Raises:
            RequestError: it is.
        """
        low, high, above = self.low, self.high, self.above
        if value is None or low == above == -high:
            return
        if low <= value <= high and above < value < math.inf:
            return
        expected = f"lie in {low}..{high}" if high < math.inf else f"be at least {low}"
        if above > -math.inf:
            expected = "be positive" if above == 0 else f"be more than {above}"
        finite = " and finite" if value == math.inf else ""
        raise RequestError(f"{name} must {expected}{finite}, got {value}")


def setting(default: Any, group: str, text: str, **about: Any) -> Any:
    """A dataclass's field with a default, and what `Setting` says of it."""
    return dataclasses.field(
        default=default, metadata={"setting": Setting(group=group, text=text, **about)}
    )


def _declared(kind: type) -> Iterator[tuple[str, Any, Setting]]:
    """Name, default and declaration of the settings that have an option."""
    for field in dataclasses.fields(kind):
        about = field.metadata.get("setting")
        if about is not None and about.group != PROGRAMS:
            yield field.name, field.default, about


def flags(kind: type) -> dict[str, str]:
    """The options of a class's settings, by the names of their fields."""
    return {
        name: about.flag or f"--{'no-' * (default is True)}{name.replace('_', '-')}"
        for name, default, about in _declared(kind)
    }


def add_settings(
    parser: argparse.ArgumentParser,
    kind: type,
    *,
    without: Collection[str] = (),
    has_defaults: bool = True,
    own: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> None:
    """Add the options of a class's settings to a parser.

    without: fields, or titles of groups, that are left out. has_defaults: an option that is not
        given is the field's default; False: None. own: by a field's name, what this parser gives
        argparse otherwise.
    """
    groups = {group.title: group for group in parser._action_groups}
    for name, default, about in _declared(kind):
        if name in without or about.group in without:
            continue
        if about.group not in groups:
            groups[about.group] = parser.add_argument_group(about.group)
        options: dict[str, Any] = {"dest": name, "help": about.text}
        options["default"] = default if has_defaults else None
        options |= _typed(name, hints(kind)[name], default) | own.get(name, {})
        if about.metavar is not None:
            options["metavar"] = about.metavar
        groups[about.group].add_argument(flags(kind)[name], **options)


def given(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """What the options of a class's settings gave, by the names of their fields.

    0 is None where the field can be None and is something else by default: no bound.
    """
    found = {}
    for name, default, _ in _declared(kind):
        value = getattr(args, name, None)
        if value is not None:
            is_open = default is not None and type(None) in get_args(hints(kind)[name])
            found[name] = None if is_open and value == 0 else value
    return found


def _typed(name: str, hint: Any, default: Any) -> dict[str, Any]:
    """What argparse takes for a field's annotation."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if hint is bool:
        return {"action": "store_false" if default else "store_true"}
    if hint == tuple[int, int]:
        return {"type": _size, "metavar": "HxW"}
    if get_origin(hint) is tuple:
        return {"action": "append", "default": []}
    return {
        "type": num_bytes if name.endswith("_bytes") else hint,
        "metavar": _METAVARS.get(hint, "NAME"),
    }


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise mistaken("height x width as 480x832", text)
    return int(match[1]), int(match[2])


def in_options(message: str, options: Mapping[str, str]) -> str:
    """An error in the words of who can give options, and no Python.

    An error names a setting as Python does: `cache_bytes`, `graphs="off"`. A name that could be
    any word counts before = and, where the message begins with it, before "must".

    options: by Python's names.
    """
    names = "|".join(sorted(map(re.escape, options), key=len, reverse=True))
    pattern = (
        rf"""(?<![\w/.'"(-])({names})(?:=("[^"]*"|'[^']*'|[^\s,;)]*[^\s,;).])|(?![\w/=-]|\.\w))"""
    )

    def worded(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        option = options[name]
        if value is None:
            is_subject = found.start() == 0 and message[found.end() :].startswith(" must ")
            return option if "_" in name or is_subject else name
        if not option.startswith("--"):
            return f"{option}={value}"
        is_switch = value in ("True", "False")
        return option if is_switch else f"{option} {value.strip(chr(34) + chr(39))}"

    return re.sub(pattern, worded, message) if options else message
