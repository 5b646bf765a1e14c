"""From a path to a whole plan of loading: config, where every parameter comes from, what is odd.

No tensor data is read here. `inspect` prints a resolution, `load` carries it out; so what is
printed is what is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mv2v_engine.checkpoints.components import find_components
from mv2v_engine.checkpoints.configs import (
    NOTHING_SAID,
    TRAINED_FOR,
    Knowledge,
    default_sampling,
    infer_config,
    read_own_config,
)
from mv2v_engine.checkpoints.detect import Detected, Format, wrong_base
from mv2v_engine.checkpoints.modules import (
    Assignment,
    Shape,
    Source,
    assign_modules,
    read_extras,
    require_decided,
)
from mv2v_engine.checkpoints.weights import TensorInfo, file_kind, require_numbers
from mv2v_engine.config import (
    ConditioningMode,
    QuantizeName,
    SamplingConfig,
    StreamConfig,
    TransformerConfig,
)
from mv2v_engine.defaults import without_memory
from mv2v_engine.errors import CheckpointError, first_of
from mv2v_engine.models.dit import MV2VTransformer

if TYPE_CHECKING:
    from mv2v_engine.checkpoints.lora import Lora

_BASE_TOKENIZERS = (2, 4, 8)
_FROM_BASE = "from patch_embedding, its kernel repeated and divided (FramePack)"


@dataclass(frozen=True)
class Resolution:
    """What loading a checkpoint will do.

    model: the transformer on the meta device. sources: the file's tensor of each parameter.
    missing, unknown, mismatched (name, got, expected), undecided: what forbids it. initialised:
    parameters that no file holds, and what fills them. mapping: one line for each tokenizer and
    merger found. conditioning: the modes that the weights were trained for (METHOD 13). knowledge:
    what they know, where that is little. stream: how a causal model makes video. vae_path,
    text_path, tokenizer_path, image_path: of what came with it, or that its config names; None
    where there is none (see `components`). loras: what is merged into the weights; the name says so
    too, which tells sessions and reports of them from others.
    """

    detected: Detected
    name: str
    config: TransformerConfig
    sampling: SamplingConfig
    model: MV2VTransformer
    sources: dict[str, Source]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    mismatched: tuple[tuple[str, Shape, Shape], ...]
    undecided: tuple[str, ...]
    initialised: dict[str, str]
    mapping: tuple[str, ...]
    conditioning: tuple[ConditioningMode, ...]
    knowledge: Knowledge
    stream: StreamConfig | None
    vae_path: Path | None
    text_path: Path | None
    tokenizer_path: Path | None
    image_path: Path | None = None
    loras: tuple[Lora, ...] = ()
    quantize: QuantizeName | None = None

    def quantized(self, kind: QuantizeName | None) -> Resolution:
        """The same, whose weights are loaded into eight bits; None: as they are.

        The name says so too, which tells sessions and reports of them from others.
        """
        if kind is None:
            return self
        return dataclasses.replace(self, name=f"{self.name} ({kind})", quantize=kind)

    @property
    def format(self) -> Format:
        return self.detected.format

    def require_loadable(self) -> None:
        """Raise `CheckpointError` for whatever forbids loading, the most telling thing first."""
        path = self.detected.path
        require_decided(self.undecided, path)
        listed = "; ".join(
            f"{name} got {list(got)}, expected {list(expected)}"
            for name, got, expected in self.mismatched[:3]
        )
        if self.detected.base is not None:
            self._require_base(self.detected.base, listed)
        if self.mismatched:
            raise CheckpointError(
                f"{path}: {len(self.mismatched)} parameters have other shapes than the model "
                f"({listed}); give the config that belongs to these weights"
            )
        if self.missing:
            raise CheckpointError(
                f"{path} lacks {len(self.missing)} parameters: {first_of(self.missing)}; expected "
                "a whole transformer, copy or download it again"
            )
        for source in self.sources.values():
            require_numbers(source.info)
        if self.unknown:
            raise CheckpointError(
                f"{path} has {len(self.unknown)} keys that the model does not know: "
                f'{first_of(self.unknown)}; rename them or leave them out ("key": null) with '
                "rename=FILE"
            )
        if self.vae_path is not None and not _is_component(self.vae_path):
            raise CheckpointError(
                f"{self.detected.config_file} names {self.vae_path} as its VAE, and no VAE is "
                'there; copy the folder there, or correct "vae" in that file'
            )
        stored = {name: source.info.shape for name, source in self.sources.items()}
        for lora in self.loras:
            lora.require_fit(stored, self.detected.path.name)

    def _require_base(self, base: Path, mismatched: str) -> None:
        """Refuse a base and trained tensors that are no transformer together."""
        wrong = []
        if self.mismatched:
            wrong.append(f"{len(self.mismatched)} parameters have other shapes ({mismatched})")
        if self.missing:
            wrong.append(f"{len(self.missing)} are in neither: {first_of(self.missing)}")
        if self.unknown:
            wrong.append(f"{len(self.unknown)} keys have no place: {first_of(self.unknown)}")
        if wrong:
            raise wrong_base(base, self.detected.path, "; ".join(wrong))


def resolve(detected: Detected, loras: tuple[Lora, ...] = ()) -> Resolution:
    """Plan the loading of a detected checkpoint, with what is merged into it.

    Raises:
        CheckpointError: the config cannot be told. What else forbids loading is in the result.
    """
    infos = {name: detected.tensors[key] for key, name in detected.translation.names.items()}
    unknown = list(detected.translation.unknown)
    found, conditioning, knowledge = Assignment(), TRAINED_FOR, NOTHING_SAID
    vae_path, stream = None, StreamConfig() if detected.is_causal else None
    if detected.format == "mv2v_engine" and detected.config_file is not None:
        own = read_own_config(detected.config_file)
        name, config, sampling = own.name, own.transformer, own.sampling
        conditioning, knowledge = own.conditioning, own.knowledge
        stream = own.stream or stream
        if own.vae is not None:
            vae_path = (detected.folder / own.vae).resolve()
        sources = {name: Source(info, info.shape) for name, info in infos.items()}
    else:
        name = _name_of(detected.path)
        if detected.base is not None:
            name = f"{name} on {_name_of(detected.base)}"
        base = infer_config(detected, infos)
        if detected.format == "memory_v2v":
            found = _assign(detected, base)
            infos |= {ours: detected.tensors[key] for key, ours in found.names.items()}
            unknown = [key for key in unknown if key not in found.names]
        config, sources = _with_extras(base, infos)
        if detected.format == "redirector":
            # the patch embedding of the channels that are not always zero
            patch = infos["patch_embedding.weight"]
            shape = (patch.shape[0], config.in_channels, *patch.shape[2:])
            sources["patch_embedding.weight"] = Source(patch, shape, is_first=True)
        sampling = default_sampling(detected, config)
    # in its own file, or beside it
    if detected.translation.parts and len(detected.files) == 1:
        components = find_components(detected.files[0])
    else:
        components = find_components(detected.folder, is_asked=False)
    is_part = detected.format == "mv2v_engine" and detected.base is not None
    if is_part:
        assert detected.base is not None
        components = find_components(detected.base, is_asked=False)
    if vae_path is None:
        vae_path = components.vae(config.latent_channels)
    # parameters only: buffers are computed by the model, and no checkpoint holds them
    with without_memory():
        model = MV2VTransformer(config).eval()
    expected = {key: tuple(p.shape) for key, p in model.named_parameters()}
    initialised = {} if detected.format == "mv2v_engine" else _initialised(expected, sources)
    # a base may have more than a model on it uses, such as what reads memory
    own_file = detected.files[-1]
    unknown += [
        source.info.key
        for key, source in sources.items()
        if key not in expected and not (is_part and source.info.file != own_file)
    ]
    return Resolution(
        detected=detected,
        name="+".join([name, *(lora.name for lora in loras)]),
        config=config,
        sampling=sampling,
        model=model,
        sources={key: source for key, source in sources.items() if key in expected},
        missing=tuple(k for k in expected if k not in sources and k not in initialised),
        unknown=tuple(unknown),
        mismatched=tuple(
            (key, sources[key].info.shape, shape)
            for key, shape in expected.items()
            if key in sources and sources[key].shape != shape
        ),
        undecided=tuple(found.undecided),
        initialised=initialised,
        mapping=tuple(_mapping(sources)),
        conditioning=conditioning,
        knowledge=knowledge,
        stream=stream,
        vae_path=vae_path,
        text_path=components.text_encoder,
        tokenizer_path=components.tokenizer,
        image_path=components.image_encoder if config.image_dim else None,
        loras=loras,
    )


def _name_of(path: Path) -> str:
    """A file's stem, a folder's name, or that of the repository whose snapshot a folder is."""
    if path.is_file():
        return path.stem
    folder = path.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return folder.name


def _is_component(place: Path) -> bool:
    return place.is_file() or (place / "config.json").is_file()


def _assign(detected: Detected, base: TransformerConfig) -> Assignment:
    """Roles of the unknown modules, leaving out roles that names or renames already fill."""
    unknown = [detected.tensors[key] for key in detected.translation.unknown]
    filled = {name.rpartition(".")[0] for name in detected.translation.names.values()}
    found = assign_modules(
        unknown,
        width=base.dim,
        in_channels=base.latent_channels,
        merge_blocks=base.merging_blocks,
        ordered=all(file_kind(file) == "archive" for file in detected.files),
    )
    for key, ours in list(found.names.items()):
        if ours.rpartition(".")[0] in filled:
            del found.names[key]
            found.undecided.append(f"{key}: {ours} is already taken")
    return found


def _with_extras(
    base: TransformerConfig, infos: dict[str, TensorInfo]
) -> tuple[TransformerConfig, dict[str, Source]]:
    """The config with the tokenizers and mergers that are there, and every tensor's source."""
    patches, merger, blocks, extras = read_extras(
        infos, width=base.dim, default_blocks=base.merging_blocks
    )
    sources = {name: Source(info, info.shape) for name, info in infos.items()} | extras
    config = dataclasses.replace(
        base,
        # where all frames have one grid there are no others
        tokenizers=(2,) if base.is_by_frames else tuple(sorted({*patches, *_BASE_TOKENIZERS})),
        merger=merger,
        merge_blocks=blocks,
    )
    return config, sources


