"""Files that are whole or absent: written under a temporary name in place, flushed, then renamed.

What has returned here is on the disk: its bytes, its name and the folders above it outlive the
machine's power, not only the process.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mv2v_engine.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

# what file systems answer that know no flushing of folders
_CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
_CHUNK = 1 << 20


def require_writable(folder: Path) -> None:
    """Try to write in a folder, or in what it would be made in; leaves nothing.

    Raises:
        StorageError: that is not possible.
    """
    try:
        place = folder.absolute()
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise StorageError(
            f"cannot write into {folder}: {error.strerror}; choose another folder"
        ) from error


def flush(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk.

    A file system that cannot flush folders keeps their names by its own rules: no error.

    Raises:
        OSError: the disk does not take them.
    """
    is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    if is_folder and sys.platform == "win32":
        return  # folders cannot be opened there
    file = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(file)
    except OSError as error:
        if not is_folder or error.errno not in _CANNOT_FLUSH:
            raise
    finally:
        os.close(file)


def make_folder(path: Path) -> list[Path]:
    """Make a folder and those above it that are missing, and flush what names them.

    Returns:
        the folders that were made, from the top down.

    Raises:
        OSError: it cannot be made.
    """
    missing: list[Path] = []
    place = path.absolute()
    while not place.exists():
        missing.append(place)
        place = place.parent
    path.mkdir(parents=True, exist_ok=True)
    missing.reverse()
    for folder in missing:
        flush(folder.parent)
    return missing


def move(source: Path, target: Path) -> None:
    """Give a file or folder another name, and flush the folder that names it now.

    A file that has the name is replaced.

    Raises:
        OSError: it cannot be done.
    """
    source.replace(target)
    flush(target.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path of the same suffix; rename it to `path` if the block succeeds.

    Both the bytes and the name are on the disk when the block has ended.

    Raises:
        StorageError: the disk is full, fails, or the folder cannot be written; `path` is what it
            was or, if the disk failed in the last moment, the new file.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        make_folder(path.parent)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix
        )
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp makes private files; results should have the permissions of ordinary ones
        umask = os.umask(0)
        os.umask(umask)
        flush(temporary)
        temporary.chmod(0o666 & ~umask)
        move(temporary, path)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        reason = error.strerror or str(error)
        raise StorageError(f"cannot write {path}: {reason}; choose another place") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_matching(folders: Iterable[Path], names: re.Pattern[str]) -> None:
    """Remove files of these names, as `replacing` leaves them when its process is killed."""
    for folder in folders:
        for path in folder.iterdir() if folder.is_dir() else ():
            if names.fullmatch(path.name):
                path.unlink(missing_ok=True)


def remove_empty(*folders: Path) -> None:
    """Remove folders in which nothing lies, in this order."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def copy_file(source: Path | str, target: Path | str) -> None:
    """Copy a file's bytes; the copy is whole or absent, as `replacing` writes it.

    Raises:
        StorageError: as `replacing`.
    """
    with replacing(Path(target)) as temporary:
        shutil.copyfile(source, temporary)


def share_file(source: Path, target: Path) -> None:
    """Give a file that is only ever replaced a second place: a link, or a copy where none can be.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the place cannot be written.
    """
    source.stat()  # a missing one is told as what it is
    make_folder(target.parent)
    try:
        os.link(source, target)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError:
        copy_file(source, target)
    else:
        flush(target)
        flush(target.parent)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, str(temporary), metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            # whoever is told of a full disk looks at the system's number, which is in its words
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise StorageError(f"cannot write {path}: {error}; choose another place") from error
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def tensor_digest(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' types, shapes and bits."""
    import torch

    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    for chunk in chunks_of(path):
        digest.update(chunk)
    return digest.hexdigest()


def chunks_of(path: Path) -> Iterator[bytes]:
    """A file's bytes, piece by piece. Raises OSError."""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def by_number(name: str) -> list[tuple[int, str]]:
    """A key by which frame2 comes before frame10; a number is told by its length, then digits."""
    parts = re.split(r"([0-9]+)", name)
    return [
        (len(part.lstrip("0")), part.lstrip("0")) if place % 2 else (-1, part)
        for place, part in enumerate(parts)
    ]


def save_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    with replacing(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8")
