"""What is wrong with a request's fields, in the service's own words instead of pydantic's.

One line about the first field that is wrong: what was got, what is expected, what is meant. Of
what was sent, only its kind, short numbers and texts, and names of fields are sent back.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mv2v_engine.serving.errors import ApiError

_NAME = re.compile(r"[a-z][a-z0-9_-]*")
# parts of a place that name a branch of a union, not a field
_BRANCHES = frozenset({"constrained-str", "str", "int", "float", "bool", "dict", "list", "none"})
_LENGTH = 100  # characters of a name that was sent
_SHOWN = 40  # characters of a text that is sent back, at most
# what the field has to be, for each of pydantic's kinds of error; braces take its context
_EXPECTED = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "an integer of fewer digits",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_unicode": "valid Unicode text",
    "string_too_short": "text of at least {min_length} character",
    "string_too_long": "text of at most {max_length} characters",
    # the Idempotency-Key is the only text that has a pattern
    "string_pattern_mismatch": "visible ASCII characters without spaces",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "too_short": "a list of at least {min_length} items",
    "too_long": "a list of at most {max_length} items",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "union_tag_invalid": "an object whose {discriminator} is {expected_tags}",
    "union_tag_not_found": "an object with {discriminator}",
}
# fields that a request has not, because what they say is said elsewhere
_ELSEWHERE = {
    "window": "all turns of a session are made of one part of its video, to whose first frame "
    "their cameras are relative; POST /v1/sessions/{session_id}/branches with "
    '{"turn": 0, "window": ...} makes a session of another part',
}


def field_error(errors: Sequence[Mapping[str, Any]], known: Iterable[str], place: int) -> ApiError:
    """The refusal for what pydantic found.

    Args:
        errors: as its `errors()` gives them. known: names of the request's fields.
        place: how many parts of an error's `loc` come before the field: what it was looked for in.
    """
    # where all branches of a union are of another type, the one that was meant got furthest
    furthest = max(errors, key=lambda error: len(error["loc"]))
    chosen = next((error for error in errors if not _is_of_type(error)), furthest)
    kind, parts = chosen["type"], chosen["loc"][place:]
    if kind == "extra_forbidden":
        path = ".".join((*_names(parts[:-1]), str(parts[-1])[:_LENGTH]))
        if path in _ELSEWHERE:
            message = f"there is no field {path!r} here: {_ELSEWHERE[path]}"
            return ApiError("invalid_request", message, param=path)
        return unknown_name("field", path, known if len(parts) == 1 else (), "leave it out")
    path = ".".join(_names(parts))
    if chosen["loc"][:1] == ("header",):
        path = str(chosen["loc"][1])
    what = path or "the body"
    if kind == "missing":
        return ApiError("invalid_request", f"{what} is missing; send it", param=path or None)
    if kind == "value_error":
        message = f"{chosen['ctx']['error']}"
        return ApiError("invalid_request", message, param=path or None)
    alike = [error for error in errors if ".".join(_names(error["loc"][place:])) == path]
    wanted = dict.fromkeys(map(_expected, alike if _is_of_type(chosen) else [chosen]))
    said = f"{what} must be {' or '.join(wanted)}, got {_got(chosen['input'])}"
    return ApiError("invalid_request", said, param=path or None)


def unknown_name(what: str, name: str, known: Iterable[str], otherwise: str) -> ApiError:
    """The refusal of a name that a request does not have.

    what: the kind of name, as "field". otherwise: what is said where none are known.
    """
    name, known = name[:_LENGTH], list(known)
    hint = nearest_field(name, known) if known else None
    nearest = f"{hint!r} is the nearest; " if hint else ""
    advice = f"the {what}s are {', '.join(known)}" if known else otherwise
    return ApiError(
        "invalid_request", f"there is no {what} {name!r}; {nearest}{advice}", param=name
    )


def nearest_field(name: str, known: Iterable[str]) -> str | None:
    """The field that somebody means who writes another name; None if none is near."""
    name, known = name.lower(), list(known)
    sharing = [field for field in known if set(name.split("_")) & set(field.split("_"))]
    cutoff = 0.0 if sharing else 0.6
    return next(iter(difflib.get_close_matches(name, sharing or known, 1, cutoff)), None)


def _is_of_type(error: Mapping[str, Any]) -> bool:
    """Whether a value is of another type altogether: of a union, all other branches say so."""
    return str(error["type"]).endswith("_type")


def _names(parts: Iterable[Any]) -> list[str]:
    """The fields and indices of a place, without the branches of unions."""
    return [
        str(part)
        for part in parts
        if isinstance(part, int) or (_NAME.fullmatch(part) and part not in _BRANCHES)
    ]


def _expected(error: Mapping[str, Any]) -> str:
    words = _EXPECTED.get(error["type"], "a value that it can have")
    return words.format(**error.get("ctx", {}))


def _got(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        # a number of thousands of digits is not even written out
        is_short = isinstance(value, float) or value.bit_length() < 128
        return str(value) if is_short else "a number of too many digits"
    if isinstance(value, str):
        is_short = len(value) <= _SHOWN
        return f"the text {value!a}" if is_short else f"text of {len(value)} characters"
    return f"a list of {len(value)}" if isinstance(value, list) else "an object"
