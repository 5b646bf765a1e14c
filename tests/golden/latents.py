"""Latents of fixed seeds in every mode: what code may move around, and not change.

    python -m tests.golden.latents --against CHECKOUT    the same bits as another checkout's, here
    python -m tests.golden.latents --write               tests/golden/latents.json, anew

Weights are random, so that a new checkpoint changes nothing here. Bits depend on the processor and
on the number of threads: the file holds numbers that must agree within rounding, and two checkouts
are compared to the bit by running both on one machine, each with its own copy of this script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.config import ParallelConfig
from mv2v_engine.engine import graphs
from mv2v_engine.engine.request import Request
from mv2v_engine.envs import launched_rank
from mv2v_engine.evaluation.fifo import edit_fifo
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.testing import as_cameras, randomise, tiny_config
from mv2v_engine.tokens.plan import turn_plan
from mv2v_engine.training.losses import flow_loss
from mv2v_engine.training.recipe import Batch, Siblings
from tests.conftest import EDIT_SIZE, EDIT_WINDOW, SIZE, save_tiny
from tests.engine.graph_stand_in import StandIn
from tests.launched import both

FILE = Path(__file__).with_name("latents.json")
# as many as a tensor leaves in the file, evenly spaced
NUM_VALUES = 24
CPU = torch.device("cpu")
BASE = EngineConfig(memory="retrieved", merge="conv", merge_fraction=0.5, graphs="off")
STATIC = replace(BASE, conditioning="static")
CAMERAS = ("pan_right", "arc_left", "tilt_up")
# each differs from BASE; three turns of a session, the last of which remembers two
VIEWS: dict[str, dict[str, Any]] = {
    "joint": {"merge": "off"},
    "merged": {},
    "discarded": {"merge": "discard"},
    "merged over all groups": {"merge_scope": "joint"},
    "merged by the mean of heads": {"responsiveness_heads": "mean"},
    "static": {"merge": "off", "conditioning": "static"},
    "static, merged": {"conditioning": "static"},
    "uniform": {"memory_tokenizers": "uniform", "memory_ranking": "random", "rope": "centre"},
    "unipc": {"scheduler": "unipc"},
    "by chunks": {"feed_forward_chunk": 37},
    "step cache": {"step_cache": 3.0},
    "static, step cache": {"step_cache": 3.0, "conditioning": "static"},
}
# what all engines on the same weights share
OF_WEIGHTS = {"responsiveness_heads", "feed_forward_chunk"}
# what two processes share
SHARED: tuple[Any, ...] = ("joint", "static")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clip(num_frames: int, size: tuple[int, int]) -> Tensor:
    """uint8 [T, height, width, 3], smooth, and moving."""
    coarse = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(3))
    (picture,) = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    frames = torch.stack([picture.roll(number, -1) for number in range(num_frames)])
    return (frames * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def rendered(
    engine: Engine, memory: Any = None, *, scale: float = 2.0, prompt: str = "a red ball"
) -> Tensor:
    """The latents of a session's three turns [3, C, F, H, W]."""
    session = engine.session(clip(9, SIZE))
    for seed, camera in enumerate(CAMERAS):
        session.render(camera, seed=seed, prompt=prompt, guidance_scale=scale, memory=memory)
    return torch.stack([turn.latents for turn in session.turns])


def views(folder: Path) -> Iterator[tuple[str, Tensor]]:
    checkpoint = save_tiny(folder / "views", name="views", has_text=True)
    plain = Engine.from_pretrained(checkpoint, device="cpu", config=BASE)
    for name, changes in VIEWS.items():
        config = replace(BASE, **changes)
        if changes.keys() & OF_WEIGHTS:
            yield name, rendered(Engine.from_pretrained(checkpoint, device="cpu", config=config))
        else:
            yield name, rendered(plain.reconfigured(config))
    yield "without guidance", rendered(plain, scale=1.0)
    for memory in ("alone", "previous", "none"):
        yield f"memory {memory}", rendered(plain, memory)
    for config in (BASE, STATIC):
        yield f"captured, {config.conditioning}", captured(plain.reconfigured(config))
        yield f"packed, {config.conditioning}", packed(plain.reconfigured(config))


