"""Decoded frames as a viewer shows them: matrix and range, HDR and wide colours, alpha.

FFmpeg converts by a frame's tags; what it lacks here is filled in: the matrix of an untagged frame,
by its size as players choose it, and the way from HDR and wide gamuts to BT.709. PyAV's FFmpeg has
no zscale, and its scaler takes half a minute to prepare a tone map, so the arithmetic of the
standards is written out: BT.2100 for PQ and HLG, BT.1886 for SDR, the curve of FFmpeg's
`tonemap=mobius`.

The arithmetic alone loads torch: whoever only decodes, as the service's prober does, needs none.

H W pixels; colours are linear light relative to the white of an SDR screen unless said otherwise.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mv2v_engine.config import Alpha
from mv2v_engine.errors import VideoError

if TYPE_CHECKING:
    from av.video.frame import VideoFrame
    from torch import Tensor

# H.273's numbers of matrices, transfers and primaries
_RGB, _BT709, _UNKNOWN, _BT470BG, _BT2020 = 0, 1, 2, 5, 9
_MATRICES = {1: "BT.709", 4: "FCC", 5: "BT.601", 6: "BT.601", 7: "SMPTE 240M", 9: "BT.2020"}
_SRGB, _PQ, _HLG = 13, 16, 18
_HDR = {_PQ: "PQ", _HLG: "HLG"}
_WIDE = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
# linear light of wide primaries to that of BT.709 (white D65; DCI-P3 is shown with that, too)
_FROM_P3 = (
    (1.2249402, -0.2249402, 0.0),
    (-0.0420570, 1.0420570, 0.0),
    (-0.0196376, -0.0786361, 1.0982736),
)
_TO_BT709 = {
    9: ((1.660491, -0.587641, -0.072850), (-0.124551, 1.1329, -0.008349),
        (-0.018151, -0.100579, 1.11873)),
    11: _FROM_P3,
    12: _FROM_P3,
}  # fmt: skip
_LUMA_2020 = (0.2627, 0.678, 0.0593)
# larger frames are taken for BT.709 if nothing is said, as players do
_SD_SIZE = (576, 1279)
# nits: of HDR's peak, of its diffuse white (BT.2408), and of an SDR screen's white
_PEAK, _WHITE, _SDR_WHITE = 1000.0, 203.0, 100.0
_BT1886 = 2.4
# up to this share of white colours stay as they are; from there to the peak they roll off
_KNEE = 0.8
# pixels that are converted at once, in fp32
_CHUNK_PIXELS = 1 << 20
# longer side of a frame that is only measured
_MEASURED_SIDE = 256


class Pictures:
    """How the frames of one video become RGB.

    first: the first frame, whose tags hold for all. tags: the stream's, where a frame has none.
    has_alpha: whether a pixel of any frame is transparent (`is_seen_through`).

    notes: what is changed, in words. is_hdr: whether `measure` is needed before `pixels`.

    Raises:
        VideoError: colours that cannot be read, or alpha that is refused.
    """

    def __init__(
        self, path: Path, first: VideoFrame, tags: Any, alpha: Alpha, *, has_alpha: bool
    ) -> None:
        if _is_ipt(first):
            raise VideoError(
                f"{path.name} is Dolby Vision without a base layer that others can show (profile "
                "5, or 10.0 of AV1): its colours would come out wrong; convert it to SDR or HDR10 "
                "first, by ffmpeg's libplacebo filter, or record HLG or SDR"
            )
        self._alpha, self._white = alpha, _WHITE
        self._matrix = self._matrix_of(path, first, tags)
        self._range = first.color_range or tags.color_range
        transfer = _tag(first.color_trc, tags.color_trc)
        primaries = _tag(first.color_primaries, tags.color_primaries)
        self._hdr = transfer if transfer in _HDR else None
        if self._hdr is not None and primaries == _UNKNOWN:
            primaries = _BT2020
        self._primaries = primaries if primaries in _WIDE else None
        self._curve = transfer
        self.has_alpha = has_alpha
        notes = []
        if self._hdr is not None:
            wide = f" in {_WIDE[self._primaries]}" if self._primaries else ""
            notes.append(f"HDR ({_HDR[self._hdr]}{wide}) was tone-mapped to SDR (BT.709)")
        elif self._primaries is not None:
            notes.append(f"colours of {_WIDE[self._primaries]} were brought to BT.709")
        if has_alpha:
            notes.append(composed_over(alpha, path.name, "a video"))
        self.notes = tuple(notes)

    @property
    def is_hdr(self) -> bool:
        return self._hdr is not None

    def measure(self, frames: Iterable[VideoFrame]) -> None:
        """Find the white of an HDR video: BT.2408's 203 nits, less if no frame is as bright.

        So a dark video is not darkened further, and one whose white lies at 100 nits keeps it.
        """
        brightest = 0.0
        for frame in frames:
            scale = min(1.0, _MEASURED_SIDE / max(frame.width, frame.height))
            height, width = (max(1, round(side * scale)) for side in (frame.height, frame.width))
            pixels = self._converted(frame, "rgb48le", height, width)
            nits = self._nits(pixels.reshape(-1, 3))
            brightest = max(brightest, float(nits.max()))
        # a peak this near is white that was rounded
        self._white = min(max(brightest, _SDR_WHITE), _WHITE)
        self._peak = _PEAK if brightest > _WHITE * 1.05 else self._white

    def pixels(self, frame: VideoFrame, height: int, width: int) -> Tensor:
        """A frame as uint8 [height, width, 3], scaled."""
        deep = self._hdr is not None or self._primaries is not None
        if not deep and not self.has_alpha:
            return self._converted(frame, "rgb24", height, width)
        name = {(True, True): "rgba64le", (True, False): "rgb48le", (False, True): "rgba"}
        import torch

        pixels = self._converted(frame, name[deep, self.has_alpha], height, width)
        most = 65535 if deep else 255
        rows = max(1, _CHUNK_PIXELS // width)
        chunks = []
        for chunk in pixels.split(rows):
            colours = chunk[..., :3]
            out = self._to_sdr(colours) if deep else colours.float()
            if self.has_alpha:
                opacity = chunk[..., 3:].float() / most
                behind = 255.0 if self._alpha == "white" else 0.0
                out = out * opacity + behind * (1 - opacity)
            chunks.append(out.round().clamp(0, 255).to(torch.uint8))
        return torch.cat(chunks)

    def _matrix_of(self, path: Path, first: VideoFrame, tags: Any) -> int:
        """The number of the matrix that makes RGB of the frames."""
        if first.format.is_rgb:
            return _RGB
        matrix = _tag(first.colorspace, tags.colorspace)
        if matrix in (_UNKNOWN, _RGB):
            is_hdr = _tag(first.color_trc, tags.color_trc) in _HDR
            if is_hdr or _tag(first.color_primaries, tags.color_primaries) == _BT2020:
                return _BT2020
            is_small = first.height <= _SD_SIZE[0] and first.width <= _SD_SIZE[1]
            return _BT470BG if is_small else _BT709
        if matrix not in _MATRICES:
            known = ", ".join(dict.fromkeys(_MATRICES.values()))
            raise VideoError(
                f"{path.name} is tagged with the colour matrix {matrix} of H.273, which cannot be "
                f"read; re-encode it with one of {known}"
            )
        return matrix

    def _converted(self, frame: VideoFrame, name: str, height: int, width: int) -> Tensor:
        """[height, width, channels] by FFmpeg's scaler: uint8, or int32 of 16 bits."""
        if self._matrix != _RGB:
            frame.colorspace = self._matrix
        if self._range:
            frame.color_range = self._range
        import torch

        array = frame.to_ndarray(format=name, width=width, height=height)
        # torch has no arithmetic on 16 bits without a sign
        return torch.from_numpy(array if array.dtype.itemsize == 1 else array.astype("int32"))

    def _to_sdr(self, codes: Tensor) -> Tensor:
        """fp32 [..., 3] in 0..255 of codes in 0..65535."""
        if self._hdr is not None:
            light = self._nits(codes) / self._white
        else:
            light = _eotf(self._curve, codes)
        if self._primaries is not None:
            light = light @ _matrix(_TO_BT709[self._primaries]).T
        light = light.clamp(min=0)
        if self._hdr is not None:
            signal = light.amax(-1, keepdim=True).clamp(min=1e-6)
            light = light * (_rolled_off(signal, self._peak / self._white) / signal)
        light = light.clamp(max=1)
        if self._hdr is None and self._curve == _SRGB:
            steep = 12.92 * light
            return 255 * steep.where(light <= 0.0031308, 1.055 * light ** (1 / 2.4) - 0.055)
        return 255 * light ** (1 / _BT1886)

    def _nits(self, codes: Tensor) -> Tensor:
        """What an HDR screen of 1,000 nits shows of codes in 0..65535: fp32, in nits."""
        light = _eotf(self._hdr, codes)
        if self._hdr == _HLG:
            # the screen's own gamma, 1.2 on the luminance (BT.2100)
            luma = light @ _matrix(_LUMA_2020)
            light = _PEAK * light * luma.clamp(min=1e-6)[..., None] ** 0.2
        return light


