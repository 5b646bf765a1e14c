"""The page when answers come late, come in another order, or are lost."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image

from tests.serving.browsing import (
    PATIENCE,
    Held,
    delete_session,
    settle,
    wait_for_model,
    wait_for_session,
    wait_for_turn,
)
from tests.serving.conftest import HeldBackend, Live, until
from tests.serving.fake_backend import SIZE

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page, Route

OpenPage = Callable[..., "Page"]
Upload = Callable[..., dict[str, Any]]
# what the page reads of a turn
REPORT: dict[str, Any] = {
    "plan": {"tokens": 10, "tokens_by_kind": {"target": 10}, "merges": []},
    "memory": {"retrieved": [], "num_candidates": 0},
    "seconds": {"sampling": 1.0},
    "flops_per_forward": {"attention": 1.0},
    "flops": 1.0,
    "flops_exact": 1.0,
    "approximations": [],
    "num_inference_steps": 3,
    "guidance_scale": 1.0,
    "seed": 0,
    "checkpoint": "fake",
    "device": "cpu",
    "dtype": "float32",
}


class ShownBackend(HeldBackend):
    """Whose turns the page can show."""

    shown = REPORT


@pytest.fixture(scope="module")
def service(
    serving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("store"), ShownBackend()) as service:
        yield service


@pytest.fixture
def client(service: Live) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


@pytest.fixture
def page(service: Live, open_page: OpenPage) -> Page:
    page = open_page(service.address)
    wait_for_model(page)
    return page


@pytest.fixture
def begin(
    client: httpx.Client, upload: Upload, events_of: Callable[..., Any]
) -> Callable[..., str]:
    """Make a session whose turns of some cameras are done; gives its id."""

    def begin(*cameras: str) -> str:
        session: str = upload(client)["id"]
        for camera in cameras:
            turn = client.post(f"/v1/sessions/{session}/turns", json={"camera": camera})
            events_of(client, turn.json()["id"])
        return session

    return begin


def show_picture(page: Page) -> None:
    """Give a picture that a browser can show as the first turn's thumbnail."""
    jpeg = io.BytesIO()
    Image.new("RGB", SIZE[::-1], "teal").save(jpeg, "JPEG")
    page.route(
        "**/1/thumbnail",
        lambda route: route.fulfill(body=jpeg.getvalue(), content_type="image/jpeg"),
    )


def link(page: Page, session: str) -> Locator:
    return page.locator(f".session-link[data-session={session}]")


def go_to(page: Page, session: str) -> None:
    link(page, session).click()
    wait_for_session(page)


def go_home(page: Page) -> None:
    page.get_by_role("button", name="mv2v, all videos").click()
    page.locator("#welcome h1").wait_for()


def test_a_list_that_was_overtaken_is_not_shown(page: Page, source_clip: Path) -> None:
    lists = re.compile(r"/v1/sessions\?")
    early = Held(page, lists)
    page.set_input_files("#file", source_clip)
    early.wait()
    wait_for_session(page)
    session = page.url.partition("session=")[2].partition("&")[0]
    with page.expect_response(lists):
        delete_session(page)
    early.let_go()
    assert link(page, session).count() == 0


def test_the_picture_waits_for_nothing_but_its_own(
    service: Live, open_page: OpenPage, begin: Callable[..., str]
) -> None:
    from playwright.sync_api import expect

    session = begin("pan_right")
    page = open_page("about:blank")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.rpartition("/")[2]))
    model, every = Held(page, "**/v1/models"), Held(page, re.compile(r"/v1/sessions\?"))
    script = Held(page, "**/page/page.js")
    show_picture(page)
    # the turns and the picture are read beside the module and the model, and once
    page.goto(f"{service.address}/#session={session}", wait_until="commit")
    script.wait()
    model.wait()
    # and the picture stands before either of them is there
    picture = page.locator(".pane > img")
    expect(picture).to_be_visible()
    before = picture.bounding_box()
    script.let_go()
    model.wait()
    model.let_go()
    # nor does it go or move until its video is there, which is before the list of videos is
    page.locator(".pane[data-shown='1'] video[src]").wait_for(state="attached")
    expect(picture).to_be_visible()
    assert picture.bounding_box() == before
    page.locator("#history [data-id=source] video").wait_for(state="attached")
    assert asked.index("thumbnail") < asked.index("video") < asked.index("source")
    every.let_go()
    link(page, session).wait_for()
    for once in ("models", session, "turns", "thumbnail", "video"):
        assert asked.count(once) == 1, once


