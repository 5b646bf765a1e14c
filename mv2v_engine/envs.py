"""Every environment variable that the engine reads, typed, with its default. Read nowhere else."""

from __future__ import annotations

import os
import re

from mv2v_engine.errors import RequestError


def num_threads() -> int | None:
    """MV2V_NUM_THREADS: CPU threads of the command line; unset leaves torch's choice."""
    text = os.environ.get("MV2V_NUM_THREADS", "")
    if not text:
        return None
    if not text.isdigit() or int(text) < 1:
        raise RequestError(f"MV2V_NUM_THREADS must be a positive integer, got {text!r}")
    return int(text)


def launched_rank() -> tuple[int, int] | None:
    """RANK and WORLD_SIZE: this process and how many torchrun started; None without both."""
    texts = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if not all(texts):
        return None
    if not all(text.isdigit() for text in texts) or not int(texts[0]) < int(texts[1]):
        raise RequestError(
            f"RANK and WORLD_SIZE must be numbers, the first the lower, got {texts[0]!r} and "
            f"{texts[1]!r}; torchrun sets them"
        )
    return int(texts[0]), int(texts[1])


def local_rank() -> int:
    """LOCAL_RANK: this process among those on its machine; 0 without torchrun."""
    text = os.environ.get("LOCAL_RANK", "0")
    if not text.isdigit():
        raise RequestError(f"LOCAL_RANK must be a number, got {text!r}; torchrun sets it")
    return int(text)


def is_ci() -> bool:
    """CI: set by continuous integration; progress bars then print lines instead of redrawing."""
    return os.environ.get("CI", "") not in ("", "0", "false")


def has_true_colours() -> bool:
    """COLORTERM: whether a terminal says that it has 24-bit colours; NO_COLOR forbids them."""
    is_able = os.environ.get("COLORTERM", "").strip().lower() in ("truecolor", "24bit")
    return is_able and not os.environ.get("NO_COLOR")


def serving_tokens() -> tuple[str, ...]:
    """MV2V_TOKENS: bearer tokens of the service, apart by spaces or commas; unset is none."""
    return tuple(filter(None, re.split(r"[\s,]+", os.environ.get("MV2V_TOKENS", ""))))


def webhook_secret() -> str | None:
    """MV2V_WEBHOOK_SECRET: by which the service signs callbacks, whsec_ and base64."""
    return os.environ.get("MV2V_WEBHOOK_SECRET", "").strip() or None


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment with some variables set, for a process to start."""
    return {**os.environ, **changes}


def traces_exporter() -> str | None:
    """OTEL_TRACES_EXPORTER: where OpenTelemetry sends spans; unset and "none" are no traces."""
    text = os.environ.get("OTEL_TRACES_EXPORTER", "").strip()
    return None if text in ("", "none") else text


def keep_ray_quiet() -> None:
    """RAY_USAGE_STATS_ENABLED: what Ray reports to its makers; nothing unless it is set."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
