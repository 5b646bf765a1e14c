"""What a turn of few steps takes by count, beside one of 50 guided steps, and the VAE's share.

`python profiling/few_steps.py [--out profiling/results/few_steps.jsonl]`

Wan2.1 1.3B at 480x832, 81 frames, a source and ten remembered videos; merged as a Memory-V2V model
merges. A turn of static conditioning runs one forward over everything, and the rest over its target
alone, so its first forward weighs the more the fewer follow. The VAE's FLOPs are counted on tensors
without memory: a turn decodes 81 frames, and the first one of a session encodes its source too.
Nothing is timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from measure import Report, current_commit, digits, table
from torch.utils.flop_counter import FlopCounterMode

from mv2v_engine.config import FAST, WAN_1_3B, ConditioningMode, SamplingConfig
from mv2v_engine.defaults import without_memory
from mv2v_engine.models.autoencoder import Autoencoder
from mv2v_engine.tokens.flops import exact_work, work_flops
from mv2v_engine.tokens.plan import TokenPlan, window_plan

SIZE, FRAMES, MEMORIES = (480, 832), 81, 10
COLUMNS = "case forwards pflop guided_by vae_decode_percent vae_encode_percent"
GUIDED = SamplingConfig()


def plan(conditioning: ConditioningMode) -> TokenPlan:
    """The plan of the turn that is counted."""
    return window_plan(
        memory=MEMORIES,
        frames=FRAMES,
        size=SIZE,
        conditioning=conditioning,
        shape=WAN_1_3B,
        spatial_stride=8,
    )


def sampling_flops(conditioning: ConditioningMode, forwards: int) -> int:
    """FLOPs of all forwards of a turn."""
    of = plan(conditioning)
    counts = exact_work(of, forwards)
    return sum(count * work_flops(of, kind) for kind, count in counts.items())


def vae_flops() -> tuple[int, int]:
    """FLOPs of Wan2.1's VAE on the turn's frames: encoding them, decoding them."""
    with without_memory():
        vae = Autoencoder(None).eval()
    pixels = torch.empty(1, 3, FRAMES, *SIZE, device="meta")
    found = []
    with torch.no_grad():
        for run, given in ((vae.encode, pixels), (vae.decode, None)):
            latents = torch.empty(1, 16, 21, SIZE[0] // 8, SIZE[1] // 8, device="meta")
            with FlopCounterMode(display=False) as counter:
                run(latents if given is None else given)
            found.append(counter.get_total_flops())
    return found[0], found[1]


def rows() -> list[dict[str, Any]]:
    encode, decode = vae_flops()
    result = []
    for conditioning in ("joint", "static"):
        guided = sampling_flops(conditioning, 2 * GUIDED.num_inference_steps)
        cases = {f"{GUIDED.num_inference_steps} guided": 2 * GUIDED.num_inference_steps}
        cases |= {f"--fast {name}": own["num_inference_steps"] for name, own in FAST.items()}
        for case, forwards in cases.items():
            own = sampling_flops(conditioning, forwards)
            result.append(
                {
                    "case": f"{case}, {conditioning}",
                    "forwards": forwards,
                    "pflop": digits(own / 1e15),
                    "guided_by": digits(guided / own),
                    "vae_decode_percent": digits(100 * decode / (own + decode)),
                    "vae_encode_percent": digits(100 * encode / (own + encode + decode)),
                }
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = Report(args.out, {"counted": True, "commit": current_commit()})
    for row in rows():
        report.add(**row)
    print(table(report.rows, COLUMNS))


if __name__ == "__main__":
    main()
