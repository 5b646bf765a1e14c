"""What of a full-size turn fits 8, 12, 16 and 24 GiB, by count: eight bits, offloaded blocks.

`python profiling/small_memory.py [--out profiling/results/small_memory.jsonl]`

The 1.3B shape with cameras and memory, the same as wide and deep as Wan2.1 14B, and the 5B shape of
edits, each with its VAE in bfloat16, 81 frames of 480x832, ten remembered videos, as the engine
predicts its own turns (`engine/budget.py`). The text encoder is on the device while a prompt is
encoded alone (`text_offload`); a session's later turns of the same prompt are without that stage.
No GPU has confirmed it.
"""

from __future__ import annotations

from dataclasses import replace

from measure import Report, digits, report_predictions

from mv2v_engine.catalogue import KnownModel, known_models
from mv2v_engine.config import Offload, QuantizeName
from mv2v_engine.engine.budget import predict, shape_footprint
from mv2v_engine.shapes import LUCY_5B, WAN_1_3B

GIB = 1 << 30
CARDS, MEMORY = (8, 12, 16, 24), 10
# weights, the text encoder's, where the blocks wait
WAYS: tuple[tuple[QuantizeName | None, QuantizeName | None, Offload | None], ...] = (
    (None, None, None),
    ("int8", None, None),
    ("int8", "int8", None),
    (None, "int8", "blocks"),
    ("int8", "int8", "blocks"),
)
COLUMNS = "model weights text offload transformer_gib peak_gib fullest later_gib fits fits_later"


def shapes() -> dict[str, KnownModel]:
    """The sizes, with memory."""
    known = {model.name: model for model in known_models()}
    editor = known["decart-ai/Lucy-Edit-Dev"]
    small = known["DHCAI/Memory-V2V:memoryv2v.ckpt"]
    wide = replace(
        WAN_1_3B, num_layers=40, num_attention_heads=40, ffn_dim=13_824, merge_blocks=None
    )
    return {
        "1.3B": small,
        "5B": replace(editor, shape=LUCY_5B),
        "14B": replace(small, shape=wide),
    }


def smallest(count: int) -> int | None:
    """The smallest card, in GiB, that a peak fits; None: none of them."""
    return next((card for card in CARDS if count <= card * GIB), None)


def measure(report: Report) -> None:
    for name, model in shapes().items():
        plan = model.plan(MEMORY)
        for weights, text, offload in WAYS:
            parts = shape_footprint(
                model.shape,
                model.sampling,
                model.vae,
                model.text,
                cached=MEMORY + 1,
                quantize=weights,
                quantize_text=text,
                offload=offload,
            )
            found = predict(replace(parts, is_text_offloaded=True), plan)
            later = max(count for stage, count in found.stages.items() if stage != "text")
            report.add(
                model=name,
                memory=MEMORY,
                weights=weights or "bfloat16",
                text=text or "bfloat16",
                offload=offload,
                transformer_gib=digits(parts.transformer / GIB),
                peak_gib=digits(found.peak / GIB),
                fullest=found.fullest,
                stages_gib={k: digits(v / GIB) for k, v in found.stages.items()},
                later_gib=digits(later / GIB),
                fits=smallest(found.peak),
                fits_later=smallest(later),
            )


if __name__ == "__main__":
    report_predictions(__doc__, measure, COLUMNS)
