"""References and a mask over HTTP: sent with a video, kept with its session, refused as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

from mv2v_engine import Engine
from mv2v_engine.client import Client, ServiceError
from mv2v_engine.progress import CancelToken
from mv2v_engine.serving.store.folders import result_path
from mv2v_engine.serving.work.host import Host
from mv2v_engine.serving.work.protocol import session_fields
from mv2v_engine.video.io import VideoReader, write_video
from tests.conftest import save_tiny
from tests.serving.browsing import wait_for_model, wait_for_session
from tests.serving.fake_backend import ABOUT, FakeBackend
from tests.serving.in_process import abandon, in_loop, new_session, refused, started

TAKES = {"references": True, "mask": True}
ABOUT_EDITS = {"kind": "edits", "has_text": True, "memory": "none", "guides": TAKES}
ABOUT_EDITS |= {"sampling": {**ABOUT["sampling"], "flow_shift": 5.0}}
EDIT = {"prompt": "the red one"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Masks and references of a source of 9 frames of 64x48, good ones and bad."""
    folder = tmp_path_factory.mktemp("files")
    clips = {"mask.mp4": (9, 48, 64), "short.mp4": (4, 48, 64), "small.mp4": (9, 32, 64)}
    for name, shape in clips.items():
        write_video(folder / name, torch.full((*shape, 3), 255, dtype=torch.uint8), 8.0)
    images = {"one.png": (40, 30), "two.jpg": (20, 60), "mask.png": (64, 48), "other.png": (48, 48)}
    for name, size in images.items():
        Image.new("RGB", size, (200, 40, 40)).save(folder / name)
    Image.new("RGB", (4096, 2)).save(folder / "strip.png")
    (folder / "cut.png").write_bytes((folder / "one.png").read_bytes()[:60])
    (folder / "none.png").write_bytes(b"no image")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def service(serving: Callable[..., Any], tmp_path_factory: Any) -> Iterator[Any]:
    backend = FakeBackend(**ABOUT_EDITS)
    with serving(tmp_path_factory.mktemp("store"), backend) as live:
        yield live


@pytest.fixture
def client(service: Any) -> Iterator[Client]:
    with Client(service.address, timeout=600) as client:
        yield client


def test_they_come_with_a_video(
    service: Any, client: Client, source_clip: Path, files: dict[str, Path]
) -> None:
    assert client.model().guides == TAKES
    opened = files["two.jpg"].open("rb")
    session = client.create_session(
        source_clip, references=[files["one.png"], opened], mask=files["mask.png"].read_bytes()
    )
    opened.close()
    assert (session.num_references, session.has_mask) == (2, True)
    folder = service.config.store / "sessions" / session.id
    kept = {"source": source_clip, "references/01": files["one.png"]}
    kept |= {"references/02": files["two.jpg"], "mask": files["mask.png"]}
    assert all((folder / name).read_bytes() == path.read_bytes() for name, path in kept.items())
    assert session.bytes == sum(path.stat().st_size for path in kept.values())
    # a branch has them, too, and gives them to its worker
    branch = client.branch(session, 0)
    assert (branch.num_references, branch.has_mask, branch.bytes) == (2, True, session.bytes)
    assert (folder.parent / branch.id / "references" / "02").exists()
    assert list((service.config.store / "uploads").iterdir()) == []
    # without any, all is as it was
    plain = client.create_session(source_clip)
    assert (plain.num_references, plain.has_mask) == (0, False)


BAD = {
    "none.png": ("reference", "reference 2 cannot be read as an image"),
    "cut.png": ("reference", "reference 2 cannot be read as an image"),
    "strip.png": ("reference", "reference 2 has frames of 4096x2"),
    "mask.mp4": ("reference", "reference 2 cannot be read as an image"),
    "other.png": ("mask", "the mask is 48x48, and the source that it masks 64x48"),
    "small.mp4": ("mask", "the mask is 64x32, and the source that it masks 64x48"),
    "short.mp4": ("mask", "the mask has 4 frames, and the source that it masks 9"),
}


@pytest.mark.parametrize("name", [*BAD, "a mask of nothing"])
def test_bad_ones_are_refused_as_the_command_line_refuses_them(
    service: Any, client: Client, source_clip: Path, files: dict[str, Path], name: str
) -> None:
    param, words = BAD.get(name, ("mask", "the file cannot be opened as a video"))
    bad = files.get(name, files["none.png"])
    before = len(list(client.sessions()))
    sent: Any = {"references": [files["one.png"], bad]} if param == "reference" else {"mask": bad}
    with pytest.raises(ServiceError, match=words) as caught:
        client.create_session(source_clip, **sent)
    assert (caught.value.code, caught.value.param) == (
        "video_out_of_range" if name == "strip.png" else "unreadable_video",
        param,
    )
    assert str(service.config.store) not in str(caught.value)
    assert len(list(client.sessions())) == before
    assert list((service.config.store / "uploads").iterdir()) == []


