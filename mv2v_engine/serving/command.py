"""`run serve`: its options, read without loading what only the service needs."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from mv2v_engine.envs import serving_tokens
from mv2v_engine.errors import RequestError
from mv2v_engine.options import (
    add_model,
    add_picture,
    add_reuse,
    add_solver,
    add_view_memory,
    engine_config,
    read_resolution,
)
from mv2v_engine.parser import num_bytes
from mv2v_engine.serving.config import Cluster, Limits, ServingConfig
from mv2v_engine.serving.work.backend import Backend

_NEEDED = ("fastapi", "uvicorn", "pydantic", "prometheus_client", "python_multipart")
# options that mean nothing without replicas, and what Cluster calls them
_CLUSTER = {
    "replicas": "replicas",
    "ray_address": "address",
    "cpus_per_replica": "cpus",
    "gpus_per_replica": "gpus",
}


def serve(args: argparse.Namespace) -> int:
    """Serve a checkpoint over HTTP until a signal ends it."""
    _require(_NEEDED, "serve")
    config, cluster = serving_config(args), cluster_config(args)
    # whatever is wrong with the checkpoint is said before anything listens
    is_editor = bool(read_resolution(args).config.source_channels)
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
            config, backend, (LogListener(),), on_listening=_announce, on_ready=_announce_ready
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


def _announce(address: str) -> None:
    # flushed, for whoever started this waits for the line
    print(f"listening on {address}", flush=True)


def _announce_ready(address: str, model: str) -> None:
    print(f"ready: {model} on {address}", flush=True)


def serving_config(args: argparse.Namespace) -> ServingConfig:
    """What was asked for.

    Raises:
        RequestError: a value out of its range, or a service that anybody could reach.
    """
    return ServingConfig(
        store=args.store,
        checkpoint=args.checkpoint,
        components=args.components,
        rename=args.rename,
        device=args.device,
        dtype=args.dtype,
        engine=engine_config(args, fov_radius=args.fov_radius, batch_tokens=args.batch_tokens),
        host=args.host,
        port=args.port,
        tokens=() if args.no_auth else read_tokens(args.tokens),
        allow_anonymous=args.no_auth,
        cors_origins=tuple(args.cors_origin),
        max_queue=args.max_queue,
        max_queue_per_token=args.max_queue_per_token,
        max_connections=args.max_connections,
        max_sessions_open=args.max_sessions_open,
        limits=Limits(
            upload_bytes=args.max_upload,
            frames=args.max_frames,
            pixels=args.max_pixels,
            total_pixels=args.max_total_pixels,
            seconds=args.max_seconds,
            sessions=args.max_sessions,
            uploads=args.max_uploads,
        ),
        keep_days=args.keep_days,
        keep_bytes=args.keep_bytes,
        min_free_bytes=args.min_free,
        grace=args.grace,
        stall_seconds=args.stall_seconds or None,
    )


def cluster_config(args: argparse.Namespace) -> Cluster | None:
    """The replicas that were asked for; None for a worker on this machine.

    Raises:
        RequestError: Ray is not installed, or options do not go together.
    """
    given = {name: getattr(args, name) for name in _CLUSTER if getattr(args, name) is not None}
    options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
    if args.workers == "local":
        if given:
            raise RequestError(f"{options} is for replicas; add --workers ray, or leave it out")
        return None
    if not {"replicas", "ray_address"} & set(given):
        raise RequestError(
            "--workers ray needs --replicas, how many to start, or the --ray-address of a cluster "
            "where `serve deploy` has started them"
        )
    _require(("ray",), "distributed")
    return Cluster(**{_CLUSTER[name]: value for name, value in given.items()})


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
    _add_listening(parser)
    _add_replicas(parser)
    _add_limits(parser)
    add_view_memory(parser)
    add_solver(parser.add_argument_group("sampling"))
    add_reuse(parser)
    add_model(parser, "tiny-nvs")


def _add_listening(parser: argparse.ArgumentParser) -> None:
    defaults = ServingConfig
    add = parser.add_argument_group("who may connect").add_argument
    add(
        "--host",
        default=defaults.host,
        metavar="H",
        help="127.0.0.1, this machine alone, if not given",
    )
    add("--port", type=int, default=defaults.port, metavar="N", help="0 takes a free one")
    add(
        "--tokens",
        type=Path,
        metavar="FILE",
        help="bearer tokens, one a line, each with sessions of its own; MV2V_TOKENS if not given",
    )
    add("--no-auth", action="store_true", help="anybody who can connect may do anything")
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a site whose pages may use the service, such as https://example.org; "
        "none if not given",
    )


def _add_replicas(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("where turns are made").add_argument
    add(
        "--workers",
        choices=("local", "ray"),
        default="local",
        help="one process here, or replicas on Ray Serve, on all machines of a cluster",
    )
    add("--replicas", type=int, metavar="N", help="to start; those of `serve deploy` if not given")
    add(
        "--ray-address",
        metavar="ADDR",
        help="of a cluster, or auto; if not given one is started here and ends with the service",
    )
    add("--cpus-per-replica", type=float, metavar="N", help="also its threads; 1 if not given")
    add("--gpus-per-replica", type=float, metavar="N", help="1 with --device cuda if not given")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    defaults, limits = ServingConfig, Limits()
    group = parser.add_argument_group("limits")
    add_picture(group)
    add = group.add_argument
    add("--max-queue", type=int, default=defaults.max_queue, metavar="N", help="turns that wait")
    add(
        "--max-queue-per-token",
        type=int,
        metavar="N",
        help="of them one token's; if not given, half of --max-queue, rounded down and at least 1, "
        "where there are several tokens, else all",
    )
    add(
        "--max-connections",
        type=int,
        default=defaults.max_connections,
        metavar="N",
        help="open at once, a quarter of the open files at most",
    )
    add(
        "--max-sessions-open",
        type=int,
        default=defaults.max_sessions_open,
        metavar="N",
        help="in the engine's memory at once",
    )
    add(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="that the steps of several sessions' novel views share in one forward; if not given, "
        "32768 on cuda, and on a CPU one turn at a time",
    )
    add("--max-sessions", type=int, default=limits.sessions, metavar="N", help="of a token")
    add(
        "--max-uploads",
        type=int,
        default=limits.uploads,
        metavar="N",
        help="of a token, under way at once",
    )
    add(
        "--max-upload",
        type=num_bytes,
        default=limits.upload_bytes,
        metavar="N",
        help="bytes of a video",
    )
    add("--max-frames", type=int, default=limits.frames, metavar="N", help="of an upload")
    add("--max-pixels", type=int, default=limits.pixels, metavar="N", help="of its frames")
    add(
        "--max-total-pixels",
        type=int,
        default=limits.total_pixels,
        metavar="N",
        help="of all its frames together",
    )
    add("--max-seconds", type=float, default=limits.seconds, metavar="S", help="of its length")
    add(
        "--keep-days",
        type=float,
        metavar="D",
        help="sessions not touched for longer are removed; none if not given",
    )
    add(
        "--keep-bytes",
        type=num_bytes,
        metavar="N",
        help="the oldest go when all take more; none if not given",
    )
    add(
        "--min-free",
        type=num_bytes,
        default=defaults.min_free_bytes,
        metavar="N",
        help="of the disk, below which uploads are refused",
    )
    add(
        "--grace",
        type=float,
        default=defaults.grace,
        metavar="S",
        help="seconds that the turn under way has when the service is stopped",
    )
    add(
        "--stall-seconds",
        type=float,
        default=defaults.stall_seconds,
        metavar="S",
        help="without a step of the turn under way, after which its worker is ended; 0: never",
    )
