"""What previews cost a step, on the command line and in the service: CPU time with and without.

`python profiling/bench_previews.py [--steps 20] [--pairs 15] [--places service] [--out FILE]`

`tiny-nvs`, one thread, turns without memory, whose steps are the cheapest. A turn with previews
and one without make a pair, and who begins changes with every pair; only what is spent between the
first step's end and the last one's counts. `terminal`: the bar of `novel-view --preview` on a
terminal of 120 x 40 characters, in this process. `service`: `serve` and its worker, both processes
together, while a client reads the events.

`step_ms`: the median of CPU milliseconds of a step without previews. `percent`: the median over
pairs of what previews add to it, with its quartiles. `work_ms`: the median of CPU milliseconds of a
picture's own work in this process, from the latents to what is drawn or sent, and `work_percent`
its share of a step, which other programs disturb least.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from http_service import Served, demo_clip, new_session, served
from measure import Report, digits, provenance, table

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.engine.session import Session
from mv2v_engine.progress import Preview, StepDone
from mv2v_engine.sampling.flow_match import make_solver
from mv2v_engine.sampling.preview import Previewer
from mv2v_engine.serving.work import host
from mv2v_engine.terminal import turn_progress

CAMERA, PLACES = "arc:-20", ("terminal", "service")
COLUMNS = "place steps pairs step_ms percent low high work_ms work_percent load_average"
_SCREEN = (40, 120)  # lines, columns
_CALLS = 50  # of a picture's own work


@contextmanager
def terminal() -> Iterator[None]:
    """The standard error is a terminal that another process reads."""
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", *_SCREEN, 0, 0))
    with (
        subprocess.Popen(["cat"], stdin=reader, stdout=subprocess.DEVNULL) as screen,
        open(writer, "w", encoding="utf-8") as opened,
    ):
        os.close(reader)
        before, sys.stderr = sys.stderr, opened
        try:
            yield
        finally:
            sys.stderr = before
            screen.kill()


def on_terminal(session: Session, steps: int, *, previews: bool) -> float:
    """CPU seconds between the first step's end and the last one's."""
    request = session.request(CAMERA, num_inference_steps=steps, memory="none")
    at: list[float] = []
    with turn_progress("turn 1", steps) as show:
        for event in session.events(request, previews=previews):
            if isinstance(event, StepDone):
                at.append(time.process_time())
            show(event)
    return at[-1] - at[0]


def processes(root: int) -> list[int]:
    """A process and all that it has started."""
    started = Path(f"/proc/{root}/task").glob("*/children")
    return [
        root,
        *(
            one
            for path in started
            for pid in path.read_text().split()
            for one in processes(int(pid))
        ),
    ]


def cpu_seconds(process: int) -> float:
    """What a process has spent, to the nanosecond."""
    return time.clock_gettime((~process << 3) | 2)


def in_service(
    found: Served, client: httpx.Client, session: str, steps: int, *, previews: bool
) -> float:
    """CPU seconds of the service between the first step's end and the last one's."""
    asked = {"camera": CAMERA, "num_inference_steps": steps, "memory": "none"}
    answer = client.post(f"/v1/sessions/{session}/turns", json={**asked, "previews": previews})
    answer.raise_for_status()
    everyone = processes(found.process.pid)
    at: list[float] = []
    with client.stream("GET", f"/v1/jobs/{answer.json()['id']}/events") as events:
        for line in events.iter_lines():
            if line == "event: step_done":
                at.append(sum(map(cpu_seconds, everyone)))
            elif line == "event: finished":
                return at[-1] - at[0]
    raise SystemExit(f"the turn was not made: {line}")


def work(engine: Engine, session: Session, deliver: Callable[[Preview], Any]) -> float:
    """The median of CPU seconds of one picture, from the latents to its delivery."""
    turn = session.turns[-1]
    latents, velocity = turn.latents[None], torch.zeros_like(turn.latents)[None]
    colours = session._runner.colours(turn.latents)
    solver = make_solver("euler", _CALLS + 1, engine.sampling.flow_shift)
    previewer = Previewer(colours.picture, solver, latents)
    spent = []
    for index in range(_CALLS):
        began = time.process_time()
        previewer.before(latents)
        previewer.after(latents, velocity, index)
        for preview in previewer.arrived(is_last=False):
            deliver(preview)
        spent.append(time.process_time() - began)
    return statistics.median(spent)


def sent(preview: Preview) -> None:
    """What the worker makes of a preview for the service."""
    told: list[dict[str, Any]] = []
    host._translate(preview, told.append)
    json.dumps(told)


def paired(spend: Callable[..., float], pairs: int) -> list[tuple[float, float]]:
    """CPU seconds with previews and without, after one turn of each that counts for nothing."""
    found = []
    for number in range(-1, pairs):
        order = (True, False) if number % 2 else (False, True)
        spent = {previews: spend(previews=previews) for previews in order}
        if number >= 0:
            found.append((spent[True], spent[False]))
    return found


def row(place: str, steps: int, found: list[tuple[float, float]], seconds: float) -> dict[str, Any]:
    step = statistics.median(without for _, without in found) / (steps - 1)
    more = [100 * (given / without - 1) for given, without in found]
    low, middle, high = statistics.quantiles(more, n=4)
    return {
        "place": place,
        "steps": steps,
        "pairs": len(found),
        "step_ms": digits(1000 * step),
        **{name: round(value, 2) for name, value in (("percent", middle), ("low", low))},
        "high": round(high, 2),
        "work_ms": digits(1000 * seconds),
        "work_percent": round(100 * seconds / step, 2),
        "load_average": digits(os.getloadavg()[0]),
    }


def main() -> None:
    """Measure both places and report them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--places", nargs="+", default=PLACES, choices=PLACES)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(args.out, provenance(torch.device("cpu")))
    command = (
        f"python profiling/bench_previews.py --steps {args.steps} --pairs {args.pairs} "
        f"--places {' '.join(args.places)}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = demo_clip(folder)
        engine = Engine.from_pretrained("tiny-nvs", device="cpu", config=EngineConfig())
        session = engine.session(folder / "clip.mp4")
        session.render(CAMERA, num_inference_steps=1)
        if "terminal" in args.places:
            with terminal():
                found = paired(partial(on_terminal, session, args.steps), args.pairs)
                with turn_progress("turn 1", _CALLS) as show:
                    alone = work(engine, session, show)
            report.add(**row("terminal", args.steps, found, alone), command=command)
        if "service" in args.places:
            with served(folder) as service, service.client() as client:
                made = new_session(client, clip)
                found = paired(partial(in_service, service, client, made, args.steps), args.pairs)
            alone = work(engine, session, sent)
            report.add(**row("service", args.steps, found, alone), command=command)
    print(table(report.rows, COLUMNS))


if __name__ == "__main__":
    main()
