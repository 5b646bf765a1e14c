"""Damage that decoders hide: they make up a picture that they cannot read, and go on.

Asked strictly they say so. What they cannot know is damage that leaves a valid stream: a changed
bit may just as well be another picture.
"""

from __future__ import annotations

from pathlib import Path

from mv2v_engine.errors import VideoError
from mv2v_engine.video.scan import FRAME_PER_PACKET, Scan, check_size, opened, truncated
from mv2v_engine.video.stills import Stills, decode_stills

# checksums, syntax and lengths are checked, and what breaks them is an error
STRICT = {"err_detect": "crccheck+bitstream+buffer+explode"}


def check_pictures(path: Path, scan: Scan | Stills) -> None:
    """Decode every frame strictly and keep none.

    Raises:
        VideoError: a frame is damaged or missing, out of order, or of another size.
    """
    if isinstance(scan, Stills):
        for _ in decode_stills(scan, range(scan.order[0], scan.order[-1] + 1), None):
            pass
    else:
        _check_file(path, scan)


def _check_file(path: Path, scan: Scan) -> None:
    import av

    number = {stamp: index for index, stamp in enumerate(scan.stamps)}
    missing = set(scan.order)
    num_frames, num_seen, is_damaged = len(missing), 0, False
    latest: int | None = None
    with opened(path) as (container, stream, decoder):
        decoder.options |= STRICT
        # elsewhere, frames may carry the time at which they were to be decoded
        is_timed = container.format.name in FRAME_PER_PACKET
        begin = scan.stamps[0] if scan.num_skipped and scan.stamps else None
        for packet in container.demux(stream):
            is_damaged |= packet.is_corrupt
            try:
                frames = decoder.decode(packet)
            except av.FFmpegError as error:
                if isinstance(error, MemoryError):
                    raise
                # what lies before the first whole picture lacks others, and is left out anyway
                is_damaged |= begin is None
                continue
            for frame in frames:
                if begin is not None and frame.pts is not None and frame.pts < begin:
                    continue
                begin = None
                check_size(path, scan, frame)
                stamp = frame.pts
                if is_timed and stamp is not None:
                    if latest is not None and stamp < latest:
                        raise VideoError(
                            f"{path.name} is damaged: its frame {num_seen + 1} comes before frame "
                            f"{num_seen} by its time stamp; re-encode it"
                        )
                    latest = stamp
                if frame.is_corrupt:
                    is_damaged = True
                elif not scan.stamps:
                    missing.discard(num_seen)
                elif stamp in number:
                    missing.discard(number[stamp])
                num_seen += 1
    if is_damaged:
        raise VideoError(
            f"{path.name} is damaged: {max(len(missing), 1)} of its {num_frames} frames cannot be "
            "decoded whole; give a whole file, or re-encode what there is"
        )
    if missing:
        raise truncated(path, num_frames - len(missing), num_frames)
