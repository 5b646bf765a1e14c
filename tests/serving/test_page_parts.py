"""Parts of the page by themselves: the stream, the token, what is sent, the paths, the player."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from bench_page import MOST_PAINT_MS, MOST_SHIFT, SCREENS, painted

from mv2v_engine.camera.trajectories import named_poses, named_trajectory
from tests.serving.browsing import (
    PATIENCE,
    settle,
    wait_for_model,
    wait_for_page,
    wait_for_session,
)
from tests.serving.conftest import Live

if TYPE_CHECKING:
    from playwright.sync_api import Page, Request, Route

OpenPage = Callable[..., "Page"]


def test_a_broken_stream_is_taken_up_where_it_broke(
    live: Live, open_page: OpenPage, source_clip: Path
) -> None:
    page = open_page(live.address)
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
    page.set_input_files("#file", source_clip)
    wait_for_session(page)
    page.get_by_role("button", name="Render this view").click()
    page.locator(".job .problem").get_by_text("the process died").wait_for()
    assert page.locator(".stages").text_content() == "Sampling"
    # what had come whole is not asked for again
    assert asked_after == [None, "1"]


def test_the_token_is_asked_for_and_stays_out_of_addresses(live: Live, open_page: OpenPage) -> None:
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
    page.goto(live.address)
    page.get_by_text("give a bearer token").wait_for()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Token").fill("open sesame")
    # the key that one presses after typing it
    dialog.get_by_label("Token").press("Enter")
    wait_for_model(page)
    assert not any("sesame" in url for url in [*addresses, page.url])


def test_previewed_paths_are_the_ones_that_are_rendered(live: Live, open_page: OpenPage) -> None:
    page = open_page(live.address)
    # a browser that kept some of the modules would mix two versions after an upgrade
    module = page.request.get(f"{live.address}/page/camera.js", timeout=PATIENCE)
    assert module.headers["cache-control"] == "no-cache"
    specs = ["arc:-40", "arc:25,3", "pan:12.5", "tilt:-9", "zoom:1.5", "crane:0.8"]
    specs += ["translate:1,-0.5,2", "static", "pan:20+tilt:10", "tilt:10 + pan:20", "pan:1+arc:9"]
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
    # several are sent as they add up
    sent = page.evaluate(
        """async () => {
          const { cameraOf, still } = await import("/page/camera.js");
          return [{}, { arc: 30 }, { tilt: 10, pan: 20.5 }, { zoom: -1, arc: 2, tilt: 3 },
            { pan: 4, slide: -1, lift: 0.5 }]
            .map((amounts) => cameraOf({ ...still(), ...amounts }));
        }"""
    )
    assert sent == [
        "static",
        "arc:30",
        "pan:20.5+tilt:10",
        "arc:2+tilt:3+zoom:-1",
        "pan:4+translate:-1,-0.5,0",
    ]
    for spec in sent:
        assert named_trajectory(spec, 5, (96, 160)).name == spec


def test_what_is_too_large_is_not_sent(live: Live, open_page: OpenPage) -> None:
    most = live.config.limits.upload_bytes
    page = open_page(live.address)
    wait_for_model(page)
    assert page.locator("#output").inner_text().startswith("Turns of 64 \N{MULTIPLICATION SIGN} 48")
    assert page.locator("#pick-limit").inner_text() == "or choose a file, up to 1.00\u00a0MiB"
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    video = {"name": "long.mp4", "mimeType": "video/mp4", "buffer": bytes(3 * most)}
    problem = page.locator("#drop-state .problem")
    page.set_input_files("#file", video)
    problem.get_by_text("long.mp4 has 3.00 MiB, more than the 1.00 MiB").wait_for()
    assert asked == []

    # a page that takes the limit for a larger one shows the service's own words
    def enlarge(route: Route) -> None:
        answer = route.fetch(timeout=PATIENCE)
        models = answer.json()
        models["data"][0]["limits"]["upload_bytes"] = 100 * most
        route.fulfill(response=answer, json=models)

    page.route("**/v1/models", enlarge)
    page.reload()
    wait_for_model(page)
    page.set_input_files("#file", video)
    problem.get_by_text(f"the body has more than {2 * most} bytes").wait_for()
    assert problem.locator("code").inner_text() == "too_large"


@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_stands_at_once_and_stays(
    live: Live, open_page: OpenPage, upload: Callable[..., Any], client: httpx.Client, screen: str
) -> None:
    """The browser's own observers: what is painted last of the large, and what moves by itself."""
    session = upload(client)["id"]
    found = {}
    for place, there in (("", "#composer[data-kind]"), (f"#session={session}", "#history li")):
        page = open_page("about:blank", viewport=SCREENS[screen])
        page.goto(f"{live.address}/{place}")
        page.locator(there).first.wait_for(state="attached")
        settle(page)
        found[place] = painted(page)
        assert found[place]["shift"] <= MOST_SHIFT, found[place]
        assert found[place]["paint"] > 0
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores:
        pytest.skip(f"{load:.1f} processes want {cores} cores: no time tells of the page's own")
    assert found[""]["paint"] <= MOST_PAINT_MS, found


