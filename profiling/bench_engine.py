"""Whole turns of a session, as a user waits for them: seconds by stage and peak bytes.

`python profiling/bench_engine.py [--device cpu] [--out profiling/results/engine.jsonl]`

`Engine.session(...).render`, joint with merging and static turn about, with as many memory videos
as the session has earlier turns; turns that are only there to be remembered take one step. On a
CPU `tiny-nvs` on one thread; on CUDA the 1.3B shape with random weights, a random Wan VAE and a
random text encoder of one layer, guided. `--denoising` needs no diffusers. The
stages are those of the turn's own events; on a CPU bytes are the whole process's.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from forwards import Inputs, Setting, chosen
from measure import Report, digits, existing_device, provenance, reason, table
from random_parts import random_engine
from targets import target

from mv2v_engine import CancelToken, Engine
from mv2v_engine.camera.trajectories import PRESETS, named_trajectory
from mv2v_engine.config import EngineConfig
from mv2v_engine.engine.denoise import Denoiser, denoise
from mv2v_engine.engine.report import turn_flops
from mv2v_engine.engine.session import Session
from mv2v_engine.engine.step import Conditioning
from mv2v_engine.progress import Event, Spans, StageDone, StageStarted
from mv2v_engine.sampling.flow_match import make_solver
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import make_world

WORLD = 3_000_001
CONFIGS = {
    "joint, merged": EngineConfig(conditioning="joint", merge="conv", memory="retrieved"),
    "static": EngineConfig(conditioning="static", merge="off", memory="retrieved"),
}
KINDS = {"joint, merged": "merged", "static": "static"}  # the same in `forwards`
# seconds of a guided turn of 50 steps with 10 memory videos on an H200
WHOLE_TURNS = {"joint, merged": 270, "static": 145}
COLUMNS = "config memory tokens steps forwards tflop seconds sampling sampling_own "
COLUMNS += "tflop_per_s peak_mib skipped"
Row = dict[str, Any]


def stage_seconds(session: Session, camera: str, **request: Any) -> tuple[Row, Row, float]:
    """A turn's report, and its seconds by stage with the VAE's two parts told apart.

    And those of the process while it was sampling, which other load on the machine leaves alone.
    """
    stages: dict[str, float] = {}
    began = 0.0

    def on_progress(event: Event) -> None:
        nonlocal began
        if isinstance(event, StageStarted) and event.stage == "sampling":
            began = time.process_time()
        if isinstance(event, StageDone):
            name = event.stage
            if name == "vae":
                name = "vae decode" if "sampling" in stages else "vae encode"
            # stages of one name add up in the event
            earlier = stages.get("vae encode", 0.0) if name == "vae decode" else 0.0
            stages[name] = event.seconds - earlier
            if name == "sampling":
                spent.append(time.process_time() - began)

    spent: list[float] = []
    turn = session.render(camera, on_progress=on_progress, **request)
    return turn.report, stages, spent[0]


def sessions(engine: Engine) -> dict[str, Session]:
    """One for each configuration, of one source."""
    sampling = engine.sampling
    camera = named_trajectory("static", sampling.num_frames, sampling.size)
    frames = render(make_world(WORLD), camera).frames
    return {
        name: engine.reconfigured(config).session(frames, fps=8.0)
        for name, config in CONFIGS.items()
    }


def engine_turns(engine: Engine, memory: Sequence[int], **request: Any) -> Iterator[Row]:
    """A row for every configuration and count of memory videos, each turn's own session's."""
    opened, cameras = sessions(engine), cycle(PRESETS)
    brief = request | {"num_inference_steps": 1, "guidance_scale": 1.0}
    for count in range(max(memory) + 1):
        camera = next(cameras)
        for config, session in opened.items():
            if count not in memory:
                session.render(camera, **brief)
                continue
            report, stages, own = stage_seconds(session, camera, **request)
            measured = report.get("peak_bytes") or report["process_peak_bytes"]
            peaks = {name: digits(peak / 2**20) for name, peak in measured.items()}
            yield {
                "config": config,
                "memory": len(report["memory"]["retrieved"]),
                "tokens": report["plan"]["tokens"],
                "steps": report["num_inference_steps"],
                "guidance_scale": report["guidance_scale"],
                "forwards": report["forwards"],
                "tflop": digits(report["flops"] / 1e12),
                "seconds": digits(sum(stages.values())),
                "sampling": digits(stages["sampling"]),
                "sampling_own": digits(own),
                "tflop_per_s": digits(report["flops"] / stages["sampling"] / 1e12),
                "stages": {name: digits(value) for name, value in stages.items()},
                "peak_mib": max(peaks.values()),
                "peak_mib_by_stage": peaks,
            }


def denoised_turns(
    setting: Setting, memory: Sequence[int], *, steps: int, guidance: float
) -> Iterator[Row]:
    """The denoising alone, on random latents."""
    for count in memory:
        for config, kind in KINDS.items():
            plan, spans = setting.plan(kind, count), Spans(setting.device)
            given = Inputs(setting, plan)
            denoiser = Denoiser(
                transformer=setting.transformer,
                plan=plan,
                conditioning=Conditioning(given.latents[1:], given.cameras, given.text, given.text),
                noise=given.latents[0],
                solver=make_solver("euler", steps, setting.sampling.flow_shift),
                guidance_scale=guidance,
            )
            with spans.stage("sampling"):
                for _ in denoise(denoiser, CancelToken()):
                    pass
            done = denoiser.result()
            total = turn_flops(plan, [r.step for r in done.records], done.work)["flops"]
            seconds = spans.seconds["sampling"]
            yield {
                "config": config,
                "memory": count,
                "tokens": plan.length,
                "steps": steps,
                "guidance_scale": guidance,
                "forwards": done.num_forwards,
                "tflop": digits(total / 1e12),
                "seconds": digits(seconds),
                "sampling": digits(seconds),
                "tflop_per_s": digits(total / seconds / 1e12),
                "stages": {"sampling": digits(seconds)},
                "peak_mib": digits(spans.peak_bytes["sampling"] / 2**20),
            }


def turns(device: torch.device, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of the model that is asked for, or that suits the device."""
    setting = chosen(device, args.model)
    is_full = setting.sampling.guidance_scale != 1
    steps = args.steps or setting.sampling.num_inference_steps
    if args.denoising:
        guidance = setting.sampling.guidance_scale
        yield from denoised_turns(setting, args.memory, steps=steps, guidance=guidance)
    elif importlib.util.find_spec("diffusers") is None:
        yield {"skipped": "diffusers, for the VAE, is not installed; see --denoising"}
    elif is_full:
        request = {"guidance_scale": setting.sampling.guidance_scale, "prompt": "a"}
        engine = random_engine(setting)
        yield from engine_turns(engine, args.memory, num_inference_steps=steps, **request)
    else:
        engine = Engine.from_pretrained("tiny-nvs", device=device)
        yield from engine_turns(engine, args.memory, num_inference_steps=steps)


