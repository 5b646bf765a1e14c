"""GGUF files: what is in them, and their tensors as numbers again, by the package `gguf`.

Transformers have Wan's own names in them, as ComfyUI-GGUF's converter writes them, text encoders
llama.cpp's, which become transformers'.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mv2v_engine.errors import CheckpointError, DamagedFileError

MAGIC = b"GGUF"
_TRANSFORMERS, _TEXT_ENCODERS = ("wan",), ("t5encoder", "t5", "umt5")
# files without an architecture, or with the name of the program that wrote them
_UNSAID = (None, "", "pig")
# tensors that torch has a dtype for; all others become float32
_PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
# llama.cpp's names of T5's layers
_T5 = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
_T5_TOP = {
    "token_embd.weight": "shared.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
}


def tensors_of(path: Path) -> list[tuple[str, str, tuple[int, ...], torch.dtype, str, int]]:
    """Name, key in the file, shape, dtype, GGUF type and stored bytes of every tensor.

    The dtype is that in which `open_tensors` gives it; the type is "" where that is how it is
    stored.

    Raises:
        CheckpointError: no package to read it with, damaged, or of another architecture.
    """
    reader = _reader(path)
    said = reader.fields.get("general.architecture")
    architecture = None if said is None else str(said.contents())
    if architecture not in (*_TRANSFORMERS, *_TEXT_ENCODERS, *_UNSAID):
        raise CheckpointError(
            f"{path} is a GGUF file of architecture {architecture!r}; expected a Wan transformer "
            "('wan') or its text encoder ('t5encoder'), give one of these"
        )
    found = []
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        whole = reader.fields.get(f"comfy.gguf.orig_shape.{tensor.name}")
        sizes = tensor.shape[::-1] if whole is None else whole.contents()
        shape = tuple(int(size) for size in sizes)
        name = _t5_name(tensor.name) if architecture in _TEXT_ENCODERS else tensor.name
        dtype, how = _PLAIN.get(kind, torch.float32), "" if kind in _PLAIN else kind
        found.append((name, tensor.name, shape, dtype, how, int(tensor.n_bytes)))
    return found


def architecture_of(path: Path) -> str:
    """What a file says that it is; "" if it says nothing.

    Raises:
        CheckpointError: as `tensors_of`.
    """
    said = _reader(path).fields.get("general.architecture")
    return "" if said is None else str(said.contents())


def open_tensors(path: Path) -> Callable[[str], Tensor]:
    """What gives a tensor by its key in the file, as a copy; quantised ones as float32.

    Raises:
        CheckpointError: as `tensors_of`; from what it gives, a type that gguf does not undo.
    """
    from gguf import dequantize

    tensors = {tensor.name: tensor for tensor in _reader(path).tensors}

    def get(key: str) -> Tensor:
        tensor = tensors[key]
        kind = tensor.tensor_type.name
        whole = torch.from_numpy(tensor.data.copy())
        if kind in _PLAIN:
            # bfloat16 comes as bytes
            return whole.view(_PLAIN[kind]).reshape(tuple(tensor.shape[::-1].tolist()))
        try:
            return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        except NotImplementedError as error:
            raise CheckpointError(
                f"{path}: {key} is of type {kind}, which the package gguf does not undo; give a "
                "file of Q8_0, Q6_K, Q5_K, Q4_K, F16 or BF16"
            ) from error

    return get


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
        from gguf.gguf_reader import READER_SUPPORTED_VERSIONS
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a GGUF file, which the package gguf reads, and it is not installed: "
            "pip install 'mv2v_engine[gguf]'"
        ) from error
    version = _version(path)
    if version not in (None, *READER_SUPPORTED_VERSIONS):
        known = " and ".join(map(str, READER_SUPPORTED_VERSIONS))
        raise CheckpointError(
            f"{path} is a GGUF file of version {version}, and versions {known} are read; convert "
            "the model again with a newer converter, or download a newer file"
        )
    try:
        return GGUFReader(path)
    # numpy's and Python's own errors, whatever the bytes make of them
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedFileError(
            f"{path} is a GGUF file that is truncated or damaged ({reason}); copy or download the "
            "whole file again"
        ) from error


def _version(path: Path) -> int | None:
    """The format's version, of either order of bytes; None of a file that ends before it."""
    with path.open("rb") as file:
        head = file.read(8)[len(MAGIC) :]
    if len(head) < 4:
        return None
    little = int.from_bytes(head, "little")
    return little if little & 0xFFFF else int.from_bytes(head, "big")


def _t5_name(name: str) -> str:
    parts = name.split(".")
    if name.startswith("enc.blk.") and len(parts) == 5 and parts[3] in _T5:
        return f"encoder.block.{parts[2]}.{_T5[parts[3]]}.{parts[4]}"
    return _T5_TOP.get(name, name)
