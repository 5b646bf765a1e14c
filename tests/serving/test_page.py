"""The page: what its files refer to, and what a person does with it in a browser.

The browser is Debian's Chromium. Screenshots are left in the test's folder of temporary files.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from http_service import demo_clip

from mv2v_engine.video.io import read_video
from tests.serving.browsing import delete_session, screenshots, wait_for_frame, wait_for_model

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

PAGE = Path(__file__).resolve().parents[2] / "mv2v_engine" / "serving" / "http" / "page"
FRAME = 8  # that the scrubber is sent to
LAST = 15  # from which it is played, round the end


def page_files() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()}


def references(name: str, text: str) -> set[str]:
    """Names of the page's own files that a file refers to."""
    if name.endswith(".html"):
        return {
            found.removeprefix("page/") for found in re.findall(r'(?:src|href)="([^"#]+)', text)
        }
    if name.endswith(".css"):
        return set(re.findall(r'(?:url\(|@import )["\']?([^"\')]+)', text))
    return {found.removeprefix("./") for found in re.findall(r'from "([^"]+)"', text)}


def test_every_file_that_is_referred_to_exists_and_none_is_left_over() -> None:
    files = page_files()
    referred = {found for name, text in files.items() for found in references(name, text)}
    assert {"app.js", "style.css", "icon.svg", "theme.js"} < referred
    # the page itself, and the one at /docs, which refers to both of these
    assert (referred - {"./", "openapi.json"}) | {"index.html", "docs.html"} == set(files)


def test_nothing_comes_from_another_host_or_stands_inline() -> None:
    namespace = "http://www.w3.org/2000/svg"
    for name, text in page_files().items():
        assert not re.search(r"(?:https?:)?//[a-z0-9-]+\.", text.replace(namespace, "")), name
        assert not re.search(r"\beval\(|new Function|innerHTML|document\.write", text), name
    index = page_files()["index.html"]
    assert re.findall(r"<script(?![^>]*\bsrc=)", index) == []
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=", index) == []


