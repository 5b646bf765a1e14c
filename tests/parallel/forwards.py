"""Run by two processes: forwards over the ranks beside those of one, differences as JSON.

    forwards.py OUT

Every rank compares with what it computes alone, and writes OUT/rank<N>.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from mv2v_engine.config import TransformerConfig
from mv2v_engine.models.kept import ConditioningCache
from mv2v_engine.models.merging import MergeRecord
from mv2v_engine.parallel.context import ContextGroup
from mv2v_engine.parallel.ranks import is_of_the_group
from mv2v_engine.parallel.traffic import forward_traffic
from mv2v_engine.testing import tiny_config
from mv2v_engine.tokens.plan import TokenPlan, turn_plan
from tests.models.drawn import random_inputs, random_model

# 3 frames of 7x11 tokens: no number of them divides by 2
GRID = (3, 14, 22)
NO_CAMERA: dict[str, Any] = {"camera_conditioning": "none"}
EDITOR: dict[str, Any] = NO_CAMERA | {"in_channels": 8, "source_channels": 4}


def cases() -> Iterator[tuple[str, TokenPlan]]:
    """Plans of both tasks; three heads are two and one on two ranks."""
    three = tiny_config(num_attention_heads=3)
    prope = tiny_config(num_attention_heads=3, camera_attention="prope_fused")
    phases = tiny_config(num_attention_heads=3, camera_attention="phases", **NO_CAMERA)
    views: list[tuple[str, TransformerConfig, dict[str, Any]]] = [
        ("target alone", tiny_config(), {"source": False, "tokenizers": ()}),
        ("uneven heads", three, {"tokenizers": (4, 8), "merge": "off"}),
        ("merged", tiny_config(), {"tokenizers": (4, 8), "fraction": 0.5}),
        ("merged in joint scope", three, {"tokenizers": (4,), "fraction": 0.5, "scope": "joint"}),
        ("discarded", tiny_config(), {"tokenizers": (8,), "fraction": 0.5, "merge": "discard"}),
        ("static", tiny_config(), {"tokenizers": (4,), "merge": "off", "conditioning": "static"}),
        ("static, merged", three, {"tokenizers": (4, 8), "conditioning": "static"}),
        ("prope, merged", prope, {"tokenizers": (4, 8), "fraction": 0.5}),
        ("phases, merged", phases, {"tokenizers": (4, 8), "fraction": 0.5}),
        ("static, phases", phases, {"tokenizers": (4,), "merge": "off", "conditioning": "static"}),
        ("static, prope", prope, {"tokenizers": (4,), "merge": "off", "conditioning": "static"}),
    ]
    for name, config, changes in views:
        yield name, turn_plan(config, GRID, **changes)
    yield "edit", turn_plan(tiny_config(**EDITOR), GRID, (4, 8), fraction=0.5)
    yield "static edit", turn_plan(tiny_config(**EDITOR), GRID, (4,), conditioning="static")


def run(plan: TokenPlan, context: ContextGroup | None) -> tuple[list[Tensor], list[MergeRecord]]:
    """The velocities of a forward, and with static conditioning of a second one over the kept."""
    model = random_model(plan.shape)
    latents, timestep, text, cameras = random_inputs(plan)
    records: list[MergeRecord] = []
    kept = ConditioningCache(plan) if plan.conditioning == "static" else None
    given: dict[str, Any] = {"plan": plan, "cameras": cameras, "records": records}
    velocities = [model(latents, timestep, text, **given, kept=kept, ranks=context)]
    if kept is not None:
        again = ([0.5 * latents[0]], 0.5 * timestep, -text)
        velocities.append(model(*again, plan=plan, kept=kept, ranks=context))
    return velocities, records


def of_frames(context: ContextGroup | None) -> Tensor:
    """A batch of two targets, every frame at a timestep of its own."""
    plan = turn_plan(tiny_config(**EDITOR), GRID, ())
    model = random_model(plan.shape)
    latents, _, text, _ = random_inputs(plan, batch=2)
    timestep = torch.tensor([[100.0, 300.0, 500.0], [900.0, 600.0, 30.0]])
    velocity: Tensor = model(latents, timestep, text, plan=plan, ranks=context)
    return velocity


def compared(plan: TokenPlan, context: ContextGroup) -> dict[str, Any]:
    alone = run(plan, None)
    before = context.received_bytes
    shared = run(plan, context)
    steps = [record.step for record in shared[1]]
    counts = []
    for is_kept in (False, True)[: len(shared[0])]:
        parts = forward_traffic(plan, context.size, context.rank, 4, is_kept=is_kept, steps=steps)
        counts.append(sum(parts.values()))
    return {
        "differences": [
            float((a - b).norm() / a.norm()) for a, b in zip(alone[0], shared[0], strict=True)
        ],
        "merged": [record.merged.tolist() for record in shared[1]],
        "merged_alone": [record.merged.tolist() for record in alone[1]],
        # to the bit: what a rank chooses by
        "scores": [record.responsiveness.flatten().tolist() for record in shared[1]],
        "velocity": float(shared[0][-1].double().sum()),
        "received": context.received_bytes - before,
        "predicted": sum(counts),
    }


def absent(plan: TokenPlan) -> Iterator[tuple[bool, str]]:
    """What the first rank meets where the second does not come, by a group of short patience."""
    impatient = ContextGroup(dist.new_group(timeout=timedelta(seconds=1)))
    if impatient.rank:
        return
    try:
        impatient.take_largest(torch.zeros(plan.target.num_frames))
    except RuntimeError as error:
        yield is_of_the_group(error), str(error)


def refusal(work: Callable[[], object]) -> str:
    try:
        work()
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    store, rank, size = next(iter(rendezvous("env://")))
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=600)
    )
    context = ContextGroup(dist.group.WORLD)  # type: ignore[arg-type]
    result: dict[str, Any] = {}
    with torch.no_grad():
        for name, plan in cases():
            result[name] = compared(plan, context)
        alone, shared = of_frames(None), of_frames(context)
        result["timesteps of frames"] = {
            "differences": [float((alone - shared).norm() / alone.norm())]
        }
        single = turn_plan(tiny_config(num_attention_heads=1), GRID, (), merge="off")
        result["one head"] = refusal(lambda: run(single, context))
        minute = turn_plan(tiny_config(), (1, 2, 2), (), merge="off")
        result["one token"] = refusal(lambda: run(minute, context))
        result["absent"] = [list(of) for of in absent(single)]
    folder = Path(sys.argv[1])
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
