"""Lucy-Edit: a `LucyEditPipeline` folder or one file, the source on the target's channels."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mv2v_engine.checkpoints import (
    inspect_checkpoint,
    load_checkpoint,
    render_inspection,
    save_checkpoint,
)
from mv2v_engine.config import LUCY_5B, SamplingConfig, TransformerConfig
from mv2v_engine.errors import CheckpointError, RequestError
from tests.checkpoints.small_hub import SmallHub

State = dict[str, Tensor]


def with_source_on_channels(state: State, times: int = 2) -> State:
    """A Wan of 4 channels whose patch embedding takes more."""
    weight = state["patch_embedding.weight"]
    more = torch.randn(len(weight), 4 * (times - 1), 1, 2, 2)
    return state | {"patch_embedding.weight": torch.cat([weight, more], 1)}


def test_pipeline_folder(lucy_folder: Path) -> None:
    for path in (lucy_folder, lucy_folder / "transformer", lucy_folder / "model_index.json"):
        loaded = load_checkpoint(path)
        assert loaded.format == "lucy_edit"
        shape = loaded.config
        assert (shape.in_channels, shape.out_channels, shape.source_channels) == (96, 48, 48)
        assert (shape.latent_channels, shape.text_len, shape.has_camera) == (48, 512, False)
        # the shift and the kind are the scheduler folder's, the rest Lucy-Edit's own
        assert loaded.sampling == SamplingConfig(
            num_frames=81,
            size=(480, 832),
            num_inference_steps=50,
            guidance_scale=5.0,
            flow_shift=4.0,
            fps=24.0,
            scheduler="unipc",
        )
        assert loaded.vae_path == lucy_folder / "vae"
        assert loaded.text_path == lucy_folder / "text_encoder"
        assert loaded.tokenizer_path == lucy_folder / "tokenizer"


def test_another_scheduler_folder(lucy_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(lucy_folder, tmp_path / "lucy")
    config = tmp_path / "lucy" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 6}))
    sampling = load_checkpoint(tmp_path / "lucy").sampling
    assert (sampling.scheduler, sampling.flow_shift) == ("euler", 6.0)


def test_inspection_tells_what_it_is(lucy_folder: Path) -> None:
    found = inspect_checkpoint(lucy_folder)
    assert found.problem is None and found.format == "lucy_edit"
    text = render_inspection(found)
    assert "lucy_edit: diffusers Wan names, the source on 48 of the target's 96 channels" in text
    assert "source_channels 48" in text and "tokenizers.4.weight: from patch_embedding" in text


def test_memory_tokenizers_start_as_the_targets_own_half(lucy_folder: Path) -> None:
    """A constant latent embeds at every rate as a target without a source would."""
    model = load_checkpoint(lucy_folder).transformer
    latents = torch.linspace(-1, 1, 48)[None, :, None, None, None].expand(1, 48, 1, 8, 8)
    target = torch.cat([latents, torch.zeros_like(latents)], 1)
    expected = model.patch_embedding(target)[0, :, 0, 0, 0]
    for k in (2, 4, 8):
        assert model.get_parameter(f"tokenizers.{k}.weight").shape[1:] == (48, 1, k, k)
        token = model.tokenizers[str(k)](latents)[0, 0]
        torch.testing.assert_close(token, expected, rtol=1e-4, atol=1e-4)


def test_one_file_of_original_names(tmp_path: Path, wan: State) -> None:
    """A file for ComfyUI: nothing but shapes tells it."""
    path = tmp_path / "lucy.safetensors"
    save_file(with_source_on_channels(wan), str(path))
    loaded = load_checkpoint(path)
    assert loaded.format == "lucy_edit" and loaded.config.source_channels == 4
    assert (loaded.sampling.size, loaded.sampling.scheduler) == ((480, 832), "euler")
    save_checkpoint(
        tmp_path / "own", loaded.transformer, loaded.config, loaded.sampling, "x", torch.float32
    )
    again = load_checkpoint(tmp_path / "own")
    assert (again.config, again.sampling) == (loaded.config, loaded.sampling)
    assert again.transformer.tokenizers["4"].in_channels == 4


def test_other_channels_are_refused(tmp_path: Path, wan: State) -> None:
    path = tmp_path / "lucy.safetensors"
    save_file(with_source_on_channels(wan, times=3), str(path))
    with pytest.raises(CheckpointError, match=r"takes 12 latent channels and gives 4"):
        load_checkpoint(path)
    fields = dataclasses.asdict(LUCY_5B) | {"merger": LUCY_5B.merger}
    with pytest.raises(RequestError, match="96 in, 48 out and source_channels 32"):
        TransformerConfig(**fields | {"source_channels": 32})


@pytest.mark.parametrize("part", ["", ":transformer", ":model_index.json"])
def test_a_part_of_a_repository_is_told_by_what_lies_beside_it(
    hub: SmallHub, lucy_folder: Path, part: str
) -> None:
    shutil.copytree(lucy_folder, hub.root / "decart/lucy")
    loaded = load_checkpoint(f"decart/lucy{part}")
    assert (loaded.format, loaded.sampling.flow_shift) == ("lucy_edit", 4.0)
    assert loaded.vae_path is not None and loaded.vae_path.name == "vae"
