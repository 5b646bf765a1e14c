"""The recipe of memory weights for novel views (METHOD 12): what a training sample holds.

The samples of a batch share one token plan, so a step is one forward; under torchrun every
process has a batch of its own of that plan.

B batch, V camera tracks, F H W latent grid, S text tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from mv2v_engine.camera.poses import default_intrinsics, normalised_intrinsics
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.config import TransformerConfig
from mv2v_engine.errors import TrainingError
from mv2v_engine.memory.retrieval import video_fov_scores
from mv2v_engine.tokens.plan import TokenPlan, turn_plan
from mv2v_engine.training.distributed import own_generator, rank
from mv2v_engine.training.odds import MemoryRecipe, chance, padded_text, pick

_FOV_GRID = (90, 180)  # ranks training videos as well as the engine's own grid, four times sooner


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe(MemoryRecipe):
    """The odds of novel views.

    source_dropped: share of samples with memory that have no source. revisited: share of samples
    with memory that hold the target itself among it, as a session does whose camera returns.
    static_source: share that takes the scene's camera that does not move, if it has one, as the
    source. targets: of one encoded conditioning, in static mode, as many as the scene's cameras
    allow; `batch` still counts targets. frames: the latent frames that are trained on, as if the
    clips had no others; None takes all. Two of them teach what a camera is at a third of the cost.
    """

    source_dropped: float = 0.1
    revisited: float = 0.0
    static_source: float = 0.0
    targets: int = 1
    frames: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Tracks:
    """Videos of one scene: latents [V, C, F, H, W] float32, cameras [V, F, 12] relative to the
    source's first frame, or [V, F, 16] with their intrinsics (METHOD 5), text [S', text_dim] of the
    first video, S' <= S, or None."""

    latents: Tensor
    cameras: Tensor
    text: Tensor | None


class TrackSource(Protocol):
    """Scenes that several cameras filmed at once, encoded; where samples are drawn from."""

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W), the same for every video."""

    def __len__(self) -> int:
        """Number of scenes."""

    def num_tracks(self, scene: int) -> int:
        """Videos of a scene."""

    def still_track(self, scene: int) -> int | None:
        """The video whose camera does not move; None where all do."""

    def draw(self, scene: int, tracks: Sequence[int], source: int) -> Tracks:
        """The given videos, their cameras relative to the first frame of video `source`."""


@dataclass(frozen=True, eq=False)
class Siblings:
    """More targets of every sample's conditioning: latents [B, T, C, F, H, W], cameras
    [B, T, F, 12 or 16]."""

    latents: Tensor
    cameras: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """latents: one [B, C, F, H, W] per segment of the plan, the target's still clean;
    cameras [B, V, F, 12 or 16] or None; text [B, S, text_dim]. source: [B, C, F, H, W] of a model
    that takes it on the target's channels. weight: [B, F, H, W], of the squared error; None is 1.
    siblings: of static conditioning alone.
    """

    plan: TokenPlan
    latents: list[Tensor]
    cameras: Tensor | None
    text: Tensor
    source: Tensor | None = None
    weight: Tensor | None = None
    siblings: Siblings | None = None

    @property
    def targets(self) -> Tensor:
        """All of them, clean [B + B * T, C, F, H, W]: the plan's, then the siblings."""
        if self.siblings is None:
            return self.latents[0]
        return torch.cat([self.latents[0], self.siblings.latents.flatten(0, 1)])

    def to(self, device: torch.device) -> Batch:
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        siblings = self.siblings
        if siblings is not None:
            siblings = Siblings(siblings.latents.to(device), siblings.cameras.to(device))
        return replace(
            self,
            latents=[latents.to(device) for latents in self.latents],
            cameras=moved(self.cameras),
            text=self.text.to(device),
            source=moved(self.source),
            weight=moved(self.weight),
            siblings=siblings,
        )


