"""The node pack for ComfyUI by ComfyUI's contract of nodes, with stand-ins for its modules."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mv2v_engine import Engine
from mv2v_engine.errors import RequestError

PACK = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"
# what the nodes of ComfyUI itself in the example workflows give
CORE = {
    "LoadVideo": ("VIDEO",),
    "GetVideoComponents": ("IMAGE", "AUDIO", "FLOAT", "INT"),
    "CreateVideo": ("VIDEO",),
    "SaveVideo": (),
}


class Interrupted(Exception):
    """ComfyUI's InterruptProcessingException."""


class Comfy:
    """What the pack uses of ComfyUI. stop_at: the step at which its user cancels."""

    def __init__(self) -> None:
        self.is_interrupted = False
        self.updates: list[tuple[int, int, Any]] = []
        self.nodes: list[str | None] = []
        self.stop_at: int | None = None
        comfy = self

        class ProgressBar:
            def __init__(self, total: int, node_id: str | None = None) -> None:
                self.total = total
                comfy.nodes.append(node_id)

            def update_absolute(
                self, value: int, total: int | None = None, preview: Any = None
            ) -> None:
                # what ComfyUI's own hook of the bar does first
                throw_exception_if_processing_interrupted()
                comfy.updates.append((value, total or self.total, preview))
                comfy.is_interrupted |= value == comfy.stop_at

        def throw_exception_if_processing_interrupted() -> None:
            if comfy.is_interrupted:
                comfy.is_interrupted = False
                raise Interrupted

        self.modules = {name: ModuleType(name) for name in ("comfy", "comfy.utils")}
        management = self.modules["comfy.model_management"] = ModuleType("management")
        management.processing_interrupted = lambda: comfy.is_interrupted  # type: ignore[attr-defined]
        management.throw_exception_if_processing_interrupted = (  # type: ignore[attr-defined]
            throw_exception_if_processing_interrupted
        )
        self.modules["comfy.utils"].ProgressBar = ProgressBar  # type: ignore[attr-defined]
        self.modules["comfy"].utils = self.modules["comfy.utils"]  # type: ignore[attr-defined]
        self.modules["comfy"].model_management = management  # type: ignore[attr-defined]


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> Comfy:
    comfy = Comfy()
    for name, module in comfy.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return comfy


