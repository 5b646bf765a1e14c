"""A teacher in the place of data: what guidance makes of frozen weights, in one forward.

Guided sampling runs a step once more without a condition, or by weaker weights, and goes away from
what that predicts: things get edges. A student that is trained towards the result needs one forward
a step (guidance distillation, Meng et al., arXiv 2210.03142; weaker weights: autoguidance, Karras
et al., arXiv 2406.02507).

T targets of a batch, C F H W latents, S text tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from mv2v_engine.errors import TrainingError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.tokens.plan import Role
from mv2v_engine.training.losses import BatchForward, Noised
from mv2v_engine.training.recipe import Batch

# what the other forward lacks: a condition, or the training of the weights
Lack = Literal["source", "memory", "text", "training"]


class Teacher:
    """v + sum over what is lacked of (scale - 1) (v - v without it), v by frozen weights.

    A batch without a condition, or that would have none left, is not guided by its lack.

    Args:
        model: the weights; frozen, and not those that are trained.
        scales: how far away from each; 1 is not at all.
        weaker: what lacks training; of the same shape.
        empty_text: [S, text_dim], the text of those that lack it.

    Raises:
        TrainingError: a scale whose forward cannot be run.
    """

    def __init__(
        self,
        model: MV2VTransformer,
        scales: Mapping[Lack, float],
        *,
        weaker: MV2VTransformer | None = None,
        empty_text: Tensor | None = None,
    ) -> None:
        self._model, self._weaker, self._empty_text = (
            model.requires_grad_(False),
            weaker,
            empty_text,
        )
        self.scales = {lack: scale for lack, scale in scales.items() if scale != 1}
        if ("training" in scales) != (weaker is not None):
            raise TrainingError(
                "guidance by a lack of training and weaker weights belong together, got scales "
                f"for {', '.join(scales)} and {'no ' if weaker is None else ''}weaker weights"
            )
        if weaker is not None and weaker.config.in_channels != model.config.in_channels:
            raise TrainingError(
                f"weaker weights must have the shape of the others, {model.config.in_channels} "
                f"channels in, got {weaker.config.in_channels}"
            )

    @torch.no_grad()
    def velocity(self, batch: Batch, noised: Noised) -> Tensor:
        """The guided velocity of all of the batch's targets, float32 [T, C, F, H, W]."""
        own = _velocity(self._model, batch, noised)
        guided = own
        for scale, model, lacking in self._others(batch):
            guided = guided + (scale - 1) * (own - _velocity(model, lacking, noised))
        return guided

    def _others(self, batch: Batch) -> Iterator[tuple[float, MV2VTransformer, Batch]]:
        for lack, scale in self.scales.items():
            if lack == "training" and self._weaker is not None:
                yield scale, self._weaker, batch
            elif lack == "text" and self._empty_text is not None:
                yield (
                    scale,
                    self._model,
                    replace(batch, text=self._empty_text.expand_as(batch.text)),
                )
            elif lack in ("source", "memory") and (less := lacking(batch, lack)) is not None:
                yield scale, self._model, less


def lacking(batch: Batch, role: Role) -> Batch | None:
    """The batch without its segments of a role; None if it has none, or would have no other."""
    found = batch.plan.without(role)
    if found is None:
        return None
    plan, places = found
    target, *others = batch.latents
    return replace(batch, plan=plan, latents=[target, *(others[place] for place in places)])


def _velocity(model: MV2VTransformer, batch: Batch, noised: Noised) -> Tensor:
    timestep = noised.level * 1000
    end = timestep if model.config.has_end_time else None
    return BatchForward(model, batch)(noised.latents, timestep, end).float()


def read_scales(given: Sequence[str]) -> dict[Lack, float]:
    """Scales of words like "source=1.5".

    Raises:
        TrainingError: another word, or no number from 1 on.
    """
    scales = dict[Lack, float]()
    for word in given:
        name, _, number = word.partition("=")
        found = [lack for lack in get_args(Lack) if lack == name]
        try:
            scale = float(number)
        except ValueError:
            scale = float("nan")
        if not found or not 1 <= scale <= 10:
            raise TrainingError(
                f"guidance is one of {', '.join(get_args(Lack))} with a scale from 1 to 10, as "
                f"source=1.5; got {word!r}"
            )
        scales[found[0]] = scale
    return scales
