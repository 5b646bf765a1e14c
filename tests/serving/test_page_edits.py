"""The page of a service that edits: instructions, windows, and what the service refuses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import EDIT_FPS, EDIT_FRAMES
from tests.serving.browsing import (
    PATIENCE,
    screenshots,
    wait_for_frame,
    wait_for_session,
    wait_for_turn,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

WINDOWS = 5
FRAME = 20


@pytest.fixture(scope="module")
def address(
    serving_engine: Callable[..., Any],
    editor_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    with serving_engine(tmp_path_factory.mktemp("store"), checkpoint=str(editor_folder)) as service:
        yield service.address


def test_two_instructions_and_two_that_are_refused(
    address: str, open_page: Callable[..., Page], long_clip: Path, tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    page = open_page(address, color_scheme="light")
    page.get_by_text("say what to change").wait_for()
    page.set_input_files("#file", long_clip)
    wait_for_session(page)
    prompt = page.get_by_label("Instruction")
    asked: list[str | None] = []

    def stream(route: Route) -> None:
        """Breaks off behind the first window, so that the page's words stand still."""
        asked.append(route.request.headers.get("last-event-id"))
        if len(asked) == 1:
            body = route.fetch(timeout=PATIENCE).text()
            first = re.search(r"event: window_done\r?\n.*?\n\r?\n", body, re.DOTALL)
            assert first is not None, body
            route.fulfill(content_type="text/event-stream", body=body[: first.end()])
            return
        if len(asked) == 2:
            words = re.compile(rf"^Window 1 of {WINDOWS} done, .* left$")
            expect(page.locator(".job-words")).to_have_text(words)
            share = page.locator(".job").get_by_role("progressbar")
            expect(share).to_have_js_property("value", 1 / WINDOWS)
            page.screenshot(path=tmp_path / "progress.png", full_page=True, animations="disabled")
        route.continue_()

    page.route("**/events", stream)
    prompt.fill("a red ball")
    page.get_by_role("button", name="Edit the video").click()
    wait_for_turn(page, 1)
    assert len(asked) == 2
    page.unroute("**/events")
    expect(page.locator("#history [data-id='1']")).to_contain_text("a red ball")
    page.get_by_text("Behind this picture").click()

    # each window says what it remembered of those before it
    expect(page.locator("#shown .memory")).to_contain_text(f"{WINDOWS} windows in 1 shot")
    windows = page.locator("#shown .window")
    expect(windows).to_have_count(WINDOWS)
    windows.first.locator("summary").click()
    expect(windows.first).to_contain_text("Nothing remembered")
    windows.last.locator("summary").click()
    expect(windows.last.locator("summary")).to_contain_text(f"\N{EN DASH}{EDIT_FRAMES}")
    remembered = windows.last.locator(".recall li")
    expect(remembered).to_have_count(WINDOWS - 1)
    expect(remembered.first).to_contain_text("Window 4")
    expect(remembered.first.locator(".score")).to_have_text(re.compile(r"^0\.\d{3}$"))
    expect(remembered.first).to_contain_text("tokens (1\N{MULTIPLICATION SIGN}4")

    # the result is as long as the source, and plays beside it
    expect(page.locator(".readout")).to_have_text(re.compile(rf"/ {EDIT_FRAMES}$"))
    page.keyboard.press("c")
    page.get_by_role("slider", name="Frame", exact=True).fill(str(FRAME))
    wait_for_frame(page, EDIT_FPS, FRAME)

    # a second one by the keyboard; what cannot be done is said where it was asked for
    prompt.fill("the floor")
    prompt.press("Control+Enter")
    wait_for_turn(page, 2)
    prompt.fill("   ")
    page.get_by_role("button", name="Edit the video").click()
    refusal = page.locator("#composer .problem")
    expect(refusal).to_contain_text("an edit needs an instruction")
    expect(refusal.locator("code")).to_have_text("unprocessable_turn")
    refusal.get_by_role("button", name="Dismiss").click()
    prompt.fill("a red ball rolls the floor " * 2)
    page.get_by_role("button", name="Edit the video").click()
    failure = page.locator(".job .problem")
    expect(failure).to_contain_text("the prompt has 13 tokens, the model reads 8; shorten it")
    expect(page.locator("#history li")).to_have_count(4)

    screenshots(page, tmp_path)
