"""Windows of a long video: the frames they keep are the video's own."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mv2v_engine.errors import VideoError
from mv2v_engine.video.windows import edit_windows


@st.composite
def videos(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    num_frames = draw(st.integers(1, 200))
    inner = st.integers(1, max(num_frames - 1, 1))
    cuts = draw(st.lists(inner, unique=True, max_size=min(6, num_frames - 1)))
    return num_frames, draw(st.integers(1, 90)), sorted(cuts)


@given(videos())
def test_kept_frames_are_the_videos_own(video: tuple[int, int, list[int]]) -> None:
    num_frames, window, cuts = video
    kept: list[int] = []
    windows = edit_windows(num_frames, window, cuts=cuts)
    for number, piece in enumerate(windows):
        assert piece.number == number and len(piece.indices) == window
        kept += piece.indices[piece.new_frames]
    assert kept == list(range(num_frames))


@given(videos())
def test_windows_are_full_and_straddle_no_cut(video: tuple[int, int, list[int]]) -> None:
    num_frames, window, cuts = video
    edges = [0, *cuts, num_frames]
    for piece in edit_windows(num_frames, window, cuts=cuts):
        first, end = edges[piece.shot], edges[piece.shot + 1]
        assert first <= piece.start < piece.stop <= end
        assert piece.stop - piece.start == min(window, end - first)


@given(videos())
def test_no_window_is_spared_or_wasted(video: tuple[int, int, list[int]]) -> None:
    num_frames, window, cuts = video
    edges = [0, *cuts, num_frames]
    wanted = sum(-(-(end - first) // window) for first, end in pairwise(edges))
    assert len(edit_windows(num_frames, window, cuts=cuts)) == wanted


def test_the_last_window_starts_early_enough_to_be_full() -> None:
    first, second, last = edit_windows(200, 81)
    assert (first.start, second.start, last.start) == (0, 81, 119)
    assert last.new_frames == slice(43, 81)  # 162 to 199


def test_a_short_shot_repeats_its_last_frame() -> None:
    (short,) = edit_windows(3, 5)
    assert short.indices == (0, 1, 2, 2, 2) and short.new_frames == slice(0, 3)


@pytest.mark.parametrize("cuts", [[0], [10], [5, 5], [7, 3], [-1]])
def test_cuts_of_another_video_are_refused(cuts: list[int]) -> None:
    with pytest.raises(VideoError, match=r"cuts must increase within 1\.\.9, got"):
        edit_windows(10, 4, cuts=cuts)


def test_no_frames_are_refused() -> None:
    with pytest.raises(VideoError, match="windows of 4 frames of a video of 0"):
        edit_windows(0, 4)
