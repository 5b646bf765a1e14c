"""A camera file as its readers see it, and what they make of it.

N poses of a file.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mv2v_engine.camera.poses import quaternion_rotations
from mv2v_engine.errors import CameraError

Axes = Literal["opencv", "opengl"]
Direction = Literal["c2w", "w2c"]
Quaternion = Literal["xyzw", "wxyz"]

MAX_POSES = 100_000
MAX_FILE_BYTES = 256 << 20
_WORST_QUATERNION = 0.01  # the most that its length may differ from 1
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
EXPECTED = (
    'expected {"format": "mv2v-camera", "poses": ...}, ReCamMaster\'s camera_extrinsics.json '
    '({"frame0": {"cam01": ...}, ...}), NeRF\'s transforms.json ({"frames": [...]}), 4x4 matrices '
    "(JSON, text or npy), RealEstate10K's or TUM's text, or COLMAP's images.txt or images.bin"
)


@dataclass(frozen=True, eq=False)
class Lens:
    """A pinhole's intrinsics [3, 3] or [N, 3, 3]. size: (height, width) that they refer to.

    Without a size they are shares of an image of square pixels: of its width and height.
    """

    intrinsics: Tensor
    size: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Recording:
    """What a file says of a camera's path.

    poses: float64 [N, 3, 4], as its format has them. name: what an error calls them.
    lens: None where the file has none. names, times: of the poses, where they have some; times may
        be in any unit.
    problem: why its lens cannot be taken; whoever takes the default one needs not know.
    """

    poses: Tensor
    name: str
    lens: Lens | None = None
    names: tuple[str, ...] | None = None
    times: Tensor | None = None
    problem: CameraError | None = None


class CameraFile:
    """A file's bytes, as text, JSON or numbers where they are these.

    beside: the bytes of a file of another name in the same place, if there is one.
    """

    def __init__(
        self, name: str, data: bytes, beside: Callable[[str], bytes | None] = lambda _: None
    ) -> None:
        self.name, self.data, self.beside = printable(name), data, beside
        self.poses = f"{self.name}: poses"  # what an error calls them
        self.ending = name.rpartition(".")[2].lower() if "." in name else ""

    def refused(self, why: str) -> CameraError:
        return CameraError(f"{self.name}{why}")

    def bent(self, why: str) -> CameraError:
        """The error for a lens that is no pinhole's."""
        return self.refused(
            f": its lens is no pinhole's: {why}; take distortion out of the frames first, or take "
            "the default lens (option lens=default)"
        )

    @cached_property
    def text(self) -> str | None:
        """None if it is none. A byte order mark is no part of it."""
        encoding = next(
            (name for mark, name in _BYTE_ORDER_MARKS if self.data.startswith(mark)), ""
        )
        try:
            text = self.data.decode(encoding or "utf-8")
        except UnicodeDecodeError:
            return None
        return None if "\0" in text else text

    @cached_property
    def json(self) -> Any:
        """None if it is none.

        Raises:
            CameraError: it should be, by its ending or its beginning.
        """
        if not (self.ending == "json" or (self.text or "").lstrip()[:1] in ("{", "[")):
            return None
        if self.text is None:
            raise self.refused(f" is not valid JSON (it is no UTF-8 text): {EXPECTED}")
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise self.refused(f" is not valid JSON ({error}): {EXPECTED}") from error

    @cached_property
    def rows(self) -> list[Row]:
        """The lines of a text that hold something, comments and a link at their head apart."""
        found = []
        for number, line in enumerate((self.text or "").splitlines(), 1):
            words = line.strip()
            if words.replace(",", " ").strip() and not words.startswith("#") and "://" not in words:
                found.append(Row(number, words))
        return found

    @cached_property
    def table_rows(self) -> list[Row]:
        """The lines of a table of numbers, names of its columns apart; none if it is no table."""
        rows = self.rows
        if len(rows) > 1 and not any(map(is_number, rows[0].fields)):
            rows = rows[1:] if len(rows[1].fields) == len(rows[0].fields) else []
        return rows if rows and is_number(rows[0].fields[0]) else []

    def header(self) -> list[str]:
        """The names of a table's columns, if a line before its numbers has some."""
        first = self.table_rows[0].number if self.table_rows else 1
        lines = (self.text or "").splitlines()[: first - 1]
        names = lines[-1].strip().lstrip("#").strip() if lines else ""
        return re.split(r"\s*,\s*|\s+", names) if names else []

    def table(self) -> Tensor:
        """The numbers of a text's rows, all of one length: float64 [rows, columns]."""
        rows = self.table_rows
        per_pose = 4 if rows and len(rows[0].fields) == 4 else 1
        self.check_count(math.ceil(len(rows) / per_pose))
        values: list[list[float]] = []
        for row in rows:
            values.append(self.floats(row.fields, f"line {row.number}"))
            if len(values[-1]) != len(values[0]):
                raise self.refused(
                    f": line {row.number} holds {len(values[-1])} numbers, the first "
                    f"{len(values[0])}; a line is one pose, all are of one length"
                )
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    def floats(self, words: Sequence[str], where: str) -> list[float]:
        try:
            # float itself takes 1_0 too
            if any("_" in word for word in words):
                raise ValueError
            return [float(word) for word in words]
        except ValueError:
            wrong = next((word for word in words if not is_number(word)), words[0])
            raise self.refused(f": {where} must hold numbers, got {wrong[:40]!r}") from None

    def check_count(self, count: int) -> None:
        if count > MAX_POSES:
            raise self.refused(
                f" has {count:,} poses; at most {MAX_POSES:,} are read: leave some out"
            )
        if not count:
            raise self.refused(" has no poses; a camera needs one pose per frame")


