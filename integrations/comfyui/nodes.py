"""The nodes: an engine, a session, cameras, a rendered view, an edit.

ComfyUI keeps what a node gave as long as its inputs stay the same and its graph is the one that
runs, and it runs nodes in inference mode. An engine and a session are found again by what they were
opened with, whatever ComfyUI has kept, so turns are remembered from run to run; with a folder, from
one start of ComfyUI to the next. What ComfyUI still holds stays open.

Images are ComfyUI's IMAGE, float32 [T, height, width, 3] from 0 to 1; latents its LATENT,
{"samples": [1, C, F, H, W]}, of an edit [W, C, F, H, W] with its windows.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections import OrderedDict
from contextlib import closing
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import comfy.model_management
import comfy.utils
import torch

from mv2v_engine import CancelToken, Engine, EngineConfig, Session, Turn
from mv2v_engine.checkpoints.lora import lora_pair
from mv2v_engine.errors import CancelledError, RequestError
from mv2v_engine.files import file_digest
from mv2v_engine.progress import Preview, StepDone, WindowStarted

CATEGORY = "mv2v_engine"
ENGINE, SESSION = "MV2V_ENGINE", "MV2V_SESSION"
_DEFAULT = "default"
# sessions of one engine that stay open though ComfyUI holds them no longer; the least recently used
# is let go first
MAX_SESSIONS = 8
# pixels of a preview's longer side
_PREVIEW_SIDE = 512
# by what they were opened with
_engines: WeakValueDictionary[str, Engine] = WeakValueDictionary()
_sessions: WeakValueDictionary[str, Session] = WeakValueDictionary()
# with its engine, whose id a session's key has
_recent: OrderedDict[str, tuple[Engine, Session]] = OrderedDict()


class Interrupt(CancelToken):
    """Set by the button of ComfyUI that ends what runs."""

    @property
    def cancelled(self) -> bool:
        return bool(comfy.model_management.processing_interrupted())


class LoadEngine:
    """A checkpoint on a device, with LoRAs and settings of the engine."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = (ENGINE,), ("engine",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        lines = {"multiline": True, "default": ""}
        return {
            "required": {"checkpoint": ("STRING", {"default": "tiny-nvs"})},
            "optional": {
                "components": ("STRING", {"default": "", "tooltip": "folder or hub name"}),
                "device": ("STRING", {"default": "", "tooltip": "CUDA where there is one"}),
                "lora": ("STRING", lines | {"tooltip": "FILE:STRENGTH, one a line"}),
                "settings": (
                    "STRING",
                    lines
                    | {"tooltip": 'fields of EngineConfig as JSON: {"cache_bytes": 1000000000}'},
                ),
            },
        }

    def load(
        self,
        checkpoint: str,
        components: str = "",
        device: str = "",
        lora: str = "",
        settings: str = "",
    ) -> tuple[Engine]:
        key = json.dumps([checkpoint, components, device, lora, settings])
        engine = _engines.get(key)
        if engine is None:
            given = json_settings(settings)
            loras = [lora_pair(line.strip()) for line in lora.splitlines() if line.strip()]
            if loras:
                given["lora"] = tuple(loras)
            # a device has seldom room for the weights of two
            _recent.clear()
            gc.collect()
            engine = _engines[key] = Engine.from_pretrained(
                checkpoint.strip(),
                components=components.strip() or None,
                device=device.strip() or None,
                config=EngineConfig(**given),
            )
        return (engine,)


