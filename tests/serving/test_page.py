"""The page: what its files refer to, and what a person does with it in a browser.

The browser is Debian's Chromium. Screenshots are left in the test's folder of temporary files.
"""

from __future__ import annotations

import importlib.util
import math
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from bench_page import MOST_SHIFT, painted
from http_service import demo_clip

from mv2v_engine.serving.http.page_files import (
    ENTRY,
    FIRST,
    JOINED_SCRIPT,
    JOINED_STYLES,
    PAGE,
    STYLES,
    joined_modules,
)
from mv2v_engine.video.io import read_video
from tests.serving.browsing import (
    DESKTOP,
    PHONE,
    delete_session,
    screenshots,
    wait_for_frame,
    wait_for_model,
    wait_for_page,
    wait_for_session,
    wait_for_turn,
)

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page, Response

MOST_TABS = 6
MOST_SCRIPT = 120_000  # bytes that the page of a model that makes turns is given
# modules of the page at /docs, of a model that streams, of what is behind a turn's fold, of words
ELSEWHERE = {"docs.js", "live.js", "report.js", "moves.js"}
FRAME = 8  # the frame that the scrubber is sent to
LAST = 15  # the frame from which it is played, round the end


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
    return {found.removeprefix("./") for found in re.findall(r'(?:from |import\()"([^"]+)"', text)}


def test_every_file_that_is_referred_to_exists_and_none_is_left_over() -> None:
    files = page_files()
    referred = {found for name, text in files.items() for found in references(name, text)}
    assert {JOINED_SCRIPT, JOINED_STYLES, "style.css", "icon.svg", "first.js"} < referred
    # the page itself, and the one at /docs, which refers to both of these
    known = (referred - {"./", "openapi.json"}) | {"index.html", "docs.html", ENTRY, *STYLES}
    assert known - {JOINED_SCRIPT, JOINED_STYLES} == set(files)


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
    """The address of a service that runs tiny-nvs; it may still be loading."""
    with serving_engine(tmp_path_factory.mktemp("store")) as service:
        yield service.address


def test_the_browser_gets_little_script(address: str, open_page: Callable[..., Page]) -> None:
    """What it gets is what is written, and with nothing left out it is little."""
    scripts: dict[str, Response] = {}

    def take(response: Response) -> None:
        if response.request.resource_type == "script":
            scripts[response.url.rpartition("/")[2]] = response

    page = open_page("about:blank")
    page.on("response", take)
    page.goto(address)
    wait_for_model(page)
    files = page_files()
    written = {FIRST: files[FIRST], JOINED_SCRIPT: joined_modules(files, ENTRY)}
    given = {name: response.text() for name, response in scripts.items()}
    # the first one stands in the page itself
    given[FIRST] = page.locator("script:not([src])").evaluate("(script) => script.text")
    assert given == written
    # every module is in one of them, but for those of elsewhere
    for name in {name for name in files if name.endswith(".js")} - ELSEWHERE - {FIRST}:
        assert re.search(
            rf"^const module_{name.removesuffix('.js')} = ", written[JOINED_SCRIPT], re.M
        )
    assert sum(len(text.encode()) for text in written.values()) <= MOST_SCRIPT


def render(page: Page, number: int) -> None:
    """Ask for the camera that is picked; its turn plays without a click."""
    page.get_by_role("button", name="Render this view").click()
    wait_for_turn(page, number)
    page.locator(f".pane[data-shown='{number}'] video").wait_for()


def turn_dial(page: Page, dial: Locator, degrees: float) -> None:
    """Drag a dial's knob from its top, clockwise."""
    dial.evaluate("(dial) => dial.scrollIntoView({ block: 'center' })")
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


def has_focus(page: Page) -> bool:
    """Whether something other than the whole page has it."""
    return bool(page.evaluate("document.activeElement !== document.body"))


def pixels(page: Page, shown: str) -> np.ndarray:
    """What a turn or the source shows, uint8 [height, width, 3] in the video's own size."""
    found = page.evaluate(
        """async (shown) => {
          const video = document.querySelector(`.pane[data-shown='${shown}'] video`);
          const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
          const context = canvas.getContext("2d");
          context.drawImage(video, 0, 0);
          const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
          return { size: [canvas.height, canvas.width, 4], data: Array.from(data) };
        }""",
        shown,
    )
    return np.array(found["data"], np.uint8).reshape(found["size"])[..., :3]


