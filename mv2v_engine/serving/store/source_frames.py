"""Frames that are sent up for a stream to edit, until they are edited: a file for each block.

    streams/<id>/source/block_0000001.rgb   uint8 [T, height, width, 3], of one block, whole
                        end                 no more will come

They lie on the disk, so that what was taken survives a kill, and are removed with their block's
end. At most `MOST_BLOCKS` lie there: who sends faster than the model edits is slowed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mv2v_engine.files import make_folder, replacing
from mv2v_engine.serving.store.streams import StreamRecord

if TYPE_CHECKING:
    import numpy as np

# blocks of frames that wait for the model
MOST_BLOCKS = 3


class SourceFrames:
    """The frames of one stream's source. record: of the stream, which says how large they are."""

    def __init__(self, folder: Path, record: StreamRecord) -> None:
        self.folder, self.record = folder / "source", record
        self.frame_bytes = record.width * record.height * 3

    def path(self, number: int) -> Path:
        """Where the frames of a block lie."""
        return self.folder / f"block_{number:07d}.rgb"

    def block_bytes(self, number: int) -> int:
        """Bytes of all frames of a block."""
        record = self.record
        frames = record.num_frames(number) - record.num_frames(number - 1)
        return frames * self.frame_bytes

    def has(self, number: int) -> bool:
        """Whether all frames of a block are there."""
        return self.path(number).exists()

    def first_lacking(self, number: int) -> int:
        """The first block from a number on whose frames are not there."""
        while self.has(number):
            number += 1
        return number

    def first_frame(self, number: int) -> int:
        """The first frame of a block, counted from 0: the next one to send where that block's are
        not there."""
        return self.record.num_frames(number - 1)

    def keep(self, number: int, data: bytes) -> None:
        """Keep all frames of a block. Raises StorageError."""
        make_folder(self.folder)
        with replacing(self.path(number)) as temporary:
            temporary.write_bytes(data)

    def drop(self, number: int) -> None:
        """A block is made: its frames are not needed any more."""
        self.path(number).unlink(missing_ok=True)

    @property
    def is_ended(self) -> bool:
        return (self.folder / "end").exists()

    def end(self) -> None:
        """No more frames will come. Raises OSError."""
        make_folder(self.folder)
        (self.folder / "end").touch()

    def frames(self, first: int) -> Iterator[np.ndarray]:
        """What lies there from a frame of the video on: uint8 [T, height, width, 3] a block.

        It ends where a block's frames are not there.
        """
        import numpy as np

        number = self.record.num_blocks(first + 1)
        skipped = first - self.record.num_frames(number - 1)
        while self.has(number):
            some = np.fromfile(self.path(number), dtype=np.uint8)
            yield some.reshape(-1, self.record.height, self.record.width, 3)[skipped:]
            number, skipped = number + 1, 0
