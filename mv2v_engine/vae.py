"""The face of a Wan autoencoder: uint8 frames to normalised latents and back, and its files.

Latents are the posterior's mode, (z - mean) / std with the statistics of the model's config
(BASE_MODELS 3.2). The model walks the frames in its own causal chunks of 4, so memory does not
grow with time; frames of more than 832x480 pixels are also cut into overlapping tiles.

T pixel frames, F latent frames, H W latent rows and columns, C latent channels.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mv2v_engine.checkpoints.components import part_of
from mv2v_engine.checkpoints.weights import (
    TensorInfo,
    WeightReader,
    read_header,
    with_scales,
)
from mv2v_engine.defaults import inference, without_memory
from mv2v_engine.errors import CheckpointError, RequestError, VideoError
from mv2v_engine.finite import refuse_weights, require_finite, weight_fault
from mv2v_engine.models.autoencoder import Autoencoder, AutoencoderConfig, Past, Tiles
from mv2v_engine.models.latent_rgb import FILE as RGB_FILE
from mv2v_engine.models.latent_rgb import LatentRGB, wan21, wan22
from mv2v_engine.models.tiny_decoder import TinyDecoder, TinyShape
from mv2v_engine.ops.conv3d import speed_up_conv3d

# frames of more pixels are encoded and decoded in tiles
TILE_ABOVE_PIXELS = 480 * 832
_TILE = 512
_TILE_STRIDE = 384

_WEIGHTS = "diffusion_pytorch_model.safetensors"
# the original Wan files' names in diffusers' words, applied one after the other
_ORIGINAL_NAMES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    # Wan2.2's stages hold their layers; Wan2.1's are a flat list
    (
        r"\.(down|up)samples\.(\d+)\.\1samples\.\d+\.(resample|time_conv)\.",
        r".\1_blocks.\2.\1sampler.\3.",
    ),
    (r"\.(down|up)samples\.(\d+)\.\1samples\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.downsamples\.", ".down_blocks."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)
# statistics of Wan2.2's latents (diffusers' convert_wan_to_diffusers.py); Wan2.1's are the defaults
_WAN22_MEAN = """
    -0.2289 -0.0052 -0.1323 -0.2339 -0.2799 0.0174 0.1838 0.1557 -0.1382 0.0542
    0.2813 0.0891 0.1570 -0.0098 0.0375 -0.1825 -0.2246 -0.1207 -0.0698 0.5109
    0.2665 -0.2108 -0.2158 0.2502 -0.2055 -0.0322 0.1109 0.1567 -0.0729 0.0899
    -0.2799 -0.1230 -0.0313 -0.1649 0.0117 0.0723 -0.2839 -0.2083 -0.0520 0.3748
    0.0152 0.1957 0.1433 -0.2944 0.3573 -0.0548 -0.1681 -0.0667
"""
_WAN22_STD = """
    0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344
    0.5894 1.0901 0.6885 0.6165 0.8454 0.4978 0.5759 0.3523 0.7135 0.6804
    0.5833 1.4146 0.8986 0.5659 0.7069 0.5338 0.4889 0.4917 0.4069 0.4999
    0.6866 0.4093 0.5709 0.6065 0.6415 0.4944 0.5726 1.2042 0.5458 1.6887
    0.3971 1.0600 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744
