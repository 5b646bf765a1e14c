"""A thin face of transformers' CLIP image encoder, as image-to-video models of Wan use it.

A frame is scaled to the network's square whole, and every token of the last layer but one is kept,
without the final norm. Weights are those of `models_clip_open-clip-xlm-roberta-large-vit-huge-14`,
in Wan's own file or a transformers folder; nothing is downloaded.

I tokens: one of the whole frame, then one a patch. D their width.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.checkpoints.names import bare
from mv2v_engine.checkpoints.weights import WeightReader, read_header
from mv2v_engine.defaults import inference, without_memory
from mv2v_engine.errors import CheckpointError
from mv2v_engine.finite import refuse_weights, require_finite, weight_fault
from mv2v_engine.progress import without_bars

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

# channels of a head of the one that is published (ViT-H/14), which no shape tells
_HEAD_DIM = 80
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_PREFIX = "visual."
# Wan's own names in transformers' words; q, k and v lie in one tensor
_TOP = {
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm",
}
_LAYER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


class ImageEncoder:
    """Frames to tokens; made by `load_image_encoder`. The weights live on the host.

    device: where a frame is encoded, for which a copy of the weights travels, and tokens lie.
    """

    def __init__(self, model: CLIPVisionModel, device: torch.device, dtype: torch.dtype) -> None:
        # transformers' models are only partly typed
        self.model = cast(Any, model)
        self.model.to(dtype=dtype).eval().requires_grad_(False)
        self.device, self.dtype = device, dtype

    @property
    def dim(self) -> int:
        """D."""
        return int(self.model.config.hidden_size)

    @property
    def num_tokens(self) -> int:
        """I."""
        config = self.model.config
        return 1 + int(config.image_size // config.patch_size) ** 2

    @inference
    def __call__(self, frame: Tensor) -> Tensor:
        """Tokens [1, I, D] of a frame uint8 [height, width, 3].

        Raises:
            NotFiniteError: they are not finite.
        """
        side = self.model.config.image_size
        plane = frame.to(self.device).permute(2, 0, 1)[None].float() / 127.5 - 1
        plane = F.interpolate(plane, size=(side, side), mode="bicubic", align_corners=False)
        mean, std = (
            torch.tensor(each, device=self.device)[:, None, None] for each in (_MEAN, _STD)
        )
        pixels = ((plane * 0.5 + 0.5 - mean) / std).to(self.dtype)
        home = next(self.model.parameters()).device
        self.model.to(self.device)
        try:
            found = self.model(pixel_values=pixels, output_hidden_states=True)
        finally:
            self.model.to(home)
        tokens: Tensor = found.hidden_states[-2]
        require_finite(
            tokens,
            "the image encoder's numbers for the source's first frame",
            "use dtype=bfloat16 or float32 if float16 has no room for its numbers, or copy its "
            "weights again",
        )
        return tokens


def load_image_encoder(
    path: Path | str, *, device: torch.device, dtype: torch.dtype, check_weights: bool = True
) -> ImageEncoder:
    """Load a CLIP's image half: Wan's own file, or a transformers folder.

    check_weights: refuse weights that are not finite as `dtype`.

    Raises:
        CheckpointError: it is none, lacks a tensor, or holds numbers that are not finite.
    """
    path = Path(path)
    model = _read_file(path, dtype) if path.is_file() else _read_folder(path, dtype)
    if check_weights:
        found = (weight_fault(name, weight) for name, weight in model.named_parameters())
        refuse_weights(path, [fault for fault in found if fault is not None])
    return ImageEncoder(model, device, dtype)


def _read_folder(path: Path, dtype: torch.dtype) -> CLIPVisionModel:
    from transformers import CLIPVisionModel

    loader = cast(Any, CLIPVisionModel)
    try:
        with without_bars():
            model, info = loader.from_pretrained(
                str(path), local_files_only=True, dtype=dtype, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read as a CLIP image encoder ({reason}); give the whole folder"
        ) from error
    _require_all(path, info["missing_keys"])
    return cast("CLIPVisionModel", model)


def _read_file(path: Path, dtype: torch.dtype) -> CLIPVisionModel:
    """The encoder in a file of Wan's names; every size but a head's is in a shape."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    header = {bare(key): info for key, info in read_header(path).items()}
    infos = {key.rpartition(_PREFIX)[2]: info for key, info in header.items() if _PREFIX in key}
    sizes = ("patch_embedding.weight", "pos_embedding", "transformer.0.mlp.0.weight")
    if absent := [name for name in sizes if name not in infos]:
        raise CheckpointError(
            f"{path} is no CLIP image encoder: it lacks visual.{absent[0]}; give "
            "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, or image_encoder/ as "
            "diffusers saves it"
        )
    width, _, patch, _ = infos[sizes[0]].shape
    layers = {name.split(".")[1] for name in infos if name.startswith("transformer.")}
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=infos[sizes[2]].shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=max(width // _HEAD_DIM, 1),
        image_size=patch * math.isqrt(infos[sizes[1]].shape[-2] - 1),
        patch_size=patch,
        hidden_act="gelu",
    )
    with without_memory():
        model = CLIPVisionModel(config)
    weights: dict[str, Tensor] = {}
    with WeightReader() as reader:
        for name, info in infos.items():
            # a copy even when nothing changes: the file must not stay mapped
            weights |= _renamed(name, reader.read(info).to(dtype, copy=True))
    expected = {name.removeprefix("vision_model.") for name, _ in model.named_parameters()}
    _require_all(path, expected - weights.keys())
    inner = getattr(model, "vision_model", model)
    inner.load_state_dict({n: weights[n] for n in expected}, strict=False, assign=True)
    # what no file holds: the positions' numbers
    embeddings = inner.embeddings
    embeddings.register_buffer(
        "position_ids",
        torch.arange(embeddings.num_positions, dtype=torch.int64, device="cpu")[None],
        persistent=False,
    )
    return model


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of Wan's file by transformers' names; q, k and v of the one that holds them."""
    module, _, leaf = name.rpartition(".")
    if match := re.fullmatch(r"transformer\.(\d+)\.(.+)", module):
        layer = f"encoder.layers.{match[1]}."
        if match[2] == "attn.to_qkv":
            parts = zip("qkv", tensor.chunk(3), strict=True)
            return {f"{layer}self_attn.{p}_proj.{leaf}": part for p, part in parts}
        return {f"{layer}{_LAYER.get(match[2], match[2])}.{leaf}": tensor}
    if name in ("cls_embedding", "pos_embedding"):
        return {_TOP[name]: tensor.flatten() if name.startswith("cls") else tensor.flatten(0, -2)}
    return {_TOP.get(name) or f"{_TOP.get(module, module)}.{leaf}": tensor}


def _require_all(path: Path, missing: Any) -> None:
    if names := sorted(missing):
        raise CheckpointError(
            f"{path} lacks {len(names)} weights of a CLIP image encoder, the first is {names[0]}; "
            "give the whole of it"
        )