@pytest.mark.parametrize(
    ("view", "has_picture"),
    [("show=1", True), ("show=9", False), ("show=source", False), ("beside=source", False)],
)
def test_the_first_picture_is_of_what_the_address_names(
    service: Live,
    open_page: OpenPage,
    begin: Callable[..., str],
    view: str,
    has_picture: bool,
) -> None:
    session = begin("pan_right", "pan_left")
    page = open_page("about:blank")
    show_picture(page)
    model = Held(page, "**/v1/models")
    page.goto(f"{service.address}/#session={session}&{view}", wait_until="commit")
    model.wait()
    page.evaluate("() => window.begun.stands")
    pictures = page.locator(".pane > img").evaluate_all("(all) => all.map((i) => i.dataset.path)")
    assert pictures == ([f"v1/sessions/{session}/turns/1/thumbnail"] if has_picture else [])
    model.let_go()
    wait_for_turn(page, 2)


def test_a_turn_under_way_is_shown_and_not_the_one_before_it(
    service: Live, open_page: OpenPage, client: httpx.Client, begin: Callable[..., str]
) -> None:
    session = begin("pan_right")
    service.backend.hold()
    client.post(f"/v1/sessions/{session}/turns", json={"camera": "pan_left"}).raise_for_status()
    page = open_page("about:blank")
    show_picture(page)
    page.goto(f"{service.address}/#session={session}")
    page.locator(".pane .job").wait_for()
    assert page.locator(".pane > img").count() == 0
    service.backend.let_go()
    wait_for_turn(page, 2)


def test_a_session_that_was_left_before_it_came(
    page: Page, client: httpx.Client, upload: Upload
) -> None:
    first, second = upload(client)["id"], upload(client)["id"]
    page.reload()
    late = Held(page, f"**/v1/sessions/{first}")
    link(page, first).click()
    late.wait()
    go_home(page)
    late.let_go()
    assert page.evaluate("location.hash") == ""
    assert page.locator("#welcome h1").is_visible()
    go_to(page, first)

    # nor does one that fails take the next one's place
    late = Held(page, f"**/v1/sessions/{second}")
    link(page, second).click()
    late.wait()
    # nothing of the session before it can be used meanwhile
    assert page.locator("#session[inert]").count() == 1
    go_to(page, first)
    late.let_go(status=404, json={"error": {"message": "there is none", "code": "not_found"}})
    assert page.locator("#history [data-id=source]").is_visible()
    assert page.locator("#page-state").inner_text() == ""

    # a session that plays does not write itself into the address when it is left
    page.get_by_role("button", name="Pause", exact=True).wait_for()
    go_home(page)
    assert page.evaluate("location.hash") == ""


def test_a_turn_whose_session_was_left(
    service: Live, page: Page, client: httpx.Client, upload: Upload
) -> None:
    first, second = upload(client)["id"], upload(client)["id"]
    page.reload()
    service.backend.hold()
    go_to(page, first)
    late = Held(page, "**/turns", "POST")
    page.get_by_role("button", name="Render this view").click()
    late.wait()
    go_to(page, second)
    late.let_go()
    assert page.locator(".job").count() == 0
    # its session shows it, and only there it ends
    go_to(page, first)
    page.locator(".job").wait_for()
    service.backend.let_go()
    wait_for_turn(page, 1)
    assert page.locator(".job").count() == 0


def test_a_turn_that_ends_while_its_session_is_opened(
    service: Live,
    page: Page,
    client: httpx.Client,
    upload: Upload,
    events_of: Callable[..., Any],
) -> None:
    session = upload(client)["id"]
    service.backend.hold()
    path = f"/v1/sessions/{session}/turns"
    job = client.post(path, json={"camera": "pan_right"}).json()["id"]

    # the turns are read before it ends, and the jobs after
    waiting: list[Route] = []
    page.route(re.compile(r"/v1/jobs\?session="), lambda route: waiting.append(route))
    turns = Held(page, f"**{path}")
    page.reload()
    link(page, session).click()
    turns.wait()
    service.backend.let_go()
    events_of(client, job)
    turns.let_go()
    waiting[0].continue_()
    wait_for_turn(page, 1)
    assert page.locator(".job").count() == 0


def test_a_turn_of_which_the_answer_was_lost(
    service: Live,
    page: Page,
    client: httpx.Client,
    upload: Upload,
    events_of: Callable[..., Any],
) -> None:
    session = upload(client)["id"]
    page.reload()
    go_to(page, session)
    lost: list[str] = []

    def lose_it(route: Route) -> None:
        if lost or route.request.method != "POST":
            route.continue_()
            return
        lost.append(route.fetch(timeout=PATIENCE).json()["id"])
        route.abort()

    page.route("**/turns", lose_it)
    page.get_by_role("button", name="Render this view").click()
    problem = page.locator("#composer .problem")
    problem.get_by_text("The service does not answer").wait_for()
    events_of(client, lost[0])
    # asked for once more, it is the one that is long finished
    problem.get_by_role("button", name="Try again").click()
    wait_for_turn(page, 1)
    settle(page)
    assert page.locator(".job").count() == 0
    assert len(client.get(f"/v1/sessions/{session}/turns").json()["data"]) == 1


