"""The tensors that a step of a turn reads and writes, and its guidance branches.

The tensors are the turn's own, or those of captured steps: a step runs the same function on either,
so that a replayed step is an eager one bit for bit.

C latent channels, F H W latent grid, V camera tracks, S text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.errors import VideoError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.kept import ConditioningCache, TargetResidual
from mv2v_engine.models.merging import MergeRecord
from mv2v_engine.models.sample import Sample
from mv2v_engine.ops.finite import is_finite
from mv2v_engine.parallel.context import ContextGroup
from mv2v_engine.sampling.guidance import needs_guidance
from mv2v_engine.tokens.plan import TokenPlan
from mv2v_engine.vae import VideoVAE

Held = TypeVar("Held")
AnyBuffers = TypeVar("AnyBuffers", bound="Buffers")
Signature = tuple[tuple[tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The tensors that all steps of a turn share.

    latents: [1, C, F, H, W] per conditioning segment. cameras: [1, V, F, 12 or 16] or None.
    text, negative_text: [1, S, text_dim]; the latter only with guidance. source: [1, C, F, H, W]
    for a model that takes it on the target's channels, else None. image: [1, I, image_dim] for a
    model that reads image tokens, else None.
    """

    latents: Sequence[Tensor]
    cameras: Tensor | None
    text: Tensor
    negative_text: Tensor | None
    source: Tensor | None = None
    image: Tensor | None = None

    @property
    def texts(self) -> list[Tensor]:
        """The text of each guidance branch, the positive one first."""
        return [self.text] if self.negative_text is None else [self.text, self.negative_text]

    def at_scale(self, guidance_scale: float) -> Conditioning:
        """The same without text that guidance does not need."""
        return self if needs_guidance(guidance_scale) else replace(self, negative_text=None)


@dataclass(frozen=True, eq=False)
class Buffers:
    """The tensors of a step, which every step finds at the same addresses."""

    latents: Tensor

    def tensors(self) -> Iterator[Tensor]:
        """All tensors, in the order of the fields."""
        return _tensors(self)

    @property
    def signature(self) -> Signature:
        """Shapes and dtypes of all tensors: they tell the number of branches, and whether the step
        moves the latents."""
        return tuple((tuple(tensor.shape), tensor.dtype) for tensor in self.tensors())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def reserved(self: AnyBuffers, plan: TokenPlan) -> AnyBuffers:
        """Empty ones of the same signature, for steps of the plan."""
        return _mapped(self, partial(torch.empty_like, memory_format=torch.contiguous_format))

    def load(self: AnyBuffers, other: AnyBuffers) -> None:
        """Take another's values; its records are left out."""
        # records come last
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=False):
            mine.copy_(theirs)


