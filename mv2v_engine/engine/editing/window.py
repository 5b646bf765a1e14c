"""One window of an edit, from the source's frames to the edited latents.

It is one denoising run with noise of its own, the source's latents on the target's channels, and
the edited windows before it as memory.

C F H W latents.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from mv2v_engine.engine.buffers import Conditioning
from mv2v_engine.engine.denoisers import engine_denoiser
from mv2v_engine.engine.editing.edit import KeptWindow
from mv2v_engine.engine.editing.memory import SegmentMemory
from mv2v_engine.engine.editing.report import window_report
from mv2v_engine.engine.editing.request import EditRequest
from mv2v_engine.engine.editing.source import LongSource
from mv2v_engine.engine.overflow import guarded
from mv2v_engine.engine.prompts import guidance_texts
from mv2v_engine.engine.runner import denoise
from mv2v_engine.finite import require_finite
from mv2v_engine.progress import CancelToken, Event, Spans, staged
from mv2v_engine.sampling.flow_match import initial_noise
from mv2v_engine.video.windows import EditWindow

if TYPE_CHECKING:
    from mv2v_engine.engine.engine import Engine

# odd, so that the low bits, from which torch seeds, differ between the windows of an edit
_SEED_STEP = 0x9E3779B97F4A7C15


def window_seed(seed: int, number: int) -> int:
    """Of a window's noise, another one for every window; the first has the request's own."""
    return (seed + number * _SEED_STEP) % 2**63


def edit_window(
    engine: Engine,
    source: LongSource,
    request: EditRequest,
    window: EditWindow,
    memory: SegmentMemory,
    cancel: CancelToken,
) -> Generator[Event, None, KeptWindow]:
    """Run one window; what it made.

    Raises:
        VideoError: its frames cannot be read.
        MemoryBudgetError: it cannot fit the device, or the memory ended in the middle.
        NotFiniteError: a number that was computed is not finite.
        CancelledError: the token was set.
    """
    spans = Spans(engine.device)
    return (
        yield from guarded(
            engine,
            _stages(engine, source, request, window, memory, cancel, spans),
            spans,
            lambda: memory.largest_plan(window),
            outcome=f"window {window.number + 1} is dropped, finished ones are kept",
        )
    )


def _stages(
    engine: Engine,
    source: LongSource,
    request: EditRequest,
    window: EditWindow,
    memory: SegmentMemory,
    cancel: CancelToken,
    spans: Spans,
) -> Generator[Event, None, KeptWindow]:
    cancel.check()
    if engine.budget.limit() is not None:
        engine.budget.check(memory.largest_plan(window))
    frames = yield from staged(spans, "video", lambda: source.window(window, cancel.check))
    cancel.check()
    latents = yield from staged(spans, "vae", lambda: engine.vae.encode(frames, check=cancel.check))
    cancel.check()
    asked = (request.prompt, request.guidance_scale)
    texts = yield from staged(spans, "text", lambda: guidance_texts(engine, *asked))
    cancel.check()
    with spans.stage("memory") as started:
        yield started
        descriptor = engine.describer(frames[: window.stop - window.start], latents)
        require_finite(
            descriptor,
            "the numbers by which the window's source is compared",
            "copy the descriptor's weights again, or leave the descriptor out",
        )
        retrieval, plan, videos = memory.gather(window, descriptor)
    yield spans.done("memory")
    denoiser = engine_denoiser(
        engine,
        plan,
        Conditioning(videos, None, *texts, latents.to(engine.device)[None]),
        initial_noise((1, *latents.shape), window_seed(request.seed, window.number)),
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
    )
    with spans.stage("sampling") as started:
        yield started
        denoised = yield from denoise(denoiser, cancel)
    yield spans.done("sampling")
    report = window_report(engine, window, denoiser, denoised, retrieval, spans)
    return KeptWindow(report, descriptor, denoised.latents.cpu())
