"""Windows keep their promise on every length; scaling covers, centres and says what it cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional as F

from mv2v_engine.errors import VideoError, VideoRangeError
from mv2v_engine.video.scan import MAX_ASPECT
from mv2v_engine.video.transforms import cover_and_crop, crop_report, select_window


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ("first", [0, 1, 2, 3, 4]),
        ("middle", [3, 4, 5, 6, 7]),
        ("last", [6, 7, 8, 9, 10]),
        ("even", [0, 2, 5, 8, 10]),
        ("0", [0, 1, 2, 3, 4]),
        ("6", [6, 7, 8, 9, 10]),
    ],
)
def test_windows_of_a_longer_clip(window: str, expected: list[int]) -> None:
    selected = select_window(11, 5, window)
    assert list(selected.indices) == expected
    assert "of 11" in selected.description


def test_pad_repeats_the_last_frame() -> None:
    selected = select_window(3, 5, "pad")
    assert selected.indices == (0, 1, 2, 2, 2)
    assert selected.description == "all 3 frames, the last repeated 2 times"


@pytest.mark.parametrize("window", [None, "first", "middle", "last", "even", "pad", "0"])
def test_equal_length_takes_everything(window: str | None) -> None:
    assert select_window(5, 5, window).indices == (0, 1, 2, 3, 4)


@given(st.integers(1, 300), st.integers(1, 90), st.sampled_from(["first", "last", "even", "pad"]))
def test_window_is_never_silently_short(have: int, want: int, window: str) -> None:
    if have != want and (window == "pad") != (have < want):
        with pytest.raises(VideoError, match="choose window="):
            select_window(have, want, window)
        return
    indices = select_window(have, want, window).indices
    assert len(indices) == want
    assert all(0 <= a <= b < have for a, b in zip(indices, [*indices[1:], have - 1], strict=True))
    if window == "even" and have >= want:
        assert len(set(indices)) == want


@pytest.mark.parametrize(
    ("have", "window", "message"),
    [
        (11, None, r"11 frames.*window is 5; choose window=first, middle, last, even or START"),
        (3, None, r"3 frames.*window is 5; choose window=pad"),
        (1, "even", r"1 frames.*window is 5 and window 'even' cannot change that.*pad"),
        (11, "pad", r"choose window=first"),
        (11, "7", r"needs frames 7 to 11, the clip has 11 \(0 to 10\); start at 6 or before"),
        (5, "1", r"start at 0 or before"),
        (11, "midle", r"unknown window 'midle'; nearest: middle"),
        (11, "-1", r"unknown window"),
        (0, None, r"at least 1"),
    ],
)
def test_unusable_windows_say_what_to_do(have: int, window: str | None, message: str) -> None:
    with pytest.raises(VideoError, match=message):
        select_window(have, 5, window)


def test_same_size_is_untouched() -> None:
    frames = torch.randint(0, 256, (3, 6, 10, 3), dtype=torch.uint8)
    result, report = cover_and_crop(frames, (6, 10))
    assert torch.equal(result, frames)
    assert (report.scale, report.cropped) == (1.0, (0, 0, 0, 0))
    assert report.description == "10x6 to 10x6: unscaled, nothing cropped"


def test_crop_without_scaling_keeps_the_middle() -> None:
    frames = torch.randint(0, 256, (2, 8, 10, 3), dtype=torch.uint8)
    result, report = cover_and_crop(frames, (8, 5))
    assert torch.equal(result, frames[:, :, 2:7])
    assert report.cropped == (0, 0, 2, 3)
    assert "cropped by 2+3 columns and 0+0 rows" in report.description


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.integers(1, 24))
def test_any_size_is_covered(height: int, width: int, rows: int, columns: int) -> None:
    assume(max(height, width) <= MAX_ASPECT * min(height, width))
    result, report = cover_and_crop(
        torch.full((1, height, width, 3), 77, dtype=torch.uint8), (rows, columns)
    )
    assert result.shape == (1, rows, columns, 3) and result.dtype == torch.uint8
    assert bool((result == 77).all())
    top, bottom, left, right = report.cropped
    assert min(report.cropped) >= 0 and abs(top - bottom) <= 1 and abs(left - right) <= 1
    # one axis fits (to the pixel), the other is cropped
    assert min(top + bottom, left + right) <= 1
    assert report.scale == pytest.approx(max(rows / height, columns / width))


@pytest.mark.parametrize(
    ("source", "size", "top_left"),
    [
        ((1920, 1080), (480, 832), (500, 0)),  # 999 rows to lose: 499.5 is nearer to none, so even
        ((9, 4), (4, 4), (2, 0)),  # 2.5
        ((4, 11), (4, 4), (0, 4)),  # 3.5
        ((10, 4), (4, 4), (3, 0)),
    ],
)
def test_odd_crops_begin_where_torchvisions_do(
    source: tuple[int, int], size: tuple[int, int], top_left: tuple[int, int]
) -> None:
    """`center_crop`: int(round((height - crop_height) / 2.0)), half to even."""
    report = crop_report(source, size)
    assert (report.cropped[0], report.cropped[2]) == top_left
    scaled = tuple(max(w, round(s * report.scale)) for s, w in zip(source, size, strict=True))
    assert tuple(a + b for a, b in zip(report.cropped[::2], report.cropped[1::2], strict=True)) == (
        scaled[0] - size[0],
        scaled[1] - size[1],
    )


def test_scaling_is_antialiased_and_centred() -> None:
    # one-pixel stripes must average out, not alias to black or white
    stripes = torch.zeros(1, 64, 96, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    result, _ = cover_and_crop(stripes, (16, 16))
    assert (result.float() - 127.5).abs().max() < 20
    # a centred mark stays centred
    mark = torch.zeros(1, 60, 100, 3, dtype=torch.uint8)
    mark[:, 20:40, 40:60] = 255
    result, report = cover_and_crop(mark, (30, 30))
    assert report.cropped == (0, 0, 10, 10)
    assert torch.equal(result, result.flip(1)) and torch.equal(result, result.flip(2))
    assert result[0, 15, 15, 0] == 255 and result[0, 0, 0, 0] == 0


@pytest.mark.parametrize(
    "frames", [torch.zeros(1, 4, 4, 3), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)]
)
def test_other_tensors_are_refused(frames: torch.Tensor) -> None:
    with pytest.raises(VideoError, match=r"must be uint8 \[T, height, width, 3\]"):
        cover_and_crop(frames, (4, 4))


@pytest.mark.parametrize(
    ("source", "size"),
    [((4, 64), (96, 160)), ((64, 4), (97, 161)), ((7, 100), (480, 832)), ((30, 40), (96, 160))],
)
def test_frames_are_what_scaling_the_whole_and_then_cropping_gives(
    source: tuple[int, int], size: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (3, *source, 3), generator=generator).to(torch.uint8)
    result, report = cover_and_crop(frames, size)
    top, bottom, left, right = report.cropped
    scaled = (top + size[0] + bottom, left + size[1] + right)
    planes = frames.permute(0, 3, 1, 2).float()
    whole = F.interpolate(planes, scaled, mode="bilinear", antialias=True).round()
    kept = whole.permute(0, 2, 3, 1)[:, top : top + size[0], left : left + size[1]]
    difference = (result.float() - kept).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    if source == (30, 40):  # nothing much is cropped
        assert not difference.any()


@pytest.mark.parametrize("source", [(2, 4096), (4, 3840), (4096, 2), (1, 17)])
def test_frames_of_a_strip_are_refused_before_anything_is_made_of_them(
    source: tuple[int, int],
) -> None:
    # a view of one value: only its shape has that size
    frames = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(10**6, *source, 3)
    with pytest.raises(VideoRangeError, match=r"more than 16 times the other; crop or pad"):
        cover_and_crop(frames, (480, 832))
    with pytest.raises(VideoRangeError, match=f"{source[1]}x{source[0]}"):
        crop_report(source, (480, 832))


@pytest.mark.parametrize(
    ("source", "size", "padded"),
    [
        ((64, 32), (64, 128), (0, 0, 48, 48)),
        ((32, 64), (80, 128), (8, 8, 0, 0)),
        ((128, 64), (64, 128), (0, 0, 48, 48)),
        ((33, 64), (81, 128), (7, 8, 0, 0)),
        ((64, 128), (64, 128), (0, 0, 0, 0)),
    ],
)
def test_a_letterbox_shows_all_of_a_frame(
    source: tuple[int, int], size: tuple[int, int], padded: tuple[int, int, int, int]
) -> None:
    frames = torch.full((2, *source, 3), 200, dtype=torch.uint8)
    boxed, report = cover_and_crop(frames, size, "letterbox")
    assert report == crop_report(source, size, "letterbox")
    assert boxed.shape == (2, *size, 3) and report.padded == padded and not any(report.cropped)
    top, bottom, left, right = padded
    inside = boxed[:, top : size[0] - bottom, left : size[1] - right]
    assert inside.unique().tolist() == [200]
    assert int((boxed > 0).sum()) == inside.numel()
    assert ("between black bars" in report.description) == any(padded)
