"""The engine: a checkpoint on a device, with the memory that its sessions share."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mv2v_engine import arguments
from mv2v_engine.camera.files import Camera, resolve_camera
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.checkpoints.load import load_checkpoint
from mv2v_engine.config import MAX_GUIDANCE_SCALE, Alpha, EngineConfig, Fit, StreamConfig
from mv2v_engine.engine.batch import TurnBatch, TurnEvent
from mv2v_engine.engine.budget import Budget
from mv2v_engine.engine.folder import SessionFolder, kept_for_one
from mv2v_engine.engine.guides import AnyImage, Guides, guides_of, open_guides, require_guides
from mv2v_engine.engine.parts import (
    Parts,
    check_same_weights,
    checked_arguments,
    configure,
    load_parts,
)
from mv2v_engine.engine.request import Request
from mv2v_engine.engine.session import Session
from mv2v_engine.engine.source import (
    AnySource,
    AnyStreamSource,
    LongSource,
    Source,
    load_source,
    open_long_source,
    open_stream_source,
    source_warnings,
    view_identity,
)
from mv2v_engine.engine.stream import (
    Stream,
    check_policy,
    check_source,
    check_streams,
    checked_prompt,
    identity_of,
)
from mv2v_engine.engine.stream_folder import StreamFolder
from mv2v_engine.engine.team import open_team, serve
from mv2v_engine.engine.turn import Turn
from mv2v_engine.engine.warmup import warm_up
from mv2v_engine.errors import RequestError, StorageError
from mv2v_engine.finite import require_finite
from mv2v_engine.parallel.device import dtype_of_tokens, rank_device, transformer_dtype
from mv2v_engine.parallel.ranks import Ranks, check_launch
from mv2v_engine.progress import CancelToken, cancel_token
from mv2v_engine.tokens.plan import TokenPlan
from mv2v_engine.video.shots import find_cuts


class Engine(Parts):
    """Loads once, serves many sessions. Make one with `from_pretrained`."""

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
        causal: bool = False,
    ) -> Engine:
        """Load a checkpoint of any known format.

        Args:
            path_or_name: an embedded name, a file or folder, or a hub's `owner/name`,
                `owner/name@revision` or `owner/name:path`, of which what is needed is fetched.
            device: None takes CUDA if there is one.
            dtype: the transformer's; None is bfloat16 on CUDA, float32 elsewhere. On a CPU
                bfloat16 is that of the blocks' weights and their products, all else is float32.
            components: a folder with VAE, text encoder and tokenizer, of diffusers' layout, Wan's
                or ComfyUI's, for a checkpoint that is a transformer alone (ReCamMaster, Memory-V2V,
                original Wan files); or the name of such a repository.
            rename: a JSON file of names that cannot be inferred (see `run inspect`).
            causal: it was trained to make frames block by block (Self-Forcing, LongLive, CausVid),
                which no tensor tells, and can `stream`; a folder of this project's says it itself.

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
        checkpoint, vae, text, image = load_parts(
            path_or_name,
            place,
            transformer_dtype(dtype, place),
            config,
            components=folder,
            rename=rename,
            causal=arguments.flag("causal", causal),
        )
        engine = cls(checkpoint, vae, text, image, device=place, config=config, team=team)
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
        """Run a process that is not rank 0: in place of `from_pretrained`, with its arguments.

        Runs its part of every step of rank 0's turns, until that one closes its engine or ends.

        Raises:
            ParallelError: another process failed, or rank 0 is gone.
            CheckpointError, RequestError, KernelUnavailableError: as `from_pretrained`.
        """
        checked_arguments(path_or_name, config=config, components=None, rename=rename)
        if check_launch(config.parallel) == 0:
            raise RequestError(
                "this is rank 0, which has the engine: make it with Engine.from_pretrained; the "
                "other processes call Engine.follow"
            )
        place = rank_device(device, config.parallel)
        ranks = Ranks(config.parallel, place)
        try:
            with ranks.together():
                products = transformer_dtype(dtype, place)
                # a rank that runs parts of steps needs no VAE and no text encoder
                checkpoint = load_checkpoint(
                    path_or_name,
                    device=place,
                    dtype=dtype_of_tokens(products, place),
                    products=products,
                    rename=rename,
                    lora=config.lora,
                    quantize=config.quantize,
                    offload=config.offload,
                    check_weights=config.check_weights,
                    with_components=False,
                    base=config.base,
                )
                configure(checkpoint.transformer, config, place)
            serve(ranks, checkpoint.transformer)
        finally:
            ranks.close()

    @property
    def budget(self) -> Budget:
        """The bytes that turns take of the device, and may take."""
        return Budget(self)

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
            self.image,
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
            plans: as `Session.plan_turn`, `Session.plans`, or `tokens.plan` give them.
            guidance_scale: that of the turns to come; None takes the checkpoint's default.

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
        alpha: Alpha | None = None,
        fit: Fit | None = None,
        size: tuple[int, int] | None = None,
        cameras: Camera | None = None,
        store: Path | str | None = None,
        window: str | int | None = None,
        resume: bool = False,
        source_latents: Tensor | None = None,
        cuts: Sequence[int] | None = None,
        references: Sequence[AnyImage] = (),
        mask: AnySource | None = None,
        cancel: CancelToken | None = None,
        is_locked: bool = False,
        reads_any: bool = False,
    ) -> Session:
        """Open a session of the kind that the model serves.

        Args:
            source: of novel views, a clip that can be cut to the model's length, or what
                `load_source` gave; of edits, a video of any length. A file, which an edit streams,
                or frames uint8 [T, height, width, 3], a tensor or an array.
            fps: the rate of the turns; None keeps the source's, of bare frames the checkpoint's.
            alpha, fit, size: as the config's source_alpha, source_fit and size; None is what that
                says.
            store: a folder that keeps the session; `resume` takes up what it holds.
            cancel: ends the reading of the file, and the look for cuts.
            is_locked: the caller keeps other writers out of the folder.
            reads_any: resume turns of other settings, too, to read them; new ones are refused.
            cameras: of novel views, the source's own path, as `Session.render` takes one; unknown
                means static.
            window: of novel views, which frames of a clip of another length than the model's
                (first, middle, last, even, pad, or a start); None insists on the model's length.
            source_latents: of novel views, the source as this engine's VAE encodes it
                [C, F, H, W], where several sessions share it; None encodes it on first use.
            cuts: of edits, first frames of the video's shots but the first; () says that it is
                one shot, None looks for cuts in one pass over the video. No window straddles a
                cut: with a cut at every frame, every frame is a window.
            references: of edits by VACE or Bernini-R, images that the instruction refers to, in
                order: files, Pillow's images, or uint8 [height, width, 3].
            mask: of edits by VACE, a video of the source's size and length, or an image of its
                size: what is bright is made anew, what is dark stays.

        Raises:
            VideoError, CameraError, StorageError: what does not fit; turns of other settings.
            RequestError: so too, or an argument of the other task.
            CancelledError: `cancel` was cancelled before the session was open.
        """
        views = {"cameras": cameras, "window": window, "source_latents": source_latents}
        of_edits = {"cuts": cuts, "references": references or None, "mask": mask}
        others = views if self.is_editor else of_edits
        if wrong := [name for name, value in others.items() if value is not None]:
            kind = "edits by instruction" if self.is_editor else "renders novel views"
            raise RequestError(f"{self.checkpoint.name} {kind}, leave out {' and '.join(wrong)}")
        if id is not None:
            arguments.text("id", id)
        arguments.flag("resume", resume)
        folder = None
        if store is not None:
            folder = SessionFolder(arguments.path("store", store, "the path of a folder"))
        sized, check = self.at(size), cancel_token(cancel).check
        camera = None
        if cameras is not None:
            sampling = sized.sampling
            camera = resolve_camera(cameras, sampling.num_frames, sampling.size, is_source=True)
        if source_latents is not None:
            sized._check_latents(source_latents)
        if cuts is not None:
            given = arguments.sequence("cuts", cuts, object, "a sequence of frame numbers, or None")
            cuts = [arguments.integer(f"cuts[{place}]", cut) for place, cut in enumerate(given)]
        shape, name = self.checkpoint.config, self.checkpoint.name
        has_guides = {"references": bool(references), "mask": mask is not None}
        require_guides(guides_of(shape), name, **has_guides)
        if references and self.team is not None and self.sampling.reference_scales:
            raise RequestError(
                f"{name} guides by references with forwards of several lengths, which are not "
                "shared between processes: use one process, or leave the references out"
            )
        opened, guides = sized._opened(source, window, fps, alpha, fit, check), Guides()
        if isinstance(opened, LongSource):
            guides = open_guides(
                shape,
                opened,
                references=references,
                mask=mask,
                stride=self.vae.spatial_stride,
                max_pixels=self.config.max_source_pixels,
                alpha=alpha or self.config.source_alpha,
                check=check,
            )
        if camera is not None and isinstance(opened, Source):
            opened = opened.noting(f"its camera: {words}" for words in camera.notes)
        with kept_for_one(folder, resume=resume, is_locked=is_locked) as lock:
            manifest, identity = None, dict[str, Any]()
            if folder is not None:
                identity = self._identity(opened, camera)
                if self.is_editor:
                    identity |= guides.identity()
            if folder is not None and resume:
                manifest = folder.read()
                folder.check_identity(manifest, identity)
                # found once, they are what the finished windows follow
                cuts = manifest["identity"].get("cuts") if cuts is None else cuts
            if isinstance(opened, LongSource):
                if cuts is None:
                    cuts = find_cuts(opened.frames(check=check), opened.fps)
                identity["cuts"] = cuts = list(cuts)
            session = Session(
                sized,
                opened,
                id=id or (manifest["id"] if manifest else new_id()),
                camera=camera,
                cuts=cuts or (),
                folder=folder,
                lock=lock,
                source_latents=source_latents,
                guides=guides,
            )
            if folder is not None and manifest is None:
                folder.create(session.id, identity)
            elif folder is not None and manifest is not None:
                folder.check_identity(manifest, identity)
                if folder.is_writable:
                    folder.remove_unfinished()
                session.restore()
                problem = None if reads_any else session.other_settings()
                if problem is not None:
                    raise StorageError(f"{folder.folder} cannot be resumed: {problem}")
        return session

    def stream(
        self,
        prompt: str = "",
        *,
        seed: int = 0,
        config: StreamConfig | None = None,
        id: str | None = None,
        store: Path | str | None = None,
        resume: bool = False,
        is_locked: bool = False,
        source: AnyStreamSource | None = None,
        fps: float | None = None,
    ) -> Stream:
        """Open a stream: video without end from a causal model.

        Args:
            prompt: of the blocks to come; `Stream.prompt` changes it on the way.
            source: what a model with the source on its channels edits: a video as `session` takes
                one, `LiveFrames`, an iterable of frames uint8 [height, width, 3], or a function
                that gives one from a frame's number on. An iterable, which gives each frame once,
                goes on behind the last block that a resumed stream has all frames of; a function
                is told where that is.
            fps: of the source; None keeps its own, of bare frames the checkpoint's.
            config: None takes the checkpoint's.
            store: a folder that keeps the stream; `resume` takes up what it holds.
            is_locked: the caller keeps other writers out of the folder.

        Raises:
            RequestError: the model is not causal, or cannot serve what is asked.
            VideoError: the source cannot be used.
            MemoryBudgetError: its bytes are more than there are.
            StorageError: the folder holds another stream, or none.
        """
        own = check_streams(self)
        if config is not None:
            own = arguments.instance("config", config, StreamConfig, "a StreamConfig, or None")
        arguments.integer("seed", seed, 0, 2**63 - 1)
        checked_prompt(self, prompt)
        if id is not None:
            arguments.text("id", id)
        arguments.flag("resume", resume)
        folder = None
        if store is not None:
            folder = StreamFolder(arguments.path("store", store, "the path of a folder"))
        check_source(self.checkpoint.config, self.checkpoint.name, source is not None)
        check_policy(self.checkpoint.config, self.checkpoint.name, own)
        self.budget.check_stream(own)
        edited = None
        if source is not None:
            edited = open_stream_source(
                source,
                size=self.sampling.size,
                fps=fps,
                own_fps=self.sampling.fps,
                fit=self.config.source_fit,
                max_pixels=self.config.max_source_pixels,
                alpha=self.config.source_alpha,
            )
        identity = identity_of(self, own, seed, edited)
        with kept_for_one(folder, resume=resume, is_locked=is_locked) as lock:
            manifest = None
            if folder is not None and resume:
                manifest = folder.read()
                folder.check_identity(manifest, identity)
            id = id or (manifest["id"] if manifest else new_id())
            stream = Stream(
                self, prompt, own, seed=seed, id=id, folder=folder, lock=lock, source=edited
            )
            if folder is not None and manifest is None:
                folder.create(id, identity)
            elif folder is not None:
                if folder.is_writable:
                    folder.remove_unfinished()
                stream.restore()
        return stream

    def _opened(
        self,
        source: AnySource | Source,
        window: str | int | None,
        fps: float | None,
        alpha: Alpha | None,
        fit: Fit | None,
        check: Callable[[], None],
    ) -> Source | LongSource:
        """The source at the model's size."""
        sampling, config = self.sampling, self.config
        common: dict[str, Any] = {
            "size": sampling.size,
            "fps": fps,
            "own_fps": sampling.fps,
            "max_pixels": config.max_source_pixels,
            "alpha": alpha or config.source_alpha,
            "fit": fit or config.source_fit,
            "check": check,
        }
        if not self.is_editor:
            if not isinstance(source, Source):
                source = load_source(
                    source, num_frames=sampling.num_frames, window=window, **common
                )
            warnings = source_warnings(self.checkpoint, self.vae, source.frames[0])
            return replace(source, warnings=warnings)
        name = self.checkpoint.name
        if isinstance(source, Source):
            raise RequestError(
                f"{name} edits long videos, got one window that is already read; give the file or "
                "its frames"
            )
        if self.text is None:
            raise RequestError(
                f"{name} has no text encoder, and an edit needs its instruction read; give the "
                "folder that has text_encoder and tokenizer"
            )
        if config.memory_ranking != "fov":
            raise RequestError(
                f"memory_ranking={config.memory_ranking!r} draws novel views; an edit's windows "
                "are ranked by their sources: leave it out"
            )
        video = open_long_source(source, **common)
        video.warnings = source_warnings(self.checkpoint, self.vae, video.read([0])[0])
        return video

    def _identity(
        self, source: Source | LongSource, camera: CameraTrajectory | None
    ) -> dict[str, Any]:
        """What a resumed session must agree with, but for its cuts."""
        name = self.checkpoint.name
        if isinstance(source, Source):
            return {**view_identity(source, name, camera), "vae": self.vae.key}
        return {
            "source": source.fingerprint,
            "checkpoint": name,
            "vae": self.vae.key,
            "descriptor": self.describer.key,
        }

    def _check_latents(self, source_latents: Tensor) -> None:
        """Refuse a source's latents that are not this engine's."""
        arguments.instance("source_latents", source_latents, Tensor, "a tensor, or None")
        if tuple(source_latents.shape) != self.latent_shape:
            raise RequestError(
                f"source_latents must have shape {list(self.latent_shape)}, got "
                f"{list(source_latents.shape)}; encode the source with this engine's vae"
            )
        require_finite(source_latents, "source_latents", "encode the source with this engine's vae")

    def answer_all(
        self,
        turns: Sequence[tuple[Session, Request]],
        *,
        token_budget: int | None = None,
        cancels: Sequence[CancelToken | None] | None = None,
        on_progress: Callable[[TurnEvent], None] | None = None,
    ) -> list[Turn | Exception]:
        """Answer requests of several sessions together; see `TurnBatch.answer_all`."""
        batch = TurnBatch(self, token_budget)
        return batch.answer_all(turns, cancels=cancels, on_progress=on_progress)


def new_id() -> str:
    """An id for a session that was given none."""
    return uuid.uuid4().hex[:12]
