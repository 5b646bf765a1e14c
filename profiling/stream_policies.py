"""What a stream remembers of an edit whose thing leaves and comes back, by the cache's policy.

`python profiling/stream_policies.py [--clips 8] [--loops 13] [--out .../stream_policies.jsonl]`
`python profiling/stream_policies.py --plot docs/stream_policies.svg` draws what the file holds.

Each stream edits a loop of a world that was never trained on (`make_loop_clip`): the camera turns
away from the edited thing for half of every loop, longer than the window, and comes back to where
it began, again and again. All clips go through one policy's cache at once, with the functions and
the seeds of a stream's blocks (`block_steps`, `window_seed`); the same noise under every policy.
Where the thing stands in view the blocks are decoded, with two latent frames before them. Of every
loop behind the first:

identity   L1 (0 to 1) of the edited thing's pixels against the same view of the first loop
error      L1 of these pixels against the true edit
background PSNR outside the edit against the true frames
motion     change from frame to frame, of the true frames' change

Means over the loops of a clip, 95 % bootstrap intervals over clips; drift is the slope over a
clip's minutes, ratios are to `window`, of `history` to `memrope`, too. A row a policy and loop,
then one a policy.

B clips, F latent frames, C channels.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from measure import ROOT, Report, digits, provenance, read_rows, table
from torch import Tensor

from mv2v_engine import Engine
from mv2v_engine.config import StreamConfig, StreamPolicy
from mv2v_engine.engine.stream import (
    begin_block,
    block_steps,
    block_velocity,
    refused_policies,
)
from mv2v_engine.engine.window import window_seed
from mv2v_engine.evaluation import bootstrap
from mv2v_engine.evaluation.images import masked_l1, masked_psnr
from mv2v_engine.models.stream_cache import StreamCache
from mv2v_engine.sampling.flow_match import listed_sigmas, stream_solver, turn_noise
from mv2v_engine.synthetic.edit_clips import EditClip, grown, make_loop_clip
from mv2v_engine.synthetic.instructions import EditKind

FIRST_SEED = 3_000_000  # from HELD_OUT on nothing is trained on
LOOP, RATE = 120, 4  # frames; frames of a latent one
# edits whose words leave open what comes of the thing, and one that names it
KINDS: tuple[EditKind, ...] = ("paint", "colour", "hat", "pattern")
VIEWS = (3, 5)  # latent frames of a loop that are decoded: the thing is in view
BEFORE = 2  # latent frames that are decoded with them, for the VAE's past
MEASURES = ("identity", "error", "background", "motion")
COLORS = {
    "memrope": "#d62728",
    "sink": "#1f77b4",
    "window": "#888888",
    "all": "#2ca02c",
    "history": "#9467bd",
}
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Source:
    """A loop, and its latents [C, F, H, W] of the first time round and of every other."""

    clip: EditClip
    first: Tensor
    later: Tensor
    text: Tensor

    def latents(self, frame: int) -> Tensor:
        """The latents of one latent frame of the stream [C, 1, H, W]."""
        count = LOOP // RATE
        part = self.first if frame < count else self.later
        return part[:, frame % count, None]


def sources(engine: Engine, count: int) -> list[Source]:
    found = []
    for index in range(count):
        clip = make_loop_clip(FIRST_SEED + index, kind=KINDS[index % len(KINDS)], num_frames=LOOP)
        frames = torch.cat([clip.source.frames, clip.source.frames, clip.source.frames[:1]])
        latents, per_loop = engine.vae.encode(frames), LOOP // RATE
        text = engine.text_embedding(clip.prompt)
        found.append(Source(clip, latents[:, :per_loop], latents[:, per_loop : 2 * per_loop], text))
    return found


def streamed(
    engine: Engine, given: Sequence[Source], config: StreamConfig, loops: int
) -> Iterator[tuple[int, Tensor]]:
    """The latents [B, C, 1, H, W] of every latent frame of the streams, with its number."""
    model, shape = engine.transformer, engine.transformer.config
    rows, columns = given[0].first.shape[2:]
    cache = StreamCache(shape, (rows, columns), config)
    sigmas = listed_sigmas(
        config.timesteps, engine.sampling.flow_shift if config.is_warped else None
    )
    text = torch.cat([source.text for source in given])
    for number in range(loops * LOOP // RATE):
        edited = torch.stack([source.latents(number) for source in given])
        # one generator for all clips: what a solver draws in between comes from the same one
        noise, generator = turn_noise(tuple(edited.shape), window_seed(7, number))
        begin_block(model, cache)
        solver = stream_solver(sigmas, generator, is_map=shape.has_end_time)
        for latents in block_steps(model, cache, solver, noise, text, edited):
            made = latents
        block_velocity(model, cache, made, 0.0, text, edited)
        yield number, made


def measured(
    engine: Engine, given: Sequence[Source], config: StreamConfig, loops: int
) -> Iterator[list[Row]]:
    """The measures of every clip, loop by loop."""
    per_loop, held = LOOP // RATE, dict[int, Tensor]()
    reference: list[list[Tensor]] = []
    for number, made in streamed(engine, given, config, loops):
        held[number] = made
        held.pop(number - per_loop, None)
        loop, place = divmod(number, per_loop)
        if place != max(VIEWS):
            continue
        frames = [_decoded(engine, held, loop * per_loop, clip) for clip in range(len(given))]
        reference = reference or frames
        yield [
            _compared(source.clip, own, first)
            for source, own, first in zip(given, frames, reference, strict=True)
        ]


def _decoded(engine: Engine, held: dict[int, Tensor], begin: int, clip: int) -> list[Tensor]:
    """Frames [4, height, width, 3] of each of VIEWS."""
    found = []
    for view in VIEWS:
        latents = [held[begin + view - back][clip] for back in range(BEFORE, -1, -1)]
        found.append(engine.vae.decode(torch.cat(latents, 1))[-RATE:])
    return found


def _compared(clip: EditClip, frames: Sequence[Tensor], first: Sequence[Tensor]) -> Row:
    values: dict[str, list[float]] = {name: [] for name in MEASURES}
    for view, own, before in zip(VIEWS, frames, first, strict=True):
        place = slice(RATE * (view - 1) + 1, RATE * view + 1)
        truth, mask = clip.edited.frames[place], clip.edited_mask[place]
        around = ~grown(clip.mask[place], 8)
        if not bool(mask.any()):
            continue
        values["identity"].append(masked_l1(own, before, mask))
        values["error"].append(masked_l1(own, truth, mask))
        values["background"].append(masked_psnr(own, truth, around))
        values["motion"].append(_change(own) / _change(truth))
    return {name: statistics.fmean(each) if each else None for name, each in values.items()}


def _change(frames: Tensor) -> float:
    return float(frames.float().diff(dim=0).abs().mean())


def slope(values: Sequence[float], fps: float) -> float:
    """What values of loops grow by in a minute."""
    minutes = torch.arange(len(values), dtype=torch.float64) * LOOP / fps / 60
    centred = minutes - minutes.mean()
    return float(
        (centred * torch.tensor(values, dtype=torch.float64)).sum() / centred.square().sum()
    )


def _estimate(found: bootstrap.Estimate | None) -> list[float] | None:
    return None if found is None else [digits(x) for x in (found.value, found.low, found.high)]


def summed(rows: Sequence[Row], policy: str, fps: float) -> Row:
    """Means of the loops behind the first, with intervals over clips; ratios to `window`."""
    clips = _by_clip(rows, policy)
    found: Row = {"what": "policy", "policy": policy, "clips": len(clips)}
    means = {name: _means(clips, name) for name in MEASURES}
    for name in MEASURES:
        found[name] = _estimate(bootstrap.mean(means[name]))
    for name in ("identity", "background"):
        slopes = [None if None in clip[name][1:] else slope(clip[name][1:], fps) for clip in clips]
        found[f"{name}_per_minute"] = _estimate(bootstrap.mean(slopes))
    if policy != "window":
        found |= _against(rows, policy, "window", "")
    if policy == "history":
        found |= _against(rows, policy, "memrope", "_memrope")
    return found


def _against(rows: Sequence[Row], policy: str, rival: str, suffix: str) -> Row:
    """Identity as a share of a rival's and what the background gains, over the loops of both."""
    count = min(len(_loops(rows, each)) for each in (policy, rival))
    if count < 2:
        return {}
    clips, rivals = (_by_clip(rows, each, count) for each in (policy, rival))
    shares = bootstrap.ratio(_means(clips, "identity"), _means(rivals, "identity"))
    gains = [
        None if own is None or other is None else own - other
        for own, other in zip(
            _means(clips, "background"), _means(rivals, "background"), strict=True
        )
    ]
    return {
        f"identity_ratio{suffix}": _estimate(shares),
        f"background_gain{suffix}": _estimate(bootstrap.mean(gains)),
    }