def turn_arguments(parser: argparse.ArgumentParser) -> None:
    """What `turns` asks for."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=("tiny", "full"), help="else full on CUDA alone")
    parser.add_argument("--memory", type=int, nargs="+", default=(0, 1, 2, 3, 6, 10))
    parser.add_argument("--steps", type=int, help="of a measured turn; else the model's own")
    parser.add_argument("--denoising", action="store_true", help="on random latents, no VAE")


def targets(rows: Sequence[Row], device: torch.device) -> list[Row]:
    """A static turn with ten videos against a joint one with none; whole turns on an H200."""
    by_turn = {(row.get("config"), row.get("memory")): row for row in rows}
    ten, none = by_turn.get(("static", 10)), by_turn.get(("joint, merged", 0))
    ratios = []
    if ten and none and "sampling_own" in ten:
        ratios = [{"ratio": ten["sampling_own"] / none["sampling_own"]}]
    name = "static denoising with 10 memory videos / joint, merged, with none"
    found = [target(name, 1, ratios, "ratio", at_most=True)]
    for config, seconds in WHOLE_TURNS.items():
        turn = by_turn.get((config, 10))
        is_whole = turn is not None and device.type == "cuda" and turn["forwards"] == 100
        name = f"{config}: seconds of 50 guided steps with 10 memory videos on an H200"
        timed = [turn] if turn is not None and is_whole else []
        found.append(target(name, seconds, timed, "seconds", at_most=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    turn_arguments(parser)
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = existing_device(args.device)
    torch.set_num_threads(1)
    report = Report(args.out, provenance(device, args.commit) | {"threads": 1})
    began = time.monotonic()
    try:
        with torch.no_grad():
            for row in turns(device, args):
                report.add(what="turn", **row)
    # what ran before it stays
    except Exception as error:
        report.add(what="turn", skipped=reason(error))
    print(table(report.rows, COLUMNS))
    print(f"{time.monotonic() - began:.0f} s in all")
    found = targets(report.rows, device)
    for row in found:
        report.add(what="target", **row)
    print(f"\n{table(found, 'target wanted measured met')}")


if __name__ == "__main__":
    main()
