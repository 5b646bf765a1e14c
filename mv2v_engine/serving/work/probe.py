"""The process that decodes uploads first, so that no file takes the service or the engine along.

`python -m mv2v_engine.serving.work.probe` loads what decoding needs once and reads requests as JSON
lines, `{"id", "path", "limits": Limits.to_dict(), "alpha", "name": of Uploads.named()}`. A fork of
it serves each, under limits of time, memory and files, and answers with a line: `{"id", "video":
...}` or `{"id", "code", "message"}`.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mv2v_engine.config import Alpha
from mv2v_engine.errors import VideoError, VideoRangeError
from mv2v_engine.serving.store.records import MASK, REFERENCES, SOURCE
from mv2v_engine.video.damage import STRICT, check_pictures
from mv2v_engine.video.stills import are_stills, count_stills, is_image, read_image, scan_video

if TYPE_CHECKING:
    import av

# those that hold their frames themselves: a playlist would have the decoder open other files
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
# what decoding may add to the address space: its threads' buffers, and some frames in flight
_BASE_BYTES, _BYTES_PER_PIXEL = 2 << 30, 128
_OPEN_FILES = 64
# a line this short is written whole, however many write at once
_MAX_MESSAGE = 1500


class Refused(Exception):
    """The video is not taken. code: of the table of errors."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def examine(
    path: Path, limits: dict[str, Any], alpha: Alpha = "black", name: str = SOURCE
) -> dict[str, Any]:
    """Decode an upload to its end; what it holds.

    name: that it will have in the session's folder; images are references, and may be masks.

    Raises:
        Refused: it is no video or image, it is broken, or it is beyond a limit.
    """
    try:
        if name.startswith(REFERENCES) or (
            name == MASK and not are_stills(path) and is_image(path)
        ):
            return _examine_image(path, limits, alpha)
        if are_stills(path):
            _check_images(path, limits)
        else:
            _check_container(path, limits)
        found = scan_video(path, sys.maxsize, alpha=alpha)
        info = found.info
        _check_pixels(info.width, info.height, limits)
        _check(info.num_frames, limits["frames"], "too_many_frames", "frames", "cut it")
        _check(info.duration, limits["seconds"], "video_too_long", "seconds", "cut it")
        _check_total(info.num_frames, info.width, info.height, limits)
        if info.num_frames < 2 and name == SOURCE:
            raise VideoError("the video has 1 frame, at least 2 are needed; give a longer one")
        check_pictures(path, found)
    except VideoError as error:
        message = str(error).replace(path.name, "the video")
        is_whole = isinstance(error, VideoRangeError)
        raise Refused("video_out_of_range" if is_whole else "unreadable_video", message) from error
    except MemoryError as error:
        raise _too_dear("more memory than it may") from error
    return {
        "frames": info.num_frames,
        "width": info.width,
        "height": info.height,
        "fps": info.fps,
        "seconds": info.duration,
        "notes": list(found.notes),
    }


def _called(name: str) -> str:
    """What errors call an upload by its name in the session's folder."""
    if name.startswith(REFERENCES):
        return f"reference {int(Path(name).name)}"
    return "the mask" if name == MASK else "the video"


def _examine_image(path: Path, limits: dict[str, Any], alpha: Alpha) -> dict[str, Any]:
    """The same of one image."""
    _, height, width = count_stills(path)
    _check_pixels(width, height, limits)
    height, width, _ = read_image(path, alpha).shape
    still = {"fps": 1.0, "seconds": 0.0, "notes": []}
    return {"frames": 1, "width": width, "height": height, **still}


def _check_container(path: Path, limits: dict[str, Any]) -> None:
    """Before anything is decoded: is it one whole file, of a size that may be decoded?"""
    import av

    options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS} | STRICT
    # the level is the whole process's, which is a fork for this file alone
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    name = ""
    with av.logging.Capture(local=False) as said:
        try:
            with av.open(str(path), metadata_errors="replace", options=options) as container:
                name = container.format.name
                videos = [s for s in container.streams.video if s.codec_context is not None]
                for stream in videos:
                    _check_pixels(stream.width, stream.height, limits)
                num_cut, counts = 0, dict.fromkeys((s.index for s in videos), 0)
                for packet in container.demux(videos):
                    num_cut += packet.is_corrupt
                    counts[packet.stream_index] += packet.size > 0
                for stream in videos:
                    _check_total(counts[stream.index], stream.width, stream.height, limits)
        except av.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            known = CONTAINERS.replace(",", ", ")
            raise Refused(
                "unreadable_video",
                f"the file cannot be opened as a video ({_reason(error, said)}): damaged, cut off, "
                f"or none of {known}; give a whole video file",
            ) from error
        finally:
            av.logging.set_level(None)
    # a demuxer reads on behind what it complains of; decoders that it asks may complain of nothing
    found = [message.strip() for _, which, message in said if which == name]
    if num_cut:
        found.insert(0, f"{num_cut} of its packets are not whole")
    if found:
        raise Refused(
            "unreadable_video",
            f"the video is damaged or cut off: {found[0]}; give a whole file, or re-encode what "
            "there is",
        )


