"""What the segments of a long edit are compared by: DINOv2, or their sources' pooled latents.

T frames, C F H W latents, D numbers of a descriptor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mv2v_engine.config import EngineConfig
from mv2v_engine.memory.segment_retrieval import latent_descriptor
from mv2v_engine.parallel.device import usable_device
from mv2v_engine.vae import weights_fingerprint
from mv2v_engine.vision import DINO, FrameEncoder, frame_encoder_kind, load_frame_encoder


class SegmentDescriber:
    """Made by `open_describer`. encoder: None takes pooled latents.

    key: identity; descriptors of another key do not compare with these.
    """

    def __init__(self, encoder: FrameEncoder | None, folder: str | None = None) -> None:
        self._encoder, self._folder = encoder, folder
        self.key = "latents"
        if encoder is not None:
            self.key = f"{encoder.kind} {weights_fingerprint(encoder.model.state_dict())}"

    def __call__(self, frames: Tensor, source_latents: Tensor) -> Tensor:
        """The descriptor [D] of a segment's source, float32 on the CPU.

        frames: uint8 [T, height, width, 3], none repeated. source_latents: [C, F, H, W].
        """
        if self._encoder is None:
            return latent_descriptor(source_latents)
        return self._encoder(frames).mean(0)

    def describe(self) -> dict[str, Any]:
        """What a report says of it."""
        if self._encoder is None:
            return {"kind": "latents"}
        return {
            "kind": self._encoder.kind,
            "folder": self._folder,
            "side": self._encoder.side,
            "batch": self._encoder.batch_size,
            "device": str(self._encoder.device),
        }


def check_descriptor(config: EngineConfig) -> None:
    """Refuse a folder that holds no DINOv2, before any weights are read.

    Raises:
        CheckpointError: what the folder holds instead.
        RequestError: no such device.
    """
    if config.descriptor is not None:
        frame_encoder_kind(config.descriptor, DINO)
        if config.descriptor_device is not None:
            usable_device(config.descriptor_device)


def open_describer(config: EngineConfig, device: torch.device) -> SegmentDescriber:
    """What the configuration asks for. device: the engine's.

    Raises:
        CheckpointError: the folder is incomplete, or holds no DINOv2.
        RequestError: no such device.
    """
    if config.descriptor is None:
        return SegmentDescriber(None)
    place = device if config.descriptor_device is None else usable_device(config.descriptor_device)
    encoder = load_frame_encoder(
        config.descriptor, device=place, kinds=DINO, batch_size=config.descriptor_batch
    )
    return SegmentDescriber(encoder, str(config.descriptor))
