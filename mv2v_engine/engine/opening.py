"""How a session is opened: its source is read, its folder taken up, its identity compared."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mv2v_engine import arguments
from mv2v_engine.camera.files import Camera, resolve_camera
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.engine.editing.session import EditSession
from mv2v_engine.engine.editing.source import open_long_source
from mv2v_engine.engine.editing.store import EditStore
from mv2v_engine.engine.knowledge import source_warnings
from mv2v_engine.engine.request import require_editing, require_novel_view
from mv2v_engine.engine.source import AnySource, Source, load_source
from mv2v_engine.engine.store import SessionFolder, SessionStore
from mv2v_engine.engine.view_session import ViewSession
from mv2v_engine.errors import RequestError, StorageError
from mv2v_engine.finite import require_finite
from mv2v_engine.locks import WriterLock
from mv2v_engine.progress import CancelToken, cancel_token
from mv2v_engine.video.shots import find_cuts

if TYPE_CHECKING:
    from mv2v_engine.engine.engine import Engine


def open_view_session(
    engine: Engine,
    source: AnySource | Source,
    *,
    id: str | None = None,
    fps: float | None = None,
    cameras: Camera | None = None,
    store: Path | str | None = None,
    window: str | int | None = None,
    resume: bool = False,
    is_locked: bool = False,
    source_latents: Tensor | None = None,
    cancel: CancelToken | None = None,
) -> ViewSession:
    """As `Engine.view_session`. is_locked: the caller keeps other writers out of the folder."""
    require_novel_view(engine.transformer.config, engine.checkpoint.name)
    sampling, given = engine.sampling, _checked(id, store, resume)
    camera = None
    if cameras is not None:
        camera = resolve_camera(cameras, sampling.num_frames, sampling.size, is_source=True)
    if isinstance(source, Source):
        loaded = source
    else:
        loaded = load_source(
            source,
            num_frames=sampling.num_frames,
            size=sampling.size,
            window=window,
            fps=fps,
            max_pixels=engine.config.max_source_pixels,
            alpha=engine.config.source_alpha,
            fit=engine.config.source_fit,
            own_fps=sampling.fps,
            check=None if cancel is None else cancel.check,
        )
    warnings = source_warnings(engine.checkpoint, engine.vae, loaded.frames[0])
    loaded = replace(loaded, warnings=warnings)
    if camera is not None:
        loaded = loaded.noting(f"its camera: {words}" for words in camera.notes)
    expected = engine.vae.latent_shape(sampling.num_frames, sampling.size)
    if source_latents is not None:
        arguments.instance("source_latents", source_latents, Tensor, "a tensor, or None")
        if tuple(source_latents.shape) != expected:
            raise RequestError(
                f"source_latents must have shape {list(expected)}, got "
                f"{list(source_latents.shape)}; encode the source with this engine's vae"
            )
        require_finite(source_latents, "source_latents", "encode the source with this engine's vae")
    folder = None if given is None else SessionStore(given)
    with _kept_for_one(folder, resume=resume, is_locked=is_locked) as lock:
        manifest = folder.read() if folder is not None and resume else None
        session = ViewSession(
            engine,
            loaded,
            id=id or (manifest["id"] if manifest else new_id()),
            cameras=camera,
            store=folder,
            lock=lock,
            source_latents=source_latents,
        )
        if folder is not None:
            identity = session_identity(loaded, engine.checkpoint.name, camera)
            identity["vae"] = engine.vae.key
            if manifest is None:
                folder.create(session.id, identity)
            else:
                folder.check_identity(manifest, identity)
                session.restore()
    return session


def open_edit_session(
    engine: Engine,
    source: AnySource,
    *,
    id: str | None = None,
    fps: float | None = None,
    cuts: Sequence[int] | None = None,
    store: Path | str | None = None,
    resume: bool = False,
    is_locked: bool = False,
    cancel: CancelToken | None = None,
) -> EditSession:
    """As `Engine.edit_session`. is_locked: the caller keeps other writers out of the folder."""
    name, sampling = engine.checkpoint.name, engine.sampling
    given = _checked(id, store, resume)
    cancel = cancel_token(cancel)
    if cuts is not None:
        cuts = _frame_numbers(cuts)
    require_editing(engine.transformer.config, name)
    if engine.text is None:
        raise RequestError(
            f"{name} has no text encoder, and an edit needs its instruction read; give the folder "
            "that has text_encoder and tokenizer"
        )
    if engine.config.memory_ranking != "fov":
        raise RequestError(
            f"memory_ranking={engine.config.memory_ranking!r} draws novel views; an edit's windows "
            "are ranked by their sources: leave it out"
        )
    check = None if cancel is None else cancel.check
    video = open_long_source(
        source,
        size=sampling.size,
        fps=fps,
        own_fps=sampling.fps,
        max_pixels=engine.config.max_source_pixels,
        alpha=engine.config.source_alpha,
        fit=engine.config.source_fit,
        check=check,
    )
    video.warnings = source_warnings(engine.checkpoint, engine.vae, video.read([0])[0])
    folder = None if given is None else EditStore(given)
    identity: dict[str, Any] = {}
    manifest = None
    with _kept_for_one(folder, resume=resume, is_locked=is_locked) as lock:
        if folder is not None:
            identity = {
                "source": video.fingerprint,
                "checkpoint": name,
                "vae": engine.vae.key,
                "descriptor": engine.describer.key,
            }
            if resume:
                manifest = folder.read()
                folder.check_identity(manifest, identity)
                # found once, they are what the finished windows follow
                cuts = manifest["identity"].get("cuts") if cuts is None else cuts
        if cuts is None:
            cuts = find_cuts(video.frames(check=check), video.fps)
        cuts = list(cuts)
        session = EditSession(
            engine,
            video,
            id=id or (manifest["id"] if manifest else new_id()),
            cuts=cuts,
            store=folder,
            lock=lock,
        )
        if folder is not None and manifest is None:
            folder.create(session.id, identity | {"cuts": cuts})
        elif folder is not None and manifest is not None:
            folder.check_identity(manifest, {"cuts": cuts})
            if folder.is_writable:
                folder.remove_unfinished()
            session.restore()
    return session


def session_identity(
    source: Source, checkpoint: str, cameras: CameraTrajectory | None
) -> dict[str, str]:
    """The part of a session's identity that is known before the weights are loaded."""
    return {
        "source": source.fingerprint,
        "source camera": cameras.name if cameras else "static",
        "checkpoint": checkpoint,
    }