@pytest.fixture
def pack(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The pack, loaded as ComfyUI loads a folder of `custom_nodes`."""
    name = str(PACK).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop(f"{name}.nodes")


@torch.inference_mode()
def run(pack: Any, kind: str, **inputs: Any) -> Any:
    """Execute a node as ComfyUI does."""
    node = pack.NODE_CLASS_MAPPINGS[kind]()
    return getattr(node, node.FUNCTION)(**inputs)


def declared(node: Any) -> dict[str, Any]:
    inputs = node.INPUT_TYPES()
    return {**inputs["required"], **inputs.get("optional", {})}


@pytest.fixture(scope="module")
@torch.inference_mode()
def engine() -> Engine:
    return Engine.from_pretrained("tiny-nvs", device="cpu")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(17, 96, 160, 3, generator=torch.Generator().manual_seed(0))


def test_every_node_keeps_the_contract(pack: Any) -> None:
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in pack.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        assert set(inputs) <= {"required", "optional", "hidden"}
        taken = inspect.signature(getattr(node, node.FUNCTION)).parameters
        names = {*declared(node), *inputs.get("hidden", {})}
        assert set(taken) - {"self"} == names
        for name, (kind, *options) in declared(node).items():
            assert isinstance(kind, str | list), name
            default = options[0].get("default") if options else None
            if name in inputs.get("optional", {}) and isinstance(kind, str) and default is not None:
                assert taken[name].default == default, name
        assert node.CATEGORY and len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        changed = getattr(node, "IS_CHANGED", None)
        if changed is not None:
            assert set(inspect.signature(changed).parameters) == set(declared(node))


# what the nodes of ComfyUI itself in the example workflows are set to in the editor
CORE_WIDGETS = {
    "LoadVideo": ("file", None),
    "CreateVideo": ("fps",),
    "SaveVideo": ("filename_prefix", "format", "codec"),
}
WIDGETS = {"STRING": str, "INT": int, "FLOAT": float, "BOOLEAN": bool}
PROMPTS = sorted((PACK / "prompts").glob("*.json"))


@pytest.mark.parametrize("path", PROMPTS, ids=lambda p: p.stem)
def test_the_example_prompts_fit_the_nodes(pack: Any, path: Path) -> None:
    flow = json.loads(path.read_text(encoding="utf-8"))
    gives = CORE | {name: node.RETURN_TYPES for name, node in pack.NODE_CLASS_MAPPINGS.items()}
    for node in flow.values():
        known = pack.NODE_CLASS_MAPPINGS.get(node["class_type"])
        assert node["class_type"] in gives
        if known is None:
            continue
        inputs = declared(known)
        assert set(known.INPUT_TYPES()["required"]) <= set(node["inputs"]) <= set(inputs)
        for name, value in node["inputs"].items():
            kind = inputs[name][0]
            if isinstance(value, list):
                assert gives[flow[value[0]]["class_type"]][value[1]] == kind, name
            elif isinstance(kind, list):
                assert value in kind
            else:
                assert type(value) is WIDGETS[kind], name


@pytest.mark.parametrize("path", PROMPTS, ids=lambda p: p.stem)
def test_the_editor_makes_the_prompt_of_the_workflow(pack: Any, path: Path) -> None:
    """What ComfyUI offers as a template is the graph of the editor, which it makes a prompt of."""
    graph = json.loads((PACK / "example_workflows" / path.name).read_text(encoding="utf-8"))
    links = {link[0]: link for link in graph["links"]}
    types = {node["id"]: [one["type"] for one in node["outputs"]] for node in graph["nodes"]}
    prompt = {}
    for node in graph["nodes"]:
        kind = pack.NODE_CLASS_MAPPINGS.get(node["type"])
        if kind is None:
            widgets = CORE_WIDGETS.get(node["type"], ())
        else:
            inputs = declared(kind).items()
            named = [
                (name, f"control after {name}") if name == "seed" else (name,)
                for name, (of, *_) in inputs
                if isinstance(of, list) or of in WIDGETS
            ]
            widgets = tuple(name for names in named for name in names)
            assert [one["name"] for one in node["outputs"]] == list(kind.RETURN_NAMES)
        values = dict(zip(widgets, node["widgets_values"], strict=True))
        for slot, one in enumerate(node["inputs"]):
            if one["link"] is None:
                continue
            _, origin, output, target, at, kind_of = links[one["link"]]
            assert (target, at, kind_of) == (node["id"], slot, one["type"])
            assert types[origin][output] == one["type"]
            values[one["name"]] = [str(origin), output]
        values = {name: value for name, value in values.items() if " " not in (name or " ")}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": values}
    assert prompt == json.loads(path.read_text(encoding="utf-8"))


def test_a_view_by_the_embedded_model(
    pack: Any, comfy: Comfy, engine: Engine, images: torch.Tensor
) -> None:
    (session,) = run(pack, "MV2VSession", engine=engine, images=images, fps=8.0)
    (camera,) = run(
        pack,
        "MV2VDialCamera",
        arc=-20.0,
        pan=0.0,
        tilt=5.0,
        zoom=0.0,
        crane=0.0,
        x=0.0,
        y=0.0,
        z=0.0,
    )
    assert camera == "arc:-20+tilt:5"
    asked = {"session": session, "camera": camera, "seed": 7, "steps": 2, "unique_id": "6"}
    made, latents, fps, report, same = run(pack, "MV2VRenderView", **asked)
    assert made.shape == (17, 96, 160, 3) and made.dtype == torch.float32
    assert 0 <= made.min() < made.max() <= 1 and fps == 8.0 and same is session
    turn = session.turns[0]
    assert torch.equal(latents["samples"], turn.latents[None])
    assert torch.equal((made * 255).round().to(torch.uint8), turn.frames)
    assert json.loads(report)["turn"] == 1
    assert comfy.nodes == ["6"]
    assert [(value, total) for value, total, preview in comfy.updates if not preview] == [
        (1, 2),
        (2, 2),
    ]
    kind, picture, side = next(preview for *_, preview in comfy.updates if preview)
    assert kind == "JPEG" and picture.size[0] > 100 and side >= picture.size[0]
    # another run with the same frames goes on in the same session; the same turn is not made again
    (again,) = run(pack, "MV2VSession", engine=engine, images=images.clone(), fps=8.0)
    assert again is session
    run(pack, "MV2VRenderView", **asked)
    assert len(session.turns) == 1
    second = run(pack, "MV2VRenderView", **asked | {"camera": "pan_right"})
    assert [video["turn"] for video in json.loads(second[3])["memory"]["retrieved"]] == [1]
    (other,) = run(pack, "MV2VSession", engine=engine, images=images, fps=8.0, name="other")
    assert other is not session and not other.turns


@pytest.mark.parametrize("previews", [True, False], ids=["in the bar", "in the turn"])
def test_the_users_cancel_ends_a_turn(
    pack: Any, comfy: Comfy, engine: Engine, images: torch.Tensor, previews: bool
) -> None:
    """Found by the bar, when the step's preview is shown, or by the turn at its next step."""
    (session,) = run(pack, "MV2VSession", engine=engine, images=images)
    comfy.stop_at = 1
    asked = {"session": session, "camera": "pan_right", "seed": 0, "previews": previews}
    with pytest.raises(Interrupted):
        run(pack, "MV2VRenderView", **asked, steps=3)
    assert not session.turns and not comfy.is_interrupted
    assert max(value for value, *_ in comfy.updates) == 1
    comfy.stop_at = None
    run(pack, "MV2VRenderView", **asked, steps=1)
    assert len(session.turns) == 1


def test_latents_and_a_folder_go_in(
    pack: Any, engine: Engine, images: torch.Tensor, tmp_path: Path
) -> None:
    frames = (images * 255).round().to(torch.uint8)
    latents = engine.vae.encode(frames)
    given = {"engine": engine, "images": images, "folder": str(tmp_path / "kept")}
    (session,) = run(pack, "MV2VSession", **given, latents={"samples": latents[None]})
    run(pack, "MV2VRenderView", session=session, camera="static", seed=0, steps=1, previews=False)
    session.close()
    nodes = sys.modules[f"{pack.__name__}.nodes"]
    nodes._sessions.clear()
    nodes._recent.clear()
    (resumed,) = run(pack, "MV2VSession", **given)
    assert [turn.number for turn in resumed.turns] == [1]
    resumed.close()
    with pytest.raises(RequestError, match="latents are expected"):
        run(pack, "MV2VSession", **given, latents={"samples": latents})


def test_what_nobody_holds_is_let_go(
    pack: Any, engine: Engine, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys.modules[f"{pack.__name__}.nodes"], "MAX_SESSIONS", 1)
    given = {"engine": engine, "images": images, "folder": str(tmp_path / "kept")}
    (held,) = run(pack, "MV2VSession", **given)
    run(pack, "MV2VSession", engine=engine, images=images, name="2")
    # as ComfyUI holds it, which runs the nodes after it alone
    run(pack, "MV2VRenderView", session=held, camera="static", seed=0, steps=1, previews=False)
    (again,) = run(pack, "MV2VSession", **given)
    assert again is held
    run(pack, "MV2VSession", engine=engine, images=images, name="2")
    name = held.id
    del held, again
    (resumed,) = run(pack, "MV2VSession", **given)
    assert resumed.id == name and [turn.number for turn in resumed.turns] == [1]


def test_a_graph_that_was_left_finds_its_engine_and_session_again(
    pack: Any, images: torch.Tensor, tmp_path: Path
) -> None:
    """ComfyUI forgets what its nodes gave as soon as another graph runs."""
    folder = str(tmp_path / "kept")

    def opened(settings: str = "") -> Any:
        (engine,) = run(pack, "MV2VLoadEngine", checkpoint="tiny-nvs", settings=settings)
        return run(pack, "MV2VSession", engine=engine, images=images, folder=folder)[0]

    first = weakref.ref(opened())
    assert opened() is first() is not None
    # another engine takes its place, and its folder
    other = opened('{"cache_bytes": 99999}')
    assert first() is None and other.parts.config.cache_bytes == 99999


def test_another_content_of_a_camera_file_is_another_camera(pack: Any, tmp_path: Path) -> None:
    node, path = pack.NODE_CLASS_MAPPINGS["MV2VFileCamera"], tmp_path / "camera.json"
    nothing = node.IS_CHANGED(path=str(path))
    assert nothing != nothing
    path.write_text("one")
    one = node.IS_CHANGED(path=str(path))
    assert node.IS_CHANGED(path=str(path)) == one
    path.write_text("two")
    assert node.IS_CHANGED(path=str(path)) != one
    # what another node gives is not told
    assert math.isnan(node.IS_CHANGED(path=None)) and node.IS_CHANGED(path=str(path), options=None)
    assert run(pack, "MV2VFileCamera", path="a.json", options="relative") == ("a.json?relative",)


def test_an_engine_with_settings(pack: Any) -> None:
    (engine,) = run(
        pack, "MV2VLoadEngine", checkpoint="tiny-nvs", settings='{"cache_bytes": 99999}'
    )
    assert engine.config.cache_bytes == 99999
    with pytest.raises(RequestError, match="got \\['nonsense'\\]"):
        run(pack, "MV2VLoadEngine", checkpoint="tiny-nvs", settings='{"nonsense": 1}')
    with pytest.raises(RequestError, match="no JSON"):
        run(pack, "MV2VLoadEngine", checkpoint="tiny-nvs", settings="cache=1")


def test_comfyuis_own_loader() -> None:
    nodes = pytest.importorskip("nodes", reason="ComfyUI is not installed")
    if not hasattr(nodes, "load_custom_node"):
        pytest.skip("ComfyUI is not installed")
    import asyncio

    assert asyncio.run(nodes.load_custom_node(str(PACK)))
    assert "MV2VRenderView" in nodes.NODE_CLASS_MAPPINGS
