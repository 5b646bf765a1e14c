"""Peak host memory of loading, measured in a fresh process: at most 1.2 times the file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mv2v_engine.config import TransformerConfig
from mv2v_engine.models.dit import MV2VTransformer

WIDE = TransformerConfig(
    num_layers=10,
    num_attention_heads=4,
    attention_head_dim=128,
    ffn_dim=2048,
    in_channels=16,
    out_channels=16,
    text_dim=64,
    camera_conditioning="none",
    tokenizers=(),
    merger=None,
)

PROGRAM = """
import sys
import torch
import safetensors.torch
from mv2v_engine.checkpoints import load_checkpoint
from mv2v_engine.config import TINY
from mv2v_engine.models.dit import MV2VTransformer


def status(word):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(word))


# torch imports its shape rules, 80 MB of Python, when the meta device is first used
with torch.device("meta"):
    MV2VTransformer(TINY)
before = status("VmRSS")
loaded = load_checkpoint(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One random transformer of 180 MB, diffusers' names, as both kinds of file."""
    with torch.device("meta"):
        model = MV2VTransformer(WIDE)
    generator = torch.Generator().manual_seed(0)
    state = {k: torch.rand(p.shape, generator=generator) for k, p in model.named_parameters()}
    folder = tmp_path_factory.mktemp("wide")
    save_file(state, str(folder / "wan.safetensors"))
    torch.save(state, folder / "wan.pth")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["wan.safetensors", "wan.pth"])
def test_peak_memory(folder: Path, name: str, dtype: str) -> None:
    path = folder / name
    size = path.stat().st_size
    assert size > 150e6
    command = [sys.executable, "-c", PROGRAM, str(path), dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = int(result.stdout)
    # less than the weights would mean that the measurement misses them
    held = size if dtype == "float32" else size // 2
    assert 0.95 * held < grown < 1.2 * size
