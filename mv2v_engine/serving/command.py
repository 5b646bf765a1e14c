"""`run serve`: its options, read without loading what only the service needs."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from mv2v_engine.config import EngineConfig, LoadConfig
from mv2v_engine.envs import serving_tokens, webhook_secret
from mv2v_engine.errors import RequestError
from mv2v_engine.options import add_engine, read_resolution
from mv2v_engine.serving.config import CONNECTIONS, PLACES, Cluster, Limits, ServingConfig
from mv2v_engine.serving.work.backend import Backend
from mv2v_engine.settings import add_settings, flags, given

_NEEDED = ("fastapi", "httpx", "uvicorn", "pydantic", "prometheus_client", "python_multipart")


def serve(args: argparse.Namespace) -> int:
    """Serve a checkpoint over HTTP until a signal ends it."""
    _require(_NEEDED, "serve")
    config, cluster = serving_config(args), cluster_config(args)
    # whatever is wrong with the checkpoint is said before anything listens
    resolution = read_resolution(args)
    is_editor = resolution.config.is_editor
    if resolution.stream is not None and cluster is not None:
        raise RequestError("replicas make no streams; leave --workers ray out")
    if config.engine.batch_tokens is not None and (is_editor or cluster is not None):
        made = "edits are made" if is_editor else "a replica makes its turns"
        raise RequestError(f"{made} one after the other; leave --batch-tokens out")

    import asyncio

    from mv2v_engine.serving.server import serve as serve_http
    from mv2v_engine.serving.watch.logs import LogListener, configure_logs

    configure_logs()
    backend = _make_backend(config, cluster)
    asyncio.run(
        serve_http(
            config,
            backend,
            (LogListener(),),
            # flushed, for whoever started this waits for the lines
            on_listening=lambda address: print(f"listening on {address}", flush=True),
            on_ready=lambda address, model: print(f"ready: {model} on {address}", flush=True),
        )
    )
    return 0


def _require(modules: Sequence[str], extra: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(
            f"serving needs {', '.join(missing)}, which this Python does not have; "
            f"pip install 'mv2v_engine[{extra}]'"
        )


def _make_backend(config: ServingConfig, cluster: Cluster | None) -> Backend:
    if cluster is None:
        from mv2v_engine.serving.work.local import LocalBackend

        return LocalBackend(config)
    from mv2v_engine.serving.work.ray_backend import RayBackend

    return RayBackend(config, cluster)


def serving_config(args: argparse.Namespace) -> ServingConfig:
    """What was asked for.

    Raises:
        RequestError: a value out of its range, or a service that anybody could reach.
    """
    return ServingConfig(
        **given(args, ServingConfig),
        store=args.store,
        engine=EngineConfig(**given(args, EngineConfig)),
        webhook_secret=webhook_secret(),
        tokens=() if args.allow_anonymous else read_tokens(args.tokens),
        limits=Limits(**given(args, Limits)),
    )


def cluster_config(args: argparse.Namespace) -> Cluster | None:
    """The replicas that were asked for; None for a worker on this machine.

    Raises:
        RequestError: Ray is not installed, or options do not go together.
    """
    asked = given(args, Cluster)
    if args.workers == "local":
        if asked:
            options = ", ".join(flags(Cluster)[name] for name in asked)
            raise RequestError(f"{options} is for replicas; add --workers ray, or leave it out")
        return None
    if not {"replicas", "address"} & set(asked):
        raise RequestError(
            "--workers ray needs --replicas, how many to start, or the --ray-address of a cluster "
            "where `serve deploy` has started them"
        )
    _require(("ray",), "distributed")
    return Cluster(**asked)


def read_tokens(path: Path | None) -> tuple[str, ...]:
    """The tokens of a file, one a line, '#' begins a comment; without one, of the environment.

    Raises:
        RequestError: the file cannot be read, or holds no token.
    """
    if path is None:
        return serving_tokens()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read tokens from {path}: {error}; give a text file") from error
    tokens = tuple(filter(None, (line.partition("#")[0].strip() for line in lines)))
    if not tokens:
        raise RequestError(f"{path} holds no tokens; write one on each line")
    return tokens


def add_serve(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.set_defaults(command=serve)
    add = parser.add_argument
    add("--store", type=Path, required=True, metavar="DIR", help="sessions, videos and database")
    parser.add_argument_group(CONNECTIONS).add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help="bearer tokens, one a line, each with sessions of its own; MV2V_TOKENS if not given",
    )
    parser.add_argument_group(PLACES).add_argument(
        "--workers",
        choices=("local", "ray"),
        default="local",
        help="one process here, or replicas on Ray Serve, on all machines of a cluster",
    )
    add_settings(parser, Cluster, has_defaults=False)
    add_settings(parser, ServingConfig, without=flags(LoadConfig))
    add_settings(parser, Limits)
    # an upload's frames have a limit of their own
    add_engine(parser, without=("max_source_pixels",))
