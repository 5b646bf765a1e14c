"""What `run models` tells: the checkpoints that are known to run, what each takes, how to run it.

What can be computed is computed from shapes: bytes on the disk, the device's peak, FLOPs. Names and
licences are as their authors published them; what they did not is "not told".
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mv2v_engine.checkpoints.detect import detect, embedded_names, read_json
from mv2v_engine.checkpoints.hub import size_words
from mv2v_engine.checkpoints.resolve import is_trained_for_memory, resolve
from mv2v_engine.config import (
    LUCY_5B,
    VACE_1_3B,
    WAN_1_3B,
    EngineConfig,
    MergeMode,
    SamplingConfig,
    TransformerConfig,
)
from mv2v_engine.defaults import without_memory
from mv2v_engine.engine.budget import predict, shape_footprint
from mv2v_engine.engine.report import turn_flops
from mv2v_engine.models.autoencoder import Autoencoder
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.sampling.guidance import needs_guidance
from mv2v_engine.settings import flags
from mv2v_engine.shapes import UMT5_XXL, TextShape
from mv2v_engine.tokens.plan import TokenPlan, memory_tokenizers, turn_plan
from mv2v_engine.vae import WAN_2_2_VAE

_GIB = 1 << 30
_NOT_TOLD = "not told"


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A checkpoint that runs here.

    name, components, base: as `--checkpoint`, `--components` and `--base` take them. stored: bytes
    of an element in the published files of transformer, VAE and text encoder; () where nobody
    told. streams: whether it edits frames as they come, and not windows. files: of weights that
    ship with the package. published: the transformer as it is in its file, if what is loaded has
    modules more. remembers: whether the weights learned to. licence: ""
    where it is not told. checked: how far it is known to run.
    """

    name: str
    shape: TransformerConfig
    checked: str
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    vae: Mapping[str, Any] = field(default_factory=dict)
    text: TextShape | None = UMT5_XXL
    licence: str = ""
    components: str = ""
    base: str = ""
    stored: tuple[int, ...] = ()
    published: TransformerConfig | None = None
    remembers: bool = True
    streams: bool = False
    files: tuple[Path, ...] = ()

    @property
    def is_editor(self) -> bool:
        return self.shape.is_editor

    @property
    def task(self) -> str:
        """The command of `run` that it is for."""
        if self.streams:
            return "stream"
        return "edit" if self.is_editor else "novel-view"

    @property
    def command(self) -> str:
        """A command line that runs it."""
        words = ["python", "-m", "mv2v_engine.run"]
        if self.is_editor:
            words += [self.task, "clip.mp4", "--prompt", "make the ball red", "--out", "edited.mp4"]
        else:
            words += ["novel-view", "clip.mp4", "--camera", "pan_right", "--out", "out/"]
        words += ["--checkpoint", self.name]
        beside = {"--components": self.components, "--base": self.base}
        return shlex.join([*words, *(w for pair in beside.items() if pair[1] for w in pair)])

    @property
    def disk_bytes(self) -> int | None:
        """The weight files' bytes, components included; None: not told."""
        if self.files:
            return sum(file.stat().st_size for file in self.files)
        if not self.stored:
            return None
        with without_memory():
            modules = MV2VTransformer(self.published or self.shape), Autoencoder(self.vae)
        counts = [sum(weight.numel() for weight in module.parameters()) for module in modules]
        counts.append(0 if self.text is None else self.text.num_parameters)
        return sum(count * size for count, size in zip(counts, self.stored, strict=True))

    def plan(self, memory: int) -> TokenPlan:
        """The plan of a turn that remembers so many videos, by the defaults."""
        shape, sampling = self.shape, self.sampling
        with without_memory():
            config = Autoencoder(self.vae).config
        rows, columns = (pixels // config.scale_factor_spatial for pixels in sampling.size)
        grid = ((sampling.num_frames - 1) // config.scale_factor_temporal + 1, rows, columns)
        merge: MergeMode = "conv" if shape.merger is not None else "off"
        return turn_plan(shape, grid, memory_tokenizers(memory, shape.tokenizers), merge=merge)

    def cost(self, memory: int) -> dict[str, Any]:
        """What a turn takes that remembers so many videos: tokens, FLOPs, and the device's peak.

        In bfloat16 on a GPU; the text encoder waits on the host between turns, or stays.
        """
        plan, sampling = self.plan(memory), self.sampling
        branches = 2 if self.text is not None and needs_guidance(sampling.guidance_scale) else 1
        flops = turn_flops(plan, plan.merge_steps, branches * sampling.num_inference_steps)
        held = min(memory, EngineConfig().max_memory) + 1
        parts = shape_footprint(self.shape, sampling, self.vae, self.text, cached=held)
        return {
            "model": self.name,
            "memory": memory,
            "frames": sampling.num_frames,
            "size": list(sampling.size),
            "tokens": plan.length,
            "forwards": branches * sampling.num_inference_steps,
            "pflop": flops["flops"] / 1e15,
            "peak_gib": self.peak_gib(memory),
            "peak_gib_text_resident": predict(parts, plan).peak / _GIB,
        }

    def peak_gib(self, memory: int, **how: Any) -> float:
        """The device's peak with the text encoder on the host between turns.

        how: `quantize`, `quantize_text` and `offload`, as `EngineConfig` has them.
        """
        held = min(memory, EngineConfig().max_memory) + 1
        parts = shape_footprint(self.shape, self.sampling, self.vae, self.text, cached=held, **how)
        offloaded = replace(parts, is_text_offloaded=self.text is not None)
        return predict(offloaded, self.plan(memory)).peak / _GIB


_WAN_COMPONENTS = "Wan-AI/Wan2.1-T2V-1.3B"
# what the loader makes of a checkpoint without memory modules: tokenizers from the patch embedding
_RECAMMASTER = replace(WAN_1_3B, merger=None, camera_conditioning="target")
_REDIRECTOR = replace(
    WAN_1_3B,
    merger=None,
    camera_conditioning="none",
    camera_attention="phases",
    shared_time=True,
    image_dim=1280,
)
_BERNINI = replace(WAN_1_3B, merger=None, camera_conditioning="none", source_ids=True)
_ECHO = replace(
    WAN_1_3B,
    merger=None,
    camera_conditioning="none",
    camera_actions=True,
    action_attention=True,
    context_frames=1,
    tokenizers=(2,),
)


def known_models() -> tuple[KnownModel, ...]:
    """What ships with the package, then what is published."""
    return (
        *map(_embedded, embedded_names()),
        KnownModel(
            name="KlingTeam/ReCamMaster-Wan2.1",
            components=_WAN_COMPONENTS,
            shape=_RECAMMASTER,
            published=replace(_RECAMMASTER, tokenizers=()),
            remembers=False,
            stored=(2, 4, 2),
            licence="Apache-2.0, components Apache-2.0",
            checked="equal to its authors' pipeline on random weights",
        ),
        KnownModel(
            name="DHCAI/Memory-V2V:memoryv2v.ckpt",
            components=_WAN_COMPONENTS,
            shape=WAN_1_3B,
            stored=(2, 4, 2),
            checked="names of its memory modules are not public and are read off their shapes; "
            "run inspect first",
        ),
        KnownModel(
            name="byeongjun-park/ReDirector",
            base="alibaba-pai/Wan2.1-Fun-V1.1-1.3B-Control-Camera",
            shape=_REDIRECTOR,
            published=replace(_REDIRECTOR, tokenizers=()),
            remembers=False,
            licence="Apache-2.0, its base's not told",
            checked="equal to its authors' pipeline written again, on random weights",
        ),
        KnownModel(
            name="Echo-Team/Echo-Memory:context_k1/epoch-0.safetensors",
            components=_WAN_COMPONENTS,
            shape=_ECHO,
            remembers=False,
            sampling=SamplingConfig(size=(352, 640), flow_shift=15.0, timesteps="bfloat16"),
            licence="CC BY 4.0",
            checked="equal to its authors' steps written again, on random weights; signs and units "
            "of its cameras are inferred",
        ),
        KnownModel(
            name="ByteDance/Bernini-R-1.3B-Diffusers",
            shape=_BERNINI,
            published=replace(_BERNINI, tokenizers=()),
            remembers=False,
            sampling=SamplingConfig(num_inference_steps=40, guidance_scale=4.0, guidance="apg"),
            checked="edits by text and images equal to its authors' steps written again, on random "
            "weights",
        ),
        KnownModel(
            name="decart-ai/Lucy-Edit-Dev",
            shape=replace(LUCY_5B, merger=None),
            sampling=SamplingConfig(fps=24.0),
            vae=WAN_2_2_VAE,
            remembers=False,
            licence="Lucy Edit Dev Model Non-Commercial License v1.0",
            checked="equal to diffusers' pipeline on random weights",
        ),
        KnownModel(
            name="decart-ai/Lucy-Edit-1.1-Dev",
            shape=replace(LUCY_5B, merger=None),
            sampling=SamplingConfig(fps=24.0),
            vae=WAN_2_2_VAE,
            remembers=False,
            checked="other weights of Lucy-Edit-Dev's model, to be run as that one",
        ),
        KnownModel(
            name="Wan-AI/Wan2.1-VACE-1.3B",
            shape=VACE_1_3B,
            published=replace(VACE_1_3B, tokenizers=()),
            sampling=SamplingConfig(flow_shift=16.0),
            remembers=False,
            licence="Apache-2.0",
            checked="its transformer equal to diffusers', its context to its description, on "
            "random weights",
        ),
    )


def _embedded(name: str) -> KnownModel:
    found = resolve(detect(name))
    assert found.vae_path is not None
    text, folders = None, [found.vae_path]
    if found.text_path is not None:
        said = read_json(found.text_path / "config.json")
        text = TextShape(**{each.name: said[each.name] for each in fields(TextShape)})
        folders.append(found.text_path)
    parts = [file for folder in folders for file in folder.glob("*.safetensors")]
    return KnownModel(
        name=name,
        shape=found.config,
        sampling=found.sampling,
        vae=read_json(found.vae_path / "config.json"),
        text=text,
        remembers=is_trained_for_memory(found.config, found.initialised),
        streams=found.stream is not None,
        licence="Apache-2.0",
        checked="trained and measured with this code, of toy worlds alone",
        files=(*found.detected.files, *parts),
    )


def describe_models() -> str:
    """All of them as plain text, a paragraph each."""
    about = "predicted peaks are of a GPU, in bfloat16; what has a hub's name is fetched by its use"
    return "\n\n".join([about, *map(_described, known_models())])


def _described(model: KnownModel) -> str:
    disk, most = model.disk_bytes, EngineConfig().max_memory
    first = model.cost(0)
    height, width = first["size"]
    frames = "frames as they come," if model.streams else f"{first['frames']} frames"
    peaks = [f"{_peak(first)} for a turn without memory"]
    if model.remembers:
        peaks.append(f"{_peak(model.cost(most))} with {most} remembered videos")
    beside = f", components {model.components}" if model.components else ""
    beside += f", base {model.base}" if model.base else ""
    return "\n".join(
        [
            f"{model.name}{beside}",
            f"  task      {model.task}, {frames} of {height}x{width}",
            f"  on disk   {_NOT_TOLD if disk is None else size_words(disk)}",
            f"  peak      {'; '.join(peaks)}",
            f"  smaller   {_smaller(model)}",
            f"  licence   {model.licence or _NOT_TOLD}",
            f"  known     {model.checked}",
            f"  command   {model.command}",
        ]
    )


def _smaller(model: KnownModel) -> str:
    """Peaks of a turn without memory, by the options that lower them."""
    ways: list[dict[str, Any]] = [{"quantize": "int8"}, {"offload": "blocks"}]
    if model.text is not None:
        ways.append({"quantize_text": "int8"})
    ways.append({name: value for way in ways for name, value in way.items()})
    options = flags(EngineConfig)
    return ", ".join(
        f"{model.peak_gib(0, **way):.3g} GiB with "
        + " ".join(f"{options[name]} {value}" for name, value in way.items())
        for way in ways
    )


def _peak(cost: Mapping[str, Any]) -> str:
    low, high = cost["peak_gib"], cost["peak_gib_text_resident"]
    if low == high:
        return f"{low:.2g} GiB"
    return f"{low:.3g} GiB, {high:.3g} where the text encoder stays,"
