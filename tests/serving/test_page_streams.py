"""The page of a service that streams: it plays while the stream grows, and changes its prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.serving.browsing import DESKTOP, screenshots, wait_for_page
from tests.serving.fake_streams import Negatives

if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture(scope="module")
def address(
    serving_engine: Callable[..., Any],
    causal_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    store = tmp_path_factory.mktemp("store")
    with serving_engine(store, checkpoint=str(causal_folder)) as service:
        yield service.address


def test_a_stream_plays_changes_and_stops(
    address: str, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    page = open_page(address)
    page.get_by_label("Prompt").fill("a red ball")
    page.get_by_role("button", name="Start").click()
    wait_for_page(page, "() => document.querySelector('.live-video').currentTime > 0.5")
    assert page.evaluate("() => document.querySelector('.live-video').videoWidth") == 48
    # what its viewer has stopped stays so while more of it comes
    page.evaluate("() => document.querySelector('.live-video').pause()")
    held = page.evaluate("() => document.querySelector('.live-video').buffered.end(0)")
    wait_for_page(
        page, "(held) => document.querySelector('.live-video').buffered.end(0) > held + 1", held
    )
    assert page.evaluate("() => document.querySelector('.live-video').paused")
    page.get_by_label("Prompt").fill("a blue box")
    page.get_by_role("button", name="Change prompt").click()
    page.get_by_text("The prompt holds from block").wait_for(state="attached")
    with httpx.Client(base_url=address, timeout=300) as client:
        (stream,) = client.get("/v1/streams").json()["data"]
        assert (stream["state"], stream["prompt"]) == ("running", "a blue box")
        # a prompt that is not read to its end is said, and changes nothing
        page.get_by_label("Prompt").fill("a word " * 99)
        page.get_by_role("button", name="Change prompt").click()
        page.locator("#streams [role=alert]").wait_for()
        page.get_by_label("Prompt").fill("a blue box")
        page.get_by_role("button", name="Change prompt").click()
        screenshots(page, tmp_path)
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("the stream was cancelled").wait_for()
        now = client.get(f"/v1/streams/{stream['id']}").json()
        assert (now["state"], now["prompt"]) == ("cancelled", "a blue box")
        assert page.get_by_role("button", name="Stop").is_disabled()
        # what is kept is there after a reload, plays again, and can be deleted
        page.reload()
        row = page.get_by_role("listitem").filter(has_text="a blue box")
        assert "cancelled" in row.inner_text()
        row.get_by_role("button", name="Play").click()
        wait_for_page(page, "() => document.querySelector('.live-video').currentTime > 0.5")
        screenshots(page, tmp_path)
        row.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete it").click()
        row.wait_for(state="detached")
        assert client.get("/v1/streams").json()["data"] == []
        assert not page.locator("#streams [role=alert]").is_visible()


def test_a_camera_is_edited_live(
    serving: Callable[..., Any], open_page: Callable[..., Page], tmp_path: Path
) -> None:
    backend = Negatives()
    with serving(tmp_path / "store", backend) as service:
        page = open_page(service.address)
        page.get_by_label("Prompt").fill("a negative")
        place = page.get_by_label("Prompt").bounding_box()
        page.get_by_role("button", name="Start").click()
        wait_for_page(page, "() => document.querySelector('.live-video').currentTime > 0.5")
        assert page.locator(".live-camera").is_visible()
        # what tells it what to show has not moved, nor is it under the window's edge
        now = page.get_by_label("Prompt").bounding_box()
        assert place is not None and now is not None
        assert now["y"] == place["y"] < DESKTOP["height"] - now["height"]
        assert page.evaluate("() => document.querySelector('.live-video').videoWidth") == 64
        screenshots(page, tmp_path)
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("the stream was cancelled").wait_for()
        assert page.locator(".live-camera").count() == 0
        (given,) = backend.given.values()
        # the pattern: frames of many colours, and not all alike
        frames = [given[at : at + 48 * 64 * 3] for at in range(0, len(given), 48 * 64 * 3)]
        assert len(frames) >= 5 and len(set(frames)) > 1 and len(set(frames[0])) > 2
        with service.client() as client:
            (stream,) = client.get("/v1/streams").json()["data"]
            assert (stream["state"], stream["error"]["code"]) == ("cancelled", "cancelled")
