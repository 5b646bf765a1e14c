"""The sound of a video, copied packet by packet beside frames that keep their number and rate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.packet import Packet

# what players take in an mp4; others would have to be encoded anew
_IN_MP4 = {"aac", "mp3", "mp2", "ac3", "eac3", "opus", "flac", "alac"}


@dataclass(frozen=True, slots=True)
class Sound:
    """The default audio stream of a file.

    index: of the stream in its container. begin: when the first frame is shown, in seconds of the
    file.
    """

    path: Path
    index: int
    codec: str
    begin: Fraction

    @property
    def is_copied(self) -> bool:
        """Whether an mp4 can hold it as it is."""
        return self.codec in _IN_MP4


def find_sound(path: Path, container: InputContainer, begin: Fraction) -> Sound | None:
    """The audio stream that is marked as the default, else the first; None if there is none."""
    import av

    streams = [stream for stream in container.streams.audio if stream.codec_context is not None]
    if not streams:
        return None
    default = av.stream.Disposition.default
    stream = next((stream for stream in streams if stream.disposition & default), streams[0])
    return Sound(path, stream.index, stream.codec_context.name, begin)


class SoundCopy:
    """A sound on its way into an mp4.

    Raises:
        av.FFmpegError: the file cannot be read any more, or the container does not take it.
    """

    def __init__(self, sound: Sound, target: OutputContainer) -> None:
        import av

        self._sound, self._target, self._open = sound, target, ExitStack()
        source: Any = self._open.enter_context(
            av.open(
                str(sound.path.resolve()),
                metadata_errors="replace",
                options={"protocol_whitelist": "file"},
            )
        )
        stream = source.streams[sound.index]
        self._stream = target.add_stream_from_template(stream)
        self._packets = self._shifted(source, stream)
        self._next = next(self._packets, None)

    def mux(self, until: Fraction | None = None) -> None:
        """Copy what is heard before a time of the new video, in seconds; None copies the rest."""
        while self._next is not None:
            time, packet = self._next
            if until is not None and time > until:
                return
            packet.stream = self._stream
            self._target.mux(packet)
            self._next = next(self._packets, None)

    def close(self) -> None:
        self._packets.close()  # type: ignore[attr-defined]
        self._open.close()

    def _shifted(self, source: Any, stream: Any) -> Iterator[tuple[Fraction, Packet[Any]]]:
        """The packets with their time in the new video, which begins with the first frame."""
        base = stream.time_base
        shift = round(self._sound.begin / base)
        for packet in source.demux(stream):
            if not packet.size or packet.pts is None:
                continue
            packet.pts -= shift
            if packet.dts is not None:
                packet.dts -= shift
            if packet.pts + (packet.duration or 0) > 0:
                yield packet.pts * base, packet
