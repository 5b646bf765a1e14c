"""Transformer and sampling configs: from this project's JSON, from Wan's JSON, or from shapes.

A config file's words win over shapes, so that a file which contradicts its weights is met as a
mismatch with both shapes named. The number of heads is in no shape: 128 channels each, as every
released Wan has, unless a config file says otherwise.

C transformer width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from mv2v_engine.checkpoints.detect import PATCH_CELLS, Detected, Format, read_json, wrong_base
from mv2v_engine.checkpoints.weights import TensorInfo
from mv2v_engine.config import (
    CameraConditioning,
    ConditioningMode,
    HistoryConfig,
    MergerConfig,
    SamplingConfig,
    StreamConfig,
    TransformerConfig,
)
from mv2v_engine.errors import CheckpointError, RequestError

FORMAT, VERSION = "mv2v_engine", 1
# what every published base is, and weights that say nothing
TRAINED_FOR: tuple[ConditioningMode, ...] = ("joint",)
_HEAD_DIM = 128
# what Bernini is told before the instruction of an edit
_BERNINI_EDITS = "You are a helpful assistant specialized in video editing."
_BERNINI_REFERS = "You are a helpful assistant specialized in video editing with reference."
_ECHO_NEGATIVE_PROMPT = "oversaturated colors, overexposed, static, blurry details"
_IMAGE_LINEAR = "condition_embedder.image_embedder.ff.net.0.proj.weight"
# formats of novel views that were trained further, on one size
_OF_VIEWS = ("recammaster", "memory_v2v", "redirector")
# both spellings of Wan's config files; each of our fields by the words it may have there
_WORDS = {
    "num_layers": ("num_layers",),
    "ffn_dim": ("ffn_dim",),
    "in_channels": ("in_channels", "in_dim"),
    "out_channels": ("out_channels", "out_dim"),
    "text_dim": ("text_dim",),
    "freq_dim": ("freq_dim",),
    "text_len": ("text_len",),
    "eps": ("eps",),
}
# what this transformer has fixed; a config that says otherwise is another model
_FIXED: dict[str, tuple[Any, ...]] = {
    "patch_size": ([1, 2, 2],),
    "qk_norm": ("rms_norm_across_heads", True),
    "cross_attn_norm": (True,),
    "image_dim": (None,),
    "added_kv_proj_dim": (None,),
    "pos_embed_seq_len": (None,),
    "window_size": ([-1, -1],),
    "model_type": ("t2v", "ti2v", "vace"),
}
# Wan's own default (its shared config): what guidance moves away from
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，"  # noqa: RUF001
    "最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，"  # noqa: RUF001
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"  # noqa: RUF001
    "杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Knowledge:
    """What weights know that were trained on little; the default says nothing, as of large ones.

    source_psnr: decibels that the VAE reaches or exceeds when it encodes and decodes the first
    frame of a source of the kind that the weights were trained on. words: all that occur in the
    instructions that they were trained on.
    """

    source_psnr: float | None = None
    words: tuple[str, ...] = ()


NOTHING_SAID = Knowledge()


def own_json(
    name: str,
    config: TransformerConfig,
    sampling: SamplingConfig,
    conditioning: Sequence[ConditioningMode],
    vae: str | None = None,
    knowledge: Knowledge | None = None,
    stream: StreamConfig | None = None,
    base: Base | None = None,
) -> dict[str, Any]:
    """The content of `mv2v.json`.

    conditioning: the modes that the weights were trained for. vae: the VAE's folder relative to
    the checkpoint's, where it is another one's; None: `vae/` beside the file. stream: of a causal
    model. base: of a checkpoint that holds trained tensors alone.
    """
    shared: dict[str, Any] = {} if vae is None else {"vae": vae}
    if base is not None:
        shared["base"] = dataclasses.asdict(base)
    if knowledge is not None:
        shared["knowledge"] = dataclasses.asdict(knowledge)
    if stream is not None:
        shared["stream"] = dataclasses.asdict(stream)
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "transformer": dataclasses.asdict(config),
        "sampling": dataclasses.asdict(sampling),
        "conditioning": list(conditioning),
        **shared,
    }


@dataclasses.dataclass(frozen=True)
class Base:
    """The checkpoint of this project's that has the tensors which another one leaves out, with its
    text encoder and tokenizer.

    folder: relative to the other's. sha256: of its transformer's file, since other weights there
    are not those that were trained on.
    """

    folder: str
    sha256: str

    def __post_init__(self) -> None:
        words = self.folder, self.sha256
        if not all(isinstance(word, str) and word for word in words):
            raise RequestError(f"base is {words}, no folder and SHA-256")
        if Path(self.folder).is_absolute():
            raise RequestError(f"base is {self.folder!r}, no path relative to the folder")


@dataclasses.dataclass(frozen=True)
class OwnConfig:
    """What `mv2v.json` says; see `own_json`."""

    name: str
    transformer: TransformerConfig
    sampling: SamplingConfig
    conditioning: tuple[ConditioningMode, ...]
    vae: str | None = None
    knowledge: Knowledge = NOTHING_SAID
    stream: StreamConfig | None = None
    base: Base | None = None


def read_own_config(path: Path) -> OwnConfig:
    """Name, configs and modes of `mv2v.json`; a file without modes is of joint weights (METHOD 13).

    Raises:
        CheckpointError: another format or version, or fields that are missing, new or wrong.
    """
    value = read_json(path)
    if value.get("format") != FORMAT or value.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is format {value.get('format')!r} version {value.get('version')!r}; expected "
            f"{FORMAT!r} version {VERSION}, use the engine that wrote it"
        )
    try:
        transformer = transformer_config(value["transformer"])
        sampling = {k: _tupled(v) for k, v in value["sampling"].items()}
        conditioning = tuple(value.get("conditioning", TRAINED_FOR))
        if not conditioning or not set(conditioning) <= set(get_args(ConditioningMode)):
            raise RequestError(f"conditioning is {list(conditioning)}")
        vae = value.get("vae")
        if vae is not None and (not isinstance(vae, str) or not vae or Path(vae).is_absolute()):
            raise RequestError(f"vae is {vae!r}, no path relative to the folder")
        stream = value.get("stream")
        if stream is not None:
            stream = StreamConfig(**{k: _tupled(v) for k, v in stream.items()})
        base = value.get("base")
        return OwnConfig(
            str(value["name"]),
            transformer,
            SamplingConfig(**sampling),
            conditioning,
            vae,
            _knowledge(value.get("knowledge", {})),
            stream,
            None if base is None else Base(**base),
        )
    except (KeyError, TypeError, AttributeError, RequestError) as error:
        raise CheckpointError(
            f"{path} does not describe a checkpoint ({error}); expected the fields of "
            "TransformerConfig and SamplingConfig and what conditioning they were trained for, "
            "correct it or copy it again"
        ) from error


def _knowledge(words: Mapping[str, Any]) -> Knowledge:
    """Raises RequestError, TypeError or AttributeError: a field is wrong, or new."""
    known = Knowledge(**{name: _tupled(value) for name, value in words.items()})
    least = known.source_psnr
    if least is not None and (isinstance(least, bool) or not isinstance(least, int | float)):
        raise RequestError(f"source_psnr is {least!r}, no number of decibels")
    if not all(isinstance(word, str) for word in known.words):
        raise RequestError("words are no list of words")
    return known


def transformer_config(words: Mapping[str, Any]) -> TransformerConfig:
    """A config from its `dataclasses.asdict`, as JSON keeps it; what it leaves out is the default.

    Raises:
        RequestError, TypeError: a field is wrong, or new.
    """
    fields = {name: _tupled(value) for name, value in words.items()}
    if fields.get("merger") is not None:
        merger = {name: _tupled(value) for name, value in fields["merger"].items()}
        fields["merger"] = MergerConfig(**merger)
    if fields.get("history") is not None:
        history = {name: _tupled(value) for name, value in fields["history"].items()}
        fields["history"] = HistoryConfig(**history)
    return TransformerConfig(**fields)


def infer_config(detected: Detected, infos: Mapping[str, TensorInfo]) -> TransformerConfig:
    """The base transformer's config; tokenizers and merger are left for `modules.read_extras`.

    Args:
        infos: the file's tensors by our names.

    Raises:
        CheckpointError: a deciding tensor is missing, or the config file describes another model.
    """
    said = _described(detected.config_file, detected.format) if detected.config_file else {}
    has_phases = detected.format == "redirector"
    shapes = _Shapes(detected, infos)
    width = shapes.width()
    heads, head_dim = _heads(detected, said, width)
    camera: CameraConditioning = "none"
    if detected.format in ("recammaster", "memory_v2v"):
        camera = "target" if detected.format == "recammaster" else "own"
    optional = {k: said[k] for k in ("text_len", "eps") if k in said}
    channels = said.get("in_channels") or shapes.axis("patch_embedding.weight", 1)
    outputs = said.get("out_channels") or shapes.axis("proj_out.weight", 0) // PATCH_CELLS
    if has_phases and channels == 2 * outputs:
        # it is given zeros on the others, which its base has for the latents of a first frame
        channels = outputs
    vace = _vace(detected, infos, shapes) if detected.format == "vace" else {}
    context = vace.get("source_channels", 0)
    if channels not in (outputs, 2 * outputs):
        raise CheckpointError(
            f"{detected.path} takes {channels} latent channels and gives {outputs}: it is made for "
            "further inputs, as image-to-video models (36 for 16) and control models are; expected "
            "as many (Wan text-to-video), or twice as many (Lucy-Edit)"
        )
    try:
        return TransformerConfig(
            num_layers=said.get("num_layers") or shapes.depth(),
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            ffn_dim=said.get("ffn_dim") or shapes.axis("blocks.0.ffn.net.0.proj.weight", 0),
            in_channels=channels + context,
            out_channels=outputs,
            source_channels=channels - outputs + context,
            vace_layers=vace.get("vace_layers", ()),
            text_dim=said.get("text_dim")
            or shapes.axis("condition_embedder.text_embedder.linear_1.weight", 1),
            freq_dim=said.get("freq_dim")
            or shapes.axis("condition_embedder.time_embedder.linear_1.weight", 1),
            camera_conditioning=camera,
            camera_attention="phases" if has_phases else "none",
            shared_time=has_phases,
            **_actions(infos) if detected.format == "echo_memory" else {},
            source_ids=detected.format == "bernini_r",
            image_dim=shapes.axis(_IMAGE_LINEAR, 1) if has_phases else 0,
            merger=None,
            **optional,
        )
    except RequestError as error:
        raise CheckpointError(f"{detected.path}: {error}") from error


def _actions(infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Echo-Memory's modules; of the context its two runnable rows begin with one frame."""
    states = {int(n.split(".")[1]) for n in infos if n.endswith(".state_space.in_proj.weight")}
    return {
        "camera_actions": True,
        "action_attention": "blocks.0.attn_frames.to_q.weight" in infos,
        "state_space": tuple(sorted(states)),
        "context_frames": 1,
    }


