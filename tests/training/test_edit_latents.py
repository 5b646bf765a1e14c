"""Editing pairs as latents: window by window, the mask on the latent grid, damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mv2v_engine.errors import TrainingError
from mv2v_engine.files import save_tensors
from mv2v_engine.text import load_text_encoder
from mv2v_engine.training import edit_latents
from mv2v_engine.training.edit_latents import EditLatents, latent_mask
from mv2v_engine.training.text import TEXT_LEN, write_text_encoder
from mv2v_engine.vae import load_vae

VAE = Path(edit_latents.__file__).parents[1] / "assets" / "tiny-nvs" / "vae"
FRAMES, SIZE = 34, (16, 24)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("edits")
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, FRAMES, *SIZE, 3), generator=generator, dtype=torch.uint8)
    mask = torch.zeros(FRAMES, *SIZE, dtype=torch.bool)
    mask[20, :8, :8] = True
    save_tensors(
        root / "edits" / "edit_0000003.safetensors",
        {"source": frames[0], "edited": frames[1], "mask": mask},
        {"prompt": "remove the ball", "kind": "remove"},
    )
    write_text_encoder(root / "text")
    return root


def _run(monkeypatch: pytest.MonkeyPatch, root: Path, *more: str) -> None:
    given = {"edits": root / "edits", "vae": VAE, "text": root / "text", "out": root / "latents"}
    arguments = [str(part) for name, path in given.items() for part in (f"--{name}", path)]
    monkeypatch.setattr("sys.argv", ["edit_latents", *arguments, *more])
    edit_latents.main()


def test_pairs_are_encoded_window_by_window(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(monkeypatch, folders)
    latents = EditLatents(folders / "latents")
    assert len(latents) == 1 and latents.latent_shape == (16, 5, 2, 3)
    (pair,) = latents.pairs
    vae = load_vae(VAE, device=torch.device("cpu"), dtype=torch.float32)
    rendered = edit_latents.RenderedEdits(folders / "edits").load("edit_0000003")
    for video, encoded in ((rendered.source, pair.source), (rendered.edited, pair.edited)):
        assert torch.equal(encoded[1], vae.encode(video[17:34]).half())
    # frame 20 is the fourth of the second window, hence of its second latent frame
    assert float(pair.mask[1, 1, 0, 0]) == 1 and float(pair.mask.sum()) == 1
    text = load_text_encoder(
        folders / "text" / "text_encoder",
        folders / "text" / "tokenizer",
        max_length=TEXT_LEN,
        device=torch.device("cpu"),
        dtype=torch.float32,
    ).encode("remove the ball")[0]
    assert torch.equal(pair.text, text[: len(pair.text)].bfloat16())
    assert bool(pair.text[-1].any()) and not bool(text[len(pair.text) :].any())
    path = folders / "latents" / "edit_0000003.safetensors"
    written = path.stat().st_mtime_ns
    _run(monkeypatch, folders, "--shard", "0/2")
    assert path.stat().st_mtime_ns == written


def test_the_mask_is_a_share_of_the_cell() -> None:
    vae = load_vae(VAE, device=torch.device("cpu"), dtype=torch.float32)
    mask = torch.zeros(5, 16, 24, dtype=torch.bool)
    mask[0, :8, :4] = True
    mask[3, 8:, 16:] = True
    mask[4, 8:, 20:] = True  # in the same latent frame as 3: the larger one counts
    expected = torch.zeros(2, 2, 3)
    expected[0, 0, 0], expected[1, 1, 2] = 0.5, 1.0
    torch.testing.assert_close(latent_mask(mask, vae), expected)


def test_beginnings_of_windows_train_beside_short_clips(tmp_path: Path) -> None:
    encoded = {}
    for name, windows, frames in (("long", 3, 4), ("short", 1, 2)):
        shape = (windows, 4, frames, 6, 10)
        encoded[name] = {n: torch.randn(shape).half() for n in ("source", "edited")}
        encoded[name] |= {"mask": torch.rand(windows, frames, 6, 10).half()}
        encoded[name] |= {"text": torch.zeros(1, 8)}
        save_tensors(tmp_path / name / "edit_0000001.safetensors", encoded[name])
    both = EditLatents(tmp_path / "long", tmp_path / "short", frames=2)
    assert both.latent_shape == (4, 2, 6, 10)
    for pair, whole in zip(both.pairs, encoded.values(), strict=True):
        for name in ("source", "edited"):
            assert torch.equal(getattr(pair, name), whole[name][:, :, :2])
        assert torch.equal(pair.remembered, whole["edited"][:, :, -2:])
        assert torch.equal(pair.mask, whole["mask"][:, :2])
    with pytest.raises(TrainingError, match="has 2 latent frames a window, 3 were asked for"):
        EditLatents(tmp_path / "long", tmp_path / "short", frames=3)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no edit_"):
        EditLatents(tmp_path)
    path = tmp_path / "edit_0000001.safetensors"
    path.write_bytes(b"none")
    with pytest.raises(TrainingError, match="is no encoded editing pair"):
        EditLatents(tmp_path)
    tensors = {name: torch.zeros(2, 4, 3, 6, 10) for name in ("source", "edited")}
    tensors["text"] = torch.zeros(1, 8)
    save_tensors(path, {**tensors, "mask": torch.zeros(2, 3, 6, 9)})
    with pytest.raises(TrainingError, match=r"do not belong together.*\[2, 3, 6, 9\]"):
        EditLatents(tmp_path)
    save_tensors(path, {**tensors, "mask": torch.zeros(2, 3, 6, 10)})
    other = {name: torch.zeros(2, 8, 3, 6, 10) for name in ("source", "edited")}
    other |= {"text": torch.zeros(1, 8), "mask": torch.zeros(2, 3, 6, 10)}
    save_tensors(tmp_path / "edit_0000002.safetensors", other)
    with pytest.raises(TrainingError, match="clips of different shapes cannot be mixed"):
        EditLatents(tmp_path)
