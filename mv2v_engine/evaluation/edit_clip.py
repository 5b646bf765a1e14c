"""One clip measured: every row's edit of it, against what is true of the clip.

T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mv2v_engine.engine.engine import Engine
from mv2v_engine.evaluation.edit_protocol import EditProtocol, EditRow
from mv2v_engine.evaluation.editing_measures import EditMeasurer
from mv2v_engine.evaluation.fifo import edit_fifo
from mv2v_engine.evaluation.frame_features import frame_consistency
from mv2v_engine.evaluation.parallel import Measures
from mv2v_engine.synthetic.edit_clips import EditClip, make_edit_clip
from mv2v_engine.video.windows import EditWindow, edit_windows
from mv2v_engine.vision import CLIP, DINO, FrameEncoder, load_frame_encoder


@dataclass(frozen=True, eq=False)
class ClipResult:
    """`measures` is plain data, what a clip's file holds; the rest is for pictures.

    frames: by row [T, height, width, 3], "source" and "truth" among them.
    """

    measures: Measures
    frames: dict[str, Tensor]
    clip: EditClip
    windows: tuple[EditWindow, ...]


@dataclass(frozen=True, eq=False)
class _Edited:
    """An edit: frames [T, height, width, 3]; FLOPs and seconds of denoising the whole clip."""

    frames: Tensor
    flops: int
    seconds: float


class ClipEvaluator:
    """Measures clips on one checkpoint. `engine` gives the weights; rows configure their own.

    Raises:
        CheckpointError: a folder of `dino` or `clip` cannot be used.
    """

    def __init__(self, engine: Engine, protocol: EditProtocol) -> None:
        self.engine, self.protocol = engine, protocol
        self.engines = {
            row.name: engine.reconfigured(row.configure(engine.config))
            for row in protocol.chosen_rows
        }
        folders = {"dino_f": (protocol.dino, DINO), "clip_f": (protocol.clip, CLIP)}
        self._encoders: dict[str, FrameEncoder] = {
            name: load_frame_encoder(folder, device=engine.device, kinds=kinds)
            for name, (folder, kinds) in folders.items()
            if folder is not None
        }

    def measure(self, seed: int) -> ClipResult:
        """Every row on the clip of a seed."""
        protocol, sampling = self.protocol, self.engine.sampling
        num_frames = protocol.windows_of(seed) * sampling.num_frames
        clip = make_edit_clip(
            seed,
            num_frames=num_frames,
            size=sampling.size,
            kind=protocol.kind_of(seed),
            grade=protocol.grade,
        )
        source, truth = clip.source.frames.cpu(), clip.edited.frames.cpu()
        windows = edit_windows(num_frames, sampling.num_frames)
        measurer = EditMeasurer(clip, [window.first_new for window in windows])
        # encoded and decoded window by window: the best that a denoiser can do
        vae = self.engine.vae
        decoded = [vae.decode(vae.encode(truth[list(window.indices)])) for window in windows]
        frames = {"source": source, "truth": truth, "vae": _stitched(decoded, windows)}
        references = {name: self._quality(video, measurer) for name, video in frames.items()}
        rows = {}
        for row in protocol.chosen_rows:
            edited = self._edit(row, clip, source, windows)
            frames[row.name] = edited.frames
            cost = {"flops": edited.flops, "seconds": round(edited.seconds, 4)}
            rows[row.name] = {**self._quality(edited.frames, measurer), **cost}
        about = {
            "seed": seed,
            "kind": clip.instruction.kind,
            "prompt": clip.prompt,
            "windows": len(windows),
        }
        return ClipResult({**about, "rows": rows, "references": references}, frames, clip, windows)

    def _edit(
        self, row: EditRow, clip: EditClip, source: Tensor, windows: Sequence[EditWindow]
    ) -> _Edited:
        engine, steps = self.engines[row.name], self.protocol.steps
        # windows draw noise of their own from it, equal in all rows
        given: dict[str, Any] = {"seed": clip.seed, "num_inference_steps": steps}
        if row.method == "fifo":
            edit = edit_fifo(engine, source, clip.prompt, **given)
            return _Edited(edit.frames, edit.report["flops"], edit.report["seconds"]["sampling"])
        given["memory"] = row.memory
        if row.method == "session":
            return _edited(engine, source, clip.prompt, given)
        # a clip of one window begins with the request's own noise
        alone = [
            _edited(engine, source[list(window.indices)], clip.prompt, given) for window in windows
        ]
        return _Edited(
            _stitched([edit.frames for edit in alone], windows),
            sum(edit.flops for edit in alone),
            sum(edit.seconds for edit in alone),
        )

    def _quality(self, frames: Tensor, measurer: EditMeasurer) -> dict[str, float | None]:
        seen = {
            name: frame_consistency(encoder(frames)) for name, encoder in self._encoders.items()
        }
        return {**measurer.measure(frames), **seen}


def _edited(engine: Engine, source: Tensor, prompt: str, given: dict[str, Any]) -> _Edited:
    """A whole edit by a session of its own. The worlds are one shot each."""
    session = engine.session(source, cuts=())
    turn = session.edit(prompt, **given)
    edited = _Edited(turn.frames, turn.report["flops"], turn.report["seconds"]["sampling"])
    session.close()
    return edited


def _stitched(videos: Sequence[Tensor], windows: Sequence[EditWindow]) -> Tensor:
    """The new frames of every window, one after the other."""
    pairs = zip(videos, windows, strict=True)
    return torch.cat([frames[window.new_frames] for frames, window in pairs])
