"""TAEHV's decoder against a reference that takes the whole video at once, and as an engine's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.errors import CheckpointError
from mv2v_engine.models.tiny_decoder import TinyDecoder, TinyShape
from mv2v_engine.vae import StreamDecoder

Weights = dict[str, Tensor]
WIDTHS = (12, 8, 6, 5)


def random_weights(
    channels: int = 16, strides: tuple[int, ...] = (1, 2, 2), patch: int = 1, seed: int = 0
) -> Weights:
    """A file's tensors by its names, encoder and all."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}

    def add(name: str, rows: int, columns: int, side: int = 3, bias: bool = True) -> None:
        scale = 1.4 / (columns * side**2) ** 0.5
        shape = (rows, columns, side, side)
        weights[f"{name}.weight"] = scale * torch.randn(shape, generator=generator)
        if bias:
            weights[f"{name}.bias"] = 0.3 * torch.randn(rows, generator=generator)

    add("encoder.0", 8, 3)
    add("decoder.1", WIDTHS[0], channels)
    for stage, stride in enumerate(strides):
        width = WIDTHS[stage]
        for block in range(3):
            place = f"decoder.{3 + 6 * stage + block}.conv"
            add(f"{place}.0", width, 2 * width)
            add(f"{place}.2", width, width)
            add(f"{place}.4", width, width)
        add(f"decoder.{7 + 6 * stage}.conv", stride * width, width, side=1, bias=False)
        add(f"decoder.{8 + 6 * stage}", WIDTHS[stage + 1], width, bias=False)
    add("decoder.22", 3 * patch**2, WIDTHS[3])
    return weights


def reference(weights: Weights, latents: Tensor, patch: int = 1) -> Tensor:
    """Latents [C, F, H, W] to colours [T, 3, height, width], layer after layer over all frames."""

    def conv(x: Tensor, name: str, padding: int = 1) -> Tensor:
        bias = weights.get(f"decoder.{name}.bias")
        return F.conv2d(x, weights[f"decoder.{name}.weight"], bias, padding=padding)

    x = conv(3 * torch.tanh(latents.transpose(0, 1) / 3), "1").relu()
    for stage in range(3):
        for number in range(3 + 6 * stage, 6 + 6 * stage):
            seen = torch.zeros_like(x)
            for time in range(1, len(x)):
                seen[time] = x[time - 1]
            y = conv(torch.cat((x, seen), 1), f"{number}.conv.0").relu()
            y = conv(conv(y, f"{number}.conv.2").relu(), f"{number}.conv.4")
            x = (y + x).relu()
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = conv(x, f"{7 + 6 * stage}.conv", padding=0)
        frames = [part for frame in x for part in frame.split(WIDTHS[stage])]
        x = conv(torch.stack(frames), str(8 + 6 * stage))
    x = conv(x.relu(), "22")
    rows, columns = x.shape[2] * patch, x.shape[3] * patch
    out = torch.zeros(len(x), 3, rows, columns, dtype=x.dtype)
    for down in range(patch):
        for right in range(patch):
            out[:, :, down::patch, right::patch] = x[:, down * patch + right :: patch**2]
    return out[3:]