def test_videos_that_drift_apart_are_brought_together(live: Live, open_page: OpenPage) -> None:
    # where nothing else draws: the clock is the test's own, two videos have 16 frames at 8 a second
    page = open_page(f"{live.address}/healthz")
    times: dict[str, list[float]] = page.evaluate(
        """async () => {
          const { Player } = await import("/page/player.js");
          class Video extends EventTarget {
            readyState = HTMLMediaElement.HAVE_ENOUGH_DATA;
            duration = 2;
            currentTime = 0;
            play() { return Promise.resolve(); }
            pause() {}
          }
          const ticks = [];
          window.requestAnimationFrame = (callback) => ticks.push(callback);
          const html = await (await fetch("/")).text();
          const controls = new DOMParser().parseFromString(html, "text/html")
            .querySelector(".transport");
          const player = new Player(controls, () => {});
          const videos = [new Video(), new Video()];
          player.setTimeline(8, 16);
          videos.forEach((video, index) => player.add(String(index), video));
          player.play();
          const after = async (...times) => {
            times.forEach((time, index) => { videos[index].currentTime = time; });
            while (!ticks.length) await new Promise(setTimeout);
            ticks.shift()();
            return videos.map((video) => video.currentTime);
          };
          return {
            near: await after(1, 0.875),
            far: await after(1, 0.5),
            end: await after(2, 1.9375),
          };
        }"""
    )
    # a frame is let be, more is made up for, and at the end all begin again in their first frame
    assert times == {"near": [1, 0.875], "far": [1, 1], "end": [0.0625, 0.0625]}


SAID = {
    "move left and look down": {"slide": -1, "tilt": -12},
    "orbit right 30 degrees": {"arc": 30},
    "look left and down a little": {"pan": -20, "tilt": -6},
    "go forward, then rise": {"zoom": 1.5, "lift": 0.8},
    "pull back far": {"zoom": -3},
    "tilt up 300": {"tilt": 45},
    "stay": {},
    "don't move": {},
    "orbit 30 to the left": {"arc": -30},
    "thirty degrees right orbit": {"arc": 30},
    "orbit right by forty-five": {"arc": 45},
    "pan left 10°, tilt up 5 degrees": {"pan": -10, "tilt": 5},
    "pan right -10": {"pan": -10},
    "move 50 cm left": {"slide": -0.5},
    "move left 2 metres and rise 1 m": {"slide": -2, "lift": 1},
    "pull back and up": {"zoom": -1.5, "lift": 0.8},
    "push in slowly while rising": {"zoom": 1.5, "lift": 0.8},
}
# a part of which would be another move than is meant, or none
UNREAD = [
    "make it nicer",
    "obrit rigth 30",
    "do not move left",
    "zoom left",
    "zoom in 2x",
    "zoom in 50%",
    "orbit left by half a turn",
    "orbit right 2 metres",
    "move left 30 degrees",
]


