"""The API's doors, each argument with values that it cannot mean: an MV2VError that names it.

One table of doors and of wrong values; then values that are odd and right.
"""

from __future__ import annotations

import datetime
import decimal
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mv2v_engine import CameraTrajectory, CancelToken, Engine, EngineConfig, Session
from mv2v_engine.camera.poses import default_intrinsics, identity_poses
from mv2v_engine.config import ParallelConfig
from mv2v_engine.engine.request import Request
from mv2v_engine.errors import MV2VError
from mv2v_engine.files import tensor_digest

FRAMES, SIZE = 9, (48, 64)
# values of every kind that a mistake brings; a door's own right kinds are left out of them
WRONG: dict[str, Any] = {
    "none": None,
    "true": True,
    "int": 7,
    "negative": -7,
    "huge": 10**400,
    "float": 2.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "complex": 1j,
    "decimal": decimal.Decimal("2.5"),
    "text": "bogus",
    "digits": "2",
    "empty": "",
    "nul": "a\0b",
    "surrogate": "\ud800",
    "bytes": b"clip.mp4",
    "stream": io.BytesIO(b"x"),
    "list": [1, 2],
    "nested": [[1, 2], [3]],
    "words": ["a", "b"],
    "tuple": (),
    "dict": {"a": 1},
    "set": {1},
    "object": object(),
    "class": int,
    "function": lambda: 3,
    "date": datetime.date(2026, 1, 1),
    "tensor": torch.zeros(3),
    "no frames": torch.zeros(0, 4, 4, 3, dtype=torch.uint8),
    "one number": np.float32(1.5),
    "flag": np.bool_(True),
    "array": np.zeros((2, 2)),
    "objects": np.array([None, "a"], dtype=object),
    "strings": np.array(["a", "b"]),
    "eyes": np.tile(np.eye(4) * 2, (FRAMES, 1, 1)),
    "too few": np.tile(np.eye(4), (3, 1, 1)),
    "complex array": np.zeros((FRAMES, 3, 4), dtype=complex),
    "path": Path("nowhere/at/all"),
    "dtype": torch.int64,
    "token": SimpleNamespace(cancelled=False),
}
INTEGERS, NUMBERS = {"int"}, {"int", "float", "one number", "negative"}
TEXTS = {"text", "digits", "empty", "nul"}


