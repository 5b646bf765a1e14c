"""The VAE's face: normalisation, tiling, sizes, and both file formats."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mv2v_engine.errors import CancelledError, CheckpointError, VideoError
from mv2v_engine.models.autoencoder import Autoencoder
from mv2v_engine.vae import StreamDecoder, StreamEncoder, VideoVAE, load_vae

CPU = torch.device("cpu")

RESIDUAL = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
# z48 with stride 16 and residual blocks is Wan2.2's shape, z16 with stride 8 Wan2.1's
SHAPES: dict[str, dict[str, Any]] = {
    "z16-stride8-plain": {
        "base_dim": 8,
        "dim_mult": [1, 1, 2, 2],
        "num_res_blocks": 1,
    },
    "z16-stride8-residual": {
        "base_dim": 8,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
        **RESIDUAL,
    },
    "z48-stride16-residual": {
        "base_dim": 8,
        "decoder_base_dim": 16,
        "z_dim": 48,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        **RESIDUAL,
        "scale_factor_spatial": 16,
        "latents_mean": [0.01 * i for i in range(48)],
        "latents_std": [0.5 + 0.1 * i for i in range(48)],
    },
}


def tiny_model(shape: str = "z16-stride8-residual", seed: int = 0, **changes: Any) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(SHAPES[shape] | changes).eval()


def save(folder: Path, seed: int = 0) -> Autoencoder:
    """A folder as diffusers writes it, and the model in it."""
    from diffusers import AutoencoderKLWan

    model = tiny_model(seed=seed)
    theirs = AutoencoderKLWan(**SHAPES["z16-stride8-residual"])
    theirs.load_state_dict(model.state_dict())
    theirs.save_pretrained(folder)
    return model


def random_frames(num_frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(num_frames, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1)


def load(path: Path, dtype: torch.dtype = torch.float32) -> VideoVAE:
    return load_vae(path, device=CPU, dtype=dtype)


def assert_is(loaded: VideoVAE, model: Autoencoder) -> None:
    frames, expected = random_frames(5, 32, 32), VideoVAE(model)
    latents = loaded.encode(frames)
    assert torch.equal(latents, expected.encode(frames))
    assert torch.equal(loaded.decode(latents), expected.decode(latents))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_encode_is_the_mode_normalised(shape: str) -> None:
    model = tiny_model(shape)
    frames = random_frames(9, 32, 48)
    video = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    mean = torch.tensor(model.config.latents_mean)[:, None, None, None]
    std = torch.tensor(model.config.latents_std)[:, None, None, None]
    expected = (model.encode(video)[0] - mean) / std
    vae = VideoVAE(model)
    latents = vae.encode(frames)
    assert latents.shape == expected.shape == vae.latent_shape(9, (32, 48))
    # on the CPU convolutions sum in another order than PyTorch's own
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_decode_undoes_the_normalisation(shape: str) -> None:
    model = tiny_model(shape)
    vae = VideoVAE(model)
    frames = random_frames(5, 32, 48)
    raw = model.encode(frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1)
    decoded = vae.decode(vae.encode(frames))
    expected = (model.decode(raw)[0].clamp(-1, 1) + 1) * 127.5
    assert decoded.shape == frames.shape and decoded.dtype == torch.uint8
    # normalising and undoing it rounds in fp32, so a value on the edge may round the other way
    assert (decoded.permute(3, 0, 1, 2).float() - expected).abs().max() <= 0.501


def test_decode_is_clamped_and_rounded() -> None:
    vae = VideoVAE(tiny_model())
    latents = torch.randn(16, 2, 4, 6, generator=torch.Generator().manual_seed(0)) * 1000
    frames = vae.decode(latents)
    assert frames.shape == (5, 32, 48, 3) and frames.is_contiguous()
    assert frames.min() == 0 and frames.max() == 255


def test_encode_is_repeatable_and_takes_one_frame() -> None:
    vae = VideoVAE(tiny_model())
    frames = random_frames(1, 16, 16)
    assert torch.equal(vae.encode(frames), vae.encode(frames))
    assert vae.decode(vae.encode(frames)).shape == (1, 16, 16, 3)


def test_a_check_is_called_before_every_chunk_and_ends_the_work() -> None:
    vae, frames = VideoVAE(tiny_model()), random_frames(9, 32, 48)
    expected, calls = vae.encode(frames), []

    def check() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise CancelledError("enough")

    latents = vae.encode(frames)
    for work in (lambda: vae.encode(frames, check=check), lambda: vae.decode(latents, check=check)):
        calls.clear()
        with pytest.raises(CancelledError):
            work()
        # nothing of the chunks before is left, and nobody asks any longer
        assert torch.equal(vae.encode(frames), expected) and len(calls) == 2
    calls[:] = [1, 1]
    vae.encode(frames, check=check)
    vae.decode(latents, check=check)
    assert len(calls) == 2 + 3 + 3
    # every tile is walked by itself
    vae.tile_above, calls[:] = 0, [1, 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mv2v_engine.vae._TILE", 32)
        patch.setattr("mv2v_engine.vae._TILE_STRIDE", 24)
        vae.decode(latents, check=check)
    assert len(calls) == 2 + 3 * 2 * 2


def test_two_threads_take_turns() -> None:
    vae = VideoVAE(tiny_model())
    clips = [random_frames(9, 32, 48), 255 - random_frames(9, 32, 48)]
    expected = [vae.encode(clip) for clip in clips]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for found, one in zip(pool.map(vae.encode, clips), expected, strict=True):
                assert torch.equal(found, one)


def test_first_latent_frame_is_causal() -> None:
    vae = VideoVAE(tiny_model())
    frames = random_frames(9, 16, 16)
    changed = frames.clone()
    changed[5:] = 255 - changed[5:]
    first, second = vae.encode(frames), vae.encode(changed)
    assert torch.equal(first[:, :2], second[:, :2])
    assert not torch.equal(first[:, 2], second[:, 2])


@pytest.mark.parametrize("shape", ["z16-stride8-plain", "z16-stride8-residual"])
def test_tiles_agree_with_the_whole(shape: str) -> None:
    model = tiny_model(shape)
    frames = random_frames(5, 64, 768)
    whole, tiled = VideoVAE(model), VideoVAE(model, tile_above=64 * 64)
    latents, by_tiles = whole.encode(frames), tiled.encode(frames)
    assert latents.shape == by_tiles.shape == (16, 2, 8, 96)
    assert 0 < (latents - by_tiles).abs().mean() < 0.02 * latents.std()
    decoded, decoded_by_tiles = whole.decode(latents).float(), tiled.decode(latents).float()
    assert decoded.shape == decoded_by_tiles.shape == frames.shape
    assert (decoded - decoded_by_tiles).abs().mean() < 0.02 * decoded.std()
    # a small frame after a large one is not tiled
    assert torch.equal(tiled.encode(frames[:, :, :64]), whole.encode(frames[:, :, :64]))


def test_tiles_of_wan22_lie_where_they_belong() -> None:
    """Beside the blended columns 384 to 512, a tile is what its own strip of the video gives."""
    model = tiny_model("z48-stride16-residual")
    frames = random_frames(5, 32, 768)
    whole, tiled = VideoVAE(model), VideoVAE(model, tile_above=32 * 512)
    latents = tiled.encode(frames)
    assert latents.shape == tiled.latent_shape(5, (32, 768))
    left, right = whole.encode(frames[:, :, :512]), whole.encode(frames[:, :, 384:])
    torch.testing.assert_close(latents[..., :24], left[..., :24])
    torch.testing.assert_close(latents[..., 32:], right[..., 8:])
    decoded = tiled.decode(latents)
    left, right = whole.decode(latents[..., :32]), whole.decode(latents[..., 24:])
    assert (decoded[:, :, :384].int() - left[:, :, :384].int()).abs().max() <= 1
    assert (decoded[:, :, 512:].int() - right[:, :, 128:].int()).abs().max() <= 1


@pytest.mark.parametrize("tile_above", [1 << 20, 16 * 16], ids=["whole", "tiles"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_stream_is_decoded_without_seams(
    shape: str, tile_above: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of any length, stored and taken up between any two of them."""
    monkeypatch.setattr("mv2v_engine.vae._TILE", 64)
    monkeypatch.setattr("mv2v_engine.vae._TILE_STRIDE", 48)
    vae = VideoVAE(tiny_model(shape), tile_above=tile_above)
    stride = vae.spatial_stride
    size = (6, 10) if stride == 8 else (4, 6)
    latents = torch.randn(vae.latent_channels, 6, *size, generator=torch.Generator().manual_seed(2))
    whole, decoder, frames = vae.decode(latents), StreamDecoder(vae), list[Tensor]()
    for part in latents.split([1, 2, 1, 2], dim=1):
        stored = {name: tensor.clone() for name, tensor in decoder.tensors().items()}
        assert decoder.num_bytes == sum(tensor.nbytes for tensor in stored.values())
        decoder = StreamDecoder(vae)
        decoder.load(stored)
        frames.append(decoder.decode(part))
    assert [len(each) for each in frames] == [1, 8, 4, 8]
    # the 1x1x1 convolution of a tile's edge may sum in another order for fewer frames
    assert int((torch.cat(frames).int() - whole.int()).abs().max()) <= (tile_above == 256)
    tiles = {name.partition(".")[0] for name in decoder.tensors()}
    assert len(tiles) == (1 if tile_above > 256 else 2 if stride == 8 else 4)
    with pytest.raises(ValueError, match="no layer 'conv_on'"):
        decoder.load({"0.conv_on": latents})