def _vace(detected: Detected, infos: Mapping[str, TensorInfo], shapes: _Shapes) -> dict[str, Any]:
    """VACE's own fields: its layers of the config, or spread evenly as all published ones are."""
    said = read_json(detected.config_file) if detected.config_file else {}
    count = len({name.split(".")[1] for name in infos if name.startswith("vace_blocks.")})
    depth = shapes.depth()
    layers = said.get("vace_layers") or list(range(0, depth, max(1, depth // count)))
    if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
        raise CheckpointError(
            f"{detected.config_file}: vace_layers must be a list of whole numbers, got {layers!r}"
        )
    if len(layers) != count:
        raise CheckpointError(
            f"{detected.path} has {count} VACE blocks, and {len(layers)} vace_layers "
            f"({layers}); put the config.json that belongs to it beside it"
        )
    channels = shapes.axis("vace_patch_embedding.weight", 1)
    return {"vace_layers": tuple(layers), "source_channels": channels}


def default_sampling(detected: Detected, config: TransformerConfig) -> SamplingConfig:
    """Window, size and sampler defaults of a base checkpoint (BASE_MODELS 3.1, 4).

    The 48-channel models were made for 24 frames a second: 121 at 704x1280, Lucy-Edit (source on
    channels) 81 at 480x832. The bases themselves were made for both orientations, those trained
    further on for one. A scheduler folder's kind and shift win.
    """
    sampling = SamplingConfig(negative_prompt=WAN_NEGATIVE_PROMPT)
    if detected.format in ("recammaster", "redirector"):
        # their code casts them to the model's dtype, in training and inference
        sampling = dataclasses.replace(sampling, timesteps="bfloat16")
    if config.source_ids:
        # its own code's for edits, in place of its scheduler folder's shift
        return SamplingConfig(
            num_inference_steps=40,
            guidance_scale=4.0,
            guidance="apg",
            reference_scales=(4.5, 1.25),
            scheduler="unipc",
            sizes=((832, 480),),
            negative_prompt=WAN_NEGATIVE_PROMPT,
            prompt_prefix=_BERNINI_EDITS,
            reference_prefix=_BERNINI_REFERS,
        )
    if config.camera_actions:
        return SamplingConfig(
            size=(352, 640),
            flow_shift=15.0,
            negative_prompt=_ECHO_NEGATIVE_PROMPT,
            timesteps="bfloat16",
        )
    if config.vace_layers:
        # the shift of its authors' own script
        sampling = dataclasses.replace(sampling, flow_shift=16.0, sizes=(sampling.size[::-1],))
    elif config.source_channels:
        sampling = SamplingConfig(fps=24.0)
    elif config.out_channels == 48:
        sampling = dataclasses.replace(sampling, num_frames=121, size=(704, 1280), fps=24.0)
    is_base = detected.format not in _OF_VIEWS and not config.source_channels
    if is_base:
        sampling = dataclasses.replace(sampling, sizes=(sampling.size[::-1],))
    scheduler = detected.folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        said = read_json(scheduler)
        shift = said.get("flow_shift", said.get("shift"))
        if isinstance(shift, int | float) and not shift <= 0:
            try:
                sampling = dataclasses.replace(sampling, flow_shift=float(shift))
            except RequestError as error:
                raise CheckpointError(
                    f"{scheduler}: {error}; correct it or copy it again"
                ) from error
        if said.get("_class_name") == "UniPCMultistepScheduler":
            sampling = dataclasses.replace(sampling, scheduler="unipc")
    return sampling


class _Shapes:
    """Sizes read off tensors that every Wan transformer has."""

    def __init__(self, detected: Detected, infos: Mapping[str, TensorInfo]) -> None:
        self.path, self.base, self.infos = detected.path, detected.base, infos

    def axis(self, name: str, axis: int) -> int:
        info = self.infos.get(name)
        if info is None and self.base is not None:
            raise wrong_base(self.base, self.path, f"neither has {name} under one kind of names")
        if info is None:
            raise CheckpointError(
                f"{self.path} lacks {name}, whose shape tells the model's size; expected a whole "
                "transformer, copy or download it again"
            )
        if axis >= len(info.shape):
            raise CheckpointError(
                f"{self.path}: {info.key} has shape {list(info.shape)}; expected at least "
                f"{axis + 1} axes, it is no Wan transformer's"
            )
        return info.shape[axis]

    def width(self) -> int:
        width = self.axis("patch_embedding.weight", 0)
        info = self.infos["patch_embedding.weight"]
        if info.shape[2:] != (1, 2, 2):
            raise CheckpointError(
                f"{self.path}: {info.key} has shape {list(info.shape)}; expected "
                "[C, channels, 1, 2, 2], a Wan transformer's patches"
            )
        return width

    def depth(self) -> int:
        return 1 + max(int(n.split(".")[1]) for n in self.infos if n.startswith("blocks."))


def _described(path: Path, format_: Format) -> dict[str, Any]:
    """A Wan config file in our words.

    Raises:
        CheckpointError: it describes a model that this transformer cannot be.
    """
    config = read_json(path)
    for key, allowed in _FIXED.items():
        if format_ == "redirector" and key == "model_type":
            allowed = (*allowed, "i2v")  # its base's word
        if key in config and config[key] not in allowed:
            raise CheckpointError(
                f"{path} has {key} {config[key]!r}; expected {allowed[0]!r}, a Wan text-to-video "
                "transformer's"
            )
    said = {
        ours: config[word] for ours, words in _WORDS.items() for word in words if word in config
    }
    heads = config.get("num_attention_heads", config.get("num_heads"))
    if heads:
        said["heads"] = heads
        head_dim = config.get("attention_head_dim")
        said["head_dim"] = head_dim or (config["dim"] // heads if "dim" in config else None)
    wrong = {k: v for k, v in said.items() if v is not None and not isinstance(v, int | float)}
    if wrong:
        key, value = next(iter(wrong.items()))
        raise CheckpointError(f"{path} has {key} {value!r}; expected a number")
    return said


def _heads(detected: Detected, said: Mapping[str, Any], width: int) -> tuple[int, int]:
    if heads := said.get("heads"):
        return heads, said.get("head_dim") or width // heads
    if width % _HEAD_DIM:
        raise CheckpointError(
            f"{detected.path} is {width} channels wide, no multiple of {_HEAD_DIM}, and no shape "
            'tells the number of heads; put a config.json with "num_heads" beside it'
        )
    return width // _HEAD_DIM, _HEAD_DIM


def _tupled(value: Any) -> Any:
    return tuple(_tupled(each) for each in value) if isinstance(value, list) else value