@pytest.mark.parametrize(("channels", "patch"), [(16, 1), (48, 2)])
@pytest.mark.parametrize("num_latents", [1, 2, 5])
def test_it_is_the_reference_frame_by_frame(channels: int, patch: int, num_latents: int) -> None:
    weights = {
        name: weight.double() for name, weight in random_weights(channels, patch=patch).items()
    }
    own = {k.removeprefix("decoder."): w for k, w in weights.items() if k.startswith("decoder.")}
    shape = TinyShape.of({name: tuple(weight.shape) for name, weight in own.items()})
    assert shape == (channels, WIDTHS, (1, 2, 2), patch)
    assert (shape.temporal_stride, shape.spatial_stride) == (4, 8 * patch)
    decoder = TinyDecoder(shape).double()
    decoder.load_state_dict(own)
    torch.manual_seed(1)
    latents = 2 * torch.randn(channels, num_latents, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        got = decoder.decode(latents)
        expected = reference(weights, latents, patch)
        assert got.shape == (4 * num_latents - 3, 3, 24 * patch, 32 * patch)
        assert torch.allclose(got, expected, atol=1e-10) and float(expected.std()) > 0.1
        # latent frames that come one by one, from whoever has them
        parts = list(decoder.stream(iter(latents.unbind(1)), None))
        assert torch.equal(torch.cat(parts)[3:], got)


def decoder_file(path: Path, weights: Weights) -> Path:
    save_file(weights, path)
    return path


def test_an_engine_decodes_with_it(
    tiny_checkpoint: Path, source_frames: Tensor, tmp_path: Path
) -> None:
    weights = random_weights()
    place = decoder_file(tmp_path / "taew.safetensors", weights)
    torch.save(weights, tmp_path / "taew.pth")
    plain = Engine.from_pretrained(tiny_checkpoint, device="cpu")
    expected = plain.session(source_frames).render("pan_right")
    assert "decoder" not in expected.report
    digests = set()
    for path in (place, tmp_path / "taew.pth"):
        config = EngineConfig(decoder=path)
        engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", config=config)
        turn = engine.session(source_frames).render("pan_right")
        assert torch.equal(turn.latents, expected.latents)
        colours = reference(weights, turn.latents).clamp(0, 1).permute(0, 2, 3, 1) * 255
        assert turn.frames.shape == expected.frames.shape
        # half a colour by rounding, and what float32 loses in 40 layers
        assert float((turn.frames.float() - colours).abs().max()) <= 0.6
        assert engine.vae.key == plain.vae.key
        assert turn.report["decoder"]["name"] == path.name
        digests.add(turn.report["decoder"]["digest"])
    assert len(digests) == 1 and None not in digests
    # a stream of latents is decoded to the same frames, stored and taken up on the way
    latents = torch.randn(16, 4, 6, 8, generator=torch.Generator().manual_seed(3))
    frames, stored = list[Tensor](), dict[str, Tensor]()
    for part in latents.split([1, 2, 1], dim=1):
        decoder = StreamDecoder(engine.vae)
        decoder.load(stored)
        frames.append(decoder.decode(part))
        stored = {key: tensor.clone() for key, tensor in decoder.tensors().items()}
        assert decoder.num_bytes == sum(tensor.nbytes for tensor in stored.values()) > 0
    assert [len(each) for each in frames] == [1, 8, 4]
    assert torch.equal(torch.cat(frames), engine.vae.decode(latents))
    with pytest.raises(ValueError, match="stored with another decoder"):
        StreamDecoder(plain.vae).load(stored)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (random_weights(48, patch=2), "latents of 48 channels and strides of 4 frames and 16 pix"),
        (random_weights(strides=(2, 2, 2)), "strides of 8 frames"),
        ({"conv_in.weight": torch.zeros(4, 4, 3, 3)}, "is no tiny decoder"),
        (random_weights() | {"decoder.23.weight": torch.zeros(3)}, "first unknown 23.weight"),
        (random_weights() | {"decoder.1.bias": torch.full((12,), torch.nan)}, r"1\.bias"),
    ],
)
def test_what_is_none_is_refused(
    weights: Weights, words: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = EngineConfig(decoder=decoder_file(tmp_path / "tae.safetensors", weights))
    with pytest.raises(CheckpointError, match=words) as failure:
        Engine.from_pretrained(tiny_checkpoint, device="cpu", config=config)
    assert "tae.safetensors" in str(failure.value)


def test_a_file_that_is_not_there(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = EngineConfig(decoder=tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="is no file; give one such as taew2_1"):
        Engine.from_pretrained(tiny_checkpoint, device="cpu", config=config)
