"""A video of 3,000 frames is edited in the memory of a few windows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mv2v_engine.video.io import probe_video
from tests.launched import script

NUM_FRAMES, SIZE = 3_000, (64, 96)
RAW_BYTES = NUM_FRAMES * SIZE[0] * SIZE[1] * 3

LONG = """
import json, sys
import av, numpy as np, torch
torch.set_num_threads(1)
from mv2v_engine import Engine, EngineConfig
from mv2v_engine.progress import peak_host_bytes

checkpoint, folder, num_frames, height, width = sys.argv[1:]
height, width = int(height), int(width)

def clip(name, num_frames):
    with av.open(f"{folder}/{name}.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=25, bit_rate=200_000)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(num_frames):
            levels = np.full((height * 3 // 2, width), 128, np.uint8)
            levels[:height, number % width :] = 50 + number % 150
            container.mux(stream.encode(av.VideoFrame.from_ndarray(levels, "yuv420p")))
        container.mux(stream.encode(None))
    return f"{folder}/{name}.mp4"

config = EngineConfig(max_memory=3, cache_bytes=2 << 20)
engine = Engine.from_pretrained(checkpoint, device="cpu", config=config)

# in the place of the VAE, which never sees more than a window: cells of 8 x 8 pixels as latents
def encode(frames, check=None):
    cells = frames[::4, ::8, ::8].permute(3, 0, 1, 2).float() / 127.5 - 1
    return torch.cat([cells, torch.zeros(13, *cells.shape[1:])])

def decode(latents, check=None):
    cells = ((latents[:3].clamp(-1, 1) + 1) * 127.5).to(torch.uint8).permute(1, 2, 3, 0)
    frames = cells.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return torch.cat([frames[:1], frames[1:].repeat_interleave(4, 0)])

engine.vae.encode, engine.vae.decode = encode, decode
held = []

def edited(name, num_frames):
    session = engine.session(clip(name, num_frames), store=f"{folder}/{name}", cuts=())
    return session.edit("a red ball", out=f"{folder}/{name}_out.mp4",
                        on_window=lambda _: held.append(engine.cache.bytes_used))

edited("short", 500)
before = peak_host_bytes()
turn = edited("long", int(num_frames))
print(json.dumps({
    "peak": before,
    "growth": peak_host_bytes() - before,
    "windows": turn.report["num_windows"],
    "cache": max(held),
    "memories": [len(row["memory"]["retrieved"]) for row in turn.report["windows"]],
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no peak of a process is known")
def test_memory_does_not_grow_with_the_video(
    tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = make_checkpoint(
        tmp_path / "checkpoint",
        has_text=True,
        vae={"base_dim": 4, "decoder_base_dim": 4},
        sampling={"num_frames": 81, "size": SIZE, "num_inference_steps": 1},
        in_channels=32,
        source_channels=16,
        camera_conditioning="none",
        num_layers=1,
        merger=None,
        tokenizers=(2, 4),
    )
    done = script(LONG, checkpoint, tmp_path, NUM_FRAMES, *SIZE)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{found}, raw frames {RAW_BYTES:,} bytes")
    assert (
        found["windows"] == 38 and probe_video(tmp_path / "long_out.mp4").num_frames == NUM_FRAMES
    )
    assert found["memories"] == [0, 1, 2] + [3] * 35 and found["cache"] <= 2 << 20
    # beyond an edit of 500 frames, for 2,500 frames more
    assert found["growth"] < RAW_BYTES / 4