def _loops(rows: Sequence[Row], policy: str) -> list[Row]:
    return [row for row in rows if row["what"] == "loop" and row["policy"] == policy]


def _by_clip(
    rows: Sequence[Row], policy: str, most: int | None = None
) -> list[dict[str, list[Any]]]:
    loops = _loops(rows, policy)[:most]
    count = len(loops[0]["identity"]) if loops else 0
    return [
        {name: [row[name][clip] for row in loops] for name in MEASURES} for clip in range(count)
    ]


def _means(clips: Sequence[dict[str, list[Any]]], name: str) -> list[float | None]:
    return [None if None in clip[name][1:] else statistics.fmean(clip[name][1:]) for clip in clips]


def draw(rows: Sequence[Row], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: Any = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "stream policies"}
    with pyplot.rc_context(settings):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 3.4), layout="constrained")
        for policy, color in COLORS.items():
            loops = _loops(rows, policy)
            if not loops:
                continue
            seconds = [row["seconds"] for row in loops]
            for axes, name, since in ((left, "identity", 1), (right, "background", 0)):
                known = [[v for v in row[name] if v is not None] for row in loops]
                middle = [statistics.fmean(values) for values in known]
                error = [1.96 * statistics.stdev(v) / math.sqrt(len(v)) for v in known]
                axes.plot(seconds[since:], middle[since:], color=color, label=policy)
                band = zip(middle, error, strict=True)
                low, high = zip(*[(m - e, m + e) for m, e in band], strict=True)
                axes.fill_between(
                    seconds[since:], low[since:], high[since:], color=color, alpha=0.1
                )
        left.set_title("the edited thing against its first appearance, L1")
        right.set_title("outside the edit, PSNR in dB")
        for axes in (left, right):
            axes.set_xlabel("seconds of the stream")
            axes.grid(alpha=0.3)
        left.set_ylim(bottom=0)
        left.legend(frameon=False)
        metadata = {"Date": None} if out.suffix == ".svg" else None
        figure.savefig(out, metadata=metadata)
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="tiny-stream")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--loops", type=int, default=13, help=f"of {LOOP} frames each")
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=get_args(StreamPolicy),
        help="all that the checkpoint can have if not given",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what --out holds")
    parser.add_argument(
        "--sum", action="store_true", help="of a run that was cut off: sum up what --out holds"
    )
    results = ROOT / "profiling" / "results" / "stream_policies.jsonl"
    parser.add_argument("--out", type=Path, default=results)
    args = parser.parse_args()
    if args.plot is not None:
        draw(read_rows(args.out), args.plot)
        return
    if args.sum:
        _sum(args.out)
        return
    torch.set_num_threads(1)
    engine = Engine.from_pretrained(args.checkpoint, device="cpu")
    own, fps = engine.checkpoint.stream, engine.sampling.fps
    assert own is not None
    common = {**provenance(torch.device("cpu")), "checkpoint": engine.checkpoint.name}
    report = Report(args.out, {**common, "loop_frames": LOOP, "stream": json.dumps(own.timesteps)})
    given = sources(engine, args.clips)
    refused = refused_policies(engine, own)
    policies = args.policies or [each for each in get_args(StreamPolicy) if each not in refused]
    for policy in policies:
        began = time.process_time()
        for loop, found in enumerate(
            measured(engine, given, replace(own, policy=policy), args.loops)
        ):
            values = {name: [_rounded(row[name]) for row in found] for name in MEASURES}
            report.add(
                what="loop", policy=policy, loop=loop, seconds=digits(loop * LOOP / fps), **values
            )
        report.add(
            what="seconds", policy=policy, process_seconds=digits(time.process_time() - began)
        )
    _add_sums(report, policies, fps)


def _add_sums(report: Report, policies: Sequence[str], fps: float) -> None:
    for policy in policies:
        report.add(**summed(report.rows, policy, fps))
    rows = [row for row in report.rows if row["what"] == "policy"]
    print(table(rows, "policy identity error background motion identity_ratio"))


def _sum(out: Path) -> None:
    """Add the rows of policies that a run did not come to; of the loops that it did come to."""
    report = Report(out, {})
    report.rows = [row for row in read_rows(out) if row["what"] != "policy"]
    loops = [row for row in report.rows if row["what"] == "loop"]
    seconds = next(row["seconds"] for row in loops if row["loop"] == 1)
    report.common = {name: loops[0][name] for name in ("checkpoint", "loop_frames", "stream")}
    _add_sums(report, list(dict.fromkeys(row["policy"] for row in loops)), LOOP / seconds)


def _rounded(value: float | None) -> float | None:
    return None if value is None else digits(value)


if __name__ == "__main__":
    main()
