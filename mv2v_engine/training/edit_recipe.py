"""The recipe of memory weights for long editing (METHOD 11 and 12): what a training sample holds.

A sample is a window of an edited clip; its memory is other windows of the same edit, as the engine
will hand them over: the preceding one first, the others by how alike their sources look.

B batch, F H W latent grid, W windows of a clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mv2v_engine.config import TransformerConfig
from mv2v_engine.errors import TrainingError
from mv2v_engine.memory.segment_retrieval import SegmentKey, latent_descriptor, rank_segments
from mv2v_engine.tokens.plan import TokenPlan, turn_plan
from mv2v_engine.training.distributed import own_generator
from mv2v_engine.training.edit_latents import EditLatents
from mv2v_engine.training.odds import MemoryRecipe, chance, number, padded_text, pick
from mv2v_engine.training.recipe import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class EditRecipe(MemoryRecipe):
    """The odds of long editing.

    not_following: share of samples with memory that lack the window just before, as the first
    window after a cut does. text_dropped: share with the empty prompt, for guidance.
    text_from_memory: the same of samples with memory, where what was edited, and how, must then be
    read from the memory. edit_weight: how much more than one a latent cell counts that is edited
    all over: objects are small.
    """

    not_following: float = 0.1
    text_dropped: float = 0.1
    text_from_memory: float = 0.1
    edit_weight: float = 15.0


class EditSampler:
    """Draws batches from encoded editing pairs; everything follows from the generator.

    Args:
        empty_text: [S', text_dim], the encoder's own of the empty prompt.

    Raises:
        TrainingError: no clip has windows enough, or the latents are not this model's.
    """

    def __init__(
        self,
        latents: EditLatents,
        shape: TransformerConfig,
        recipe: EditRecipe,
        *,
        empty_text: Tensor,
    ) -> None:
        self.latents, self.shape, self.recipe = latents, shape, recipe
        if not shape.source_channels or shape.has_camera:
            raise TrainingError(
                "the recipe trains long editing: a transformer without cameras whose source is on "
                f"the target's channels, got camera_conditioning {shape.camera_conditioning!r} and "
                f"source_channels {shape.source_channels}"
            )
        if latents.latent_shape[0] != shape.latent_channels:
            raise TrainingError(
                f"the latents have {latents.latent_shape[0]} channels, the transformer takes "
                f"{shape.latent_channels}; encode the clips with the VAE that belongs to it"
            )
        most = max(pair.num_windows for pair in latents.pairs)
        if recipe.no_memory < 1 and most < recipe.max_memory + 2:
            raise TrainingError(
                f"{recipe.max_memory} memory videos need clips of {recipe.max_memory + 2} windows, "
                f"the longest of {len(latents)} clips has {most}; lower --max-memory"
            )
        self._empty_text = padded_text(empty_text, shape)
        self._texts = [padded_text(pair.text, shape) for pair in latents.pairs]
        self._descriptors = [[latent_descriptor(w) for w in pair.source] for pair in latents.pairs]

    def draw(self, generator: torch.Generator) -> Batch:
        """One batch of one plan; the plan is the same in all processes, the samples are not."""
        plan, follows = self.draw_plan(generator)
        generator = own_generator(generator)
        drawn = [
            self._sample(plan.num_memory, follows, generator) for _ in range(self.recipe.batch)
        ]
        pairs = [(self.latents.pairs[clip], windows) for clip, windows in drawn]
        target = torch.stack([pair.edited[windows[0]] for pair, windows in pairs]).float()
        memory = [
            torch.stack([pair.remembered[windows[index]] for pair, windows in pairs]).float()
            for index in range(1, 1 + plan.num_memory)
        ]
        mask = torch.stack([pair.mask[windows[0]] for pair, windows in pairs]).float()
        recipe = self.recipe
        dropped = recipe.text_from_memory if memory else recipe.text_dropped
        texts = [
            self._empty_text if chance(dropped, generator) else self._texts[clip]
            for clip, _ in drawn
        ]
        return Batch(
            plan=plan,
            latents=[target, *(recipe.perturbed(video, generator) for video in memory)],
            cameras=None,
            text=torch.stack(texts),
            source=torch.stack([pair.source[windows[0]] for pair, windows in pairs]).float(),
            weight=edit_weights(mask, recipe.edit_weight),
        )

    def draw_plan(self, generator: torch.Generator) -> tuple[TokenPlan, bool]:
        """A plan by the odds, and whether its first memory video is the window just before."""
        drawn = self.recipe.draw(self.shape, generator)
        follows = not chance(self.recipe.not_following, generator)
        _, *grid = self.latents.latent_shape
        frames, rows, columns = grid
        plan = turn_plan(
            self.shape,
            (frames, rows, columns),
            drawn.tokenizers,
            preceding=follows,
            merge=drawn.merge,
            fraction=drawn.fraction,
            conditioning=drawn.conditioning,
        )
        return plan, follows

    def _sample(
        self, num_memory: int, follows: bool, generator: torch.Generator
    ) -> tuple[int, list[int]]:
        """A clip, and which of its windows are target and memory, in the plan's order."""
        needed = 1 + num_memory + (num_memory > 0 and not follows)  # the first lacks one before it
        clips = [i for i, p in enumerate(self.latents.pairs) if p.num_windows >= needed]
        clip = pick(clips, generator)
        total = self.latents.pairs[clip].num_windows
        target = number(1 if num_memory else 0, total - 1, generator)
        before = target - 1
        others = [window for window in range(total) if window not in (target, before)]
        order = torch.randperm(len(others), generator=generator).tolist()
        kept = [others[i] for i in order[: num_memory - follows]] if num_memory else []
        if num_memory and follows:
            kept.append(before)
        descriptors = self._descriptors[clip]
        # the window before ranks as the engine's last edit does: first
        keys = [SegmentKey(str(w), w if w != before else total, descriptors[w]) for w in kept]
        ranked = rank_segments(descriptors[target], keys, top_k=num_memory, recent_first=follows)
        return clip, [target, *(int(id) for id in ranked.ids)]


def edit_weights(mask: Tensor, edit_weight: float) -> Tensor:
    """Weights of the squared error, as `mask`, the edited share of every latent cell [B, F, H, W].

    A sample counts as much as any other, whatever the size of its edit.
    """
    weight = 1 + edit_weight * mask
    return weight / weight.mean((1, 2, 3), keepdim=True)