"""
# what no shape tells of it
_WAN22: dict[str, Any] = {
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [float(mean) for mean in _WAN22_MEAN.split()],
    "latents_std": [float(deviation) for deviation in _WAN22_STD.split()],
}
# its full size, as published
WAN_2_2_VAE = {**_WAN22, "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48}
_FINGERPRINT_SAMPLES = 64
# in names of what a stream keeps: of a tiny decoder, by its layers' numbers
_TINY = "tiny."


def weights_fingerprint(weights: Mapping[str, Tensor], about: str = "") -> str:
    """Identity of a set of weights, from samples of every one, and of what `about` says.

    The same on every device, and for weights loaded in fp32 or bf16.
    """
    digest = hashlib.sha256(about.encode())
    for name, weight in sorted(weights.items()):
        flat = weight.detach().flatten()
        samples = flat[:: max(1, len(flat) // _FINGERPRINT_SAMPLES)]
        digest.update(name.encode())
        digest.update(samples.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


class VideoVAE:
    """Encoder and decoder of one latent space.

    decoder: a tiny one that makes the frames in place of the model's own; None, unless it is set.

    Args:
        model: stays on its device.
        dtype: what it computes in; latents are always fp32.
        latent_rgb: the linear colours of its latents; None takes what is published of them, if
            there is something.
        tile_above: pixels of a frame above which tiling is on.
    """

    def __init__(
        self,
        model: Autoencoder,
        dtype: torch.dtype = torch.float32,
        *,
        latent_rgb: LatentRGB | None = None,
        tile_above: int = TILE_ABOVE_PIXELS,
    ) -> None:
        self.model, config = model, model.config
        if not len(config.latents_mean) == len(config.latents_std) == config.z_dim:
            raise CheckpointError(
                f"the VAE has {config.z_dim} latent channels but {len(config.latents_mean)} means "
                f"and {len(config.latents_std)} deviations; its config.json must list one of each "
                "per channel"
            )
        means_fit = all(map(math.isfinite, config.latents_mean))
        if not means_fit or not all(0 < deviation < math.inf for deviation in config.latents_std):
            raise CheckpointError(
                "the VAE's config.json has latents_mean that are not finite, or latents_std that "
                f"are not positive: {config.latents_mean} and {config.latents_std}; correct it or "
                "copy it again"
            )
        model.to(dtype).eval().requires_grad_(False)
        self.device = model.quant_conv.weight.device
        if self.device.type == "cpu":
            speed_up_conv3d(model)
        self.dtype = dtype
        self.latent_rgb = _published_rgb(config) if latent_rgb is None else latent_rgb
        self.tile_above = tile_above
        # one video at a time, which is what a turn's memory is counted for
        self._lock = threading.Lock()
        self.decoder: TinyDecoder | None = None
        self.temporal_stride = config.scale_factor_temporal
        self.spatial_stride = config.scale_factor_spatial
        self.latent_channels = config.z_dim
        shape = (self.latent_channels, 1, 1, 1)
        like: dict[str, Any] = {"dtype": torch.float32, "device": self.device}
        self._mean_C111 = torch.tensor(config.latents_mean, **like).reshape(shape)
        self._std_C111 = torch.tensor(config.latents_std, **like).reshape(shape)

    @cached_property
    def key(self) -> str:
        """Identity of the latent space: a hash of the config and of samples of every weight.

        Independent of device, and of loading the same weights in fp32 or bf16.
        """
        about = json.dumps(self.model.fields, sort_keys=True, default=str)
        return weights_fingerprint(self.model.state_dict(), about)

    def latent_shape(self, num_frames: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(C, F, H, W) of a video of `num_frames` frames of `size` (height, width).

        Raises:
            VideoError: the frames are not 4n+1, or a side is no multiple of the stride.
        """
        if num_frames < 1 or num_frames % self.temporal_stride != 1:
            near = max(num_frames - 1, 0) // self.temporal_stride * self.temporal_stride + 1
            raise VideoError(
                f"got {num_frames} frames; the VAE takes {self.temporal_stride}n+1: "
                f"use {near} or {near + self.temporal_stride}"
            )
        stride = self.spatial_stride
        if min(size) < stride or size[0] % stride or size[1] % stride:
            raise VideoError(
                f"got frames of {size[1]}x{size[0]}; width and height must be multiples of "
                f"{stride}: crop or scale them first"
            )
        frames = (num_frames - 1) // self.temporal_stride + 1
        return self.latent_channels, frames, size[0] // stride, size[1] // stride

    @inference
    def encode(
        self,
        frames: Tensor,
        *,
        check: Callable[[], None] | None = None,
        pasts: list[Past] | None = None,
    ) -> Tensor:
        """Frames uint8 [T, height, width, 3] to normalised fp32 latents [C, F, H, W].

        check: called before every chunk of frames, of every tile; what it raises ends the work.
        pasts: of the frames before, as `Autoencoder.encode` takes them; behind others T is a
        multiple of the rate.

        Raises:
            VideoError: other frames than these, or a size as in `latent_shape`.
            NotFiniteError: the latents are not finite.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
            raise VideoError(
                "frames must be uint8 [T, height, width, 3], "
                f"got {frames.dtype} {list(frames.shape)}"
            )
        pixels = frames.to(self.device).permute(3, 0, 1, 2)
        return self.encode_pixels(pixels.to(torch.float32) / 127.5 - 1, check=check, pasts=pasts)

    @inference
    def encode_pixels(
        self,
        pixels_CTHW: Tensor,
        *,
        check: Callable[[], None] | None = None,
        pasts: list[Past] | None = None,
    ) -> Tensor:
        """Encode as `encode` does, pixels [3, T, height, width] in -1..1."""
        _, num_frames, height, width = pixels_CTHW.shape
        # behind other frames there is no first one, which counts alone
        self.latent_shape(num_frames + bool(pasts), (height, width))
        pixels = pixels_CTHW.to(self.device, self.dtype)
        with self._lock:
            tiles = self._tiles(height * width)
            latents_CFHW = self.model.encode(pixels[None], tiles=tiles, check=check, pasts=pasts)
            latents_CFHW = latents_CFHW[0].float()
        latents_CFHW = (latents_CFHW - self._mean_C111) / self._std_C111
        require_finite(latents_CFHW, "the latents that the VAE made of the source", self._advice)
        return latents_CFHW

    @inference
    def decode(self, latents_CFHW: Tensor, *, check: Callable[[], None] | None = None) -> Tensor:
        """Normalised latents [C, F, H, W] to frames uint8 [T, height, width, 3] on the CPU.

        check: as for `encode`, before every latent frame.

        Raises:
            VideoError: the latents have another number of axes or channels.
            NotFiniteError: the frames are not finite.
        """
        return self.decode_on_device(latents_CFHW, check=check).cpu()

    @inference
    def decode_on_device(
        self,
        latents_CFHW: Tensor,
        *,
        check: Callable[[], None] | None = None,
        pasts: list[Past] | None = None,
        tiny_past: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Decode as `decode` does, and leave the frames on the model's device.

        pasts: of the latents before, as `Autoencoder.decode` takes them; tiny_past: the same of a
        tiny decoder, as `TinyDecoder.decode`.
        """
        if latents_CFHW.ndim != 4 or len(latents_CFHW) != self.latent_channels:
            raise VideoError(
                f"latents must have shape [{self.latent_channels}, F, H, W], "
                f"got {list(latents_CFHW.shape)}"
            )
        rows, columns = latents_CFHW.shape[2:]
        latents = latents_CFHW.to(self.device, torch.float32) * self._std_C111 + self._mean_C111
        with self._lock:
            if self.decoder is not None:
                given = latents_CFHW.to(self.device, self.dtype)
                colours = self.decoder.decode(given, check, tiny_past)
                decoded = colours.transpose(0, 1) * 2 - 1
            else:
                tiles = self._tiles(rows * columns * self.spatial_stride**2)
                decoded = self.model.decode(
                    latents[None].to(self.dtype), tiles=tiles, check=check, pasts=pasts
                )[0]
        require_finite(decoded, "the frames that the VAE made of the latents", self._advice)
        pixels = (decoded.float().clamp(-1, 1) + 1) * 127.5
        return pixels.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()

    @cached_property
    def decoder_key(self) -> str | None:
        """Identity of the tiny decoder that makes the frames; None if there is none."""
        return None if self.decoder is None else weights_fingerprint(self.decoder.state_dict())

    def take_decoder(self, path: Path | str, *, check_weights: bool = True) -> None:
        """Have a TAEHV or LightTAE file decode from now on; latents are not affected.

        Raises:
            CheckpointError: it is no such file, of another latent space, incomplete, or not finite.
        """
        self.decoder = _tiny_decoder(Path(path), self, check_weights)

    @property
    def _advice(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"run the VAE in float32 if {dtype} has no room for its numbers, or look for damaged "
            "weights with `run inspect PATH --deep`"
        )

    def _tiles(self, pixels: int) -> Tiles | None:
        if pixels <= self.tile_above:
            return None
        return Tiles(_TILE // self.spatial_stride, _TILE_STRIDE // self.spatial_stride)


class _Streamed:
    """A half of the model that goes on where its last call ended.

    What its causal layers have seen last stays here between two calls.
    """

    _part: ClassVar[str]

    def __init__(self, vae: VideoVAE) -> None:
        self._vae = vae
        self._pasts: list[Past] = []

    @property
    def _layers(self) -> dict[str, nn.Module]:
        return dict(getattr(self._vae.model, self._part).named_modules())

    @property
    def num_bytes(self) -> int:
        """The bytes of what it keeps."""
        return sum(frames.nbytes for frames in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored between two calls, by tile and the layer's name."""
        return {
            f"{tile}.{name}": past.frames[layer]
            for tile, past in enumerate(self._pasts)
            for name, layer in self._layers.items()
            if layer in past.frames
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave.

        Raises:
            ValueError: a name is no layer's of this model.
        """
        layers, pasts = self._layers, dict[int, Past]()
        for name, frames in tensors.items():
            tile, _, layer = name.partition(".")
            if layer not in layers:
                raise ValueError(f"the VAE's {self._part} has no layer {layer!r}")
            past = pasts.setdefault(int(tile), Past())
            past.frames[layers[layer]] = frames.to(self._vae.device)
            past.is_first = False
        self._pasts = [pasts[tile] for tile in sorted(pasts)]


class StreamEncoder(_Streamed):
    """Encodes a video's frames as they come, to the latents that all of them at once would give."""

    _part = "encoder"

    def encode(self, frames: Tensor, *, check: Callable[[], None] | None = None) -> Tensor:
        """The next frames uint8 [T, height, width, 3] to normalised latents [C, F, H, W].

        T is 1 + rate (F - 1) of the video's first frames, and rate F of all others.

        Raises:
            VideoError, NotFiniteError: as `VideoVAE.encode`; nothing can be encoded after the
                latter, or after what `check` raises.
        """
        return self._vae.encode(frames, check=check, pasts=self._pasts)


class StreamDecoder(_Streamed):
    """Decodes a video's latents as they come, to the frames that all of them at once would give.

    A tiny decoder, where the VAE has one, keeps a frame a block in place of what the VAE would.
    """

    _part = "decoder"

    def __init__(self, vae: VideoVAE) -> None:
        super().__init__(vae)
        self._tiny_past: dict[int, Tensor] = {}

    def decode(self, latents_CFHW: Tensor) -> Tensor:
        """The next latents [C, F, H, W] to frames uint8 [T, height, width, 3] on the CPU.

        The first latent frame of the video is one frame, every other as many as the model's rate.

        Raises:
            VideoError, NotFiniteError: as `VideoVAE.decode`; nothing can be decoded after that.
        """
        pasts: dict[str, Any] = {"pasts": self._pasts, "tiny_past": self._tiny_past}
        return self._vae.decode_on_device(latents_CFHW, **pasts).cpu()

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored between two calls, by tile and the layer's name."""
        tiny = {f"{_TINY}{number}": frame for number, frame in self._tiny_past.items()}
        return super().tensors() | tiny

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave.

        Raises:
            ValueError: a name is no layer's of this model, or of another decoder.
        """
        tiny = {name: frame for name, frame in tensors.items() if name.startswith(_TINY)}
        if bool(tiny) != (self._vae.decoder is not None) and tensors:
            raise ValueError("it was stored with another decoder")
        super().load({name: frames for name, frames in tensors.items() if name not in tiny})
        self._tiny_past = {
            int(name.removeprefix(_TINY)): frame.to(self._vae.device)
            for name, frame in tiny.items()
        }


def _published_rgb(config: AutoencoderConfig) -> LatentRGB | None:
    """The published colours of a latent space, which its statistics tell."""
    if config.latents_mean == AutoencoderConfig().latents_mean:
        return wan21()
    return wan22() if config.latents_mean == tuple(_WAN22["latents_mean"]) else None


def load_vae(
    path: Path | str, *, device: torch.device, dtype: torch.dtype, check_weights: bool = True
) -> VideoVAE:
    """Load a VAE from a diffusers folder or a single file.

    A folder is the VAE's own, or a pipeline's that has it under `vae/`. A file is Wan2.1's or
    Wan2.2's own, ComfyUI's, or one with other models in it. Nothing is downloaded.

    check_weights: refuse weights that are not finite, in the file or after the cast to `dtype`.

    Raises:
        CheckpointError: missing, unknown, incomplete, not finite, or of shapes that do not fit its
            config.
    """
    path, colours = Path(path), None
    if path.is_dir():
        folder = path if (path / "config.json").is_file() else path / "vae"
        config, infos = _read_folder(path, folder)
        colours = folder / RGB_FILE
    elif path.is_file():
        config, infos = _read_file(path)
    else:
        raise CheckpointError(
            f"{path} does not exist; give a diffusers VAE folder or Wan2.1_VAE.pth"
        )
    try:
        with without_memory():
            model = Autoencoder(config)
    except RequestError as error:
        raise CheckpointError(
            f"{path} has an unusable VAE config: {error}; correct it or copy it again"
        ) from error
    _fill(model, path, infos, device, dtype, check_weights=check_weights)
    rgb = None
    if colours is not None and colours.is_file():
        rgb = LatentRGB.read(colours, model.config.z_dim)
    return VideoVAE(model, dtype, latent_rgb=rgb)


def _tiny_decoder(path: Path, vae: VideoVAE, check_weights: bool) -> TinyDecoder:
    """A decoder of `vae`'s latents."""
    expected = "give one such as taew2_1.pth for Wan2.1's latents, taew2_2.pth for Wan2.2's"
    if not path.is_file():
        raise CheckpointError(f"decoder={path} is no file; {expected}")
    infos = {
        name.removeprefix("decoder."): info
        for name, info in with_scales(read_header(path)).items()
        if name.startswith("decoder.")
    }
    try:
        shape = TinyShape.of({name: info.shape for name, info in infos.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{path} is no tiny decoder: {error}; {expected}") from error
    got = (shape.channels, shape.temporal_stride, shape.spatial_stride)
    due = (vae.latent_channels, vae.temporal_stride, vae.spatial_stride)
    if got != due:
        raise CheckpointError(
            f"{path} decodes latents of {got[0]} channels and strides of {got[1]} frames and "
            f"{got[2]} pixels, the VAE's have {due[0]} and {due[1]} and {due[2]}; {expected}"
        )
    with without_memory():
        decoder = TinyDecoder(shape)
    _fill(decoder, path, infos, vae.device, vae.dtype, check_weights=check_weights)
    return decoder.eval().requires_grad_(False)


def _read_folder(path: Path, folder: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} holds no readable config.json ({error}); give a diffusers VAE folder"
        ) from error
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind != "AutoencoderKLWan":
        raise CheckpointError(
            f"{folder} is a {kind or 'folder of unknown kind'}, expected AutoencoderKLWan; "
            "give the VAE of a Wan model"
        )
    if not (folder / _WEIGHTS).is_file():
        raise CheckpointError(f"{folder} lacks {_WEIGHTS}; complete the folder")
    return config, with_scales(read_header(folder / _WEIGHTS))


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Config and diffusers-named tensors of a single file, Wan's own or another's of its names."""
    infos = {_renamed(name): info for name, info in part_of(path, "vae").items()}
    sizes = ("encoder.conv_in.weight", "decoder.norm_out.gamma", "post_quant_conv.weight")
    if absent := [name for name in sizes if name not in infos or not infos[name].shape]:
        raise CheckpointError(
            f"{path.name} is no whole Wan VAE (it lacks {absent[0]}); give Wan2.1_VAE.pth, "
            "Wan2.2_VAE.pth, a file with their tensors, or the folder of a diffusers VAE"
        )
    width, decoder_width, channels = (infos[name].shape[0] for name in sizes)
    is_22 = any(".downsampler." in name for name in infos)
    config: dict[str, Any] = {"base_dim": width}
    if is_22:
        config = {**_WAN22, **config, "decoder_base_dim": decoder_width, "z_dim": channels}
    if channels != (48 if is_22 else 16):
        raise CheckpointError(
            f"{path.name} has {channels} latent channels and no config that tells their means and "
            "deviations; expected 16 (Wan2.1) or 48 (Wan2.2): give it as a diffusers folder"
        )
    return config, infos


def _renamed(name: str) -> str:
    for pattern, words in _ORIGINAL_NAMES:
        name = re.sub(pattern, words, name)
    if up := re.match(r"decoder\.upsamples\.(\d+)\.", name):
        stage, layer = divmod(int(up[1]), 4)  # three blocks and an upsampling each
        place = "upsamplers.0" if layer == 3 else f"resnets.{layer}"
        name = f"decoder.up_blocks.{stage}.{place}.{name[up.end() :]}"
    return name


def _fill(
    model: nn.Module,
    path: Path,
    infos: Mapping[str, TensorInfo],
    device: torch.device,
    dtype: torch.dtype,
    *,
    check_weights: bool,
) -> None:
    """Give a model its weights; refuse others than those that it expects, and those not finite."""
    expected = model.state_dict()
    missing = sorted(expected.keys() - infos.keys())
    unknown = sorted(infos.keys() - expected.keys())
    if missing or unknown:
        example = f"first missing {missing[0]}" if missing else f"first unknown {unknown[0]}"
        raise CheckpointError(
            f"{path} does not fit its VAE config: {len(missing)} tensors missing, {len(unknown)} "
            f"unknown, {example}; give weights and config of one model"
        )
    for name, info in infos.items():
        if info.shape != tuple(expected[name].shape):
            raise CheckpointError(
                f"{path}: {name} has shape {list(info.shape)}, its config expects "
                f"{list(expected[name].shape)}; give weights and config of one model"
            )
    faults, weights = [], {}
    with WeightReader() as reader:
        for name, info in infos.items():
            stored = reader.read(info)
            # a copy even when nothing changes: the file must not stay mapped
            weights[name] = stored.to(device, dtype, copy=True)
            if check_weights and (fault := weight_fault(name, weights[name], stored)):
                faults.append(fault)
    refuse_weights(path, faults)
    model.load_state_dict(weights, assign=True)
