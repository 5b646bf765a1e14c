"""What a full-size turn needs of a GPU's memory, by count: predicted before anything runs.

`python profiling/peak_memory.py [--out profiling/results/peak_memory.jsonl]`

The 1.3B shape with its VAE and UMT5-XXL in bfloat16, 81 frames of 480x832, as a turn's refusal and
its report's `predicted_peak_bytes` reckon it (`engine/budget.py`): tensors alive at once, by stage,
weights and latent memory included, without what libraries allocate inside an operation. Nothing
here has memory of its own, so it runs anywhere.
"""

from __future__ import annotations

from dataclasses import replace

from measure import Report, digits, report_predictions

from mv2v_engine.config import WAN_1_3B, SamplingConfig
from mv2v_engine.engine.budget import Footprint, predict, shape_footprint
from mv2v_engine.shapes import UMT5_XXL
from mv2v_engine.tokens.flops import conditioning_bytes
from mv2v_engine.tokens.plan import novel_view_plan

GIB = 1 << 30
COUNTS = (0, 3, 10)
COLUMNS = "memory conditioning merge text peak_gib fullest sampling_gib kept_gib fits_24_gib"


def full_size_parts() -> Footprint:
    """Wan 1.3B with cameras and memory, its VAE and UMT5-XXL in bfloat16."""
    return shape_footprint(WAN_1_3B, SamplingConfig(), {}, UMT5_XXL, cached=max(COUNTS) + 1)


def measure(report: Report) -> None:
    parts = full_size_parts()
    for memory in COUNTS:
        for conditioning in ("joint", "static"):
            for merge in ("conv", "off"):
                plan = novel_view_plan(memory=memory, conditioning=conditioning, merge=merge)
                for text in ("resident", "offloaded"):
                    placed = replace(parts, is_text_offloaded=text == "offloaded")
                    found = predict(placed, plan)
                    report.add(
                        memory=memory,
                        conditioning=conditioning,
                        merge=merge,
                        text=text,
                        peak_gib=digits(found.peak / GIB),
                        fullest=found.fullest,
                        stages_gib={k: digits(v / GIB) for k, v in found.stages.items()},
                        sampling_gib=digits(found.stages["sampling"] / GIB),
                        kept_gib=digits(conditioning_bytes(plan, 2) / GIB),
                        fits_24_gib=found.peak <= 24 * GIB,
                    )


if __name__ == "__main__":
    report_predictions(__doc__, measure, COLUMNS)
