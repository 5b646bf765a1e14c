"""DINO-F and CLIP-F: how alike a video's frames are to a network (METHOD 15).

The mean cosine between embeddings of successive frames, and between each frame and the first, as
VBench scores subject (DINO) and background (CLIP) consistency; `vision` gives the embeddings.

T frames, D numbers of an embedding.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def frame_consistency(embeddings_TD: Tensor) -> float | None:
    """Mean over frames from the second on of the mean of their cosines with the frame before and
    with the first, negative ones as zero. None for a single frame."""
    if len(embeddings_TD) < 2:
        return None
    units = F.normalize(embeddings_TD, dim=-1)
    before = (units[1:] * units[:-1]).sum(-1).clamp_min(0)
    first = (units[1:] @ units[0]).clamp_min(0)
    return float((before + first).mean() / 2)