def _matrix(values: Sequence[Any]) -> Tensor:
    import torch

    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _eotf(transfer: int | None, codes: Tensor) -> Tensor:
    """Linear light of codes in 0..65535: nits for PQ, the scene's for HLG, else 0..1."""
    import torch

    x = torch.linspace(0, 1, 65536, dtype=torch.float64, device="cpu")
    if transfer == _PQ:
        root = x ** (1 / 78.84375)
        table = 1e4 * ((root - 0.8359375).clamp(min=0) / (18.8515625 - 18.6875 * root)) ** (
            1 / 0.1593017578125
        )
    elif transfer == _HLG:
        table = torch.where(
            x <= 0.5, x * x / 3, (((x - 0.55991073) / 0.17883277).exp() + 0.28466892) / 12
        )
    elif transfer == _SRGB:
        table = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    else:
        table = x**_BT1886
    return table.float()[codes.long()]


def _rolled_off(light: Tensor, peak: float) -> Tensor:
    """The mobius curve of FFmpeg's `tonemap`: straight up to the knee, then to 1 at the peak."""
    if peak <= 1:
        return light
    j = _KNEE
    a = -j * j * (peak - 1) / (j * j - 2 * j + peak)
    b = (j * j - 2 * j * peak + peak) / (peak - 1)
    bent = (b * b + 2 * b * j + j * j) / (b - a) * (light + a) / (light + b)
    return light.where(light <= j, bent)


