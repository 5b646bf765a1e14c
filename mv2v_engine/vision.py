"""A thin face of transformers' image encoders: DINOv2, or the image half of a CLIP.

Frames are scaled to the network's square whole, so that nothing at the sides of a wide video is
cut. Weights come from a local transformers folder; nothing is downloaded.

T frames, D numbers of an embedding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.defaults import inference
from mv2v_engine.errors import CheckpointError, RequestError, VideoError
from mv2v_engine.progress import without_bars

DINO, CLIP = ("dinov2", "dinov2_with_registers"), ("clip",)


@dataclass(frozen=True, slots=True)
class _Pixels:
    """What a network expects: pixels of a side, and the mean and deviation of values in 0..1."""

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class FrameEncoder:
    """Frames to embeddings; made by `load_frame_encoder`.

    kind: the config's model_type. batch_size: frames of one forward.
    """

    def __init__(
        self,
        model: Any,
        kind: str,
        pixels: _Pixels,
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
    ) -> None:
        if batch_size < 1:
            raise RequestError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.kind, self.side, self.batch_size = model, kind, pixels.side, batch_size
        self.model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.device, self.dtype = device, dtype
        self._mean_311 = torch.tensor(pixels.mean, device=device).reshape(3, 1, 1)
        self._std_311 = torch.tensor(pixels.std, device=device).reshape(3, 1, 1)

    @inference
    def __call__(self, frames: Tensor) -> Tensor:
        """Embeddings float32 [T, D] on the CPU of frames uint8 [T, height, width, 3].

        Raises:
            VideoError: other frames than these, or none.
        """
        is_video = frames.ndim == 4 and frames.shape[-1] == 3 and frames.dtype == torch.uint8
        if not is_video or not len(frames):
            raise VideoError(
                "frames must be uint8 [T, height, width, 3] with T >= 1, "
                f"got {frames.dtype} {list(frames.shape)}"
            )
        return torch.cat([self._embed(batch) for batch in frames.split(self.batch_size)])

    def _embed(self, frames: Tensor) -> Tensor:
        planes = frames.to(self.device).permute(0, 3, 1, 2).float()
        size = (self.side, self.side)
        planes = F.interpolate(
            planes, size=size, mode="bicubic", antialias=True, align_corners=False
        )
        pixels = (planes.clamp(0, 255) / 255 - self._mean_311) / self._std_311
        output = self.model(pixel_values=pixels.to(self.dtype))
        found: Tensor = output.image_embeds if self.kind in CLIP else output.pooler_output
        return found.float().cpu()


def frame_encoder_kind(folder: Path | str, kinds: tuple[str, ...] = DINO + CLIP) -> str:
    """Which of `kinds` a transformers folder holds, before any weights are read.

    Raises:
        CheckpointError: missing, or of another kind.
    """
    folder, wanted = Path(folder), " or ".join(kinds)
    kind = _read_json(folder, "config.json", wanted).get("model_type")
    if kind not in kinds:
        raise CheckpointError(
            f"{folder} holds a model of type {kind!r}, expected {wanted}; give such a folder"
        )
    return str(kind)


def load_frame_encoder(
    folder: Path | str,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    kinds: tuple[str, ...] = DINO + CLIP,
    batch_size: int = 16,
) -> FrameEncoder:
    """Load an image encoder of one of `kinds` from a transformers folder.

    Raises:
        CheckpointError: missing, of another kind, or incomplete.
    """
    folder, wanted = Path(folder), " or ".join(kinds)
    kind = frame_encoder_kind(folder, kinds)
    from transformers import AutoModel, CLIPVisionModelWithProjection

    loader = cast(Any, CLIPVisionModelWithProjection if kind in CLIP else AutoModel)
    try:
        with without_bars():
            model, info = loader.from_pretrained(
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
    pixels = _pixels(folder, model.config, kind, wanted)
    return FrameEncoder(model, kind, pixels, device=device, dtype=dtype, batch_size=batch_size)


def _pixels(folder: Path, config: Any, kind: str, wanted: str) -> _Pixels:
    """How pixels are prepared: by the folder's preprocessor_config.json, else as published."""
    from transformers.image_utils import (
        IMAGENET_DEFAULT_MEAN,
        IMAGENET_DEFAULT_STD,
        OPENAI_CLIP_MEAN,
        OPENAI_CLIP_STD,
    )

    # DINOv2 takes any size and is evaluated at 16 patches; a CLIP sees what it was trained on
    side = config.image_size if kind in CLIP else 16 * config.patch_size
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if kind in CLIP:
        mean, std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    name = "preprocessor_config.json"
    if (folder / name).is_file():
        said = _read_json(folder, name, wanted)
        try:
            side = int(said["crop_size"]["height"])
            mean, std = (tuple(map(float, said[key])) for key in ("image_mean", "image_std"))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / name} says nothing of crop_size.height, image_mean and image_std "
                f"({error!r}); give the model's own, or none"
            ) from error
    if side < config.patch_size or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise CheckpointError(
            f"{folder / name}: {side} pixels with mean {mean} and deviation {std} are no input of "
            f"a network of {config.patch_size}-pixel patches; give the model's own"
        )
    return _Pixels(side, tuple(mean), tuple(std))


def _read_json(folder: Path, name: str, wanted: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no readable {name} ({error}); give a transformers folder of {wanted}"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder / name} is no JSON object; give the model's own")
    return value
