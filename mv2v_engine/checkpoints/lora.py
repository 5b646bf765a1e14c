"""LoRAs: what a file changes of a transformer's weights, told from its header, and the change.

A file holds low-rank products `M.lora_A`, `M.lora_B` (or `lora_down`, `lora_up`; scaled by
`M.alpha` over the rank where it is there) and whole differences: `M.diff` of a weight, `M.diff_b`
of a bias, `M.diff_m` of a modulation. Modules M are under Wan's names or diffusers', dotted or with
underscores (kohya, musubi), below any of the prefixes that trainers write. What is no change to a
Wan transformer is named, and refused when it is loaded.

Merging adds strength * (alpha / rank) * B A to the stored weight in float32, before the weight is
cast: captured graphs, kept K and V and quantisation see an ordinary transformer.

r rank of a product.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mv2v_engine.checkpoints.fetch import fetch_file
from mv2v_engine.checkpoints.identify import of_tensors
from mv2v_engine.checkpoints.names import Naming, bare, block_of, parameter_of
from mv2v_engine.checkpoints.weights import (
    WEIGHT_SUFFIXES,
    TensorInfo,
    WeightReader,
    read_header,
    read_metadata,
)
from mv2v_engine.errors import CheckpointError, first_of
from mv2v_engine.files import file_digest
from mv2v_engine.finite import refuse_weights, weight_fault

Shape = tuple[int, ...]

_PREFIX = re.compile(
    r"^(?:(?:base_model|model|diffusion_model|transformer|unet|lora_unet|lycoris|pipe|dit)[._]+)+"
)
# where a trainer of causal models (LongLive) keeps the model's; beside it may lie its critic's
_GENERATOR = "generator_lora."
# PEFT writes the adapter's name before `weight`, where there may be several
_KEY = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<side>A|B|down|up)(?:\.\w+)?\.weight"
    r"|(?P<leaf>alpha|diff|diff_b|diff_m))"
)
_SIDES = {"A": "down", "down": "down", "B": "up", "up": "up"}
_WHOLE = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
_OF_DIFFUSERS = re.compile(r"attn[12][._]|ffn[._]net|condition_embedder|proj_out|scale_shift_table")
# what other adapters write, whose change is no sum of products
_OTHER_KINDS = (
    (r"dora_scale|lora_magnitude_vector", "a DoRA, which rescales the weights it changes"),
    (r"hada_w", "a LoHa, a product of two low-rank products"),
    (r"lokr_", "a LoKr, a Kronecker product"),
    (r"lora_mid|oft_|\.ia3_|glora", "another kind of adapter than a LoRA"),
)
_IMAGE = re.compile(r"k_img|v_img|img_emb|add_[kv]_proj|image_embedder")
_EXPERT = re.compile(r"(?i)(high|low)[-_ ]?noise")
_SHOWN = 4
_SLAB = 1 << 20


@dataclass(frozen=True, slots=True)
class Change:
    """What a LoRA adds to one parameter at strength 1.

    up [rows, r] and down [r, columns]: factors of the product that is scaled by `scale`; a
    convolution's have further axes. whole: a difference of the parameter's own shape. Each pair, or
    the difference, may be None.
    """

    up: TensorInfo | None = None
    down: TensorInfo | None = None
    scale: float = 1.0
    whole: TensorInfo | None = None

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """The tensors that it is made of."""
        return tuple(info for info in (self.up, self.down, self.whole) if info is not None)

    @property
    def rank(self) -> int | None:
        """The product's rank, None without one."""
        return None if self.down is None else self.down.shape[0]

    def fits(self, shape: Shape) -> bool:
        """Whether it can be added to a parameter of this shape."""
        numel = math.prod(shape)
        if self.whole is not None and (self.whole.num_elements != numel):
            return False
        if self.up is None or self.down is None:
            return True
        rows, columns = self.up.shape[0], math.prod(self.down.shape[1:])
        return bool(shape) and rows == shape[0] and rows * columns == numel

    @property
    def words(self) -> str:
        """Its shape, for errors."""
        if self.up is not None and self.down is not None:
            return f"{list(self.up.shape)} x {list(self.down.shape)}"
        return str(list(self.infos[0].shape))