@pytest.mark.parametrize("tile_above", [1 << 20, 16 * 16], ids=["whole", "tiles"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_stream_is_encoded_without_seams(
    shape: str, tile_above: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of any length, stored and taken up between any two of them."""
    monkeypatch.setattr("mv2v_engine.vae._TILE", 64)
    monkeypatch.setattr("mv2v_engine.vae._TILE_STRIDE", 48)
    vae = VideoVAE(tiny_model(shape), tile_above=tile_above)
    frames = random_frames(21, 64, 80 if vae.spatial_stride == 8 else 96)
    whole, encoder, latents = vae.encode(frames), StreamEncoder(vae), list[Tensor]()
    for part in frames.split([1, 8, 4, 8]):
        stored = {name: tensor.clone() for name, tensor in encoder.tensors().items()}
        assert encoder.num_bytes == sum(tensor.nbytes for tensor in stored.values())
        encoder = StreamEncoder(vae)
        encoder.load(stored)
        latents.append(encoder.encode(part))
    assert [each.shape[1] for each in latents] == [1, 2, 1, 2]
    # a 1x1x1 convolution may sum in another order for fewer frames
    torch.testing.assert_close(torch.cat(latents, 1), whole, rtol=0, atol=1e-5)
    # and each piece begins where the last one ended: alone it has another past
    assert float((vae.encode(frames[8:13])[:, 1:] - whole[:, 3:4]).abs().max()) > 1e-3
    with pytest.raises(VideoError, match=r"4n\+1"):
        encoder.encode(frames[:3])
    with pytest.raises(ValueError, match="encoder has no layer 'conv_on'"):
        encoder.load({"0.conv_on": frames})


@pytest.mark.parametrize(
    ("num_frames", "size", "message"),
    [
        (16, (32, 48), r"got 16 frames; the VAE takes 4n\+1: use 13 or 17"),
        (0, (32, 48), r"got 0 frames.*use 1 or 5"),
        (5, (32, 50), r"frames of 50x32; width and height must be multiples of 8"),
        (5, (0, 48), r"multiples of 8"),
    ],
)
def test_sizes_that_do_not_fit(num_frames: int, size: tuple[int, int], message: str) -> None:
    vae = VideoVAE(tiny_model())
    with pytest.raises(VideoError, match=message):
        vae.latent_shape(num_frames, size)
    with pytest.raises(VideoError, match=message):
        vae.encode(torch.zeros(num_frames, *size, 3, dtype=torch.uint8))


def test_strides_come_from_the_config() -> None:
    vae = VideoVAE(tiny_model("z48-stride16-residual"))
    assert (vae.temporal_stride, vae.spatial_stride, vae.latent_channels) == (4, 16, 48)
    assert vae.latent_shape(121, (704, 1280)) == (48, 31, 44, 80)
    with pytest.raises(VideoError, match="multiples of 16"):
        vae.latent_shape(5, (24, 32))


def test_other_tensors_are_refused() -> None:
    vae = VideoVAE(tiny_model())
    with pytest.raises(VideoError, match=r"must be uint8 \[T, height, width, 3\]"):
        vae.encode(torch.zeros(5, 16, 16, 3))
    with pytest.raises(VideoError, match=r"must have shape \[16, F, H, W\], got \[48, 2, 2, 2\]"):
        vae.decode(torch.zeros(48, 2, 2, 2))


def test_statistics_must_match_the_channels() -> None:
    with pytest.raises(CheckpointError, match=r"8 latent channels but 16 means"):
        VideoVAE(Autoencoder({**SHAPES["z16-stride8-plain"], "z_dim": 8}))


def test_key_names_the_latent_space(tmp_path: Path) -> None:
    model = save(tmp_path)
    key = VideoVAE(model).key
    assert load(tmp_path).key == load(tmp_path, torch.bfloat16).key == key
    assert VideoVAE(tiny_model(seed=1)).key != key
    assert VideoVAE(tiny_model(latents_mean=[0.5] * 16)).key != key


@pytest.mark.parametrize("inside", ["", "vae"])
def test_diffusers_folder(tmp_path: Path, inside: str) -> None:
    model = save(tmp_path / inside)
    assert_is(load(tmp_path), model)


def test_bf16_latents_are_fp32_and_close(tmp_path: Path) -> None:
    save(tmp_path)
    frames = random_frames(5, 16, 24)
    exact, rounded = load(tmp_path).encode(frames), load(tmp_path, torch.bfloat16).encode(frames)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.std()


def original_name(name: str) -> str:
    """A diffusers parameter name in the original Wan2.1 spelling (BASE_MODELS 3.4, reversed)."""
    name = re.sub(r"^quant_conv", "conv1", name)
    name = re.sub(r"^post_quant_conv", "conv2", name)
    name = name.replace(".conv_in.", ".conv1.").replace(".conv_out.", ".head.2.")
    name = name.replace(".norm_out.", ".head.0.")
    name = name.replace(".mid_block.attentions.0.", ".middle.1.")
    name = name.replace(".mid_block.resnets.0.", ".middle.0.")
    name = name.replace(".mid_block.resnets.1.", ".middle.2.")
    name = name.replace("encoder.down_blocks.", "encoder.downsamples.")
    up = re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)\.(.*)", name)
    if up:
        place = int(up[1]) * 4 + (int(up[3]) if up[2] == "resnets" else 3)
        name = f"decoder.upsamples.{place}.{up[4]}"
    if ".middle." in name or "samples." in name:
        for ours, theirs in (("norm1", 0), ("conv1", 2), ("norm2", 3), ("conv2", 6)):
            name = re.sub(rf"\.{ours}\.(\w+)$", rf".residual.{theirs}.\1", name)
    return name.replace(".conv_shortcut.", ".shortcut.")


def narrow_wan21() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder({"base_dim": 8}).eval()


@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors"])
def test_original_file(tmp_path: Path, name: str) -> None:
    model = narrow_wan21()
    weights = {original_name(key): value for key, value in model.state_dict().items()}
    # names as the original file has them
    assert {"conv1.weight", "encoder.conv1.weight", "decoder.head.2.bias"} <= weights.keys()
    assert {
        "decoder.upsamples.3.resample.1.weight",
        "decoder.upsamples.14.residual.6.bias",
        "encoder.downsamples.0.residual.0.gamma",
    } <= weights.keys()
    if name.endswith(".pth"):
        torch.save(weights, tmp_path / name)
    else:
        save_file(weights, tmp_path / name)
    assert_is(load(tmp_path / name), model)


def expect_refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_unusable_folders(tmp_path: Path) -> None:
    expect_refused(tmp_path / "none", "does not exist")
    expect_refused(tmp_path, "holds no readable config.json")
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights_path = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = weights_path.read_bytes()

    weights_path.write_bytes(whole[: len(whole) // 2])
    expect_refused(tmp_path, "is truncated or damaged")
    weights_path.unlink()
    expect_refused(tmp_path, r"lacks diffusion_pytorch_model.safetensors")
    weights_path.write_bytes(whole)
    weights = load_file(weights_path)
    bias = weights.pop("decoder.conv_in.bias")
    save_file(weights, weights_path)
    expect_refused(tmp_path, r"1 tensors missing, 0 unknown, first missing decoder.conv_in.bias")
    save_file({**weights, "decoder.conv_in.bias": bias, "extra": bias.clone()}, weights_path)
    expect_refused(tmp_path, r"0 tensors missing, 1 unknown, first unknown extra")
    save_file({**weights, "decoder.conv_in.bias": torch.zeros(3)}, weights_path)
    expect_refused(tmp_path, r"decoder.conv_in.bias has shape \[3\], its config expects \[16\]")
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
    expect_refused(tmp_path, "is a AutoencoderKL, expected AutoencoderKLWan")
    (tmp_path / "config.json").write_text("{")
    expect_refused(tmp_path, "holds no readable config.json")


def original_22_name(name: str) -> str:
    """A diffusers parameter name in Wan2.2's spelling: stages that hold their layers."""
    stage = re.match(r"(encoder|decoder)\.(down|up)_blocks\.(\d)\.(resnets\.\d|\w+)\.(.*)", name)
    if not stage:
        return original_name(name)
    side, way, number, layer, rest = stage.groups()
    index = layer.removeprefix("resnets.") if layer.startswith("resnets") else 9
    rest = rest.replace("conv_shortcut.", "shortcut.")
    for ours, theirs in (("norm1", 0), ("conv1", 2), ("norm2", 3), ("conv2", 6)):
        rest = re.sub(rf"^{ours}\.(\w+)$", rf"residual.{theirs}.\1", rest)
    return f"{side}.{way}samples.{number}.{way}samples.{index}.{rest}"


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model.model."])
def test_wan22s_own_file(tmp_path: Path, prefix: str) -> None:
    from mv2v_engine.vae import _WAN22

    torch.manual_seed(0)
    model = Autoencoder({**_WAN22, "base_dim": 8, "decoder_base_dim": 16, "z_dim": 48}).eval()
    weights = {prefix + original_22_name(k): v for k, v in model.state_dict().items()}
    assert {
        f"{prefix}encoder.downsamples.1.downsamples.9.time_conv.weight",
        f"{prefix}decoder.upsamples.0.upsamples.2.residual.6.bias",
        f"{prefix}decoder.upsamples.0.upsamples.9.resample.1.weight",
    } <= weights.keys()
    # a whole model in the file does not disturb
    other = {"model.diffusion_model.blocks.0.self_attn.q.weight": torch.ones(2)} if prefix else {}
    save_file(weights | other, tmp_path / "wan2.2_vae.safetensors")
    loaded = load(tmp_path / "wan2.2_vae.safetensors")
    assert loaded.spatial_stride == 16 and loaded.latent_channels == 48
    assert_is(loaded, model)


def test_a_lone_file_of_diffusers_names(tmp_path: Path) -> None:
    model = narrow_wan21()
    save_file(model.state_dict(), tmp_path / "vae.safetensors")
    assert_is(load(tmp_path / "vae.safetensors"), model)


def test_unusable_files(tmp_path: Path) -> None:
    path = tmp_path / "Wan2.1_VAE.pth"
    path.write_bytes(b"")
    expect_refused(path, "is empty")
    path.write_bytes(b"nothing of the kind" * 50)
    expect_refused(path, "is text that begins .*; expected weights")
    torch.save({"conv": torch.zeros(2)}, path)
    expect_refused(path, r"is no whole Wan VAE \(it lacks encoder\.conv_in\.weight\); give Wan")
    torch.save({"epoch": 3}, path)
    expect_refused(path, "without tensors")
    torch.save(narrow_wan21(), path)
    expect_refused(path, "Python objects besides tensors")
    weights = {original_name(key): value for key, value in narrow_wan21().state_dict().items()}
    torch.save({**weights, "conv2.weight": torch.zeros(48, 48, 1, 1, 1)}, path)
    expect_refused(path, r"has 48 latent channels.*expected 16 \(Wan2\.1\) or 48 \(Wan2\.2\)")
    del weights["decoder.upsamples.5.residual.2.bias"]
    torch.save(weights, path)
    expect_refused(path, r"1 tensors missing.*decoder.up_blocks.1.resnets.1.conv1.bias")
