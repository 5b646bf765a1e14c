"""The full-size step as it would be captured: no data are waited for, nothing comes from the host.

Everything lies on the meta device, which has no values to read; a tensor of any other device in
the step would be a copy from the host, which a graph cannot hold.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mv2v_engine.config import WAN_1_3B
from mv2v_engine.engine.denoise import Denoiser
from mv2v_engine.engine.graphs import LAUNCHES_PER_BLOCK
from mv2v_engine.engine.step import Conditioning
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.rope import table_on
from mv2v_engine.sampling.flow_match import make_solver
from mv2v_engine.tokens.plan import novel_view_plan

META = torch.device("meta")
# make tensors of what the host holds, whatever the device: no operation tells
FROM_HOST = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer)


class FromHost(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        assert func not in FROM_HOST, f"{func.__name__} in a step that is to be captured"
        return func(*args, **(kwargs or {}))


class OnDevice(TorchDispatchMode):
    """Insists on the meta device, and counts the operations that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
            for tree in ((args, kwargs), result)
        )
        devices = {tensor.device for tensor in (*given, *made)}
        assert devices <= {META}, f"{func} has tensors on {devices}"
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        is_view = all(tensor.untyped_storage()._cdata in storages for tensor in made)
        if func._schema.is_mutable or not is_view:
            self.launches += 1
            self.names[func._schema.name] += 1
        return result


@pytest.fixture(scope="module")
def model() -> MV2VTransformer:
    with META:
        model = MV2VTransformer(WAN_1_3B).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if any(part in name for part in model.keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    model.set_backend("auto", "auto")
    return model.requires_grad_(False)


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_a_full_size_step_can_be_captured(model: MV2VTransformer, conditioning: Any) -> None:
    plan = novel_view_plan(memory=10, conditioning=conditioning)
    frames, text = plan.target.num_frames, torch.empty(1, 512, 4096, device=META)
    denoiser = Denoiser(
        transformer=model,
        plan=plan,
        conditioning=Conditioning(
            [torch.empty(1, 16, *segment.grid, device=META) for segment in plan.segments[1:]],
            torch.empty(1, len(plan.segments), frames, 12, device=META),
            text,
            text.clone(),
        ),
        noise=torch.empty(1, 16, *plan.target.grid),
        solver=make_solver("euler", 4, 5.0),
        guidance_scale=5.0,
    )
    table_on(plan, META)
    if conditioning == "static":
        denoiser.step()
    with torch.no_grad(), FromHost(), OnDevice() as step:
        denoiser._forward()
    assert step.names["mv2v::attention"] == 2 * 2 * WAN_1_3B.num_layers
    # what decides where graphs gain is of this size; merges and many runs of frames add some
    per_block = step.launches / (2 * WAN_1_3B.num_layers)
    assert 0.75 < per_block / LAUNCHES_PER_BLOCK < 1.5


def test_the_lint_sees_the_host() -> None:
    x = torch.empty(3, device=META)
    refused: dict[str, Any] = {
        "a value": lambda: float(x.sum()),
        "a branch": lambda: bool(x[0] > 0),
        "a shape": lambda: x.nonzero(),
        "a mask": lambda: x[x > 0],
        "a copy from the host": lambda: torch.ones(3).to(META),
        "a copy to the host": lambda: x.cpu(),
        "a number of the host's": lambda: x * torch.ones(()),
        "a list": lambda: torch.tensor([1, 2], device=META),
    }
    for name, step in refused.items():
        with pytest.raises((AssertionError, RuntimeError)), FromHost(), OnDevice():
            step()
            pytest.fail(name)
    with FromHost(), OnDevice() as step:
        torch.arange(3, device=META) * x.view(3) + 2.0
    assert step.launches == 3
