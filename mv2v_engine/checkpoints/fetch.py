"""From a name on a hub to a path here: what loading it needs, and nothing else of its repository.

A repository is first put up as a stand-in: its folders, every file of its full size but empty, and
of the files that tell what it is their JSON and their headers. What is found there is what would be
found in a copy, so that whatever can be refused is refused before gigabytes are fetched.
"""

from __future__ import annotations

import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from mv2v_engine.checkpoints.components import (
    PARTS,
    Components,
    find_components,
    named_components,
)
from mv2v_engine.checkpoints.detect import detect, indexed_files, weight_files
from mv2v_engine.checkpoints.gguf_files import MAGIC
from mv2v_engine.checkpoints.hub import (
    HubName,
    Repository,
    fetch_files,
    hub_name,
    note_revision,
    open_repository,
    read_part,
    say,
    shadowed,
)
from mv2v_engine.checkpoints.names import Renames
from mv2v_engine.checkpoints.resolve import resolve
from mv2v_engine.checkpoints.weights import WEIGHT_SUFFIXES, read_header
from mv2v_engine.errors import CheckpointError, DamagedFileError

# where JSON lies that tells what a checkpoint is; larger ones tell of tokenizers
_TELLING = ("", "transformer", "vae", "text_encoder", "scheduler", "..")
_MAX_JSON = 1 << 20
# bytes at a file's start, enough for most headers; and at a torch archive's end, for its directory
_HEAD = 1 << 20
# what stands before a record in an archive, with names and padding
_LOCAL_HEADER = 1 << 10
# bytes of a safetensors file's header at most, as its format says
_MAX_HEADER = 100_000_000
# bytes at a GGUF file's start; a text encoder's has its vocabulary before its tensors' names
_GGUF_HEAD = 16 << 20
# what a tokenizer's folder has for it, where other things lie there too
_OF_A_TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|.*\.model|vocab\..*|merges\.txt"
)
# names under which diffusers and transformers look for weights, in their order
_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)


@contextmanager
def headers_of(place: Path | str, *, with_components: bool = True) -> Iterator[Path | str]:
    """A path at which headers can be read: the place itself, of a hub name a stand-in for it.

    The stand-in is gone after the block, and holds no numbers. with_components: also what lies
    beside the transformer.

    Raises:
        CheckpointError: the hub does not give them, or no transformer can be told there.
    """
    bare, chosen = _split(place)
    name = hub_name(bare)
    if name is None:
        yield place
        return
    with _headers(open_repository(name), name, with_components=with_components) as (path, _):
        yield f"{path}{chosen}"


def fetch_checkpoint(
    place: Path | str,
    renames: Renames | None = None,
    *,
    with_components: bool = True,
    causal: bool = False,
    base: Path | str | None = None,
) -> tuple[Path | str, Path | str | None]:
    """The paths of a checkpoint and its base; of hub names, what loading needs is fetched.

    with_components: what lies beside the transformer, or beside its base, is loaded, too. causal,
    base: as `detect` takes them.

    Raises:
        CheckpointError: as `headers_of` and `Resolution.require_loadable`, and if a file does not
            arrive as it should.
        StorageError: the cache's disk has no room.
    """
    if base is not None:
        how = {"with_components": with_components, "causal": causal}
        with headers_of(place, with_components=False) as trained:
            base = _fetched(base, renames, trained=trained, **how)
        return fetch_file(place), base
    return _fetched(place, renames, with_components=with_components, causal=causal), None


def _fetched(
    place: Path | str,
    renames: Renames | None,
    *,
    with_components: bool,
    causal: bool,
    trained: Path | str | None = None,
) -> Path | str:
    """The path of a transformer. trained: headers of tensors that lie on it."""
    bare, chosen = _split(place)
    name = hub_name(bare)
    if name is None:
        if words := shadowed(bare):
            say(f"note: {words}")
        return place
    repository = open_repository(name)
    with _headers(repository, name, with_components=with_components) as (path, root):
        here = f"{path}{chosen}"
        what, base = (here, None) if trained is None else (trained, here)
        resolution = resolve(detect(what, renames, causal=causal, base=base))
        resolution.require_loadable()
        needed = [file for file in resolution.detected.files if file.is_relative_to(root)]
        if with_components:
            beside = [resolution.vae_path, resolution.text_path, resolution.tokenizer_path]
            needed += _of_components(*beside, resolution.image_path)
        paths = _inside(needed, root, repository)
    _fetch_whole(repository, paths)
    return f"{repository.folder / name.path}{chosen}"


