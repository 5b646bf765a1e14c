"""What a caller passes, checked for its type: the value as the engine uses it, or one clear error.

NumPy's numbers are numbers, and any path is a path. True is no number, and text is no number: a
caller who passes them has mixed something up.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import numpy as np

from mv2v_engine.errors import RequestError

Kind = TypeVar("Kind")
_SHOWN = 60  # characters of a value in an error
_LARGEST = 1 << 64


def _is_array(value: object) -> bool:
    # not imported here: processes without tensors check their arguments, too
    torch = sys.modules.get("torch")
    return isinstance(value, np.ndarray) or (torch is not None and isinstance(value, torch.Tensor))


def shown(value: Any) -> str:
    """A value in an error message or a `repr`: its beginning, and never an array's numbers."""
    if _is_array(value):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{type(value).__name__} {dtype} {list(value.shape)}"
    if isinstance(value, int) and abs(value) >= _LARGEST:
        return f"an integer of {value.bit_length()} bits"
    plain = str | int | float | bool | Path | None
    is_list = isinstance(value, list | tuple) and all(isinstance(each, plain) for each in value)
    if is_list or isinstance(value, plain):
        text = repr(value)
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return f"an object of type {type(value).__name__}"


def short_repr(instance: Any) -> str:
    """The `repr` of a dataclass that holds tensors: their types and shapes alone."""
    fields = [field.name for field in dataclasses.fields(instance) if field.repr]
    values = ", ".join(f"{name}={shown(getattr(instance, name))}" for name in fields)
    return f"{type(instance).__name__}({values})"


def mistaken(
    name: str, value: object, expected: str, *, kind: type[Exception] = RequestError
) -> Exception:
    """The error for an argument of a wrong type. expected: what would do, as "an integer"."""
    got = f" of type {type(value).__name__}" if isinstance(value, str) else ""
    return kind(f"{name} must be {expected}, got {shown(value)}{got}")


def integer(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> int:
    """An `int` of Python or NumPy in low..high.

    Raises:
        RequestError: anything else, also a bool, a float, and an int of more than 64 bits.
    """
    if isinstance(value, bool | np.bool_) or _is_array(value):
        raise mistaken(name, value, "an integer")
    try:
        whole = operator.index(value)
    except TypeError:
        raise mistaken(name, value, "an integer") from None
    if abs(whole) >= _LARGEST:
        raise mistaken(name, value, "an integer that 64 bits hold")
    _require_range(name, whole, low, high)
    return whole


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A number of Python or NumPy in low..high as a `float`; a Python `int` stays one.

    Raises:
        RequestError: anything else, also a bool and an int that no float can hold; where there is
            a range, NaN.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise mistaken(name, value, "a number")
    try:
        result = value if isinstance(value, int) and float(value) == value else float(value)
    except OverflowError:
        raise mistaken(name, value, "a number that a float can hold") from None
    _require_range(name, result, low, high)
    return result


def _require_range(name: str, value: float, low: float, high: float) -> None:
    is_bounded = low > -math.inf or high < math.inf
    if is_bounded and not low <= value <= high:
        raise RequestError(f"{name} must lie in {low}..{high}, got {value}")


def text(name: str, value: Any) -> str:
    """A string that can be written as UTF-8.

    Raises:
        RequestError: anything else.
    """
    if not isinstance(value, str):
        raise mistaken(name, value, "text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name} must be valid Unicode text, got lone surrogates") from None
    return str(value)


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        RequestError: anything else.
    """
    if not isinstance(value, bool | np.bool_):
        raise mistaken(name, value, "True or False")
    return bool(value)


def path(
    name: str, value: Any, expected: str = "a path", *, kind: type[Exception] = RequestError
) -> Path:
    """A place in the file system, given as text or as any path object.

    Raises:
        RequestError, or `kind`: anything else, or a name that no file can have.
    """
    if isinstance(value, bytes) or not isinstance(value, str | os.PathLike):
        raise mistaken(name, value, expected, kind=kind)
    place = os.fspath(value)
    try:
        is_name = isinstance(place, str) and "\0" not in place and bool(os.fsencode(place))
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise mistaken(name, value, f"{expected}, in characters that names have", kind=kind)
    return Path(place)


def choice(name: str, value: Any, known: Iterable[str]) -> Any:
    """One of the words that an argument can be.

    Raises:
        RequestError: another word, or no word.
    """
    words = tuple(known)
    if isinstance(value, str) and value in words:
        return value
    listed = ", ".join(map(repr, words))
    raise RequestError(f"{name} must be one of {listed}, got {shown(value)}")


def instance(name: str, value: Any, kind: type[Kind], expected: str) -> Kind:
    """An object of one class.

    Raises:
        RequestError: anything else.
    """
    if not isinstance(value, kind):
        raise mistaken(name, value, expected)
    return value


def sequence(name: str, value: Any, kind: type[Kind], expected: str) -> Iterator[Kind]:
    """The members of something that can be gone through, all of one class.

    Raises:
        RequestError: it is something else, or a member is.
    """
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise mistaken(name, value, expected)
    for place, member in enumerate(value):
        yield instance(f"{name}[{place}]", member, kind, f"one of the {expected}")


def callback(name: str, value: Any) -> None:
    """Refuse what cannot be called; None is no callback.

    Raises:
        RequestError: it is neither.
    """
    if value is not None and not callable(value):
        raise mistaken(name, value, "a function, or None")


def fit_fields(config: Any) -> None:
    """Check a frozen dataclass's fields by their annotations, and bring them to these types.

    Raises:
        RequestError: a field of another type, a word that it does not know, or a number out of
            its bounds, as `settings.setting` declares them.
    """
    kinds = hints(type(config))  # type: ignore[arg-type]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        fitted = _fitted(field.name, value, kinds[field.name])
        if fitted is not value:
            object.__setattr__(config, field.name, fitted)
        if "setting" in field.metadata:
            field.metadata["setting"].check(field.name, fitted)


@functools.cache
def hints(kind: type) -> Mapping[str, Any]:
    """The annotations of a class's fields, as types."""
    return typing.get_type_hints(kind)


def _fitted(name: str, value: Any, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return choice(name, value, arguments)
    if origin in (Union, types.UnionType):
        others = [kind for kind in arguments if kind is not type(None)]
        if value is None and len(others) < len(arguments):
            return None
        # Path | str: either is a path
        return _fitted(name, value, Path if Path in others else others[0])
    if origin is tuple:
        if isinstance(value, str | bytes) or not isinstance(value, list | tuple):
            raise mistaken(name, value, "a tuple")
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise mistaken(name, value, f"a tuple of {len(kinds)}")
        return tuple(_fitted(name, each, kind) for each, kind in zip(value, kinds, strict=True))
    checks: dict[Any, Callable[[str, Any], Any]] = {
        int: integer,
        float: number,
        str: text,
        bool: flag,
        Path: path,
    }
    if hint in checks:
        return checks[hint](name, value)
    return instance(name, value, hint, f"a {hint.__name__}")
