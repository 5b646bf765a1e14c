"""The embedded models from seeds to a packaged checkpoint with results and figures, in one command.

`python -m mv2v_engine.training.embedded --task views --out runs/views --minutes 720`
`python -m mv2v_engine.training.embedded --task edits --out runs/edits --minutes 720`

It runs the commands of `mv2v_engine.training` one after the other; `--list` prints them. Each goes
on where it was stopped and ends at once where it is finished, so this one does too: it may be
killed at any time and started again with the same words. `--minutes` is what the transformer
learns for; worlds, latents and the evaluation come on top of it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mv2v_engine.checkpoints.detect import embedded_folder
from mv2v_engine.errors import TrainingError
from mv2v_engine.parser import Parser, count, positive
from mv2v_engine.synthetic.worlds import Grade
from mv2v_engine.training.command import run_command

# both tasks take the embedded one
VAE = embedded_folder("tiny-nvs") / "vae"
# seeds of the clips that teach instructions, apart from those of whole windows
SHORT_CLIPS = 200_000
# worlds of each grade, as a share of those that most is learned on
WORLDS_OF_GRADE: dict[Grade, float] = {"plain": 1.0, "furnished": 0.25, "textured": 0.1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """out: everything is below it. minutes: that the transformer learns for. worlds: of the grade
    that most is learned on. jobs: processes that render and encode side by side. start_from: a
    checkpoint in place of all stages but the last."""

    out: Path
    minutes: float
    worlds: int
    jobs: int
    device: str
    start_from: str | None


@dataclass(frozen=True)
class Command:
    """A module of this package with its options. is_shared: `jobs` processes divide its work."""

    module: str
    options: tuple[object, ...]
    is_shared: bool = False

    def lines(self, jobs: int) -> list[list[str]]:
        """What is run side by side."""
        line = [sys.executable, "-m", f"mv2v_engine.{self.module}", *map(str, self.options)]
        shards = [["--shard", f"{index}/{jobs}"] for index in range(jobs)]
        return [line + shard for shard in shards] if self.is_shared else [line]


def views(settings: Settings) -> Iterator[Command]:
    """Cameras in two latent frames, then whole clips, then memory in worlds of every grade."""
    device, vae = ("--device", settings.device), ("--vae", VAE)
    latents = {grade: settings.out / "latents" / grade for grade in WORLDS_OF_GRADE}
    for grade, share in WORLDS_OF_GRADE.items():
        worlds = max(1, round(settings.worlds * share))
        what = ("--worlds", f"0:{worlds}", "--grade", grade, "--cameras", 8)
        out = (*vae, "--out", latents[grade])
        yield Command("training.latents", (*what, *out, *device), is_shared=True)
    plain, all_grades = ("--latents", latents["plain"]), ("--latents", *latents.values())
    yield from _stages(
        settings,
        "tiny-nvs",
        vae,
        Stage("cameras", 0.15, (*plain, "--frames", 2, 4, "--no-memory", 1)),
        Stage("clips", 0.35, (*plain, "--no-memory", 1)),
        Stage("memory", 0.5, (*all_grades, *_rates(2e-3))),
    )


def edits(settings: Settings) -> Iterator[Command]:
    """Instructions in short clips; then whole windows with memory; then the beginnings of windows,
    half of which have memory and no words, so that memory is read; and whole windows again."""
    device, out = ("--device", settings.device), settings.out
    text = ("--text", out / "text")
    yield Command("training.text", ("--out", out / "text"))
    short, long = settings.worlds * 4, settings.worlds // 2
    seeds = {"short": f"{SHORT_CLIPS}:{SHORT_CLIPS + short}", "long": f"0:{long}"}
    latents = {name: out / f"{name}_latents" for name in seeds}
    for name, clips in seeds.items():
        frames = ("--frames", 5) if name == "short" else ()
        rendered = ("--out", out / name, "--clips", clips, *frames)
        encoded = ("--edits", out / name, "--vae", VAE, *text, "--out", latents[name])
        yield Command("training.edits", (*rendered, *device), is_shared=True)
        yield Command("training.edit_latents", (*encoded, *device), is_shared=True)
    begins = ("--edits", *latents.values(), "--latent-frames", 2, *text, "--batch", 20)
    windows = ("--edits", latents["long"], *text, "--batch", 6)
    shared = ("--shared-vae", os.path.relpath(VAE, out / "tiny-edit"), *text)
    yield from _stages(
        settings,
        "tiny-edit",
        shared,
        Stage("instructions", 0.25, ("--edits", latents["short"], *text, "--batch", 16)),
        Stage("windows", 0.4, (*windows, *_rates(2e-3))),
        Stage("recall", 0.2, (*begins, *_rates(2e-3))),
        Stage("whole", 0.15, (*windows, *_rates(1.2e-3))),
    )


TASKS = {"views": views, "edits": edits}


@dataclass(frozen=True)
class Stage:
    """A training of its own from the last one's averaged weights. share: of all minutes."""

    name: str
    share: float
    options: tuple[object, ...]