@dataclass(frozen=True, eq=False)
class StepBuffers(Buffers):
    """A turn's.

    latents: float32 [1, C, F, H, W], moved in place. timestep, delta: [1], of the step.
    end_timestep: [1], where the step of a flow map goes; None of plain flow.
    guidance_scale, sigma: float32 [1], the latter the step's noise level. velocity: where the
    guided one is left [1, C, F, H, W], for a solver that moves the latents itself; None where the
    step does. finite_steps: int64 [1], the steps whose latents were finite: a number that is not
    finite stays so in every later step, so that this is also the index of the first bad step.
    records: where merges are written; None leaves them as the forward made them.
    """

    timestep: Tensor
    delta: Tensor
    guidance_scale: Tensor
    sigma: Tensor
    velocity: Tensor | None
    finite_steps: Tensor
    conditioning: Conditioning
    end_timestep: Tensor | None = None
    records: tuple[MergeRecord, ...] | None = None

    @classmethod
    def of_turn(
        cls,
        conditioning: Conditioning,
        noise: Tensor,
        guidance_scale: float,
        *,
        device: torch.device,
        moves_latents: bool,
        has_ends: bool,
    ) -> StepBuffers:
        """The turn's own tensors; text that guidance does not need is left out."""
        # a copy even where the noise lies right: it is moved in place
        latents = noise.to(device, torch.float32, copy=True)
        return cls(
            latents,
            torch.zeros(1, dtype=torch.float32, device=device),
            torch.zeros(1, dtype=torch.float32, device=device),
            torch.full((1,), guidance_scale, dtype=torch.float32, device=device),
            torch.zeros(1, dtype=torch.float32, device=device),
            None if moves_latents else torch.zeros_like(latents),
            torch.zeros(1, dtype=torch.int64, device=device),
            conditioning.at_scale(guidance_scale),
            torch.zeros(1, dtype=torch.float32, device=device) if has_ends else None,
        )

    @property
    def noisy(self) -> Tensor:
        """The target as a forward takes it [1, C_in, F, H, W]: a source on channels follows."""
        source = self.conditioning.source
        return self.latents if source is None else torch.cat([self.latents, source], dim=1)

    def reserved(self, plan: TokenPlan) -> StepBuffers:
        """Empty ones of the same signature, with a place for the plan's merges."""
        records = _record_buffers(plan, self.latents.device)
        return replace(super().reserved(plan), records=records)

    def count_finite(self) -> None:
        """Count a step whose latents are finite, on the device."""
        self.finite_steps.add_(is_finite(self.latents))

    def keep(self, records: Sequence[MergeRecord]) -> None:
        """Write what a forward merged into the records."""
        assert self.records is not None
        for mine, theirs in zip(self.records, records, strict=True):
            assert mine.step == theirs.step
            mine.merged.copy_(theirs.merged)
            mine.responsiveness.copy_(theirs.responsiveness)
            mine.frames.copy_(theirs.frames)


def _record_buffers(plan: TokenPlan, device: torch.device) -> tuple[MergeRecord, ...]:
    records = []
    for step in plan.merge_steps:
        merged = sum(group.num_merged for group in step.groups)
        conditioning = step.before.num_frames - step.before.runs[0].num_frames
        records.append(
            MergeRecord(
                step,
                torch.zeros(1, merged, dtype=torch.int64, device=device),
                torch.zeros(1, conditioning, dtype=torch.float32, device=device),
                torch.zeros(1, conditioning, dtype=torch.int64, device=device),
            )
        )
    return tuple(records)


