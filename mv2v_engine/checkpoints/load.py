"""Load a checkpoint of any known format in streams, and save this project's own.

The model is built on the meta device and filled tensor by tensor, each cast and moved as it is
read, so that the host never holds more than the model and a sixteenth of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mv2v_engine.checkpoints.configs import NOTHING_SAID, TRAINED_FOR, Base, Knowledge, own_json
from mv2v_engine.checkpoints.detect import OWN_CONFIG, OWN_WEIGHTS, Format, detect
from mv2v_engine.checkpoints.fetch import fetch_checkpoint
from mv2v_engine.checkpoints.lora import Lora, LoraMerger, find_loras
from mv2v_engine.checkpoints.modules import Source
from mv2v_engine.checkpoints.names import read_renames
from mv2v_engine.checkpoints.resolve import Resolution, resolve
from mv2v_engine.checkpoints.weights import WeightReader, scaled_float8
from mv2v_engine.config import (
    ConditioningMode,
    Offload,
    QuantizeName,
    SamplingConfig,
    StreamConfig,
    TransformerConfig,
)
from mv2v_engine.errors import CheckpointError
from mv2v_engine.files import save_json, save_tensors
from mv2v_engine.finite import refuse_weights, weight_fault
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.feed_forward import Linear
from mv2v_engine.models.quantized import QuantizedLinear, quantize_linears
from mv2v_engine.tokens.tokenizers import Tokenizer, init_from_base


@dataclass(frozen=True)
class LoadReport:
    """What was loaded and from where.

    mapping: one line for each tokenizer and merger. initialised: parameters that the checkpoint
    does not hold, and what filled them. stored_dtypes: of the file. num_parameters: of the model.
    loras: what was merged into the weights.
    """

    format: Format
    reason: str
    path: Path
    num_parameters: int
    stored_dtypes: tuple[str, ...]
    mapping: tuple[str, ...]
    initialised: dict[str, str]
    loras: tuple[Lora, ...] = ()

    def lines(self) -> list[str]:
        """The report in words, one fact a line."""
        dtypes = ", ".join(self.stored_dtypes)
        lines = [
            f"{self.path}: {self.format} ({self.reason}), {self.num_parameters:,} parameters, "
            f"stored as {dtypes}"
        ]
        lines += [f"merged {a.path} at strength {a.strength:g}: {a.line}" for a in self.loras]
        lines += [f"mapped {line}" for line in self.mapping]
        lines += [f"initialised {name}: {how}" for name, how in self.initialised.items()]
        return lines


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A transformer ready to run, and where its VAE and text encoder lie.

    vae_path, text_path, image_path: diffusers and transformers folders, or single files, the last
    of an image encoder. tokenizer_path: a transformers folder. None where the checkpoint has none.
    conditioning: the modes that the weights were trained for (METHOD 13). knowledge: what they
    know, where that is little. stream: how a causal model makes video block by block; None of one
    that sees all frames at once.
    """

    name: str
    format: Format
    transformer: MV2VTransformer
    config: TransformerConfig
    sampling: SamplingConfig
    vae_path: Path | None
    text_path: Path | None
    tokenizer_path: Path | None
    report: LoadReport
    conditioning: tuple[ConditioningMode, ...]
    image_path: Path | None = None
    knowledge: Knowledge = NOTHING_SAID
    stream: StreamConfig | None = None