def test_what_was_said_is_what_is_asked_for(
    service: Live, page: Page, client: httpx.Client, upload: Upload
) -> None:
    """Render waits until the words are read, and asks for nothing that was not said."""
    from playwright.sync_api import expect

    session = upload(client)["id"]
    page.reload()
    go_to(page, session)
    render, say = page.locator("#render"), page.get_by_label("Say the move")
    late = Held(page, "**/page/moves.js")
    say.fill("orbit right 300")
    say.press("Enter")
    late.wait()
    assert client.get(f"/v1/jobs?session={session}").json()["data"] == []
    late.let_go()
    wait_for_turn(page, 1)
    expect(page.locator("#heard")).to_have_text("It goes no further than Arc right 120°.")
    say.fill("make it nicer")
    say.press("Enter")
    expect(page.locator("#composer .problem")).to_contain_text("Not understood: make it nicer")
    # the dial, or words that are understood, are asked for again
    page.locator("#axis-pan").fill("5")
    render.click()
    wait_for_turn(page, 2)
    turns = client.get(f"/v1/sessions/{session}/turns").json()["data"]
    assert [turn["request"]["camera"] for turn in turns] == ["arc:120", "pan:5"]


def test_two_tabs_on_one_session(
    service: Live,
    page: Page,
    client: httpx.Client,
    upload: Upload,
    open_page: OpenPage,
    events_of: Callable[..., Any],
) -> None:
    from playwright.sync_api import expect

    def made(session: str) -> None:
        job = client.post(f"/v1/sessions/{session}/turns", json={"camera": "pan_right"}).json()
        events_of(client, job["id"])

    session = upload(client)["id"]
    for _ in range(2):
        made(session)
    page.reload()
    go_to(page, session)
    wait_for_turn(page, 2)
    other = open_page(f"{service.address}/#session={session}&show=1")
    wait_for_turn(other, 2)
    expect(other.locator("#turn-name")).to_be_visible()

    # one deletes the turn that the other shows: what the other writes is not lost in silence
    page.keyboard.press("1")
    page.get_by_role("button", name="Delete turn").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete it").click()
    expect(page.locator("#history [data-id='1']")).to_have_count(0)
    other.locator("#turn-name").fill("the first")
    other.locator("#turn-name").press("Enter")
    refusal = other.locator("#shown .problem")
    expect(refusal.first).to_contain_text("turn 1")
    expect(other.locator("#turn-name")).to_have_value("the first")

    # whoever comes back to a tab finds what the other has made, and what it has deleted gone
    service.backend.hold()
    job = client.post(f"/v1/sessions/{session}/turns", json={"camera": "pan_right"}).json()["id"]
    other.evaluate("() => window.dispatchEvent(new Event('focus'))")
    expect(other.locator("#history [data-id='1']")).to_have_count(0)
    expect(other.locator(f"#history [data-id={job}]")).to_have_count(1)
    expect(other.locator("#history [data-id='2'] [aria-current]")).to_have_count(1)
    service.backend.let_go()
    wait_for_turn(other, 3)
    page.evaluate("() => window.dispatchEvent(new Event('focus'))")
    wait_for_turn(page, 3)

    # what is typed and not yet written back stays, whatever the other has changed meanwhile
    other.locator(".menu summary").click()
    notes = other.get_by_label("Notes on the video")
    notes.fill("typed here")
    other.locator("#turn-name").fill("typed too")
    client.patch(f"/v1/sessions/{session}", json={"name": "theirs"}).raise_for_status()
    favourite = client.patch(f"/v1/sessions/{session}/turns/2", json={"is_favourite": True})
    favourite.raise_for_status()
    other.evaluate("() => window.dispatchEvent(new Event('focus'))")
    expect(other.locator("#session-name")).to_have_value("theirs")
    expect(other.locator("#shown [data-part=star]")).to_have_attribute("aria-pressed", "true")
    expect(other.locator("#turn-name")).to_have_value("typed too")

    # a session that the other tab deletes is told of, with what was typed still there
    delete_session(page)
    other.get_by_label("Say the move").fill("move left")
    other.get_by_role("button", name="Render this view").click()
    expect(other.locator("#composer .problem")).to_contain_text("not_found")
    expect(other.get_by_label("Say the move")).to_have_value("move left")
    other.evaluate("() => window.dispatchEvent(new Event('focus'))")
    expect(other.locator("#session-state .problem")).to_contain_text("not_found")
    expect(link(other, session)).to_have_count(0)

    # and whoever comes to its address is not sent to try it again and again
    other.reload()
    expect(other.locator("#page-state .problem")).to_contain_text("it may have been deleted")
    expect(other.locator("#page-state").get_by_role("button")).to_have_text(["Dismiss"])