def _stages(
    settings: Settings, model: str, parts: tuple[object, ...], *stages: Stage
) -> Iterator[Command]:
    """Train and package one after the other; the last package is the model, which is evaluated.

    parts: what the package takes beside the transformer.
    """
    out, before = settings.out, settings.start_from
    if before is not None:
        stages = stages[-1:]
    minutes = settings.minutes / sum(stage.share for stage in stages)
    for stage in stages:
        start = () if before is None else ("--start-from", before)
        learns = ("--out", out / stage.name, "--minutes", round(minutes * stage.share, 2))
        yield Command(
            "training.dit", (*stage.options, *learns, *start, "--device", settings.device)
        )
        packaged = out / (model if stage is stages[-1] else f"after_{stage.name}")
        earlier = [out / done.name / "log.csv" for done in stages[: stages.index(stage)]]
        logs = ("--earlier", *earlier) if earlier else ()
        names = ("--name", model, "--dit", out / stage.name, "--out", packaged)
        yield Command("training.package", (*names, *parts, *logs))
        before = str(packaged)
    measured = ("--checkpoint", before, "--device", settings.device, "--resume")
    yield Command("run", ("evaluate", *measured, "--out", out / "evaluation"))


def _rates(adamw: float) -> tuple[object, ...]:
    return ("--learning-rate", adamw, "--matrix-learning-rate", 2 * adamw)


def run(commands: Iterator[Command], jobs: int) -> None:
    """One command after the other.

    Raises:
        TrainingError: one failed; what it said stands above.
    """
    for command in commands:
        lines = command.lines(jobs)
        running = []
        try:
            for line in lines:
                print("$", shlex.join(line), flush=True)
                running.append(subprocess.Popen(line))
            codes = [process.wait() for process in running]
        finally:
            for process in running:
                process.terminate()
        failed = [line for line, code in zip(lines, codes, strict=True) if code]
        if failed:
            raise TrainingError(
                f"this command failed, see above: {shlex.join(failed[0])}; mend the cause and "
                "start again with the same words, what is finished is kept"
            )


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--task", choices=tuple(TASKS), required=True)
    add("--out", type=Path, required=True)
    add("--minutes", type=positive, default=720, help="that the transformer learns for")
    add("--worlds", type=count, default=2000, help="rendered and encoded first")
    add(
        "--start-from",
        metavar="NAME_OR_PATH",
        help="a checkpoint in place of all stages but the last",
    )
    add("--jobs", type=count, help="processes that render; not given: one a core")
    add("--device", default="cpu")
    add("--list", action="store_true", help="print the commands alone")
    args = parser.parse_args()
    jobs = args.jobs or os.cpu_count() or 1
    settings = Settings(
        out=args.out,
        minutes=args.minutes,
        worlds=args.worlds,
        jobs=jobs,
        device=args.device,
        start_from=args.start_from,
    )
    commands = TASKS[args.task](settings)
    if args.list:
        for command in commands:
            print(*map(shlex.join, command.lines(jobs)), sep="\n")
        return
    run(commands, jobs)


if __name__ == "__main__":
    run_command(main)