class OpenSession:
    """A source video and the memory of its turns.

    Sessions of the same engine, images, latents, name and folder are one session.
    """

    CATEGORY, FUNCTION = CATEGORY, "open"
    RETURN_TYPES, RETURN_NAMES = (SESSION,), ("session",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"engine": (ENGINE,), "images": ("IMAGE",)},
            "optional": {
                "fps": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1000.0, "step": 0.01}),
                "window": ("STRING", {"default": "first", "tooltip": "frames of a longer video"}),
                "name": ("STRING", {"default": "", "tooltip": "another name, another memory"}),
                "folder": ("STRING", {"default": "", "tooltip": "keeps the session on the disk"}),
                "latents": ("LATENT",),
            },
        }

    def open(
        self,
        engine: Engine,
        images: torch.Tensor,
        fps: float = 0.0,
        window: str = "first",
        name: str = "",
        folder: str = "",
        latents: dict[str, torch.Tensor] | None = None,
    ) -> tuple[Session]:
        """latents: the source's, as an engine with the same VAE has encoded it; for views alone."""
        frames = (images[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        samples = None if latents is None else latents["samples"]
        if samples is not None and (samples.ndim != 5 or samples.shape[0] != 1):
            raise RequestError(
                f"the source's latents are expected as [1, C, F, H, W], got {list(samples.shape)}; "
                "take them from a video VAE"
            )
        digest = hashlib.sha256(frames.numpy().tobytes())
        words = [id(engine), list(frames.shape), fps, window, name, folder]
        if samples is not None:
            digest.update(samples.float().cpu().contiguous().numpy().tobytes())
        key = json.dumps([*words, digest.hexdigest()])
        session = _sessions.get(key)
        if session is None:
            gc.collect()  # one that was let go may still lock the folder
            views: dict[str, Any] = {}
            if not engine.is_editor:
                is_whole = len(frames) == engine.sampling.num_frames
                views["window"] = None if is_whole else window or None
            if samples is not None:
                views["source_latents"] = samples[0].float().cpu()
            place = Path(folder.strip()).expanduser() if folder.strip() else None
            session = _sessions[key] = engine.session(
                frames,
                fps=fps or None,
                store=place,
                resume=place is not None and (place / "session.json").exists(),
                cancel=Interrupt(),
                **views,
            )
        _recent[key] = (engine, session)
        _recent.move_to_end(key)
        while len(_recent) > MAX_SESSIONS:
            _recent.popitem(last=False)
        return (session,)


class DialCamera:
    """A camera from numbers; their moves are added up."""

    CATEGORY, FUNCTION = CATEGORY, "words"
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("camera",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        degrees = ("FLOAT", {"default": 0.0, "min": -180.0, "max": 180.0, "step": 1.0})
        metres = ("FLOAT", {"default": 0.0, "min": -20.0, "max": 20.0, "step": 0.1})
        dials = {"arc": degrees, "pan": degrees, "tilt": degrees}
        return {"required": dials | dict.fromkeys(("zoom", "crane", "x", "y", "z"), metres)}

    def words(
        self,
        arc: float,
        pan: float,
        tilt: float,
        zoom: float,
        crane: float,
        x: float,
        y: float,
        z: float,
    ) -> tuple[str]:
        dials = {"arc": arc, "zoom": zoom, "crane": crane, "pan": pan, "tilt": tilt}
        moves = [f"{move}:{amount:g}" for move, amount in dials.items() if amount]
        if x or y or z:
            moves.append(f"translate:{x:g},{y:g},{z:g}")
        return ("+".join(moves) or "static",)


class FileCamera:
    """A camera from a file of poses, with the options that docs/cameras.md lists."""

    CATEGORY, FUNCTION = CATEGORY, "words"
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("camera",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"path": ("STRING", {"default": "camera.json"})},
            "optional": {"options": ("STRING", {"default": "", "tooltip": "relative&scale=0.01"})},
        }

    @classmethod
    def IS_CHANGED(cls, path: str | None, options: str | None = "") -> str | float:
        """The file's digest, so that another content is another camera.

        None: what another node gives, which ComfyUI does not tell here; NaN, that the file is read
        again.
        """
        if path is None:
            return math.nan
        try:
            return f"{file_digest(Path(path.partition('#')[0]).expanduser())} {options}"
        except OSError:
            return math.nan

    def words(self, path: str, options: str = "") -> tuple[str]:
        return (f"{path}?{options}" if options.strip() else path,)


def _turn_inputs(first: dict[str, Any], memories: list[str]) -> dict[str, Any]:
    """What both kinds of turn take."""
    return {
        "required": {
            "session": (SESSION,),
            **first,
            "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
        },
        "optional": {
            "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0: the model's"}),
            "guidance": (
                "FLOAT",
                {"default": -1.0, "min": -1.0, "max": 100.0, "tooltip": "-1: the model's"},
            ),
            "memory": ([_DEFAULT, *memories],),
            "previews": ("BOOLEAN", {"default": True}),
        },
        "hidden": {"unique_id": "UNIQUE_ID"},
    }


class _MakesTurn:
    """A node that makes a turn, or gives the one that this session has made of the same request."""

    CATEGORY, FUNCTION = CATEGORY, "make"
    RETURN_TYPES = ("IMAGE", "LATENT", "FLOAT", "STRING", SESSION)
    RETURN_NAMES = ("images", "latents", "fps", "report", "session")

    def _made(
        self,
        session: Session,
        seed: int,
        steps: int,
        guidance: float,
        memory: str,
        previews: bool,
        unique_id: str | None,
        **first: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], float, str, Session]:
        request = session.request(
            seed=seed,
            num_inference_steps=steps or None,
            guidance_scale=None if guidance < 0 else guidance,
            memory=None if memory == _DEFAULT else memory,  # type: ignore[arg-type]
            **first,
        )
        turn = None
        if request.camera is not None:  # a session finds an edit again by itself
            answers = (
                turn
                for turn in session.turns
                if not request.difference(turn.report, turn.trajectory)
            )
            turn = next(answers, None)
        if turn is None:
            turn = _driven(session, request, previews, unique_id)
        images = turn.frames.float() / 255
        # its own, which a node after this one may write into
        latents = (turn.latents if turn.trajectory is None else turn.latents[None]).clone()
        report = json.dumps(turn.report, indent=1, default=str)
        return images, {"samples": latents}, turn.fps, report, session


