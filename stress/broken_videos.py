"""Videos that are broken on purpose: cut, flipped, and with headers that lie. The same each time.

Made of a whole mp4. Some damage reaches no picture, such as a lie about the time of creation: that
file shows what the whole one shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from mv2v_engine.video.io import read_video

# an mp4's boxes, and how many bytes behind its name a lie can begin
_BOXES = (
    *(b"ftyp", b"moov", b"mvhd", b"trak", b"tkhd", b"mdia", b"mdhd", b"minf", b"stbl", b"stsd"),
    *(b"avc1", b"avcC", b"stts", b"ctts", b"stss", b"stsc", b"stsz", b"stco", b"mdat"),
)
_REACH = 40
_LIES = (0, 1, 7, 0xFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF)
_OTHERS = (
    b"",
    b"\0",
    b"no video at all\n" * 40,
    b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    b"\x1a\x45\xdf\xa3" + bytes(range(256)) * 8,  # begins as Matroska does
    b"RIFF\xff\xff\xff\x7fAVI LIST" + bytes(400),
    b"GIF89a\xff\xff\xff\xff\xf7\0\0" + bytes(64),
    b"G" + (b"\xff" * 187 + b"G") * 20,  # packets as of MPEG-TS
    b"OggS" + bytes(300),
    b"FLV\x01\x05\0\0\0\t" + bytes(200),
    b"PK\x03\x04" + bytes(500),
    # would have a decoder open other files
    b"ffconcat version 1.0\nfile clip.mp4\n",
    b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>",
)


# damage that can leave a valid video of other pictures, or of the same at other times: that of the
# pictures' own bits, and a number of a header that becomes another possible one
SILENT = ("flipped bits", "overwritten", "lying header")


def is_unharmed(path: Path, whole: Path) -> bool:
    """Whether a file that was taken shows what the whole one shows, at the same times."""
    found, expected = read_video(path), read_video(whole)
    return found.fps == expected.fps and torch.equal(found.frames, expected.frames)


def broken_videos(video: bytes, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """`count` files and what was done to each. video: a whole mp4."""
    pick = random.Random(seed)
    for number in range(count):
        if number < len(_OTHERS):
            yield "another file", _OTHERS[number]
        else:
            name, damage = _DAMAGES[number % len(_DAMAGES)]
            yield name, damage(video, pick)


def _cut(video: bytes, pick: random.Random) -> bytes:
    return video[: pick.randrange(1, len(video))]


def _cut_out(video: bytes, pick: random.Random) -> bytes:
    start = pick.randrange(len(video) - 1)
    return video[:start] + video[start + pick.randrange(1, len(video) // 4) :]


def _flip(video: bytes, pick: random.Random) -> bytes:
    data = bytearray(video)
    for _ in range(pick.choice((1, 8, 64, 512))):
        data[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
    return bytes(data)


def _overwrite(video: bytes, pick: random.Random) -> bytes:
    start = pick.randrange(len(video) - 1)
    length = min(pick.choice((16, 256, 2048)), len(video) - start)
    return video[:start] + pick.randbytes(length) + video[start + length :]


def _lie(video: bytes, pick: random.Random) -> bytes:
    """Four bytes of a header say something else: a size, a count, an offset, a rate."""
    data = bytearray(video)
    for _ in range(pick.choice((1, 1, 3))):
        places = [data.find(box) for box in _BOXES]
        start = pick.choice([place for place in places if place >= 4])
        # from the box's own length, which is before its name
        at = start + pick.choice((-4, *range(4, _REACH, 4)))
        data[at : at + 4] = pick.choice(_LIES).to_bytes(4, "big")
    return bytes(data)


def _rename(video: bytes, pick: random.Random) -> bytes:
    box, other = pick.sample([box for box in _BOXES if box in video], 2)
    return video.replace(box, other, 1)


def _repeat(video: bytes, pick: random.Random) -> bytes:
    start = pick.randrange(len(video) - 1)
    part = video[start : start + 4096]
    return video[:start] + part * pick.choice((2, 5)) + video[start:]


_DAMAGES: tuple[tuple[str, Callable[[bytes, random.Random], bytes]], ...] = (
    ("cut off", _cut),
    ("lying header", _lie),
    ("cut out", _cut_out),
    ("lying header", _lie),
    ("flipped bits", _flip),
    ("overwritten", _overwrite),
    ("lying header", _lie),
    ("renamed box", _rename),
    ("repeated part", _repeat),
)
