"""Bytes of the tensors that live at once, counted as they are made and freed; the VAE's peak.

Exact on any device, also on fake and meta tensors, which have sizes and no memory: the VAE's are
counted by running a twin of the model on these. What a library allocates inside an operation is not
seen.

T pixel frames.
"""

from __future__ import annotations

import weakref
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mv2v_engine.defaults import without_memory
from mv2v_engine.models.autoencoder import Autoencoder, AutoencoderConfig, Past
from mv2v_engine.ops.conv3d import speed_up_conv3d
from mv2v_engine.vae import VideoVAE

# from the third latent frame on, every further one adds the same
_LATENTS = (3, 4)
_CAT, _SOFTMAX = torch.ops.aten.cat.default, torch.ops.aten._safe_softmax.default
_REDUCTIONS = (torch.ops.aten.linalg_vector_norm.default, torch.ops.aten.mean.dim)


class LiveBytes(TorchDispatchMode):
    """Counts the storages made inside the block, in the thread that entered it.

    now: bytes of those that still live. peak: the most there were at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler, to keep it out of here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self.call(func, args, kwargs or {})
        if not gives_its_input(func):
            for leaf in [out] if isinstance(out, Tensor) else tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._see(leaf)
        return out

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation gives."""
        return func(*args, **kwargs)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            weakref.finalize(storage, self._freed, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@lru_cache(maxsize=4096)
def gives_its_input(func: Any) -> bool:
    """Whether an operation returns a view of what it was given, or that itself."""
    return any(value.alias_info is not None for value in func._schema.returns)


def vae_peak_bytes(vae: VideoVAE, num_frames: int, size: tuple[int, int]) -> tuple[int, int]:
    """The most that encoding and that decoding a video has made and not freed.

    Weights are not part of it, nor is what a library allocates inside a convolution.
    """
    return _counted(_Form.of(vae), (num_frames - 1) // vae.temporal_stride + 1, size)


@dataclass(frozen=True, slots=True)
class StreamBytes:
    """A VAE's bytes of a stream: the most of a block, and what stays from block to block."""

    encode: int
    decode: int
    encoder_past: int
    decoder_past: int


def vae_stream_bytes(vae: VideoVAE, block_frames: int, size: tuple[int, int]) -> StreamBytes:
    """What the VAE takes of a stream whose blocks have so many latent frames.

    Counted of its first block and the frame behind it, in one piece: what is kept is there then.
    """
    return _streamed(_Form.of(vae), block_frames + 1, size)


class _Form(NamedTuple):
    """What a VAE's bytes depend on. by_taps: it runs as on a CPU."""

    config: AutoencoderConfig
    dtype: torch.dtype
    tile_above: int
    by_taps: bool

    @classmethod
    def of(cls, vae: VideoVAE) -> _Form:
        return cls(vae.model.config, vae.dtype, vae.tile_above, vae.device.type == "cpu")

    def twin(self) -> VideoVAE:
        """The same model without memory."""
        with without_memory():
            model = Autoencoder(asdict(self.config))
        if self.by_taps:
            speed_up_conv3d(model)
        return VideoVAE(model, self.dtype, tile_above=self.tile_above)


@lru_cache(maxsize=16)
def _streamed(form: _Form, num_latents: int, size: tuple[int, int]) -> StreamBytes:
    kept = list[int]()
    peaks = _run(form.twin(), num_latents, size, kept)
    return StreamBytes(*peaks, *kept)


@lru_cache(maxsize=16)
def _counted(form: _Form, num_latents: int, size: tuple[int, int]) -> tuple[int, int]:
    twin = form.twin()
    values = ((num_latents - 1) * twin.temporal_stride + 1) * size[0] * size[1] * 3
    # the frames' bytes come to a GPU first
    copied = 0 if form.by_taps else values
    if num_latents < sum(_LATENTS):  # all of them are less work
        encode, decode = _run(twin, num_latents, size)
        return encode + copied, decode
    before, after = (_run(twin, count, size) for count in _LATENTS)
    further = num_latents - _LATENTS[-1]
    encode, decode = (b + further * (b - a) for a, b in zip(before, after, strict=True))
    # the pixels of a long or narrow model's video weigh more: float32 before and after an
    # operation; on the way out bytes too, and what the model computes in
    return max(encode, 8 * values) + copied, max(decode, (9 + form.dtype.itemsize) * values)


class _ShapesAlone(LiveBytes):
    """Knows itself what most of a VAE's operations give.

    Without memory, torch asks Python code of its own, for which it imports its compiler: that takes
    longer than a whole count.
    """

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = args[0] if func is _CAT else [each for each in args if isinstance(each, Tensor)]
        shape = _shape_of(func, args, given) if not kwargs.keys() - {"memory_format"} else None
        if shape is None or len({x.dtype for x in given}) > 1:
            return super().call(func, args, kwargs)
        return args[0] if gives_its_input(func) else _empty(shape, given[0], **kwargs)


def _shape_of(func: Any, args: Any, given: list[Tensor]) -> list[int] | None:
    """What an operation gives of the tensors that it is given; None: torch knows it."""
    shape = list(given[0].shape) if given else []
    if func is _CAT:
        axis = args[1] if len(args) > 1 else 0
        shape[axis] = sum(x.shape[axis] for x in given)
        return shape
    if func in _REDUCTIONS:
        *_, given_axes, is_kept = args if isinstance(args[-1], bool) else (*args, False)
        axes = {axis % len(shape) for axis in given_axes}
        if is_kept:
            return [1 if axis in axes else size for axis, size in enumerate(shape)]
        return [size for axis, size in enumerate(shape) if axis not in axes]
    if func is not _SOFTMAX and torch.Tag.pointwise not in func.tags:
        return None
    sizes = (zip(reversed(x.shape), reversed(shape), strict=False) for x in given)
    is_first_largest = all(size in (1, whole) for pairs in sizes for size, whole in pairs)
    return shape if is_first_largest and shape else None


def _empty(
    shape: list[int], like: Tensor, memory_format: torch.memory_format = torch.preserve_format
) -> Tensor:
    """Without gaps; of the shape of `like`, the axes lie as they do there."""
    if memory_format == torch.preserve_format:
        if shape == list(like.shape) and not like.is_contiguous():
            strides, step = list(like.stride()), 1
            for axis in sorted(range(like.ndim), key=like.stride):
                if shape[axis] > 1:
                    strides[axis], step = step, step * shape[axis]
            return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)
        memory_format = torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _run(
    twin: VideoVAE, num_latents: int, size: tuple[int, int], kept: list[int] | None = None
) -> tuple[int, int]:
    """Peak bytes of encoding and of decoding so many latent frames.

    kept: receives what encoding and what decoding would leave for frames to come.
    """
    pasts: tuple[list[Past] | None, ...] = (None, None) if kept is None else ([], [])
    num_frames = (num_latents - 1) * twin.temporal_stride + 1
    frames = torch.empty(num_frames, *size, 3, dtype=torch.uint8, device="meta")
    with _ShapesAlone() as encoding:
        latents = twin.encode(frames, pasts=pasts[0])
    with _ShapesAlone() as decoding:
        twin.decode_on_device(latents, pasts=pasts[1])
    if kept is not None:
        for half in pasts:
            held = (frames for past in half or () for frames in past.frames.values())
            kept.append(sum(each.nbytes for each in held))
    return encoding.peak, decoding.peak
