"""Our forward beside others of the same weights and tokens, in one run; outputs are compared.

`python profiling/compare_peers.py [--device cpu] [--out profiling/results/peers.jsonl]`

diffusers: `WanTransformer3DModel`, the target alone, without cameras. ReCamMaster's way: target
and source at 1x2x2, the target's camera on both, everything joint, no memory, in blocks of plain
eager PyTorch (`eager_block.py`). Below it our turns with memory, against that same forward. On a
CPU the shape and weights of `tiny-nvs` on one thread (seconds of the process) and on two; on
CUDA the 1.3B shape with random weights. `speedup` is a peer's time over ours within a round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from eager_block import EagerBlock
from forwards import Inputs, Setting, chosen, flops
from measure import Report, Timer, digits, existing_device, installed, provenance, reason, table
from targets import target
from torch import Tensor

from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.sample import Sample
from mv2v_engine.testing import relative_error
from mv2v_engine.tokens.plan import turn_plan

MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
SPEEDUP = 1.2
TURNS = (("merged", 0), ("merged", 3), ("merged", 10), ("static", 10))
COLUMNS = "threads peer ours tokens our_tokens gflop our_gflop ms our_ms speedup "
COLUMNS += "relative_error skipped"
Run = Callable[[], Tensor]


def with_config(setting: Setting, **changes: Any) -> Setting:
    """The same weights under another configuration, as far as that has them."""
    weights = setting.transformer.state_dict()
    config = replace(setting.transformer.config, **changes)
    with torch.device("meta"):
        model = MV2VTransformer(config)
    own = {name: tensor for name, tensor in weights.items() if name in model.state_dict()}
    model.load_state_dict(own, assign=True)
    model.eval().requires_grad_(False).set_backend(setting.transformer.backend)
    return replace(setting, transformer=model)


def diffusers_forward(setting: Setting, given: Inputs) -> Run:
    """diffusers' model on our weights, in the dtypes that its `from_pretrained` leaves.

    Raises:
        ImportError: diffusers is not installed.
    """
    from diffusers import WanTransformer3DModel

    config = setting.transformer.config
    with torch.device(setting.device):
        model: Any = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=config.eps,
        )
    model.load_state_dict(setting.transformer.state_dict(), assign=True)
    model.eval().requires_grad_(False)
    latents = given.latents[0].to(setting.transformer.patch_embedding.weight.dtype)

    def run() -> Tensor:
        out: Tensor = model(
            hidden_states=latents,
            timestep=given.timestep,
            encoder_hidden_states=given.text,
            return_dict=False,
        )[0]
        return out

    return run


def eager_forward(setting: Setting, given: Inputs) -> Run:
    """The plan's forward in eager blocks; embedding and head are ours, a hundredth of it."""
    model, plan = setting.transformer, given.plan
    assert given.cameras is not None
    sample = Sample(
        latents=given.latents,
        timestep=given.timestep,
        encoder_hidden_states=given.text,
        plan=plan,
        cameras=given.cameras,
    )
    sequence = model._embed(sample)
    # torch's own choice on a CPU; on CUDA the library that ours uses
    attention = "reference" if setting.device.type == "cpu" else "auto"
    blocks = [
        EagerBlock(block, sequence, attention_backend=attention)  # type: ignore[arg-type]
        for block in model.blocks
    ]

    def run() -> Tensor:
        entering = model._embed(sample)
        x, text = entering.x, entering.text
        assert text is not None
        for block in blocks:
            x = block(x, entering.temb_6, text, entering.cameras)
        return model._velocity(x[:, : plan.target.length], entering.temb, plan)

    return run


def recammaster(setting: Setting) -> tuple[Setting, Inputs]:
    """Its configuration of our weights, and inputs of its plan."""
    theirs = with_config(setting, camera_conditioning="target", tokenizers=(2,), merger=None)
    grid = setting.plan("dynamic", 0).target.grid
    plan = turn_plan(theirs.transformer.config, grid, (), merge="off")
    given = Inputs(theirs, plan)
    assert given.cameras is not None
    given.cameras = given.cameras[:, :1]
    return theirs, given


