"""What a full-size turn needs of a GPU's memory, by count: predicted before anything runs.

`python profiling/peak_memory.py [--out profiling/results/peak_memory.jsonl]`

The 1.3B shape with its VAE and UMT5-XXL in bfloat16, 81 frames of 480x832, as a turn's refusal and
its report's `predicted_peak_bytes` reckon it (`engine/budget.py`): tensors alive at once, by stage,
weights and latent memory included, without what libraries allocate inside an operation. Nothing
here has memory of its own, so it runs anywhere; it needs diffusers and transformers.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from measure import Report, digits, provenance, table
from torch import nn

from mv2v_engine.config import WAN_1_3B, EngineConfig
from mv2v_engine.engine.budget import (
    CUBLAS_WORKSPACE,
    Footprint,
    embed_bytes,
    module_bytes,
    predict,
)
from mv2v_engine.engine.counting import vae_peak_bytes
from mv2v_engine.models.autoencoder import Autoencoder
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.text import TextEncoder
from mv2v_engine.tokens.flops import conditioning_bytes
from mv2v_engine.tokens.peak import Execution
from mv2v_engine.tokens.plan import novel_view_plan
from mv2v_engine.vae import VideoVAE

GIB = 1 << 30
COUNTS = (0, 3, 10)
FRAMES, SIZE, TEXT_LENGTH = 81, (480, 832), 512
COLUMNS = "memory conditioning merge text peak_gib fullest sampling_gib kept_gib fits_24_gib"


def full_size_parts() -> Footprint:
    """Wan 1.3B with cameras and memory, its VAE and UMT5-XXL in bfloat16."""
    import transformers

    depth = WAN_1_3B.num_layers
    with torch.device("meta"):
        text = transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=256_384, d_model=4096, d_kv=64, d_ff=10_240, num_layers=24, num_heads=64
            )
        )
        vae = VideoVAE(Autoencoder())
        # modules take a while to build, and the blocks are alike
        transformer = MV2VTransformer(replace(WAN_1_3B, num_layers=3, merge_blocks=None))
    for module in (text, transformer, vae.model):
        nn.Module.to(module, dtype=torch.bfloat16)
    vae.dtype = torch.bfloat16
    encoder = TextEncoder.__new__(TextEncoder)
    encoder.model, encoder.max_length, encoder.dtype = text, TEXT_LENGTH, torch.bfloat16
    encode, decode = vae_peak_bytes(vae, FRAMES, SIZE)
    channels, *grid = vae.latent_shape(FRAMES, SIZE)
    video = channels * grid[0] * grid[1] * grid[2] * torch.float32.itemsize
    return Footprint(
        transformer=module_bytes(transformer) + (depth // 3 - 1) * module_bytes(transformer.blocks),
        vae=module_bytes(vae.model),
        text=module_bytes(text),
        is_text_offloaded=False,
        cache=(max(COUNTS) + 1) * video,
        video=video,
        copies_memory=False,
        embedding=TEXT_LENGTH * WAN_1_3B.text_dim * 2,
        encode=encode,
        decode=decode,
        embed=embed_bytes(encoder),
        workspace=CUBLAS_WORKSPACE,
        arena=0,
        execution=Execution(2, EngineConfig().feed_forward_chunk),
    )


def measure(report: Report) -> None:
    parts = full_size_parts()
    for memory in COUNTS:
        for conditioning in ("joint", "static"):
            for merge in ("conv", "off"):
                plan = novel_view_plan(memory=memory, conditioning=conditioning, merge=merge)
                for text in ("resident", "offloaded"):
                    placed = replace(parts, is_text_offloaded=text == "offloaded")
                    found = predict(placed, plan)
                    report.add(
                        memory=memory,
                        conditioning=conditioning,
                        merge=merge,
                        text=text,
                        peak_gib=digits(found.peak / GIB),
                        fullest=found.fullest,
                        stages_gib={k: digits(v / GIB) for k, v in found.stages.items()},
                        sampling_gib=digits(found.stages["sampling"] / GIB),
                        kept_gib=digits(conditioning_bytes(plan, 2) / GIB),
                        fits_24_gib=found.peak <= 24 * GIB,
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = Report(args.out, provenance(torch.device("cpu")) | {"what": "predicted"})
    measure(report)
    print(table(report.rows, COLUMNS))


if __name__ == "__main__":
    main()
