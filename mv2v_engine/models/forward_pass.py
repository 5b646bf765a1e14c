"""A transformer's forward between two of its blocks, and what it is given.

`MV2VTransformer.begin`, `run_blocks` and `finish` are a forward in parts: whoever measures
something on the way can let it go on as another kind of forward.

B batch, L tokens, S text tokens, C width, V camera tracks, F H W latent grid, P numbers of a
camera.
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from dataclasses import dataclass

from torch import Tensor

from mv2v_engine.models.static_cache import ConditioningCache
from mv2v_engine.models.token_merge import Sequence
from mv2v_engine.tokens.plan import TokenPlan


class TargetResidual:
    """What a forward's blocks added to the target's tokens, [B, L, C]."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def read(self) -> Tensor:
        """The residual of the last forward.

        Raises:
            ValueError: no forward has left one.
        """
        if self.value is None:
            raise ValueError("no forward has left a residual; run forward(..., residual=) first")
        return self.value

    def release(self) -> None:
        self.value = None


@dataclass(eq=False)
class ForwardPass:
    """A forward under way.

    sequence: the tokens that enter block `depth`. temb [B, C] and temb_6 [B, 6, C]: timestep, of
    every sample or, where the sequence has rows, of every target frame of each;
    static_temb: at t = 0, of static conditioning. context [B, S, C]. rows [B, F, P]: cameras of
    the frame table. keep: receives the conditioning's K and V of every block; kept: theirs are
    taken from here, and the sequence is the target alone.
    """

    plan: TokenPlan
    sequence: Sequence
    temb: Tensor
    temb_6: Tensor
    static_temb: Tensor | None
    context: Tensor
    rows: Tensor | None
    keep: ConditioningCache | None = None
    kept: ConditioningCache | None = None
    depth: int = 0
    _residual: TargetResidual | None = None
    _embedded: Tensor | None = None

    @property
    def is_merging(self) -> bool:
        """Whether the merging blocks have anything to do; what is kept has merged before."""
        return self.plan.merge != "off" and self.kept is None

    def keep_in(self, cache: ConditioningCache) -> None:
        """Keep the conditioning's K and V of the blocks to come."""
        cache.start(self.plan, self.rows)
        self.keep = cache

    def leave_in(self, residual: TargetResidual) -> None:
        """Remember the target's tokens as they are now, before the first block."""
        # a view would hold the whole sequence's tokens until the last block
        self._embedded = self.sequence.x[:, : self.sequence.target_length].clone()
        self._residual = residual

    def fill_residual(self, hidden_BLC: Tensor) -> None:
        """hidden: the target's tokens after the last block."""
        if self._residual is not None and self._embedded is not None:
            self._residual.value = hidden_BLC - self._embedded


def check_inputs(latents: Series[Tensor], plan: TokenPlan, cameras: Tensor | None) -> None:
    """Refuse latents [B, C, F, H, W] and cameras [B, V, F, P] that a plan was not made for.

    Raises:
        ValueError: a count, a shape, or cameras where the model has none.
    """
    if len(latents) != len(plan.segments):
        raise ValueError(f"the plan has {len(plan.segments)} segments, got {len(latents)}")
    check_latents(latents, plan)
    if plan.scope == "joint" and len(latents[0]) > 1:
        raise ValueError(
            f'scope="joint" merges other counts in every sample, got a batch of '
            f'{len(latents[0])}; run one sample at a time or use scope="group"'
        )
    if (cameras is None) == plan.shape.has_camera:
        raise ValueError(
            f"cameras are {'missing' if cameras is None else 'given'}, but the model's "
            f"camera_conditioning is {plan.shape.camera_conditioning!r} and its camera_attention "
            f"{plan.shape.camera_attention!r}"
        )


def check_timestep(timestep: Tensor, plan: TokenPlan) -> None:
    """Refuse timesteps that are neither [B] nor [B, F] of a target alone.

    Raises:
        ValueError: another shape, or conditioning beside frames of different timesteps.
    """
    if timestep.ndim == 1:
        return
    frames = plan.target.num_frames
    if timestep.ndim != 2 or timestep.shape[1] != frames:
        raise ValueError(
            f"timestep must have shape [B], or [B, {frames}] for one a target frame, got "
            f"{list(timestep.shape)}"
        )
    if len(plan.segments) > 1 or plan.conditioning != "joint":
        raise ValueError(
            "a timestep for every frame leaves open which one conditioning tokens have: give a "
            f'plan of a target alone, conditioning="joint"; got {len(plan.segments)} segments, '
            f"{plan.conditioning!r}"
        )


def check_latents(latents: Series[Tensor], plan: TokenPlan) -> None:
    """Refuse latents [B, C, F, H, W] that are not those of the plan's first segments.

    The target's hold the source's as well for a model that takes it on channels.

    Raises:
        ValueError: a shape.
    """
    for latent, segment in zip(latents, plan.segments, strict=False):
        expected = (plan.shape.channels_of(segment.role), *segment.grid)
        if tuple(latent.shape[1:]) != expected:
            source = plan.shape.source_channels if segment.role == "target" else 0
            carries = f", the last {source} channels the source's" if source else ""
            raise ValueError(
                f"{segment.role} latents must have shape [B, {', '.join(map(str, expected))}]"
                f"{carries}, got {list(latent.shape)}"
            )