class SceneSampler:
    """Draws batches from encoded scenes; everything follows from the generator.

    Args:
        empty_text: [S, text_dim], what samples without a caption get; None is zeros, which a
            model without text was trained on.

    Raises:
        TrainingError: no scene has videos enough, or the latents are not this model's.
    """

    def __init__(
        self,
        source: TrackSource,
        shape: TransformerConfig,
        recipe: Recipe,
        *,
        empty_text: Tensor | None = None,
    ) -> None:
        self.source, self.shape, self.recipe = source, shape, recipe
        if not shape.has_camera or shape.in_channels != shape.out_channels:
            raise TrainingError(
                "the recipe trains novel views: a transformer with cameras whose source is "
                f"tokens, got camera_conditioning {shape.camera_conditioning!r} and "
                f"camera_attention {shape.camera_attention!r} with "
                f"{shape.in_channels} channels in and {shape.out_channels} out"
            )
        if source.latent_shape[0] != shape.in_channels:
            raise TrainingError(
                f"the latents have {source.latent_shape[0]} channels, the transformer takes "
                f"{shape.in_channels}; encode the videos with the VAE that belongs to it"
            )
        needed = recipe.max_memory + 2
        self._scenes = [i for i in range(len(source)) if source.num_tracks(i) >= needed]
        self._fewest_tracks = min((source.num_tracks(i) for i in self._scenes), default=0)
        left_out = len(source) - len(self._scenes)
        if not self._scenes:
            most = max((source.num_tracks(i) for i in range(len(source))), default=0)
            raise TrainingError(
                f"{recipe.max_memory} memory videos need scenes of {needed} cameras, the best of "
                f"{len(source)} scenes has {most}; encode more, or lower --max-memory (of a "
                "history --max-windows)"
            )
        if left_out and rank() == 0:
            print(
                f"left out {left_out} of {len(source)} scenes: they have fewer than the {needed} "
                "videos that so much memory needs",
                file=sys.stderr,
            )
        self._empty_text = torch.zeros(shape.text_len, shape.text_dim)
        if empty_text is not None:
            self._empty_text = padded_text(empty_text, shape)

    def draw(self, generator: torch.Generator) -> Batch:
        """One batch of one plan; the plan is the same in all processes, the samples are not."""
        plan = self.draw_plan(generator)
        generator = own_generator(generator)
        targets = self._targets(plan)
        count = max(1, self.recipe.batch // targets)
        samples = [self._sample(plan.num_memory, targets, generator) for _ in range(count)]
        latents = torch.stack([sample.latents for sample in samples])
        cameras = torch.stack([self._cameras(sample) for sample in samples])
        own = 2 + plan.num_memory
        siblings = Siblings(latents[:, own:], cameras[:, own:]) if targets > 1 else None
        has_source = any(segment.role == "source" for segment in plan.segments)
        # a dropped source still says where the cameras are measured from
        kept = [index for index in range(own) if index != 1 or has_source]
        videos = [latents[:, index] for index in kept]
        for index, segment in enumerate(plan.segments):
            if segment.role == "memory" and has_source:
                videos[index] = self.recipe.perturbed(videos[index], generator)
        texts = [
            self._empty_text if s.text is None else padded_text(s.text, self.shape) for s in samples
        ]
        return Batch(plan, videos, cameras[:, :own], torch.stack(texts), siblings=siblings)

    def _targets(self, plan: TokenPlan) -> int:
        """The number of targets of one conditioning: all videos but the source and the memory."""
        if plan.conditioning == "joint":
            return 1
        return min(self.recipe.targets, self._fewest_tracks - 1 - plan.num_memory)

    @property
    def _grid(self) -> tuple[int, int, int]:
        """The latent grid of a video, as much of it as is trained on."""
        _, frames, rows, columns = self.source.latent_shape
        return frames if self.recipe.frames is None else len(self.recipe.frames), rows, columns

    def draw_plan(self, generator: torch.Generator) -> TokenPlan:
        """A plan by the odds."""
        drawn = self.recipe.draw(self.shape, generator)
        source = not (drawn.tokenizers and chance(self.recipe.source_dropped, generator))
        return turn_plan(
            self.shape,
            self._grid,
            drawn.tokenizers,
            source=source,
            merge=drawn.merge,
            fraction=drawn.fraction,
            conditioning=drawn.conditioning,
        )

    def _sample(self, memory: int, targets: int, generator: torch.Generator) -> Tracks:
        """Target, source, memory, then the target's siblings: videos of one scene, at random."""
        scene = pick(self._scenes, generator)
        order = torch.randperm(self.source.num_tracks(scene), generator=generator).tolist()
        still = self.source.still_track(scene)
        # a user's clip is of unknown camera, hence static (METHOD 5)
        if chance(self.recipe.static_source, generator) and still is not None:
            order.remove(still)
            order.insert(1, still)
        if memory and chance(self.recipe.revisited, generator):
            order.insert(2, order[0])
        tracks = self.source.draw(scene, order[: 1 + targets + memory], order[1])
        if self.recipe.frames is not None:
            frames = list(self.recipe.frames)
            tracks = Tracks(tracks.latents[:, :, frames], tracks.cameras[:, frames], tracks.text)
        return self._by_relevance(tracks, memory)

    def _cameras(self, tracks: Tracks) -> Tensor:
        """[V, F, 12 or 16] as the transformer takes them; a lens that is not told is the default.

        (METHOD 9.)
        """
        cameras, wanted = tracks.cameras, self.shape.camera_dim
        if cameras.shape[-1] < wanted:
            size = (tracks.latents.shape[-2], tracks.latents.shape[-1])
            lens = normalised_intrinsics(default_intrinsics(*size), size)
            cameras = torch.cat([cameras, lens.expand(*cameras.shape[:-1], -1)], dim=-1)
        return cameras[..., :wanted]

    def _by_relevance(self, tracks: Tracks, memory: int) -> Tracks:
        """Memory as retrieval would hand it over: the more a video shares with the target's field
        of view, the earlier it comes and the finer its tokens.
        """
        if memory < 2:
            return tracks
        # a field of view does not ask for the size of a pixel
        size = (tracks.latents.shape[-2], tracks.latents.shape[-1])
        intrinsics = default_intrinsics(*size)
        own = 2 + memory
        target, _, *remembered = (
            CameraTrajectory(poses.unflatten(-1, (3, 4)), intrinsics, size)
            for poses in tracks.cameras[:own, :, :12]
        )
        order = video_fov_scores(target, remembered, grid=_FOV_GRID).argsort(descending=True)
        kept = torch.cat([torch.arange(2), 2 + order, torch.arange(own, len(tracks.cameras))])
        return Tracks(tracks.latents[kept], tracks.cameras[kept], tracks.text)
