"""Replicas on Ray Serve without a cluster: the application, and what Serve says of it."""

from __future__ import annotations

import asyncio
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra [distributed] is not installed")
pytest.importorskip("yaml", reason="PyYAML is not installed")
import yaml
from ray import serve
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ServeDeploySchema,
    ServeStatus,
)

from mv2v_engine.errors import RequestError
from mv2v_engine.parser import Parser
from mv2v_engine.serving.command import add_serve, serving_config
from mv2v_engine.serving.config import Cluster, ServingConfig
from mv2v_engine.serving.store.records import SessionRecord, new_job
from mv2v_engine.serving.work.protocol import setup_message
from mv2v_engine.serving.work.ray_backend import RayBackend
from mv2v_engine.serving.work.ray_replica import build_app

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600.0  # seconds


def test_replicas_that_never_come_up_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve's last word on replicas whose constructor failed; it starts no more of them."""
    deployment = DeploymentStatusOverview(
        DeploymentStatus.DEPLOY_FAILED,
        DeploymentStatusTrigger.REPLICA_STARTUP_FAILED,
        {},
        "failed to start 3 times in a row\nTraceback\nCheckpointError: no checkpoint at 'x'\n",
    )
    status = ServeStatus(
        applications={
            "mv2v": ApplicationStatusOverview(
                ApplicationStatus.DEPLOY_FAILED, "failed to update", 0.0, {"Replica": deployment}
            )
        }
    )
    monkeypatch.setattr(serve, "status", lambda: status)
    monkeypatch.setattr(RayBackend, "_connect", lambda self: object())
    monkeypatch.setattr(RayBackend, "_disconnect", lambda self: None)

    sizes: dict[str, Any] = {"frames": 9, "width": 64, "height": 48, "bytes": 1, "num_turns": 0}
    times = {"fps": 8.0, "created": 0.0, "touched": 0.0}
    texts: dict[str, Any] = {"kind": "views", "name": "clip", "checkpoint": "x"}
    session = SessionRecord(id="session", owner="ada", **texts, **sizes, **times)
    job = new_job(session, {})

    async def looked(replicas: int | None) -> RayBackend:
        backend = RayBackend(ServingConfig(store=tmp_path), Cluster(replicas=replicas))
        seen = asyncio.Event()
        backend.watch(seen.set)
        await backend.start()
        await asyncio.wait_for(seen.wait(), PATIENCE)
        assert not backend.ready and "CheckpointError: no checkpoint at 'x'" in backend.reason
        if backend.is_lost:
            # a turn that waits is taken, and fails
            assert backend.capacity == 1
            events = [event async for event in backend.run(job, session, tmp_path)]
            assert [event["code"] for event in events] == ["worker_crashed"]
        await backend.stop(0.0)
        return backend

    assert asyncio.run(looked(1)).is_lost
    # another may deploy what `serve deploy` has deployed
    assert not asyncio.run(looked(None)).is_lost


def config_file() -> dict[str, Any]:
    text = (ROOT / "deploy" / "ray-serve.yaml").read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(text)
    return config


def test_the_config_file_makes_the_application() -> None:
    (schema,) = ServeDeploySchema.model_validate(config_file()).applications
    module, name = schema.import_path.split(":")
    app = getattr(import_module(module), name)(schema.args)
    assert schema.name == "mv2v"
    deployment = app._bound_deployment
    options = deployment.ray_actor_options
    assert (deployment.name, deployment.num_replicas) == ("Replica", 4)
    assert (options["num_cpus"], options["num_gpus"]) == (4, 1)
    assert deployment.max_ongoing_requests == 1
    (setup,) = deployment.init_args
    assert setup["store"] == "/srv/mv2v" and setup["engine"]["max_memory"] == 10
    # it is what the command at the head of the file asks for
    words = "--store /srv/mv2v --checkpoint /srv/weights/Wan --device cuda --dtype bfloat16"
    parser = Parser()
    add_serve(parser)
    assert setup == setup_message(serving_config(parser.parse_args(words.split())).in_cluster())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "no store"),
        ({"store": "s", "replica": 2}, "unknown: replica;"),
        ({"store": "s", "engine": {"parallel": {}}}, "unknown: parallel;"),
        ({"store": "s", "replicas": 0}, "at least 1"),
    ],
)
def test_wrong_args_of_the_application_are_named(args: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        build_app(args)
