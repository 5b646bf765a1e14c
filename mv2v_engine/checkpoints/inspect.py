"""What loading a checkpoint would do: `run inspect PATH`, which reads headers alone.

With `--deep` every number of the transformer, and of the VAE and the text encoder beside it, is
read too.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from mv2v_engine.checkpoints.components import part_of
from mv2v_engine.checkpoints.detect import Format, detect
from mv2v_engine.checkpoints.fetch import fetch_checkpoint, headers_of
from mv2v_engine.checkpoints.identify import lora_of
from mv2v_engine.checkpoints.lora import Lora, find_lora, read_lora
from mv2v_engine.checkpoints.modules import Shape
from mv2v_engine.checkpoints.names import read_renames
from mv2v_engine.checkpoints.resolve import Resolution, resolve
from mv2v_engine.checkpoints.weights import (
    WEIGHT_SUFFIXES,
    TensorInfo,
    WeightReader,
    read_header,
)
from mv2v_engine.config import TransformerConfig
from mv2v_engine.errors import CheckpointError
from mv2v_engine.finite import largest_magnitude, refuse_weights, weight_fault
from mv2v_engine.models.quantized import large_linears

_SHOWN = 12
_KINDS: dict[Format, str] = {
    "mv2v_engine": "this project's checkpoint",
    "wan_diffusers": "a Wan text-to-video transformer under diffusers' names",
    "wan_original": "a Wan text-to-video transformer under Wan's own names",
    "recammaster": "a ReCamMaster transformer",
    "memory_v2v": "a Memory-V2V transformer",
    "lucy_edit": "a Lucy-Edit transformer",
    "redirector": "a ReDirector transformer",
    "bernini_r": "a Bernini-R transformer",
    "echo_memory": "an Echo-Memory transformer",
    "vace": "a Wan VACE transformer, which is given a source and a mask",
}


@dataclass(frozen=True)
class Numbers:
    """What the numbers of one component's weights are.

    component: transformer, vae or text_encoder. faults: tensors with numbers that are not finite,
    in words. largest: the largest magnitude of the others, and the tensor that has it.
    """

    component: str
    path: Path
    num_tensors: int
    faults: tuple[str, ...]
    largest: tuple[float, str]

    def line(self) -> str:
        """All in words, but the faults' names."""
        if self.faults:
            return f"{self.component}: {len(self.faults)} of {self.num_tensors} tensors not finite"
        largest, name = self.largest
        limit = torch.finfo(torch.float16).max
        fits = "" if largest <= limit else f", too large for float16, whose limit is {limit:g}"
        return (
            f"{self.component}: {self.num_tensors} tensors, all finite, up to {largest:.3g} "
            f"({name}){fits}"
        )


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's format, config and keys, told from its headers.

    matched: parameters found in the file. missing: parameters it lacks. unknown: its keys that
    the model does not know. mismatched: (name, got, expected). initialised: parameters it need
    not have, and what fills them. inferred: one line for each tokenizer and merger found.
    undecided: modules whose role shapes leave open. dtypes: tensors by dtype. num_parameters: of
    the model; num_quantizable: of its linear layers that `quantize` stores in eight bits;
    num_stored: elements in the files; num_bytes: of these. conditioning: the modes that the weights
    were trained for. vae_path: the VAE's folder, None without one. numbers: of every component,
    None if only headers were read. problem: why it cannot be loaded, or None as far as was read.
    """

    path: Path
    name: str
    format: Format
    reason: str
    files: tuple[Path, ...]
    num_bytes: int
    config: TransformerConfig
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    mismatched: tuple[tuple[str, Shape, Shape], ...]
    dropped: tuple[str, ...]
    initialised: dict[str, str]
    inferred: tuple[str, ...]
    undecided: tuple[str, ...]
    dtypes: dict[str, int]
    num_parameters: int
    num_quantizable: int
    num_stored: int
    conditioning: tuple[str, ...]
    vae_path: Path | None
    numbers: tuple[Numbers, ...] | None
    problem: str | None

    @property
    def command(self) -> str:
        """What it is for."""
        return f"run {'edit' if self.config.is_editor else 'novel-view'}"

    @property
    def sentence(self) -> str:
        """What it is, in one sentence."""
        shape = self.config
        return (
            f"{_KINDS[self.format]}: {shape.num_layers} blocks of {shape.dim:,} channels, "
            f"{self.num_parameters:,} parameters, for videos of {shape.latent_channels} latent "
            f"channels, {self.command}"
        )


def inspect_checkpoint(
    path: Path | str,
    rename: Path | str | None = None,
    *,
    deep: bool = False,
    base: Path | str | None = None,
) -> Inspection:
    """Inspect a checkpoint; reads headers only, unless `deep` has it read every number.

    Of a hub name the headers are asked for alone; `deep` fetches all that loading needs. base: what
    trained tensors alone lie on.

    Raises:
        CheckpointError: it cannot be read or its config cannot be told. Missing, unknown and
            undecided keys are told in the result instead.
    """
    renames = read_renames(Path(rename)) if rename is not None else None
    if deep:
        path, base = fetch_checkpoint(path, renames, base=base)
    with headers_of(path) as place, _headers(base) as under:
        found = _inspected(resolve(detect(place, renames, base=under)), deep=deep)
    if place == path and under == base:
        return found
    # what stood in for the repository is gone
    files = tuple(Path(file.name) for file in found.files)
    vae = found.vae_path and Path(found.vae_path.name)
    return dataclasses.replace(found, path=Path(path), files=files, vae_path=vae)


def _headers(base: Path | str | None) -> AbstractContextManager[Path | str | None]:
    return nullcontext() if base is None else headers_of(base)


def _inspected(resolution: Resolution, *, deep: bool) -> Inspection:
    detected = resolution.detected
    numbers = tuple(_numbers(resolution)) if deep else None
    dtypes = Counter(info.kind for info in detected.tensors.values())
    return Inspection(
        path=detected.path,
        name=resolution.name,
        format=detected.format,
        reason=detected.reason,
        files=detected.files,
        num_bytes=sum(file.stat().st_size for file in detected.files),
        config=resolution.config,
        matched=tuple(resolution.sources),
        missing=resolution.missing,
        unknown=resolution.unknown,
        mismatched=resolution.mismatched,
        dropped=detected.translation.dropped,
        initialised=resolution.initialised,
        inferred=resolution.mapping,
        undecided=resolution.undecided,
        dtypes=dict(dtypes.most_common()),
        num_parameters=sum(p.numel() for p in resolution.model.parameters()),
        num_quantizable=sum(m.weight.numel() for m in large_linears(resolution.model).values()),
        num_stored=sum(i.num_elements for i in detected.tensors.values()),
        conditioning=resolution.conditioning,
        vae_path=resolution.vae_path,
        numbers=numbers,
        problem=_problem(resolution, numbers or ()),
    )


def render_inspection(inspection: Inspection) -> str:
    """The inspection as plain text for the command line."""
    files = ", ".join(file.name for file in inspection.files[:4])
    if len(inspection.files) > 4:
        files += f" and {len(inspection.files) - 4} more"
    dtypes = ", ".join(f"{dtype} ({count})" for dtype, count in inspection.dtypes.items())
    lines = [
        f"{inspection.path} is {inspection.sentence}",
        f"checkpoint   {inspection.path}",
        f"format       {inspection.format}: {inspection.reason}",
        f"files        {files}, {inspection.num_bytes / 1e6:,.1f} MB",
        f"dtypes       {dtypes}",
        f"parameters   {inspection.num_parameters:,} in the model, "
        f"{inspection.num_stored:,} in the file",
        f"weights      {2 * inspection.num_parameters / 1e6:,.1f} MB in bfloat16, "
        f"{(2 * inspection.num_parameters - inspection.num_quantizable) / 1e6:,.1f} MB with "
        "--quantize int8 or fp8",
        "config       " + "\n             ".join(_config_lines(inspection.config)),
        f"trained for  {' and '.join(inspection.conditioning)} conditioning",
        f"for          {inspection.command}",
        f"vae          {inspection.vae_path or 'none beside it: give components=FOLDER'}",
        f"matched      {len(inspection.matched)} of "
        f"{len(inspection.matched) + len(inspection.missing) + len(inspection.initialised)}",
    ]
    initialised = [f"{name}: {how}" for name, how in inspection.initialised.items()]
    mismatched = [f"{n} got {list(g)}, expected {list(e)}" for n, g, e in inspection.mismatched]
    lines += _section("missing", inspection.missing)
    lines += _section("unknown", inspection.unknown)
    lines += _section("mismatched", mismatched)
    lines += _section("left out", inspection.dropped)
    lines += _section("inferred", inspection.inferred)
    lines += _section("undecided", inspection.undecided)
    lines += _section("initialised", initialised)
    if inspection.numbers is not None:
        faults = [fault for numbers in inspection.numbers for fault in numbers.faults]
        lines.append(
            "numbers      " + "\n             ".join(found.line() for found in inspection.numbers)
        )
        lines += _section("not finite", faults)
    looked = "" if inspection.numbers is not None else ", by its headers; --deep reads its numbers"
    lines.append("loads        " + (inspection.problem or f"yes{looked}"))
    return "\n".join(lines)


def inspect_lora(path: Path | str) -> Lora | None:
    """What a LoRA changes, by its header; None if a path is something else.

    Raises:
        CheckpointError: it cannot be read, is another kind of adapter, or lacks half of itself.
    """
    place = Path(path).expanduser()
    if (place / "adapter_config.json").is_file():
        place = find_lora(place)
    if not place.is_file() or place.suffix == ".json":
        return None
    shapes = {key: info.shape for key, info in read_header(place).items()}
    return read_lora(place) if lora_of(shapes) else None


def render_lora(lora: Lora, *, deep: bool = False) -> tuple[str, str | None]:
    """A LoRA as plain text for the command line, and why it cannot be loaded, if so.

    deep: read every number too.
    """
    infos = [info for change in lora.changes.values() for info in change.infos]
    dtypes = Counter(info.kind for info in infos).most_common()
    lines = [
        f"{lora.path} is {lora.sentence}",
        f"file         {lora.path.stat().st_size / 1e6:,.1f} MB, SHA-256 {lora.digest}",
        "dtypes       " + ", ".join(f"{dtype} ({count})" for dtype, count in dtypes),
    ]
    lines += _section("unknown", lora.unknown)
    lines += _section("zero", lora.dropped)
    problem = None
    try:
        lora.require_whole()
        if deep:
            numbers = _read("lora", lora.path, infos)
            lines.append(f"numbers      {numbers.line()}")
            refuse_weights(numbers.path, numbers.faults)
    except CheckpointError as error:
        problem = str(error)
    yes = "yes, on a base of these blocks and channels"
    lines.append("loads        " + (yes if problem is None else f"no: {problem}"))
    return "\n".join(lines), problem


def _numbers(resolution: Resolution) -> Iterable[Numbers]:
    """Read the transformer, and what lies beside it."""
    detected = resolution.detected
    yield _read("transformer", detected.path, list(detected.tensors.values()))
    places = {"vae": resolution.vae_path, "text_encoder": resolution.text_path}
    for component, place in places.items():
        if place is not None and place.is_dir():
            files = [f for f in sorted(place.iterdir()) if f.suffix in WEIGHT_SUFFIXES]
            yield _read(component, place, [i for f in files for i in read_header(f).values()])
        elif place is not None:
            yield _read(component, place, list(part_of(place, component).values()))


def _read(component: str, path: Path, tensors: Sequence[TensorInfo]) -> Numbers:
    faults, largest = [], (0.0, "")
    with WeightReader() as reader:
        for info in tensors:
            if not info.dtype.is_floating_point:
                continue
            weight = reader.read(info)
            magnitude = largest_magnitude(weight)
            if math.isfinite(magnitude):
                largest = max(largest, (magnitude, info.key))
            elif (fault := weight_fault(info.key, weight)) is not None:
                faults.append(fault)
    return Numbers(component, path, len(tensors), tuple(faults), largest)


def _problem(resolution: Resolution, numbers: Iterable[Numbers]) -> str | None:
    try:
        resolution.require_loadable()
        for found in numbers:
            refuse_weights(found.path, found.faults)
    except CheckpointError as error:
        return f"no: {error}"
    return None


def _config_lines(config: TransformerConfig) -> list[str]:
    fields = dataclasses.asdict(config)
    merger, history = fields.pop("merger"), fields.pop("history")
    lines = [f"{key} {value}" for key, value in fields.items()]
    if history is not None:
        said = ", ".join(f"{key} {value}" for key, value in history.items())
        lines.append(f"history {said}: `--history RATE` remembers by it")
    if merger is None:
        lines.append("merger none, average pooling")
    else:
        lines.append("merger " + ", ".join(f"{key} {value}" for key, value in merger.items()))
    return lines


def _section(title: str, items: Sequence[str]) -> list[str]:
    """A title with its items one a line; nothing said when there are none."""
    if not items:
        return []
    lines = [f"{title:<12} {len(items)}"]
    lines += [f"             {item}" for item in items[:_SHOWN]]
    if len(items) > _SHOWN:
        lines.append(f"             and {len(items) - _SHOWN} more")
    return lines