def copied(records: Sequence[MergeRecord]) -> tuple[MergeRecord, ...]:
    """Records that no later step writes to."""
    return tuple(_mapped(record, torch.clone) for record in records)


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in buffers, and in what these hold."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Buffers | Conditioning | MergeRecord):
        for each in fields(value):
            yield from _tensors(getattr(value, each.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _mapped(value: Held, work: Callable[[Tensor], Tensor]) -> Held:
    """The same with other tensors in the places of those in it."""
    mapped: Any = value
    if isinstance(value, Tensor):
        mapped = work(value)
    elif isinstance(value, Buffers | Conditioning | MergeRecord):
        changes = {each.name: _mapped(getattr(value, each.name), work) for each in fields(value)}
        mapped = replace(value, **changes)
    elif isinstance(value, list | tuple):
        mapped = type(value)(_mapped(item, work) for item in value)
    return mapped  # type: ignore[no-any-return]


@dataclass(eq=False)
class Branch:
    """One guidance branch of a turn: its text, and what one forward leaves for later ones.

    cache: where the conditioning's K and V are kept, for all branches, since they depend on no
    text; None computes them in every forward. ranks: the processes that share a forward's tokens.
    residual: what the blocks added, for steps that run none; None where all do. records: the last
    whole forward's merges.
    """

    transformer: MV2VTransformer
    plan: TokenPlan
    conditioning: Conditioning
    text: Tensor
    cache: ConditioningCache | None
    ranks: ContextGroup | None = None
    residual: TargetResidual | None = None
    records: list[MergeRecord] = field(default_factory=list)

    @property
    def runs_target(self) -> bool:
        """Whether the next forward runs the target alone."""
        return self.cache is not None and self.cache.is_filled

    def sample(self, noisy: Tensor, timestep: Tensor, end: Tensor | None = None) -> Sample:
        """The next forward. noisy: the target as the model takes it, `StepBuffers.noisy`. end: the
        timestep to which a flow map's step goes."""
        if not self.runs_target:
            self.records.clear()
        return Sample(
            latents=[noisy, *self.conditioning.latents],
            timestep=timestep,
            encoder_hidden_states=self.text,
            plan=self.plan,
            cameras=self.conditioning.cameras,
            records=self.records,
            kept=self.cache,
            residual=self.residual,
            ranks=self.ranks,
            image=self.conditioning.image,
            end_timestep=end,
        )

    def skipped(self, noisy: Tensor, timestep: Tensor, end: Tensor | None = None) -> Tensor:
        """The velocity of a step that runs no block, after one that did."""
        assert self.residual is not None
        return self.transformer.forward_residual(
            noisy, timestep, plan=self.plan, residual=self.residual, end_timestep=end
        )

    def release(self) -> None:
        """Let go of what is kept."""
        for kept in (self.cache, self.residual):
            if kept is not None:
                kept.release()


def vace_context(
    vae: VideoVAE,
    frames: Tensor,
    mask: Tensor | None = None,
    *,
    whole: Tensor | None = None,
    references: Sequence[Tensor] = (),
    check: Callable[[], None] | None = None,
) -> Tensor:
    """What VACE's blocks are given of a source [2 C + S^2, R + F, H, W], S the VAE's stride.

    Where the mask is 1 the video is made anew, with what the source shows there as a hint; where
    it is 0 the source stays. Both are encoded apart, and the mask's pixels follow as channels. The
    R references stand before the frames as what stays.

    Args:
        frames: uint8 [T, height, width, 3].
        mask: [T, height, width], from 0.5 on what is made anew; None is all of it.
        whole: the latents of all frames, where they are known; read without a mask.
        references: latents [C, 1, H, W] of images.

    Raises:
        VideoError: a mask of another shape, or frames as `VideoVAE.encode` refuses them.
    """
    if mask is not None and mask.shape != frames.shape[:3]:
        raise VideoError(
            f"the mask must have shape {list(frames.shape[:3])}, one value a pixel of every frame, "
            f"got {list(mask.shape)}"
        )
    ones = torch.ones(frames.shape[:3], dtype=torch.float32, device=vae.device)
    chosen = ones if mask is None else (mask.to(vae.device).float() >= 0.5).float()
    pixels = frames.to(vae.device).permute(3, 0, 1, 2).float() / 127.5 - 1
    inactive = vae.encode_pixels(pixels * (1 - chosen), check=check)
    if mask is not None or whole is None:
        reactive = vae.encode_pixels(pixels * chosen, check=check)
    else:
        reactive = whole.to(vae.device)
    context = torch.cat([inactive, reactive, mask_channels(chosen, vae.spatial_stride, reactive)])
    blank = len(context) - len(inactive)
    before = [F.pad(each.to(context), (0, 0, 0, 0, 0, 0, 0, blank)) for each in references]
    return torch.cat([*before, context], 1)


def mask_channels(mask_THW: Tensor, stride: int, latents_CFHW: Tensor) -> Tensor:
    """The mask's pixels of every latent cell as channels [S^2, F, H, W], of the nearest frames."""
    cells = mask_THW.unflatten(2, (-1, stride)).unflatten(1, (-1, stride))
    channels = cells.permute(2, 4, 0, 1, 3).flatten(0, 1)[None]
    size = list(latents_CFHW.shape[1:])
    return F.interpolate(channels, size=size, mode="nearest-exact")[0]
