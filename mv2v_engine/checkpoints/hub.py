"""Repositories of a model hub by name: what they hold, and files out of them, whole or absent.

A name is `owner/name`, with `@revision` (a branch, tag or commit), with `:path` of one file or
folder in it, or with both. Files lie in huggingface_hub's own cache, where other programs find
them too, and its variables say where that is and whom to ask: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT,
HF_TOKEN, HF_HUB_OFFLINE. A file gets its name there once its digest is the one that the hub lists;
until then it grows under `.incomplete`, where an interrupted transfer is taken up again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from mv2v_engine.checkpoints.weights import WEIGHT_SUFFIXES
from mv2v_engine.errors import CheckpointError, MV2VError, StorageError, nearest_names
from mv2v_engine.files import flush, move, replacing

_NAME = re.compile(
    r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@:]+))?(:(?P<path>[^:]+))?", re.ASCII
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHUNK = 1 << 20
# what the system answers where the cache lies, none of which the network can cause
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_ENTRY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository, a revision of it, and a file or folder in it; "" is all of it."""

    repository: str
    revision: str = "main"
    path: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return self.repository + revision + (f":{self.path}" if self.path else "")


@dataclass(frozen=True, slots=True)
class HubFile:
    """Its bytes, and its digest: SHA-256 of a large file, else git's SHA-1; "" if not told."""

    size: int
    sha256: str = ""
    git_sha1: str = ""


@dataclass(frozen=True)
class Repository:
    """What a repository holds at one commit. licence: by its card, "" where that says none.

    caveat: for errors, if the hub could not be asked and the cache alone tells what there is.
    """

    name: HubName
    commit: str
    files: Mapping[str, HubFile]
    licence: str = ""
    caveat: str = ""

    @property
    def folder(self) -> Path:
        """Where the cache has this commit's files by their names."""
        return _cache_folder(self.name.repository) / "snapshots" / self.commit

    def cached(self, path: str) -> Path | None:
        """A file if it has been fetched."""
        place = self.folder / path
        return place if place.is_file() else None

    def require(self, path: str) -> None:
        """Refuse the path of no file and no folder, "" apart.

        Raises:
            CheckpointError: with the paths that come near.
        """
        is_folder = any(file.startswith(f"{path}/") for file in self.files)
        if path and path not in self.files and not is_folder:
            near = nearest_names(path, self.files) if self.files else "it is empty"
            raise CheckpointError(
                f"{self.name.repository} holds no {path} at {self.name.revision} (commit "
                f"{self.commit[:8]}); nearest are {near}: correct the part behind the colon"
                f"{self.caveat}"
            )


def hub_name(place: Path | str) -> HubName | None:
    """The repository that a place names; None for what is a path.

    Whatever exists here is a path, and so is what ends as weight files do.
    """
    text = os.fspath(place).replace(os.sep, "/").rstrip("/")
    match = _NAME.fullmatch(text)
    if match is None or Path(text).expanduser().exists():
        return None
    name = HubName(match["repository"], match["revision"] or "main", match["path"] or "")
    is_file = not name.path and text.endswith((*WEIGHT_SUFFIXES, ".json"))
    # the hub has no names like these, and no path may lead out of its repository
    is_other = "--" in name.repository or ".." in text
    return None if is_file or is_other else name


def shadowed(place: Path | str) -> str | None:
    """A note for whoever gives a path that is also the name of a repository fetched before."""
    match = _NAME.fullmatch(os.fspath(place).replace(os.sep, "/"))
    if match is None or match["revision"] or match["path"] or not Path(place).exists():
        return None
    name = match["repository"]
    if not _cache_folder(name).is_dir():
        return None
    return f"{name} is the one in this folder; {name}@main is the hub's, which is in the cache"


def open_repository(name: HubName) -> Repository:
    """What a repository holds: by the hub, or by the cache alone where the hub may not be asked.

    Raises:
        CheckpointError: it cannot be reached, is unknown, gated, or lacks the path that is named.
    """
    repository = _opened(name.repository, name.revision)
    repository.require(name.path)
    return repository


@lru_cache(maxsize=32)  # a command asks several times, and means one commit
def _opened(repository: str, revision: str) -> Repository:
    from huggingface_hub import HfApi, constants, errors

    name = HubName(repository, revision)
    try:
        with _told(name):
            asked = None if revision == "main" else revision
            info = HfApi().model_info(
                repository,
                revision=asked,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                files_metadata=True,
            )
    except CheckpointError as error:
        cause = error.__cause__
        is_offline = isinstance(cause, errors.OfflineModeIsEnabled)
        answered = isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code < 500
        is_away = is_offline or not answered
        found = _from_cache(name) if is_away else None
        if found is None:
            raise
        if not is_offline:
            say(f"note: {error}; going on with commit {found.commit[:8]} of the cache")
        return found
    if info.sha is None:
        raise CheckpointError(f"{_endpoint()} tells no commit of {name}; expected a model hub")
    files = {file.rfilename: _file(file) for file in info.siblings or ()}
    if outside := [path for path in files if path.startswith("/") or ".." in path.split("/")]:
        raise CheckpointError(f"{name} lists {outside[0]}, which is no path in a repository")
    return Repository(name, info.sha, files, _licence(info))