@dataclass(frozen=True)
class Lora:
    """A LoRA file by its header.

    digest: SHA-256 of the file. changes: by our names of parameters. unknown: keys that change
    nothing of a Wan transformer. dropped: keys of differences that are zero. naming: whose names it
    has. strength: what every change is multiplied with.
    """

    path: Path
    digest: str
    naming: Naming
    changes: Mapping[str, Change] = field(repr=False)
    unknown: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    strength: float = 1.0

    @property
    def name(self) -> str:
        """What tells it from others in a checkpoint's name: file, strength, and content."""
        return f"{self.path.stem}:{self.strength:g}@{self.digest[:8]}"

    @property
    def num_blocks(self) -> int:
        """Blocks of the transformer that it was made for, as far as it changes them."""
        return _depth(self.changes)

    @property
    def width(self) -> int | None:
        """Channels of the transformer that it was made for; None if no product tells."""
        for name, change in self.changes.items():
            if change.up is not None and change.down is not None:
                if re.fullmatch(r"(vace_)?blocks\.\d+\.attn[12]\.to_(q|out\.0)\.weight", name):
                    return change.up.shape[0]
                if name.endswith(".ffn.net.0.proj.weight"):
                    return math.prod(change.down.shape[1:])
        return None

    @property
    def line(self) -> str:
        """What it changes, in words."""
        ranks = sorted({change.rank for change in self.changes.values() if change.rank})
        rank = f" of rank {' and '.join(map(str, ranks))}" if ranks else ""
        products = sum(change.up is not None for change in self.changes.values())
        wholes = sum(change.whole is not None for change in self.changes.values())
        parts = [f"{products} products{rank}"] if products else []
        parts += [f"{wholes} whole differences"] if wholes else []
        return " and ".join(parts)

    @property
    def sentence(self) -> str:
        """What it is, in one sentence."""
        whose = "diffusers'" if self.naming == "diffusers" else "Wan's own"
        width = "" if self.width is None else f" of {self.width:,} channels"
        made_for = f"a Wan transformer of {self.num_blocks} blocks{width}"
        if not self.num_blocks and any(name.startswith("vace_") for name in self.changes):
            made_for = f"the VACE blocks of a Wan transformer{width}"
        return (
            f"a LoRA under {whose} names: {self.line}, for {made_for}; give it as --lora with its "
            "base as --checkpoint"
        )

    def to_dict(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"file": self.path.name, "sha256": self.digest, "strength": self.strength}

    def require_whole(self) -> None:
        """Refuse a file that changes what no Wan transformer has.

        Raises:
            CheckpointError: names the first of the keys.
        """
        if not self.unknown:
            return
        kind = " (an image-to-video model's)" if any(map(_IMAGE.search, self.unknown)) else ""
        raise CheckpointError(
            f"{self.path} has {len(self.unknown)} keys that change nothing of a text-to-video Wan "
            f"transformer{kind}: {first_of(self.unknown)}; expected a LoRA of one alone, give one "
            "that was made for this base, or a file without these keys"
        )

    def require_fit(self, stored: Mapping[str, Shape], base: str) -> None:
        """Refuse a LoRA of another base.

        stored: the shapes of a checkpoint's parameters by our names. base: the checkpoint's name.

        Raises:
            CheckpointError: what it changes, and what there is.
        """
        self.require_whole()
        depth = _depth(stored)
        width = stored.get("blocks.0.attn1.to_q.weight", (0,))[0]
        wider = self.width is not None and self.width != width
        if wider or self.num_blocks > depth:
            own = "" if self.width is None else f" of {self.width:,} channels"
            raise CheckpointError(
                f"{self.path} is a LoRA for a transformer of {self.num_blocks} blocks{own}, and "
                f"{base} has {depth} of {width:,}; give one that was made for this base, or the "
                "base that it was made for as --checkpoint"
            )
        wrong = [
            f"{name} by {change.words}, which {base} has "
            + (f"as {list(stored[name])}" if name in stored else "not")
            for name, change in self.changes.items()
            if name not in stored or not change.fits(stored[name])
        ]
        if wrong:
            raise CheckpointError(
                f"{self.path} is a LoRA of another base: it changes {len(wrong)} parameters that "
                f"do not fit, {'; '.join(wrong[:2])}; give one that was made for this base"
            )


