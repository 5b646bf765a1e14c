"""The edges of the HTTP service: HEAD, /docs, /version, wrong fields, paths, ready lines."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import httpx
import torch
from PIL import Image

from mv2v_engine import Engine, EngineConfig, __version__
from mv2v_engine.config import MAX_GUIDANCE_SCALE
from mv2v_engine.engine.folder import SessionFolder
from mv2v_engine.engine.request import require_task
from mv2v_engine.errors import MV2VError, StorageError, VideoError
from mv2v_engine.files import save_json
from mv2v_engine.ops.native import ABI_VERSION
from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.errors import client_words, failure
from mv2v_engine.serving.store.folders import source_path
from mv2v_engine.serving.work.host import Host
from mv2v_engine.serving.work.protocol import setup_message
from mv2v_engine.video.io import VideoReader
from mv2v_engine.video.transforms import select_window
from tests.serving.conftest import REPORT
from tests.serving.test_routes import refused
from tests.video.conftest import with_alpha, write_clip

TRAJECTORY = {
    "format": "mv2v-camera",
    "version": 1,
    "size": [48, 64],
    "poses": [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]],
}
# the size of the long clip, of which the model's shape takes a part
LONG = "frames {} to {} of 23"
LONG_CROPPED = "48x32 to 64x48: scaled by 1.500, cropped by 4+4 columns and 0+0 rows"
# pydantic's and FastAPI's own words
FOREIGN = re.compile(r"Input should|Extra inputs|Field required|Value error|valid (string|integer)")


@pytest.fixture(scope="module")
def service(serving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    with serving(tmp_path_factory.mktemp("store")) as service:
        yield service


@pytest.fixture(scope="module")
def http(service: Any) -> Any:
    with service.client() as client:
        yield client


@pytest.fixture(scope="module")
def made(http: httpx.Client, source_clip: Path) -> dict[str, str]:
    """A session, its finished turn and its job."""
    with source_clip.open("rb") as clip:
        session = http.post("/v1/sessions", files={"video": clip}).json()
    job = http.post(f"/v1/sessions/{session['id']}/turns", json={"camera": "pan_right"}).json()
    http.get(f"/v1/jobs/{job['id']}/events").raise_for_status()  # to its end
    ids = {"session_id": session["id"], "job_id": job["id"], "video_id": job["id"]}
    # a service of views has no stream
    return ids | {"number": "1", "model_id": "fake", "stream_id": "stream_000000000000000000000000"}


def test_head_on_every_route_that_answers_get(
    service: Any, http: httpx.Client, made: dict[str, str]
) -> None:
    paths = [path for path, known in service.app.openapi()["paths"].items() if "get" in known]
    assert len(paths) > 15
    for path in [*paths, "/", "/docs", "/openapi.json", "/page/app.js"]:
        address = path.format(**made)
        head, got = http.head(address), http.get(address)
        assert (head.status_code, head.content) == (got.status_code, b""), address
        assert head.status_code == (404 if "{stream_id}" in path else 200), address
        changing = {"date", "x-request-id"}
        if "export" in address:
            changing |= {"content-length", "etag"}
        if address == "/metrics":
            changing.add("content-length")
        for name in set(got.headers) - changing - {"transfer-encoding"}:
            assert head.headers.get(name) == got.headers[name], (address, name)


def test_head_of_what_is_not_there_and_of_other_methods(http: httpx.Client) -> None:
    for address, status in [
        ("/nothing", 404),
        ("/v1/sessions/session_000000000000000000000000", 404),
        ("/v1/jobs/job_000000000000000000000000/cancel", 405),
    ]:
        answer = http.head(address)
        assert (answer.status_code, answer.content) == (status, b"")
    assert http.put("/healthz").headers["allow"] == "GET, HEAD"


def test_head_of_a_stream_ends_at_once(
    service: Any, http: httpx.Client, made: dict[str, str]
) -> None:
    service.backend.hold()
    try:
        turns = f"/v1/sessions/{made['session_id']}/turns"
        job = http.post(turns, json={"camera": "pan_right"}).json()
        answer = http.head(f"/v1/jobs/{job['id']}/events")
        assert answer.headers["content-type"].startswith("text/event-stream")
    finally:
        service.backend.let_go()
    http.get(f"/v1/jobs/{job['id']}/events")


def test_docs_need_no_other_site(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert (
        page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    )
    files = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {"page/docs.js", "page/docs.css", "openapi.json"} <= set(files)
    for name in files:
        assert http.get(f"/{name}").status_code == 200, name
    told = page.text + http.get("/page/docs.js").text
    assert "http://" not in told and "https://" not in told and "<script>" not in told


def test_version(http: httpx.Client) -> None:
    told = http.get("/version").json()
    assert told == {
        "version": __version__,
        "torch": torch.__version__,
        "abi": ABI_VERSION,
        "model": "fake",
        "model_digest": None,
    }


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"camera": "pan_left", "steps": 2}, "steps", "no field 'steps'; 'num_inference_steps'"),
        ({"camera": "pan_left", "guidance": 2}, "guidance", "'guidance_scale' is the nearest"),
        ({"camera": "pan_left", "sed": 2}, "sed", "'seed' is the nearest"),
        ({"camera": "pan_left", "window": "120"}, "window", "/branches with"),
        ({"camera": "pan_left", "seed": "2"}, "seed", "must be an integer, got the text '2'"),
        ({"camera": "pan_left", "seed": 1.5}, "seed", "must be an integer, got 1.5"),
        ({"camera": "pan_left", "seed": -1}, "seed", "must be at least 0, got -1"),
        ({"camera": "pan_left", "seed": True}, "seed", "must be an integer, got true"),
        ({"camera": "pan_left", "num_inference_steps": 0}, "num_inference_steps", "at least 1"),
        ({"camera": "pan_left", "num_inference_steps": [1]}, "num_inference_steps", "got a list"),
        (
            {"camera": "pan_left", "guidance_scale": 1e300},
            "guidance_scale",
            str(MAX_GUIDANCE_SCALE),
        ),
        ({"camera": "pan_left", "seed": 2**63}, "seed", "must be at most"),
        ({"camera": "pan_left", "num_inference_steps": 1001}, "num_inference_steps", "at most"),
        ({"camera": "pan_left", "memory": "x"}, "memory", "must be 'retrieved'"),
        ({"camera": 3}, "camera", "must be text or an object, got 3"),
        ({"camera": "pan_left", "n": 1}, "n", "there is no field 'n'; the fields are camera"),
        ({"camera": "x" * 101}, "camera", "at most 100 characters, got text of 101 characters"),
        ({"camera": TRAJECTORY | {"poses": [[[1, 0, 0]] * 3]}}, "camera.poses.0.0", "4 items"),
        ({"camera": TRAJECTORY | {"poses": [[[1, 0, 0, "0"]] * 3]}}, "camera.poses.0.0.3", "'0'"),
        ({"camera": TRAJECTORY | {"size": "48x64"}}, "camera.size", "a list, got the text '48"),
        (
            {"camera": {"format": "mv2v-camera", "version": 1, "size": [1, 1]}},
            "camera.poses",
            "mis",
        ),
        (
            {"camera": {"format": "x", "version": 1, "size": [1, 1], "poses": []}},
            "camera.format",
            "must be 'mv2v-camera'",
        ),
        ({"prompt": 3}, "prompt", "must be text, got 3"),
        ({"prompt": "x" * 9000}, "prompt", "at most 8192 characters, got text of 9000"),
        ({}, None, "a turn needs a camera or a prompt"),
        ([], None, "the body must be an object, got a list"),
        (3, None, "the body must be an object, got 3"),
    ],
    ids=str,
)
def test_wrong_fields_in_our_words(
    http: httpx.Client, made: dict[str, str], body: Any, param: str | None, words: str
) -> None:
    answer = http.post(f"/v1/sessions/{made['session_id']}/turns", json=body)
    message = refused(answer, 422, "invalid_request", param)
    assert words in message and not FOREIGN.search(message), message
    assert "constrained" not in message and "Trajectory" not in message


@pytest.mark.parametrize(
    ("camera", "words"),
    [
        ("pan-left", "unknown camera 'pan-left'; nearest: pan_left"),
        ("", "Presets: pan_right"),
        ("/etc/passwd", "moves: pan:DEGREES"),
        ("cameras.json#cam03", "moves: pan:DEGREES"),
        ("pan_left\n", "nearest: pan_left"),
        ("pan:fast", "amounts must be finite numbers; write pan:DEGREES"),
        ("pan:30+sideways:2", "unknown camera 'sideways:2'; nearest:"),
        ("pan:1e308", "1e+308 degrees are too many; a move may have -3600 to 3600 degrees"),
        ("pan:", "got 0 amounts; write pan:DEGREES"),
        ("pan:900,1", "pan"),
    ],
    ids=ascii,
)
def test_a_camera_of_another_form(
    http: httpx.Client, made: dict[str, str], camera: str, words: str
) -> None:
    """What cameras there are, in words, at every door."""
    for address, field in [
        (f"/v1/sessions/{made['session_id']}/turns", "camera"),
        (f"/v1/videos/{made['video_id']}/remix", "camera"),
        (f"/v1/videos/{made['video_id']}/remix", "prompt"),
    ]:
        if field == "prompt" and not camera:
            continue
        answer = http.post(address, json={field: camera})
        message = refused(answer, 422, "unprocessable_turn", "camera")
        assert words in message and "[A-Z" not in message, message


def test_no_answer_shows_a_pattern(http: httpx.Client, made: dict[str, str]) -> None:
    turns = f"/v1/sessions/{made['session_id']}/turns"
    asked = {"camera": "pan_left"}
    video = {"prompt": "pan_left", "session_id": made["session_id"], "window": "x"}
    for answer, status, words in [
        (
            http.post(turns, json=asked, headers={"Idempotency-Key": "a b"}),
            422,
            "Idempotency-Key must be visible ASCII characters without spaces, got the text 'a b'",
        ),
        (
            http.post(turns, content=b'{"camera": "pan_left"}', headers={"Content-Type": "a/b"}),
            415,
            "an application/json body is expected, got 'a/b'",
        ),
        (http.post(turns, content=b"{}"), 415, "expected, got no Content-Type"),
        (http.post("/v1/videos", json=video), 422, "window must be first, middle"),
        (http.get("/v1/jobs?after=x"), 404, "no job x"),
        (http.get("/v1/jobs?session=x"), 404, "no session x"),
        (http.get("/v1/sessions?after=x"), 404, "no session x"),
    ]:
        message = answer.json()["error"]["message"]
        assert answer.status_code == status and words in message, message
        assert not re.search(r"\^|\[0-9|\$", message), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[" * 100_000, "nested more than 100 deep at character 100; send a flatter one"),
        (b'{"a\\"[{": ' * 20_000, "nested more than 100 deep at character 1000"),
        (b'{"seed": 1', "is no JSON: expecting ',' delimiter at character 10"),
        (b'{"a\n": 1}', "is no JSON: invalid control character at character 3"),
        (b"{'seed': 1}", "is no JSON: expecting property name enclosed in double quotes at char"),
        (b'{"seed": ' + b"7" * 5000 + b"}", "the number at character 9 has more than 4300 digits"),
        (b'{"prompt": "\xff"}', "is no JSON: it is no UTF-8 at byte 12"),
    ],
    ids=range(7),
)
def test_a_body_that_is_no_json(
    http: httpx.Client, made: dict[str, str], text: bytes, words: str
) -> None:
    for address in (f"/v1/sessions/{made['session_id']}/turns", "/v1/videos"):
        kind = {"Content-Type": "application/json"}
        answer = http.post(address, content=text, headers=kind)
        message = refused(answer, 400, "malformed_request")
        assert message.startswith("the body is no JSON") and words in message, message
    if text.startswith(b"{") and b"\xff" not in text:
        form = {"camera": (None, text), "session_id": (None, made["session_id"])}
        message = refused(http.post("/v1/videos", files=form), 422, "invalid_request", "camera")
        assert message.startswith("camera is no JSON") and words in message


def test_a_file_in_json_is_told_to_be_a_form(http: httpx.Client) -> None:
    answer = http.post("/v1/videos", json={"prompt": "pan_left", "input_reference": "x"})
    message = refused(answer, 422, "invalid_request", "input_reference")
    assert "multipart/form-data" in message


def test_a_model_by_its_name(http: httpx.Client) -> None:
    [model] = http.get("/v1/models").json()["data"]
    assert http.get(f"/v1/models/{model['id']}").json() == model
    answer = http.get("/v1/models/sora-2")
    assert answer.status_code == 404 and "only 'fake'" in answer.json()["error"]["message"]


def test_wrong_parameters_in_our_words(http: httpx.Client, made: dict[str, str]) -> None:
    for address, param in [
        ("/v1/jobs?limit=0", "limit"),
        ("/v1/jobs?limit=x", "limit"),
        ("/v1/jobs?order=up", "order"),
        (f"/v1/sessions/{made['session_id']}/turns/x", "number"),
    ]:
        error = http.get(address).json()["error"]
        assert error["param"] == param and not FOREIGN.search(error["message"]), error


def test_a_query_parameter_that_is_not_there_is_refused_everywhere(
    service: Any, http: httpx.Client, made: dict[str, str]
) -> None:
    asked = [
        (method, path) for path, known in service.app.openapi()["paths"].items() for method in known
    ]
    assert len(asked) > 25
    for method, path in asked:
        answer = http.request(method, path.format(**made), params={"windw": "last"})
        message = refused(answer, 422, "invalid_request", "windw")
        assert "there is no query parameter 'windw'; " in message, (method, path)
    # nothing of it was done
    assert http.get(f"/v1/sessions/{made['session_id']}").status_code == 200
    for address, words in [
        ("/v1/jobs?limits=1", "'limit' is the nearest; the query parameters are session, limit, "),
        ("/v1/jobs?limit=1&limit=2", "'limit' is given twice"),
        ("/v1/models?x", "this route has none"),
    ]:
        assert words in http.get(address).json()["error"]["message"]
    answer = http.post("/v1/sessions?window=last")
    assert "this route has none: send fields in the body" in answer.json()["error"]["message"]
    # a page is opened from links that other sites make
    for address in ("/?from=mail", "/docs?x=1", "/page/app.js?v=2"):
        assert http.get(address).status_code == 200


@pytest.mark.parametrize("as_form", [True, False])
def test_what_openais_clients_ask_for(
    http: httpx.Client, made: dict[str, str], as_form: bool
) -> None:
    """Taken where it is what the model makes, refused by one 400 that says what that is."""

    def ask(**fields: Any) -> httpx.Response:
        body = {"prompt": "pan_right", "session_id": made["session_id"]} | fields
        if as_form:
            return http.post("/v1/videos", files={name: (None, str(v)) for name, v in body.items()})
        return http.post("/v1/videos", json=body)

    right = {"model": "fake", "size": "64x48", "seconds": "1"}
    assert ask(**right).status_code == 200
    assert ask(seconds=1).status_code == 200
    for name, value, possible in [
        ("model", "sora-2", "'fake'"),
        ("size", "720x1280", "64x48"),
        ("size", "48x64", "64x48"),
        ("seconds", "12", "1.125"),
        ("seconds", 4, "1.125"),
        ("seconds", "soon", "1.125"),
    ]:
        assert possible in refused(ask(**{name: value}), 400, "not_made_here", name)
    answer = ask(steps=3)
    assert "'num_inference_steps' is the nearest" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "cannot write /srv/mv2v/store/turn_1.mp4: full; go on",
            "cannot write turn_1.mp4: full; go on",
        ),
        ("/srv/store already holds a session", "store already holds a session"),
        ("no file '/srv/my store/x y.mp4' here", "no file 'x y.mp4' here"),
        (
            "session.json holds a session; resume it, or choose another folder; so it is",
            "session.json holds a session; whoever runs the service can restore it; so it is",
        ),
        (
            'it needs 9 bytes, 5 are available; try max_memory=1 (4) or merge="conv" (5)',
            "it needs 9 bytes, 5 are available; try --max-memory 1 (4) or --merge conv (5); "
            "options with -- are set by whoever runs the service",
        ),
        (
            'try source_fit="letterbox", fewer num_inference_steps or memory="none"',
            'try fit="letterbox", fewer num_inference_steps or memory="none"',
        ),
        ("ask /docs, or http://127.0.0.1:8000/v1/jobs; 1/2", None),
    ],
)
def test_answers_name_no_path_of_the_server(message: str, expected: str | None) -> None:
    assert client_words(message) == (expected or message)


def test_an_error_of_the_engine_advises_what_a_client_can_do(
    tiny_checkpoint: Path, source_frames: Any, tmp_path: Path
) -> None:
    """What only a caller of the library can do is said of whoever runs the service."""
    engine = Engine.from_pretrained(
        tiny_checkpoint, device="cpu", config=EngineConfig(memory_limit_bytes=1 << 20)
    )
    store, found = SessionFolder(tmp_path / "session"), {}
    (tmp_path / "file").touch()

    def made(call: Callable[[], object]) -> None:
        with pytest.raises(MV2VError) as raised:
            call()
        event = failure(raised.value)
        found[type(raised.value).__name__] = client_words(event["message"])
        said = found[type(raised.value).__name__]
        assert not re.search(r"choose another|\btry \w+=|\(\)|resume=|Engine", said), said
        assert said.endswith("set by whoever runs the service") == bool(re.search(r"--\w", said))
        assert str(tmp_path) not in said

    made(lambda: engine.session(source_frames).render("pan_right"))
    made(lambda: save_json(tmp_path / "file" / "x.json", {}))
    assert found["StorageError"].endswith("; whoever runs the service can restore it")
    made(store.read)
    store.create("s", {"source": "x"})
    made(lambda: store.check_identity(store.read(), {"source": "y"}))
    made(lambda: store.latents({"number": 1, "camera": {}}, 1, None))
    made(lambda: engine.session(source_frames, store=store.folder))
    made(lambda: select_window(20, 9, None))
    made(lambda: require_task(engine.transformer.config, "tiny", edits=True))
    with store.lock():
        made(store.lock)
    full = StorageError("cannot write /x/y: No space left on device; choose another place")
    full.__cause__ = OSError(errno.ENOSPC, "")
    event = failure(full)
    assert (event["code"], client_words(event["message"])) == (
        "disk_full",
        "cannot write y: No space left on device; delete sessions, and ask for the turn again",
    )


def test_a_failed_job_names_no_path(
    serving: Callable[..., Any], source_clip: Path, tmp_path: Path
) -> None:
    with serving(tmp_path / "store") as service, service.client() as http:
        with source_clip.open("rb") as clip:
            session = http.post("/v1/sessions", files={"video": clip}).json()["id"]
        service.backend.hold()
        service.backend.failure = f"cannot write {tmp_path}/store/x.safetensors: it is full"
        job = http.post(f"/v1/sessions/{session}/turns", json={"camera": "pan_right"}).json()["id"]
        service.backend.fails[job] = "internal"
        service.backend.let_go()
        events = http.get(f"/v1/jobs/{job}/events").text
        assert "cannot write x.safetensors: it is full" in events
        assert str(tmp_path) not in events + http.get(f"/v1/jobs/{job}").text


def test_a_relative_store_is_hidden_as_an_absolute_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = ServingConfig(store=Path("store"))
    missing = source_path(Path(setup_message(config)["store"]) / "sessions/session_0")
    with pytest.raises(VideoError, match="does not exist") as raised:
        VideoReader(missing)
    told = client_words(str(raised.value))
    assert told.startswith("source does not exist") and "session_0" not in told


@pytest.mark.parametrize(
    ("window", "told"),
    [
        (None, LONG.format(0, 8)),
        ("first", LONG.format(0, 8)),
        ("last", LONG.format(14, 22)),
        ("3", LONG.format(3, 11)),
        ("even", "9 of 23 frames, spread evenly over the whole clip"),
    ],
)
def test_the_part_of_a_clip_is_chosen(
    http: httpx.Client, long_clip: Path, window: str | None, told: str
) -> None:
    chosen = {} if window is None else {"window": (None, window)}
    with long_clip.open("rb") as clip:
        session = http.post("/v1/sessions", files={"video": clip} | chosen).json()
    assert session["warnings"] == [f"the model takes 9 frames: {told}", LONG_CROPPED]
    with long_clip.open("rb") as clip:
        files = {"input_reference": clip, "prompt": (None, "pan_right")} | chosen
        assert http.post("/v1/videos", files=files).json()["warnings"] == session["warnings"]
    branch = http.post(f"/v1/sessions/{session['id']}/branches", json={"turn": 0}).json()
    assert branch["warnings"] == session["warnings"]
    assert session["window"] == branch["window"] == window


CHOICES = {"fps": "12.5", "alpha": "white", "fit": "letterbox"}


def refused_at_both(http: httpx.Client, video: Path, **field: str) -> list[dict[str, str]]:
    """The errors of a new session and of a new video; no session is left by either."""
    before = len(http.get("/v1/sessions?limit=100").json()["data"])
    chosen, clip = {name: (None, value) for name, value in field.items()}, video.read_bytes()
    prompt = {"prompt": (None, "pan_right")}
    answers = [
        http.post("/v1/sessions", files={"video": clip} | chosen),
        http.post("/v1/videos", files={"input_reference": clip} | prompt | chosen),
    ]
    assert len(http.get("/v1/sessions?limit=100").json()["data"]) == before
    return [answer.json()["error"] for answer in answers]


def test_how_a_video_is_read_is_chosen_for_its_session(
    http: httpx.Client, service: Any, tmp_path: Path
) -> None:
    path = with_alpha(tmp_path / "clip.mkv", "ffv1", "yuva420p", num_frames=9)
    told = [
        "its alpha channel was composed over white",
        "its 25 frames a second are taken for 12.5",
        "64x32 to 64x48: unscaled, nothing cropped, between black bars of 0+0 columns and 8+8 rows",
    ]
    chosen = {name: (None, value) for name, value in CHOICES.items()}
    video = path.read_bytes()
    plain = http.post("/v1/sessions", files={"video": video}).json()
    assert plain["warnings"][0] == "its alpha channel was composed over black"
    assert (plain["fps"], plain["alpha"], plain["fit"]) == (25, "black", "crop")
    asked = {"files": {"video": video} | chosen, "headers": {"Idempotency-Key": "chosen"}}
    session = http.post("/v1/sessions", **asked).json()
    assert session["warnings"] == told
    branch = http.post(f"/v1/sessions/{session['id']}/branches", json={"turn": 0}).json()
    for one in (session, branch):
        assert (one["fps"], one["alpha"], one["fit"]) == (12.5, "white", "letterbox")
    # what the worker is told of it, also after a restart of the service
    rows = json.loads(
        (service.config.store / "sessions" / branch["id"] / "rows" / "session.json").read_text()
    )["row"]
    assert (rows["asked_fps"], rows["alpha"], rows["fit"]) == (12.5, "white", "letterbox")
    assert http.post("/v1/sessions", **asked).json()["id"] == session["id"]
    asked["files"]["fit"] = (None, "crop")
    assert http.post("/v1/sessions", **asked).json()["error"]["code"] == "idempotency_conflict"
    files = {"input_reference": video, "prompt": (None, "pan_right")} | chosen
    made = http.post("/v1/videos", files=files).json()
    assert (made["warnings"], made["seconds"], made["size"]) == (told, "0.72", "64x48")


def test_the_size_of_turns_is_chosen_for_their_session(
    http: httpx.Client, source_clip: Path
) -> None:
    video = source_clip.read_bytes()
    files = {"input_reference": video, "prompt": (None, "pan_right"), "size": (None, "48x64")}
    made = http.post("/v1/videos", files=files).json()
    session = http.get(f"/v1/sessions/{made['session_id']}").json()
    assert (made["size"], session["size"]) == ("48x64", "48x64")
    assert "64x48 to 48x64" in session["warnings"][0]
    again = {"prompt": "tilt_up", "session_id": session["id"], "size": "48x64"}
    assert http.post("/v1/videos", json=again).json()["size"] == "48x64"
    for size in ("64x48", "48X64", "x", ""):
        error = http.post("/v1/videos", json=again | {"size": size}).json()["error"]
        assert (error["code"], error["param"]) == ("not_made_here", "size")
    for error in refused_at_both(http, source_clip, size="50x64"):
        assert error["message"].startswith("fake makes videos of 64x48 and 48x64 (width x height)")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("fps", "0", "fps must be at least 0.01, got"),
        ("fps", "1e9", "fps must be at most 1000.0, got"),
        ("fps", "nan", "fps must be a finite number, got"),
        ("fps", "fast", "fps must be a number, got the text 'fast'"),
        ("fps", "", "fps must be a number, got the text ''"),
        ("alpha", "green", "alpha must be 'black', 'white' or 'refuse', got the text 'green'"),
        ("alpha", "WHITE", "alpha must be 'black', 'white' or 'refuse'"),
        ("fit", "stretch", "fit must be 'crop' or 'letterbox', got the text 'stretch'"),
        ("Fit", "crop", "there is no field 'Fit'; 'fit' is the nearest"),
        *(("window", value, "window") for value in ("15", "pad", "middl", "-1", "", "1e3")),
    ],
)
def test_a_way_of_reading_that_is_none_is_refused(
    http: httpx.Client, long_clip: Path, name: str, value: str, words: str
) -> None:
    for error in refused_at_both(http, long_clip, **{name: value}):
        assert (error["code"], error["param"]) == ("invalid_request", name), error
        assert words in error["message"], error


def test_a_finished_video_says_what_its_turn_does(
    http: httpx.Client, made: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as that the model does not know what it was given, or what became of its sound."""
    monkeypatch.setitem(REPORT, "source", {"notes": ["its sound (aac) is copied"]})
    monkeypatch.setitem(REPORT, "warnings", ["this video is unlike those of its training"])
    body = {"prompt": "pan_right", "session_id": made["session_id"]}
    video = http.post("/v1/videos", json=body).json()
    http.get(f"/v1/jobs/{video['id']}/events").raise_for_status()  # to its end
    assert http.get(f"/v1/videos/{video['id']}").json()["warnings"] == [
        *video["warnings"],
        "its sound (aac) is copied",
        "this video is unlike those of its training",
    ]
    listed = {one["id"]: one for one in http.get("/v1/videos").json()["data"]}
    assert listed[video["id"]]["warnings"][-1] == "this video is unlike those of its training"


