"""Replicas on Ray Serve without a cluster: the application, and what Serve says of it."""

from __future__ import annotations

import asyncio
import traceback
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

from mv2v_engine.errors import CheckpointError, RequestError
from mv2v_engine.parser import Parser
from mv2v_engine.serving.command import add_serve, serving_config
from mv2v_engine.serving.config import Cluster, ServingConfig
from mv2v_engine.serving.server import serve as serve_http
from mv2v_engine.serving.store.records import SessionRecord, new_job
from mv2v_engine.serving.work import ray_replica
from mv2v_engine.serving.work.protocol import setup_message
from mv2v_engine.serving.work.ray_backend import RayBackend
from mv2v_engine.serving.work.ray_replica import build_app

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600.0  # seconds


def _says(monkeypatch: pytest.MonkeyPatch, words: str, *, has_failed: bool = True) -> None:
    """Have Serve say so of replicas. has_failed: its last word: it starts no more of them."""
    deployment = DeploymentStatusOverview(
        DeploymentStatus.DEPLOY_FAILED if has_failed else DeploymentStatus.UPDATING,
        DeploymentStatusTrigger.REPLICA_STARTUP_FAILED,
        {},
        words,
    )
    state = ApplicationStatus.DEPLOY_FAILED if has_failed else ApplicationStatus.DEPLOYING
    about = ApplicationStatusOverview(state, "failed to update", 0.0, {"Replica": deployment})
    monkeypatch.setattr(serve, "status", lambda: ServeStatus(applications={"mv2v": about}))
    monkeypatch.setattr(RayBackend, "_connect", lambda self: object())
    monkeypatch.setattr(RayBackend, "_disconnect", lambda self: None)


def test_settings_that_no_try_can_meet_end_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica says which error is one of them, and Serve says what the replica said."""

    def failing(setup: Any, **how: Any) -> Any:
        raise CheckpointError("style.safetensors fits another base; give that base")

    monkeypatch.setattr(ray_replica, "open_host", failing)
    with pytest.raises(ray_replica.NeverError) as caught:
        ray_replica._opened({})
    trace = "".join(traceback.format_exception(caught.value))
    _says(
        monkeypatch,
        f"A replica failed to start. Error:\n{trace}",
        has_failed=False,
    )

    config = ServingConfig(store=tmp_path / "store", port=0)
    backend = RayBackend(config, Cluster(replicas=1))
    listening = serve_http(config, backend, on_listening=print, on_ready=print)
    with pytest.raises(RequestError, match=r"^style\.safetensors fits another base; give that"):
        asyncio.run(asyncio.wait_for(listening, PATIENCE))

    # what another deploys may become something else, and is waited for
    async def looked() -> RayBackend:
        backend, seen = RayBackend(config, Cluster()), asyncio.Event()
        backend.watch(seen.set)
        await backend.start()
        await asyncio.wait_for(seen.wait(), PATIENCE)
        await backend.stop(0.0)
        return backend

    waiting = asyncio.run(looked())
    assert not waiting.refusal and not waiting.is_lost

    def unreachable(setup: Any, **how: Any) -> Any:
        try:
            raise OSError("no route to host")
        except OSError as error:
            raise CheckpointError("the hub cannot be reached") from error

    # what may be there at the next try is tried again
    monkeypatch.setattr(ray_replica, "open_host", unreachable)
    with pytest.raises(CheckpointError):
        ray_replica._opened({})


def test_replicas_that_never_come_up_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve's last word on replicas whose constructor failed."""
    _says(monkeypatch, "failed 3 times\nTraceback\nCheckpointError: no checkpoint at 'x'\n")

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
