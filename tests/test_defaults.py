"""A seed means one video, whatever a program has set for torch as a whole."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.defaults import torch_defaults
from mv2v_engine.files import tensor_digest
from mv2v_engine.testing import relative_error
from tests.torch_state import default_dtype, num_threads

ROOT = Path(__file__).resolve().parents[1] / "mv2v_engine"
# what makes a tensor of nothing, and takes torch's defaults where it names no dtype or device
FLOATS = {"empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "zeros"}
FACTORIES = FLOATS | {"arange", "randint", "randperm", "scalar_tensor", "tensor"}
# modules are made without memory and filled, or by training; these make no turn
OTHERS = ("synthetic", "training", "evaluation", "testing.py")


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def other_seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(99)
        yield


SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    # where no number survives: whatever is made there by mistake fails
    "another device": lambda: torch.device("meta"),
    "gradients off": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic algorithms": deterministic,
    "another seed of torch's own": other_seed,
    "one thread": lambda: num_threads(1),
    "two threads": lambda: num_threads(2),
}


Video = tuple[Tensor, Tensor]


def _views(checkpoint: Path, frames: Tensor, config: EngineConfig) -> Video:
    """Two turns, the second of which remembers the first."""
    engine = Engine.from_pretrained(checkpoint, device="cpu", config=config)
    session = engine.session(frames)
    session.render("pan_left", seed=3, prompt="a red ball")
    turn = session.render("arc:-20,3", seed=4, num_inference_steps=2, guidance_scale=2.0)
    return turn.latents, turn.frames


def _edit(checkpoint: Path, clip: Path) -> Video:
    turn = Engine.from_pretrained(checkpoint, device="cpu").session(clip, cuts=()).edit("a ball")
    return turn.latents, turn.frames


@pytest.fixture(scope="module")
def expected(
    worded_checkpoint: Path, source_frames: Tensor, editor_folder: Path, long_clip: Path
) -> dict[str, Video]:
    views = {
        name: _views(worded_checkpoint, source_frames, config) for name, config in CONFIGS.items()
    }
    return views | {"edit": _edit(editor_folder, long_clip)}


CONFIGS = {
    "joint": EngineConfig(),
    "static": EngineConfig(conditioning="static"),
    "unipc": EngineConfig(scheduler="unipc"),
    "random": EngineConfig(memory_ranking="random", memory_tokenizers="uniform"),
    "skipped": EngineConfig(step_cache=9.0),
}


# of every kind of turn those that change numbers; of one kind all
HARD = ("float64", "another device", "autocast")
CASES = [(kind, setting) for kind in (*CONFIGS, "edit") for setting in HARD]
CASES += [("joint", setting) for setting in SETTINGS if setting not in HARD]
# some CPUs' libraries add up in another order with another number of threads
THREADS = {"one thread", "two threads"}


@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_the_same_video(
    kind: str,
    setting: str,
    expected: dict[str, Video],
    worded_checkpoint: Path,
    source_frames: Tensor,
    editor_folder: Path,
    long_clip: Path,
) -> None:
    with SETTINGS[setting]():
        if kind == "edit":
            found = _edit(editor_folder, long_clip)
        else:
            found = _views(worded_checkpoint, source_frames, CONFIGS[kind])
    if setting in THREADS:
        assert relative_error(found[0], expected[kind][0]) < 1e-4
    else:
        assert all(torch.equal(a, b) for a, b in zip(found, expected[kind], strict=True))


def test_what_a_turn_made_in_inference_mode_is_remembered_outside(
    worded_checkpoint: Path, source_frames: Tensor
) -> None:
    engine = Engine.from_pretrained(worded_checkpoint, device="cpu")
    found = []
    for mode in (nullcontext, torch.inference_mode):
        session = engine.session(source_frames)
        with mode():
            session.render("pan_left")
        found.append(tensor_digest(session.render("pan_right").latents))
    assert found[0] == found[1]


def test_torchs_defaults_are_given_back() -> None:
    with default_dtype(torch.float64), torch.device("meta"):
        with torch_defaults():
            made = torch.zeros(1)
        assert (made.dtype, made.device.type) == (torch.float32, "cpu")
        made = torch.zeros(1)
        assert (made.dtype, made.device.type) == (torch.float64, "meta")


def test_every_new_tensor_names_its_dtype_and_device() -> None:
    """Read from the source: what a turn never reaches on a CPU counts, too."""
    files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in OTHERS]
    found = [
        f"{path.relative_to(ROOT)}:{place}"
        for path in files
        for place in unnamed(path.read_text(encoding="utf-8"))
    ]
    assert len(files) > 100 and not found, "\n".join(found)


def unnamed(source: str) -> list[str]:
    """Calls of factories that leave a dtype or the device to torch's defaults."""
    tree, found = ast.parse(source), []
    parameters = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "nn.Parameter"
        for argument in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or id(node) in parameters:
            continue
        module, _, name = ast.unparse(node.func).rpartition(".")
        named = {keyword.arg for keyword in node.keywords}
        if module != "torch" or name not in FACTORIES or None in named:
            continue
        wanted = {"device"} | ({"dtype"} if name in FLOATS else set())
        if wanted - named:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_a_tensor_without_names_is_found() -> None:
    assert unnamed("torch.zeros(3)") and unnamed("torch.arange(3)")
    assert unnamed("torch.zeros(3, dtype=torch.float32)")
    assert not unnamed("torch.zeros(3, dtype=torch.float32, device=place)")
    assert not unnamed("nn.Parameter(torch.zeros(3))")
