"""Peak host memory of loading, measured in a fresh process: at most 1.2 times the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mv2v_engine.config import TransformerConfig
from mv2v_engine.models.dit import MV2VTransformer
from tests.launched import script

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

NAMES, DTYPES = ("wan.safetensors", "wan.pth"), ("float32", "bfloat16")
# a process for every load, forked from one that has imported everything
PROGRAM = """
import json, os, sys
import torch
import safetensors.torch
from mv2v_engine.checkpoints import load_checkpoint
from mv2v_engine.config import TINY
from mv2v_engine.models.dit import MV2VTransformer

torch.set_num_threads(1)  # threads do not survive a fork
# torch imports its shape rules, 80 MB of Python, when the meta device is first used
with torch.device("meta"):
    MV2VTransformer(TINY)


def status(word):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(word))


small, *cases = sys.argv[1:]
for case in cases:
    pid = os.fork()
    if pid == 0:
        path, dtype = case.split("=")
        name = os.path.basename(path)
        # a fork's memory has no code in it until that is run
        load_checkpoint(os.path.join(small, name), dtype=getattr(torch, dtype))
        before = status("VmRSS")
        loaded = load_checkpoint(path, dtype=getattr(torch, dtype))
        print(json.dumps([name, dtype, status("VmHWM") - before]), flush=True)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
"""

Loads = dict[tuple[str, str], tuple[int, int]]


def save(folder: Path, config: TransformerConfig) -> Path:
    """A random transformer by diffusers' names, as both kinds of file."""
    with torch.device("meta"):
        model = MV2VTransformer(config)
    generator = torch.Generator().manual_seed(0)
    state = {k: torch.rand(p.shape, generator=generator) for k, p in model.named_parameters()}
    save_file(state, str(folder / NAMES[0]))
    torch.save(state, folder / NAMES[1])
    return folder


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> Loads:
    """By file and dtype the file's bytes, some 180 MB, and what loading it took."""
    wide = save(tmp_path_factory.mktemp("wide"), WIDE)
    small = save(tmp_path_factory.mktemp("small"), replace(WIDE, num_layers=1, merge_blocks=None))
    cases = [f"{wide / name}={dtype}" for name in NAMES for dtype in DTYPES]
    done = script(PROGRAM, small, *cases)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(name, dtype): ((wide / name).stat().st_size, grown) for name, dtype, grown in rows}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_peak_memory(loads: Loads, name: str, dtype: str) -> None:
    size, grown = loads[name, dtype]
    print(f"{size:,} bytes, {grown / size:.3f} of them taken")
    assert size > 150e6
    # less than the weights would mean that the measurement misses them
    held = size if dtype == "float32" else size // 2
    assert 0.95 * held < grown < 1.2 * size
