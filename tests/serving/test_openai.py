"""The real `openai` client drives /v1/videos."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai")

FIRST = b"frames of turn 1"
Events = Callable[..., list[tuple[int, str, dict[str, Any]]]]


@pytest.fixture
def openai_client(live: Any) -> Iterator[Any]:
    with warnings.catch_warnings():
        # OpenAI ends its own service of this shape; the shape stays
        warnings.simplefilter("ignore", DeprecationWarning)
        with openai.OpenAI(
            base_url=f"{live.address}/v1", api_key="none", timeout=600, max_retries=0
        ) as client:
            yield client


def test_create_retrieve_list_download_remix_delete(
    openai_client: Any, client: Any, events_of: Events, source_clip: Path
) -> None:
    videos = openai_client.videos
    assert [model.id for model in openai_client.models.list()] == ["fake"]
    video = videos.create(
        prompt="arc:-40", input_reference=source_clip, model="fake", size="64x48", seconds="1"
    )
    assert (video.object, video.model, video.prompt) == ("video", "fake", "arc:-40")
    assert (video.size, video.seconds, video.error) == ("64x48", "1.125", None)
    events_of(client, video.id)
    done = videos.retrieve(video.id)
    assert (done.status, done.progress) == ("completed", 100)
    assert done.completed_at >= done.created_at
    content = videos.download_content(video.id)
    assert (content.read(), content.response.headers["content-type"]) == (FIRST, "video/mp4")
    picture = videos.download_content(video.id, variant="thumbnail")
    assert picture.response.headers["content-type"] == "image/jpeg"

    remix = videos.remix(video.id, prompt="pan_right", extra_body={"seed": 5})
    events_of(client, remix.id)
    remix = videos.retrieve(remix.id)
    assert remix.remixed_from_video_id == video.id
    # it is the second turn of the same session
    job = client.get(f"/v1/jobs/{remix.id}").json()
    assert (job["number"], job["request"]["seed"]) == (2, 5)
    assert [one.id for one in videos.list(limit=2)][:2] == [remix.id, video.id]

    with pytest.raises(openai.ConflictError, match="remember this one"):
        videos.delete(video.id)
    alone = videos.create(
        prompt="", input_reference=source_clip, extra_body={"camera": "tilt_up", "seed": 4}
    )
    # numbers are text in a form
    assert client.get(f"/v1/jobs/{alone.id}").json()["request"] == {"camera": "tilt_up", "seed": 4}
    events_of(client, alone.id)
    deleted = videos.delete(alone.id)
    assert (deleted.id, deleted.deleted) == (alone.id, True)
    with pytest.raises(openai.NotFoundError, match="no job"):
        videos.retrieve(alone.id)
    client.delete(f"/v1/sessions/{job['session']}")


def test_what_is_not_made_is_refused(openai_client: Any, client: Any, source_clip: Path) -> None:
    videos = openai_client.videos
    before = len(client.get("/v1/sessions?limit=100").json()["data"])

    def create(**asked: Any) -> None:
        videos.create(**{"prompt": "pan:5", "input_reference": source_clip} | asked)

    with pytest.raises(openai.BadRequestError, match=r"1\.125 seconds"):
        create(seconds="12")
    with pytest.raises(openai.UnprocessableEntityError, match="fly_away"):
        create(prompt="fly_away")
    with pytest.raises(openai.UnprocessableEntityError, match="seed"):
        create(extra_body={"seed": "many"})
    with pytest.raises(openai.UnprocessableEntityError, match="exactly one"):
        videos.create(prompt="pan:5")
    with pytest.raises(openai.UnprocessableEntityError, match="cannot be opened"):
        create(input_reference=b"no video")
    # a refused turn leaves no session behind
    assert len(client.get("/v1/sessions?limit=100").json()["data"]) == before


def test_json_makes_one_more_video_of_a_session(
    client: Any, upload: Callable[..., Any], events_of: Events
) -> None:
    session = upload(client)["id"]
    asked = {"session_id": session, "prompt": "pan:5"}
    video = client.post("/v1/videos", json=asked).json()
    assert (video["session_id"], video["object"]) == (session, "video")
    events_of(client, video["id"])
    for body, status in (
        ({**asked, "session_id": "session_x"}, 404),
        ({**asked, "frames": 3}, 422),
        ({"prompt": "pan:5"}, 422),
        ([], 422),
    ):
        assert client.post("/v1/videos", json=body).status_code == status
    answer = client.post("/v1/videos", content=b"{}", headers={"Content-Type": "text/plain"})
    assert answer.json()["error"]["code"] == "unsupported_media"