def load_checkpoint(
    path_or_name: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    products: torch.dtype | None = None,
    rename: Path | str | None = None,
    lora: Iterable[tuple[Path | str, float]] = (),
    quantize: QuantizeName | None = None,
    offload: Offload | None = None,
    check_weights: bool = True,
    with_components: bool = True,
    causal: bool = False,
    base: Path | str | None = None,
    check: Callable[[Resolution], None] | None = None,
) -> Checkpoint:
    """Load a checkpoint's transformer in evaluation mode.

    Args:
        path_or_name: a file or folder of a format that `detect` knows, an embedded name, or a
            hub's `owner/name`, `owner/name@revision` or `owner/name:path`, which is fetched.
        dtype: of the parameters; None keeps what the file has, and float32 for float8 with scales.
            Under bfloat16 and float16 the model's `keep_in_fp32_modules` stay float32.
        products: of the linear layers of the blocks; None as `dtype`.
        rename: a JSON file {"their.key": "our.key"} for what cannot be inferred.
        lora: files and strengths, merged into the weights in float32, one after the other.
        quantize: store the blocks' linear weights in eight bits, made of what they are by then.
        offload: leave the blocks' weights on the host, from where a forward takes them one by one.
        check_weights: refuse weights that are not finite, in a file or after the cast to `dtype`.
        with_components: of a hub name, fetch the VAE and the text encoder beside it too.
        causal: the model was trained to make frames block by block, as no tensor tells.
        base: the transformer whose other tensors a file of trained ones leaves out, as
            `path_or_name`; what lies beside it is the checkpoint's.
        check: called before any weight is read; what it raises ends the loading.

    Raises:
        CheckpointError: nothing there, unreadable, incomplete, of other shapes, undecided, or not
            finite; a LoRA of another base.
        StorageError: the disk has no room for what a hub name needs.
    """
    renames = read_renames(Path(rename)) if rename is not None else None
    loras = find_loras(lora)
    path, base = fetch_checkpoint(
        path_or_name, renames, with_components=with_components, causal=causal, base=base
    )
    detected = detect(path, renames, causal=causal, base=base)
    resolution = resolve(detected, loras).quantized(quantize)
    resolution.require_loadable()
    if check is not None:
        check(resolution)
    place, home = torch.device(device), None if offload is None else torch.device("cpu")
    _fill(resolution, place, dtype, products, home=home, check_weights=check_weights)
    if offload is not None:
        resolution.model.offload_blocks(place)
    return Checkpoint(
        name=resolution.name,
        format=resolution.detected.format,
        transformer=resolution.model,
        config=resolution.config,
        sampling=resolution.sampling,
        vae_path=resolution.vae_path,
        text_path=resolution.text_path,
        tokenizer_path=resolution.tokenizer_path,
        report=_report(resolution),
        conditioning=resolution.conditioning,
        image_path=resolution.image_path,
        knowledge=resolution.knowledge,
        stream=resolution.stream,
    )