def test_text_in_place_of_a_file_is_told(service: Any, source_clip: Path) -> None:
    """As curl sends it where the @ is left out."""
    for name in ("reference", "mask", "video"):
        files = {} if name == "video" else {"video": source_clip.read_bytes()}
        parts = {**files, name: (None, "hat.png")}
        answer = httpx.post(f"{service.address}/v1/sessions", files=parts)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (422, name)
        assert f"{name} came as text, a file is expected" in error["message"]


def test_the_other_shapes_take_them(
    service: Any, client: Client, source_clip: Path, files: dict[str, Path]
) -> None:
    import httpx

    with httpx.Client(base_url=service.address, timeout=600) as http:

        def sent(fields: dict[str, str], *names: tuple[str, str]) -> Any:
            parts = [("input_reference", source_clip.read_bytes())]
            parts += [(field, files[name].read_bytes()) for field, name in names]
            form = [(field, ("a", data)) for field, data in parts]
            form = form if "session_id" not in fields else form[1:]
            return http.post("/v1/videos", data=fields, files=form).json()

        video = sent(EDIT, ("reference", "one.png"), ("mask", "mask.mp4"))
        session = client.session(video["session_id"])
        assert (session.num_references, session.has_mask) == (1, True)
        asked = EDIT | {"session_id": session.id}
        error = sent(asked, ("mask", "mask.mp4"))["error"]
        assert error["param"] == "mask" and "a session has its own" in error["message"]
        error = sent(EDIT, *[("reference", "one.png")] * 9)["error"]
        assert error["param"] == "reference" and "8 in 'reference'" in error["message"]
        error = http.post("/v1/videos", json=asked | {"mask": "mask.png"}).json()["error"]
        assert error["param"] == "mask" and "is a file" in error["message"]
        # a host that is not listed is not asked, whatever is to be fetched from it
        url = {"url": "https://images.example/one.png"}
        for name, value in (("mask_url", url["url"]), ("reference_urls", [url["url"]])):
            error = http.post("/v1/videos", json=asked | {name: value}).json()["error"]
            assert error["param"] == name and "a session has its own" in error["message"]
        images = [{"type": "image_url", "image_url": url}]
        video_too = [{"type": "video_url", "video_url": url}, *images]
        asked = EDIT | {"model": "fake", "input_references": video_too}
        error = http.post("/api/v1/videos", json=asked).json()["error"]
        assert error["code"] == "host_not_allowed"
        asked["input_references"] = [video_too[0]] * 2
        error = http.post("/api/v1/videos", json=asked).json()["error"]
        assert "may have one video, got 2" in error["message"]
        asked["input_references"] = [{"type": "audio_url", "audio_url": url}]
        error = http.post("/api/v1/videos", json=asked).json()["error"]
        assert error["message"] == (
            "input_references.0 must be an object whose 'type' is 'video_url', 'image_url', got an "
            "object"
        )
        schema = http.get("/openapi.json").json()["paths"]["/v1/sessions"]["post"]["requestBody"]
        fields = schema["content"]["multipart/form-data"]["schema"]["properties"]
        assert fields["reference"]["maxItems"] == 8 and fields["mask"]["format"] == "binary"


@in_loop
async def test_they_outlast_a_restart_and_are_missed(tmp_path: Path) -> None:
    async def sent(service: Any, **more: Any) -> dict[str, Any]:
        given = [await service.upload_path() for _ in range(2)]
        for number, path in enumerate(given):
            path.write_bytes(b"an image" * (1 + number))
        return {"references": given, **more}

    backend = FakeBackend(**ABOUT_EDITS)
    service = await started(tmp_path / "store", backend)
    session = await new_session(service, key="k", **await sent(service))
    again = await new_session(service, key="k", **await sent(service))
    assert again.id == session.id
    other = await service.upload_path()
    other.write_bytes(b"a video")
    assert (await refused(service.create_session("", other, "clip.mp4", key="k"))).code == (
        "idempotency_conflict"
    )
    folder = service.store.session(session.id)
    await abandon(service)

    service = await started(tmp_path / "store", FakeBackend(**ABOUT_EDITS))
    kept = await service.session("", session.id)
    assert kept.damage is None and session_fields(kept)["references"] == (
        "references/01",
        "references/02",
    )
    await abandon(service)
    (folder / "references" / "02").write_bytes(b"another picture")
    service = await started(tmp_path / "store", FakeBackend(**ABOUT_EDITS))
    kept = await service.session("", session.id)
    assert kept.damage is not None and "the uploaded reference is lost" in kept.damage
    assert (await refused(service.submit("", session.id, EDIT))).code == "damaged"
    await service.stop()

    service = await started(tmp_path / "views", FakeBackend())
    guides = await sent(service)
    given = [await service.upload_path(), *guides["references"]]
    given[0].write_bytes(b"a video")
    error = await refused(service.create_session("", given[0], "clip.mp4", **guides))
    assert (error.code, error.param) == ("unprocessable_turn", "reference")
    assert "fake takes no reference images" in error.message
    assert not any(path.exists() for path in given)
    await service.stop()


