"""Whole frames of interlaced ones, by FFmpeg's bwdif: as many, at the same times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av.filter import Graph
    from av.video.frame import VideoFrame


def deinterlaced(
    frames: Iterable[tuple[int, VideoFrame]], check: Callable[[VideoFrame], None]
) -> Iterator[tuple[int, VideoFrame]]:
    """Numbered frames with the fields of those that are flagged as interlaced woven together.

    A frame takes the one before and the one behind it into account. check: called with each frame
    before it is used.
    """
    import av

    graph: Graph | None = None
    for number, frame in frames:
        check(frame)
        graph = graph or _graph(frame)
        # a clock of our own, by which frames are known again
        frame.pts, frame.time_base = number, Fraction(1, 1)
        graph.push(frame)
        yield from _pulled(graph)
    if graph is not None:
        try:
            graph.push(None)
        except av.EOFError:
            return
        yield from _pulled(graph)


def _graph(frame: VideoFrame) -> Graph:
    import av.filter

    graph = av.filter.Graph()
    graph.threads = 1
    about = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1"
    about += f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
    graph.link_nodes(
        graph.add("buffer", about),
        graph.add("bwdif", "mode=send_frame:deint=interlaced"),
        graph.add("buffersink"),
    ).configure()
    return graph


def _pulled(graph: Graph) -> Iterator[tuple[int, VideoFrame]]:
    """The frames that are ready."""
    import av

    while True:
        try:
            frame = graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return
        # the filter counts in half frames
        assert frame.pts is not None and frame.time_base is not None
        yield round(frame.pts * frame.time_base), frame
