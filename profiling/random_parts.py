"""An engine of random weights at any size: what whole turns of a full-size model are timed with.

Needs transformers, no file and no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from forwards import Setting

from mv2v_engine import Engine
from mv2v_engine.checkpoints import Checkpoint, LoadReport
from mv2v_engine.config import EngineConfig
from mv2v_engine.models.autoencoder import Autoencoder
from mv2v_engine.text import TextEncoder
from mv2v_engine.vae import VideoVAE


def random_engine(setting: Setting, vae: dict[str, Any] | None = None) -> Engine:
    """vae: fields of an `AutoencoderConfig`; none are Wan2.1's.

    Raises:
        ImportError: transformers is not installed.
    """
    transformer, device = setting.transformer, setting.device
    dtype = transformer.patch_embedding.weight.dtype
    with torch.device(device):
        model = Autoencoder(vae)
    parameters = sum(p.numel() for p in transformer.parameters())
    report = LoadReport("mv2v_engine", "random weights", Path(), parameters, (str(dtype),), (), {})
    checkpoint = Checkpoint(
        name=setting.name,
        format="mv2v_engine",
        transformer=transformer,
        config=transformer.config,
        sampling=setting.sampling,
        vae_path=None,
        text_path=None,
        tokenizer_path=None,
        report=report,
        conditioning=("joint", "static"),
    )
    text = random_text_encoder(setting, dtype)
    return Engine(checkpoint, VideoVAE(model, dtype), text, device=device, config=EngineConfig())


def random_text_encoder(setting: Setting, dtype: torch.dtype) -> TextEncoder:
    """One layer of the width that the transformer takes; a turn encodes text once."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    shape = setting.transformer.config
    config = UMT5Config(
        vocab_size=16, d_model=shape.text_dim, d_kv=64, d_ff=256, num_layers=1, num_heads=4
    )
    model = UMT5EncoderModel(config)
    return TextEncoder(model, tokenizer, shape.text_len, setting.device, dtype)
