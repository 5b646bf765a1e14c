"""All measures of one edited clip whose truth is known (METHOD 15).

T frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mv2v_engine.errors import VideoError
from mv2v_engine.evaluation.crown import crown_disagreement, crown_of
from mv2v_engine.evaluation.images import flicker, gradient_energy, masked_psnr
from mv2v_engine.evaluation.instruction_agreement import instruction_agreement
from mv2v_engine.evaluation.seams import seam_flicker
from mv2v_engine.evaluation.window_agreement import surface_disagreement, window_of_frame
from mv2v_engine.synthetic.edit_clips import EditClip, grown
from mv2v_engine.synthetic.surfaces import surface_points
from mv2v_engine.synthetic.worlds import HELD_OUT, NUM_WALLS

# apart from the worlds that the VAE and novel views are measured on
FIRST_EDIT_CLIP = HELD_OUT + 2_000_000

_BESIDE = 2  # pixels around the edited thing that belong to neither it nor the background

MEASURES = {
    "subject_error": "mean L1 (0..1) between windows of what they show of the edited thing, at the "
    "same points of it and freed of light; lower is better",
    "background_error": "the same of walls and floor outside the edit",
    "agreement": "share of windows or pixels that show what the instruction asks; 1 is best",
    "background_psnr": "PSNR in dB against the truth outside the edited thing",
    "psnr": "PSNR in dB against the truth everywhere; other valid choices score lower here",
    "energy": "gradient energy: the sum of squared steps from pixel to pixel; blur has little",
    "flicker": "(255 - mean |change between frames|) / 255; 1 is a still picture",
    "seam_ratio": "flicker at the windows' seams over flicker in the frames beside them, the "
    "source's own change taken out of both; 1 is a seam that nobody sees",
    "seam_flicker": "mean |change between frames| at seams, 0..1",
    "inner_flicker": "mean |change between frames| inside windows, 0..1",
}


class EditMeasurer:
    """Measures edits of one clip; what is true of the clip is worked out once.

    starts: the windows' first new frames, the first 0: what a window made and stitching dropped
    does not count.
    """

    def __init__(self, clip: EditClip, starts: Sequence[int]) -> None:
        self.clip, self.starts = clip, starts
        self._window_T = window_of_frame(clip.num_frames, starts)
        self._points = surface_points(clip.edit.world, clip.camera, clip.edited)
        self._outside = ~grown(clip.mask.cpu(), _BESIDE)
        self._crown = None
        if clip.instruction.kind == "hat":
            self._crown = crown_of(clip)
            # a hat of another shape is as valid
            self._outside &= ~self._crown.box
        self._walls = self._outside & (self._points.surface < NUM_WALLS)

    def measure(self, frames: Tensor) -> dict[str, float | None]:
        """Everything of `MEASURES`; None where the clip has nothing to measure it on.

        frames: the edit, uint8 [T, height, width, 3].

        Raises:
            VideoError: the frames are not of the clip's shape.
        """
        clip, window_T, points = self.clip, self._window_T, self._points
        if frames.shape != clip.source.frames.shape or frames.dtype != torch.uint8:
            raise VideoError(
                f"an edit of this clip is uint8 {list(clip.source.frames.shape)}, got "
                f"{frames.dtype} {list(frames.shape)}"
            )
        frames, truth = frames.cpu(), clip.edited.frames.cpu()
        seams = seam_flicker(frames, clip.source.frames.cpu(), self.starts)
        outside = self._outside
        psnr = masked_psnr(frames, truth, outside) if bool(outside.any()) else math.nan
        return {
            "subject_error": self._subject_error(frames),
            "background_error": surface_disagreement(frames, points, self._walls, window_T),
            "agreement": instruction_agreement(frames, clip, points, window_T, self._crown),
            "background_psnr": psnr if math.isfinite(psnr) else None,
            "psnr": masked_psnr(frames, truth),
            "energy": gradient_energy(frames),
            "flicker": flicker(frames),
            "seam_ratio": seams.ratio if seams else None,
            "seam_flicker": seams.seam if seams else None,
            "inner_flicker": seams.inside if seams else None,
        }

    def _subject_error(self, frames: Tensor) -> float | None:
        clip, window_T = self.clip, self._window_T
        if self._crown is not None:
            return crown_disagreement(frames, clip, self._crown, window_T)
        if not clip.instruction.is_open:
            return None
        return surface_disagreement(frames, self._points, clip.edited_mask.cpu(), window_T)
