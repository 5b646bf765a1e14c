"""How soon the page stands, and whether it stays: largest contentful paint, layout shift, bytes.

`python profiling/bench_page.py [--times 5] [--against COMMIT] [--out profiling/results/page.jsonl]`

The real command with tiny-nvs, and the Chromium that is installed. Each place of the page is opened
so many times, with nothing in the browser's cache, on a desktop and on a phone: before there is a
video, and with a session of one turn. The browser's own observers tell. `paint_ms`: the median of
the largest contentful paint, from the navigation's start; `shift`: the largest sum of layout shifts
that no input caused; `script_bytes`: of all scripts, as they are written; `requests`: how many
answers there were until then. `main_ms` and `service_ms`: medians of the CPU milliseconds of the
page's main thread and of the service, which other programs lengthen least. For two seconds nothing
is asked of the browser: what drives it would take the page's main thread while it is painted.

With `--against` the page of another commit is opened after each of this one's. `paint_ratio`,
`main_ratio` and `service_ratio` are the medians of the pairs' ratios, this one to that one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gate import checked_out
from http_service import Served, demo_clip, finished_job, new_session, served
from measure import ROOT, Report, digits, provenance, table

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# an address, a selector of what shows that it is there, and whose it is
Place = tuple[str, str, Served]

MOST_PAINT_MS, MOST_SHIFT = 500.0, 0.02
SCREENS = {"desktop": {"width": 1440, "height": 900}, "phone": {"width": 360, "height": 760}}
COLUMNS = "place screen paint_ms paint_max_ms main_ms service_ms shift requests script_bytes"
COMPARED = " paint_ratio main_ratio service_ratio load_average"
_PATIENCE = 240_000  # ms
_UNDISTURBED = 2000  # ms
_OBSERVE = """() => new Promise((done) => {
  const found = { paint: 0, shift: 0, shifted: [] };
  const observe = (type, take) => new PerformanceObserver((list) =>
    list.getEntries().forEach(take)).observe({ type, buffered: true });
  observe("largest-contentful-paint", (entry) => { found.paint = entry.startTime; });
  observe("layout-shift", (entry) => {
    if (entry.hadRecentInput) return;
    found.shift += entry.value;
    for (const { node } of entry.sources) found.shifted.push(node?.id || node?.className || "");
  });
  const resources = performance.getEntriesByType("resource");
  found.requests = 1 + resources.length;
  const scripts = resources.filter(({ initiatorType, name }) =>
    initiatorType === "script" || name.endsWith(".js"));
  found.script = scripts.reduce((sum, { decodedBodySize }) => sum + decodedBodySize,
    document.querySelector("script:not([src])")?.text.length ?? 0);
  setTimeout(() => done(found), 300);
})"""


def painted(page: Page) -> dict[str, Any]:
    """What a page that is open has come to.

    Returns:
        paint: milliseconds to the largest contentful paint. shift: the sum of layout shifts that no
        input caused. shifted: ids or classes of what moved. script: bytes of all scripts. requests:
        how many answers it had, its own among them.
    """
    found: dict[str, Any] = page.evaluate(_OBSERVE)
    return found


def opened(browser: Browser, place: Place, viewport: dict[str, int]) -> dict[str, Any]:
    """What `painted` finds of a place in a browser that knows nothing of it, and its CPU time."""
    address, is_there, service = place
    before = service.cpu_seconds()
    # a context of its own has a cache of its own
    context = browser.new_context(viewport=viewport)  # type: ignore[arg-type]
    page = context.new_page()
    developer = context.new_cdp_session(page)
    developer.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(address, timeout=_PATIENCE)
    page.wait_for_timeout(_UNDISTURBED)
    page.locator(is_there).wait_for(state="attached", timeout=_PATIENCE)
    found = painted(page)
    metrics = developer.send("Performance.getMetrics")["metrics"]
    spent = {metric["name"]: 1000 * metric["value"] for metric in metrics}
    context.close()
    return {
        **found,
        "main": spent["TaskDuration"],
        "service": 1000 * (service.cpu_seconds() - before),
    }


@contextmanager
def places_of(folder: Path, root: Path) -> Iterator[dict[str, Place]]:
    """Address of each place of a checkout's page, and what shows that it is there."""
    folder.mkdir()
    with served(folder, root=root) as found:
        with found.client() as client:
            session = new_session(client, demo_clip(folder))
            finished_job(client, session, camera="arc:-20", num_inference_steps=1)
        yield {
            "first view": (found.address, "#composer[data-kind]", found),
            "a turn": (
                f"{found.address}/#session={session}",
                ".pane[data-shown='1'] video[src]",
                found,
            ),
        }


def main() -> None:
    """Open each place and report it."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--against", metavar="COMMIT")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = Report(args.out, provenance(torch.device("cpu")))
    words = f" --against {args.against}" if args.against else ""
    with ExitStack() as stack:
        roots = [ROOT, *([stack.enter_context(checked_out(args.against))] if args.against else [])]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pages = [
            stack.enter_context(places_of(folder / str(number), root))
            for number, root in enumerate(roots)
        ]
        browser = stack.enter_context(sync_playwright()).chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-gpu"],
            timeout=_PATIENCE,
        )
        stack.callback(browser.close)
        for place in pages[0]:
            for screen, viewport in SCREENS.items():
                rounds = [
                    [opened(browser, places[place], viewport) for places in pages]
                    for _ in range(args.times)
                ]
                ours = [one[0] for one in rounds]
                ratios = {
                    f"{name}_ratio": round(
                        statistics.median(one[0][name] / one[1][name] for one in rounds), 3
                    )
                    for name in ("paint", "main", "service")
                    if args.against
                }
                report.add(
                    place=place,
                    screen=screen,
                    paint_ms=digits(statistics.median(one["paint"] for one in ours)),
                    paint_max_ms=digits(max(one["paint"] for one in ours)),
                    main_ms=digits(statistics.median(one["main"] for one in ours)),
                    service_ms=digits(statistics.median(one["service"] for one in ours)),
                    shift=round(max(one["shift"] for one in ours), 4),
                    requests=max(one["requests"] for one in ours),
                    script_bytes=max(one["script"] for one in ours),
                    **ratios,
                    load_average=digits(os.getloadavg()[0]),
                    cores=os.cpu_count(),
                    command=f"python profiling/bench_page.py --times {args.times}{words}",
                )
    print(table(report.rows, COLUMNS + (COMPARED if args.against else "")))


if __name__ == "__main__":
    main()
