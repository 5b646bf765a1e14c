"""The libraries of `csrc/`, behind their C ABI: loaded at first use, and if not, why.

They lie beside this file once an install has built them. One that was not built left a reason
there; one of another ABI version, or that the loader refuses, is not used either.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mv2v_engine.errors import KernelUnavailableError

LibraryName = Literal["cpu", "cuda"]

ABI_VERSION = 3  # csrc/mv2v.h
_INVALID_INDEX = -2
_FOLDER = Path(__file__).resolve().parent
_TYPES = {
    "p": ctypes.c_void_p,
    "n": ctypes.c_int64,
    "d": ctypes.c_double,
    "t": ctypes.c_int,
}
_INSTALL = "install again with `pip install -e .`"


def open_library(path: Path) -> ctypes.CDLL | str:
    """The library at a path, or the reason why it cannot be used."""
    if not path.exists():
        skipped = path.with_suffix(".skipped")
        if skipped.exists():
            return f"{path.name} was not built: {skipped.read_text(encoding='utf-8').strip()}"
        return f"{path.name} was never built; {_INSTALL}"
    try:
        library = ctypes.CDLL(str(path))
        version = int(library.mv2v_abi_version())
        library.mv2v_error_string.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded: {error}"
    if version != ABI_VERSION:
        return f"{path.name} has ABI version {version}, expected {ABI_VERSION}; {_INSTALL}"
    return library


@functools.cache
def _library(name: LibraryName) -> ctypes.CDLL | str:
    return open_library(_FOLDER / f"libmv2v_{name}.so")


def missing_reason(name: LibraryName, op: str | None = None) -> str | None:
    """Why a library, or its version of an operation, cannot be used; None if it can."""
    library = _library(name)
    if isinstance(library, str):
        return library
    if op is not None and not hasattr(library, f"mv2v_{op}_{name}"):
        return f"libmv2v_{name} has no {op}"
    return None


def call(name: LibraryName, op: str, *arguments: Any) -> None:
    """Call `mv2v_<op>_<name>` with ctypes arguments.

    Raises:
        KernelUnavailableError: the library is missing, or the call returned an error code.
    """
    library = _library(name)
    if isinstance(library, str):
        raise KernelUnavailableError(f"{op} cannot run natively: {library}")
    code = library[f"mv2v_{op}_{name}"](*arguments)
    if code:
        raise _failed(library, name, op, code)


@functools.cache
def bound(op: str, signature: str) -> Callable[..., None]:
    """`mv2v_<op>_cpu` to be called with plain numbers, cheap enough for calls of microseconds.

    signature: a letter an argument, "p" an address (None is NULL), "n" an int64, "d" a double and
        "t" a number of threads.

    Raises:
        KernelUnavailableError: the library is missing; or, from the function, an error code.
        IndexError: from the function, an index lies outside of its table.
    """
    library = _library("cpu")
    if isinstance(library, str):
        raise KernelUnavailableError(f"{op} cannot run natively: {library}")
    function = getattr(library, f"mv2v_{op}_cpu")
    function.argtypes = [_TYPES[letter] for letter in signature]

    def run(*arguments: int | float | None) -> None:
        code = function(*arguments)
        if code:
            raise _failed(library, "cpu", op, code)

    return run


def _failed(library: ctypes.CDLL, name: LibraryName, op: str, code: int) -> Exception:
    said = f"{op} failed in libmv2v_{name}: {library.mv2v_error_string(code).decode()}"
    if code == _INVALID_INDEX:
        return IndexError(said)
    return KernelUnavailableError(f"{said} (code {code})")


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's values lie, NULL for none."""
    return None if tensor is None else tensor.data_ptr()


def describe(name: LibraryName) -> str:
    """One line for a report on the machine."""
    library = _library(name)
    if isinstance(library, str):
        return f"{name}: PyTorch is used, {library}"
    how = f", {'OpenMP' if library.mv2v_has_openmp() else 'one thread'}" if name == "cpu" else ""
    return f"{name}: libmv2v_{name}, ABI {ABI_VERSION}{how}"