def _check_images(path: Path, limits: dict[str, Any]) -> None:
    """The same of an animated WebP, whose header says it."""
    num_frames, height, width = count_stills(path)
    _check_pixels(width, height, limits)
    _check(num_frames, limits["frames"], "too_many_frames", "frames", "cut it")
    _check_total(num_frames, width, height, limits)


def _check_total(num_frames: int, width: int, height: int, limits: dict[str, Any]) -> None:
    most = limits["total_pixels"]
    if num_frames * width * height > most:
        raise Refused(
            "video_too_slow",
            f"the video has about {num_frames} frames of {width}x{height}, at most "
            f"{most // (width * height)} of this size are taken; cut it, or scale it down first",
        )


def _reason(error: av.FFmpegError, said: list[tuple[int, str, str]]) -> str:
    """What FFmpeg says of a file that it does not open: the first complaint tells most."""
    words = [str(error.strerror), *(message.strip() for _, _, message in said[:1])]
    return "; ".join(words)


def _check_pixels(width: int, height: int, limits: dict[str, Any]) -> None:
    most = limits["pixels"]
    if width * height > most:
        raise Refused(
            "too_many_pixels",
            f"the frames are {width}x{height} ({width * height} pixels), at most {most} are taken; "
            "scale the video down first",
        )


def _check(found: float, most: float, code: str, unit: str, advice: str) -> None:
    if found > most:
        raise Refused(code, f"the video has {found:g} {unit}, at most {most:g} are taken; {advice}")


def _too_dear(what: str) -> Refused:
    return Refused(
        "video_too_slow", f"decoding the video takes {what}; re-encode it smaller or shorter"
    )


def _limit(limits: dict[str, Any]) -> None:
    """Bound what this process, a fork that decodes one file, can still take."""
    os.nice(10)
    seconds = max(1, round(limits["probe_seconds"]))
    signal.alarm(seconds)
    cpu = seconds * (os.cpu_count() or 1)
    bounds = {
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
    }
    statm = Path("/proc/self/statm")
    # elsewhere the system does not say what is taken already, nor holds to this limit
    if statm.exists():
        taken = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        room = _BASE_BYTES + _BYTES_PER_PIXEL * limits["pixels"]
        bounds[resource.RLIMIT_AS] = taken + room
    for bound, value in bounds.items():
        hard = resource.getrlimit(bound)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(bound, (most, most))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    name = request.get("name", SOURCE)
    try:
        return {
            "video": examine(
                Path(request["path"]),
                request["limits"],
                request.get("alpha", "black"),
                name,
            )
        }
    except Refused as refused:
        message = str(refused).replace("the video", _called(name))
        return {"code": refused.code, "message": message[:_MAX_MESSAGE]}


def _supervise(request: dict[str, Any], out: int) -> None:
    """Have a fork decode the file, and answer for it if it dies."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _decode(request, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    answer = json.loads(said) if said and status == 0 else _epitaph(status)
    os.write(out, json.dumps({"id": request["id"], **answer}).encode() + b"\n")


def _decode(request: dict[str, Any], writing: int) -> NoReturn:
    """The fork's whole life; whatever happens, it never runs on as a copy of its parent."""
    code = 1
    try:
        _limit(request["limits"])
        os.write(writing, json.dumps(_answer(request)).encode())
        code = 0
    finally:
        os._exit(code)


def _epitaph(status: int) -> dict[str, Any]:
    """What to answer for a decoder that said nothing."""
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number in (signal.SIGALRM, signal.SIGXCPU):
        refused = _too_dear("longer than it may")
    else:
        how = signal.Signals(number).name if number else f"code {os.waitstatus_to_exitcode(status)}"
        refused = Refused(
            "unreadable_video",
            f"the decoder died of the file ({how}); re-encode the video and try again",
        )
    return {"code": refused.code, "message": str(refused)}


def main() -> None:
    """Serve requests until stdin ends."""
    import av  # noqa: F401   # once, and not in every fork

    # a library that prints must not be taken for an answer
    out = os.dup(1)
    os.dup2(2, 1)
    # forks are never waited for here
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        request = json.loads(line)
        if os.fork() == 0:
            try:
                _supervise(request, out)
            finally:
                os._exit(0)


if __name__ == "__main__":
    main()
