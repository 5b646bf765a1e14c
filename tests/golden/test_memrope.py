"""Eleven blocks of a causal model as the method's authors compute them.

memrope.safetensors holds random weights under original Wan names, the text's embeddings, the noise
and what the authors' pipeline made of them (arXiv 2603.12513), frames before channels: blocks of 3
latent frames, sink 3, window 12, so that the cache rolls from the fifth block on. The noise between
steps comes from one generator.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mv2v_engine.checkpoints.names import to_diffusers
from mv2v_engine.config import StreamConfig, TransformerConfig
from mv2v_engine.engine.stream import block_steps, block_velocity
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.stream_cache import StreamCache
from mv2v_engine.sampling.flow_match import RenoisingSolver, listed_sigmas

SHAPE = TransformerConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=32,
    ffn_dim=96,
    in_channels=16,
    out_channels=16,
    text_dim=24,
    freq_dim=32,
    camera_conditioning="none",
    tokenizers=(),
    merger=None,
)


def test_the_authors_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    with safe_open(str(Path(__file__).with_name("memrope.safetensors")), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        seed = int(file.metadata()["seed"])
    model, config = MV2VTransformer(SHAPE).eval(), StreamConfig()
    own = {name: weight for name, weight in tensors.items() if name.startswith("weights.")}
    names = {name: to_diffusers(name.removeprefix("weights.")) for name in own}
    model.load_state_dict({str(names[name]): weight for name, weight in own.items()})
    noise, expected = (tensors[name].transpose(1, 2) for name in ("noise", "latents"))
    rows, columns = noise.shape[-2:]
    cache = StreamCache(SHAPE, (rows, columns), config)
    generator, blocks = torch.Generator().manual_seed(seed), list[Tensor]()

    def frames_first(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        drawn: Tensor = torch.randn(3, 16, rows, columns, generator=generator)
        return drawn.transpose(0, 1)[None]

    monkeypatch.setattr("mv2v_engine.sampling.flow_match._drawn", frames_first)
    text, sigmas = tensors["context"], listed_sigmas(config.timesteps, 5.0)
    for first in noise.split(config.block_frames, dim=2):
        cache.begin_block()
        solver = RenoisingSolver(sigmas, generator)
        *_, latents = block_steps(model, cache, solver, first, text)
        block_velocity(model, cache, latents, 0.0, text)
        blocks.append(latents)
    error = (torch.cat(blocks, 2) - expected).abs().max() / expected.abs().max()
    print(f"\nerror {float(error):.2g} of the largest value")
    assert error < 5e-6