def is_trained_for_memory(config: TransformerConfig, initialised: Iterable[str]) -> bool:
    """Whether the model has memory tokenizers that came with the checkpoint, given what did not."""
    is_given = not any(name.startswith(("tokenizers.4.", "tokenizers.8.")) for name in initialised)
    return is_given and max(config.tokenizers, default=0) > 2


def _initialised(expected: Iterable[str], sources: dict[str, Source]) -> dict[str, str]:
    """Tokenizer parameters that a base does not have."""
    result = {}
    for name in expected:
        if name.startswith("tokenizers.") and name not in sources:
            module = name.rpartition(".")[0]
            has_weight = f"{module}.weight" in sources
            if not has_weight and f"{module}.bias" in sources:
                continue
            result[name] = (
                "zero, the checkpoint has a weight without bias" if has_weight else (_FROM_BASE)
            )
    return result


def _mapping(sources: dict[str, Source]) -> list[str]:
    lines = []
    for name, source in sources.items():
        if name.startswith(("tokenizers.", "mergers.")):
            how = f" as {list(source.shape)}" if source.shape != source.info.shape else ""
            cells = ", its inputs read as cells in row-major order" if source.is_cells else ""
            lines.append(f"{source.info.key} {list(source.info.shape)} -> {name}{how}{cells}")
    return lines
