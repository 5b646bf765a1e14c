"""What small weights do not know, said of a source and of a prompt in one sentence each.

The embedded checkpoints were trained on procedural worlds alone, and say so in their `mv2v.json`
(`Knowledge`); weights that say nothing are taken to know everything.
"""

from __future__ import annotations

import math
import re
import unicodedata

import torch
from torch import Tensor

from mv2v_engine.checkpoints.load import Checkpoint
from mv2v_engine.vae import VideoVAE

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_SHOWN_WORDS, _SHOWN_LETTERS = 5, 30


def source_warnings(checkpoint: Checkpoint, vae: VideoVAE, frame: Tensor) -> tuple[str, ...]:
    """A sentence if a source is unlike what the weights were trained on, else nothing.

    The statistic is the error of the VAE, which saw the same videos as the transformer: what it
    cannot give back, the transformer cannot draw. Its rate of false alarms is measured by
    `profiling/known_sources.py`.

    Args:
        frame: the first that the model sees, uint8 [height, width, 3].
    """
    least = checkpoint.knowledge.source_psnr
    if least is None:
        return ()
    reached = round_trip_psnr(vae, frame)
    if reached >= least:
        return ()
    return (
        f"this video is unlike those that {checkpoint.name} was trained on: its VAE reproduces the "
        f"first frame at {reached:.1f} dB, and theirs at {least:g} dB or more; expect a blurred "
        "result",
    )


def round_trip_psnr(vae: VideoVAE, frame: Tensor) -> float:
    """PSNR in decibels of one frame, uint8 [height, width, 3], encoded and decoded."""
    again = vae.decode(vae.encode(frame[None]))[0]
    error = (again.to(torch.float64) - frame.to(torch.float64)).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def prompt_warnings(checkpoint: Checkpoint, prompt: str) -> tuple[str, ...]:
    """A sentence that names the words that the weights never read in training, else nothing."""
    known = set(checkpoint.knowledge.words)
    if not known:
        return ()
    # an accent of its own would cut a word in two
    words = {word.lower(): word for word in _WORD.findall(unicodedata.normalize("NFC", prompt))}
    found = [word for lower, word in words.items() if lower not in known]
    if not found:
        return ()
    shown = ", ".join(repr(word[:_SHOWN_LETTERS]) for word in found[:_SHOWN_WORDS])
    more = len(found) - _SHOWN_WORDS
    return (
        f"{checkpoint.name} was trained without the word{'s' * (len(found) > 1)} {shown}"
        f"{f' and {more} more' if more > 0 else ''}, and does not know what is meant",
    )
