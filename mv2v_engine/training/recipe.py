"""The recipe of memory weights (METHOD 12 and 13): what a training sample holds, and its odds.

The samples of a batch share one token plan, so a step is one forward; under torchrun every
process has a batch of its own of that plan.

B batch, V camera tracks, F H W latent grid, S text tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

import torch
from torch import Tensor

from mv2v_engine.camera.poses import default_intrinsics
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.config import Conditioning, TransformerConfig
from mv2v_engine.errors import TrainingError
from mv2v_engine.memory.retrieval import video_fov_scores
from mv2v_engine.tokens.plan import TokenPlan, memory_tokenizers, turn_plan
from mv2v_engine.training.distributed import own_generator, rank

_FOV_GRID = (90, 180)  # ranks training videos as well as the engine's own grid, four times sooner


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The odds of METHOD 12 and 13; the defaults are those of a full-size model.

    no_memory: share of samples without memory, else 1 to max_memory videos. uniform_tokenizer:
    share with one tokenizer for all memory, else by rank. merge_fraction: bounds. memory_noise:
    standard deviation, beside a source alone. revisited: share of samples with memory that hold
    the target itself among it, as a session does whose camera returns. static_source: share that
    takes the scene's camera that does not move, if it has one, as the source.
    static_conditioning: share of METHOD 13's mode. flow_shift: of the noise levels.
    """

    batch: int = 1
    max_memory: int = 6
    no_memory: float = 0.0
    uniform_tokenizer: float = 0.5
    merging: float = 0.5
    merge_fraction: tuple[float, float] = (0.3, 0.7)
    memory_noise: float = 0.1
    source_dropped: float = 0.1
    revisited: float = 0.0
    static_source: float = 0.0
    static_conditioning: float = 0.5
    flow_shift: float = 5.0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.max_memory < 1:
            raise TrainingError(
                f"a batch and its memory need one video at least, got batch {self.batch} and "
                f"max_memory {self.max_memory}"
            )

    @property
    def conditioning(self) -> tuple[Conditioning, ...]:
        """The modes that it trains."""
        shares = {"joint": 1 - self.static_conditioning, "static": self.static_conditioning}
        return tuple(mode for mode in get_args(Conditioning) if shares[mode] > 0)


