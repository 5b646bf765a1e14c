"""Where an engine runs, and in which dtype."""

from __future__ import annotations

import torch

from mv2v_engine.arguments import mistaken
from mv2v_engine.config import ParallelConfig
from mv2v_engine.envs import local_rank
from mv2v_engine.errors import RequestError
from mv2v_engine.ops.backend import has_bfloat16_products

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def named_device(device: torch.device | str | None) -> torch.device | str:
    """The device that is asked for; None takes CUDA if there is one.

    Raises:
        RequestError: it is no device.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, str | torch.device):
        raise mistaken("device", device, '"cpu", "cuda", "cuda:N" or a torch.device')
    return device


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device to run on, tried with an allocation."""
    name = named_device(device)
    try:
        place = torch.device(name)
        torch.empty(0, dtype=torch.float32, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(
            f"device {str(name)!r} cannot be used ({reason}); give cpu, cuda or cuda:N"
        ) from error
    return place


def rank_device(device: torch.device | str | None, parallel: ParallelConfig) -> torch.device:
    """The device that `usable_device` gives; each of several processes takes a GPU of its own.

    Raises:
        RequestError: no such device, or one GPU for all of them.
    """
    name = named_device(device)
    if parallel.num_ranks == 1 or not str(name).startswith("cuda"):
        return usable_device(device)
    if ":" in str(name):
        raise RequestError(
            f"each of {parallel.num_ranks} processes takes a GPU of its own, got device "
            f"{str(name)!r}; give cuda, and CUDA_VISIBLE_DEVICES to choose among them"
        )
    return usable_device(f"cuda:{local_rank()}")


def transformer_dtype(dtype: torch.dtype | None, place: torch.device) -> torch.dtype:
    """The dtype of a transformer on a device; None takes bfloat16 on CUDA, else float32.

    Raises:
        RequestError: it is no floating-point dtype that layers compute in, or this CPU has no
            bfloat16.
    """
    if dtype is None:
        return torch.bfloat16 if place.type == "cuda" else torch.float32
    if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES:
        raise mistaken("dtype", dtype, " or ".join(map(str, _DTYPES)))
    if dtype == torch.bfloat16 and place.type == "cpu" and not has_bfloat16_products():
        raise RequestError(
            "dtype=bfloat16 on a CPU needs one that multiplies it (avx512_bf16 or amx_bf16), and "
            "this one does not; leave dtype out, or use dtype=float32"
        )
    return dtype


def dtype_of_tokens(dtype: torch.dtype, place: torch.device) -> torch.dtype:
    """A transformer's tokens' where its products are of `dtype`: on a CPU, which gains nothing
    else by bfloat16, that is the products' alone."""
    return torch.float32 if dtype == torch.bfloat16 and place.type == "cpu" else dtype