def _driven(session: Session, request: Any, previews: bool, unique_id: str | None) -> Turn:
    """Make a turn, showing its steps, until it is finished or ComfyUI's user ends it."""
    bar = comfy.utils.ProgressBar(request.num_inference_steps, node_id=unique_id)
    done, windows = 0, len(session.windows)
    events = session.events(request, Interrupt(), previews=previews)
    try:
        with closing(events):
            while True:
                event = next(events)
                if isinstance(event, WindowStarted):
                    done = (event.number - 1) * request.num_inference_steps
                elif isinstance(event, StepDone):
                    bar.update_absolute(done + event.step, windows * event.total)
                elif isinstance(event, Preview):
                    preview = ("JPEG", _picture(event.picture), _PREVIEW_SIDE)
                    bar.update_absolute(done + event.step, windows * event.total, preview)
    except StopIteration as finished:
        turn: Turn = finished.value
        return turn
    except CancelledError:
        # ends as ComfyUI's own nodes do, and resets its button for cancelling, too
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise


def _picture(pixels: torch.Tensor) -> Any:
    """A preview as Pillow's image, large enough to be looked at."""
    from PIL import Image

    image = Image.fromarray(pixels.numpy())
    factor = max(1, 256 // max(image.size))
    return image.resize((image.width * factor, image.height * factor))


class RenderView(_MakesTurn):
    """The source from another camera, remembering the session's earlier turns."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        camera = {"camera": ("STRING", {"default": "pan_right", "tooltip": "a preset or moves"})}
        inputs = _turn_inputs(camera, ["retrieved", "alone", "previous", "none"])
        inputs["optional"]["prompt"] = ("STRING", {"default": "", "multiline": True})
        return inputs

    def make(
        self,
        session: Session,
        camera: str,
        seed: int,
        steps: int = 0,
        guidance: float = -1.0,
        memory: str = _DEFAULT,
        previews: bool = True,
        prompt: str = "",
        unique_id: str | None = None,
    ) -> tuple[Any, ...]:
        how = (seed, steps, guidance, memory, previews, unique_id)
        return self._made(session, *how, camera=camera.strip(), prompt=prompt)


class Edit(_MakesTurn):
    """The whole source edited by one instruction."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        prompt = {"prompt": ("STRING", {"default": "make the sphere red", "multiline": True})}
        return _turn_inputs(prompt, ["retrieved", "none"])

    def make(
        self,
        session: Session,
        prompt: str,
        seed: int,
        steps: int = 0,
        guidance: float = -1.0,
        memory: str = _DEFAULT,
        previews: bool = True,
        unique_id: str | None = None,
    ) -> tuple[Any, ...]:
        how = (seed, steps, guidance, memory, previews, unique_id)
        return self._made(session, *how, prompt=prompt)


def json_settings(text: str) -> dict[str, Any]:
    """Fields of `EngineConfig` from JSON.

    Raises:
        RequestError: it is no JSON object, or has a field that there is not.
    """
    if not text.strip():
        return {}
    try:
        given = json.loads(text)
    except ValueError as error:
        raise RequestError(f"settings are no JSON ({error}); write {{}} or fields in it") from error
    known = set(EngineConfig.__dataclass_fields__)
    if not isinstance(given, dict) or set(given) - known:
        wrong = sorted(set(given) - known) if isinstance(given, dict) else text[:40]
        raise RequestError(
            f"settings are a JSON object of EngineConfig's fields, got {wrong}; there are "
            f"{', '.join(sorted(known))}"
        )
    return given


NODE_CLASS_MAPPINGS = {
    "MV2VLoadEngine": LoadEngine,
    "MV2VSession": OpenSession,
    "MV2VDialCamera": DialCamera,
    "MV2VFileCamera": FileCamera,
    "MV2VRenderView": RenderView,
    "MV2VEdit": Edit,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "MV2VLoadEngine": "Load Engine (mv2v)",
    "MV2VSession": "Session (mv2v)",
    "MV2VDialCamera": "Camera Dial (mv2v)",
    "MV2VFileCamera": "Camera File (mv2v)",
    "MV2VRenderView": "Render View (mv2v)",
    "MV2VEdit": "Edit (mv2v)",
}
