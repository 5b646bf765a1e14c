"""How many points of a cloud do videos see, each alone and together with the first (METHOD 9).

A frame sees a point p if it lies inside its four image borders: n p + d >= 0 for left and top,
> 0 for right and bottom. A video sees the union of what its frames see. The distance is
((x n_0 + y n_1) + z n_2) + d in float64, each operation rounded by itself, so that every backend
puts a point on the border on the same side and the counts are equal to the last one.

P points, F frames of all videos, T frames of one video, V videos.
"""

from __future__ import annotations

import itertools
from ctypes import c_int, c_int64, c_void_p
from typing import Literal

import torch
from torch import Tensor

from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.ops import native
from mv2v_engine.ops.backend import define, missing_reason

Backend = Literal["auto", "reference", "cuda"]

_BLOCK = 16  # neighbouring points that are culled together
_CHUNK = 32  # blocks tested at once: 1.3 MiB of distances at 81 frames
_SLACK = 1e-12  # share of the terms' magnitude; a distance is off by 1e-15 of it
_MAX_ELEMENTS = 2**31


def visible_points(points_P3: Tensor, planes_T44: Tensor) -> Tensor:
    """Which points any of the frames sees: bool [P]."""
    num_points, num_frames = len(points_P3), len(planes_T44)
    if not num_points:
        return torch.zeros(0, dtype=torch.bool, device=points_P3.device)
    # columns run over the borders first, then over the frames: [4, 4 * T]
    planes = planes_T44.permute(2, 1, 0).flatten(1)
    normals, offsets = planes[:3], planes[3]

    last = points_P3[-1:].expand(-num_points % _BLOCK, 3)
    blocks_KB3 = torch.cat([points_P3, last]).unflatten(0, (-1, _BLOCK))
    low, high = blocks_KB3.amin(1), blocks_KB3.amax(1)
    centre, reach = 0.5 * low + 0.5 * high, 0.5 * high - 0.5 * low
    boxes_K6 = torch.cat([centre, reach + _SLACK * (centre.abs() + reach)], dim=1)
    # a block wholly behind a border is not seen, one wholly inside a frame is: no look at points
    slack = _SLACK * offsets.abs()
    nearest = torch.addmm(offsets + slack, boxes_K6, torch.cat([normals, normals.abs()]))
    outside = (nearest < 0).unflatten(1, (4, num_frames)).any(1).all(1)
    farthest = torch.addmm(offsets - slack, boxes_K6, torch.cat([normals, -normals.abs()]))
    inside = (farthest > 0).unflatten(1, (4, num_frames)).all(1).any(1)

    seen_KB = inside[:, None].repeat(1, _BLOCK)
    for index in (~outside & ~inside).nonzero()[:, 0].split(_CHUNK):
        x, y, z = blocks_KB3[index].unsqueeze(-1).unbind(2)
        distance = (x * normals[0]).add_(y * normals[1]).add_(z * normals[2]).add_(offsets)
        left, top, right, bottom = distance.unflatten(-1, (4, num_frames)).unbind(2)
        seen_KB[index] = ((left >= 0) & (top >= 0) & (right > 0) & (bottom > 0)).any(-1)
    seen_P: Tensor = seen_KB.flatten()[:num_points]
    return seen_P


def fov_overlap_reference(points_P3: Tensor, planes_F44: Tensor, frames: list[int]) -> Tensor:
    seen_VP = torch.stack([visible_points(points_P3, run) for run in planes_F44.split(frames)])
    return torch.stack([(seen_VP & seen_VP[0]).sum(1), seen_VP.sum(1)], dim=1)


def _fake(points: Tensor, planes: Tensor, frames: list[int]) -> Tensor:
    return points.new_empty((len(frames), 2), dtype=torch.int64)


