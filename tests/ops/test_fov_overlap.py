"""Counts of visible points: the library against torch, and torch against one point at a time.

P points, F frames of all videos, V videos.
"""

from __future__ import annotations

import ctypes
import mmap
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.ops import fov_overlap as module
from mv2v_engine.ops import native
from mv2v_engine.ops.fov_overlap import fov_overlap, visible_points
from tests.torch_state import num_threads

NOT_BUILT = native.missing_reason("cpu", "fov_overlap")
needs_library = pytest.mark.skipif(NOT_BUILT is not None, reason=str(NOT_BUILT))
NO_CUDA = native.missing_reason("cuda", "fov_overlap")


def _random(seed: int, num_points: int, frames: list[int]) -> tuple[Tensor, Tensor]:
    """A ball of points and image borders that turn, of any scale, some through the origin."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(num_points, 3, generator=generator, dtype=torch.float64)
    planes = torch.randn(sum(frames), 4, 4, generator=generator, dtype=torch.float64)
    planes[..., 3] += 1.5
    return points, planes * 10.0 ** torch.randint(-3, 4, (sum(frames), 1, 1), generator=generator)


def _lattice(seed: int, num_points: int, frames: list[int]) -> tuple[Tensor, Tensor]:
    """Coordinates and planes of tenths: many points lie on a border but for the rounding."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(-9, 10, (num_points, 3), generator=generator).double() / 10
    planes = torch.randint(-3, 4, (sum(frames), 4, 4), generator=generator).double() / 10
    return points, planes


def _one_by_one(points: Tensor, planes: Tensor, frames: list[int]) -> list[list[int]]:
    """The definition in Python's floats, which round every operation by itself."""
    videos = [run.tolist() for run in planes.split(frames)]
    seen = []
    for video in videos:
        seen.append([])
        for x, y, z in points.tolist():
            distances = [
                [((x * n[0] + y * n[1]) + z * n[2]) + n[3] for n in frame] for frame in video
            ]
            seen[-1].append(
                any(d[0] >= 0 and d[1] >= 0 and d[2] > 0 and d[3] > 0 for d in distances)
            )
    return [[sum(a and b for a, b in zip(seen[0], own, strict=True)), sum(own)] for own in seen]


@pytest.mark.parametrize("make", [_random, _lattice])
@pytest.mark.parametrize("num_points", [1, 15, 16, 17, 600])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_counts_are_the_definitions(backend: Any, num_points: int, make: Any) -> None:
    frames = [3, 1, 2]
    points, planes = make(num_points, num_points, frames)
    expected = _one_by_one(points, planes, frames)
    got = fov_overlap(points, planes, frames=frames, backend=backend)
    assert got.dtype == torch.int64
    assert got.tolist() == expected


@needs_library
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    num_points=st.integers(0, 1400),
    frames=st.lists(st.integers(1, 140), min_size=1, max_size=4),
    make=st.sampled_from([_random, _lattice]),
)
def test_the_library_counts_like_torch(
    seed: int, num_points: int, frames: list[int], make: Any
) -> None:
    points, planes = make(seed, num_points, frames)
    reference = fov_overlap(points, planes, frames=frames, backend="reference")
    assert torch.equal(fov_overlap(points, planes, frames=frames), reference)


