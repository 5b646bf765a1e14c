"""What turns of the known full-size checkpoints take, by count: from shapes, before anything runs.

`python profiling/model_costs.py [--out profiling/results/models.jsonl]`

Tokens, FLOPs and predicted peaks of `run models` (`mv2v_engine/catalogue.py`), a row a number of
memory videos: all steps of a turn at the checkpoint's defaults, guidance included.
"""

from __future__ import annotations

from measure import Report, digits, report_predictions

from mv2v_engine.catalogue import known_models

COUNTS = (0, 3, 10)
COLUMNS = "model memory tokens forwards pflop peak_gib peak_gib_text_resident disk_bytes licence"


def measure(report: Report) -> None:
    for model in known_models():
        if model.files:  # embedded, and measured as it is
            continue
        for memory in COUNTS if model.remembers else COUNTS[:1]:
            cost = model.cost(memory)
            rounded = {
                name: digits(value) for name, value in cost.items() if isinstance(value, float)
            }
            report.add(
                **{**cost, **rounded},
                disk_bytes=model.disk_bytes,
                components=model.components,
                licence=model.licence,
            )


if __name__ == "__main__":
    report_predictions(__doc__, measure, COLUMNS)
