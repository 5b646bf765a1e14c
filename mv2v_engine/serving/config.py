"""How a service runs: where it keeps its store, what it serves, and every limit it has."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mv2v_engine.arguments import fit_fields
from mv2v_engine.checkpoints.hub import hub_name
from mv2v_engine.config import EngineConfig
from mv2v_engine.errors import RequestError

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What an upload may be, and how many sessions and uploads at once one token may have.

    pixels: of one frame. total_pixels: of all frames of one video. seconds: of the video.
    uploads: that one token may have under way at once. probe_seconds: that decoding a video may
        take.
    """

    upload_bytes: int = 256 << 20
    frames: int = 20_000
    pixels: int = 3840 * 2160
    total_pixels: int = 10**10
    seconds: float = 600.0
    sessions: int = 10_000
    uploads: int = 8
    probe_seconds: float = 60.0

    def __post_init__(self) -> None:
        fit_fields(self)
        for name in (limit.name for limit in dataclasses.fields(self)):
            if not getattr(self, name) > 0:
                raise RequestError(f"limit {name} must be positive, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for the process that decodes uploads."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """One service.

    store: the folder of the database, the sessions and their files.
    checkpoint, components, rename, device, dtype, engine: as `Engine.from_pretrained` takes them;
        dtype is a name, such as "bfloat16".
    tokens: bearer tokens, each with sessions of its own; none leaves the service open.
    allow_anonymous: whether a service without tokens may listen beyond loopback.
    max_queue: turns that wait, of all tokens together; one more is refused.
    max_queue_per_token: of them those of one token; None is all of them where there is one token or
        none, else half.
    max_connections: that are open at once; no more than a quarter of the files that this process
        may have open.
    max_sessions_open: that the worker keeps in memory, the least recently used going first.
    keep_days, keep_bytes: sessions that were not touched for so long, or that exceed so many bytes
        together, are removed, the least recently touched first; None keeps them.
    min_free_bytes: of the store's disk, below which uploads are refused.
    grace: seconds that the turn under way has when the service is stopped.
    stall_seconds: without a word of a worker that has work, after which it is taken to hang and is
        ended; None waits for ever.
    max_attempts: how often a turn is begun that takes the process down each time.

    Raises:
        RequestError: a value is out of its range, or anybody could reach the service.
    """

    store: Path
    checkpoint: str = "tiny-nvs"
    components: Path | None = None
    rename: Path | None = None
    device: str | None = None
    dtype: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    host: str = "127.0.0.1"
    port: int = 8000
    tokens: tuple[str, ...] = field(default=(), repr=False)
    allow_anonymous: bool = False
    cors_origins: tuple[str, ...] = ()
    max_queue: int = 32
    max_queue_per_token: int | None = None
    max_connections: int = 512
    max_sessions_open: int = 8
    limits: Limits = field(default_factory=Limits)
    keep_days: float | None = None
    keep_bytes: int | None = None
    min_free_bytes: int = 1 << 30
    grace: float = 30.0
    stall_seconds: float | None = 1800.0
    max_attempts: int = 2

    def __post_init__(self) -> None:
        fit_fields(self)
        # answers tell no place on the server, and a relative one cannot be told from other words
        object.__setattr__(self, "store", self.store.absolute())
        if not 0 <= self.port < 65536:
            raise RequestError(f"port must lie in 0..65535, got {self.port}")
        counts = ("max_queue", "max_queue_per_token", "max_connections")
        for name in (*counts, "max_sessions_open", "max_attempts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} must be at least 1, got {value}")
        for name in ("keep_days", "keep_bytes", "min_free_bytes", "grace"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise RequestError(f"{name} must be at least 0, got {value}")
        if self.stall_seconds is not None and not self.stall_seconds > 0:
            raise RequestError(f"stall_seconds must be positive, got {self.stall_seconds}")
        if any(not token.strip() for token in self.tokens):
            raise RequestError("a bearer token is empty; leave it out or give it characters")
        if not (self.tokens or self.allow_anonymous or self.is_loopback):
            raise RequestError(
                f"host {self.host} is reachable by others and no tokens are configured, so anyone "
                "could use the service; give tokens, listen on 127.0.0.1, or say --no-auth"
            )

    def in_cluster(self) -> ServingConfig:
        """The same for processes that run elsewhere: relative paths mean nothing to them."""
        places = {name: getattr(self, name) for name in ("components", "rename")}
        absolute = {
            name: place if place is None or hub_name(place) is not None else place.absolute()
            for name, place in places.items()
        }
        checkpoint = Path(self.checkpoint)
        loras = [
            (Path(name).absolute() if Path(name).exists() else name, strength)
            for name, strength in self.engine.lora
        ]
        return dataclasses.replace(
            self,
            checkpoint=str(checkpoint.absolute()) if checkpoint.exists() else self.checkpoint,
            engine=dataclasses.replace(self.engine, lora=tuple(loras)),
            **absolute,
        )

    @property
    def queue_share(self) -> int:
        """Turns of one token that may wait."""
        if self.max_queue_per_token is not None:
            return self.max_queue_per_token
        return self.max_queue if len(self.tokens) < 2 else max(1, self.max_queue // 2)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in _LOOPBACK or self.host.startswith("127.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Replicas of the engine on Ray Serve.

    address: of a Ray cluster, "auto" for the one that this machine is in; None starts one on this
        machine that ends with the service.
    replicas: that the service starts; None takes the ones that `serve deploy` has started.
    cpus, gpus: that each takes; gpus None is one if the device is CUDA.

    Raises:
        RequestError: a value is out of its range.
    """

    address: str | None = None
    replicas: int | None = None
    cpus: float = 1.0
    gpus: float | None = None

    def __post_init__(self) -> None:
        fit_fields(self)
        if self.replicas is not None and self.replicas < 1:
            raise RequestError(f"replicas must be at least 1, got {self.replicas}")
        for name in ("cpus", "gpus"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise RequestError(f"{name} of a replica must be at least 0, got {value}")

    def num_gpus(self, device: str | None) -> float:
        """GPUs of a replica whose engine runs on a device."""
        if self.gpus is not None:
            return self.gpus
        return 1.0 if device is not None and device.startswith("cuda") else 0.0
