"""How soon the page stands, and whether it stays: largest contentful paint, layout shift, bytes.

`python profiling/bench_page.py [--times 5] [--out profiling/results/page.jsonl]`

The real command with tiny-nvs, and the Chromium that is installed. Each place of the page is opened
so many times, with nothing in the browser's cache, on a desktop and on a phone: before there is a
video, and with a session of one turn. The browser's own observers tell. `paint_ms`: the median of
the largest contentful paint, from the navigation's start; `shift`: the largest sum of layout shifts
that no input caused; `script_bytes`: of all scripts, as they are written.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from http_service import demo_clip, finished_job, new_session, served
from measure import Report, digits, provenance, table

if TYPE_CHECKING:
    from playwright.sync_api import Page

MOST_PAINT_MS, MOST_SHIFT = 500.0, 0.02
SCREENS = {"desktop": {"width": 1440, "height": 900}, "phone": {"width": 360, "height": 760}}
COLUMNS = "place screen paint_ms paint_max_ms shift script_bytes load_average"
_PATIENCE = 240_000  # ms
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
  const scripts = performance.getEntriesByType("resource")
    .filter(({ initiatorType, name }) => initiatorType === "script" || name.endsWith(".js"));
  found.script = scripts.reduce((sum, { decodedBodySize }) => sum + decodedBodySize, 0);
  setTimeout(() => done(found), 300);
})"""


def painted(page: Page) -> dict[str, Any]:
    """What a page that is open has come to.

    Returns:
        paint: milliseconds to the largest contentful paint. shift: the sum of layout shifts that no
        input caused. shifted: ids or classes of what moved. script: bytes of all scripts.
    """
    found: dict[str, Any] = page.evaluate(_OBSERVE)
    return found


def main() -> None:
    """Open each place and report it."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = Report(args.out, provenance(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as name, served(Path(name)) as found:
        with found.client() as client:
            session = new_session(client, demo_clip(Path(name)))
            finished_job(client, session, camera="arc:-20", num_inference_steps=1)
        places = {"first view": ("", "#composer[data-kind]")}
        places["a turn"] = (f"#session={session}", ".pane[data-shown='1'] video[src]")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"),
                args=["--no-sandbox", "--disable-gpu"],
                timeout=_PATIENCE,
            )
            for place, (address, is_there) in places.items():
                for screen, viewport in SCREENS.items():
                    opened = []
                    for _ in range(args.times):
                        # a context of its own has a cache of its own
                        context = browser.new_context(viewport=viewport)  # type: ignore[arg-type]
                        page = context.new_page()
                        page.goto(f"{found.address}/{address}", timeout=_PATIENCE)
                        page.locator(is_there).wait_for(state="attached", timeout=_PATIENCE)
                        opened.append(painted(page))
                        context.close()
                    paints = [one["paint"] for one in opened]
                    report.add(
                        place=place,
                        screen=screen,
                        paint_ms=digits(statistics.median(paints)),
                        paint_max_ms=digits(max(paints)),
                        shift=round(max(one["shift"] for one in opened), 4),
                        script_bytes=max(one["script"] for one in opened),
                        load_average=digits(os.getloadavg()[0]),
                        cores=os.cpu_count(),
                        command=f"python profiling/bench_page.py --times {args.times}",
                    )
            browser.close()
    print(table(report.rows, COLUMNS))


if __name__ == "__main__":
    main()