@dataclass(frozen=True, eq=False)
class Tracks:
    """Videos of one scene: latents [V, C, F, H, W] float32, cameras [V, F, 12] relative to the
    source's first frame, text [S', text_dim] of the first video, S' <= S, or None."""

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
class Batch:
    """latents: one [B, C, F, H, W] per segment of the plan, the target's still clean;
    cameras [B, V, F, 12]; text [B, S, text_dim]."""

    plan: TokenPlan
    latents: list[Tensor]
    cameras: Tensor
    text: Tensor


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
                f"tokens, got camera_conditioning {shape.camera_conditioning!r} with "
                f"{shape.in_channels} channels in and {shape.out_channels} out"
            )
        if source.latent_shape[0] != shape.in_channels:
            raise TrainingError(
                f"the latents have {source.latent_shape[0]} channels, the transformer takes "
                f"{shape.in_channels}; encode the videos with the VAE that belongs to it"
            )
        needed = recipe.max_memory + 2
        self._scenes = [i for i in range(len(source)) if source.num_tracks(i) >= needed]
        left_out = len(source) - len(self._scenes)
        if not self._scenes:
            most = max((source.num_tracks(i) for i in range(len(source))), default=0)
            raise TrainingError(
                f"{recipe.max_memory} memory videos need scenes of {needed} cameras, the best of "
                f"{len(source)} scenes has {most}; encode more, or lower --max-memory"
            )
        if left_out and rank() == 0:
            print(
                f"left out {left_out} of {len(source)} scenes: they have fewer than the {needed} "
                "videos that --max-memory needs",
                file=sys.stderr,
            )
        self._empty_text = torch.zeros(shape.text_len, shape.text_dim)
        if empty_text is not None:
            self._empty_text = self._padded(empty_text)

    def draw(self, generator: torch.Generator) -> Batch:
        """One batch of one plan; the plan is the same in all processes, the samples are not."""
        plan = self.draw_plan(generator)
        generator = own_generator(generator)
        samples = [self._sample(plan, generator) for _ in range(self.recipe.batch)]
        latents = torch.stack([sample.latents for sample in samples])
        has_source = any(segment.role == "source" for segment in plan.segments)
        # a dropped source still says where the cameras are measured from
        kept = [index for index in range(latents.shape[1]) if index != 1 or has_source]
        videos = [latents[:, index] for index in kept]
        for index, segment in enumerate(plan.segments):
            if segment.role == "memory" and has_source:
                noise = torch.randn(videos[index].shape, generator=generator)
                noise = noise.to(videos[index].device)
                videos[index] = videos[index] + self.recipe.memory_noise * noise
        cameras = torch.stack([sample.cameras for sample in samples])
        texts = [self._empty_text if s.text is None else self._padded(s.text) for s in samples]
        return Batch(plan, videos, cameras, torch.stack(texts))

    def draw_plan(self, generator: torch.Generator) -> TokenPlan:
        """Memory videos, tokenizers, merging, source and conditioning mode by the odds."""
        recipe = self.recipe
        num_memory = 0
        if not _chance(recipe.no_memory, generator):
            num_memory = _number(1, recipe.max_memory, generator)
        tokenizers = memory_tokenizers(num_memory, self.shape.tokenizers)
        if _chance(recipe.uniform_tokenizer, generator):
            choices = self.shape.tokenizers
            tokenizers = (choices[_number(0, len(choices) - 1, generator)],) * num_memory
        low, high = recipe.merge_fraction
        fraction = low + (high - low) * float(torch.rand((), generator=generator))
        source = not (num_memory and _chance(recipe.source_dropped, generator))
        is_static = _chance(recipe.static_conditioning, generator)
        _, frames, rows, columns = self.source.latent_shape
        return turn_plan(
            self.shape,
            (frames, rows, columns),
            tokenizers,
            source=source,
            merge="conv" if _chance(recipe.merging, generator) else "off",
            fraction=round(fraction, 2),
            conditioning="static" if is_static else "joint",
        )

    def _sample(self, plan: TokenPlan, generator: torch.Generator) -> Tracks:
        """Target, source, then memory: videos of one scene, drawn at random."""
        scene = self._scenes[_number(0, len(self._scenes) - 1, generator)]
        order = torch.randperm(self.source.num_tracks(scene), generator=generator).tolist()
        still = self.source.still_track(scene)
        # a user's clip is of unknown camera, hence static (METHOD 5)
        if _chance(self.recipe.static_source, generator) and still is not None:
            order.remove(still)
            order.insert(1, still)
        if plan.num_memory and _chance(self.recipe.revisited, generator):
            order.insert(2, order[0])
        return self._by_relevance(
            self.source.draw(scene, order[: 2 + plan.num_memory], order[1]), plan
        )

    def _by_relevance(self, tracks: Tracks, plan: TokenPlan) -> Tracks:
        """Memory as retrieval would hand it over: the more a video shares with the target's field
        of view, the earlier it comes and the finer its tokens.
        """
        if plan.num_memory < 2:
            return tracks
        size = plan.target.grid[1:]  # a field of view does not ask for the size of a pixel
        intrinsics = default_intrinsics(*size)
        target, _, *memory = (
            CameraTrajectory(poses.unflatten(-1, (3, 4)), intrinsics, size)
            for poses in tracks.cameras
        )
        order = video_fov_scores(target, memory, grid=_FOV_GRID).argsort(descending=True)
        kept = torch.cat([torch.arange(2), 2 + order])
        return Tracks(tracks.latents[kept], tracks.cameras[kept], tracks.text)

    def _padded(self, text: Tensor) -> Tensor:
        """Zeros past the prompt, as the text encoder leaves them (BASE_MODELS 2.3)."""
        shape = (self.shape.text_len, self.shape.text_dim)
        if text.ndim != 2 or len(text) > shape[0] or text.shape[1] != shape[1]:
            raise TrainingError(
                f"text embeddings have shape {list(text.shape)}, the transformer takes at most "
                f"{list(shape)}; encode the captions with the text encoder that belongs to it"
            )
        return torch.nn.functional.pad(text.float(), (0, 0, 0, shape[0] - len(text)))


def _chance(probability: float, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < probability


def _number(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))