def _file(sibling: Any) -> HubFile:
    sha256 = sibling.lfs.sha256 if sibling.lfs is not None else ""
    return HubFile(sibling.size or 0, sha256, sibling.blob_id or "")


def _licence(info: Any) -> str:
    """The licence by the card's own words: its id, or the name that it gives to another's."""
    card = info.card_data.to_dict() if info.card_data is not None else {}
    words = [card.get("license"), card.get("license_name"), card.get("license_link")]
    if not words[0]:
        words = [tag.removeprefix("license:") for tag in info.tags or () if "license:" in tag]
    return ", ".join(str(word) for word in words if word)


def _from_cache(name: HubName) -> Repository | None:
    """What the cache has of a revision, if anything that was asked of it came to its end."""
    folder, commit = _cache_folder(name.repository), name.revision
    try:
        if not _COMMIT.fullmatch(commit):
            commit = (folder / "refs" / commit).read_text(encoding="utf-8").strip()
        place = folder / "snapshots" / commit
        files = {
            path.relative_to(place).as_posix(): HubFile(path.stat().st_size)
            for path in sorted(place.rglob("*"))
            if path.is_file()
        }
    except OSError:
        return None
    caveat = "; this is what the cache has, the hub was not asked"
    return Repository(name, commit, files, caveat=caveat) if files else None


def fetch_files(repository: Repository, paths: Iterable[str]) -> None:
    """Have files in the cache, all of them or an error; says what is fetched, its size and licence.

    Raises:
        CheckpointError: the hub does not give one, or another than it lists.
        StorageError: the cache's disk has no room for them, or cannot be written.
    """
    missing = [path for path in dict.fromkeys(paths) if repository.cached(path) is None]
    name = repository.name
    sizes = {path: repository.files[path].size for path in missing}
    if any(size > _CHUNK for size in sizes.values()):
        _require_room(repository, sizes)
        licence = repository.licence or "not told by its card"
        count = f"{len(missing)} file{'s' * (len(missing) > 1)}"
        say(
            f"{name.repository} (commit {repository.commit[:8]}): fetching {count}, "
            f"{size_words(sum(sizes.values()))}, into {_cache_folder(name.repository)}; "
            f"licence: {licence}"
        )
    for path in missing:
        if sizes[path] > _CHUNK:
            say(f"  {path}, {size_words(sizes[path])}")
        with _told(name):
            _fetch(repository, path)


def note_revision(repository: Repository) -> None:
    """Write down which commit a branch or tag was, once all that was asked of it is there.

    When the hub cannot be asked, that is what the cache has of it.

    Raises:
        StorageError: the cache cannot be written.
    """
    name, revision = repository.name.repository, repository.name.revision
    if _COMMIT.fullmatch(revision) or repository.caveat:
        return
    place = _cache_folder(name) / "refs" / revision
    # a cache that has it may be one that nobody can write
    if not (place.is_file() and place.read_text(encoding="utf-8").strip() == repository.commit):
        with replacing(place) as temporary:
            temporary.write_text(repository.commit, encoding="utf-8")


def read_part(repository: Repository, path: str, first: int, count: int) -> bytes:
    """Some bytes of a file, by a request for these alone.

    Raises:
        CheckpointError: the hub does not give them.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        get_session,
        hf_raise_for_status,
    )

    with _told(repository.name):
        headers = {**_headers(), "Range": f"bytes={first}-{first + count - 1}"}
        patience = constants.HF_HUB_DOWNLOAD_TIMEOUT
        response = get_session().get(_url(repository, path), headers=headers, timeout=patience)
        hf_raise_for_status(response)
    # a server that knows no ranges sends all
    content: bytes = response.content
    return content if response.status_code == 206 else content[first : first + count]


def size_words(count: int) -> str:
    """Bytes as people say them."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} bytes"


def _fetch(repository: Repository, path: str) -> None:
    """One file: its content under its digest, then its name, both where the library keeps them."""
    from huggingface_hub import hf_hub_download

    repository_id, file = repository.name.repository, repository.files[path]
    if digest := file.sha256 or file.git_sha1:
        _fetch_content(repository, path, digest)
    # where the content is there already, the library links its name and asks for its head alone
    hf_hub_download(repository_id, path, revision=repository.commit)