def captured(plain: Engine) -> Tensor:
    """Two sessions on the acted-out device: the second one's steps are replayed from the first."""
    given, recorder = graphs.open_recorder, StandIn()
    graphs.open_recorder = lambda device: recorder
    try:
        engine = plain.reconfigured(replace(plain.config, graphs="on"))
    finally:
        graphs.open_recorder = given
    latents = torch.stack([rendered(engine), rendered(engine)])
    assert recorder.replays
    return latents


def packed(engine: Engine) -> Tensor:
    """The last turns of two sessions, of which one remembers."""
    sessions = [engine.session(clip(9, SIZE)) for _ in range(2)]
    sessions[0].render("pan_left", seed=5)
    asked: dict[str, Any] = {"memory": "retrieved", "prompt": "ball"}
    requests = [
        Request.view(camera, engine.sampling, seed=7, guidance_scale=scale, **asked)
        for camera, scale in (("pan_right", 2.0), ("zoom_in", 1.0))
    ]
    pairs = list(zip(sessions, requests, strict=True))
    for turn in engine.answer_all(pairs, token_budget=10_000):
        assert not isinstance(turn, Exception) and turn.report["packed_steps"], turn
    return torch.stack([session.turns[-1].latents for session in sessions])


def edits(folder: Path) -> Iterator[tuple[str, Tensor]]:
    checkpoint = save_tiny(
        folder / "editor",
        name="editor",
        has_text=True,
        sampling={"num_frames": EDIT_WINDOW, "size": EDIT_SIZE, "num_inference_steps": 2},
        in_channels=32,
        source_channels=16,
        camera_conditioning="none",
    )
    plain = Engine.from_pretrained(checkpoint, device="cpu", config=BASE)
    frames = clip(13, EDIT_SIZE)
    for config in (BASE, STATIC):
        session = plain.reconfigured(config).session(frames)
        turn = session.edit("a red ball", seed=4, guidance_scale=3.0)
        yield f"edit, {config.conditioning}", turn.latents
    fifo = edit_fifo(plain, frames, "a red ball", seed=4, guidance_scale=3.0)
    yield "edit, diagonal", fifo.latents


def forwards() -> Iterator[tuple[str, Tensor]]:
    """A transformer by itself: other shapes, dtypes and batches, and gradients."""
    configs = [
        ("prope", tiny_config(camera_attention="prope", attention_head_dim=16), {}),
        ("prope, fused", tiny_config(camera_attention="prope_fused_dual"), {}),
        ("one target's cameras", tiny_config(camera_conditioning="target"), {}),
        ("bfloat16", tiny_config(), {"dtype": torch.bfloat16}),
    ]
    for name, config, given in configs:
        yield f"forward, {name}", forward(config, **given)
    for conditioning in ("joint", "static"):
        yield f"gradients, {conditioning}", gradients(conditioning)
    editor = tiny_config(in_channels=8, source_channels=4, camera_conditioning="none")
    plan, model = turn_plan(editor, (3, 6, 10), ()), small(editor)
    timestep = torch.tensor([[100.0, 300.0, 500.0], [900.0, 600.0, 30.0]])
    with torch.no_grad():
        latents = [draw(2, 8, 3, 6, 10, seed=0)]
        yield (
            "forward, a timestep a frame",
            model(latents, timestep, draw(2, 6, 10, seed=1), plan=plan),
        )


def small(config: Any, dtype: torch.dtype = torch.float32) -> MV2VTransformer:
    model = MV2VTransformer(config)
    randomise(model)
    return model.to(dtype)