def printable(name: str) -> str:
    """A name from outside as a line of text can have it."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


class Row(NamedTuple):
    """A line of a text, numbered from 1."""

    number: int
    words: str

    @property
    def fields(self) -> list[str]:
        return self.words.replace(",", " ").split()


def is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return "_" not in word


def numbers(file: CameraFile, name: str, value: Any, shapes: tuple[str, ...]) -> Tensor:
    """A nested list of numbers as float64."""
    try:
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise file.refused(
            f": {name} must be numbers of shape {' or '.join(shapes)}; {error}"
        ) from error


def matrix_poses(file: CameraFile, matrices: Tensor) -> Tensor:
    """Poses [N, 3, 4] of matrices [N, 3, 4], [N, 4, 4], one of them, or rows of 12 or 16."""
    if matrices.ndim == 2 and tuple(matrices.shape) not in ((3, 4), (4, 4)):
        columns = matrices.shape[1]
        if columns in (12, 16):
            matrices = matrices.unflatten(1, (columns // 4, 4))
    if matrices.ndim == 2:
        matrices = matrices[None]
    if matrices.ndim != 3 or matrices.shape[1:] not in ((3, 4), (4, 4)) or not len(matrices):
        raise CameraError(
            f"{file.poses} must have shape [frames, 3, 4] or [frames, 4, 4], "
            f"got {list(matrices.shape)}"
        )
    file.check_count(len(matrices))
    if matrices.shape[1] == 4:
        last = matrices.new_tensor([0.0, 0.0, 0.0, 1.0])
        wrong = ((matrices[:, 3] - last).abs().amax(1) > 1e-4).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise CameraError(
                f"{file.poses}: the last row of a 4x4 pose must be 0 0 0 1 (column-vector "
                f"convention), got {matrices[at, 3].tolist()} at frame {at}; transpose the "
                "matrices?"
            )
    return matrices[:, :3]


def rotations(file: CameraFile, quaternions: Tensor) -> Tensor:
    """Rotations [N, 3, 3] of quaternions [N, 4], w x y z, of length 1 but for their digits."""
    lengths = quaternions.norm(dim=-1, keepdim=True)
    # false for NaN too
    wrong = (~((lengths[:, 0] - 1).abs() <= _WORST_QUATERNION)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise file.refused(
            f": the quaternion of frame {at} has length {float(lengths[at]):g}, not 1; "
            "is a column missing, or are they in another order?"
        )
    return quaternion_rotations(quaternions / lengths)


def pinhole(fx: float, fy: float, cx: float, cy: float) -> Tensor:
    rows = [[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def one_or_all(intrinsics: Tensor) -> Tensor:
    """Intrinsics [N, 3, 3], or [3, 3] where they are all one."""
    is_one = bool(torch.isclose(intrinsics, intrinsics[:1], equal_nan=True).all())
    return intrinsics[0] if is_one else intrinsics
