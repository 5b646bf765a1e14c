"""What eight bits do to a prompt's embedding: UMT5-XXL's blocks at their own size, random weights.

`python profiling/bench_text_quantize.py [--layers 1] [--tokens 32] [--out FILE]`

Embeddings of random tokens by transformers' encoder: in bfloat16, and with the linear layers of its
blocks in int8 or fp8 beside it, against float32 of the same weights. `error` is the norm of the
difference over the norm of the embedding, `cosine` the least of any token. Random weights have no
outliers, as trained ones do.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from measure import digits, provenance, table
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from mv2v_engine.engine.budget import module_bytes
from mv2v_engine.files import save_json
from mv2v_engine.shapes import UMT5_XXL
from mv2v_engine.text import _quantize


@torch.no_grad()
def measure(num_layers: int, num_tokens: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    shape = UMT5_XXL
    config = UMT5Config(
        vocab_size=512,
        d_model=shape.d_model,
        d_kv=shape.d_kv,
        d_ff=shape.d_ff,
        num_layers=num_layers,
        num_heads=shape.num_heads,
        feed_forward_proj="gated-gelu",
    )
    whole: Any = UMT5EncoderModel(config).eval()
    ids = torch.randint(0, 512, (1, num_tokens))
    exact = whole(ids).last_hidden_state
    rows = []
    for kind in (None, "int8", "fp8"):
        model = deepcopy(whole).to(torch.bfloat16)
        if kind is not None:
            _quantize(model, kind, torch.bfloat16, {})
        found: Tensor = model(ids).last_hidden_state.float()
        cosines = torch.nn.functional.cosine_similarity(found, exact, dim=-1)
        rows.append(
            {
                "weights": kind or "bfloat16",
                "megabytes": digits(module_bytes(model) / 1e6),
                "error": digits(float((found - exact).norm() / exact.norm())),
                "cosine": round(float(cosines.min()), 6),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = measure(args.layers, args.tokens)
    print(table(rows, "weights megabytes error cosine"))
    if args.out:
        common = {"layers": args.layers, "tokens": args.tokens}
        save_json(args.out, {**common, **provenance(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