def test_alpha_is_refused_where_its_user_says_so(
    http: httpx.Client, made: dict[str, str], tmp_path: Path
) -> None:
    path = with_alpha(tmp_path / "clip.mkv", "ffv1", "yuva420p", num_frames=9)
    files = {"video": path.read_bytes(), "alpha": (None, "refuse")}
    error = http.post("/v1/sessions", files=files).json()["error"]
    assert error["code"] == "unreadable_video" and "alpha channel" in error["message"]
    body = {"prompt": "pan_right", "session_id": made["session_id"], "fit": "letterbox"}
    error = http.post("/v1/videos", json=body).json()["error"]
    assert error["param"] == "fit" and "a session has its own" in error["message"]


def test_the_engine_reads_a_video_as_its_session_says(
    tiny_checkpoint: Path, long_clip: Path, tmp_path: Path
) -> None:
    """Also when a worker opens the session again."""
    host = Host(Engine.from_pretrained(tiny_checkpoint, device="cpu"), max_open=1)
    long, other = tmp_path / "long", tmp_path / "other"
    for folder in (long, other):
        folder.mkdir()
    shutil.copy(long_clip, source_path(long))
    opened = host._session({"id": "long", "frames": 23, "window": "last"}, long)
    assert opened.source.description["window"] == LONG.format(14, 22)
    with_alpha(tmp_path / "clip.mkv", "ffv1", "yuva420p", num_frames=9)
    shutil.move(tmp_path / "clip.mkv", source_path(other))
    known = {"id": "s", "frames": 9, "window": None, "size": "64x48"}
    opened = host._session(known | {"fps": 12.5, "alpha": "white", "fit": "letterbox"}, other)
    assert opened.source.fps == 12.5 and "letterbox" not in host.about["source_fit"]
    frame = opened.source.frames[0].int()
    rows = (frame.shape[0] - frame.shape[1] // 2) // 2
    assert frame[: rows - 1].max() == 0 and frame[rows + 3 : -rows - 3, -8:].min() >= 250


def test_what_is_changed_of_a_video_is_a_warning(http: httpx.Client, tmp_path: Path) -> None:
    stamps = [40 * index + 480 * (index > 4) for index in range(9)]
    path = write_clip(tmp_path / "pause.mkv", num_frames=9, size=(48, 96), stamps_ms=stamps)
    session = http.post("/v1/sessions", files={"video": path.read_bytes()}).json()
    assert (session["frames"], session["fps"]) == (21, 25)
    assert session["warnings"][:2] == [
        "the model takes 9 frames: frames 0 to 8 of 21",
        "its frame rate varies: at 25 frames a second, held frames are repeated (9 became 21)",
    ]
    assert "cropped by" in session["warnings"][2]
    frames = [Image.new("RGB", (64, 48), (25 * index,) * 3) for index in range(9)]
    frames[0].save(
        tmp_path / "clip.webp", save_all=True, append_images=frames[1:], duration=125, lossless=True
    )
    webp = (tmp_path / "clip.webp").read_bytes()
    session = http.post("/v1/sessions", files={"video": webp}).json()
    assert (session["frames"], session["fps"], session["warnings"]) == (9, 8, [])
