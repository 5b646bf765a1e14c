"""A window of a turn: what its steps are conditioned on, and its denoising run (METHOD 1).

C latent channels, F H W latent grid, D numbers of a descriptor.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor

from mv2v_engine.engine.budget import Budget
from mv2v_engine.engine.denoise import Denoised, Denoiser, StepDue, engine_denoiser
from mv2v_engine.engine.guides import Guides
from mv2v_engine.engine.parts import Parts
from mv2v_engine.engine.recall import EditRecall, Ranked, Recall, Recalled, ViewRecall
from mv2v_engine.engine.report import view_report, window_report
from mv2v_engine.engine.request import Request
from mv2v_engine.engine.source import LongSource, Source
from mv2v_engine.engine.step import Conditioning, vace_context
from mv2v_engine.engine.turn import Draft, KeptWindow, Turn
from mv2v_engine.finite import require_finite
from mv2v_engine.models.latent_rgb import LatentRGB
from mv2v_engine.progress import CancelToken, Event, Spans, staged
from mv2v_engine.sampling.flow_match import turn_noise
from mv2v_engine.tokens.plan import TokenPlan
from mv2v_engine.video.windows import EditWindow

Happening = TypeVar("Happening", bound="Event | StepDue")
Steps = Callable[[Denoiser, CancelToken], Generator[Happening, None, Denoised]]
# odd, so that the low bits, from which torch seeds, differ between the windows of an edit
_SEED_STEP = 0x9E3779B97F4A7C15


def window_seed(seed: int, number: int) -> int:
    """The seed of a window's noise, another one for every window; the first has the request's."""
    return (seed + number * _SEED_STEP) % 2**63


def plan_of(memory: Recall, request: Request, window: EditWindow, num_turns: int) -> TokenPlan:
    """The plan of a window, the longest one where its source is not read yet.

    num_turns: how many a session of views has.
    """
    if isinstance(memory, EditRecall):
        return memory.largest_plan(window)
    assert isinstance(memory, ViewRecall)
    return memory.rank(request, num_turns)[1]


@dataclass(frozen=True, eq=False)
class _Encoded:
    """What the model sees of a window's source.

    latents: [C, F, H, W]. frames: of them; None of a session of views that has its latents.
    references: latents [C, 1, H, W] of images. context: VACE's, beside the target.
    """

    latents: Tensor
    frames: Tensor | None = None
    references: Sequence[Tensor] = ()
    context: Tensor | None = None


class WindowRunner:
    """Runs the windows of one source, one at a time.

    source_latents: [C, F, H, W] of a session of views, which all its turns share; None until the
    first has encoded them. fitted: the colours that fit its latents best, of a VAE without any.
    """

    def __init__(
        self,
        parts: Parts,
        source: Source | LongSource,
        guides: Guides,
        source_latents: Tensor | None = None,
    ) -> None:
        self.parts, self.source, self.guides = parts, source, guides
        self.source_latents = source_latents
        self.fitted: LatentRGB | None = None
        self._source_image: Tensor | None = None

    def run(
        self,
        draft: Draft,
        window: EditWindow,
        memory: Recall,
        turns: Sequence[Turn],
        spans: Spans,
        cancel: CancelToken,
        steps: Steps[Happening],
        *,
        ranked: Ranked | None = None,
        previews: bool = False,
    ) -> Generator[Event | Happening, None, tuple[KeptWindow, Tensor | None]]:
        """One denoising run, with noise of its own; of a novel view the decoded frames, too.

        turns: the session's finished ones. ranked: what `memory` gave for this turn already.

        Raises:
            VideoError: its frames cannot be read.
            MemoryBudgetError: it cannot fit the device; nothing has run.
            NotFiniteError: a number that was computed is not finite.
            CancelledError: the token was set.
        """
        parts, request, budget = self.parts, draft.request, Budget(self.parts)
        cancel.check()
        if budget.limit() is not None:
            if isinstance(memory, ViewRecall):
                ranked = ranked or memory.rank(request, len(turns))
            budget.check(ranked[1] if ranked else plan_of(memory, request, window, len(turns)))
        seen = yield from self._encoded(window, spans, cancel)
        texts = yield from staged(
            spans,
            "text",
            lambda: parts.guidance_texts(
                request.prompt, request.guidance_scale, has_references=bool(seen.references)
            ),
        )
        cancel.check()
        with spans.stage("memory") as started:
            yield started
            recalled, descriptor, on_channels = self._recalled(
                request, window, seen, memory, turns, ranked
            )
            image = None if parts.image is None else self._image(request, turns)
        yield spans.done("memory")
        # VACE's references are frames of the target, too, before those that are kept
        shape = (1, len(seen.latents), *recalled.plan.target.grid)
        num_before = recalled.plan.target.num_frames - seen.latents.shape[1]
        noise, generator = turn_noise(shape, window_seed(request.seed, window.number))
        denoiser = engine_denoiser(
            parts,
            recalled.plan,
            Conditioning(recalled.latents, recalled.cameras, *texts, on_channels, image),
            noise,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=generator,
            previews=self.colours(seen.latents, seen.frames) if previews else None,
        )
        with spans.stage("sampling") as started:
            yield started
            denoised = yield from steps(denoiser, cancel)
        yield spans.done("sampling")
        made, retrieval = denoised.latents[:, num_before:].cpu(), recalled.retrieval
        if parts.is_editor:
            report = window_report(parts, window, denoiser, denoised, retrieval, spans)
            return KeptWindow(report, made, descriptor), None
        decode = partial(parts.vae.decode, made, check=cancel.check)
        frames = yield from staged(spans, "vae", decode)
        cancel.check()
        report = view_report(
            parts, request, denoiser, denoised, retrieval, spans, number=draft.number
        )
        report["warnings"] = list(self.source.warnings)
        return KeptWindow(report, made), frames

    def _encoded(
        self, window: EditWindow, spans: Spans, cancel: CancelToken
    ) -> Generator[Event, None, _Encoded]:
        """A window's source as the model sees it; that of a session of views is kept."""
        if self.source_latents is not None:
            return _Encoded(self.source_latents)
        parts, references, context = self.parts, list[Tensor](), None
        if isinstance(self.source, Source):
            frames = self.source.frames
        else:
            read = partial(self.source.window, window, cancel.check)
            frames = yield from staged(spans, "video", read)
            cancel.check()
        encode = partial(parts.vae.encode, frames, check=cancel.check)
        latents = yield from staged(spans, "vae", encode)
        if self.guides.images:
            refer = partial(self.guides.latents, parts.vae, cancel.check)
            references = yield from staged(spans, "vae", refer)
        if parts.transformer.config.vace_layers:
            mask = self.guides.mask
            given = partial(
                vace_context,
                parts.vae,
                frames,
                None if mask is None else mask.window(window, cancel.check),
                whole=latents,
                references=references,
                check=cancel.check,
            )
            context = yield from staged(spans, "vae", given)
        if not parts.is_editor:
            self.source_latents = latents
        cancel.check()
        return _Encoded(latents, frames, references, context)

    def _recalled(
        self,
        request: Request,
        window: EditWindow,
        seen: _Encoded,
        memory: Recall,
        turns: Sequence[Turn],
        ranked: Ranked | None,
    ) -> tuple[Recalled, Tensor | None, Tensor | None]:
        """What a window remembers; of an edit its descriptor [D], and what lies beside the target
        on its channels, [1, C, F, H, W]."""
        if not isinstance(memory, EditRecall):
            assert isinstance(memory, ViewRecall)
            return memory.recall(request, seen.latents, turns, ranked), None, None
        assert seen.frames is not None
        descriptor = self._described(seen.frames[: window.stop - window.start], seen.latents)
        recalled = memory.recall(window, descriptor, seen.latents, seen.references)
        if not self.parts.transformer.config.source_channels:
            return recalled, descriptor, None
        beside = seen.latents if seen.context is None else seen.context
        return recalled, descriptor, beside.to(self.parts.device)[None]

    def _image(self, request: Request, turns: Sequence[Turn]) -> Tensor:
        """Image tokens [1, I, D] of the source's first frame, which a turn may be itself."""
        assert self.parts.image is not None and isinstance(self.source, Source)
        if request.memory == "previous" and turns:
            return self.parts.image(turns[-1].frames[0])
        if self._source_image is None:
            self._source_image = self.parts.image(self.source.frames[0])
        return self._source_image

    def colours(self, latents: Tensor, frames: Tensor | None = None) -> LatentRGB:
        """The colours of the VAE's latents, or those that fit this source best.

        latents: [C, F, H, W] of these frames; without frames, of a source of views.
        """
        if self.parts.vae.latent_rgb is not None:
            return self.parts.vae.latent_rgb
        if self.fitted is None:
            if frames is None:
                assert isinstance(self.source, Source)
                frames = self.source.frames
            self.fitted = LatentRGB.fitted([(latents, frames)])
        return self.fitted

    def _described(self, frames: Tensor, latents: Tensor) -> Tensor:
        """The descriptor [D] of a window's source."""
        descriptor = self.parts.describer(frames, latents)
        require_finite(
            descriptor,
            "the numbers by which the window's source is compared",
            "copy the descriptor's weights again, or leave the descriptor out",
        )
        return descriptor