@pytest.fixture(scope="module")
def views(worded_checkpoint: Path) -> Engine:
    return Engine.from_pretrained(worded_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def edits(editor_folder: Path) -> Engine:
    return Engine.from_pretrained(editor_folder, device="cpu")


@pytest.fixture(scope="module")
def doors(
    views: Engine,
    edits: Engine,
    source_frames: Tensor,
    moving_frames: Callable[..., Tensor],
    worded_checkpoint: Path,
) -> dict[str, Callable[..., Any]]:
    frames = source_frames
    view, edit = views.session(frames), edits.session(moving_frames(6), cuts=())
    turn = view.render("static", num_inference_steps=1)
    request = Request.view("static", views.sampling, memory="none", num_inference_steps=1)
    poses, lens = identity_poses(FRAMES), default_intrinsics(*SIZE)
    return {
        "load": lambda **k: Engine.from_pretrained(**{"path_or_name": worded_checkpoint} | k),
        "reconfigured": views.reconfigured,
        "config": EngineConfig,
        "parallel": ParallelConfig,
        "session": lambda **k: views.session(**{"source": frames} | k),
        "edit session": lambda **k: edits.session(**{"source": moving_frames(6), "cuts": ()} | k),
        "render": lambda **k: view.render(
            **{"camera": "static", "num_inference_steps": 1, "prompt": "a"} | k
        ),
        "edit": lambda **k: edit.edit(**{"prompt": "a ball", "num_inference_steps": 1} | k),
        "events": lambda **k: next(view.events(**{"request": request} | k)),
        "ask": view.ask,
        "plan_turn": view.plan_turn,
        "adopt": view.adopt,
        "answer_all": lambda **k: views.answer_all(**{"turns": [(view, request)]} | k),
        "warmup": lambda **k: views.warmup(**{"plans": []} | k),
        "check_text": lambda **k: views.check_text(**{"prompt": "", "guidance_scale": 1.0} | k),
        "save": turn.save,
        "camera": lambda **k: CameraTrajectory(
            **{"poses": poses, "intrinsics": lens, "size": SIZE} | k
        ),
        "resized": CameraTrajectory(poses, lens, SIZE).resized,
    }


# door, argument, the wrong values that are right here
DOORS: list[tuple[str, str, set[str]]] = [
    ("load", "path_or_name", set()),
    ("load", "device", {"none"}),
    ("load", "dtype", {"none"}),
    ("load", "config", {"none"}),
    ("load", "components", {"none"}),
    ("load", "rename", {"none"}),
    ("reconfigured", "config", set()),
    ("session", "source", set()),
    ("session", "id", {"none"} | TEXTS),
    ("session", "fps", {"none", "int", "float", "one number"}),
    ("session", "cameras", {"none"}),
    ("session", "store", {"none", "text", "digits", "path"}),
    ("session", "window", {"none"}),
    ("session", "resume", {"flag"}),
    ("session", "source_latents", {"none"}),
    ("session", "cuts", {"none"}),
    ("edit session", "source", set()),
    ("edit session", "cuts", {"none", "list", "tuple", "set", "no frames"}),
    ("edit session", "cameras", {"none"}),
    ("edit session", "cancel", {"none"}),
    ("render", "camera", set()),
    ("render", "prompt", TEXTS),
    ("render", "seed", INTEGERS),
    ("render", "num_inference_steps", INTEGERS | {"none"}),
    ("render", "guidance_scale", {"none", "int", "float", "one number"}),
    ("render", "memory", {"none"}),
    ("render", "on_progress", {"none", "class"}),
    ("render", "cancel", {"none"}),
    ("edit", "prompt", TEXTS - {"empty"}),
    ("edit", "seed", INTEGERS),
    ("edit", "num_inference_steps", INTEGERS | {"none"}),
    ("edit", "guidance_scale", {"none", "int", "float", "one number"}),
    ("edit", "memory", {"none"}),
    ("edit", "on_progress", {"none", "class"}),
    ("edit", "cancel", {"none"}),
    ("edit", "on_window", {"none", "class"}),
    ("edit", "out", {"none"}),
    ("events", "request", set()),
    ("events", "cancel", {"none"}),
    ("ask", "request", set()),
    ("ask", "on_progress", {"none", "class"}),
    ("plan_turn", "request", set()),
    ("adopt", "turn", set()),
    ("answer_all", "turns", {"tuple", "no frames", "stream"}),
    ("answer_all", "token_budget", {"none", "int"}),
    ("answer_all", "cancels", {"none"}),
    ("answer_all", "on_progress", {"none", "class"}),
    ("warmup", "plans", {"tuple", "no frames", "stream"}),
    ("warmup", "guidance_scale", NUMBERS | {"none", "nan", "inf"}),
    ("check_text", "prompt", TEXTS),
    ("check_text", "guidance_scale", NUMBERS | {"nan", "inf"}),
    ("save", "path", set()),
    ("camera", "poses", {"too few"}),
    ("camera", "intrinsics", set()),
    ("camera", "size", {"list"}),
    ("camera", "name", TEXTS),
    ("resized", "size", {"list"}),
    ("config", "step_cache", {"none", "int", "float", "one number"}),
    ("config", "memory", {"none"}),
    ("config", "max_memory", INTEGERS),
    ("config", "parallel", set()),
    ("config", "descriptor", {"none", "path", "text", "digits"}),
    ("config", "backend", set()),
    ("parallel", "timeout_seconds", {"int", "float", "one number"}),
]
# a function of no arguments is taken, and fails when it is called, as the caller's own
CALLED = {"on_progress", "on_window"}


@pytest.mark.parametrize(
    ("door", "argument", "right"), DOORS, ids=[f"{door}-{argument}" for door, argument, _ in DOORS]
)
def test_what_an_argument_cannot_mean(
    door: str,
    argument: str,
    right: set[str],
    doors: dict[str, Callable[..., Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where a path by mistake would lead
    wrong = set(WRONG) - right - ({"function"} if argument in CALLED else set())
    for name in sorted(wrong):
        given: dict[str, Any] = {argument: WRONG[name]}
        if (door, argument) == ("ask", "on_progress"):
            given["request"] = Request.view(
                "static",
                doors["plan_turn"].__self__.parts.sampling,
                memory="none",  # type: ignore[attr-defined]
            )
        try:
            doors[door](**given)
        except MV2VError as error:
            said = str(error)
            assert said and "\n" not in said and len(said) < 700, (name, said)
            assert "object at 0x" not in said and "tensor(" not in said, (name, said)
        else:
            pytest.fail(f"{door}({argument}={name}) was taken")
    assert not list(tmp_path.iterdir())


def test_errors_name_the_argument(doors: dict[str, Callable[..., Any]]) -> None:
    for door, passed in [
        ("render", {"num_inference_steps": "2"}),
        ("render", {"seed": 1.5}),
        ("render", {"guidance_scale": "x"}),
        ("render", {"prompt": None}),
        ("render", {"camera": None}),
        ("render", {"memory": "bogus"}),
        ("render", {"cancel": 3}),
        ("load", {"path_or_name": 3}),
        ("load", {"config": {"memory": "none"}}),
        ("session", {"fps": "24"}),
        ("session", {"source": None}),
        ("save", {"path": 3}),
        ("config", {"max_memory": 2.5}),
    ]:
        (name,) = passed
        with pytest.raises(MV2VError, match=name):
            doors[door](**passed)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers()
    | st.dates()
    | st.fractions(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(
        ["camera", "prompt", "seed", "num_inference_steps", "guidance_scale", "memory"]
    ),
    value=anything,
)
def test_anything_else(views: Engine, name: str, value: Any) -> None:
    """A request is made, or it is an MV2VError."""
    given = {"camera": "static", "memory": "none"} | {name: value}
    try:
        request = Request.view(given.pop("camera"), views.sampling, **given)
    except MV2VError:
        return
    assert isinstance(request.seed, int) and 1 <= request.num_inference_steps <= 1000


@pytest.mark.parametrize("suffix", [".gif", ".webm", ".mov", "", ".mp4.part", ".MP3"])
def test_a_turn_is_saved_as_what_its_name_says(
    doors: dict[str, Callable[..., Any]], tmp_path: Path, suffix: str
) -> None:
    with pytest.raises(MV2VError, match=r"\.mp4"):
        doors["save"](tmp_path / f"x{suffix}")
    with pytest.raises(MV2VError, match=r"\.mp4"):
        doors["edit"](out=tmp_path / f"x{suffix}")
    assert not list(tmp_path.iterdir())
    doors["save"](str(tmp_path / "x.MP4"))


POSES = np.tile(np.eye(4), (FRAMES, 1, 1))
POSES[:, 0, 3] = np.linspace(0, 1, FRAMES)


@pytest.mark.parametrize(
    "camera",
    [
        POSES,
        POSES[:, :3],
        POSES.astype(np.float32),
        torch.tensor(POSES),
        torch.tensor(POSES, requires_grad=True),
        POSES.tolist(),
        list(POSES),
        CameraTrajectory(torch.tensor(POSES), default_intrinsics(*SIZE), SIZE),
        CameraTrajectory(POSES, default_intrinsics(*SIZE).numpy(), list(SIZE)),  # type: ignore[arg-type]
    ],
    ids=lambda value: type(value).__name__,
)
def test_poses_are_a_camera(views: Engine, camera: Any) -> None:
    request = Request.view(camera, views.sampling, memory="none")
    assert torch.allclose(request.camera.poses, torch.tensor(POSES[:, :3], dtype=torch.float32))


def test_numpys_numbers_and_arrays_are_taken(views: Engine, source_frames: Tensor) -> None:
    plain = views.session(source_frames, fps=8.0, id="a").render("static", seed=5, guidance_scale=2)
    array = np.repeat(source_frames.numpy(), 2, axis=0)
    array.setflags(write=False)
    session = views.session(array[::2], fps=np.float32(8), id="a")
    turn = session.render(
        "static",
        seed=np.int64(5),  # type: ignore[arg-type]
        guidance_scale=np.float64(2),
        num_inference_steps=np.int32(3),  # type: ignore[arg-type]
        cancel=CancelToken(),
    )
    assert tensor_digest(turn.latents) == tensor_digest(plain.latents)
    assert type(turn.report["seed"]) is int and turn.fps == 8
    backwards = views.session(array[::-1][::2].copy()[::-1])
    assert isinstance(backwards, Session)


def test_a_repr_is_short_and_shows_no_numbers_of_a_tensor(
    views: Engine, edits: Engine, source_frames: Tensor, moving_frames: Callable[..., Tensor]
) -> None:
    finished: list[Any] = []
    session, long = views.session(source_frames, id="s"), edits.session(moving_frames(6), cuts=())
    turn = session.render("pan_left", num_inference_steps=1)
    edit = long.edit("a ball", num_inference_steps=1, on_window=finished.append)
    shown = [views, session, turn, long, edit, turn.trajectory, finished[0], session.source]
    for value in [*shown, views.cache.entries(views.latent_kind)[0]]:
        said = repr(value)
        assert len(said) < 300 and "tensor(" not in said and "object at" not in said, said
    assert repr(views) == "Engine('worded', novel views, float32 on cpu)"
    assert repr(session) == "Session(id='s', model='worded', turns=1)"
    assert "number=1, camera='pan_left', seed=0" in repr(turn)