def test_a_worker_makes_the_edit_that_the_engine_makes(
    tmp_path: Path, moving_frames: Callable[..., torch.Tensor]
) -> None:
    checkpoint = save_tiny(
        tmp_path / "vace",
        name="vace",
        has_text=True,
        sampling={"num_frames": 5, "size": (32, 48), "num_inference_steps": 2},
        in_channels=112,
        source_channels=96,
        vace_layers=(0,),
        camera_conditioning="none",
        tokenizers=(),
        merger=None,
    )
    engine = Engine.from_pretrained(checkpoint, device="cpu")
    folder = tmp_path / "session"
    (folder / "references").mkdir(parents=True)
    write_video(tmp_path / "clip.mp4", moving_frames(5), 8.0)
    (tmp_path / "clip.mp4").rename(folder / "source")
    Image.new("RGB", (30, 20), "red").save(folder / "references" / "01", "PNG")
    mask = Image.new("RGB", (48, 32))
    mask.paste((255, 255, 255), (0, 0, 24, 32))
    mask.save(folder / "mask", "PNG")
    session = {"id": "s", "frames": 5, "window": None, "references": ["references/01"]}
    session |= {"mask": "mask"}

    def made(host: Host) -> dict[str, Any]:
        events: list[dict[str, Any]] = []
        job = {"id": "job", "number": None, "request": EDIT}
        for _ in host.run(job, session, folder, CancelToken(), events.append):
            host.tick()
        json.dumps(events, allow_nan=False)
        return events[-1]

    host = Host(engine, max_open=1)
    assert host.about["guides"] == TAKES
    done = made(host)
    assert done["type"] == "done" and done["report"]["source"]["references"] == [[32, 48]]
    host.close()
    # after a restart the session goes on with its files, and not with others
    assert made(Host(engine, max_open=1))["number"] == 1
    (folder / "mask").unlink()
    Image.new("RGB", (48, 32)).save(folder / "mask", "PNG")
    assert "whose mask is" in made(Host(engine, max_open=1))["message"]
    mask.save(tmp_path / "mask.png")
    alone = engine.session(
        folder / "source", references=[folder / "references" / "01"], mask=tmp_path / "mask.png"
    ).edit(EDIT["prompt"])
    alone.save(tmp_path / "alone.mp4")
    wanted, got = (
        VideoReader(path).read(range(5))
        for path in (tmp_path / "alone.mp4", result_path(folder, 1, "video"))
    )
    assert torch.equal(got, wanted)


# last: beside an open browser no event loop runs in this thread
def test_the_page_sends_them(
    service: Any, open_page: Callable[..., Any], source_clip: Path, files: dict[str, Path]
) -> None:
    page = open_page(service.address)
    wait_for_model(page)
    references, mask = page.get_by_label("References"), page.get_by_label("Mask")
    # they fit beside the picture
    assert page.locator("#side").evaluate("(side) => side.scrollWidth <= side.clientWidth")
    # what is refused is told by its name, and stays to be chosen anew
    references.set_input_files([files["one.png"], files["none.png"]])
    mask.set_input_files(files["mask.png"])
    page.set_input_files("#file", source_clip)
    problem = page.locator("#drop-state .problem")
    problem.get_by_text("reference 2 cannot be read as an image").wait_for()
    references.set_input_files([files["one.png"], files["two.jpg"]])
    problem.get_by_role("button", name="Try again").click()
    wait_for_session(page)
    page.get_by_text("Made with 2 references and a mask, which came with the video.").wait_for()
    # they were of that video
    assert references.input_value() == mask.input_value() == ""
    page.set_input_files("#file", source_clip)
    page.get_by_text("Made with 2 references").wait_for(state="detached")
    kept = httpx.get(f"{service.address}/v1/sessions").json()["data"]
    assert [(one["num_references"], one["has_mask"]) for one in kept[:2]] == [(0, False), (2, True)]


def test_the_page_asks_for_what_the_model_takes(
    serving: Callable[..., Any], open_page: Callable[..., Any], tmp_path: Path
) -> None:
    for number, mask in enumerate((True, False)):
        takes = {"references": not mask, "mask": mask}
        backend = FakeBackend(**{**ABOUT_EDITS, "guides": takes})
        with serving(tmp_path / str(number), backend) as service:
            page = open_page(service.address)
            wait_for_model(page)
            shown = {
                "references": page.get_by_label("References").is_visible(),
                "mask": page.get_by_label("Mask").is_visible(),
            }
        assert shown == takes
