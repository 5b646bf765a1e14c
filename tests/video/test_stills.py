"""Images as a video: folders, patterns, animated WebP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mv2v_engine.errors import VideoError
from mv2v_engine.serving.config import Limits
from mv2v_engine.serving.work.probe import examine
from mv2v_engine.video.damage import check_pictures
from mv2v_engine.video.io import VideoReader, open_video, probe_video
from mv2v_engine.video.stills import frames_of_images, scan_video


def levels(reader: VideoReader) -> list[int]:
    return [round(frame.float().mean().item() / 20) for frame in reader.frames()]


def images(
    folder: Path, names: list[str], *, size: tuple[int, int] = (64, 48), mode: str = "RGB"
) -> Path:
    """Image i is grey of level 20 i."""
    folder.mkdir(exist_ok=True)
    for index, name in enumerate(names):
        Image.new("RGB", size, (20 * index,) * 3).convert(mode).save(folder / name)
    return folder


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp", ".PNG"])
@pytest.mark.parametrize("pad", [1, 4])
def test_a_folder_in_the_order_of_its_numbers(tmp_path: Path, suffix: str, pad: int) -> None:
    folder = images(tmp_path / "frames", [f"f{i:0{pad}}{suffix}" for i in range(8, 12 + 8)])
    (folder / "notes.txt").write_text("not a frame")
    reader = VideoReader(folder, image_fps=10)
    assert levels(reader) == list(range(12))
    assert (reader.info.width, reader.info.height, reader.info.fps) == (64, 48, 10)
    assert reader.notes == ("12 images were taken at 10 a second",)
    picked = reader.read([11, 0, 3, 3], size=(24, 32))
    assert [round(frame.float().mean().item() / 20) for frame in picked] == [11, 0, 3, 3]
    assert picked.shape == (4, 24, 32, 3)


def test_a_pattern(tmp_path: Path) -> None:
    images(tmp_path, [f"{i:03}.png" for i in range(5, 10)])
    reader = VideoReader(tmp_path / "%03d.png")
    assert levels(reader) == list(range(5)) and reader.info.fps == 25
    (tmp_path / "007.png").unlink()
    with pytest.raises(VideoError, match=r"has images 5 to 9, but none of number 7; give them"):
        VideoReader(tmp_path / "%03d.png")
    with pytest.raises(VideoError, match=r"no file has the name .*%d.jpg; give the pattern"):
        VideoReader(tmp_path / "%d.jpg")


def animated(path: Path, durations: list[int] | int, num_frames: int = 8) -> Path:
    frames = [Image.new("RGB", (64, 48), (20 * index,) * 3) for index in range(num_frames)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, lossless=True)
    return path


def test_an_animated_webp(tmp_path: Path) -> None:
    path = animated(tmp_path / "clip.webp", 40)
    reader = VideoReader(path)
    assert levels(reader) == list(range(8)) and reader.info.fps == 25 and reader.notes == ()
    assert examine(path, Limits().to_dict())["frames"] == 8
    path = animated(tmp_path / "held.webp", [40, 40, 200, 40, 40, 40, 40, 40])
    reader = VideoReader(path)
    assert levels(reader) == [0, 1, 2, 2, 2, 2, 2, 3, 4, 5, 6, 7]
    assert torch.equal(reader.read([6, 7]), torch.stack([*reader.frames(6)])[:2])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(VideoError, match=r"held.webp"):
        check_pictures(path, scan_video(path, None))


@pytest.mark.parametrize("limit", [{"pixels": 1000}, {"frames": 5}, {"seconds": 0.2}])
def test_a_webp_is_held_to_the_limits_of_uploads(tmp_path: Path, limit: dict[str, float]) -> None:
    path = animated(tmp_path / "clip.webp", 40)
    with pytest.raises(Exception, match=r"at most (1000|5|0.2) are taken"):
        examine(path, Limits().to_dict() | limit)


def test_alpha_and_orientation_of_images(tmp_path: Path) -> None:
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[..., 0], pixels[:, :32, 3] = 200, 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "1.png", exif=exif)
    reader = VideoReader(tmp_path, alpha="white")
    frame = reader.read([0])[0]
    assert frame.shape == (64, 48, 3)
    assert frame[10, 20].tolist() == [200, 0, 0] and frame[50, 20].tolist() == [255, 255, 255]
    assert reader.notes[1] == "its alpha channel was composed over white"
    with pytest.raises(VideoError, match=r"has an alpha channel, which is refused here"):
        VideoReader(tmp_path, alpha="refuse")


def rgba(opacity: int) -> Image.Image:
    return Image.fromarray(np.full((48, 64, 4), [200, 0, 0, opacity], np.uint8))


def test_alpha_of_images_counts_where_something_is_seen_through(tmp_path: Path) -> None:
    composed = ("its alpha channel was composed over white",)
    for index in range(3):
        rgba(255).save(tmp_path / f"{index}.png")
    assert len(VideoReader(tmp_path, alpha="refuse").notes) == 1  # the rate's
    rgba(0).save(tmp_path / "3.png")
    assert VideoReader(tmp_path, alpha="white").notes[1:] == composed
    path, frames = tmp_path / "clip.webp", [rgba(255), rgba(254), rgba(0)]
    for count, notes in ((1, ()), (3, composed)):
        rest = frames[1:count] or [Image.new("RGB", (64, 48))]
        frames[0].save(path, save_all=True, append_images=rest, lossless=True, duration=40)
        assert VideoReader(path, alpha="white").notes == notes
    # a list's as a file's
    assert frames_of_images([rgba(255)] * 2, "refuse") is not None
    found = frames_of_images(frames, "white")
    assert found is not None and found[1] == composed
    assert found[0][:, 0, 0].tolist() == [[200, 0, 0], [200, 1, 1], [255, 255, 255]]
    with pytest.raises(VideoError, match="image 1 has an alpha channel, which is refused here"):
        frames_of_images(frames, "refuse")


def test_floating_point_images_are_refused(tmp_path: Path) -> None:
    image = Image.new("F", (64, 48), 0.5)
    with pytest.raises(VideoError, match=r"image 0 has floating-point numbers .*save it in 8 or"):
        frames_of_images([image, image])
    image.save(tmp_path / "1.tif")
    with pytest.raises(VideoError, match=r"1\.tif has floating-point numbers"):
        VideoReader(tmp_path).read([0])


def test_sixteen_bits_are_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((48, 64), 32896, np.uint16)).save(tmp_path / "1.png")
    assert VideoReader(tmp_path).read([0]).unique().tolist() == [128]


def test_folders_that_are_no_video(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"is a folder without images .*give a video file, or a"):
        probe_video(tmp_path)
    images(tmp_path, ["1.png", "2.png"])
    Image.new("RGB", (32, 32)).save(tmp_path / "3.png")
    with pytest.raises(VideoError, match=r"^3.png is 32x32, 1.png before it 64x48; give images of"):
        probe_video(tmp_path)
    (tmp_path / "3.png").write_bytes(b"no image")
    with pytest.raises(VideoError, match=r"3.png cannot be read as an image .*give whole images"):
        probe_video(tmp_path)
    Image.new("RGB", (4000, 3000)).save(tmp_path / "0.png")
    with pytest.raises(VideoError, match=r"^0.png is 4000x3000 .12.0 MP.; at most 8.3 MP"):
        VideoReader(tmp_path)


def test_a_gif_with_a_pause_keeps_its_times(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 48), (20 + 20 * index,) * 3) for index in range(9)]
    path, times = tmp_path / "clip.gif", [100] * 4 + [300] + [100] * 4
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)
    reader = VideoReader(path)
    assert (reader.info.fps, reader.info.num_frames) == (10, 11)
    levels = reader.read(range(11))[:, 0, 0, 0].tolist()
    assert levels == [20, 40, 60, 80, 100, 100, 100, 120, 140, 160, 180]
    assert "held frames are repeated (9 became 11)" in reader.notes[0]


def test_what_only_looks_like_a_source(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="an address is not fetched: download it"):
        VideoReader("https://example.com/clip.mp4")
    with pytest.raises(VideoError, match="does not exist; give the images' folder, or their patt"):
        VideoReader(tmp_path / "*.png")
    with (tmp_path / "clip.mp4").open("w+b") as file:
        pass
    with pytest.raises(VideoError, match=r"the file clip.mp4 is closed; give it open"):
        open_video(file, max_pixels=100)


def test_alpha_of_an_animated_webp(tmp_path: Path) -> None:
    frames = []
    for index in range(4):
        pixels = np.zeros((48, 64, 4), np.uint8)
        pixels[..., 0], pixels[..., 1], pixels[..., 3] = 200, 40 * index, 255
        pixels[:, 32:, 3] = 0 if index % 2 else 128
        frames.append(Image.fromarray(pixels))
    path = tmp_path / "clip.webp"
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=40, lossless=True, exact=True
    )
    reader = VideoReader(path, alpha="white")
    assert reader.read(range(4))[:, 10, 50].tolist() == [
        [227, 127, 127],
        [255, 255, 255],
        [227, 167, 127],
        [255, 255, 255],
    ]
    assert reader.notes == ("its alpha channel was composed over white",)