def _tag(frame: int, stream: int) -> int:
    """A frame's own tag before its stream's."""
    return int(stream if frame in (_UNKNOWN, 0) and stream not in (0, None) else frame)


def composed_over(alpha: Alpha, name: str, instead: str) -> str:
    """What is said of alpha that was composed, of what has that `name`; refused if it is to be.

    Raises:
        VideoError: refused; `instead` is what to give without it.
    """
    if alpha == "refuse":
        raise VideoError(
            f"{name} has an alpha channel, which is refused here; take it composed over black or "
            f"white, or give {instead} without it"
        )
    return f"its alpha channel was composed over {alpha}"


def has_room_for_alpha(frame: VideoFrame) -> bool:
    """Whether the form of a frame can say what is transparent; most of such frames are opaque."""
    return any(c.is_alpha for c in frame.format.components) or frame.format.name == "pal8"


def _is_ipt(frame: VideoFrame) -> bool:
    """Whether a frame's numbers are Dolby's own IPT colours, which only its metadata decodes.

    FFmpeg's own rule for it: profile 0 of the RPU with a base layer of full range.
    """
    from av.sidedata.sidedata import Type

    side_data: Any = frame.side_data
    found = side_data.get(Type.DOVI_METADATA)
    if found is None:
        return False
    # AVDOVIMetadata begins with the place of its header, whose fields are of one byte each but
    # for the second (libavutil/dovi_meta.h)
    data = bytes(found)
    place: int = struct.unpack_from("N", data)[0]
    return data[place + 4] == 0 and data[place + 10] == 1


def is_seen_through(frame: VideoFrame) -> bool:
    """Whether a pixel is transparent, of a frame that has room for alpha."""
    return bool((frame.to_ndarray(format="rgba")[..., 3] < 255).any())
