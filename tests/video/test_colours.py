"""Colours come out as a viewer shows them: matrix, range, HDR, gamut, alpha and fields."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mv2v_engine.errors import VideoError
from mv2v_engine.video.io import VideoReader, read_video
from tests.video.conftest import with_alpha

PATCHES = np.array(
    [[255, 255, 255], [128, 128, 128], [0, 0, 0], [190, 40, 40], [40, 170, 60], [50, 60, 200]]
)
SIDE = 32
# Kr and Kb of H.273's matrices
LUMA = {
    1: (0.2126, 0.0722),
    4: (0.3, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}
TO_2020 = np.linalg.inv(
    [[1.660491, -0.587641, -0.07285], [-0.124551, 1.1329, -0.008349],
     [-0.018151, -0.100579, 1.11873]]
)  # fmt: skip


def write(
    path: Path,
    rgb: np.ndarray,
    *,
    matrix: int = 2,
    coded_as: int | None = None,
    full: bool = False,
    deep: bool = False,
    trc: int = 2,
    primaries: int = 2,
    codec: str = "libx264",
    num_frames: int = 3,
) -> Path:
    """Patches of float RGB [height, width, 3] in 0..1, by the matrix's own formula, lossless."""
    red, blue = LUMA[coded_as or matrix]
    luma = rgb @ np.array([red, 1 - red - blue, blue])
    cb = (rgb[..., 2] - luma) / (2 * (1 - blue))
    cr = (rgb[..., 0] - luma) / (2 * (1 - red))
    scale, most = (4, 1023) if deep else (1, 255)
    if full:
        planes = [luma * most, cb * most + 128 * scale, cr * most + 128 * scale]
    else:
        planes = [(16 + 219 * luma) * scale, *((128 + 224 * c) * scale for c in (cb, cr))]
    planes = np.stack(planes).round().clip(0, most)
    form = "yuv444p10le" if deep else "yuv444p"
    with av.open(str(path), "w") as container:
        options = {"libx264": {"qp": "0"}, "libx265": {"x265-params": "lossless=1:log-level=0"}}
        stream = container.add_stream(codec, rate=25, options=options.get(codec, {}))
        stream.height, stream.width = rgb.shape[:2]
        stream.pix_fmt = form
        context = stream.codec_context
        context.colorspace, context.color_trc, context.color_primaries = matrix, trc, primaries
        context.color_range = 0 if matrix == 2 and not full else 2 if full else 1
        for index in range(num_frames):
            frame = av.VideoFrame(rgb.shape[1], rgb.shape[0], form)
            for plane, values in zip(frame.planes, planes, strict=True):
                row = np.zeros((plane.height, plane.line_size // (2 if deep else 1)))
                row[:, : plane.width] = values
                plane.update(row.astype("<u2" if deep else "u1").tobytes())
            frame.pts, frame.colorspace, frame.color_range = index, matrix, context.color_range
            frame.color_trc, frame.color_primaries = trc, primaries
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def patches(height: int = SIDE) -> np.ndarray:
    return np.repeat(np.repeat(PATCHES[None], height, 0), SIDE, 1) / 255


def shown(path: Path) -> np.ndarray:
    """What is read in the middle of every patch of the last frame."""
    frame = read_video(path).frames[-1].numpy().astype(int)
    return frame[SIDE // 2, SIDE // 2 :: SIDE][: len(PATCHES)]


def expect(path: Path, truth: np.ndarray, tolerance: int = 4) -> None:
    assert np.abs(shown(path) - truth).max() <= tolerance, (shown(path).tolist(), truth.tolist())


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("deep", [False, True], ids=["8 bit", "10 bit"])
@pytest.mark.parametrize("matrix", LUMA)
def test_matrix_and_range_by_tag(tmp_path: Path, matrix: int, full: bool, deep: bool) -> None:
    path = write(tmp_path / "clip.mp4", patches(), matrix=matrix, full=full, deep=deep)
    expect(path, PATCHES)
    assert VideoReader(path).notes == ()


@pytest.mark.parametrize(("height", "coded_as"), [(32, 5), (576, 5), (720, 1)])
def test_untagged_by_size(tmp_path: Path, height: int, coded_as: int) -> None:
    path = write(tmp_path / "clip.mp4", patches(height), coded_as=coded_as, num_frames=1)
    expect(path, PATCHES)


def pq(nits: np.ndarray) -> np.ndarray:
    y = (nits / 1e4) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg(nits: np.ndarray) -> np.ndarray:
    light = nits / 1000
    luma = np.maximum(light @ [0.2627, 0.678, 0.0593], 1e-9)
    scene = light * luma[..., None] ** (1 / 1.2 - 1)
    curve = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), curve)


@pytest.mark.parametrize("matrix", [9, 2], ids=["tagged", "no matrix"])
@pytest.mark.parametrize("white", [100, 203])
@pytest.mark.parametrize("transfer", [16, 18], ids=["PQ", "HLG"])
def test_sdr_colours_within_hdr_are_themselves(
    tmp_path: Path, transfer: int, white: int, matrix: int
) -> None:
    nits = np.maximum(patches() ** 2.4 @ TO_2020.T, 0) * white
    coded = (pq if transfer == 16 else hlg)(nits)
    path = write(
        tmp_path / "clip.mp4",
        coded,
        matrix=matrix,
        coded_as=9,
        deep=True,
        trc=transfer,
        primaries=9,
        codec="libx265",
    )
    expect(path, PATCHES)
    name = "PQ" if transfer == 16 else "HLG"
    assert VideoReader(path).notes == (f"HDR ({name} in BT.2020) was tone-mapped to SDR (BT.709)",)


def test_highlights_roll_off_and_keep_their_order(tmp_path: Path) -> None:
    nits = np.repeat([20.0, 50, 100, 203, 500, 1000], SIDE)
    coded = pq(np.repeat(np.repeat(nits[None, :, None], SIDE, 0), 3, 2))
    path = write(
        tmp_path / "clip.mkv", coded, matrix=9, deep=True, trc=16, primaries=9, codec="libx265"
    )
    levels = shown(path)[:, 1]
    # below the knee, an SDR screen's own light
    assert np.abs(levels[:3] - 255 * (np.array([20, 50, 100]) / 203) ** (1 / 2.4)).max() <= 4
    assert 235 <= levels[3] < levels[4] <= levels[5] == 255


def test_wide_gamut_of_sdr(tmp_path: Path) -> None:
    coded = np.maximum(patches() ** 2.4 @ TO_2020.T, 0) ** (1 / 2.4)
    path = write(tmp_path / "clip.mp4", coded, matrix=9, deep=True, trc=14, primaries=9)
    expect(path, PATCHES)
    assert VideoReader(path).notes == ("colours of BT.2020 were brought to BT.709",)


def test_a_matrix_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", patches(), matrix=8, coded_as=1)
    with pytest.raises(VideoError, match=r"colour matrix 8 of H.273.*re-encode it with one of BT"):
        read_video(path)


ALPHA = pytest.mark.parametrize(
    ("name", "codec", "form"),
    [
        ("clip.webm", "libvpx-vp9", "yuva420p"),
        ("clip.mov", "prores_ks", "yuva444p10le"),
        ("clip.mkv", "ffv1", "yuva420p"),
        ("clip.mov", "png", "rgba"),
    ],
    ids=["vp9", "prores", "ffv1", "png"],
)


@ALPHA
def test_alpha_is_composed_as_chosen(tmp_path: Path, name: str, codec: str, form: str) -> None:
    path = with_alpha(tmp_path / name, codec, form)
    for alpha, behind in (("black", 0), ("white", 255)):
        reader = VideoReader(path, alpha=alpha)
        frame = reader.read([2])[0].int()
        assert (frame[16, 12] - torch.tensor([200, 0, 0])).abs().max() <= 6
        assert (frame[16, 52] - behind).abs().max() <= 4
        assert reader.notes == (f"its alpha channel was composed over {alpha}",)
    with pytest.raises(VideoError, match=r"has an alpha channel, which is refused here; take it"):
        VideoReader(path, alpha="refuse")


@ALPHA
def test_alpha_counts_where_something_is_seen_through(
    tmp_path: Path, name: str, codec: str, form: str
) -> None:
    reader = VideoReader(with_alpha(tmp_path / name, codec, form, opaque=None), alpha="refuse")
    assert reader.notes == ()
    frame = reader.read([2])[0].int()
    assert (frame - torch.tensor([200, 0, 0])).abs().max() <= 6
    # the last of many frames is enough
    path = with_alpha(tmp_path / name, codec, form, num_frames=9, opaque=8)
    reader = VideoReader(path, alpha="white")
    assert reader.notes == ("its alpha channel was composed over white",)
    assert reader.read([8])[0, 16, 52].min() >= 251
    with pytest.raises(VideoError, match=r"has an alpha channel, which is refused here; take it"):
        VideoReader(path, alpha="refuse")


def combed(path: Path, num_frames: int = 8) -> Path:
    """An edge that moves by 4 pixels from field to field, flagged bottom field first."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"x264-params": "bff=1:qp=1"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(num_frames):
            pixels = np.zeros((64, 96, 3), np.uint8)
            for field in (0, 1):
                pixels[field::2, : 8 + 4 * (2 * index + 1 - field)] = 220
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="yuv420p")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("name", ["clip.mp4", "clip.ts"])
def test_fields_are_woven(tmp_path: Path, name: str) -> None:
    path = combed(tmp_path / name)
    reader = VideoReader(path)
    frames = torch.stack(list(reader.frames()))
    assert len(frames) == reader.info.num_frames == 8
    assert reader.notes == ("it is interlaced, and was deinterlaced (bwdif)",)
    for index, frame in enumerate(frames[1:-1], 1):
        edges = (frame[4:-4, :, 1] > 110).sum(1)
        assert int(edges.max() - edges.min()) <= 1, index
        # the field that is shown first
        assert abs(int(edges[0]) - (8 + 8 * index)) <= 1, index
    # a part is what the whole has there
    assert torch.equal(reader.read([3, 4]), frames[3:5])
    assert torch.equal(reader.read([7]), frames[7:])


def golomb(value: int) -> str:
    code = format(value + 1, "b")
    return "0" * (len(code) - 1) + code


def dolby_vision_nal(profile: int, is_full: bool) -> bytes:
    """An RPU (ETSI GS CCM 001) that maps each component by x; its CRC is nought."""
    bits = f"{2:06b}{18:011b}{profile:04b}{0:04b}" + "1" + "0" + "00" + golomb(23) + "01"
    bits += str(int(is_full)) + golomb(2) + golomb(0) + golomb(4) + "0" + "000" + "0" + "1"
    bits += "0" + "0" + golomb(0) * 3
    bits += (golomb(0) + f"{0:010b}{1023:010b}") * 3 + golomb(0) * 2
    # a straight line: 0 + 1 x
    bits += (golomb(0) * 2 + "0" + golomb(0) + "0" * 23 + golomb(1) + "0" * 23) * 3
    bits += "0" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big") + bytes(4) + b"\x80"
    escaped = bytearray()
    for byte in data:
        if byte <= 3 and escaped[-2:] == b"\0\0":
            escaped.append(3)
        escaped.append(byte)
    return b"\0\0\0\1\x7c\x01\x19" + bytes(escaped)


def dolby_vision(path: Path, profile: int, is_full: bool) -> Path:
    with av.open(str(path), "w") as container:
        options = {"x265-params": "log-level=0"}
        stream = container.add_stream("libx265", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p10le"
        grey = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 128, np.uint8), "rgb24")
        packets = [p for _ in range(3) for p in stream.encode(grey.reformat(format="yuv420p10le"))]
        for packet in [*packets, *stream.encode(None)]:
            told = av.Packet(bytes(packet) + dolby_vision_nal(profile, is_full))
            told.pts, told.dts, told.time_base = packet.pts, packet.dts, packet.time_base
            told.stream, told.is_keyframe = stream, packet.is_keyframe
            container.mux(told)
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_dolby_visions_own_colours_are_refused(tmp_path: Path, suffix: str) -> None:
    path = dolby_vision(tmp_path / f"five{suffix}", 0, True)
    with pytest.raises(VideoError, match=r"five\.\w+ is Dolby Vision without a base layer.*conv"):
        VideoReader(path)
    # of profile 8 the base layer is a video like others
    eight = VideoReader(dolby_vision(tmp_path / f"eight{suffix}", 1, False))
    assert (eight.read([1]).int() - 128).abs().max() <= 4 and eight.notes == ()
