"""Inspection: everything is told, nothing is read but headers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mv2v_engine.checkpoints import inspect_checkpoint, render_inspection
from mv2v_engine.errors import CheckpointError

State = dict[str, Tensor]


def test_a_whole_memory_checkpoint(tmp_path: Path, memory: State) -> None:
    path = tmp_path / "memoryv2v.ckpt"
    torch.save({key: value.bfloat16() for key, value in memory.items()}, path)
    found = inspect_checkpoint(path)
    assert found.problem is None and found.format == "memory_v2v"
    assert len(found.matched) == len(memory) and not found.missing and not found.unknown
    assert found.num_parameters == found.num_stored == sum(v.numel() for v in memory.values())
    assert found.dtypes == {"bfloat16": len(memory)}
    text = render_inspection(found)
    assert "downsampler.weight [128, 128, 2, 2] -> mergers.1.weight" in text
    assert "camera_conditioning own" in text and text.endswith(
        "yes, by its headers; --deep reads its numbers"
    )
    assert "for          run novel-view" in text and "vae          none beside it" in text
    assert text.splitlines()[0] == (
        f"{path} is a Memory-V2V transformer: 3 blocks of 128 channels, "
        f"{found.num_parameters:,} parameters, for videos of 4 latent channels, run novel-view"
    )


def test_a_base_says_what_is_initialised(tmp_path: Path, wan: State) -> None:
    path = tmp_path / "wan.safetensors"
    save_file(wan, str(path))
    text = render_inspection(inspect_checkpoint(path))
    assert "merger none, average pooling" in text and "trained for  joint conditioning" in text
    assert "tokenizers.8.weight: from patch_embedding" in text


def test_faults_are_told_and_not_raised(tmp_path: Path, wan: State) -> None:
    del wan["head.head.bias"]
    wan["blocks.0.ffn.0.bias"] = torch.zeros(5)
    wan["what.weight"] = torch.zeros(5)
    path = tmp_path / "wan.safetensors"
    save_file(wan, str(path))
    found = inspect_checkpoint(path)
    assert found.missing == ("proj_out.bias",) and found.unknown == ("what.weight",)
    assert found.mismatched == (("blocks.0.ffn.net.0.proj.bias", (5,), (96,)),)
    assert found.problem is not None and "[5], expected [96]" in found.problem
    text = render_inspection(found)
    assert "missing      1\n             proj_out.bias" in text and "loads        no: " in text


def test_undecided_modules_are_listed(tmp_path: Path, memory: State) -> None:
    path = tmp_path / "m.ckpt"
    torch.save(memory | {"spare.weight": torch.ones(128, 4, 1, 4, 4)}, path)
    found = inspect_checkpoint(path)
    assert len(found.undecided) == 1 and "rename=FILE" in str(found.problem)
    assert "spare.weight" in found.unknown
    rename = tmp_path / "rename.json"
    rename.write_text('{"spare": null}')
    found = inspect_checkpoint(path, rename)
    assert found.problem is None and found.dropped == ("spare.weight",)


def test_no_tensor_is_read(tmp_path: Path, wan: State) -> None:
    """Tensor bytes that are not on the disk at all do not matter to an inspection."""
    path = tmp_path / "wan.safetensors"
    save_file(wan, str(path))
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:header])
    with path.open("r+b") as file:
        file.truncate(len(data))
    assert inspect_checkpoint(path).problem is None


def test_what_cannot_be_read_raises(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        inspect_checkpoint(tmp_path / "none.ckpt")