def _checked(id: str | None, store: Path | str | None, resume: bool) -> Path | None:
    """The session's folder, if it has one.

    Raises:
        RequestError: an argument of another type.
    """
    if id is not None:
        arguments.text("id", id)
    arguments.flag("resume", resume)
    return None if store is None else arguments.path("store", store, "the path of a folder")


def _frame_numbers(cuts: Sequence[int]) -> list[int]:
    """First frames of shots, as a caller gives them.

    Raises:
        RequestError: they are no sequence of integers.
    """
    if isinstance(cuts, str | bytes) or not isinstance(cuts, Iterable):
        raise arguments.mistaken("cuts", cuts, "a sequence of frame numbers, or None")
    return [arguments.integer(f"cuts[{place}]", cut) for place, cut in enumerate(cuts)]


def new_id() -> str:
    """Of a session that was given none."""
    return uuid.uuid4().hex[:12]


@contextmanager
def _kept_for_one(
    folder: SessionFolder | None, *, resume: bool, is_locked: bool
) -> Iterator[WriterLock | None]:
    """Open a folder under the lock of its one writer, which is let go of if the block fails.

    A folder on a read-only disk is resumed without one: its turns can be read, and no new one is
    stored.

    Raises:
        RequestError: there is no folder to resume.
        StorageError: another session has it open, it does not hold what is to be resumed, or it
            holds a session already.
    """
    lock = None
    if folder is None:
        if resume:
            raise RequestError("resume needs the session's folder: give a store")
    elif not resume or folder.exists():
        lock = None if is_locked or (resume and not folder.is_writable) else folder.lock()
    try:
        if folder is not None and folder.exists() != resume:
            found = "already holds a session" if folder.exists() else "holds no session"
            advice = "resume it, or choose another folder" if folder.exists() else "start one there"
            raise StorageError(f"{folder.folder} {found}; {advice}")
        yield lock
    except BaseException:
        if lock is not None:
            lock.release()
        raise
