"""Does an edit do what the words ask: any valid choice counts in full.

Every measure is the share, 0 to 1, of the windows that show the thing asked about, or of pixels;
the true edit and every other valid choice score 1 or nearly so, the unedited source nearly 0.

T frames, P pixels.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from mv2v_engine.evaluation.crown import Crown, added_share
from mv2v_engine.synthetic.colours import COLOUR_NAMES, colour_index
from mv2v_engine.synthetic.edit_clips import EditClip
from mv2v_engine.synthetic.surfaces import SurfacePoints

_FEWEST_PIXELS = 64  # in a window; fewer show nothing of the thing
_REPAINTED_FROM = 0.1  # mean change of own colour
_TWO_TONED_FROM = 0.12  # standard deviation along the colours' main axis
_STRIPED_FROM, _CHECKED_BELOW = 0.7, 0.6  # variance that bands across one direction explain
_BAND = 0.04  # metres
_HAT_FROM = 0.1  # share of the place above the target
_DIFFERS_FROM = 0.06  # a pixel where source and truth differ enough to tell which is nearer


def instruction_agreement(
    frames: Tensor,
    clip: EditClip,
    points: SurfacePoints,
    window_T: Tensor,
    crown: Crown | None = None,
) -> float | None:
    """How far the frames follow the clip's instruction, 0 to 1; None if nothing shows its target.

    frames: uint8 [T, height, width, 3]. points: of the edited clip. crown: of the clip, for hats.
    """
    kind = clip.instruction.kind
    if kind == "remove":
        return _removed(frames, clip)
    if kind == "hat":
        if crown is None:
            raise ValueError("an instruction about a hat is measured on the clip's crown, got None")
        share = added_share(frames, clip, crown)
        shown = [share[crown.visible & (window_T == w)] for w in range(int(window_T.max()) + 1)]
        return _mean([float(window.mean() > _HAT_FROM) for window in shown if len(window)])
    albedo = points.albedo(frames)
    before = points.albedo(clip.source.frames.cpu())
    scores = []
    for window in range(int(window_T.max()) + 1):
        mask = clip.edited_mask.cpu() & points.whole & (window_T == window)[:, None, None]
        if int(mask.sum()) < _FEWEST_PIXELS:
            continue
        if kind == "colour":
            asked = COLOUR_NAMES.index(clip.instruction.value)
            scores.append(float((colour_index(albedo[mask]) == asked).float().mean()))
        elif kind == "paint":
            change = (albedo[mask].mean(0) - before[mask].mean(0)).abs().mean()
            scores.append(float(change >= _REPAINTED_FROM))
        else:
            found = found_pattern(albedo[mask], points.point[mask])
            scores.append(float(found == clip.instruction.value))
    return _mean(scores)


def found_pattern(colours_P3: Tensor, points_P3: Tensor) -> str:
    """ "striped", "checked" or "" by own colours at points of an object, in its axes.

    Stripes are two tones that bands across some direction explain; checks are two tones that no
    such bands do.
    """
    centred = colours_P3 - colours_P3.mean(0)
    axis = torch.linalg.eigh(centred.T @ centred)[1][:, -1]
    tone_P = centred @ axis
    variance = float(tone_P.var(correction=0))
    if variance < _TWO_TONED_FROM**2:
        return ""
    explained = max(_explained(tone_P, points_P3 @ direction) for direction in _directions())
    if explained >= _STRIPED_FROM:
        return "striped"
    return "checked" if explained < _CHECKED_BELOW else ""


def _directions() -> Tensor:
    """Thirteen directions: edges, face and space diagonals of a cube."""
    triples = [t for t in product((-1.0, 0.0, 1.0), repeat=3) if t > (0.0, 0.0, 0.0)]
    return torch.nn.functional.normalize(torch.tensor(triples), dim=-1)


def _explained(tone_P: Tensor, position_P: Tensor) -> float:
    """Share of the tones' variance that lies between bands of one position."""
    band = ((position_P - position_P.min()) / _BAND).long()
    total = torch.zeros(int(band.max()) + 1, dtype=torch.float64)
    count = torch.zeros_like(total)
    total.index_add_(0, band, tone_P.double())
    count.index_add_(0, band, torch.ones_like(tone_P, dtype=torch.float64))
    between = (total**2 / count.clamp_min(1)).sum() / len(tone_P)
    return float(between / tone_P.double().var(correction=0))


def _removed(frames: Tensor, clip: EditClip) -> float | None:
    """Share of the target's pixels that are nearer to what lies behind it than to the target."""
    source, truth = clip.source.frames.cpu().float(), clip.edited.frames.cpu().float()
    telling = (source - truth).abs().mean(-1) > 255 * _DIFFERS_FROM
    telling &= clip.source_mask.cpu()
    if int(telling.sum()) < _FEWEST_PIXELS:
        return None
    to_truth = (frames.float() - truth).abs().mean(-1)[telling]
    to_source = (frames.float() - source).abs().mean(-1)[telling]
    return float((to_truth < to_source).float().mean())


def _mean(scores: list[float]) -> float | None:
    return sum(scores) / len(scores) if scores else None
