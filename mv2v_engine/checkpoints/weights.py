"""Weight files, safetensors, torch zip archives and GGUF: headers first, data in streams.

Reading a header costs no tensor data. `WeightReader` hands out tensors one at a time and closes
its memory map every sixteenth of a file, so that pages already copied leave the process again.
Pickles are read with `weights_only=True` alone. Weights of eight bits that lie beside a scale are
read as their product (`with_scales`).
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mv2v_engine.checkpoints import gguf_files
from mv2v_engine.checkpoints.identify import of_bytes, quantised_by
from mv2v_engine.errors import CheckpointError, DamagedFileError

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin", ".gguf")

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# keys under which trainers wrap a state dict, whatever it is
_WRAPPERS = ("state_dict", "model", "module")
# what quantisers put beside `M.weight`: its scale (ComfyUI, its newer files and LightX2V), what is
# for eight-bit products alone, and the mark of a file whose weights are all scaled
_SCALES = ("scale_weight", "weight_scale")
_OTHER_SCALES = re.compile(r"scal|quant|amax|zero", re.IGNORECASE)
_OF_ACTIVATIONS = ("scale_input", "input_scale", "comfy_quant")
_ALL_SCALED = "scaled_fp8"
# what ComfyUI writes into a safetensors header, of layers whose weights have scales
_SAID_QUANTISED = "_quantization_metadata"
# the key under which torch_ema and diffusers keep averaged weights as a list
_SHADOWS = "shadow_params"
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_RECYCLE_PARTS = 16
_RECYCLE_MIN_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is: its key as the file spells it, shape and dtype.

    scale: what its numbers are to be multiplied with, one for all or one a row; None: nothing.
    quantised: GGUF's name of how it is stored, whose numbers are read as dtype; stored_bytes: how
    many these are.
    """

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: TensorInfo | None = None
    quantised: str = ""
    stored_bytes: int | None = None

    @property
    def kind(self) -> str:
        """The dtype in words."""
        if self.quantised:
            return self.quantised
        scaled = " with scales" if self.scale is not None else ""
        return str(self.dtype).removeprefix("torch.") + scaled

    @property
    def num_elements(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        if self.stored_bytes is not None:
            return self.stored_bytes
        return self.num_elements * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Keys, shapes and dtypes of a weight file, in the file's order; no data is read.

    Raises:
        CheckpointError: empty, an LFS pointer or web page, truncated, a refused pickle, or no
            weight file at all.
    """
    kind = file_kind(path)
    if kind == "safetensors":
        header = _safetensors_header(path)
    elif kind == "gguf":
        header = {
            name: TensorInfo(key, path, shape, dtype, quantised=how, stored_bytes=count)
            for name, key, shape, dtype, how, count in gguf_files.tensors_of(path)
        }
    else:
        header = {
            key: TensorInfo(key, path, tuple(tensor.shape), tensor.dtype)
            for key, tensor in _load_archive(path, "meta").items()
        }
    if not header:
        raise CheckpointError(f"{path} holds no tensors; expected the weights of a transformer")
    return header


def read_metadata(path: Path) -> Mapping[str, str]:
    """The words in a safetensors header; nothing of an archive.

    Raises:
        CheckpointError: as `read_header`.
    """
    if file_kind(path) != "safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise _damaged(path, error) from error


def file_kind(path: Path) -> str:
    """ "safetensors", "archive" (a torch zip) or "gguf", by content and not by suffix.

    Raises:
        CheckpointError: the content is neither; the message says what it is instead.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if not head:
        raise CheckpointError(f"{path} is empty; expected weights, copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise DamagedFileError(
            f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` or download the file"
        )
    if head.lstrip()[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DamagedFileError(
            f"{path} is a web page, not weights; the download was refused or redirected, "
            "download the file itself"
        )
    if head.startswith(b"PK\x03\x04"):
        return "archive"
    if head.startswith(gguf_files.MAGIC):
        return "gguf"
    if head[8:9] == b"{":
        return "safetensors"
    what = of_bytes(head)
    if what is None and path.suffix == ".safetensors":
        return "safetensors"
    if head[:1] == b"\x80":
        raise CheckpointError(
            f"{path} is a bare pickle or a torch file from before torch 1.6, which cannot be read "
            "in streams; save its state dict again with a current `torch.save`"
        )
    raise DamagedFileError(
        f"{path} is {what or 'no weight file'}; expected weights, .safetensors, .gguf or a torch "
        "archive (.pth, .pt, .ckpt)"
    )


def with_scales(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors that are weights, those of float8 with the scales that lie beside them.

    A scale is `M.scale_weight` or `M.weight_scale` beside `M.weight`: one number, or one a row. The
    rest of what quantisers write is for products in eight bits, which nothing here computes.

    Raises:
        CheckpointError: weights in a quantiser's own form, scales of another kind or name, a scale
            without its weight, or a weight whose scale is missing in a file of scaled ones.
    """
    if quantised := quantised_by(tensors):
        raise CheckpointError(
            f"{next(iter(tensors.values())).file} holds weights as {quantised}, which are not read "
            "here; give the weights before they were quantised, or as float8 with scales"
        )
    scales: dict[str, TensorInfo] = {}
    aside = set()
    eights = {
        key.removesuffix(".weight")
        for key, info in tensors.items()
        if key.endswith(".weight") and info.dtype.itemsize == 1 and info.dtype.is_floating_point
    }
    for key, info in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf in _SCALES and (weight := tensors.get(f"{module}.weight")):
            scales[f"{module}.weight"] = _checked_scale(weight, info)
        elif leaf == _ALL_SCALED or leaf in _OF_ACTIVATIONS:
            pass
        elif leaf.startswith(_SCALES) or _is_other_scale(key, eights):
            raise CheckpointError(
                f"{info.file}: {key} is no scale that is known here; expected float8 weights with "
                f"one scale or one a row each, named {' or '.join(_SCALES)}, or weights before "
                "they were quantised"
            )
        else:
            continue
        aside.add(key)
    if not aside:
        return dict(tensors)
    weights = {
        key: replace(info, scale=scales.get(key))
        for key, info in tensors.items()
        if key not in aside
    }
    for key, info in weights.items():
        if info.dtype in _FLOAT8 and info.scale is None:
            raise CheckpointError(
                f"{info.file} has scaled float8 weights, but no scale of {key} "
                f"({key.removesuffix('weight')}scale_weight); copy or download the whole file "
                "again, with its scales"
            )
    return weights


def scaled_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [rows, ...] in float8 (e4m3) and its scales float32 [rows], as `with_scales` reads
    them; a row of zeros has scale 1."""
    most = weight.flatten(1).abs().amax(1)
    scale = torch.where(most > 0, most / torch.finfo(torch.float8_e4m3fn).max, 1.0)
    rows = scale.reshape(-1, *(1 for _ in weight.shape[1:]))
    return (weight / rows).to(torch.float8_e4m3fn), scale


def _is_other_scale(key: str, modules: set[str]) -> bool:
    """Whether a key lies within one of the modules, of float8 weights, and is about their scale."""
    place = key
    while "." in place:
        place = place.rpartition(".")[0]
        if place in modules:
            return bool(_OTHER_SCALES.search(key[len(place) :]))
    return False


def _checked_scale(weight: TensorInfo, scale: TensorInfo) -> TensorInfo:
    rows = weight.shape[:1]
    of_rows = (rows, rows + (1,) * (len(weight.shape) - 1))
    fits = scale.num_elements == 1 or scale.shape in of_rows
    if weight.dtype not in _FLOAT8 or not scale.dtype.is_floating_point or not fits:
        raise CheckpointError(
            f"{weight.file}: {weight.key} {list(weight.shape)} is {weight.kind} with scales "
            f"{list(scale.shape)} of {scale.kind}; expected float8 with one scale or one a row: "
            "give the weights before they were quantised, or such a file"
        )
    return scale


def require_numbers(info: TensorInfo) -> None:
    """Refuse a weight that is stored in whole numbers, which are not its values.

    Raises:
        CheckpointError: it is of an integer type.
    """
    if not info.dtype.is_floating_point:
        raise CheckpointError(
            f"{info.file} stores {info.key} as {info.kind}; expected floating-point weights, give "
            "the checkpoint before quantisation"
        )


class WeightReader:
    """Hands out tensors of weight files; copy each before asking for many more.

    A context manager. Tensors asked for in file order cost one pass over each file.
    """

    def __init__(self) -> None:
        self._file: Path | None = None
        self._get: Callable[[str], Tensor] | None = None
        self._since_open = 0

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file = self._get = None

    def read(self, info: TensorInfo) -> Tensor:
        """The tensor on the CPU, possibly backed by the file's memory map; float32 if scaled."""
        require_numbers(info)
        if info.scale is not None:
            scale = self._stored(info.scale).float()
            rows = (-1,) + (1,) * (len(info.shape) - 1)
            return self._stored(info).float() * scale.reshape(rows if info.shape else ())
        # GGUF has tensors of five axes as four, and says so
        return self._stored(info).reshape(info.shape)

    def read_scaled(self, info: TensorInfo) -> tuple[Tensor, Tensor]:
        """Numbers of eight bits as they are stored, and their scale."""
        assert info.scale is not None
        return self._stored(info), self._stored(info.scale)

    def _stored(self, info: TensorInfo) -> Tensor:
        limit = max(_RECYCLE_MIN_BYTES, info.file.stat().st_size // _RECYCLE_PARTS)
        if self._get is None or self._file != info.file or self._since_open > limit:
            # the old map must be gone before a new one is filled
            self._get = None
            self._get = _open(info.file)
            self._file, self._since_open = info.file, 0
        self._since_open += info.num_bytes
        return self._get(info.key)


def _open(path: Path) -> Callable[[str], Tensor]:
    kind = file_kind(path)
    if kind == "archive":
        return _load_archive(path, "cpu").__getitem__
    if kind == "gguf":
        return gguf_files.open_tensors(path)
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as error:
        raise _damaged(path, error) from error

    def get(key: str) -> Tensor:
        tensor: Tensor = handle.get_tensor(key)  # type: ignore[no-untyped-call]
        return tensor

    return get


def _safetensors_header(path: Path) -> dict[str, TensorInfo]:
    from safetensors import SafetensorError, safe_open

    header = {}
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(key)
                dtype = _SAFETENSORS_DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise CheckpointError(
                        f"{path}: {key} has dtype {part.get_dtype()}; expected one of "
                        + ", ".join(_SAFETENSORS_DTYPES)
                    )
                header[key] = TensorInfo(key, path, tuple(part.get_shape()), dtype)
            said = file.metadata() or {}
    except SafetensorError as error:
        raise _damaged(path, error) from error
    has_float8 = any(info.dtype in _FLOAT8 for info in header.values())
    if _SAID_QUANTISED in said and has_float8 and not any(k.endswith(_SCALES) for k in header):
        raise CheckpointError(
            f"{path} says that its float8 weights have scales ({_SAID_QUANTISED}), and has none; "
            "copy or download the whole file again, with its scales"
        )
    return header


def _load_archive(path: Path, device: str) -> dict[str, Tensor]:
    """The tensors of a torch zip archive, mapped from the file and not read."""
    try:
        with warnings.catch_warnings():
            # torch warns of a TorchScript program, which is named below
            warnings.simplefilter("ignore", UserWarning)
            value = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds Python objects besides tensors, refused because unpickling them could "
            "run code; expected a plain state dict, save only `model.state_dict()`"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        if inside := _other_zip(path):
            raise CheckpointError(f"{path} is {inside}") from error
        raise _damaged(path, error) from error
    return _unwrap(value, path)


def _other_zip(path: Path) -> str | None:
    """What a whole zip archive holds that torch did not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return None
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        return (
            "a program (TorchScript, torch.export); expected weights, save only "
            "`model.state_dict()`"
        )
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (npz); expected weights, save them as .safetensors"
    if not names or any(name.endswith("data.pkl") for name in names):
        return None
    return f"a zip archive of {', '.join(names[:3])}; expected weights: unpack it"


def _unwrap(value: Any, path: Path) -> dict[str, Tensor]:
    """The tensors inside a pickle's value, below the names that trainers give them.

    Dictionaries in it become prefixes of the keys, but for a single one under a name that says
    nothing. Tensors beside dictionaries of tensors are a trainer's own.
    """
    tensors = _flatten(value) if isinstance(value, Mapping) else {}
    if not tensors:
        lacking = " without tensors" if isinstance(value, Mapping) else ""
        raise CheckpointError(
            f"{path} holds a {type(value).__name__}{lacking}; expected a state dict"
        )
    return tensors


def _flatten(value: Mapping[Any, Any]) -> dict[str, Tensor]:
    value = {
        name: {str(index): each for index, each in enumerate(nested)}
        if name == _SHADOWS and isinstance(nested, list | tuple)
        else nested
        for name, nested in value.items()
    }
    inner = {
        name: tensors
        for name, nested in value.items()
        if isinstance(name, str)
        and isinstance(nested, Mapping)
        and (tensors := _flatten(nested))
        and not name.startswith("optim")
    }
    if not inner:
        return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if len(inner) == 1 and (name := next(iter(inner))) in _WRAPPERS:
        return inner[name]
    return {f"{name}.{key}": tensor for name, all_ in inner.items() for key, tensor in all_.items()}


def _damaged(path: Path, error: Exception) -> DamagedFileError:
    reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
    return DamagedFileError(
        f"{path} is truncated or damaged ({reason}); copy or download the whole file again"
    )
