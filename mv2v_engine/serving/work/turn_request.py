"""From what a job asks for to the engine's request: checked once at the door, made again to run.

Nothing here opens a file: a camera is a name, moves, a trajectory written out, or files that came
with the request.
"""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

from mv2v_engine.camera.files import given_trajectory, parse_trajectory, trajectory_json
from mv2v_engine.camera.trajectories import CameraTrajectory, named_trajectory
from mv2v_engine.config import SamplingConfig
from mv2v_engine.engine.request import NO_EDITS, NO_VIEWS, Request, check_text
from mv2v_engine.errors import CameraError, RequestError
from mv2v_engine.serving.errors import ApiError

# what both kinds of turn can be asked for, beside a camera or an instruction
_COMMON = ("seed", "num_inference_steps", "guidance_scale")
_MAX_NAME = 200


def make_request(asked: dict[str, Any], about: dict[str, Any], size: str | None = None) -> Request:
    """The turn that is asked for.

    asked: as `Service.submit` takes it. about: as `Backend.about` gives it. size: of its session.

    Raises:
        CameraError, RequestError: the model cannot serve it.
    """
    name = about["engine"]["checkpoint"]
    # the last ones are of no matter to the model: who asked wants to see the steps or to be told of
    # the end, and OpenAI's clients ask what a video was made after
    known = {"camera", "prompt", "memory", *_COMMON, "previews", "remixed_from", "callback_url"}
    if unknown := sorted(set(asked) - known):
        raise RequestError(f"a turn has no {', '.join(unknown)}; leave it out")
    common = {key: asked[key] for key in _COMMON if asked.get(key) is not None}
    common["memory"] = asked.get("memory") or about["memory"]
    camera, prompt = asked.get("camera"), asked.get("prompt") or ""
    sampling = sampling_of(about, size)
    if about["kind"] == "edits":
        if camera is not None:
            raise RequestError(f"{name} {NO_VIEWS}")
        request = Request.edit(prompt, sampling, **common)
    elif camera is None:
        advice = NO_EDITS if prompt else "renders novel views; give a camera"
        raise RequestError(f"{name} {advice}")
    else:
        trajectory = make_camera(camera, sampling)
        request = Request.view(trajectory, sampling, prompt=prompt, **common)
    check_text(name, request.prompt, request.guidance_scale, has_text=about["has_text"])
    return request


def make_camera(camera: str | dict[str, Any], sampling: SamplingConfig) -> CameraTrajectory:
    """A camera as a request has it, or as `kept_request` keeps it.

    Raises:
        CameraError: no such preset or move, or no trajectory of the model's length.
    """
    if isinstance(camera, str):
        if len(camera) > _MAX_NAME:
            raise CameraError(f"a camera's name has {len(camera)} characters; write a move")
        return named_trajectory(camera, sampling.num_frames, sampling.size)
    how: dict[str, Any] = {"num_frames": sampling.num_frames, "size": sampling.size}
    if "files" in camera:
        files = {name: _content(name, given) for name, given in camera["files"].items()}
        return given_trajectory(camera["spec"], files, **how)
    if "notes" not in camera:
        return parse_trajectory(camera, check=True, **how)
    own = {key: value for key, value in camera.items() if key not in ("name", "notes")}
    found = parse_trajectory(own, name=camera["name"], **how)
    return replace(found, notes=tuple(camera["notes"]))


def _content(name: str, given: Any) -> bytes:
    """A file's bytes, from its text, its JSON, or base64.

    Raises:
        CameraError: it is no base64.
    """
    if isinstance(given, str):
        return given.encode("utf-8", "surrogatepass")
    if isinstance(given, dict) and list(given) == ["base64"]:
        try:
            return base64.b64decode(given["base64"], validate=True)
        except (ValueError, TypeError) as error:
            raise CameraError(f"{name[:100]} is no base64 ({error}); encode its bytes") from error
    return json.dumps(given).encode()


def kept_request(asked: dict[str, Any], made: Request) -> dict[str, Any]:
    """What is kept of a request until it is made: of a camera's files, the camera alone.

    So they are read once, what was changed of them stands in the request, and they take no room.
    """
    camera = asked.get("camera")
    if not isinstance(camera, dict) or made.camera is None:
        return asked
    if "files" not in camera and not made.camera.notes:
        return asked
    about = {"name": made.camera.name, "notes": list(made.camera.notes)}
    return asked | {"camera": trajectory_json(made.camera) | about}


def sampling_of(about: dict[str, Any], size: str | None = None) -> SamplingConfig:
    """The engine's defaults, as `Backend.about` gives them, for a session of a size."""
    sampling = about["sampling"]
    height, width = sampling["size"]
    sizes = tuple((height, width) for height, width in sampling.get("sizes", ()))
    own = pixels(size) or (height, width)
    return SamplingConfig(**sampling | {"size": own, "sizes": sizes})


def pixels(size: str | None) -> tuple[int, int] | None:
    """(height, width) of WIDTHxHEIGHT; None of none."""
    if size is None:
        return None
    width, height = size.split("x")
    return int(height), int(width)


def made_size(about: dict[str, Any], asked: str | None) -> str:
    """The size of a session to come, WIDTHxHEIGHT: the one asked for, or the service's own.

    Raises not_made_here: the weights were not made for it.
    """
    sampling = about["sampling"]
    sizes = dict.fromkeys(map(tuple, (sampling["size"], *sampling.get("sizes", ()))))
    made = [f"{width}x{height}" for height, width in sizes]
    if asked is None:
        return made[0]
    if asked not in made:
        raise ApiError(
            "not_made_here",
            f"{about['engine']['checkpoint']} makes videos of {' and '.join(made)} (width x "
            f"height), not {asked[:100]!r}; ask for that or leave size out",
            param="size",
        )
    return asked


def session_window(num_frames: int, wanted: int, chosen: str | None = None) -> str | None:
    """Which frames of a video a session of views takes, as `Engine.session` names it."""
    if chosen is not None:
        return chosen
    if num_frames == wanted:
        return None
    return "first" if num_frames > wanted else "pad"