def test_turns_are_made_watched_and_edited(
    address: str, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    clip = demo_clip(tmp_path)
    page = open_page(address, color_scheme="light", accept_downloads=True)
    page.get_by_role("heading", name="Re-film a video").wait_for()
    wait_for_model(page)
    expect(page.locator("#output")).to_contain_text("160 \N{MULTIPLICATION SIGN} 96")

    # something that is no video: the server's words stand where it was dropped
    video = {"name": "two spheres.mp4", "mimeType": "video/mp4"}
    page.set_input_files("#file", {**video, "buffer": b"x" * 99})
    refusal = page.locator("#drop-state .problem")
    expect(refusal).to_contain_text("unreadable_video")
    refusal.get_by_role("button", name="Dismiss").click()
    assert has_focus(page)

    page.set_input_files("#file", {**video, "buffer": clip})
    wait_for_session(page)
    expect(page.locator("#session-name")).to_have_value("two spheres.mp4")
    # what comes next is a few keys away, and in sight
    tabs = 0
    while page.evaluate("document.activeElement.id") != "render":
        page.keyboard.press("Tab")
        tabs += 1
        assert tabs <= MOST_TABS
    box = page.locator("#render").bounding_box()
    assert box is not None and box["y"] + box["height"] <= DESKTOP["height"]
    page.get_by_text("Settings").click()
    page.get_by_label("Steps", exact=True).fill("2")

    # the dial by the pointer, a quarter turn from its top, then by the keyboard
    dial = page.get_by_role("slider", name="Arc dial")
    turn_dial(page, dial, 90)
    expect(dial).to_have_attribute("aria-valuenow", "80")
    page.keyboard.press("0")
    for _ in range(4):
        page.keyboard.press("Shift+ArrowLeft")
    expect(dial).to_have_attribute("aria-valuenow", "-40")
    code = page.locator("figcaption code")
    expect(code).to_have_text("arc:-40")
    render(page, 1)
    wait_for_page(
        page, "() => !document.querySelector('.pane[data-shown=\"1\"] video')?.paused ?? false"
    )
    expect(page.locator("#history [data-id='1']")).to_contain_text("Arc left 40°")
    page.get_by_text("Behind this picture").click()
    expect(page.locator("#shown .memory")).to_contain_text("Nothing remembered")

    page.get_by_role("button", name="Pan right").click()
    render(page, 2)
    remembered = page.locator("#shown .recall li")
    expect(remembered).to_have_count(1)
    words = remembered.inner_text()
    assert "Turn 1" in words
    assert re.search(r"0\.\d{3}", words)
    assert "75 tokens (1\N{MULTIPLICATION SIGN}4\N{MULTIPLICATION SIGN}4)" in words
    assert re.search(r"\d+\s% merged", words)
    page.locator("#shown .cost summary").click()
    cost = page.locator("#shown .cost").inner_text()
    assert "675 tokens" in cost
    for stage in ("Sampling", "VAE", "Recall"):
        assert stage in cost
    assert (moved := painted(page))["shift"] <= MOST_SHIFT, moved

    # beside the source, both at one frame, and the frame is that one
    source = read_video(tmp_path / "clip.mp4")
    fps, frames = source.fps, source.frames.numpy()
    page.get_by_label("Compare with").select_option("source")
    page.get_by_role("slider", name="Frame", exact=True).fill(str(FRAME))
    wait_for_frame(page, fps, FRAME)
    # a browser may show a frame some time after it is there; it never shows another one then
    found, deadline = -1, time.monotonic() + 10
    while found != FRAME and time.monotonic() < deadline:
        seen = pixels(page, "source").astype(float)
        found = int(np.argmin([np.abs(seen - frame).mean() for frame in frames.astype(float)]))
    assert found == FRAME
    page.get_by_role("slider", name="Where the wipe stands").fill("30")
    screenshots(page, tmp_path)
    page.get_by_role("button", name="Side by side").click()
    left, right = (page.locator(".pane").nth(place).bounding_box() for place in (0, 1))
    assert left is not None and right is not None and left["x"] + left["width"] <= right["x"]

    # what is said of it stays, and the address holds the view
    page.locator("#turn-name").fill("the far side")
    page.locator("#turn-name").press("Enter")
    expect(page.locator("#history [data-id='2']")).to_contain_text("the far side")
    page.locator("#shown").get_by_role("button", name="Favourite").click()
    expect(page.locator("#history [data-id='2'] button")).to_have_attribute(
        "aria-label", "Turn 2, the far side, favourite"
    )
    page.reload()
    wait_for_turn(page, 2)
    expect(page.locator("#turn-name")).to_have_value("the far side")
    assert page.locator(".pane:not([hidden])").evaluate_all(
        "(panes) => panes.map((pane) => pane.dataset.shown)"
    ) == ["2", "source"]
    readout = page.locator(".readout")
    expect(readout).to_have_text(f"{FRAME + 1} / {len(frames)}")

    # played together, round the end, and stopped at one frame
    page.get_by_role("slider", name="Frame", exact=True).fill(str(LAST))
    wait_for_frame(page, fps, LAST)
    page.get_by_role("button", name="Play", exact=True).click()
    expect(readout).to_have_text(re.compile(r"^[1-9] /"))
    page.get_by_role("button", name="Pause", exact=True).click()
    wait_for_frame(page, fps, int(readout.inner_text().split()[0]) - 1)

    # a third one, said in words, shows what it becomes; a turn that it may remember stays
    # meanwhile; cancelled, it leaves the session as it was. No machine makes so many steps
    page.get_by_text("Settings").click()
    page.get_by_label("Steps", exact=True).fill("1000")
    page.get_by_label("Say the move").fill("move right and look up a little")
    expect(code).to_have_text("tilt:6+translate:1,0,0")
    page.get_by_label("Say the move").press("Enter")
    job = page.locator(".job")
    job.get_by_text(re.compile(r"Sampling: step \d+ of 1,?000, .* left")).wait_for()
    expect(job.get_by_role("progressbar")).to_have_attribute("value", re.compile(r"\d"))
    job.locator(".preview-picture:not([hidden])").wait_for()
    page.screenshot(path=tmp_path / "progress.png", animations="disabled")
    page.locator("#history [data-id='1'] button").click()
    delete_turn(page)
    expect(page.locator("#shown .problem")).to_contain_text("is being made")
    page.locator("#history .under-way button").click()
    job.get_by_role("button", name="Cancel").click()
    job.get_by_text("Cancelled. The session is as it was before.").wait_for()
    job.get_by_role("button", name="Put away").click()
    expect(page.locator("#history li")).to_have_count(3)
    assert has_focus(page)

    # deleted, a turn is named by those that remembered it
    page.locator("#history [data-id='1'] button").click()
    delete_turn(page)
    expect(page.locator("#history li")).to_have_count(2)
    expect(page.locator("#shown .note").first).to_have_text("It remembered turn 1, deleted since.")
    assert has_focus(page)
    with page.expect_download() as download:
        page.locator("#shown").get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "two_spheres_turn_2.mp4"
    assert len(read_video(download.value.path()).frames) == len(frames)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        names = {"contact_sheet.jpg", "session.json", "turn_0002.jpg", "turn_0002.mp4"}
        assert set(archive.namelist()) == names

    # two variants at once; the first one plays when it is there
    page.get_by_label("Steps", exact=True).fill("2")
    page.get_by_label("How many variants").select_option("2")
    page.get_by_role("button", name="Render this view").click()
    wait_for_turn(page, 4)
    expect(page.locator("#history li")).to_have_count(4)
    page.locator(".pane[data-shown='3'] video").wait_for()

    # a branch has the turns up to there; deleted, the session it came from stays
    page.keyboard.press("2")
    page.locator("#shown").get_by_role("button", name="Branch").click()
    page.get_by_text("branched at turn 2").wait_for()
    page.locator("#history [data-id='3']").wait_for(state="detached")
    wait_for_turn(page, 2)
    expect(page.locator(".session-link")).to_have_count(2)
    assert page.locator(".branches .session-link").count() == 1
    delete_session(page)
    expect(page.locator(".session-link")).to_have_count(1)
    page.locator(".session-link").click()
    wait_for_turn(page, 4)
    assert has_focus(page)


def delete_turn(page: Page) -> None:
    """The one that is shown."""
    page.get_by_role("button", name="Delete turn").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete it").click()


def test_nobody_is_kept_out(address: str, open_page: Callable[..., Page], tmp_path: Path) -> None:
    """What axe finds on the first view, a video and the list of keys, in both themes."""
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None or spec.origin is None:
        pytest.skip("axe_playwright_python is not installed")
    script = (Path(spec.origin).parent / "axe.min.js").read_text(encoding="utf-8")
    page = open_page(address, reduced_motion="reduce")
    wait_for_model(page)

    def check() -> None:
        page.evaluate(script)
        found = page.evaluate("() => axe.run(document)")["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []

    check()
    demo_clip(tmp_path)
    page.set_input_files("#file", tmp_path / "clip.mp4")
    wait_for_session(page)
    for details in page.locator("#session details").all():
        details.evaluate("(details) => { details.open = true; }")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        check()
    page.set_viewport_size(PHONE)
    check()
    # what comes next is not below the fold, and nothing has moved by itself
    box = page.locator("#render").bounding_box()
    assert box is not None and box["y"] + box["height"] <= PHONE["height"]
    page.get_by_role("button", name="Keyboard shortcuts").focus()
    page.keyboard.press("?")
    check()
    page.keyboard.press("Escape")
    page.reload()
    wait_for_session(page)
    assert (moved := painted(page))["shift"] <= MOST_SHIFT, moved
