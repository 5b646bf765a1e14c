"""What every process but rank 0 does: it loads the transformer and runs what rank 0 hands out.

It needs no VAE and no text encoder, opens no session and writes nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mv2v_engine.checkpoints.load import load_checkpoint
from mv2v_engine.config import EngineConfig
from mv2v_engine.engine.loading import configure
from mv2v_engine.engine.places import default_dtype, rank_device
from mv2v_engine.engine.team import serve
from mv2v_engine.errors import RequestError
from mv2v_engine.parallel.ranks import Ranks, check_launch


def follow(
    path_or_name: Path | str,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    config: EngineConfig,
    rename: Path | str | None,
) -> None:
    """As `Engine.follow`."""
    if check_launch(config.parallel) == 0:
        raise RequestError(
            "this is rank 0, which has the engine: make it with Engine.from_pretrained; the other "
            "processes call Engine.follow"
        )
    place = rank_device(device, config.parallel)
    ranks = Ranks(config.parallel, place)
    try:
        with ranks.together():
            checkpoint = load_checkpoint(
                path_or_name,
                device=place,
                dtype=dtype or default_dtype(place),
                rename=rename,
                check_weights=config.check_weights,
            )
            configure(checkpoint.transformer, config, place)
        serve(ranks, checkpoint.transformer)
    finally:
        ranks.close()