def test_what_was_read_last_is_shown_though_an_older_answer_came_between(
    page: Page, client: httpx.Client, upload: Upload
) -> None:
    from playwright.sync_api import expect

    session = upload(client)["id"]
    page.reload()
    go_to(page, session)
    come_back = "() => window.dispatchEvent(new Event('focus'))"
    asked = re.compile(f"/v1/sessions/{session}$")
    early = Held(page, asked)
    page.evaluate(come_back)
    early.wait()
    client.patch(f"/v1/sessions/{session}", json={"name": "theirs"}).raise_for_status()
    late = Held(page, asked)
    page.evaluate(come_back)
    late.wait()
    early.let_go()
    late.let_go()
    expect(page.locator("#session-name")).to_have_value("theirs")


def test_a_turn_that_another_remembers_is_deleted(
    service: Live, page: Page, client: httpx.Client, upload: Upload, events_of: Callable[..., Any]
) -> None:
    """While it is remembered it stays, and the page says until when; afterwards it goes."""
    from playwright.sync_api import expect

    session = upload(client)["id"]
    job = client.post(f"/v1/sessions/{session}/turns", json={"camera": "pan_right"}).json()["id"]
    events_of(client, job)
    page.reload()
    go_to(page, session)
    service.backend.hold()
    page.get_by_role("button", name="Render this view").click()
    page.locator(".job").wait_for()
    client_sees_running = f"/v1/sessions/{session}/turns/1"
    page.locator("#history [data-id='1'] button").click()
    page.get_by_role("button", name="Delete turn").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete it").click()
    refusal = page.locator("#shown .problem")
    expect(refusal).to_contain_text("is being made")
    assert client.get(client_sees_running).status_code == 200
    service.backend.let_go()
    wait_for_turn(page, 2)
    refusal.get_by_role("button", name="Dismiss").click()
    page.get_by_role("button", name="Delete turn").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete it").click()
    expect(page.locator("#history [data-id='1']")).to_have_count(0)
    assert client.get(client_sees_running).status_code == 404


def test_the_connection_is_lost_in_each_state(
    service: Live, page: Page, client: httpx.Client, source_clip: Path
) -> None:
    """It is said where it happened, nothing is lost, and once more is enough."""
    from playwright.sync_api import expect

    lost = "The service does not answer"

    def once_more(place: str) -> None:
        problem = page.locator(f"{place} .problem")
        expect(problem).to_contain_text(lost)
        page.context.set_offline(False)
        problem.get_by_role("button", name="Try again").click()
        expect(problem).to_have_count(0)

    def num_sessions() -> int:
        return len(client.get("/v1/sessions", params={"limit": 100}).json()["data"])

    # a video is sent
    before = num_sessions()
    page.context.set_offline(True)
    page.set_input_files("#file", source_clip)
    once_more("#drop-state")
    wait_for_session(page)
    session = page.url.partition("session=")[2].partition("&")[0]
    assert num_sessions() == before + 1

    # a session is opened
    go_home(page)
    page.context.set_offline(True)
    link(page, session).click()
    once_more("#page-state")
    wait_for_session(page)

    # something is written of it
    page.locator(".menu summary").click()
    page.context.set_offline(True)
    page.get_by_label("Notes on the video").fill("from the left")
    page.get_by_label("Notes on the video").blur()
    expect(page.get_by_label("Notes on the video")).to_have_value("from the left")
    once_more("#session-state")
    until(lambda: client.get(f"/v1/sessions/{session}").json()["notes"] == "from the left")

    # a turn is asked for; it is finished and its record is lost on the way
    page.context.set_offline(True)
    page.get_by_role("button", name="Render this view").click()
    cut: list[str] = []

    def cut_once(route: Route) -> None:
        cut.append(route.request.url)
        if len(cut) > 1:
            route.continue_()
        else:
            route.abort()

    page.route(f"**/v1/sessions/{session}/turns/1", cut_once)
    once_more("#composer")
    once_more(".job")
    wait_for_turn(page, 1)
    assert len(client.get(f"/v1/sessions/{session}/turns").json()["data"]) == 1

    # a turn is marked, and deleted
    page.context.set_offline(True)
    page.locator("#shown").get_by_role("button", name="Favourite").click()
    expect(page.locator("#shown .problem")).to_contain_text(lost)
    page.get_by_role("button", name="Delete turn").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete it").click()
    expect(page.locator("#shown .problem")).to_contain_text(lost)
    expect(page.locator("#history [data-id='1']")).to_have_count(1)
    page.context.set_offline(False)
    page.locator("#shown").get_by_role("button", name="Favourite").click()
    expect(page.locator("#history [data-id='1'] button")).to_have_attribute(
        "aria-label", re.compile("favourite$")
    )
    expect(page.locator("#shown .problem")).to_have_count(0)