def _border(seed: int) -> tuple[Tensor, Tensor]:
    """Planes through a point each, but for the rounding: its side depends on every operation."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(2000, 3, generator=generator, dtype=torch.float64)
    normals = torch.randn(2000, 4, 3, generator=generator, dtype=torch.float64)
    products = normals * points[:, None]
    offset = -((products[..., 0] + products[..., 1]) + products[..., 2])
    return points, torch.cat([normals, offset[..., None]], dim=-1)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_points_on_the_border_fall_on_the_same_side_everywhere(backend: Any) -> None:
    points, planes = _border(0)
    # left and top pass exactly through the point, right and bottom are far away
    planes[:, 2:, :3], planes[:, 2:, 3] = 0.0, 1.0
    for index in range(0, 2000, 40):
        one, frame = points[index : index + 1], planes[index : index + 1]
        assert fov_overlap(one, frame, frames=[1], backend=backend).tolist() == [[1, 1]]
        # >= 0 for left and top, > 0 for right and bottom
        swapped = frame[:, [2, 3, 0, 1]]
        assert fov_overlap(one, swapped, frames=[1], backend=backend).tolist() == [[0, 0]]


def test_the_border_data_would_reveal_a_fused_multiply_add() -> None:
    # with exact products these points lie off the border, so that -ffp-contract=off is tested
    points, planes = _border(0)
    outside = 0
    for point, normal in zip(points[:50].tolist(), planes[:50, 0].tolist(), strict=True):
        terms = [Fraction(a) * Fraction(b) for a, b in zip(normal, [*point, 1.0], strict=True)]
        outside += sum(terms) < 0
    assert 10 < outside < 40


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_what_is_not_finite_is_not_seen(backend: Any) -> None:
    points, planes = _random(4, 40, [2])
    planes[:, :, :3], planes[:, :, 3] = 0.0, 1.0  # sees everything
    points[3, 1], points[20, 0] = torch.nan, torch.inf
    assert fov_overlap(points, planes, frames=[2], backend=backend).tolist() == [[38, 38]]
    planes[0, 2, 3] = torch.nan
    assert fov_overlap(points, planes, frames=[1, 1], backend=backend).tolist() == [[0, 0], [0, 38]]


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_block_that_touches_a_border_with_one_corner_is_not_culled(backend: Any) -> None:
    # by the box alone the block lies behind the border as often as not: a matter of rounding
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        corner, other = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        normal = torch.rand(3, generator=generator, dtype=torch.float64) * (corner - other).sign()
        x, y, z = (normal * corner).tolist()
        planes = torch.zeros(1, 4, 4, dtype=torch.float64)
        planes[0, :, 3] = 1.0
        planes[0, 0, :3], planes[0, 0, 3] = normal, -((x + y) + z)
        points = torch.stack([corner, other] * 8)
        got = fov_overlap(points, planes, frames=[1], backend=backend)
        assert got.tolist() == [[8, 8]]


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_far_away_worlds_are_culled_no_less_exactly(backend: Any) -> None:
    # a kilometre-scaled world: rounding grows with the offsets, and so must the culling's slack
    points, planes = _lattice(5, 300, [4, 4])
    shift = torch.tensor([1e9, -2e9, 3e9], dtype=torch.float64)
    points = points + shift
    planes[..., 3] -= planes[..., :3] @ shift
    got = fov_overlap(points, planes, frames=[4, 4], backend=backend)
    assert got.tolist() == _one_by_one(points, planes, [4, 4])


@needs_library
def test_any_strides_are_taken() -> None:
    frames = [5, 2]
    points, planes = _random(6, 700, frames)
    expected = fov_overlap(points, planes, frames=frames, backend="reference")
    columns = points.T.contiguous().T
    spaced = torch.zeros(700, 2, 5, dtype=torch.float64)[:, 1, 1:4].copy_(points)
    turned = planes.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not columns.is_contiguous() and not spaced.is_contiguous()
    for each in (columns, spaced):
        assert torch.equal(fov_overlap(each, turned, frames=frames), expected)
    assert torch.equal(
        fov_overlap(points.flip(0)[::2], planes, frames=frames),
        fov_overlap(points.flip(0)[::2], planes, frames=frames, backend="reference"),
    )


@needs_library
def test_more_threads_than_chunks_count_the_same() -> None:
    points, planes = _random(7, 5000, [9, 9, 9])
    with num_threads(1):
        one = fov_overlap(points, planes, frames=[9, 9, 9])
    with num_threads(13):
        assert torch.equal(fov_overlap(points, planes, frames=[9, 9, 9]), one)


@needs_library
def test_offsets_beyond_two_to_the_31_are_int64() -> None:
    """Three points and 16 rows of planes, 2**30 and 2**28 values apart in untouched memory."""
    point_stride, plane_stride = 2**30, 2**28
    size = 8 * (16 * plane_stride)
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = mmap.mmap(-1, size, flags=flags)
    except (OSError, ValueError) as error:
        pytest.skip(f"no 32 GiB of address space: {error}")
    base = torch.frombuffer(memory, dtype=torch.float64)
    points, planes = _random(8, 3, [2])
    far_points = base[4096:].as_strided((3, 3), (point_stride, 1)).copy_(points)
    far_planes = base.as_strided((16, 2), (plane_stride, 1))
    far_planes.copy_(planes.permute(1, 2, 0).flatten(0, 1))
    first_frame, counts = torch.tensor([0, 1, 2]), torch.full((2, 2), -1)
    native.call(
        "cpu",
        "fov_overlap",
        *module._arguments(far_points, far_planes, first_frame, 2),
        ctypes.c_int(1),
        ctypes.c_void_p(counts.data_ptr()),
    )
    assert counts.tolist() == _one_by_one(points, planes, [1, 1])
    assert 2 * point_stride + 4096 > 2**31 and 15 * plane_stride > 2**31


def test_no_points_are_seen_by_nobody() -> None:
    points, planes = _random(1, 0, [2, 1])
    for backend in ("reference", "auto"):
        got = fov_overlap(points, planes, frames=[2, 1], backend=backend)  # type: ignore[arg-type]
        assert got.tolist() == [[0, 0], [0, 0]]


def test_visible_points_are_a_mask_in_the_points_order() -> None:
    points, planes = _random(2, 100, [3])
    seen = visible_points(points, planes)
    assert seen.shape == (100,) and 0 < int(seen.sum()) < 100
    each = [bool(visible_points(point[None], planes)) for point in points]
    assert seen.tolist() == each


def test_opcheck() -> None:
    points, planes = _random(3, 20, [2, 3])
    torch.library.opcheck(torch.ops.mv2v.fov_overlap.default, (points, planes, [2, 3]))


def test_compiles_without_a_break() -> None:
    points, planes = _random(3, 20, [2, 3])
    compiled = torch.compile(
        lambda p, n: fov_overlap(p, n, frames=[2, 3]) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(points, planes), 2 * fov_overlap(points, planes, frames=[2, 3]))


HUGE = torch.zeros(1, dtype=torch.float64).expand(2**30, 3)


@pytest.mark.parametrize("backend", ["reference", "auto", "cuda"])
@pytest.mark.parametrize(
    ("points", "planes", "frames", "error", "message"),
    [
        (torch.zeros(2, 3), None, [2], TypeError, "points must be float64, got torch.float32"),
        (None, torch.zeros(2, 4, 4), [2], TypeError, "planes must be float64, got torch.float32"),
        (torch.zeros(2, 2).double(), None, [2], ValueError, r"\[n, 3\], got \[2, 2\]"),
        (torch.zeros(3).double(), None, [2], ValueError, r"\[n, 3\], got \[3\]"),
        (None, torch.zeros(2, 3, 4).double(), [2], ValueError, r"\[n, 4, 4\], got \[2, 3, 4\]"),
        (HUGE, None, [2], ValueError, "at most 2147483648 elements, got 3221225472"),
        (torch.zeros(2, 3, device="meta").double(), None, [2], ValueError, "got meta and cpu"),
        (None, None, [], ValueError, r"sum to the 2 frames of planes; got \[\]"),
        (None, None, [2, 0], ValueError, r"each at least 1.*got \[2, 0\]"),
        (None, None, [3, -1], ValueError, r"got \[3, -1\]"),
        (None, None, [1], ValueError, r"sum to the 2 frames of planes; got \[1\]"),
    ],
)
def test_bad_input_is_refused(
    points: Tensor | None,
    planes: Tensor | None,
    frames: list[int],
    error: type[Exception],
    message: str,
    backend: Any,
) -> None:
    points = torch.zeros(5, 3, dtype=torch.float64) if points is None else points
    planes = torch.zeros(2, 4, 4, dtype=torch.float64) if planes is None else planes
    with pytest.raises(error, match=message):
        fov_overlap(points, planes, frames=frames, backend=backend)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_an_explicit_backend_that_cannot_run_says_why(backend: Any) -> None:
    points, planes = _random(1, 5, [1])
    with pytest.raises(KernelUnavailableError, match=f"'{backend}'.*CUDA device.*runs on cpu"):
        fov_overlap(points, planes, frames=[1], backend=backend)


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA is not None, reason=str(NO_CUDA))
def test_cuda_counts_like_the_cpu() -> None:
    for make in (_random, _lattice):
        points, planes = make(9, 70_001, [81, 81, 7])
        expected = fov_overlap(points, planes, frames=[81, 81, 7], backend="reference")
        got = fov_overlap(points.cuda(), planes.cuda(), frames=[81, 81, 7], backend="cuda")
        assert torch.equal(got.cpu(), expected)