@torch.no_grad()
def forward(config: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Velocities of a batch of two, merged, in every kind of conditioning [2 * B, C, F, H, W]."""
    found, model = [], small(config, dtype)
    for conditioning in ("joint", "static"):
        plan = turn_plan(config, (3, 6, 10), (4, 8), fraction=0.5, conditioning=conditioning)
        latents = [draw(2, 4, *s.grid, seed=i) for i, s in enumerate(plan.segments)]
        cameras = as_cameras(draw(2, len(latents) + 1, 3, 12, seed=9), config)
        given = (torch.tensor([700.0, 300.0]), draw(2, 6, 10, seed=8))
        found.append(model(latents, *given, plan=plan, cameras=cameras))
    return torch.cat(found).float()


def gradients(conditioning: Any) -> Tensor:
    """Gradients of all parameters, in a row; static: two targets of one conditioning as well."""
    config = tiny_config()
    model, plan = small(config), turn_plan(config, (2, 6, 10), (4,), conditioning=conditioning)
    model.gradient_checkpointing = conditioning == "static"
    latents = [draw(2, 4, *s.grid, seed=i) for i, s in enumerate(plan.segments)]
    batch = Batch(plan, latents, draw(2, 3, 2, 12, seed=9), draw(2, 6, 10, seed=8))
    if conditioning == "static":
        siblings = Siblings(draw(2, 2, 4, 2, 6, 10, seed=6), draw(2, 2, 2, 12, seed=5))
        batch = replace(batch, siblings=siblings)
    generator = torch.Generator().manual_seed(0)
    flow_loss(model, batch, generator, flow_shift=3.0, device=CPU).backward()
    found = [p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return torch.cat(found)


def shared(folder: Path) -> dict[str, Tensor]:
    """Latents of sessions whose steps two processes share: each runs this file and `rank` below."""
    save_tiny(folder / "shared", name="shared")
    for process in both("-m", "tests.golden.latents", "--rank", str(folder)):
        assert process.returncode == 0, process.stderr[-5000:]
    return load_file(folder / "ranks.safetensors")


def rank(folder: Path) -> None:
    torch.set_num_threads(1)
    own, _ = launched_rank() or (0, 1)
    config = replace(BASE, parallel=ParallelConfig(context=2, timeout_seconds=240))
    checkpoint = folder / "shared"
    if own:
        Engine.follow(checkpoint, device="cpu", config=config)
        return
    with Engine.from_pretrained(checkpoint, device="cpu", config=config) as engine:
        found = {
            f"ranks, {conditioning}": rendered(
                engine.reconfigured(replace(config, conditioning=conditioning)), scale=1, prompt=""
            )
            for conditioning in SHARED
        }
    save_file(found, folder / "ranks.safetensors")


def all_latents(folder: Path) -> dict[str, Tensor]:
    """By name; folder: an empty one for checkpoints."""
    return {**dict(views(folder)), **dict(edits(folder)), **dict(forwards()), **shared(folder)}


def told(latents: Tensor) -> dict[str, Any]:
    """What the file holds of a tensor."""
    flat = latents.detach().double().flatten()
    places = torch.linspace(0, len(flat) - 1, NUM_VALUES).long()
    digits = [float(f"{value:.8g}") for value in (flat.norm(), *flat[places])]
    return {"shape": list(latents.shape), "norm": digits[0], "values": digits[1:]}


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """The names of tensors that are not there twice, to the bit."""
    names = sorted(ours.keys() | theirs.keys())
    return [n for n in names if n not in ours or n not in theirs or not ours[n].equal(theirs[n])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--write", action="store_true", help="the file that the test reads")
    parser.add_argument("--out", type=Path, help="a safetensors file of all latents")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        rank(args.rank)
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ours = all_latents(Path(folder))
        if args.out is not None:
            save_file({name: tensor.contiguous() for name, tensor in ours.items()}, args.out)
        if args.write:
            rows = [f"{json.dumps(name)}: {json.dumps(told(x))}" for name, x in ours.items()]
            FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
        if args.against is None:
            return 0
        path = Path(folder) / "theirs.safetensors"
        command = [sys.executable, "-m", "tests.golden.latents", "--out", str(path)]
        # this interpreter's packages, the other checkout's code
        there = args.against.resolve()
        environment = os.environ | {"PYTHONPATH": f"{there}{os.pathsep}{there / 'kernels'}"}
        subprocess.run(command, check=True, cwd=there, env=environment)
        wrong = differing(ours, load_file(path))
    print(f"{len(ours) - len(wrong)} of {len(ours)} to the bit", *wrong, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
