"""No move of code changes a turn: every mode's latents are those of the golden file."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from tests.golden.latents import FILE, all_latents, differing, told

GOLDEN = json.loads(FILE.read_text())
# of a tensor's root mean square: sums in another order on another processor, through blocks and
# steps; bfloat16 rounds every product
ROUNDING, COARSE = 2e-3, 0.2


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return all_latents(tmp_path_factory.mktemp("golden"))


def test_every_mode_is_in_the_file(latents: dict[str, Tensor]) -> None:
    assert latents.keys() == GOLDEN.keys()
    # and none of them is another one's twin, but where chunks must not matter
    distinct = {str(told(tensor)["values"]) for tensor in latents.values()}
    assert len(distinct) == len(latents) - 1


@pytest.mark.parametrize("name", GOLDEN)
def test_latents_are_the_golden_ones(latents: dict[str, Tensor], name: str) -> None:
    golden, own = GOLDEN[name], told(latents[name])
    assert own["shape"] == golden["shape"]
    tolerance = COARSE if "bfloat16" in name else ROUNDING
    scale = golden["norm"] / latents[name].numel() ** 0.5
    wrong = (torch.tensor(own["values"]) - torch.tensor(golden["values"])).abs().max()
    assert wrong <= tolerance * scale, f"off by {wrong:.2g}, of values of size {scale:.2g}"
    assert abs(own["norm"] / golden["norm"] - 1) <= tolerance


def test_a_single_bit_is_seen(latents: dict[str, Tensor]) -> None:
    name = next(iter(latents))
    other = latents[name].clone()
    other.view(torch.int32).flatten()[0] ^= 1
    assert differing(latents, {**latents, name: other}) == [name]
    assert differing(latents, {n: t for n, t in latents.items() if n != name}) == [name]
    assert differing(latents, latents) == []
