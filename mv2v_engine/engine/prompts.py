"""What a turn's guidance branches read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mv2v_engine.sampling.guidance import needs_guidance

if TYPE_CHECKING:
    from mv2v_engine.engine.engine import Engine


def guidance_texts(
    engine: Engine, prompt: str, guidance_scale: float
) -> tuple[Tensor, Tensor | None]:
    """Embeddings [1, S, text_dim] of the prompt and, with guidance, of the negative prompt."""
    prompts = [prompt]
    if needs_guidance(guidance_scale):
        prompts.append(engine.sampling.negative_prompt)
    text, *negative = engine.text_embeddings(prompts)
    return text, negative[0] if negative else None
