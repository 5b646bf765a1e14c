"""Conditioning tokenizers and token mergers read off their weights' shapes.

The released memory checkpoint names these modules in a way not known here, and its kernel,
sharing and bias are written nowhere: shapes and order decide, and what they leave open is an
error that lists the candidates. A stride is not recorded in weights; it is taken equal to the
kernel, as METHOD 3 and 7 have it.

C transformer width, k spatial patch of a tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mv2v_engine.checkpoints.names import block_of
from mv2v_engine.checkpoints.weights import TensorInfo
from mv2v_engine.config import MergerConfig
from mv2v_engine.errors import CheckpointError

_PATCHES = (2, 4, 8)
_DECIDE = 'give rename=FILE with JSON {"their.key": "tokenizers.4" or "mergers.10"}, null to drop'

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """One parameter's place in a file and the shape it takes in the model.

    is_cells: a [C, 4C] linear layer over four concatenated cells in row-major order, which is
    the 2x2 convolution of the same weights. is_first: the shape has fewer input channels than the
    file's tensor, its first ones.
    """

    info: TensorInfo
    shape: Shape
    is_cells: bool = False
    is_first: bool = False


@dataclass(frozen=True, slots=True)
class MergerReading:
    """What a merger's weight says: kernel, groups, and how its tensor becomes the model's."""

    kernel: tuple[int, int]
    groups: int
    pooled: bool
    shape: Shape
    is_cells: bool = False


@dataclass
class Assignment:
    """Unknown modules mapped to ours: keys to names, and what could not be decided."""

    names: dict[str, str] = field(default_factory=dict)
    undecided: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Module:
    """A weight and its bias under one prefix."""

    prefix: str
    weight: TensorInfo
    bias: TensorInfo | None


def tokenizer_patch(shape: Shape, width: int, in_channels: int) -> int | None:
    """k of a tokenizer's weight [C, in, 1, k, k] or [C, in, k, k]; None when it is none."""
    for k in _PATCHES:
        if shape in ((width, in_channels, 1, k, k), (width, in_channels, k, k)):
            return k
    return None