def fetch_components(
    place: Path | str, parts: Sequence[str] = PARTS, *, has_image: bool = False
) -> Components:
    """VAE, text encoder and tokenizer, or `parts` of them, at a path or in a named repository.

    has_image: the image encoder, too, if there is one.

    Raises:
        CheckpointError, StorageError: as `find_components`, `require_all` and `fetch_checkpoint`.
    """
    name = hub_name(place)
    if name is None:
        if words := shadowed(place):
            say(f"note: {words}")
        found = find_components(Path(place))
        found.require_all(parts)
        return found
    repository = open_repository(name)
    with _stand_in(repository, name) as (path, root):
        _fill(repository, root, named_components(path))
        found = find_components(path)
        found.require_all(parts)
        places: dict[str, list[Path | None]] = {
            "vae": [vae for vae, _ in found.vaes],
            "text_encoder": [found.text_encoder],
            "tokenizer": [found.tokenizer],
        }
        needed = _of_components(*(each for part in parts for each in places[part]))
        if has_image and found.image_encoder is not None:
            needed += _of_components(found.image_encoder)
        paths = _inside(needed, root, repository)
    _fetch_whole(repository, paths)
    return find_components(repository.folder / name.path)


def fetch_file(place: Path | str) -> Path:
    """The path of one weight file; of a hub name it is fetched: what it names, or the only one.

    PEFT's settings of a LoRA are fetched with it.

    Raises:
        CheckpointError: the repository holds none or several, or the file does not arrive.
        StorageError: the cache's disk has no room.
    """
    name = hub_name(place)
    if name is None:
        return Path(place)
    repository = open_repository(name)
    path = name.path
    if path not in repository.files:
        within = f"{path}/" if path else ""
        there = [
            file
            for file in repository.files
            if file.startswith(within) and file.endswith(WEIGHT_SUFFIXES)
        ]
        if len(there) != 1:
            listed = ", ".join(there[:6]) or "none"
            raise CheckpointError(
                f"{name} holds {len(there)} weight files ({listed}); give one as "
                f"{name.repository}:FILE"
            )
        path = there[0]
    settings = str(PurePosixPath(path).with_name("adapter_config.json"))
    _fetch_whole(repository, [path, *({settings} & repository.files.keys())])
    return repository.folder / path


def _fetch_whole(repository: Repository, paths: Sequence[str]) -> None:
    fetch_files(repository, paths)
    note_revision(repository)


@contextmanager
def _headers(
    repository: Repository, name: HubName, *, with_components: bool
) -> Iterator[tuple[Path, Path]]:
    """A stand-in with the headers of a transformer's files, and of what lies beside it."""
    with _stand_in(repository, name) as (path, root):
        files = list(weight_files(path))
        if with_components:
            folder = path if path.is_dir() else path.parent
            files += named_components(folder.parent if folder.name == "transformer" else folder)
        _fill(repository, root, files)
        yield path, root


@contextmanager
def _stand_in(repository: Repository, name: HubName) -> Iterator[tuple[Path, Path]]:
    """The path that is named and its repository's root, in a folder that stands in for it.

    Errors within name the repository in place of the folder.
    """
    with tempfile.TemporaryDirectory(prefix="mv2v-hub-") as folder:
        above = Path(folder).resolve()
        root = above / name.repository
        for path, file in repository.files.items():
            place = root / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if cached := repository.cached(path):
                place.symlink_to(cached)
            else:
                with place.open("wb") as empty:
                    empty.truncate(file.size)
        named = root / name.path
        _fetch_json(repository, root, named if named.is_dir() else named.parent)
        try:
            yield named, root
        except CheckpointError as error:
            words = str(error).replace(f"{above}{os.sep}", "") + repository.caveat
            raise CheckpointError(words) from error