@pytest.fixture(scope="module")
def address(
    serving_engine: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Of a service that runs tiny-nvs; it may still be loading."""
    with serving_engine(tmp_path_factory.mktemp("store")) as service:
        yield service.address


def render(page: Page, number: int) -> None:
    """Ask for the camera that is picked, and wait for its card."""
    page.get_by_role("button", name="Render this view").click()
    page.locator(f"#card-{number} .cost").wait_for()


def turn_dial(page: Page, dial: Locator, degrees: float) -> None:
    """Drag a dial's knob from its top, clockwise."""
    dial.scroll_into_view_if_needed()
    box = dial.bounding_box()
    assert box is not None
    # in the units of its drawing, 220 wide, the knob runs 84 about (110, 110)
    unit = box["width"] / 220
    for step in range(6):
        angle = math.radians(degrees) * step / 5
        x, y = 110 + 84 * math.sin(angle), 110 - 84 * math.cos(angle)
        page.mouse.move(box["x"] + x * unit, box["y"] + y * unit)
        if step == 0:
            page.mouse.down()
    page.mouse.up()


def shown_cards(page: Page) -> list[str]:
    """Ids of the cards that stand side by side."""
    cards = page.locator(".card:not([hidden]):has(video)")
    return cards.evaluate_all("(cards) => cards.map((card) => card.id)")


def pixels(page: Page, card: str) -> np.ndarray:
    """What a card's video shows, uint8 [height, width, 3] in the video's own size."""
    found = page.evaluate(
        """async (card) => {
          const video = document.querySelector(`#${card} video`);
          const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
          const context = canvas.getContext("2d");
          context.drawImage(video, 0, 0);
          const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
          return { size: [canvas.height, canvas.width, 4], data: Array.from(data) };
        }""",
        card,
    )
    return np.array(found["data"], np.uint8).reshape(found["size"])[..., :3]


def test_two_turns_and_a_cancelled_third(
    address: str, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    clip = demo_clip(tmp_path)
    page = open_page(address, color_scheme="light", accept_downloads=True)
    page.get_by_role("heading", name="Re-film a video").wait_for()
    wait_for_model(page)

    # something that is no video: the server's words stand where it was dropped
    video = {"name": "two spheres.mp4", "mimeType": "video/mp4"}
    page.set_input_files("#file", {**video, "buffer": b"x" * 99})
    refusal = page.locator("#drop-state .problem")
    expect(refusal).to_contain_text("unreadable_video")
    refusal.get_by_role("button", name="Dismiss").click()

    page.set_input_files("#file", {**video, "buffer": clip})
    page.locator("#card-source").wait_for()
    expect(page.locator("#session-name")).to_have_text("two spheres.mp4")
    page.get_by_text("Settings").click()
    page.get_by_label("Steps").fill("2")

    # the dial by the pointer, a quarter turn from its top, then by the keyboard
    dial = page.get_by_role("slider", name="Arc dial")
    turn_dial(page, dial, 90)
    expect(dial).to_have_attribute("aria-valuenow", "80")
    page.keyboard.press("0")
    for _ in range(4):
        page.keyboard.press("Shift+ArrowLeft")
    expect(dial).to_have_attribute("aria-valuenow", "-40")
    expect(page.locator("figcaption code")).to_have_text("arc:-40")
    render(page, 1)
    expect(page.locator("#card-1 .memory")).to_contain_text("Nothing remembered")
    expect(page.locator("#card-1 header")).to_contain_text("Arc left 40°")

    page.get_by_role("button", name="Pan right").click()
    render(page, 2)
    remembered = page.locator("#card-2 .recall li")
    assert remembered.count() == 1
    words = remembered.inner_text()
    assert "Turn 1" in words
    assert re.search(r"0\.\d{3}", words)
    assert "75 tokens (1\N{MULTIPLICATION SIGN}4\N{MULTIPLICATION SIGN}4)" in words
    assert re.search(r"\d+\s% merged", words)
    page.locator("#card-2 .cost summary").click()
    cost = page.locator("#card-2 .cost").inner_text()
    assert "675 tokens" in cost
    for stage in ("Sampling", "VAE", "Recall"):
        assert stage in cost

    # every video to one frame, and the frame is that one
    source = read_video(tmp_path / "clip.mp4")
    fps, frames = source.fps, source.frames.numpy()
    assert shown_cards(page) == ["card-source", "card-1", "card-2"]
    page.get_by_role("slider", name="Frame").fill(str(FRAME))
    wait_for_frame(page, fps, FRAME)
    # a browser may show a frame some time after it is there; it never shows another one then
    found, deadline = -1, time.monotonic() + 10
    while found != FRAME and time.monotonic() < deadline:
        seen = pixels(page, "card-source").astype(float)
        found = int(np.argmin([np.abs(seen - frame).mean() for frame in frames.astype(float)]))
    assert found == FRAME

    screenshots(page, tmp_path)

    # a third one, of two moves together, is cancelled and leaves the session as it was; no
    # machine makes so many steps before it is told to stop
    page.get_by_label("Steps").fill("1000")
    page.get_by_label("Tilt in degrees").fill("10")
    expect(page.locator("figcaption code")).to_have_text("arc:-40+tilt:10")
    page.get_by_role("button", name="Render this view").click()
    job = page.locator(".job")
    job.get_by_text(re.compile(r"Sampling: step \d+ of 1,?000, .* left")).wait_for()
    expect(job.get_by_role("progressbar")).to_have_attribute("aria-valuenow", re.compile(r"\d+"))
    page.screenshot(path=tmp_path / "progress.png", animations="disabled")
    job.get_by_role("button", name="Cancel").click()
    job.get_by_text("Cancelled. The session is as it was before.").wait_for()
    job.get_by_role("button", name="Put away").click()
    expect(page.locator(".wall .card")).to_have_count(3)

    with page.expect_download() as download:
        page.locator("#card-2").get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "two_spheres_turn_2.mp4"
    assert len(read_video(download.value.path()).frames) == len(frames)

    # the address holds the view
    page.get_by_role("group", name="Shown side by side").get_by_text("Turn 1").click()
    page.reload()
    page.locator("#card-2 .cost").wait_for()
    assert shown_cards(page) == ["card-source", "card-2"]
    readout = page.locator(".readout")
    expect(readout).to_have_text(f"{FRAME + 1} / {len(frames)}")

    # played together, round the end, and stopped at one frame
    page.get_by_role("slider", name="Frame").fill(str(LAST))
    wait_for_frame(page, fps, LAST)
    page.get_by_role("button", name="Play all").click()
    expect(readout).to_have_text(re.compile(r"^[1-9] /"))
    page.get_by_role("button", name="Pause all").click()
    wait_for_frame(page, fps, int(readout.inner_text().split()[0]) - 1)

    # a branch remembers the first turn alone; deleted, the session it came from stays
    page.get_by_role("group", name="Shown side by side").get_by_text("Turn 1").click()
    page.locator("#card-1").get_by_role("button", name="Branch").click()
    page.get_by_text("branched at turn 1").wait_for()
    page.locator("#card-2").wait_for(state="detached")
    page.locator("#card-1 .cost").wait_for()
    expect(page.locator(".session-link")).to_have_count(2)
    delete_session(page)
    expect(page.locator(".session-link")).to_have_count(1)
    page.locator(".session-link").click()
    page.locator("#card-2 .cost").wait_for()