def read_merger(shape: Shape, width: int) -> MergerReading | None:
    """Kernel and kind of a merger's weight; None when the shape fits no merger.

    [C, C/groups, kh, kw] a convolution, also with a leading kernel of one frame or, with three
    axes, one row; [C, C] (or a 1x1 convolution) a linear layer after average pooling; [C, 4C] a
    linear layer over the four cells of a 2x2 window.
    """
    if len(shape) < 2 or shape[0] != width:
        return None
    if shape == (width, width):
        return MergerReading((2, 2), 1, True, shape)
    if shape == (width, 4 * width):
        return MergerReading((2, 2), 1, False, (width, width, 2, 2), is_cells=True)
    inner, spatial = shape[1], shape[2:]
    if len(spatial) == 3 and spatial[0] == 1:
        spatial = spatial[1:]
    if len(spatial) == 1:
        spatial = (1, spatial[0])
    if len(spatial) != 2 or inner < 1 or width % inner:
        return None
    if spatial == (1, 1):
        return MergerReading((2, 2), 1, True, (width, width)) if inner == width else None
    kernel = (spatial[0], spatial[1])
    return MergerReading(kernel, width // inner, False, (width, inner, *kernel))


def assign_modules(
    tensors: Iterable[TensorInfo],
    *,
    width: int,
    in_channels: int,
    merge_blocks: tuple[int, ...],
    ordered: bool,
) -> Assignment:
    """Map modules of unknown names to tokenizers and mergers by shape, then order.

    Args:
        tensors: the unknown keys, in the file's order.
        merge_blocks: where a model of this depth merges unless the names say otherwise.
        ordered: whether the file keeps its modules' order (pickles do, safetensors does not).
    """
    result = Assignment()
    tokenizers: dict[int, list[_Module]] = {}
    mergers: list[_Module] = []
    for module in _group(tensors, width, result):
        k = tokenizer_patch(module.weight.shape, width, in_channels)
        merger = read_merger(module.weight.shape, width)
        if k is not None and merger is not None and in_channels == width:
            result.undecided.append(f"{_say(module)}: tokenizers.{k} or a merger")
        elif k is not None:
            tokenizers.setdefault(k, []).append(module)
        elif merger is not None:
            mergers.append(module)
        else:
            result.undecided.append(f"{_say(module)}: neither a tokenizer nor a merger")
    for k, modules in sorted(tokenizers.items()):
        if len(modules) == 1:
            _name(modules[0], f"tokenizers.{k}", result)
        else:
            listed = " or ".join(map(_say, modules))
            result.undecided.append(f"tokenizers.{k}: {listed}")
    kinds = {(read_merger(m.weight.shape, width), m.bias is None) for m in mergers}
    if len(kinds) > 1:
        listed = " or ".join(map(_say, mergers))
        result.undecided.append(f"mergers of one shape and bias: {listed}")
    elif mergers:
        _place_mergers(mergers, merge_blocks, ordered, result)
    return result


def require_decided(undecided: Iterable[str], path: object) -> None:
    """Raise for what `assign_modules` left open, listing the candidates."""
    undecided = list(undecided)
    if undecided:
        more = f" and {len(undecided) - 6} more" if len(undecided) > 6 else ""
        raise CheckpointError(
            f"{path} has modules whose role the shapes do not decide: "
            f"{'; '.join(undecided[:6])}{more}; {_DECIDE}"
        )


def read_extras(
    infos: Mapping[str, TensorInfo], *, width: int, default_blocks: tuple[int, ...]
) -> tuple[tuple[int, ...], MergerConfig | None, tuple[int, ...], dict[str, Source]]:
    """Tokenizer patches, merger config, merging blocks and sources of modules by our names.

    Raises:
        CheckpointError: mergers of different shapes, or a weight that is no merger's.
    """
    patches = sorted({int(n.split(".")[1]) for n in infos if n.startswith("tokenizers.")})
    sources: dict[str, Source] = {}
    for name, info in infos.items():
        if name.startswith("tokenizers."):
            shape = info.shape
            sources[name] = Source(info, (*shape[:2], 1, *shape[2:]) if len(shape) == 4 else shape)
    blocks = tuple(sorted({int(n.split(".")[1]) for n in infos if n.startswith("mergers.")}))
    readings = set()
    for block in blocks:
        weight = infos.get(f"mergers.{block}.weight")
        reading = read_merger(weight.shape, width) if weight else None
        if weight is None or reading is None:
            got = f"{weight.key} {list(weight.shape)}" if weight else "a bias alone"
            raise CheckpointError(
                f"mergers.{block} cannot be {got}; expected [C, C/groups, rows, columns], "
                f"[C, C] or [C, 4C] with C = {width}"
            )
        sources[f"mergers.{block}.weight"] = Source(weight, reading.shape, reading.is_cells)
        bias = infos.get(f"mergers.{block}.bias")
        if bias is not None:
            sources[f"mergers.{block}.bias"] = Source(bias, bias.shape)
        readings.add((reading.kernel, reading.groups, reading.pooled, bias is not None))
    if not blocks:
        return tuple(patches), None, default_blocks, sources
    if len(readings) > 1:
        listed = "; ".join(
            f"mergers.{b} {list(infos[f'mergers.{b}.weight'].shape)}" for b in blocks
        )
        raise CheckpointError(f"the mergers differ ({listed}); expected one shape and bias for all")
    kernel, groups, pooled, has_bias = readings.pop()
    shared = blocks == default_blocks[:1] and len(default_blocks) > 1
    config = MergerConfig(kernel=kernel, groups=groups, bias=has_bias, pooled=pooled, shared=shared)
    return tuple(patches), config, default_blocks if shared else blocks, sources


def _group(tensors: Iterable[TensorInfo], width: int, result: Assignment) -> list[_Module]:
    """Weights and biases by prefix; what does not pair up becomes undecided."""
    groups: dict[str, list[TensorInfo]] = {}
    for info in tensors:
        groups.setdefault(info.key.rpartition(".")[0], []).append(info)
    modules = []
    for prefix, infos in groups.items():
        weights = [i for i in infos if len(i.shape) >= 2]
        biases = [i for i in infos if len(i.shape) < 2]
        fits = not biases or (len(biases) == 1 and biases[0].shape == (width,))
        if len(weights) == 1 and fits:
            modules.append(_Module(prefix, weights[0], biases[0] if biases else None))
        else:
            listed = ", ".join(f"{i.key} {list(i.shape)}" for i in infos[:4])
            result.undecided.append(f"{listed}: not one weight with at most one bias [{width}]")
    return modules


def _place_mergers(
    mergers: list[_Module], merge_blocks: tuple[int, ...], ordered: bool, result: Assignment
) -> None:
    if len(mergers) == 1:
        # one module serves every merging block, unless it lies inside a certain one
        block = block_of(mergers[0].weight.key)
        first = merge_blocks[0] if merge_blocks else 0
        _name(mergers[0], f"mergers.{first if block is None else block}", result)
        return
    named = [block_of(module.weight.key) for module in mergers]
    if None not in named and len(set(named)) == len(named):
        for block, module in zip(named, mergers, strict=True):
            _name(module, f"mergers.{block}", result)
        return
    numbered = len({re.sub(r"\d+", "#", module.prefix) for module in mergers}) == 1
    if len(mergers) == len(merge_blocks) and (numbered or ordered):
        if numbered:
            mergers = sorted(mergers, key=lambda m: [int(d) for d in re.findall(r"\d+", m.prefix)])
        for block, module in zip(merge_blocks, mergers, strict=True):
            _name(module, f"mergers.{block}", result)
        return
    blocks = ", ".join(map(str, merge_blocks))
    result.undecided.append(f"merging blocks {blocks}: {' or '.join(map(_say, mergers))}")


def _name(module: _Module, name: str, result: Assignment) -> None:
    result.names[module.weight.key] = f"{name}.weight"
    if module.bias is not None:
        result.names[module.bias.key] = f"{name}.bias"


def _say(module: _Module) -> str:
    return f"{module.weight.key} {list(module.weight.shape)}"
