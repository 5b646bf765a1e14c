"""Importing the engine, and loading a model, in a fresh process: quick, and with torch alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mv2v_engine.serving.config import Limits

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "diffusers",
    "transformers",
    "huggingface_hub",
    "triton",
    "av",
    "PIL",
    "matplotlib",
    "xformers",
    "accelerate",
)
WEB = ("fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn")
# what is loaded when a module has been imported, each after the ones before
MODULES = (".engine.engine", ".text", ".vae", ".video.io", ".run")
LOOK = """
import importlib, json, os, sys, time

began = time.process_time()
import torch

told = {"torch": time.process_time() - began, "loaded": {}}
# torch itself may load some of the others, where they are installed
known, environment, threads = set(sys.modules), dict(os.environ), torch.get_num_threads()
for name in sys.argv[1:]:
    began = time.process_time()
    importlib.import_module("mv2v_engine" + name)
    told.setdefault("engine", time.process_time() - began)
    told["loaded"][name] = sorted({name.split(".")[0] for name in set(sys.modules) - known})
told["environment"] = dict(os.environ) == environment
told["threads"] = torch.get_num_threads() == threads
told["cuda"] = torch.cuda.is_initialized()
print(json.dumps(told))
"""

LOAD = """
import json, sys, time

began = time.process_time()
import torch

told = {"torch": time.process_time() - began}
torch.set_num_threads(1)
known, began = set(sys.modules), time.process_time()
from mv2v_engine import Engine

engine = Engine.from_pretrained("tiny-nvs", device="cpu")
told["seconds"] = time.process_time() - began
told["loaded"] = sorted(set(sys.modules) - known)
frames = torch.zeros(17, 96, 160, 3, dtype=torch.uint8)
engine.session(frames).render("static", num_inference_steps=1)
told["turn"] = sorted(set(sys.modules) - known)
print(json.dumps(told))
"""

PROBE = """
import json, sys
from pathlib import Path

import mv2v_engine.client

told = {"client": sorted(sys.modules)}
from mv2v_engine.serving.store.records import REFERENCES
from mv2v_engine.serving.work.probe import examine

limits, clip, moving = json.loads(sys.argv[1]), *map(Path, sys.argv[2:])
asked = (clip, "source"), (moving, "source"), (moving, REFERENCES + "0")
told["frames"] = [examine(path, limits, name=name)["frames"] for path, name in asked]
told["prober"] = sorted(sys.modules)
print(json.dumps(told))
"""


def _told(code: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    return _told(LOOK, *MODULES)


def test_the_engine_imports_in_two_seconds(told: dict[str, Any]) -> None:
    """Two seconds of the processor; where torch alone is slow, what the engine adds is judged."""
    assert told["engine"] <= 1.0 or told["torch"] + told["engine"] <= 2.0


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        (".engine.engine", HEAVY),
        (".text", ("transformers",)),
        (".vae", ("diffusers",)),
        (".video.io", ("av",)),
        (".run", WEB),
    ],
)
def test_what_is_loaded_when_it_is_needed(
    told: dict[str, Any], module: str, unneeded: tuple[str, ...]
) -> None:
    loaded = told["loaded"][module]
    assert "mv2v_engine" in loaded and not set(unneeded) & set(loaded)


def test_nothing_is_left_behind(told: dict[str, Any]) -> None:
    assert told["environment"] and told["threads"] and not told["cuda"]


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    return _told(LOAD)


def test_a_model_without_text_loads_no_heavy_library(loaded: dict[str, Any]) -> None:
    assert not {*HEAVY, *WEB} & set(loaded["loaded"])


def test_a_turn_needs_no_compiler(loaded: dict[str, Any]) -> None:
    """Which torch imports for many an operation on tensors without memory."""
    unneeded = {"diffusers", "transformers", "torch._dynamo", "torch._inductor"}
    assert not unneeded & set(loaded["turn"])


def test_a_small_model_loads_in_little_time(loaded: dict[str, Any]) -> None:
    """Processor time, and less than torch takes where the machine is slow or busy."""
    assert loaded["seconds"] <= max(1.5, loaded["torch"])


def test_a_client_and_the_prober_of_the_service_load_no_torch(
    tmp_path: Path, source_clip: Path
) -> None:
    """Which takes most of a second and 200 MB: neither makes a tensor."""
    frames = [Image.new("RGB", (32, 24), (level, 0, 0)) for level in (0, 250)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    limits = json.dumps(Limits().to_dict())
    told = _told(PROBE, limits, str(source_clip), str(tmp_path / "moving.webp"))
    assert not {"torch", "numpy", *HEAVY, *WEB} & set(told["client"])
    assert told["frames"] == [9, 2, 1]
    assert not {"torch", *WEB} & set(told["prober"])