def save_checkpoint(
    folder: Path | str,
    transformer: nn.Module,
    config: TransformerConfig,
    sampling: SamplingConfig,
    name: str,
    dtype: torch.dtype,
    *,
    conditioning: Sequence[ConditioningMode] = TRAINED_FOR,
    vae: str | None = None,
    knowledge: Knowledge | None = None,
    stream: StreamConfig | None = None,
    base: Base | None = None,
    only: Collection[str] | None = None,
    eights: Collection[str] = (),
) -> None:
    """Write `transformer.safetensors` and `mv2v.json`, each whole or not at all.

    conditioning: the modes that the weights were trained for. vae: the folder of a VAE that is
    shared with another checkpoint, relative to this one; None where it has its own, `vae/`.
    stream: of a causal model. base: what has the other parameters, where `only` those named are
    written; None writes all. eights: weights that are stored in float8 with one scale a row.

    Raises:
        CheckpointError: the weights are quantised.
        StorageError: the disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    if any(isinstance(module, QuantizedLinear) for module in transformer.modules()):
        raise CheckpointError(
            f"{name} holds weights in eight bits, which this format has not; save those that they "
            "were made of, loaded without quantize"
        )
    tensors = {
        key: parameter.detach().to("cpu", stored_dtype(transformer, key, dtype))
        for key, parameter in transformer.named_parameters()
        if only is None or key in only
    }
    for key in eights:
        weight = transformer.get_parameter(key).detach().cpu().float()
        module = key.removesuffix(".weight")
        tensors |= dict(zip((key, f"{module}.scale_weight"), scaled_float8(weight), strict=True))
    save_tensors(folder / OWN_WEIGHTS, tensors, {"format": "pt"})
    # last, because a folder counts as a checkpoint once it has this file
    words = own_json(name, config, sampling, conditioning, vae, knowledge, stream, base)
    save_json(folder / OWN_CONFIG, words)


def _fill(
    resolution: Resolution,
    device: torch.device,
    dtype: torch.dtype | None,
    products: torch.dtype | None,
    *,
    home: torch.device | None,
    check_weights: bool,
) -> None:
    """Give every parameter of the meta model its data. home: of the blocks; None: as the rest."""
    faults: list[str] = []
    model = resolution.model
    if resolution.quantize is not None:
        quantize_linears(model, resolution.quantize)
    files = {file: i for i, file in enumerate(resolution.detected.files)}
    sources = sorted(resolution.sources.items(), key=lambda item: files[item[1].info.file])
    merger = LoraMerger(resolution.loras, check_weights=check_weights)
    with WeightReader() as reader, merger:
        for name, source in sources:
            tensor = reader.read(source.info)
            wanted = dtype or tensor.dtype
            kept = stored_dtype(model, name, wanted, products)
            own = home if home is not None and name.startswith("blocks.") else device
            if merger.changes(name):
                tensor = merger.merged(name, tensor, dtype=kept, device=device)
                copied = _shaped(tensor, source).to(own)
            else:
                # a copy even when nothing changes: the file must not stay mapped
                copied = _shaped(tensor, source).to(own, kept, copy=True)
            _place(model, name, copied.contiguous())
            if check_weights and (fault := weight_fault(source.info.key, copied, tensor)):
                faults.append(fault)
    merger.require_finite()
    refuse_weights(resolution.detected.path, faults)
    for name in resolution.initialised:
        like = model.patch_embedding.weight
        shape = model.get_parameter(name).shape
        _place(model, name, torch.zeros(shape, device=device, dtype=like.dtype))
    for k, tokenizer in model.tokenizers.items():
        if f"tokenizers.{k}.weight" in resolution.initialised:
            assert isinstance(tokenizer, Tokenizer)
            init_from_base(tokenizer, model.patch_embedding)


def _shaped(tensor: Tensor, source: Source) -> Tensor:
    if source.is_first:
        tensor = tensor[:, : source.shape[1]]
    if not source.is_cells:
        return tensor.reshape(source.shape)
    # [C, 4C] over (row, column, channel) to a kernel over (channel, row, column)
    width = source.shape[0]
    return tensor.reshape(width, 2, 2, width).permute(0, 3, 1, 2)


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    prefix, _, leaf = name.rpartition(".")
    module = model.get_submodule(prefix)
    if leaf == "weight" and isinstance(module, QuantizedLinear):
        module.quantize(tensor)
        return
    requires_grad = model.get_parameter(name).requires_grad
    module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=requires_grad))


def stored_dtype(
    model: nn.Module, name: str, dtype: torch.dtype, products: torch.dtype | None = None
) -> torch.dtype:
    """float32 for what the model keeps so under half precision, else the dtype asked for.

    Also for what is quantised when it is placed, which is then rounded once. products: of the
    linear layers of the blocks, if it is another one.
    """
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    if leaf == "weight" and isinstance(owner, QuantizedLinear):
        return torch.float32
    if products is not None and isinstance(owner, Linear):
        return products
    kept: tuple[str, ...] = getattr(model, "keep_in_fp32_modules", ())
    is_half = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if is_half and set(name.split(".")) & set(kept) else dtype


def _report(resolution: Resolution) -> LoadReport:
    detected = resolution.detected
    dtypes = {source.info.kind for source in resolution.sources.values()}
    return LoadReport(
        format=detected.format,
        reason=detected.reason,
        path=detected.path,
        num_parameters=sum(p.numel() for p in resolution.model.parameters()),
        stored_dtypes=tuple(sorted(dtypes)),
        mapping=resolution.mapping,
        initialised=resolution.initialised,
        loras=resolution.loras,
    )
