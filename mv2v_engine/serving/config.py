"""How a service runs: where it keeps its store, what it serves, and every limit it has."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mv2v_engine.arguments import fit_fields
from mv2v_engine.checkpoints.hub import hub_name
from mv2v_engine.config import MODEL, EngineConfig, LoadConfig
from mv2v_engine.errors import RequestError
from mv2v_engine.settings import PROGRAMS, setting

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
# titles of the options
CONNECTIONS = "who may connect"
PLACES = "where turns are made"
LIMITS = "limits"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What an upload may be, and how many sessions and uploads at once one token may have."""

    upload_bytes: int = setting(256 << 20, LIMITS, "bytes of a video", flag="--max-upload", above=0)
    frames: int = setting(20_000, LIMITS, "frames of an upload", flag="--max-frames", above=0)
    pixels: int = setting(
        3840 * 2160, LIMITS, "pixels of a frame of an upload", flag="--max-pixels", above=0
    )
    total_pixels: int = setting(
        10**10,
        LIMITS,
        "pixels of all frames of an upload together",
        flag="--max-total-pixels",
        above=0,
    )
    seconds: float = setting(
        600.0, LIMITS, "length of an upload, seconds", flag="--max-seconds", metavar="S", above=0
    )
    sessions: int = setting(10_000, LIMITS, "sessions of a token", flag="--max-sessions", above=0)
    uploads: int = setting(
        8, LIMITS, "uploads of a token under way at once", flag="--max-uploads", above=0
    )
    stream_seconds: float = setting(
        3600.0,
        LIMITS,
        "seconds of video in all streams of a token that are kept",
        flag="--max-stream-seconds",
        metavar="S",
        above=0,
    )
    probe_seconds: float = setting(
        60.0, PROGRAMS, "seconds that decoding a video may take", above=0
    )

    def __post_init__(self) -> None:
        fit_fields(self)

    def to_dict(self) -> dict[str, Any]:
        """The limits as plain data, for the process that decodes uploads."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class ServingConfig(LoadConfig):
    """One service.

    store: the folder of the database, the sessions and their files.
    tokens: bearer tokens, each with sessions of its own; none leaves the service open.
    webhook_secret: by which callbacks are signed, whsec_ and base64.
    allow_anonymous: whether a service without tokens may listen beyond loopback.

    Raises:
        RequestError: a value is out of its range, or anybody could reach the service.
    """

    store: Path
    engine: EngineConfig = field(default_factory=EngineConfig)
    host: str = setting(
        "127.0.0.1", CONNECTIONS, "127.0.0.1, this machine alone, if not given", metavar="H"
    )
    port: int = setting(8000, CONNECTIONS, "0 takes a free one", low=0, high=65535)
    tokens: tuple[str, ...] = field(default=(), repr=False)
    allow_anonymous: bool = setting(
        False, CONNECTIONS, "anybody who can connect may do anything", flag="--no-auth"
    )
    cors_origins: tuple[str, ...] = setting(
        (),
        CONNECTIONS,
        "a site whose pages may use the service, such as https://example.org; none if not given",
        flag="--cors-origin",
        metavar="ORIGIN",
    )
    webhook_hosts: tuple[str, ...] = setting(
        (),
        CONNECTIONS,
        "a host that may be told of the ends of turns, as example.org, example.org:8443 or "
        "10.1.2.3, or a network of such, 10.0.0.0/8; none if not given",
        flag="--webhook-host",
        metavar="HOST",
    )
    webhook_secret: str | None = field(default=None, repr=False)
    source_hosts: tuple[str, ...] = setting(
        (),
        CONNECTIONS,
        "a host that videos may be fetched from, in the same forms; none if not given",
        flag="--source-host",
        metavar="HOST",
    )
    max_queue: int = setting(32, LIMITS, "turns that wait, of all tokens together", low=1)
    max_queue_per_token: int | None = setting(
        None,
        LIMITS,
        "one token's turns in the queue; if not given, half of --max-queue, rounded down and at "
        "least 1, where there are several tokens, else all",
        low=1,
    )
    max_streams: int = setting(4, LIMITS, "streams made at once, of all tokens together", low=1)
    max_streams_per_token: int | None = setting(
        None,
        LIMITS,
        "one token's streams; if not given, half of --max-streams, rounded down and at least 1, "
        "where there are several tokens, else all",
        low=1,
    )
    stream_ahead: float = setting(
        30.0,
        LIMITS,
        "seconds of video that a stream without an end is made ahead of its readers",
        metavar="S",
        above=0,
    )
    stream_unread: float = setting(
        600.0,
        LIMITS,
        "seconds that a stream waits for a reader, or for frames to edit, before it ends",
        metavar="S",
        above=0,
    )
    max_connections: int = setting(
        512, LIMITS, "open at once, a quarter of the open files at most", low=1
    )
    max_sessions_open: int = setting(
        8, LIMITS, "sessions in the engine's memory; the least recently used goes first", low=1
    )
    limits: Limits = field(default_factory=Limits)
    causal: bool = setting(
        False,
        MODEL,
        "the checkpoint makes frames block by block, as no weight of Self-Forcing, LongLive or "
        "CausVid tells",
    )
    keep_days: float | None = setting(
        None,
        LIMITS,
        "sessions not touched for longer are removed; none if not given",
        metavar="D",
        low=0,
    )
    keep_bytes: int | None = setting(
        None,
        LIMITS,
        "the least recently touched sessions go when all take more; none if not given",
        low=0,
    )
    min_free_bytes: int = setting(
        1 << 30,
        LIMITS,
        "free bytes of the disk, below which uploads are refused",
        flag="--min-free",
        low=0,
    )
    grace: float = setting(
        30.0,
        LIMITS,
        "seconds that the turn under way has when the service is stopped",
        metavar="S",
        low=0,
    )
    stall_seconds: float | None = setting(
        1800.0,
        LIMITS,
        "without a step of the turn under way, after which its worker is ended; 0: never",
        metavar="S",
        above=0,
    )
    max_attempts: int = setting(
        2, PROGRAMS, "how often a turn is begun that takes the process down each time", low=1
    )

    def __post_init__(self) -> None:
        fit_fields(self)
        # answers tell no place on the server, and a relative one cannot be told from other words
        object.__setattr__(self, "store", self.store.absolute())
        if any(not token.strip() for token in self.tokens):
            raise RequestError("a bearer token is empty; leave it out or give it characters")
        if not (self.tokens or self.allow_anonymous or self.is_loopback):
            raise RequestError(
                f"host {self.host} is reachable by others and no tokens are configured, so anyone "
                "could use the service; give tokens, host=127.0.0.1, or allow_anonymous=True"
            )

    def in_cluster(self) -> ServingConfig:
        """The same for processes that run elsewhere: relative paths mean nothing to them."""
        places = {name: getattr(self, name) for name in ("components", "rename")}
        absolute = {
            name: place if place is None or hub_name(place) is not None else place.absolute()
            for name, place in places.items()
        }
        own = {name: getattr(self.engine, name) for name in ("descriptor", "decoder")}
        own = {name: place and Path(place).absolute() for name, place in own.items()}
        base = self.engine.base
        if base is not None and Path(base).exists():
            base = Path(base).absolute()
        checkpoint = Path(self.checkpoint)
        loras = [
            (Path(name).absolute() if Path(name).exists() else name, strength)
            for name, strength in self.engine.lora
        ]
        return dataclasses.replace(
            self,
            checkpoint=str(checkpoint.absolute()) if checkpoint.exists() else self.checkpoint,
            engine=dataclasses.replace(self.engine, lora=tuple(loras), base=base, **own),
            **absolute,
        )

    @property
    def queue_share(self) -> int:
        """Turns of one token that may wait."""
        return self._share(self.max_queue, self.max_queue_per_token)

    @property
    def stream_share(self) -> int:
        """Streams of one token that may be made at once."""
        return self._share(self.max_streams, self.max_streams_per_token)

    def _share(self, most: int, own: int | None) -> int:
        if own is not None:
            return own
        return most if len(self.tokens) < 2 else max(1, most // 2)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in _LOOPBACK or self.host.startswith("127.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Replicas of the engine on Ray Serve."""

    replicas: int | None = setting(
        None,
        PLACES,
        "replicas that the service starts; those of `serve deploy` if not given",
        low=1,
    )
    address: str | None = setting(
        None,
        PLACES,
        "a Ray cluster's address, auto for this machine's; if not given one is started here and "
        "ends with the service",
        flag="--ray-address",
        metavar="ADDR",
    )
    cpus: float = setting(
        1.0,
        PLACES,
        "what a replica takes, also its threads; 1 if not given",
        flag="--cpus-per-replica",
        metavar="N",
        low=0,
    )
    gpus: float | None = setting(
        None,
        PLACES,
        "1 with --device cuda if not given",
        flag="--gpus-per-replica",
        metavar="N",
        low=0,
    )

    def __post_init__(self) -> None:
        fit_fields(self)

    def num_gpus(self, device: str | None) -> float:
        """GPUs of a replica whose engine runs on a device."""
        if self.gpus is not None:
            return self.gpus
        return 1.0 if device is not None and device.startswith("cuda") else 0.0