def lora_pair(text: str) -> tuple[str, float]:
    """FILE[:strength] as its parts; a file whose name ends so is the whole of it."""
    path, mark, tail = text.rpartition(":")
    if mark and path and not Path(text).expanduser().exists():
        try:
            return path, float(tail)
        except ValueError:
            pass
    return text, 1.0


def find_lora(name: Path | str) -> Path:
    """The file of a LoRA: itself, a hub's, or the one weight file of a folder, as PEFT writes it.

    Raises:
        CheckpointError: nothing there, or a folder of several; as `fetch_file`.
        StorageError: the disk has no room for a hub's.
    """
    path = fetch_file(name).expanduser()
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
            if len(files) == 1:
                return files[0]
            there = ", ".join(file.name for file in files[:_SHOWN]) or "none"
            raise CheckpointError(
                f"{path} is a folder with {len(files)} weight files ({there}); give the LoRA's file"
            )
        if not path.exists():
            raise CheckpointError(
                f"no LoRA at {str(name)!r}; expected a .safetensors file, the folder of one, or a "
                "hub's owner/name[:file]"
            )
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return path


def find_loras(pairs: Iterable[tuple[Path | str, float]]) -> tuple[Lora, ...]:
    """The LoRAs of a configuration, by their headers.

    Raises:
        CheckpointError: nothing there, or no LoRA of a Wan transformer.
    """
    return tuple(read_lora(find_lora(name), strength) for name, strength in pairs)


def read_lora(path: Path, strength: float = 1.0) -> Lora:
    """What a file changes; reads its header, its scales, and those differences that are vectors.

    Raises:
        CheckpointError: it is no LoRA, another kind of adapter, or half of it is missing.
    """
    header = read_header(path)
    header = {k: info for k, info in header.items() if k.startswith(_GENERATOR)} or header
    inner = {key: bare(key.removeprefix(_GENERATOR)) for key in header}
    matches = {key: _KEY.fullmatch(_PREFIX.sub("", name)) for key, name in inner.items()}
    _require_lora(path, header, matches)
    modules = [match["module"] for match in matches.values() if match is not None]
    is_theirs = any(map(_OF_DIFFUSERS.search, modules))
    naming: Naming = "diffusers" if is_theirs else "original"
    found: dict[str, dict[str, TensorInfo]] = {}
    unknown = []
    with WeightReader() as reader:
        # differences that are none, as those of norms are that this transformer does not have
        zeros = {
            key
            for key, info in header.items()
            if key.endswith((".diff", ".diff_b"))
            and len(info.shape) == 1
            and not bool(reader.read(info).any())
        }
    for key, match in matches.items():
        if key in zeros:
            continue
        name = None if match is None else _parameter(match, naming)
        if match is None or name is None:
            unknown.append(key)
            continue
        part = _SIDES.get(match["side"] or "") or ("alpha" if match["leaf"] == "alpha" else "whole")
        parts = found.setdefault(name, {})
        if part in parts:
            raise CheckpointError(
                f"{path}: {parts[part].key!r} and {key!r} both change {name!r}; expected one "
                "adapter in a file, save each of them by itself"
            )
        parts[part] = header[key]
    with WeightReader() as reader:
        config = _AdapterConfig.read(path)
        changes = {name: _change(name, parts, reader, config) for name, parts in found.items()}
    return Lora(
        path=path,
        digest=file_digest(path),
        naming=naming,
        changes=changes,
        unknown=tuple(unknown),
        dropped=tuple(zeros),
        strength=strength,
    )


