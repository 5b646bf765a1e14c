"""The engine: a checkpoint on a device, with the memory that its sessions share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mv2v_engine import arguments
from mv2v_engine.camera.files import Camera
from mv2v_engine.checkpoints.load import Checkpoint
from mv2v_engine.checkpoints.resolve import is_trained_for_memory
from mv2v_engine.config import (
    MAX_GUIDANCE_SCALE,
    EngineConfig,
    MemoryMode,
    MergeMode,
    Timesteps,
)
from mv2v_engine.engine.batch import TurnBatch, TurnEvent
from mv2v_engine.engine.budget import Budget
from mv2v_engine.engine.editing.descriptors import (
    SegmentDescriber,
    open_describer,
)
from mv2v_engine.engine.editing.session import EditSession
from mv2v_engine.engine.follower import follow
from mv2v_engine.engine.footage import RecentFrames
from mv2v_engine.engine.graphs import open_graphs
from mv2v_engine.engine.loading import (
    check_parts,
    check_same_weights,
    checked_arguments,
    configure,
    load_parts,
)
from mv2v_engine.engine.opening import open_edit_session, open_view_session
from mv2v_engine.engine.places import rank_device, transformer_dtype
from mv2v_engine.engine.request import TurnRequest, check_text
from mv2v_engine.engine.session import Session
from mv2v_engine.engine.source import AnySource, Source
from mv2v_engine.engine.team import Team, open_team
from mv2v_engine.engine.turn import ViewTurn
from mv2v_engine.engine.view_session import ViewSession
from mv2v_engine.engine.warmup import warm_up
from mv2v_engine.errors import RequestError
from mv2v_engine.memory.cache import MemoryCache
from mv2v_engine.memory.entry import LatentKind
from mv2v_engine.progress import CancelToken
from mv2v_engine.text import TextEncoder
from mv2v_engine.tokens.plan import TokenPlan
from mv2v_engine.vae import VideoVAE


class Engine:
    """Loads once, serves many sessions. Make one with `from_pretrained`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        vae: VideoVAE,
        text: TextEncoder | None,
        *,
        device: torch.device,
        config: EngineConfig,
        team: Team | None = None,
    ) -> None:
        self.checkpoint, self.vae, self.text = checkpoint, vae, text
        self.device, self.config = device, config
        self.sampling = checkpoint.sampling.at(config.size, checkpoint.name)
        self.scheduler = config.scheduler or self.sampling.scheduler
        self.timesteps: Timesteps = config.timesteps or self.sampling.timesteps
        self.transformer, self.team = checkpoint.transformer, team
        self.backend, self.attention = configure(self.transformer, config, device)
        self.memory = config.memory or default_memory(checkpoint.report.initialised)
        has_mergers = self.transformer.config.merger is not None
        self.merge: MergeMode = config.merge or ("conv" if has_mergers else "off")
        check_parts(self)
        self.graphs = open_graphs(config if team is None else replace(config, graphs="off"), device)
        self.cache = MemoryCache(
            config.cache_bytes,
            device,
            device_bytes=config.device_cache_bytes,
            page_bytes=self.video_bytes,
        )
        self.budget = Budget(self)
        self.recent_frames = RecentFrames(config.frames_bytes)

    def __repr__(self) -> str:
        dtype, config = str(self.dtype).removeprefix("torch."), self.transformer.config
        task = "edits" if config.source_channels else "novel views"
        return f"Engine({self.checkpoint.name!r}, {task}, {dtype} on {self.device})"

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: Path | str = "tiny-nvs",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        config: EngineConfig | None = None,
        components: Path | str | None = None,
        rename: Path | str | None = None,
    ) -> Engine:
        """Load a checkpoint of any known format.

        Args:
            path_or_name: an embedded name, or a file or folder.
            device: None takes CUDA if there is one.
            dtype: of the transformer; None is bfloat16 on CUDA, float32 elsewhere.
            components: a folder with VAE, text encoder and tokenizer, of diffusers' layout, Wan's
                or ComfyUI's, for a checkpoint that is a transformer alone (ReCamMaster, Memory-V2V,
                original Wan files).
            rename: a JSON file of names that cannot be inferred (see `run inspect`).

        Raises:
            CheckpointError: what is missing or wrong, and what to do.
            RequestError: no such device, or not the processes that `config.parallel` asks for.
            ParallelError: the other processes did not come, or one of them failed.
            KernelUnavailableError: the configured backend cannot run here.
        """
        config, folder = checked_arguments(
            path_or_name, config=config, components=components, rename=rename
        )
        place = rank_device(device, config.parallel)
        team = open_team(config.parallel, place)
        checkpoint, vae, text = load_parts(
            path_or_name,
            place,
            transformer_dtype(dtype, place),
            config,
            components=folder,
            rename=rename,
        )
        engine = cls(checkpoint, vae, text, device=place, config=config, team=team)
        engine.budget.place_text()
        return engine

    @staticmethod
    def follow(
        path_or_name: Path | str = "tiny-nvs",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        config: EngineConfig,
        rename: Path | str | None = None,
    ) -> None:
        """In every process but rank 0, in place of `from_pretrained` and with its arguments.

        Runs its part of every step of rank 0's turns, until that one closes its engine or ends.

        Raises:
            ParallelError: another process failed, or rank 0 is gone.
            CheckpointError, RequestError, KernelUnavailableError: as `from_pretrained`.
        """
        follow(path_or_name, device=device, dtype=dtype, config=config, rename=rename)

    def close(self) -> None:
        """Let the other processes go, if there are any: no turn runs after that."""
        if self.team is not None:
            self.team.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def reconfigured(self, config: EngineConfig) -> Engine:
        """The same weights under another configuration, with a memory of its own.

        Raises:
            RequestError: a setting differs that belongs to the weights.
        """
        check_same_weights(self.config, config)
        return Engine(
            self.checkpoint,
            self.vae,
            self.text,
            device=self.device,
            config=config,
            team=self.team,
        )

    def warmup(
        self, plans: Iterable[TokenPlan], *, guidance_scale: float | None = None
    ) -> list[dict[str, Any]]:
        """Run a step or two of each plan, so that no request pays for what comes but once.

        Kernels are compiled and tuned, tables built, steps captured where graphs serve.

        Args:
            plans: as `ViewSession.plan_turn`, `EditSession.plans`, `tokens.plan.novel_view_plan`
                or `tokens.editing.editing_plan` give them.
            guidance_scale: of the turns to come; None takes the checkpoint's default.

        Returns:
            A row a plan, the largest first: its tokens, the seconds it took, how its steps ran.

        Raises:
            RequestError: a plan is of another transformer, or the scale out of its range.
            KernelUnavailableError: graphs="on", and a plan cannot have any.
        """
        scale = self.sampling.guidance_scale if guidance_scale is None else guidance_scale
        arguments.number("guidance_scale", scale, 0, MAX_GUIDANCE_SCALE)
        return warm_up(self, plans, scale)

    def session(
        self,
        source: AnySource | Source,
        *,
        id: str | None = None,
        fps: float | None = None,
        cameras: Camera | None = None,
        store: Path | str | None = None,
        window: str | int | None = None,
        resume: bool = False,
        source_latents: Tensor | None = None,
        cuts: Sequence[int] | None = None,
    ) -> Session:
        """Open a session of the kind that the model serves: see `view_session`, `edit_session`.

        Raises:
            RequestError: an argument of the other kind; else as those two.
        """
        views: dict[str, Any] = {
            "cameras": cameras,
            "window": window,
            "source_latents": source_latents,
        }
        edits: dict[str, Any] = {"cuts": cuts}
        is_editor = bool(self.transformer.config.source_channels)
        if other := [k for k, v in (views if is_editor else edits).items() if v is not None]:
            kind = "edits by instruction" if is_editor else "renders novel views"
            raise RequestError(f"{self.checkpoint.name} {kind}, leave out {' and '.join(other)}")
        common: dict[str, Any] = {"id": id, "fps": fps, "store": store, "resume": resume}
        if not is_editor:
            return self.view_session(source, **common, **views)
        if isinstance(source, Source):
            raise RequestError(
                f"{self.checkpoint.name} edits long videos, got one window that is already read; "
                "give the file or its frames"
            )
        return self.edit_session(source, **common, **edits)

    def edit_session(
        self,
        source: AnySource,
        *,
        id: str | None = None,
        fps: float | None = None,
        cuts: Sequence[int] | None = None,
        store: Path | str | None = None,
        resume: bool = False,
        cancel: CancelToken | None = None,
    ) -> EditSession:
        """Open a session that edits a video of any length by instruction.

        Args:
            source: a video file, which is streamed, or frames uint8 [T, height, width, 3], a
                tensor or an array.
            fps: of the edits; None keeps the source's, of bare frames the checkpoint's.
            cuts: first frames of the video's shots but the first; () says that it is one shot,
                None looks for cuts in one pass over the video. No window straddles a cut: with a
                cut at every frame, every frame is a window.
            store: a folder that keeps the session; `resume` takes up what it holds.
            cancel: ends the look for cuts, which takes as long as the video is.

        Raises:
            VideoError, StorageError: what does not fit.
            CancelledError: `cancel` was cancelled before the cuts were found.
            RequestError: so too, or the model renders novel views.
        """
        return open_edit_session(
            self, source, id=id, fps=fps, cuts=cuts, store=store, resume=resume, cancel=cancel
        )

    def view_session(
        self,
        source: AnySource | Source,
        *,
        id: str | None = None,
        fps: float | None = None,
        cameras: Camera | None = None,
        store: Path | str | None = None,
        window: str | int | None = None,
        resume: bool = False,
        source_latents: Tensor | None = None,
        cancel: CancelToken | None = None,
    ) -> ViewSession:
        """Open a session that renders a source video from other cameras.

        Args:
            source: a video file, frames uint8 [T, height, width, 3], or what `load_source` gave.
            fps: of the turns; None keeps the source's, of bare frames the checkpoint's.
            cameras: the source's own path, as `ViewSession.render` takes one; unknown means static.
            store: a folder that keeps the session; `resume` takes up what it holds.
            window: which frames of a clip of another length than the model's (first, middle,
                last, even, pad, or a start); None insists on the model's length.
            source_latents: the source as this engine's VAE encodes it [C, F, H, W], where
                several sessions share it; None encodes it on first use.
            cancel: ends the reading of the file.

        Raises:
            VideoError, CameraError, StorageError: what does not fit.
            RequestError: so too, or the model edits by instruction.
        """
        return open_view_session(
            self,
            source,
            id=id,
            fps=fps,
            cameras=cameras,
            store=store,
            window=window,
            resume=resume,
            source_latents=source_latents,
            cancel=cancel,
        )

    def answer_all(
        self,
        turns: Sequence[tuple[ViewSession, TurnRequest]],
        *,
        token_budget: int | None = None,
        cancels: Sequence[CancelToken | None] | None = None,
        on_progress: Callable[[TurnEvent], None] | None = None,
    ) -> list[ViewTurn | Exception]:
        """Answer requests of several sessions together; see `TurnBatch.answer_all`."""
        batch = TurnBatch(self, token_budget)
        return batch.answer_all(turns, cancels=cancels, on_progress=on_progress)

    def check_text(self, prompt: str, guidance_scale: float) -> None:
        """Refuse a prompt that nothing here could read, and guidance towards nothing."""
        arguments.text("prompt", prompt)
        arguments.number("guidance_scale", guidance_scale)
        check_text(self.checkpoint.name, prompt, guidance_scale, has_text=self.text is not None)

    @functools.cached_property
    def latent_kind(self) -> LatentKind:
        """The latents of this engine's turns: other ones in the cache are not candidates."""
        shape = self.vae.latent_shape(self.sampling.num_frames, self.sampling.size)
        return LatentKind(self.vae.key, shape, torch.float32)

    @functools.cached_property
    def describer(self) -> SegmentDescriber:
        """What compares the segments of a long edit."""
        return open_describer(self.config, self.device)

    @property
    def video_bytes(self) -> int:
        """Bytes of one turn's latents."""
        shape = self.vae.latent_shape(self.sampling.num_frames, self.sampling.size)
        return math.prod(shape) * torch.float32.itemsize

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer's tokens."""
        return self.transformer.patch_embedding.weight.dtype

    def text_embedding(self, prompt: str) -> Tensor:
        """[1, S, text_dim]; zeros for a checkpoint without text."""
        return self.text_embeddings([prompt])[0]

    def text_embeddings(self, prompts: Sequence[str]) -> list[Tensor]:
        """`text_embedding` of several, for which an offloaded encoder travels once."""
        shape = self.transformer.config
        if self.text is None:
            size = (1, shape.text_len, shape.text_dim)
            nothing = torch.zeros(size, dtype=torch.float32, device=self.device)
            return [nothing] * len(prompts)
        return self.text.encode_all(prompts)

    def describe(self) -> dict[str, Any]:
        """What a report says of the engine."""
        return {
            "checkpoint": self.checkpoint.name,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "backend": self.backend,
            "attention": self.attention,
            "scheduler": self.scheduler,
            "timesteps": self.timesteps,
            "torch": torch.__version__,
            # whose steps a turn is made of
            **({"diffusers": version("diffusers")} if self.scheduler == "unipc" else {}),
        }


def default_memory(initialised: Iterable[str]) -> MemoryMode:
    """What a turn remembers unless it is told: nothing, on weights that never learned to."""
    return "retrieved" if is_trained_for_memory(initialised) else "none"
