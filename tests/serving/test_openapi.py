"""The schema is whole: every error a route can give, an example of everything, no loose ends."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mv2v_engine.camera.files import CONVENTION, FORMAT, VERSION
from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.errors import KINDS
from mv2v_engine.serving.http.app import create_app
from mv2v_engine.serving.http.schemas import Trajectory
from mv2v_engine.serving.watch.metrics import Metrics
from mv2v_engine.serving.watch.percent import Percentages

# answers of any address, with or without a route; and to a body that a client gives up on
ANYWHERE = {"method_not_allowed"}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    config = ServingConfig(store=Path("unused"))
    metrics = Metrics(queue_capacity=1, store=config.store)
    app = create_app(None, config, metrics, Percentages())  # type: ignore[arg-type]
    return app.openapi()


def operations(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method} {path}", operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    ]


def test_every_route_documents_its_answers(schema: dict[str, Any]) -> None:
    names, seen = [], set()
    for where, operation in operations(schema):
        names.append(operation["operationId"])
        assert operation["summary"] and operation["description"], where
        assert operation["tags"], where
        if " /v1/" in where:
            assert operation["security"], where
        # what is checked may be wrong; a range of bytes is ignored then
        checked = [p for p in operation.get("parameters", []) if p["in"] in ("query", "header")]
        if "requestBody" in operation or any(p["name"] != "Range" for p in checked):
            assert "422" in operation["responses"], where
        for status, answer in operation["responses"].items():
            if int(status) < 400 or where == "get /readyz":
                continue
            content = answer["content"]["application/json"]
            assert content["schema"] == {"$ref": "#/components/schemas/ErrorBody"}, where
            for code, example in content["examples"].items():
                assert KINDS[code].status == int(status)
                assert example["value"]["error"]["code"] == code
                seen.add(code)
    assert len(set(names)) == len(names)
    answered = {code for code, kind in KINDS.items() if kind.status is not None}
    assert seen == answered - ANYWHERE


def test_references_lead_somewhere_and_models_have_examples(schema: dict[str, Any]) -> None:
    models = schema["components"]["schemas"]
    used = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schema)))
    assert used == set(models)
    for name in ("Session", "Turn", "Job", "Video", "TurnRequest", "RemixRequest", "ErrorBody"):
        (example, *_) = models[name]["examples"]
        assert set(example) <= set(models[name]["properties"])


def test_a_trajectory_is_the_camera_file_format() -> None:
    fields = Trajectory.model_fields
    assert fields["convention"].default == CONVENTION
    known = {"format": FORMAT, "version": VERSION, "size": [48, 64]}
    pose = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert Trajectory.model_validate({**known, "poses": [pose]}).intrinsics is None