@dataclass(frozen=True)
class _AdapterConfig:
    """What PEFT says beside a file, or diffusers in its header, of the scale of its products."""

    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    is_root: bool = False

    @classmethod
    def read(cls, path: Path) -> _AdapterConfig:
        beside, words = path.parent / "adapter_config.json", None
        try:
            if path.stem == "adapter_model" and beside.is_file():
                words = json.loads(beside.read_text(encoding="utf-8"))
            elif (said := read_metadata(path).get("lora_adapter_metadata")) is not None:
                named = json.loads(said)
                words = {key.removeprefix("transformer."): value for key, value in named.items()}
            if words is None:
                return cls()
            alpha, alphas = words.get("lora_alpha"), dict(words.get("alpha_pattern") or {})
            if words.get("use_dora"):
                raise CheckpointError(f"{path} is {_OTHER_KINDS[0][1]}; {_EXPECTED}")
            numbers = [value for value in (alpha, *alphas.values()) if value is not None]
            if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
                raise ValueError(f"lora_alpha is {alpha!r}")
            return cls(alpha, alphas, bool(words.get("use_rslora")))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{path}: its adapter's settings cannot be read ({error}); expected PEFT's "
                "adapter_config.json with a number as lora_alpha, save it again"
            ) from error

    def scale(self, module: str, rank: int) -> float:
        """The alpha of a product without one of its own. module: as the file names it."""
        matching = (a for end, a in self.alphas.items() if re.search(rf"(^|\.)({end})$", module))
        alpha = next(matching, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.is_root else rank)


_EXPECTED = (
    "expected low-rank products (lora_A and lora_B, or lora_down and lora_up) and differences: "
    "merge it into its base with the tool that made it and give the result as --checkpoint"
)


def _require_lora(
    path: Path, header: Mapping[str, TensorInfo], matches: Mapping[str, re.Match[str] | None]
) -> None:
    for pattern, what in _OTHER_KINDS:
        if key := next(filter(re.compile(pattern).search, header), None):
            raise CheckpointError(f"{path} is {what} ({key}); {_EXPECTED}")
    changing = [match["module"] for match in matches.values() if match is not None]
    if not changing:
        shapes = {key: info.shape for key, info in header.items()}
        what = of_tensors(shapes) or f"no LoRA (first keys: {', '.join(list(header)[:3])})"
        if any(re.search(r"blocks\.0\.(self_attn|attn1)\.", key) for key in header):
            what = "a transformer's weights and no change to them: give it as --checkpoint"
        raise CheckpointError(f"{path} is {what}; expected a LoRA of a Wan transformer")
    if not any(re.match(r"(vace_)?blocks[._]\d+[._]|head|proj_out", module) for module in changing):
        raise CheckpointError(
            f"{path} is a LoRA of another model than Wan (first keys: "
            f"{', '.join(list(header)[:3])}); expected changes to blocks.N.self_attn, cross_attn "
            "and ffn"
        )
    for name in (path.stem, path.resolve().parent.name):
        if _EXPERT.search(name):
            raise CheckpointError(
                f"{path} is, by its name, one of the two LoRAs of Wan2.2 A14B's experts; this "
                "engine runs one transformer for all steps: expected a LoRA of a whole one (rename "
                "it if it is one)"
            )


def _parameter(match: re.Match[str], naming: Naming) -> str | None:
    """Our name of what a key changes."""
    if _IMAGE.search(match["module"]):
        return None  # no base that a LoRA is made for has them
    module, leaf = match["module"], _WHOLE.get(match["leaf"] or "", "weight")
    if leaf == "modulation" and naming == "diffusers":
        leaf = "scale_shift_table"
    named = parameter_of(f"{module}.{leaf}", naming)
    # a difference of a parameter that is no module's, such as a modulation
    return named or (parameter_of(module, naming) if match["leaf"] == "diff" else None)