def compare(
    peer: Run, ours: Sequence[Run], timer: Timer, count: int
) -> tuple[list[float], list[list[float]]]:
    """Seconds of the peer by round, and of each of ours."""
    for run in ours:
        run()
    rounds = timer.rounds([peer, *ours], count)
    columns = [list(column) for column in zip(*rounds, strict=True)]
    return columns[0], columns[1:]


def measure(setting: Setting, timer: Timer, report: Report, rounds: int, **common: Any) -> None:
    alone = with_config(setting, camera_conditioning="none", tokenizers=(), merger=None)
    grid = setting.plan("dynamic", 0).target.grid
    target_only = Inputs(alone, turn_plan(alone.transformer.config, grid, (), source=False))
    theirs, given = recammaster(setting)
    turns = {
        f"{kind}, {memory} memory videos": Inputs(setting, setting.plan(kind, memory))
        for kind, memory in TURNS
    }
    # a peer, how to make it, and ours: inputs by name, the first of which computes the same
    same = "the same"
    peers: list[tuple[str, Callable[[], Run], dict[str, Inputs]]] = [
        ("diffusers", lambda: diffusers_forward(alone, target_only), {same: target_only}),
        ("ReCamMaster", lambda: eager_forward(theirs, given), {same: given} | turns),
    ]
    for name, make, ours in peers:
        equal = ours[same]
        row: dict[str, Any] = common | {"peer": name, "tokens": equal.plan.length}
        try:
            peer = make()
            error = relative_error(equal.later(), peer())
            if not error <= MAX_ERROR[setting.transformer.patch_embedding.weight.dtype]:
                raise ValueError(f"it is off by {error:.3g} from ours: not timed")
            their_times, our_times = compare(
                peer, [one.later for one in ours.values()], timer, rounds
            )
        # a library that is missing, or that refuses, is the result of its row
        except Exception as failed:
            report.add(**row, skipped=reason(failed))
            continue
        for (label, one), times in zip(ours.items(), our_times, strict=True):
            report.add(
                **row,
                ours=label,
                our_tokens=one.plan.length,
                gflop=digits(flops(equal.plan, later=True) / 1e9),
                our_gflop=digits(flops(one.plan, later=True) / 1e9),
                ms=digits(median(their_times) * 1e3),
                our_ms=digits(median(times) * 1e3),
                speedup=digits(median(a / b for a, b in zip(their_times, times, strict=True))),
                relative_error=digits(error) if one is equal else None,
            )


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Targets of a CPU's rows; the slowest number of threads counts."""

    def of(peer: str, ours: str) -> list[dict[str, Any]]:
        wanted = (peer, ours)
        return [row for row in rows if (row.get("peer"), row.get("ours")) == wanted]

    static = of("ReCamMaster", "static, 10 memory videos")
    return [
        target(
            "target only on a CPU, x diffusers", SPEEDUP, of("diffusers", "the same"), "speedup"
        ),
        target("a static step with 10 memory videos, x ReCamMaster's", 1, static, "speedup"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=("tiny", "full"), help="else full on CUDA alone")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of a CPU")
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = existing_device(args.device)
    setting = chosen(device, args.model)
    notes = {"model": setting.name, "rounds": args.rounds, "diffusers": installed("diffusers")}
    report = Report(args.out, provenance(device, args.commit) | notes)
    for threads in args.threads if device.type == "cpu" else [1]:
        torch.set_num_threads(threads)
        # the process's seconds are those of all its threads
        clock = time.process_time if threads == 1 else time.perf_counter
        timer = Timer(device, seconds=0.0, clock=clock)
        with torch.no_grad():
            measure(setting, timer, report, args.rounds, threads=threads)
    print(table(report.rows, COLUMNS))
    found = targets(report.rows) if device.type == "cpu" else []
    for row in found:
        report.add(**row)
    print(f"\n{table(found, 'target wanted measured met')}")


if __name__ == "__main__":
    main()