def test_plain_words_are_moves(live: Live, open_page: OpenPage) -> None:
    page = open_page(f"{live.address}/healthz")
    found = page.evaluate(
        """async (said) => {
          const { parseMoves } = await import("/page/moves.js");
          return said.map(parseMoves);
        }""",
        [*SAID, *UNREAD],
    )
    for words, expected in zip(SAID, found, strict=False):
        moved = {axis: amount for axis, amount in expected["amounts"].items() if amount}
        assert (moved, expected["unread"]) == (SAID[words], []), words
        assert expected["limited"] == (["tilt"] if "300" in words else []), words
    for words, expected in zip(UNREAD, found[len(SAID) :], strict=True):
        assert (expected["unread"], any(expected["amounts"].values())) == ([words], False)


def test_keyframes_are_a_path_that_the_service_takes(
    live: Live, client: httpx.Client, upload: Callable[..., Any], open_page: OpenPage
) -> None:
    page = open_page(f"{live.address}/healthz")
    path = page.evaluate(
        """async () => {
          const { trajectoryOf } = await import("/page/keyframes.js");
          const { still } = await import("/page/camera.js");
          const keys = [[0, still()], [4, { ...still(), arc: 40 }], [8, { ...still(), arc: 40 }]];
          return trajectoryOf(keys, 9, [48, 64]);
        }"""
    )
    poses = np.array(path["poses"])
    expected = named_poses("arc:40", 2).numpy()
    for frame, at in ((0, 0), (4, 1), (8, 1)):
        np.testing.assert_allclose(poses[frame].ravel(), expected[at].ravel(), atol=1e-5)
    # half of the way in half of the time, and slow at both ends
    halfway = named_poses("arc:20", 2).numpy()[1]
    np.testing.assert_allclose(poses[2].ravel(), halfway.ravel(), atol=1e-5)
    assert np.abs(poses[1] - poses[0]).sum() < np.abs(poses[2] - poses[1]).sum()
    session = upload(client)["id"]
    answer = client.post(f"/v1/sessions/{session}/turns", json={"camera": path})
    assert answer.status_code == 202, answer.text


def test_a_part_of_a_long_video_and_what_a_second_tab_wrote(
    live: Live, client: httpx.Client, open_page: OpenPage, long_clip: Path
) -> None:
    from playwright.sync_api import expect

    page = open_page(live.address, reduced_motion="reduce")
    wait_for_model(page)
    page.get_by_text("How it is read").click()
    page.get_by_label("Edges").select_option("letterbox")
    page.set_input_files("#file", long_clip)
    wait_for_session(page)
    first = page.url.partition("session=")[2].partition("&")[0]
    assert client.get(f"/v1/sessions/{first}").json()["fit"] == "letterbox"
    page.get_by_role("slider", name="First frame of the part").fill("5")
    expect(page.locator("#part output")).to_contain_text("Frames 6\N{EN DASH}14 of")
    page.get_by_role("button", name="Use this part").click()
    expect(page.locator("#part output")).to_contain_text("Frames 6\N{EN DASH}14 of")
    wait_for_page(page, "(first) => !location.hash.includes(first)", first)
    wait_for_session(page)
    second = page.url.partition("session=")[2].partition("&")[0]
    found = client.get(f"/v1/sessions/{second}").json()
    assert found["source_frames"] == list(range(5, 14)) and found["fit"] == "letterbox"
    # the one without turns that it was begun with is gone
    assert client.get(f"/v1/sessions/{first}").status_code == 404

    # a note of this tab does not take the place of one that another tab wrote meanwhile
    client.patch(f"/v1/sessions/{second}", json={"notes": "theirs"})
    page.locator(".menu summary").click()
    notes = page.get_by_label("Notes on the video")
    notes.fill("mine")
    notes.blur()
    refusal = page.locator("#session-state .problem")
    expect(refusal).to_contain_text("changed elsewhere")
    assert client.get(f"/v1/sessions/{second}").json()["notes"] == "theirs"
    with page.expect_response(lambda answer: answer.request.method == "PATCH"):
        refusal.get_by_role("button", name="Try again").click()
    expect(refusal).to_have_count(0)
    assert client.get(f"/v1/sessions/{second}").json()["notes"] == "mine"
    assert page.evaluate("document.activeElement !== document.body")
