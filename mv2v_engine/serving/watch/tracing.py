"""Traces by OpenTelemetry: a span for every job, and in it one for every stage, by its name.

Only the API is imported, and only if traces are asked for; where spans go is the business of the
SDK or agent that its user has set up (`OTEL_*`, `opentelemetry-distro`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from mv2v_engine.envs import traces_exporter
from mv2v_engine.errors import RequestError
from mv2v_engine.progress import watching_stages

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

# opens the span of a job: session's id, job's id
OpenJob = Callable[[str, str], AbstractContextManager[None]]


def open_traces() -> OpenJob:
    """What this process does about traces, by `OTEL_TRACES_EXPORTER`: nothing unless it is set.

    Raises:
        RequestError: it is set, and the API or what exports spans is not installed.
    """
    exporter = traces_exporter()
    if exporter is None:
        return lambda session, job: nullcontext()
    wanted = f"OTEL_TRACES_EXPORTER={exporter} asks for traces"
    advice = "pip install opentelemetry-distro and its exporter, or unset it"
    try:
        from opentelemetry import trace
    except ImportError as error:
        raise RequestError(f"{wanted}, and opentelemetry-api is not installed; {advice}") from error
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        for configurator in entry_points(group="opentelemetry_configurator"):
            configurator.load()().configure()
    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider):
        raise RequestError(f"{wanted}, and nothing is installed that exports spans; {advice}")
    return job_spans(provider)


def flush_traces(milliseconds: int = 2000) -> None:
    """Send the spans that still wait, for a process that ends without Python's own end."""
    if traces_exporter() is None:
        return
    from opentelemetry import trace

    # the SDK's alone can
    flush = getattr(trace.get_tracer_provider(), "force_flush", None)
    if flush is not None:
        flush(milliseconds)


def job_spans(provider: TracerProvider) -> OpenJob:
    """Spans of a provider's: the job's, with the ids, and its stages' as children of it."""
    from opentelemetry import trace

    from mv2v_engine import __version__

    tracer = provider.get_tracer("mv2v_engine", __version__)

    @contextmanager
    def open_job(session: str, job: str) -> Iterator[None]:
        attributes = {"mv2v.session": session, "mv2v.job": job}
        with _ended(tracer.start_span("job", attributes=attributes)) as parent:
            context = trace.set_span_in_context(parent)
            with watching_stages(lambda stage: _ended(tracer.start_span(stage, context))):
                yield

    return open_job


@contextmanager
def _ended(span: Span) -> Iterator[Span]:
    """End a span with the block. It is never the current one: stages end in any order."""
    from opentelemetry.trace import StatusCode

    try:
        yield span
    except BaseException as error:
        # its message may quote a prompt
        span.set_status(StatusCode.ERROR, type(error).__name__)
        raise
    finally:
        span.end()