def _arguments(
    points_P3: Tensor, rows_16F: Tensor, first_frame: Tensor, num_videos: int
) -> tuple[c_void_p | c_int64, ...]:
    """What the CPU and the CUDA function take alike, in the order of csrc/mv2v.h."""
    return (
        c_void_p(points_P3.data_ptr()),
        c_int64(len(points_P3)),
        c_int64(points_P3.stride(0)),
        c_int64(points_P3.stride(1)),
        c_void_p(rows_16F.data_ptr()),
        c_int64(rows_16F.stride(0)),
        c_void_p(first_frame.data_ptr()),
        c_int64(num_videos),
    )


def _native(points_P3: Tensor, planes_F44: Tensor, frames: list[int]) -> Tensor:
    """The library of the tensors' device if there is one, else the reference."""
    device = points_P3.device
    on_cuda = device.type == "cuda"
    name: native.LibraryName = "cuda" if on_cuda else "cpu"
    if native.missing_reason(name, "fov_overlap"):
        return fov_overlap_reference(points_P3, planes_F44, frames)
    counts_V2 = torch.empty(len(frames), 2, dtype=torch.int64, device=device)
    rows_16F = planes_F44.permute(1, 2, 0).flatten(0, 1).contiguous()
    first_frame = torch.tensor([0, *itertools.accumulate(frames)], device=device)
    arguments = _arguments(points_P3, rows_16F, first_frame, len(frames))
    counts = c_void_p(counts_V2.data_ptr())
    if on_cuda:
        with torch.cuda.device(device):
            stream = c_void_p(torch.cuda.current_stream().cuda_stream)
            native.call("cuda", "fov_overlap", *arguments, counts, stream)
    else:
        native.call("cpu", "fov_overlap", *arguments, c_int(torch.get_num_threads()), counts)
    return counts_V2


_fov_overlap = define(
    "fov_overlap", "(Tensor points, Tensor planes, int[] frames) -> Tensor", _native, _fake
)


def fov_overlap(
    points: Tensor, planes: Tensor, *, frames: list[int], backend: Backend = "auto"
) -> Tensor:
    """points [P, 3], planes [F, 4, 4] -> counts int64 [V, 2], both float64 on one device.

    Row v counts the points that videos 0 and v both see, and those that video v sees. Any strides.

    Args:
        planes: the left, top, right and bottom image border of each frame as (inward normal,
            offset), any scale. A value that is not a number is on no side: nothing is seen there.
        frames: how many consecutive frames of `planes` each video has, at least one.
        backend: "auto" is the library of `csrc/` for the device where one was built, else torch.

    Raises:
        TypeError: not float64. ValueError: another shape, device or size than said.
        KernelUnavailableError: "cuda" was asked for and cannot run; the message says why.
    """
    _validate("points", points, (3,))
    _validate("planes", planes, (4, 4))
    if points.device != planes.device:
        raise ValueError(
            f"points and planes must be on one device, got {points.device} and {planes.device}"
        )
    if not frames or min(frames) < 1 or sum(frames) != len(planes):
        raise ValueError(
            f"frames must be at least one count, each at least 1, that sum to the {len(planes)} "
            f"frames of planes; got {frames}"
        )
    if backend == "reference":
        return fov_overlap_reference(points, planes, frames)
    reason = missing_reason(backend, "fov_overlap", points.device)
    if reason:
        raise KernelUnavailableError(
            f"fov_overlap: backend {backend!r} was asked for, but {reason}; "
            "use 'auto' or 'reference'"
        )
    counts: Tensor = _fov_overlap(points, planes, frames)
    return counts


def _validate(name: str, tensor: Tensor, row: tuple[int, ...]) -> None:
    if tensor.dtype != torch.float64:
        raise TypeError(f"{name} must be float64, got {tensor.dtype}")
    if tuple(tensor.shape[1:]) != row:
        expected = ", ".join(map(str, row))
        raise ValueError(f"{name} must have shape [n, {expected}], got {list(tensor.shape)}")
    if tensor.numel() > _MAX_ELEMENTS:
        raise ValueError(f"{name} must have at most {_MAX_ELEMENTS} elements, got {tensor.numel()}")
