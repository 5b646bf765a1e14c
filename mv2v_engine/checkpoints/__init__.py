"""Checkpoints: tell the format, map the names, load in streams, save our own."""

from mv2v_engine.checkpoints.detect import Detected, detect, embedded_names
from mv2v_engine.checkpoints.inspect import Inspection, inspect_checkpoint, render_inspection
from mv2v_engine.checkpoints.load import (
    Checkpoint,
    LoadReport,
    load_checkpoint,
    save_checkpoint,
)

__all__ = [
    "Checkpoint",
    "Detected",
    "Inspection",
    "LoadReport",
    "detect",
    "embedded_names",
    "inspect_checkpoint",
    "load_checkpoint",
    "render_inspection",
    "save_checkpoint",
]