def _fetch_json(repository: Repository, root: Path, folder: Path) -> None:
    """Put the JSON there that tells what a folder is; all of it is needed, and small."""
    # a transformer's folder is told by what lies beside it, too
    tops = [folder, folder.parent] if folder.name == "transformer" else [folder]
    places = [Path(os.path.normpath(top / part)) for top in tops for part in _TELLING]
    paths = [
        path
        for path, file in repository.files.items()
        if path.endswith(".json") and file.size <= _MAX_JSON and (root / path).parent in places
    ]
    fetch_files(repository, paths)
    for path in paths:
        (root / path).unlink()
        (root / path).symlink_to(repository.folder / path)


def _fill(repository: Repository, root: Path, files: Iterable[Path]) -> None:
    """Read the headers of weight files into their stand-ins."""
    for file in files:
        path, size = file.relative_to(root).as_posix(), file.stat().st_size
        if file.is_symlink() or not size:  # all of it is there
            continue
        with file.open("r+b") as out:
            head = _put(repository, path, out, 0, min(size, _HEAD))
            if head.startswith(b"PK"):
                _put(repository, path, out, max(size - _HEAD, 0), min(size, _HEAD))
                places = _pickles(out)
            elif head.startswith(MAGIC):
                places = [(0, min(size, _GGUF_HEAD))]
            else:
                length = int.from_bytes(head[:8], "little")
                places = [(0, 8 + length)] if length <= min(size, _MAX_HEADER) else []
            for first, count in places:
                if first + count > _HEAD:
                    _put(repository, path, out, first, count)
        _compare_unreadable(repository, path, file)


def _compare_unreadable(repository: Repository, path: str, file: Path) -> None:
    """Fetch a file whole if its header cannot be read: its digest tells whether it is the hub's.

    A file that came wrong is refused as that, and not for what its header seems to be.
    """
    try:
        read_header(file)
    except DamagedFileError:
        fetch_files(repository, [path])
        file.unlink()
        file.symlink_to(repository.folder / path)
    except CheckpointError:
        pass  # its kind is known; its reader says what is wrong


def _put(repository: Repository, path: str, out: BinaryIO, first: int, count: int) -> bytes:
    """Some bytes of a file, which its stand-in has then."""
    part = read_part(repository, path, first, count)
    out.seek(first)
    out.write(part)
    return part


def _pickles(file: BinaryIO) -> list[tuple[int, int]]:
    """Where a torch archive has its pickle, and how long it is, by the directory at its end."""
    try:
        with zipfile.ZipFile(file) as archive:
            found = [each for each in archive.infolist() if each.filename.endswith("data.pkl")]
    except zipfile.BadZipFile:
        return []  # whoever reads it says so
    return [(each.header_offset, each.compress_size + _LOCAL_HEADER) for each in found]


def _of_components(*places: Path | None) -> list[Path]:
    """The files that loading components reads, each a file or a folder."""
    files: list[Path] = []
    for place in places:
        if place is None:
            continue
        if place.is_file():
            files.append(place)
            continue
        there = [path for path in sorted(place.iterdir()) if path.is_file()]
        weights = [path for path in there if path.suffix in WEIGHT_SUFFIXES]
        if (place / "tokenizer_config.json").is_file():
            files += [path for path in there if _OF_A_TOKENIZER.fullmatch(path.name)]
            continue
        files += [path for path in there if path.suffix == ".json"]
        for name in _WEIGHTS:
            index = place / f"{name}.index.json"
            if index.is_file():
                files += indexed_files(index)
            elif place / name in weights:
                files.append(place / name)
            else:
                continue
            break
        else:
            files += weights
    return files


def _inside(files: Iterable[Path], root: Path, repository: Repository) -> list[str]:
    """The files by their paths in the repository."""
    paths = [os.path.relpath(file, root).replace(os.sep, "/") for file in files]
    for path in paths:
        repository.require(path)
    return paths


def _split(place: Path | str) -> tuple[str, str]:
    """A place, and the mark and name of one of several models in it, "" without."""
    text = os.fspath(place)
    bare, mark, chosen = text.rpartition("#")
    return (bare, f"#{chosen}") if mark and hub_name(bare) is not None else (text, "")
