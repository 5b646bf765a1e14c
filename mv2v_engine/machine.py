"""What `run info` tells: versions, devices, and which backends are missing and why."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from mv2v_engine import __version__, envs
from mv2v_engine.checkpoints import embedded_names
from mv2v_engine.config import BackendName
from mv2v_engine.engine.capture import open_recorder
from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.ops import native
from mv2v_engine.ops.attention_backends import availability
from mv2v_engine.ops.backend import OPS, missing_reason, resolve

_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "ftfy",
    "safetensors",
    "numpy",
    "av",
    "scenedetect-headless",
    "triton",
    "flash_attn",
    "xformers",
    "nvtx",
)


def describe_machine() -> str:
    """Everything that a report of a problem should contain, as plain text."""
    sections = {
        "version": [f"mv2v_engine {__version__}"],
        "python": [f"{platform.python_version()} on {platform.platform()}"],
        "packages": [f"{name} {_version(name)}" for name in _PACKAGES],
        "devices": _devices(),
        "backends": _backends(),
        "attention": _attention(),
        "graphs": [_graphs()],
        "native": [native.describe("cpu"), native.describe("cuda")],
        "checkpoints": list(embedded_names()) or ["none embedded"],
        "environment": _environment(),
    }
    lines = []
    for title, facts in sections.items():
        for index, fact in enumerate(facts):
            lines.append(f"{'' if index else title:<13}{fact}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    cpu = f"cpu: {torch.get_num_threads()} threads, {platform.machine()}"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = f"no device found by CUDA {built}" if built else "this torch is built without it"
        return [cpu, f"cuda: none, {reason}"]
    found = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index}: {card.name}, {card.total_memory / 2**30:.1f} GiB, "
            f"capability {card.major}.{card.minor}"
        )
    return [cpu, *found]


def _backends() -> list[str]:
    """Each backend with what it lacks; operations that lack the same thing share a line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [f"auto: {resolve('auto', device)} on {device.type}", "reference: every operation"]
    backends: tuple[BackendName, ...] = ("native", "triton", "cuda")
    for backend in backends:
        by_reason: dict[str | None, list[str]] = {}
        for op in OPS:
            by_reason.setdefault(missing_reason(backend, op, device), []).append(op)
        for reason, ops in by_reason.items():
            which = "every operation" if len(ops) == len(OPS) else ", ".join(ops)
            lines.append(f"{backend}: {which}" + (f" missing: {reason}" if reason else ""))
    return lines


def _attention() -> list[str]:
    """The library that each form of attention takes for Wan's heads, and what the others lack."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dense, packed = (availability(device, packed=packed) for packed in (False, True))
    taken = [
        next((name for name, reason in found.items() if reason is None), "reference")
        for found in (dense, packed)
    ]
    by_reason: dict[str, list[str]] = {}
    for name in dense:
        if dense[name] == packed[name]:
            found = {name: dense[name]}
        else:
            found = {f"{name} (dense)": dense[name], f"{name} (packed)": packed[name]}
        for which, reason in found.items():
            if reason is not None:
                by_reason.setdefault(reason, []).append(which)
    for name, reason in availability(device, approximate=True).items():
        if reason is not None:
            by_reason.setdefault(reason, []).append(f"{name} (approximate, by name alone)")
    return [
        f"auto: {taken[0]} (dense), {taken[1]} (packed) on {device.type}",
        *(f"{', '.join(names)} missing: {reason}" for reason, names in by_reason.items()),
    ]


def _graphs() -> str:
    """Whether steps can be captured here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        open_recorder(device)
    except KernelUnavailableError as error:
        return f"auto: no step is captured: {error}"
    return "auto: steps are captured where launches and not products bound them"


def _environment() -> list[str]:
    lines = []
    for read in (envs.num_threads, envs.is_ci):
        name, _, meaning = (read.__doc__ or "").partition(": ")
        value = read()
        lines.append(f"{name} {'unset' if value is None else value}: {meaning}")
    return lines