def _change(
    name: str, parts: Mapping[str, TensorInfo], reader: WeightReader, config: _AdapterConfig
) -> Change:
    for info in parts.values():
        if not info.dtype.is_floating_point and info is not parts.get("alpha"):
            raise CheckpointError(
                f"{info.file} stores {info.key} as {info.kind}; expected floating-point numbers"
            )
    up, down, whole = parts.get("up"), parts.get("down"), parts.get("whole")
    if up is None and down is None:
        if whole is None:
            raise _incomplete(parts["alpha"], "a scale, and no product that it scales")
        return Change(whole=whole)
    if up is None or down is None:
        there = up or down
        assert there is not None
        raise _incomplete(there, "one factor of a product, and the other is missing")
    rank = down.shape[0] if len(down.shape) > 1 else 0
    if len(up.shape) < 2 or math.prod(up.shape[1:]) != rank or not rank:
        raise _incomplete(up, f"{list(up.shape)}, and {down.key} {list(down.shape)}: no product")
    alpha = parts.get("alpha")
    if alpha is None:
        module = re.split(r"\.lora_", bare(down.key))[0]
        return Change(up, down, config.scale(module, rank), whole)
    value = float(reader.read(alpha)) if alpha.num_elements == 1 else math.nan
    if not math.isfinite(value):
        raise _incomplete(alpha, f"{list(alpha.shape)}, no finite number to scale {name} by")
    return Change(up, down, value / rank, whole)


def _incomplete(info: TensorInfo, what: str) -> CheckpointError:
    return CheckpointError(
        f"{info.file}: {info.key} is {what}; expected lora_A [r, columns] and lora_B [rows, r] of "
        "every layer, copy or download the file again"
    )


class LoraMerger:
    """Adds what LoRAs change to weights as they are loaded. A context manager.

    Files are read in streams, each by a reader of its own. check_weights: look for numbers that are
    not finite in them.
    """

    def __init__(self, loras: Sequence[Lora], *, check_weights: bool) -> None:
        self._loras, self._checks = loras, check_weights
        self._readers = [WeightReader() for _ in loras]
        self._faults: list[list[str]] = [[] for _ in loras]
        self._stack = ExitStack()

    def __enter__(self) -> LoraMerger:
        for reader in self._readers:
            self._stack.enter_context(reader)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def changes(self, name: str) -> bool:
        """Whether any of them changes a parameter."""
        return any(name in lora.changes for lora in self._loras)

    @torch.no_grad()
    def merged(
        self, name: str, stored: Tensor, *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A parameter with their changes, which are added in float32.

        stored: the parameter as its file has it, of any dtype. dtype, device: of the result.
        """
        parts = list(self._parts(name, stored.shape, device))
        # rows are merged in slabs that stay in a processor's cache
        rows = stored.reshape(len(stored), -1)
        result = torch.empty(rows.shape, dtype=dtype, device=device)
        height = max(1, _SLAB // rows.shape[1])
        slab = torch.empty(height, rows.shape[1], dtype=torch.float32, device=device)
        for first in range(0, len(rows), height):
            place = slice(first, first + height)
            own = slab[: len(rows[place])]
            own.copy_(rows[place])
            for factors, scale in parts:
                if len(factors) == 1:
                    own.add_(factors[0][place], alpha=scale)
                else:
                    own.addmm_(factors[0][place], factors[1], alpha=scale)
            result[place] = own
        return result.reshape(stored.shape)

    def require_finite(self) -> None:
        """Refuse files whose numbers were not finite.

        Raises:
            CheckpointError: names the tensors.
        """
        for lora, faults in zip(self._loras, self._faults, strict=True):
            refuse_weights(lora.path, faults)

    def _parts(
        self, name: str, shape: Shape, device: torch.device
    ) -> Iterator[tuple[tuple[Tensor, ...], float]]:
        """What is added to a parameter as rows: a difference, or two factors; and how often."""
        for number, lora in enumerate(self._loras):
            change = lora.changes.get(name)
            if change is None:
                continue
            if change.whole is not None:
                whole = self._read(number, change.whole, device).reshape(shape[0], -1)
                yield (whole,), lora.strength
            if change.up is not None and change.down is not None:
                up = self._read(number, change.up, device).flatten(1)
                down = self._read(number, change.down, device).flatten(1)
                yield (up, down), lora.strength * change.scale

    def _read(self, number: int, info: TensorInfo, device: torch.device) -> Tensor:
        tensor = self._readers[number].read(info).to(device, torch.float32)
        if self._checks and (fault := weight_fault(info.key, tensor)) is not None:
            self._faults[number].append(fault)
        return tensor


def _depth(names: Iterable[str]) -> int:
    """One more than the last block that parameters name."""
    blocks = [block for name in names if (block := block_of(name)) is not None]
    return max(blocks, default=-1) + 1
