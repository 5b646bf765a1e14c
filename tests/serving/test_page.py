"""The page: what its files refer to, and what a person does with it in a browser.

The browser is Debian's Chromium. Screenshots are left in the test's folder of temporary files.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mv2v_engine.camera.trajectories import named_poses, named_trajectory
from mv2v_engine.synthetic.demo_clip import write_demo_clip
from mv2v_engine.video.io import read_video

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Request, Route

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "mv2v_engine" / "serving" / "page"
CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 240_000.0  # ms; what a busy machine may take for a turn
FRAME = 8  # that the scrubber is sent to

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")


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
    assert referred | {"index.html"} == set(files)


def test_nothing_comes_from_another_host_or_stands_inline() -> None:
    namespace = "http://www.w3.org/2000/svg"
    for name, text in page_files().items():
        assert not re.search(r"(?:https?:)?//[a-z0-9-]+\.", text.replace(namespace, "")), name
        assert not re.search(r"\beval\(|new Function|innerHTML|document\.write", text), name
    index = page_files()["index.html"]
    assert re.findall(r"<script(?![^>]*\bsrc=)", index) == []
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=", index) == []


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "two spheres.mp4"
    write_demo_clip(path)
    return path


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a service that runs tiny-nvs; it may still be loading."""
    store = tmp_path_factory.mktemp("service") / "store"
    command = [sys.executable, "-m", "mv2v_engine.run", "serve", "--store", str(store)]
    server = subprocess.Popen(
        [*command, "--port", "0", "--device", "cpu", "--min-free", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=(store.parent / "log.txt").open("w"),
        text=True,
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith("listening on "), (store.parent / "log.txt").read_text()
    yield line.split()[-1]
    server.send_signal(signal.SIGTERM)
    server.wait(120)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages; afterwards none has raised an error or broken its security policy."""
    faults: list[str] = []
    opened: list[Page] = []

    def open_one(url: str, **options: Any) -> Page:
        page = browser.new_page(**{"viewport": {"width": 1440, "height": 900}, **options})
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
    assert faults == []


def wait_for_model(page: Page) -> None:
    """Until the service has loaded it, and the page has heard of its cameras."""
    page.locator("[data-preset=pan_right]").wait_for(state="attached")


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


def shown_frames(page: Page, fps: float) -> dict[str, int]:
    """The frame that each video stands at, by its card, once it has one to show."""
    page.wait_for_function(
        "[...document.querySelectorAll('.card:not([hidden]) video')]"
        ".every(video => video.readyState >= 2 && !video.seeking)"
    )
    times = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.card:not([hidden]):has(video)')]"
        ".map(card => [card.id, card.querySelector('video').currentTime]))"
    )
    return {card: int(time * fps) for card, time in times.items()}


def playing_apart(page: Page) -> list[float]:
    """Seconds between the videos at each repaint until they have begun again from the start."""
    return page.evaluate(
        """async () => {
          const videos = [...document.querySelectorAll(".card:not([hidden]) video")];
          const apart = [];
          for (let last = 0, wraps = 0; wraps < 1;) {
            await new Promise(requestAnimationFrame);
            const times = videos.map((video) => video.currentTime);
            if (times[0] < last - 0.5) wraps += 1;
            [last] = times;
            if (!videos.some((video) => video.seeking)) {
              apart.push(Math.max(...times) - Math.min(...times));
            }
          }
          return apart;
        }"""
    )


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


@in_browser
def test_two_turns_and_a_cancelled_third(
    address: str, open_page: Callable[..., Page], clip: Path, tmp_path: Path
) -> None:
    page = open_page(address, color_scheme="light", accept_downloads=True)
    page.get_by_role("heading", name="Re-film a video").wait_for()
    wait_for_model(page)

    # something that is no video: the server's words stand where it was dropped
    page.set_input_files("#file", {"name": "a.mp4", "mimeType": "video/mp4", "buffer": b"x" * 99})
    refusal = page.locator("#drop-state .problem")
    refusal.wait_for()
    assert "unreadable_video" in refusal.inner_text()
    refusal.get_by_role("button", name="Dismiss").click()

    page.set_input_files("#file", clip)
    page.locator("#card-source").wait_for()
    assert page.locator("#session-name").inner_text() == clip.name
    page.get_by_text("Settings").click()
    page.get_by_label("Steps").fill("2")

    # the dial by the pointer, a quarter turn from its top, then by the keyboard
    dial = page.get_by_role("slider", name="Arc dial")
    turn_dial(page, dial, 90)
    assert dial.get_attribute("aria-valuenow") == "80"
    page.keyboard.press("0")
    for _ in range(4):
        page.keyboard.press("Shift+ArrowLeft")
    assert dial.get_attribute("aria-valuenow") == "-40"
    assert page.locator("figcaption code").inner_text() == "arc:-40"
    render(page, 1)
    assert "Nothing remembered" in page.locator("#card-1 .memory").inner_text()
    assert "Arc left 40°" in page.locator("#card-1 header").inner_text()

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
    source = read_video(clip)
    fps, frames = source.fps, source.frames.numpy()
    page.get_by_role("slider", name="Frame").fill(str(FRAME))
    shown = shown_frames(page, fps)
    assert shown == {"card-source": FRAME, "card-1": FRAME, "card-2": FRAME}
    seen = pixels(page, "card-source").astype(float)
    errors = [np.abs(seen - frame).mean() for frame in frames.astype(float)]
    assert int(np.argmin(errors)) == FRAME

    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.screenshot(path=tmp_path / f"desktop_{scheme}.png", full_page=True)
    page.set_viewport_size({"width": 360, "height": 760})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
    page.set_viewport_size({"width": 1440, "height": 900})

    # a third one, of two moves together, is cancelled and leaves the session as it was
    page.get_by_label("Steps").fill("200")
    page.get_by_label("Tilt in degrees").fill("10")
    assert page.locator("figcaption code").inner_text() == "poses"
    page.get_by_role("button", name="Render this view").click()
    job = page.locator(".job")
    job.get_by_text(re.compile(r"Sampling: step \d+ of 200, .* left")).wait_for()
    assert int(job.get_by_role("progressbar").get_attribute("aria-valuenow") or -1) >= 0
    page.screenshot(path=tmp_path / "progress.png")
    job.get_by_role("button", name="Cancel").click()
    job.get_by_text("Cancelled. The session is as it was before.").wait_for()
    job.get_by_role("button", name="Put away").click()
    assert page.locator(".wall .card").count() == 3

    with page.expect_download() as download:
        page.locator("#card-2").get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "two_spheres_turn_2.mp4"
    assert len(read_video(download.value.path()).frames) == len(frames)

    # the address holds the view
    page.get_by_role("group", name="Shown side by side").get_by_text("Turn 1").click()
    page.reload()
    page.locator("#card-2 .cost").wait_for()
    assert page.locator("#card-1").is_hidden()
    assert page.locator(".readout").inner_text() == f"{FRAME + 1} / {len(frames)}"

    # played together, round the end, and stopped at one frame
    page.get_by_role("button", name="Play all").click()
    assert np.median(playing_apart(page)) < 1.5 / fps
    page.get_by_role("button", name="Pause all").click()
    stopped = shown_frames(page, fps)
    assert stopped.keys() == {"card-source", "card-2"}
    assert len(set(stopped.values())) == 1

    # a branch remembers the first turn alone; deleted, the session it came from stays
    page.locator("#card-source").wait_for()
    page.get_by_role("group", name="Shown side by side").get_by_text("Turn 1").click()
    page.locator("#card-1").get_by_role("button", name="Branch").click()
    page.get_by_text("branched at turn 1").wait_for()
    page.locator("#card-2").wait_for(state="detached")
    page.locator("#card-1 .cost").wait_for()
    assert page.locator(".session-link").count() == 2
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete it").click()
    page.get_by_role("heading", name="Re-film a video").wait_for()
    page.wait_for_function("document.querySelectorAll('.session-link').length === 1")
    page.locator(".session-link").click()
    page.locator("#card-2 .cost").wait_for()


@in_browser
def test_a_broken_stream_is_taken_up_where_it_broke(
    address: str, open_page: Callable[..., Page], clip: Path
) -> None:
    page = open_page(address)
    asked_after: list[str | None] = []
    events = [
        {"type": "queued", "position": 3},
        {"type": "stage_started", "stage": "sampling"},
        {"type": "step_done", "stage": "sampling", "step": 3, "total": 4, "seconds_left": 90},
        {"type": "failed", "error": {"code": "worker_crashed", "message": "the process died"}},
    ]
    lines = [f"id: {n}\r\ndata: {json.dumps(event)}\r\n\r\n" for n, event in enumerate(events, 1)]
    # the second answer is whole; the first one breaks off in its second event
    bodies = [": hello\r\n\r\n" + lines[0] + lines[1][:20], "".join(lines[1:])]

    def submit(route: Route) -> None:
        job = {"id": "job_1", "state": "queued", "position": 4, "request": {"camera": "static"}}
        route.fulfill(status=202, json=job)

    def stream(route: Route) -> None:
        body = bodies[len(asked_after)]
        asked_after.append(route.request.headers.get("last-event-id"))
        if len(asked_after) > 1:
            page.locator(".job").get_by_text("Waiting, 2 before it").wait_for()
            page.get_by_text("Connection lost; trying again").wait_for()
        route.fulfill(content_type="text/event-stream", body=body)

    page.route(
        "**/turns", lambda route: submit(route) if route.request.post_data else route.continue_()
    )
    page.route("**/events", stream)
    wait_for_model(page)
    page.set_input_files("#file", clip)
    page.locator("#card-source").wait_for()
    page.get_by_role("button", name="Render this view").click()
    page.locator(".job .problem").get_by_text("the process died").wait_for()
    assert page.locator(".stages").inner_text() == "Sampling"
    # what had come whole is not asked for again
    assert asked_after == [None, "1"]


@in_browser
def test_the_token_is_asked_for_and_stays_out_of_addresses(
    address: str, open_page: Callable[..., Page]
) -> None:
    addresses: list[str] = []

    def guard(route: Route, request: Request) -> None:
        addresses.append(request.url)
        if request.headers.get("authorization") == "Bearer open sesame":
            route.continue_()
            return
        error = {"message": "give a bearer token", "code": "authentication_required"}
        route.fulfill(status=401, json={"error": error})

    page = open_page("about:blank")
    page.route("**/v1/**", guard)
    page.goto(address)
    page.get_by_text("give a bearer token").wait_for()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Token").fill("open sesame")
    dialog.get_by_role("button", name="Use it").click()
    wait_for_model(page)
    assert not any("sesame" in url for url in [*addresses, page.url])


@in_browser
def test_previewed_paths_are_the_ones_that_are_rendered(
    address: str, open_page: Callable[..., Page]
) -> None:
    page = open_page(address)
    # a browser that kept some of the modules would mix two versions after an upgrade
    assert page.request.get(f"{address}/page/camera.js").headers["cache-control"] == "no-cache"
    specs = ["arc:-40", "arc:25,3", "pan:12.5", "tilt:-9", "zoom:1.5", "crane:0.8"]
    specs += ["translate:1,-0.5,2", "static"]
    drawn = page.evaluate(
        """async (specs) => {
          const { pathOf } = await import("/page/camera.js");
          return specs.map((spec) => pathOf(spec, new Map(), 5));
        }""",
        specs,
    )
    for spec, path in zip(specs, drawn, strict=True):
        expected = named_poses(spec, 5).flatten(1).numpy()
        np.testing.assert_allclose(path, expected, atol=1e-5, err_msg=spec)
    # one move of several is sent as poses: they are the move's own where the others are nought
    sent = page.evaluate(
        """async () => {
          const { cameraOf, still } = await import("/page/camera.js");
          const model = { num_frames: 5, size: [96, 160] };
          return [{ arc: 30, tilt: 1e-9 }, { pan: 20, tilt: 1e-9 }, { zoom: 1, tilt: 1e-9 }]
            .map((amounts) => cameraOf({ ...still(), ...amounts }, model));
        }"""
    )
    for spec, camera in zip(["arc:30", "pan:20", "zoom:1"], sent, strict=True):
        expected = named_trajectory(spec, 5, (96, 160)).poses.numpy()
        np.testing.assert_allclose(camera["poses"], expected, atol=1e-5, err_msg=spec)
