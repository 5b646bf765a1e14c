"""DINO-F and CLIP-F: how alike a video's frames are to a network (METHOD 15).

The mean cosine between embeddings of successive frames, and between each frame and the first, as
VBench scores subject (DINO) and background (CLIP) consistency. Weights come from a local
transformers folder of a DINOv2 or a CLIP; nothing is downloaded.

T frames, D numbers of an embedding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mv2v_engine.errors import CheckpointError, VideoError

_NAMES = {"dinov2": "DINO-F", "dinov2_with_registers": "DINO-F", "clip": "CLIP-F"}
_BATCH = 16
# OpenAI's and ImageNet's, where a folder says nothing
_CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_DINO_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, eq=False)
class FrameFeatures:
    """A network that embeds frames; made by `load_frame_features`.

    name: "DINO-F" or "CLIP-F". crop: pixels of its square input.
    """

    name: str
    model: Any
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device

    @torch.no_grad()
    def embed(self, frames: Tensor) -> Tensor:
        """Unit embeddings [T, D], float32 on the CPU, of uint8 frames [T, height, width, 3].

        Frames are scaled to the network's square whole, so that nothing at the sides is cut.

        Raises:
            VideoError: other frames than these.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
            raise VideoError(
                "frames must be uint8 [T, height, width, 3], "
                f"got {frames.dtype} {list(frames.shape)}"
            )
        mean, std = (
            torch.tensor(value, device=self.device).view(3, 1, 1) for value in (self.mean, self.std)
        )
        embeddings = []
        for batch in frames.split(_BATCH):
            planes = batch.to(self.device).permute(0, 3, 1, 2).float()
            planes = torch.nn.functional.interpolate(
                planes, (self.crop, self.crop), mode="bicubic", antialias=True
            )
            pixels = (planes.clamp(0, 255) / 255 - mean) / std
            output = self.model(pixel_values=pixels)
            found = output.image_embeds if self.name == "CLIP-F" else output.last_hidden_state[:, 0]
            embeddings.append(torch.nn.functional.normalize(found.float(), dim=-1).cpu())
        return torch.cat(embeddings)


def frame_consistency(embeddings: Tensor) -> float | None:
    """VBench's score of unit embeddings [T, D]: mean over frames from the second on of the mean of
    the cosines with the frame before and with the first. None for a single frame."""
    if len(embeddings) < 2:
        return None
    before = (embeddings[1:] * embeddings[:-1]).sum(-1).clamp_min(0)
    first = (embeddings[1:] @ embeddings[0]).clamp_min(0)
    return float((before + first).mean() / 2)


def load_frame_features(folder: Path | str, *, device: torch.device) -> FrameFeatures:
    """Load a DINOv2 or a CLIP (its image half) from a transformers folder.

    Raises:
        CheckpointError: missing, of another kind, or incomplete.
    """
    from transformers import AutoModel, CLIPVisionModelWithProjection

    folder = Path(folder)
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = said["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} holds no readable config.json with a model_type ({error!r}); give the "
            "transformers folder of a DINOv2 or a CLIP"
        ) from error
    if kind not in _NAMES:
        raise CheckpointError(
            f"{folder} holds a model of type {kind!r}, expected {', '.join(_NAMES)}; give the "
            "transformers folder of a DINOv2 or a CLIP"
        )
    loader = CLIPVisionModelWithProjection if kind == "clip" else AutoModel
    try:
        model, info = cast(Any, loader).from_pretrained(
            str(folder), local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{folder} cannot be read as a {kind} ({reason}); give the whole folder"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights, the first is {missing[0]}; give the whole "
            "folder"
        )
    model.to(device).eval().requires_grad_(False)
    mean, std = _CLIP_STATISTICS if kind == "clip" else _DINO_STATISTICS
    # what DINOv2 is evaluated with; a CLIP sees only the size that it was trained on
    crop = model.config.image_size if kind == "clip" else 16 * model.config.patch_size
    return FrameFeatures(_NAMES[kind], model, int(crop), mean, std, device)
