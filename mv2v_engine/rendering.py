"""Answers a list of requests in one session, and keeps its folder of results complete meanwhile.

A full disk does not end it: this process holds the only copy of what could not be written, so it
goes on and tries again after every turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from mv2v_engine import __version__
from mv2v_engine.engine.request import TurnRequest, camera_notes
from mv2v_engine.engine.results import ResultFolder
from mv2v_engine.engine.view_session import ViewSession
from mv2v_engine.errors import StorageError
from mv2v_engine.progress import CancelToken
from mv2v_engine.terminal import cancel_on_interrupt, say, turn_progress, turn_table

_ADVICE = "free some space and run the same command with --resume, which makes what is missing"


def render(
    session: ViewSession, requests: Sequence[TurnRequest], results: ResultFolder, *, is_quiet: bool
) -> StorageError | None:
    """Run the requests that the session has not answered; results are complete after each.

    Returns:
        what could not be written in the end; said on stderr.

    Raises:
        CancelledError, KeyboardInterrupt: interrupted; finished turns are kept, or said to be lost.
    """
    done, total = len(session.turns), len(requests)
    failure = None
    for words in session.lost:
        say(words)
    if not is_quiet:
        about = session.source.description
        print(f"source {about['name']}: {about['window']}; {about['crop']}")
        for words in about.get("notes", ()):
            print(f"note: {words}")
        for words in session.source.warnings:
            print(f"warning: {words}")
        for number, request in enumerate(requests, 1):
            for words in camera_notes(request.camera, session.engine.transformer.config):
                print(f"note: the camera of turn {number}, {request.camera.name}: {words}")
        if done:
            print(f"resumed after {done} finished turns")
    with cancel_on_interrupt() as cancel, _saying_what_is_lost(session):
        if done:
            failure = _publish(session, results, cancel, is_quiet=is_quiet)
        for number, request in enumerate(requests[done:], done + 1):
            title = f"turn {number}/{total} {request.camera.name}"
            shown = turn_progress(title, request.num_inference_steps)
            with nullcontext() if is_quiet else shown as show:
                for event in session.perform(request, cancel):
                    if show is not None:
                        show(event)
            failure = _publish(session, results, cancel, is_quiet=is_quiet)
    if not is_quiet:
        print("\n" + turn_table([turn.report for turn in session.turns]) + "\n")
        for words in session.turns[-1].report.get("approximations", ()):
            print(f"approximate: {words}")
    written = [*results.videos(session), results.overview, results.report]
    print(*(path for path in written if failure is None or path.exists()), sep="\n")
    if failure is not None:
        say(f"error: {failure}; {_ADVICE}")
    return failure


def _publish(
    session: ViewSession, results: ResultFolder, cancel: CancelToken, *, is_quiet: bool
) -> StorageError | None:
    """Write the results; returns what could not be, which the next call tries again."""
    try:
        results.publish(session, version=__version__, check=cancel.check)
    except StorageError as error:
        if not is_quiet:
            print(f"not written: {error}", flush=True)
        return error
    return None


@contextmanager
def _saying_what_is_lost(session: ViewSession) -> Iterator[None]:
    """If the block fails, store what the session still holds, or say that it goes."""
    is_through = False
    try:
        yield
        is_through = True
    finally:
        if not is_through:
            try:
                session.store_missing()
            except StorageError as error:
                numbers = ", ".join(str(turn.number) for turn in session.unstored)
                say(f"error: finished turns that are not kept: {numbers}; {error}; {_ADVICE}")
