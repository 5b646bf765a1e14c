"""What the stages of a stream's training give: short streams of held-out clips, by checkpoint.

`python profiling/stream_stages.py shipped=tiny-stream rollout=FOLDER [--clips 12] [--out FILE]`

Each clip is a loop that was never trained on (`make_loop_clip`), streamed with two steps a block
under the checkpoint's own policy. Means over clips, with 95 % bootstrap intervals:

error      L1 of the edited thing's pixels against the true edit, of that of the source's own
background PSNR outside the edit against the true frames, in dB
"""

from __future__ import annotations

import argparse
from itertools import cycle, islice
from pathlib import Path

import torch
from measure import ROOT, Report, digits, provenance, table

from mv2v_engine import Engine
from mv2v_engine.evaluation import bootstrap
from mv2v_engine.evaluation.images import masked_l1, masked_psnr
from mv2v_engine.synthetic.edit_clips import EditClip, grown, make_loop_clip
from mv2v_engine.synthetic.instructions import EditKind

FIRST_SEED = 3_000_100  # from HELD_OUT on nothing is trained on
LOOP, FRAMES = 120, 61  # of a clip, and those that are streamed
KINDS: tuple[EditKind, ...] = ("colour", "paint", "colour", "hat", "pattern", "paint")


def measured(engine: Engine, clip: EditClip) -> tuple[float | None, float | None]:
    """The error, as a share, and the background of one stream."""
    stream = engine.stream(clip.prompt, source=iter(clip.source.frames[:FRAMES]), seed=1)
    made = torch.cat([block.frames for block in stream.blocks()])
    count = len(made)
    true, source, edit = clip.edited.frames[:count], clip.source.frames[:count], clip.edited_mask
    left = masked_l1(source, true, edit[:count])
    error = masked_l1(made, true, edit[:count])
    share = None if error is None or not left else error / left
    return share, masked_psnr(made, true, ~grown(clip.mask[:count], 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="LABEL=NAME_OR_PATH")
    parser.add_argument("--clips", type=int, default=12)
    results = ROOT / "profiling" / "results" / "stream_stages.jsonl"
    parser.add_argument("--out", type=Path, default=results)
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds = islice(cycle(KINDS), args.clips)
    clips = [
        make_loop_clip(FIRST_SEED + index, kind=kind, num_frames=LOOP)
        for index, kind in enumerate(kinds)
    ]
    report = Report(args.out, provenance(torch.device("cpu")))
    for word in args.checkpoints:
        label, _, name = word.partition("=")
        engine = Engine.from_pretrained(name, device="cpu")
        errors, backgrounds = zip(*(measured(engine, clip) for clip in clips), strict=True)
        row = {"weights": label, "clips": len(clips), "frames": FRAMES}
        for measure, values in (("error", errors), ("background", backgrounds)):
            estimate = bootstrap.mean(list(values))
            assert estimate is not None
            row[measure] = [digits(v) for v in (estimate.value, estimate.low, estimate.high)]
        report.add(**row)
    print(table(report.rows, "weights clips error background"))


if __name__ == "__main__":
    main()
