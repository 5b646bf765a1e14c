"""Names: the tables against BASE_MODELS 3.4, prefixes, and users' rename files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mv2v_engine.checkpoints.names import (
    block_of,
    is_known,
    read_renames,
    to_diffusers,
    to_original,
    translate,
)
from mv2v_engine.errors import CheckpointError
from tests.checkpoints.conftest import State, diffusers_wan


def test_tables_match_the_substring_rules(
    recammaster: State, renamed: Callable[[str], str]
) -> None:
    assert {key: to_diffusers(key) for key in recammaster} == {
        key: renamed(key) for key in recammaster
    }


def test_norms_change_places() -> None:
    assert to_diffusers("blocks.7.norm3.weight") == "blocks.7.norm2.weight"
    assert to_diffusers("blocks.7.norm2.weight") == "blocks.7.norm3.weight"


def test_renames_are_inverse(recammaster: State) -> None:
    ours = [to_diffusers(key) for key in recammaster]
    assert len(set(ours)) == len(ours)
    assert [to_original(name) for name in ours if name] == list(recammaster)


def test_diffusers_names_are_diffusers_own(recammaster: State) -> None:
    extras = ("cam_encoder", "projector")
    ours = {
        to_diffusers(k): v.shape for k, v in recammaster.items() if k.split(".")[-2] not in extras
    }
    assert ours == {key: value.shape for key, value in diffusers_wan().state_dict().items()}


@pytest.mark.parametrize(
    "key",
    [
        "blocks.0.self_attn.q.lora",
        "xblocks.0.self_attn.q.weight",
        "blocks.01.modulation",
        "head.head",
        "modulation",
        "blocks.0.self_attn.norm_q.bias",
    ],
)
def test_tables_are_strict(key: str) -> None:
    assert to_diffusers(key) is None


def test_own_extras_are_known() -> None:
    assert is_known("tokenizers.8.weight") and is_known("mergers.20.bias")
    assert is_known("blocks.3.cam_encoder.weight")
    assert not is_known("mergers.x.weight") and not is_known("tokenizers.8.scale")


def test_block_index_is_read_from_foreign_names() -> None:
    assert block_of("net.blocks.20.merge.weight") == 20
    assert block_of("subblocks.20.merge.weight") is None


def test_renames_come_first_and_the_longest_wins(wan: State) -> None:
    keys = [*wan, "net.a.weight", "net.a.bias", "net.b.weight", "ema_step"]
    result = translate(
        keys, {"net.a": "tokenizers.4", "net.a.bias": None, "net.b": "mergers.1", "ema_step": None}
    )
    assert result.names["net.a.weight"] == "tokenizers.4.weight"
    assert result.names["net.b.weight"] == "mergers.1.weight"
    assert set(result.dropped) == {"net.a.bias", "ema_step"}
    assert not result.unknown


def test_prefix_rename_stops_at_a_dot(wan: State) -> None:
    result = translate([*wan, "net.weight", "network.weight"], {"net": "mergers.1"})
    assert result.names["net.weight"] == "mergers.1.weight"
    assert result.unknown == ("network.weight",)


def test_rename_that_meets_no_key_is_an_error(wan: State) -> None:
    with pytest.raises(CheckpointError, match=r"patch_embeding.*patch_embedding\.weight"):
        translate(wan, {"patch_embeding.weight": "patch_embedding.weight"})


def test_two_keys_cannot_take_one_name(wan: State) -> None:
    with pytest.raises(CheckpointError, match=r"both become 'proj_out\.weight'"):
        translate([*wan, "extra.weight"], {"extra.weight": "proj_out.weight"})


@pytest.mark.parametrize("text", ["[1]", '{"a": 3}', "{", '"a"'])
def test_bad_rename_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rename.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"rename\.json"):
        read_renames(path)


def test_rename_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rename.json"
    path.write_text(json.dumps({"a": "b", "c": None}))
    assert read_renames(path) == {"a": "b", "c": None}
    with pytest.raises(CheckpointError, match=r"cannot read .*none\.json"):
        read_renames(tmp_path / "none.json")
