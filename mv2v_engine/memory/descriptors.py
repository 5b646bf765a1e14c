"""What a video segment looks like, as one vector (METHOD 10).

The mean of its frames' DINOv2 embeddings; where no DINOv2 weights are at hand, its VAE latents
averaged over time and over a coarse grid. Both are compared by their cosine, and never with each
other.

T frames, C F H W latents, D numbers of a descriptor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.errors import CheckpointError, RequestError, VideoError

if TYPE_CHECKING:
    from transformers import Dinov2Model

_KINDS = ("dinov2", "dinov2_with_registers")
# what every published DINOv2 was evaluated with, should a folder not say
_RESIZE, _CROP = 256, 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LATENT_GRID = (4, 4)


def latent_descriptor(latents_CFHW: Tensor) -> Tensor:
    """Latents averaged over time and over a 4x4 grid, float32 [16 C] on the CPU.

    Normalised latents have a mean near zero, so that their cosine tells segments apart.

    Raises:
        RequestError: latents of another rank.
    """
    if latents_CFHW.ndim != 4:
        raise RequestError(f"latents must have shape [C, F, H, W], got {list(latents_CFHW.shape)}")
    pooled = F.adaptive_avg_pool2d(latents_CFHW.float().mean(1), _LATENT_GRID)
    return pooled.flatten().cpu()


class DinoDescriptor:
    """DINOv2 of any size, with or without registers; made by `load_dino`.

    Args:
        model: transformers' model, moved to `device` in `dtype`.
        resize, crop: pixels of the shorter side after scaling, and of the square cut from it.
        mean, std: of the model's pixels, in 0..1.
        batch_size: frames of one forward.
    """

    def __init__(
        self,
        model: Dinov2Model,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        resize: int = _RESIZE,
        crop: int = _CROP,
        mean: tuple[float, ...] = _MEAN,
        std: tuple[float, ...] = _STD,
        batch_size: int = 16,
    ) -> None:
        if batch_size < 1:
            raise RequestError(f"batch_size must be at least 1, got {batch_size}")
        patch = int(model.config.patch_size)
        if crop < patch or resize < crop:
            raise CheckpointError(
                f"a DINOv2 of {patch}-pixel patches cannot see a crop of {crop} from {resize} "
                "pixels; its preprocessor_config.json must give resize >= crop >= patch"
            )
        # transformers' models are only partly typed
        self.model = cast(Any, model)
        self.model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.device, self.dtype, self.batch_size = device, dtype, batch_size
        self.resize, self.crop = resize, crop
        self._mean_311 = torch.tensor(mean, device=device).reshape(3, 1, 1)
        self._std_311 = torch.tensor(std, device=device).reshape(3, 1, 1)

    @property
    def dim(self) -> int:
        """D, the width of the model."""
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        """The mean of all frames' embeddings, float32 [D] on the CPU.

        frames: uint8 [T, height, width, 3].

        Raises:
            VideoError: other frames than these.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
            raise VideoError(
                "frames must be uint8 [T, height, width, 3], "
                f"got {frames.dtype} {list(frames.shape)}"
            )
        if not len(frames):
            raise VideoError("a segment needs at least one frame to be described, got none")
        total = torch.zeros(self.dim, dtype=torch.float64)
        for batch in frames.split(self.batch_size):
            embeddings = self.model(pixel_values=self._pixels(batch)).pooler_output
            total += embeddings.double().sum(0).cpu()
        return (total / len(frames)).float()

    def _pixels(self, frames: Tensor) -> Tensor:
        """The middle of the scaled frames, normalised: [T, 3, crop, crop]."""
        planes = frames.to(self.device).permute(0, 3, 1, 2).float()
        height, width = planes.shape[2:]
        scale = self.resize / min(height, width)
        size = (max(self.resize, int(height * scale)), max(self.resize, int(width * scale)))
        planes = F.interpolate(
            planes, size=size, mode="bicubic", antialias=True, align_corners=False
        )
        top, left = (size[0] - self.crop) // 2, (size[1] - self.crop) // 2
        planes = planes[:, :, top : top + self.crop, left : left + self.crop]
        pixels = planes.round().clamp(0, 255) / 255
        return ((pixels - self._mean_311) / self._std_311).to(self.dtype)


def load_dino(
    folder: Path | str,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
) -> DinoDescriptor:
    """Load a DINOv2 from a transformers folder. Nothing is downloaded.

    Raises:
        CheckpointError: missing, of another kind, or incomplete.
    """
    folder = Path(folder)
    config = _read_json(folder, "config.json")
    kind = config.get("model_type")
    if kind not in _KINDS:
        raise CheckpointError(
            f"{folder} holds a model of type {kind!r}, expected {' or '.join(_KINDS)}; give the "
            "folder of a DINOv2, or none to compare latents"
        )
    from transformers import AutoModel

    try:
        model, info = AutoModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{folder} cannot be read as a DINOv2 ({reason}); give the whole folder"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights, the first is {missing[0]}; give the folder "
            "of a whole DINOv2"
        )
    return DinoDescriptor(
        model, device=device, dtype=dtype, batch_size=batch_size, **_preprocessing(folder)
    )


def _preprocessing(folder: Path) -> dict[str, Any]:
    """What the folder's preprocessor_config.json says; empty if it has none."""
    if not (folder / "preprocessor_config.json").is_file():
        return {}
    config = _read_json(folder, "preprocessor_config.json")
    try:
        size, crop = config["size"], config["crop_size"]
        return {
            "resize": int(size["shortest_edge"]),
            "crop": int(crop["height"]),
            "mean": tuple(map(float, config["image_mean"])),
            "std": tuple(map(float, config["image_std"])),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'preprocessor_config.json'} says nothing of size.shortest_edge, "
            f"crop_size.height, image_mean and image_std ({error!r}); give DINOv2's own"
        ) from error


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no readable {name} ({error}); give the folder of a DINOv2"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder / name} is no JSON object; give the folder of a DINOv2")
    return value
