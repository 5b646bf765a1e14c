"""The part of METHOD 12's and 13's recipe that both tasks share: memory, merging, conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from mv2v_engine.config import ConditioningMode, MergeMode, TransformerConfig
from mv2v_engine.errors import TrainingError
from mv2v_engine.tokens.plan import memory_tokenizers


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryDraw:
    """What a sample remembers and how it is run: all that a plan needs beside its segments."""

    tokenizers: tuple[int, ...]
    merge: MergeMode
    fraction: float
    conditioning: ConditioningMode


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryRecipe:
    """The odds of both tasks; the defaults are those of a full-size model.

    no_memory: share of samples without memory, else min_memory to max_memory videos.
    uniform_tokenizer: share with one tokenizer for all memory, else by rank. merge_fraction:
    bounds. memory_noise: standard deviation, beside a source alone. static_conditioning: share of
    METHOD 13's mode. flow_shift: of the noise levels.
    """

    batch: int = 1
    min_memory: int = 1
    max_memory: int = 6
    no_memory: float = 0.0
    uniform_tokenizer: float = 0.5
    merging: float = 0.5
    merge_fraction: tuple[float, float] = (0.3, 0.7)
    memory_noise: float = 0.1
    static_conditioning: float = 0.5
    flow_shift: float = 5.0

    def __post_init__(self) -> None:
        if self.batch < 1 or not 1 <= self.min_memory <= self.max_memory:
            raise TrainingError(
                f"a batch and its memory need one video at least, got batch {self.batch} and "
                f"min_memory {self.min_memory}, max_memory {self.max_memory}"
            )

    @property
    def conditioning(self) -> tuple[ConditioningMode, ...]:
        """The modes that it trains."""
        shares = {"joint": 1 - self.static_conditioning, "static": self.static_conditioning}
        return tuple(mode for mode in get_args(ConditioningMode) if shares[mode] > 0)

    def draw(self, shape: TransformerConfig, generator: torch.Generator) -> MemoryDraw:
        """Memory videos, their tokenizers, merging and conditioning mode by the odds."""
        num_memory = 0
        if not chance(self.no_memory, generator):
            num_memory = number(self.min_memory, self.max_memory, generator)
        tokenizers = memory_tokenizers(num_memory, shape.tokenizers)
        if chance(self.uniform_tokenizer, generator):
            choices = shape.tokenizers
            tokenizers = (choices[number(0, len(choices) - 1, generator)],) * num_memory
        low, high = self.merge_fraction
        fraction = low + (high - low) * float(torch.rand((), generator=generator))
        return MemoryDraw(
            tokenizers=tokenizers,
            merge="conv" if chance(self.merging, generator) else "off",
            fraction=round(fraction, 2),
            conditioning="static" if chance(self.static_conditioning, generator) else "joint",
        )

    def perturbed(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Memory as it is shown beside a source: it must not be trusted to the last digit."""
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        return latents + self.memory_noise * noise


def chance(probability: float, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < probability


def number(low: int, high: int, generator: torch.Generator) -> int:
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def pick(choices: Sequence[int], generator: torch.Generator) -> int:
    return choices[number(0, len(choices) - 1, generator)]


def padded_text(text: Tensor, shape: TransformerConfig) -> Tensor:
    """Embeddings [S', text_dim] with zeros past the prompt, as the text encoder leaves them
    (BASE_MODELS 2.3): float32 [S, text_dim].

    Raises:
        TrainingError: they are not this transformer's.
    """
    expected = (shape.text_len, shape.text_dim)
    if text.ndim != 2 or len(text) > expected[0] or text.shape[1] != expected[1]:
        raise TrainingError(
            f"text embeddings have shape {list(text.shape)}, the transformer takes at most "
            f"{list(expected)}; encode the captions with the text encoder that belongs to it"
        )
    return torch.nn.functional.pad(text.float(), (0, 0, 0, expected[0] - len(text)))
