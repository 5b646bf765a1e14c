"""Loading: the same state dict gives the same parameters bit for bit, in every format."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine.checkpoints import load_checkpoint, save_checkpoint
from mv2v_engine.config import (
    LUCY_5B,
    WAN_1_3B,
    WAN_5B,
    MergerConfig,
    SamplingConfig,
    TransformerConfig,
)
from mv2v_engine.errors import CheckpointError, StorageError
from mv2v_engine.models.dit import MV2VTransformer
from tests.checkpoints.conftest import State, diffusers_wan, write
from tests.folders import edited_json

Rename = Callable[[str], str]


def save(
    folder: Path, config: TransformerConfig, sampling: SamplingConfig | None = None, **more: Any
) -> MV2VTransformer:
    """Random weights in a folder of our own form."""
    torch.manual_seed(0)
    model = MV2VTransformer(config)
    sampling = sampling or SamplingConfig()
    save_checkpoint(folder, model, config, sampling, "my name", torch.float32, **more)
    return model


def assert_holds(model: MV2VTransformer, expected: State) -> None:
    """Every expected tensor is in the model, bit for bit, and only tokenizers are besides."""
    parameters = dict(model.named_parameters())
    for name, value in expected.items():
        assert torch.equal(parameters.pop(name), value), name
    assert all(name.startswith("tokenizers.") for name in parameters), list(parameters)
    assert not any(p.is_meta for p in model.parameters()) and not model.training


@pytest.mark.parametrize("name", ["wan.safetensors", "wan.pth"])
def test_original_files(
    tmp_path: Path, wan: State, renamed: Rename, small: TransformerConfig, name: str
) -> None:
    loaded = load_checkpoint(write(tmp_path / name, wan))
    assert_holds(loaded.transformer, {renamed(key): value for key, value in wan.items()})
    assert loaded.format == "wan_original" and loaded.name == "wan"
    assert loaded.config == dataclasses.replace(small, tokenizers=(2, 4, 8))
    assert loaded.vae_path is loaded.text_path is loaded.tokenizer_path is None
    assert loaded.sampling.timesteps == "exact"


def test_recammaster(tmp_path: Path, recammaster: State, renamed: Rename) -> None:
    loaded = load_checkpoint(write(tmp_path / "step20000.ckpt", recammaster))
    assert loaded.config.camera_conditioning == "target" and loaded.format == "recammaster"
    assert loaded.sampling.sizes == ()
    assert_holds(loaded.transformer, {renamed(key): value for key, value in recammaster.items()})
    assert loaded.sampling.timesteps == "bfloat16"


@pytest.mark.parametrize("name", ["memoryv2v.ckpt", "memoryv2v.safetensors"])
def test_memory(tmp_path: Path, memory: State, renamed: Rename, name: str) -> None:
    loaded = load_checkpoint(write(tmp_path / name, memory))
    expected = {renamed(k): v for k, v in memory.items() if not k.startswith(("cond", "down"))}
    for i, k in enumerate((2, 4, 8)):
        for part in ("weight", "bias"):
            expected[f"tokenizers.{k}.{part}"] = memory[f"cond_embedders.{i}.proj.{part}"]
    expected |= {f"mergers.1.{part}": memory[f"downsampler.{part}"] for part in ("weight", "bias")}
    assert_holds(loaded.transformer, expected)
    assert loaded.config.camera_conditioning == "own" and not loaded.report.initialised
    assert loaded.config.merger == MergerConfig(shared=True)
    assert any(
        "cond_embedders.1.proj.weight [128, 4, 1, 4, 4] -> tokenizers.4" in line
        for line in loaded.report.lines()
    )


def with_mergers(state: State, *weights: Tensor) -> State:
    kept = {k: v for k, v in state.items() if not k.startswith("downsampler")}
    return kept | {f"atm.{i}.weight": w for i, w in enumerate(weights)}


def test_merger_of_concatenated_cells_is_the_same_function(tmp_path: Path, memory: State) -> None:
    linear = torch.randn(128, 512, generator=torch.Generator().manual_seed(1))
    loaded = load_checkpoint(write(tmp_path / "m.ckpt", with_mergers(memory, linear)))
    weight = loaded.transformer.get_parameter("mergers.1.weight")
    cells = torch.randn(2, 2, 128, generator=torch.Generator().manual_seed(2))
    expected = linear @ torch.cat([cells[0, 0], cells[0, 1], cells[1, 0], cells[1, 1]])
    convolved = torch.nn.functional.conv2d(cells.permute(2, 0, 1)[None], weight, stride=2)
    torch.testing.assert_close(convolved.flatten(), expected, rtol=1e-4, atol=1e-4)
    assert any("row-major" in line for line in loaded.report.mapping)


def test_two_linear_layers_per_block(tmp_path: Path, memory: State) -> None:
    first, second = torch.ones(128, 128), torch.eye(128)
    loaded = load_checkpoint(write(tmp_path / "m.ckpt", with_mergers(memory, first, second)))
    assert loaded.config.merger == MergerConfig(pooled=True, bias=False)
    assert torch.equal(loaded.transformer.get_parameter("mergers.1.weight"), first)
    assert torch.equal(loaded.transformer.get_parameter("mergers.2.weight"), second)


def test_undecided_modules_need_a_rename_file(tmp_path: Path, memory: State) -> None:
    state = memory | {"norm.weight": torch.ones(128), "up.proj.weight": torch.ones(128, 128)}
    path = write(tmp_path / "m.ckpt", state)
    with pytest.raises(CheckpointError, match=r"norm\.weight \[128\].*rename=FILE"):
        load_checkpoint(path)
    rename = tmp_path / "rename.json"
    rename.write_text(
        json.dumps({"norm": None, "downsampler": "mergers.1", "up.proj": "mergers.2"})
    )
    with pytest.raises(CheckpointError, match="mergers differ"):
        load_checkpoint(path, rename=rename)
    rename.write_text(json.dumps({"norm": None, "up.proj": None}))
    loaded = load_checkpoint(path, rename=rename)
    assert torch.equal(
        loaded.transformer.get_parameter("mergers.1.weight"), memory["downsampler.weight"]
    )


def test_rename_decides_between_equal_tokenizers(tmp_path: Path, memory: State) -> None:
    state = memory | {"spare.weight": torch.ones(128, 4, 1, 4, 4)}
    path = write(tmp_path / "m.ckpt", state)
    with pytest.raises(CheckpointError, match=r"tokenizers\.4: cond_.* or spare\.weight"):
        load_checkpoint(path)
    rename = tmp_path / "rename.json"
    rename.write_text(json.dumps({"spare": "tokenizers.4", "cond_embedders.1": None}))
    loaded = load_checkpoint(path, rename=rename)
    assert torch.equal(
        loaded.transformer.get_parameter("tokenizers.4.weight"), state["spare.weight"]
    )
    assert loaded.report.initialised == {
        "tokenizers.4.bias": "zero, the checkpoint has a weight without bias"
    }
    assert not loaded.transformer.get_parameter("tokenizers.4.bias").any()


def test_base_tokenizers_embed_a_constant_alike(tmp_path: Path, wan: State) -> None:
    loaded = load_checkpoint(write(tmp_path / "wan.safetensors", wan))
    # the base alone was made for both orientations
    assert (loaded.sampling.size, loaded.sampling.sizes) == ((480, 832), ((832, 480),))
    latents = torch.arange(4.0)[None, :, None, None, None].expand(1, 4, 1, 8, 8)
    base = loaded.transformer.patch_embedding(latents)[0, :, 0, 0, 0]
    for k in (2, 4, 8):
        weight = loaded.transformer.get_parameter(f"tokenizers.{k}.weight")
        assert weight.shape[-2:] == (k, k)
        token = loaded.transformer.tokenizers[str(k)](latents)[0, 0]
        torch.testing.assert_close(token, base, rtol=1e-4, atol=1e-4)
    assert set(loaded.report.initialised) == {
        f"tokenizers.{k}.{part}" for k in (2, 4, 8) for part in ("weight", "bias")
    }


def test_diffusers_pipeline_folder(tmp_path: Path, wan: State) -> None:
    # head size 16: only the config file can tell
    model = diffusers_wan(num_attention_heads=2, attention_head_dim=16)
    model.save_pretrained(tmp_path / "transformer")
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for folder, config in (("vae", "config.json"), ("scheduler", "scheduler_config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / config).write_text(json.dumps({"flow_shift": 3.0}))
    for path in (tmp_path, tmp_path / "transformer", tmp_path / "model_index.json"):
        loaded = load_checkpoint(path)
        assert_holds(loaded.transformer, model.state_dict())
        assert loaded.format == "wan_diffusers" and loaded.config.num_attention_heads == 2
        assert loaded.vae_path == tmp_path / "vae" and loaded.text_path is None
        assert loaded.sampling.flow_shift == 3.0


def test_sharded_diffusers_folder(tmp_path: Path) -> None:
    model = diffusers_wan()
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert_holds(load_checkpoint(tmp_path).transformer, model.state_dict())
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        load_checkpoint(tmp_path)


OWN_CONFIGS = {
    "defaults": MergerConfig(),
    "shared, pooled": MergerConfig(pooled=True, shared=True, bias=False),
    "depth-wise": MergerConfig(kernel=(1, 2), groups=128),
    "average": None,
}


@pytest.mark.parametrize("merger", OWN_CONFIGS.values(), ids=OWN_CONFIGS)
def test_own_folder(tmp_path: Path, small: TransformerConfig, merger: MergerConfig | None) -> None:
    config = dataclasses.replace(
        small, camera_conditioning="own", tokenizers=(2, 4), merger=merger, merge_blocks=(0, 2)
    )
    sampling = SamplingConfig(
        num_frames=17, size=(96, 160), sizes=((160, 96), (96, 96)), negative_prompt="模糊"
    )
    model = save(tmp_path / "mine", config, sampling)
    for path in (tmp_path / "mine", tmp_path / "mine" / "mv2v.json"):
        loaded = load_checkpoint(path)
        assert (loaded.name, loaded.config, loaded.sampling) == ("my name", config, sampling)
        assert loaded.format == "mv2v_engine" and not loaded.report.initialised
        assert loaded.conditioning == ("joint",)
        assert_holds(loaded.transformer, model.state_dict())
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == [
        "mv2v.json",
        "transformer.safetensors",
    ]


def test_camera_attention_is_read_and_never_guessed(
    tmp_path: Path, small: TransformerConfig
) -> None:
    """It has no weights: the file alone tells, and one of before it existed has none."""
    config = dataclasses.replace(small, camera_attention="prope_dual", scene_scale=2.5)
    save(tmp_path, config)
    assert load_checkpoint(tmp_path).config == config
    with edited_json(tmp_path / "mv2v.json") as said:
        said["transformer"]["camera_attention"] = "rays"
    with pytest.raises(CheckpointError, match=r"camera_attention must be one of .* got 'rays'"):
        load_checkpoint(tmp_path)
    with edited_json(tmp_path / "mv2v.json") as said:
        del said["transformer"]["camera_attention"], said["transformer"]["scene_scale"]
    assert load_checkpoint(tmp_path).config == small


def test_a_checkpoint_says_what_it_was_trained_for(
    tmp_path: Path, small: TransformerConfig, wan: State
) -> None:
    save(tmp_path, small, conditioning=("joint", "static"))
    assert load_checkpoint(tmp_path).conditioning == ("joint", "static")
    # from before it was written there: nothing is claimed
    with edited_json(tmp_path / "mv2v.json") as said:
        del said["conditioning"]
    assert load_checkpoint(tmp_path).conditioning == ("joint",)
    assert load_checkpoint(write(tmp_path / "wan.safetensors", wan)).conditioning == ("joint",)


def test_half_precision_keeps_what_the_model_asks_for(tmp_path: Path, wan: State) -> None:
    path = write(tmp_path / "wan.safetensors", wan)
    loaded = load_checkpoint(path, dtype=torch.bfloat16)
    kept = set(MV2VTransformer.keep_in_fp32_modules)
    for name, parameter in loaded.transformer.named_parameters():
        wanted = torch.float32 if set(name.split(".")) & kept else torch.bfloat16
        assert parameter.dtype == wanted, name
    save_checkpoint(
        tmp_path / "own", loaded.transformer, loaded.config, loaded.sampling, "x", torch.bfloat16
    )
    again = load_checkpoint(tmp_path / "own")
    assert_holds(again.transformer, dict(loaded.transformer.named_parameters()))
    assert again.report.stored_dtypes == ("bfloat16", "float32")


def test_nothing_is_written_to_a_read_only_place(tmp_path: Path, small: TransformerConfig) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        save(tmp_path / "file" / "x", small)


def test_missing_keys_are_named(tmp_path: Path, wan: State) -> None:
    del wan["blocks.1.self_attn.q.weight"], wan["head.modulation"]
    with pytest.raises(CheckpointError, match=r"lacks 2 parameters: .*blocks\.1\.attn1\.to_q"):
        load_checkpoint(write(tmp_path / "wan.safetensors", wan))
    del wan["patch_embedding.weight"]
    with pytest.raises(CheckpointError, match=r"lacks patch_embedding\.weight"):
        load_checkpoint(write(tmp_path / "wan.safetensors", wan))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        (
            "blocks.2.ffn.2.weight",
            torch.zeros(128, 95),
            r"blocks\.2\.ffn\.net\.2\.weight got \[128, 95\], expected \[128, 96\]",
        ),
        (
            "blocks.2.ffn.2.weight",
            torch.zeros(128, 96, dtype=torch.int8),
            r"ffn\.2\.weight as int8; expected floating",
        ),
        # a number of heads that cannot be told
        (
            "patch_embedding.weight",
            torch.zeros(96, 4, 1, 2, 2),
            r"96 channels wide.*config\.json",
        ),
    ],
    ids=["shape", "quantised", "odd width"],
)
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, wan: State, key: str, value: Tensor, says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(write(tmp_path / "wan.safetensors", wan | {key: value}))


def test_unknown_keys_of_a_base_are_refused(tmp_path: Path, wan: State) -> None:
    path = write(tmp_path / "wan.ckpt", wan | {"what.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"does not know: what\.weight"):
        load_checkpoint(path)
    rename = tmp_path / "rename.json"
    rename.write_text('{"what": null}')
    load_checkpoint(path, rename=rename)


def test_config_beside_contradicts_or_describes(tmp_path: Path, wan: State) -> None:
    path = write(tmp_path / "wan.safetensors", wan)
    config = {"_class_name": "WanModel", "dim": 128, "num_heads": 2, "num_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_checkpoint(path).config.num_attention_heads == 2
    (tmp_path / "config.json").write_text(json.dumps(config | {"ffn_dim": 100}))
    with pytest.raises(CheckpointError, match=r"got \[96, 128\], expected \[100, 128\]"):
        load_checkpoint(path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"patch_size": [1, 4, 4]}))
    with pytest.raises(CheckpointError, match=r"patch_size \[1, 4, 4\]; expected \[1, 2, 2\]"):
        load_checkpoint(path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "version 2; expected 'mv2v_engine' version 1"),
        ({"transformer": {"num_layers": 3}}, "does not describe a checkpoint"),
        ({"sampling": {"num_frames": 16}}, "4n"),
        ({"sampling": {"frames": 17}}, "frames"),
        (
            {"sampling": {"timesteps": "half"}},
            "timesteps must be one of 'exact', 'bfloat16', got 'half'",
        ),
        (
            {"sampling": {"scheduler": "ddim"}},
            "scheduler must be one of 'euler', 'unipc', 'lightx2v', 'dmd', 'rcm', 'flow_map', "
            "got 'ddim'",
        ),
        ({"sampling": {"fps": 0}}, r"fps must lie in 0\.01\.\.1000, got 0"),
        ({"sampling": {"guidance_scale": 1e38}}, r"guidance_scale must lie in 0\.\.100, got"),
        ({"sampling": {"flow_shift": float("nan")}}, r"flow_shift must lie in .*, got nan"),
        ({"sampling": None}, "does not describe a checkpoint"),
        ({"conditioning": ["statik"]}, r"conditioning is \['statik'\]"),
    ],
)
def test_bad_own_configs(
    tmp_path: Path, small: TransformerConfig, change: dict[str, object], says: str
) -> None:
    save(tmp_path, small)
    with edited_json(tmp_path / "mv2v.json") as said:
        said |= change
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(tmp_path)
    (tmp_path / "transformer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no transformer\.safetensors"):
        load_checkpoint(tmp_path)


COUNTS = {
    "Wan2.1 1.3B": (WAN_1_3B, {"camera_conditioning": "none"}, 1_418_996_800),
    "ReCamMaster": (WAN_1_3B, {}, 1_490_420_800),
    "Wan2.2 5B": (WAN_5B, {}, 4_999_787_712),
    "Lucy-Edit": (LUCY_5B, {}, 5_000_377_536),
}


@pytest.mark.parametrize(("config", "change", "count"), COUNTS.values(), ids=COUNTS)
def test_full_size_parameter_counts(
    config: TransformerConfig, change: dict[str, object], count: int
) -> None:
    config = dataclasses.replace(config, tokenizers=(), merger=None, **change)
    with torch.device("meta"):
        model = MV2VTransformer(config)
    assert sum(p.numel() for p in model.parameters()) == count
