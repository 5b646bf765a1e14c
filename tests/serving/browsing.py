"""A browser, the page in it, and what tests do with both again and again.

Waiting is the browser's own, with much patience: nothing here knows how fast a machine is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from re import Pattern
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import APIResponse, Browser, Page, Request, Route

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # a camera that shows a moving pattern, and that no page has to be given
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
PATIENCE = 240_000  # ms; what a busy machine may take for a turn
_LOOK = 20  # ms between two looks at what the page has asked for
DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 360, "height": 760}


@contextmanager
def launched() -> Iterator[Browser]:
    """Chromium, until the block ends."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        chromium = playwright.chromium
        browser = chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=PATIENCE)
        yield browser
        browser.close()


@contextmanager
def opening(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages; afterwards none has raised an error or broken its security policy."""
    faults: list[str] = []
    opened: list[Page] = []

    def open_one(url: str, **options: Any) -> Page:
        page = browser.new_page(**{"viewport": DESKTOP, **options})
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console", lambda said: "Content Security" in said.text and faults.append(said.text)
        )
        opened.append(page)
        page.goto(url)
        return page

    yield open_one
    for page in opened:
        page.close()
    assert not faults, faults


def wait_for_model(page: Page) -> None:
    """Wait until the service has loaded it, and the page has made its form."""
    page.locator("#composer[data-kind]").wait_for(state="attached")


def wait_for_page(page: Page, predicate: str, argument: Any = None) -> None:
    """Wait until a JavaScript function is true of the page.

    An expression will not do: Playwright evaluates it at every look, and from the second one on
    the page's security policy refuses that.
    """
    assert "=>" in predicate, f"{predicate!r} is no function"
    page.wait_for_function(predicate, arg=argument)


def wait_for_frame(page: Page, fps: float, frame: int) -> None:
    """Wait until every video that is shown stands at a frame."""
    wait_for_page(
        page,
        """({ fps, frame }) =>
          [...document.querySelectorAll(".pane:not([hidden]) video")].every((video) =>
            video.readyState >= 2 && !video.seeking
              && Math.floor(video.currentTime * fps) === frame)""",
        {"fps": fps, "frame": frame},
    )


def wait_for_turn(page: Page, number: int) -> None:
    """Wait until a turn is in the history."""
    page.locator(f"#history [data-id='{number}']").wait_for()


def wait_for_session(page: Page) -> None:
    """Wait until a session is shown."""
    page.locator("#history [data-id=source]").wait_for()


def settle(page: Page) -> None:
    """Wait until the page has taken in the answers that were given to it before."""
    page.evaluate("() => fetch('/healthz').then((answer) => answer.text())")


def screenshots(page: Page, folder: Path) -> None:
    """Pictures of the whole page in both themes and on a phone; nothing is wider than it may be."""

    def screenshot(name: str) -> None:
        # without animations, which would stand half way between the themes
        path = folder / f"{name}.png"
        page.screenshot(path=path, full_page=True, animations="disabled")

    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        screenshot(f"desktop_{scheme}")
    parts = page.locator("#session .tools > *, .transport > *, .send > *, .cameras *:not(svg *)")
    assert (
        parts.evaluate_all(
            """(parts) => parts.filter((part) => part.checkVisibility()
            && part.getBoundingClientRect().right
              > part.parentElement.getBoundingClientRect().right + 1)
              .map((part) => part.outerHTML.slice(0, 200))"""
        )
        == []
    )
    page.set_viewport_size(PHONE)
    wait_for_page(page, "(width) => innerWidth === width", PHONE["width"])
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    screenshot("phone")
    page.set_viewport_size(DESKTOP)


def delete_session(page: Page) -> None:
    """The one that is shown; back at the beginning when it is gone."""
    page.get_by_role("button", name="Delete video").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete it").click()
    page.locator("#welcome h1").wait_for()


class Held:
    """The first answer of a kind, which the page gets when the test lets it.

    It is the service's at the time of the question.
    """

    def __init__(self, page: Page, address: str | Pattern[str], method: str = "GET") -> None:
        self._page, self._method = page, method
        self._is_taken = False
        self._held: tuple[Route, APIResponse] | None = None
        page.route(address, self._take)

    def _take(self, route: Route, request: Request) -> None:
        if self._is_taken or request.method != self._method:
            route.fallback()
            return
        self._is_taken = True
        self._held = route, route.fetch(timeout=PATIENCE)

    def wait(self) -> None:
        """Wait until the page has asked."""
        for _ in range(PATIENCE // _LOOK):
            if self._held is not None:
                return
            self._page.wait_for_timeout(_LOOK)
        raise AssertionError("the page has not asked")

    def let_go(self, **instead: Any) -> None:
        """Answer; instead: of the service's own answer, as `Route.fulfill` takes it."""
        assert self._held is not None
        route, answer = self._held
        route.fulfill(**(instead or {"response": answer}))
        settle(self._page)
