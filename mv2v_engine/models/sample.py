"""The inputs of a forward, and the check that they fit the plan.

B batch, C channels, V camera tracks, F H W latent grid, S text tokens, P numbers of a camera.
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from dataclasses import dataclass

from torch import Tensor

from mv2v_engine.models.kept import ConditioningCache, TargetResidual
from mv2v_engine.models.merging import MergeRecord
from mv2v_engine.models.stream_cache import StreamCache
from mv2v_engine.parallel.context import ContextGroup
from mv2v_engine.tokens.plan import TokenPlan


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One sample of a forward, or a batch of samples of one plan.

    The fields are the arguments of `MV2VTransformer.forward`.
    """

    latents: Series[Tensor]
    timestep: Tensor
    encoder_hidden_states: Tensor
    plan: TokenPlan
    cameras: Tensor | None = None
    records: list[MergeRecord] | None = None
    kept: ConditioningCache | None = None
    residual: TargetResidual | None = None
    ranks: ContextGroup | None = None
    stream: StreamCache | None = None
    image: Tensor | None = None
    end_timestep: Tensor | None = None

    @property
    def is_kept(self) -> bool:
        """Whether the target runs alone, over K and V that another forward has kept."""
        return self.kept is not None and self.kept.is_filled

    @property
    def num_tokens(self) -> int:
        """Tokens that enter the first block."""
        return self.plan.target.length if self.is_kept else self.plan.length

    def check(self, *, is_alone: bool) -> None:
        """Refuse tensors that the plan was not made for, and what several samples cannot hold.

        Raises:
            ValueError: a count, a shape, or cameras where the model has none.
        """
        if self.kept is not None and self.kept.plan != self.plan:
            raise ValueError("this cache was made for another plan; make one for every turn")
        self._check_stream()
        self._check_vace(is_alone=is_alone)
        if not is_alone:
            self._check_packed()
        self._check_latents()
        if (self.image is None) == bool(self.plan.shape.image_dim):
            raise ValueError(
                f"image tokens are {'missing' if self.image is None else 'given'}, but the model's "
                f"image_dim is {self.plan.shape.image_dim}"
            )
        self._check_end()
        if not self.is_kept:
            self._check_cameras()
            self._check_timestep()

    def _check_stream(self) -> None:
        if self.stream is None:
            return
        if self.plan != self.stream.plan:
            raise ValueError("a stream's forward takes the plan of its cache, got another one")
        if self.kept is not None or self.ranks is not None:
            raise ValueError("a stream keeps its own K and V, and runs in one process")
        if not self.stream.num_frames:
            raise ValueError("the stream has no block yet; call begin_block before its forwards")

    def _check_vace(self, *, is_alone: bool) -> None:
        if not self.plan.shape.vace_layers:
            return
        if not is_alone or self.stream is not None or self.ranks is not None:
            raise ValueError(
                "VACE's blocks run beside one sample's target in one process, not in packs, "
                "streams or over ranks"
            )

    def _check_packed(self) -> None:
        if self.stream is not None:
            raise ValueError("a stream's forward runs alone, for its cache is of one stream")
        if self.timestep.ndim != 1:
            raise ValueError(
                f"a sample of a pack has one timestep [1], got {list(self.timestep.shape)}; run "
                "frames of different timesteps alone"
            )
        batches = [len(self.timestep), len(self.encoder_hidden_states)]
        batches += [len(latent) for latent in self.latents]
        if batches.count(1) != len(batches):
            raise ValueError(
                f"a sample of a pack is a batch of one, got batches of {sorted(set(batches))}; "
                "make a sample of each"
            )
        if self.plan.conditioning == "static" and not self.is_kept:
            raise ValueError(
                "a sample with static conditioning joins a pack once its K and V are kept; run "
                "forward(..., kept=cache) alone first"
            )

    def _check_latents(self) -> None:
        plan = self.plan
        if len(self.latents) != len(plan.segments) and not (self.is_kept and self.latents):
            raise ValueError(f"the plan has {len(plan.segments)} segments, got {len(self.latents)}")
        for latent, segment, expected in zip(
            self.latents, plan.segments, plan.latent_shapes, strict=False
        ):
            if tuple(latent.shape[1:]) != expected:
                source = plan.shape.source_channels if segment.role == "target" else 0
                carries = f", the last {source} channels the source's" if source else ""
                raise ValueError(
                    f"{segment.role} latents must have shape [B, {', '.join(map(str, expected))}]"
                    f"{carries}, got {list(latent.shape)}"
                )
        if plan.scope == "joint" and len(self.latents[0]) > 1 and not self.is_kept:
            raise ValueError(
                f'scope="joint" merges other counts in every sample, got a batch of '
                f'{len(self.latents[0])}; run one sample at a time or use scope="group"'
            )

    def _check_end(self) -> None:
        end = self.end_timestep
        if end is None:
            return
        if not self.plan.shape.has_end_time:
            raise ValueError(
                "this model is told the timestep alone, got an end_timestep too; leave it out, or "
                "take weights that are a flow map (has_end_time)"
            )
        if end.shape != self.timestep.shape:
            raise ValueError(
                f"end_timestep must have the shape of timestep {list(self.timestep.shape)}, got "
                f"{list(end.shape)}"
            )

    def _check_cameras(self) -> None:
        shape = self.plan.shape
        if (self.cameras is None) != (self.plan.target.camera is None):
            raise ValueError(
                f"cameras are {'missing' if self.cameras is None else 'given'}, but the model's "
                f"camera_conditioning is {shape.camera_conditioning!r} and its camera_attention "
                f"{shape.camera_attention!r}"
            )

    def _check_timestep(self) -> None:
        timestep, plan = self.timestep, self.plan
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
