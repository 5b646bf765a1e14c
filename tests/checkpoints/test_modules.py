"""Modules of unknown names: what shapes and order decide, and what they leave open."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mv2v_engine.checkpoints.modules import assign_modules, read_extras, read_merger
from mv2v_engine.checkpoints.weights import TensorInfo
from mv2v_engine.config import MergerConfig
from mv2v_engine.errors import CheckpointError

C = 64
Shapes = dict[str, tuple[int, ...]]


def infos(shapes: Shapes) -> list[TensorInfo]:
    return [TensorInfo(key, Path("m"), shape, torch.float32) for key, shape in shapes.items()]


def assign(shapes: Shapes, *, ordered: bool = True, blocks: tuple[int, ...] = (10, 20)):
    return assign_modules(
        infos(shapes), width=C, in_channels=16, merge_blocks=blocks, ordered=ordered
    )


@pytest.mark.parametrize(
    ("shape", "kernel", "groups", "pooled", "as_shape"),
    [
        ((C, C, 2, 2), (2, 2), 1, False, (C, C, 2, 2)),
        ((C, C, 3, 3), (3, 3), 1, False, (C, C, 3, 3)),
        ((C, C, 1, 2, 2), (2, 2), 1, False, (C, C, 2, 2)),
        ((C, 1, 2, 2), (2, 2), C, False, (C, 1, 2, 2)),
        ((C, C // 4, 2, 1), (2, 1), 4, False, (C, C // 4, 2, 1)),
        ((C, C, 2), (1, 2), 1, False, (C, C, 1, 2)),
        ((C, 1, 4), (1, 4), C, False, (C, 1, 1, 4)),
        ((C, C), (2, 2), 1, True, (C, C)),
        ((C, C, 1, 1), (2, 2), 1, True, (C, C)),
        ((C, 4 * C), (2, 2), 1, False, (C, C, 2, 2)),
    ],
)
def test_merger_shapes(shape, kernel, groups, pooled, as_shape) -> None:
    reading = read_merger(shape, C)
    assert reading is not None
    assert (reading.kernel, reading.groups, reading.pooled) == (kernel, groups, pooled)
    assert reading.shape == as_shape
    assert reading.is_cells == (shape == (C, 4 * C))


@pytest.mark.parametrize(
    "shape", [(C,), (2 * C, C), (C, 2 * C), (C, C, 2, 2, 2), (C, 1, 1, 1), (C, 7, 2, 2), (C, 0, 2)]
)
def test_other_shapes_are_no_mergers(shape) -> None:
    assert read_merger(shape, C) is None


def test_tokenizers_by_kernel_four_and_five_axes() -> None:
    found = assign({"x.0.weight": (C, 16, 8, 8), "y.w": (C, 16, 1, 2, 2), "y.b": (C,)})
    assert found.names == {
        "x.0.weight": "tokenizers.8.weight",
        "y.w": "tokenizers.2.weight",
        "y.b": "tokenizers.2.bias",
    }
    assert not found.undecided


def test_one_merger_is_shared_and_two_follow_the_order() -> None:
    assert assign({"down.weight": (C, C)}).names == {"down.weight": "mergers.10.weight"}
    two = assign({"late.weight": (C, C), "early.weight": (C, C)})
    assert two.names == {"late.weight": "mergers.10.weight", "early.weight": "mergers.20.weight"}


def test_numbers_order_even_where_the_file_does_not() -> None:
    found = assign({"d.10.weight": (C, C), "d.2.weight": (C, C)}, ordered=False)
    assert found.names == {"d.2.weight": "mergers.10.weight", "d.10.weight": "mergers.20.weight"}


def test_words_do_not_order_a_safetensors_file() -> None:
    found = assign({"early.weight": (C, C), "late.weight": (C, C)}, ordered=False)
    assert not found.names
    assert "early.weight [64, 64] or late.weight [64, 64]" in found.undecided[0]


def test_block_numbers_in_names_win() -> None:
    found = assign({"blocks.5.down.weight": (C, 1, 2, 2), "blocks.9.down.weight": (C, 1, 2, 2)})
    assert set(found.names.values()) == {"mergers.5.weight", "mergers.9.weight"}


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"a.weight": (C, 16, 1, 4, 4), "b.weight": (C, 16, 1, 4, 4)}, "tokenizers.4: a.weight"),
        ({"a.weight": (C, C), "b.weight": (C, C), "c.weight": (C, C)}, "merging blocks 10, 20"),
        ({"a.weight": (C, C), "b.weight": (C, 1, 2, 2)}, "mergers of one shape"),
        ({"a.weight": (C, 3 * C)}, "neither a tokenizer nor a merger"),
        ({"norm.weight": (C,), "norm.bias": (C,)}, "not one weight"),
        ({"a.weight": (C, C), "a.bias": (2 * C,)}, "not one weight"),
        ({"a.0": (C, C), "a.1": (C, C)}, "not one weight"),
    ],
)
def test_what_shapes_leave_open(shapes: Shapes, says: str) -> None:
    found = assign(shapes)
    assert not found.names and says in found.undecided[0]


def test_equal_widths_make_a_dense_merger_a_tokenizer_too() -> None:
    found = assign_modules(
        infos({"a.weight": (C, C, 2, 2)}),
        width=C,
        in_channels=C,
        merge_blocks=(1,),
        ordered=True,
    )
    assert "tokenizers.2 or a merger" in found.undecided[0]


def extras(shapes: Shapes):
    named = dict(zip(shapes, infos(shapes), strict=True))
    return read_extras(named, width=C, default_blocks=(10, 20))


def test_extras_shared_and_per_block() -> None:
    patches, merger, blocks, _ = extras(
        {"tokenizers.4.weight": (C, 16, 4, 4), "mergers.10.weight": (C, C), "mergers.10.bias": (C,)}
    )
    assert patches == (4,) and blocks == (10, 20)
    assert merger == MergerConfig(pooled=True, shared=True)
    _, merger, blocks, _ = extras({"mergers.3.weight": (C, 1, 2), "mergers.5.weight": (C, 1, 2)})
    assert blocks == (3, 5)
    assert merger == MergerConfig(kernel=(1, 2), groups=C, bias=False)
    assert extras({})[1:3] == (None, (10, 20))


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"mergers.10.weight": (C, C), "mergers.20.weight": (C, 1, 2, 2)}, "mergers differ"),
        ({"mergers.10.weight": (C, 3)}, r"mergers\.10 cannot be mergers\.10\.weight \[64, 3\]"),
        ({"mergers.10.bias": (C,)}, "a bias alone"),
    ],
)
def test_unfit_mergers_are_refused(shapes: Shapes, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        extras(shapes)