def _fetch_content(repository: Repository, path: str, digest: str) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    file, folder = repository.files[path], _cache_folder(repository.name.repository)
    content = folder / "blobs" / digest
    lock = folder.parent / ".locks" / folder.name / f"{digest}.lock"
    for place in (lock.parent, content.parent):
        place.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(str(lock)):
        if content.exists():
            return
        partial = content.with_name(f"{digest}.incomplete")
        is_kept = False
        try:
            with partial.open("ab") as out:
                done = out.tell()
                if done > file.size:
                    out.truncate(0)
                    done = 0
                is_kept = True
                http_get(
                    _url(repository, path),
                    out,
                    resume_size=done,
                    headers=_headers(),
                    expected_size=file.size,
                    displayed_filename=path,
                )
            is_kept = False
            _require_digest(repository, path, partial)
            flush(partial)
            move(partial, content)
        except OSError as error:
            is_kept = is_kept and error.errno not in _NO_ROOM
            raise
        finally:
            if partial.exists() and (not is_kept or not partial.stat().st_size):
                partial.unlink()


def _require_digest(repository: Repository, path: str, place: Path) -> None:
    """Refuse content that is not what the hub lists.

    Raises:
        CheckpointError: with both digests.
    """
    file = repository.files[path]
    if file.sha256:
        kind, expected, digest = "SHA-256", file.sha256, hashlib.sha256()
    else:
        kind, expected = "git SHA-1", file.git_sha1
        digest = hashlib.sha1(f"blob {place.stat().st_size}\0".encode(), usedforsecurity=False)
    with place.open("rb") as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise CheckpointError(
            f"{path} of {repository.name.repository} came with {kind} {digest.hexdigest()}, "
            f"expected {expected}, and was removed; fetch it again, and if that gives the same, "
            f"{_endpoint()} serves another file than it lists"
        )


def _require_room(repository: Repository, sizes: Mapping[str, int]) -> None:
    """Ask for the disk space before anything is fetched.

    Raises:
        StorageError: there is too little.
    """
    folder = _cache_folder(repository.name.repository)
    needed = 0
    for path, size in sizes.items():
        file = repository.files[path]
        partial = folder / "blobs" / f"{file.sha256 or file.git_sha1}.incomplete"
        whole = partial.with_suffix("")
        there = next((p.stat().st_size for p in (whole, partial) if p.exists()), 0)
        needed += max(size - there, 0)
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise StorageError(
            f"{repository.name} needs {size_words(needed)} more on the disk of {folder.parent}, "
            f"where {size_words(free)} are free; make room, or set HF_HOME to a larger disk"
        )


@contextmanager
def _told(name: HubName) -> Iterator[None]:
    """Tell the library's errors in one line each, with what to do."""
    from huggingface_hub import errors, get_token

    # the base error of the HTTP client that this version of the library has
    of_transport = cast(type[Exception], errors.HfHubHTTPError.__mro__[1])
    where = f"{_endpoint()}/{name.repository}"
    try:
        yield
    except MV2VError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise CheckpointError(
            f"{name} is not a file or folder here, HF_HUB_OFFLINE forbids to ask a hub for it, and "
            f"the cache {_cache_folder(name.repository).parent} has no whole copy; unset the "
            "variable, set HF_HOME to a cache that has it, or give a path"
        ) from error
    except errors.GatedRepoError as error:
        token = "the token given was not let in" if get_token() else "no token was given"
        raise CheckpointError(
            f"{name} is gated, {token}; accept its licence at {where} and set HF_TOKEN to a token "
            "of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name.repository} is neither a file or folder here nor a repository of "
            f"{_endpoint()}, or it is a private one; correct the name, or set HF_TOKEN to a token "
            "that may read it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{where} has no revision {name.revision!r}; expected a branch, a tag or a commit "
            "behind the @, or leave it out for main"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(_unreachable(name, error.__cause__ or error)) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = "the token in HF_TOKEN is not valid, correct it" if status == 401 else "try later"
        raise CheckpointError(
            f"{where} answered with status {status}; expected its files: {advice}, or set "
            "HF_ENDPOINT to a mirror"
        ) from error
    # the last two are of an answer that is none of a hub's, or of a name that none can have
    except (OSError, of_transport, ValueError, KeyError) as error:
        if isinstance(error, OSError) and error.errno in (*_NO_ROOM, *_NO_ENTRY):
            advice = "make room" if error.errno in _NO_ROOM else "allow it"
            raise StorageError(
                f"cannot write {name} into {_cache_folder(name.repository).parent}: "
                f"{error.strerror}; nothing unfinished was left: {advice}, or set HF_HOME to "
                "another disk"
            ) from error
        raise CheckpointError(_unreachable(name, error)) from error


def _unreachable(name: HubName, error: BaseException) -> str:
    reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    return (
        f"{name} is not a file or folder here, and {_endpoint()} cannot be reached for it or broke "
        f"off ({reason}); check the network, set HF_ENDPOINT to a mirror, or give a path: what has "
        "been fetched is kept and taken up again"
    )


def _url(repository: Repository, path: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repository.name.repository, path, revision=repository.commit)


def _headers() -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    # lengths are of the files themselves only where nothing is compressed on the way
    return {**build_hf_headers(), "Accept-Encoding": "identity"}


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _cache_folder(repository: str) -> Path:
    """Where the library's cache has everything of a repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")


def say(words: str) -> None:
    """A line for whoever waits."""
    print(words, file=sys.stderr, flush=True)
