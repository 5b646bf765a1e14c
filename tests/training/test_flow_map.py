"""Flow maps: an exact one has no loss, a bent one is bent back, and conditioning is read once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mv2v_engine.checkpoints import load_checkpoint, save_checkpoint
from mv2v_engine.config import SamplingConfig, TransformerConfig
from mv2v_engine.errors import RequestError, TrainingError
from mv2v_engine.models.block import Block
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.testing import randomise, tiny_config
from mv2v_engine.tokens.plan import turn_plan
from mv2v_engine.training import dit
from mv2v_engine.training.flow_map import (
    DELTA,
    balanced,
    end_levels,
    flow_map_loss,
    flow_map_step,
    longest_step,
    map_target,
)
from mv2v_engine.training.latents import LatentCache
from mv2v_engine.training.losses import BatchForward, Noised, widened
from mv2v_engine.training.recipe import Batch, SceneSampler, Siblings

CPU = torch.device("cpu")
# standard deviation of the data of whose flow all is known
SPREAD = 0.4


def deviation(level: Tensor) -> Tensor:
    """That of x_t, of normal data: x_r = x_t * deviation(r) / deviation(t) is the exact map."""
    return (level**2 + (1 - level) ** 2 * SPREAD**2).sqrt()


def exact_velocity(latents: Tensor, level: Tensor) -> Tensor:
    """E[noise - clean | x_t]."""
    slope = (level - (1 - level) * SPREAD**2) / deviation(level) ** 2
    return widened(slope) * latents


def exact_mean(latents: Tensor, level: Tensor, end: Tensor) -> Tensor:
    """The mean velocity from t to r; where they are equal, the velocity."""
    gap = (level - end).clamp(min=1e-12)
    mean = widened((1 - deviation(end) / deviation(level)) / gap) * latents
    return torch.where(widened(level - end) < 1e-9, exact_velocity(latents, level), mean)


def test_an_exact_map_is_what_it_has_to_be() -> None:
    level = torch.linspace(0.1, 1, 40, dtype=torch.float64)
    end = level * torch.linspace(0, 0.95, 40, dtype=torch.float64).flip(0)
    latents = torch.randn(40, 4, 2, 3, 3, dtype=torch.float64)
    velocity, mean = exact_velocity(latents, level), exact_mean(latents, level, end)

    def asked(moved: Tensor, levels: Tensor) -> Tensor:
        assert len(levels) == 80 and float(levels.max()) <= 1
        assert bool((levels.chunk(2)[1] >= end).all())
        return exact_mean(moved, levels, end.repeat(2))

    target = map_target(asked, latents, velocity, level, end)
    error = (target - mean).flatten(1).norm(dim=1) / mean.flatten(1).norm(dim=1).clamp(min=0.1)
    is_central = (level + DELTA <= 1) & (level - DELTA >= end)
    assert 30 < int(is_central.sum()) < 40
    # float32 on the way, and DELTA squared; where a side is cut off, DELTA
    assert float(error[is_central].max()) < 1e-3 and float(error.max()) < 2 * DELTA
    # the velocity alone is another thing
    assert float((velocity - mean).norm() / mean.norm()) > 0.1


class _Bent(nn.Module):
    """The exact map times 1 + `bend`, where a step has a length."""

    def __init__(self, bend: float) -> None:
        super().__init__()
        self.bend = nn.Parameter(torch.tensor(bend))

    def forward(
        self, latents: Any, timestep: Tensor, text: Tensor, *, end_timestep: Tensor, **_: Any
    ) -> Tensor:
        level, end = timestep / 1000, end_timestep / 1000
        bend = self.bend * (level > end)
        return widened(1 + bend) * exact_mean(latents[0], level, end)


def test_a_bent_map_is_bent_back() -> None:
    plan = turn_plan(tiny_config(camera_conditioning="none"), (2, 6, 10), (), source=False)
    clean = SPREAD * torch.randn(256, 4, 2, 6, 10, generator=torch.Generator().manual_seed(1))
    batch = Batch(plan, [clean], None, torch.zeros(256, 6, 10))
    slopes = {}
    for bend in (-0.3, 0.0, 0.3):
        model = _Bent(bend)
        found = flow_map_loss(
            model,
            batch,
            torch.Generator().manual_seed(2),
            longest=1.0,
            flow_shift=3.0,
            device=CPU,
        )
        found["loss"].backward()
        slopes[bend] = float(model.bend.grad)
        assert int(found["rows"]) == 256
    assert slopes[-0.3] < 0 < slopes[0.3]
    assert abs(slopes[0.0]) < 0.05 * min(-slopes[-0.3], slopes[0.3])


@pytest.mark.parametrize("longest", [0.0, 0.1, 1.0])
@torch.no_grad()
def test_where_steps_end(longest: float) -> None:
    generator = torch.Generator().manual_seed(0)
    noised = Noised.drawn(torch.zeros(400, 1, 1, 1, 1), generator, 3.0)
    level, end = noised.level, end_levels(noised, generator, longest=longest, flow_shift=3.0)
    assert bool((end <= level).all() and (end >= 0).all())
    gap = (level - end)[end < level]
    if longest == 0:
        assert not len(gap)
        return
    # whatever the size of the batch, as even as can be
    assert len(gap) == 200
    assert int((end == 0).sum()) == (100 if longest == 1 else 0)
    assert float(gap.max()) <= longest + 1e-6 and float(gap.max()) > 0.9 * longest
    small = Noised.drawn(torch.zeros(3, 1, 1, 1, 1), generator, 3.0)
    for _ in range(5):
        end = end_levels(small, generator, longest=longest, flow_shift=3.0)
        assert int((end < small.level).sum()) in (1, 2)


def test_long_steps_come_last() -> None:
    gaps = [longest_step(done) for done in (0, 0.04, 0.05, 0.29, 0.3, 1)]
    assert gaps == [0, 0, 0.1, 0.1, 1, 1]


def make_batch(config: TransformerConfig, conditioning: Any, *, siblings: int = 0) -> Batch:
    grid = (2, 6, 10)
    plan = turn_plan(config, grid, (4,), merge="off", conditioning=conditioning)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    more = None
    if siblings:
        more = Siblings(drawn(2, siblings, 4, *grid), drawn(2, siblings, 2, 12))
    latents = [drawn(2, 4, *segment.grid) for segment in plan.segments]
    cameras = drawn(2, len(latents), 2, 12) if config.has_camera else None
    source = drawn(2, 4, *grid) if config.source_channels else None
    return Batch(plan, latents, cameras, drawn(2, 6, 10), source, siblings=more)


CASES = [("joint", 0, {}), ("static", 0, {}), ("static", 3, {})]
CASES += [(mode, 0, {"in_channels": 8, "source_channels": 4, "camera_conditioning": "none"})
          for mode in ("joint", "static")]  # fmt: skip


@pytest.mark.parametrize(("conditioning", "siblings", "shape"), CASES)
@torch.no_grad()
def test_some_targets_again_are_what_they_were(
    conditioning: str, siblings: int, shape: dict[str, Any]
) -> None:
    model = MV2VTransformer(tiny_config(has_end_time=True, **shape))
    randomise(model)
    batch = make_batch(model.config, conditioning, siblings=siblings)
    count = len(batch.targets)
    timestep = torch.linspace(200, 900, count)
    end = timestep / 3
    forward = BatchForward(model, batch, keeps=True)
    with torch.enable_grad():
        whole = forward(batch.targets, timestep, end).detach()
    rows = torch.tensor([count - 1, 0, count - 1])
    some = forward.again(rows, batch.targets[rows], timestep[rows], end[rows])
    torch.testing.assert_close(some, whole[rows], rtol=1e-4, atol=1e-5)
    # and the end of the step is read
    other = forward.again(rows, batch.targets[rows], timestep[rows], timestep[rows])
    assert float((other - some).norm() / some.norm()) > 1e-2


@pytest.mark.parametrize("siblings", [0, 3])
def test_static_conditioning_is_encoded_once(
    siblings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MV2VTransformer(tiny_config(has_end_time=True))
    randomise(model)
    batch, encoded, given = make_batch(model.config, "static", siblings=siblings), [], Block.forward

    def counted(self: Block, sequence: Any, kept: Any = None, keeps: bool = False, *a: Any) -> Any:
        encoded.append(keeps)
        return given(self, sequence, kept, keeps, *a)

    monkeypatch.setattr(Block, "forward", counted)
    loss = flow_map_loss(model, batch, torch.Generator(), longest=1.0, flow_shift=3.0, device=CPU)[
        "loss"
    ]
    loss.backward()
    assert sum(encoded) == model.config.num_layers
    # and it is trained, through what it left
    for block in model.blocks:
        assert block.attn1.to_k.weight.grad is not None  # type: ignore[union-attr]


def test_the_end_is_learned_from_nothing(cache: LatentCache) -> None:
    model = MV2VTransformer(tiny_config())
    randomise(model)
    batch = make_batch(model.config, "joint")
    given = ([*batch.latents], torch.tensor([400.0, 900.0]), batch.text)
    before = model(*given, plan=batch.plan, cameras=batch.cameras)
    model.add_end_time()
    assert model.config.has_end_time
    plan = make_batch(model.config, "joint").plan
    for end in (None, torch.tensor([0.0, 300.0])):
        after = model(*given, plan=plan, cameras=batch.cameras, end_timestep=end)
        assert torch.equal(after, before)
    sampler = SceneSampler(cache, model.config, replace(dit.TINY_MEMORY_RECIPE, batch=4))
    found = flow_map_step(model, sampler, CPU, lambda: 0.5)(torch.Generator().manual_seed(0))
    assert {"loss", "loss_plain", "loss_map", "forward_tflop"} == set(found)
    found["loss"].backward()
    added = model.condition_embedder.end_time_embedder
    assert added is not None and float(added.linear_2.weight.grad.norm()) > 0  # type: ignore[union-attr]
    plain = flow_map_step(model, sampler, CPU, lambda: 0.0)(torch.Generator().manual_seed(0))
    assert "loss_map" not in plain and plain["forward_tflop"] < found["forward_tflop"]


def test_from_a_checkpoint_to_a_flow_map(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command; what comes out says what it is, and is not trained as plain flow."""
    model = MV2VTransformer(tiny_config())
    randomise(model)
    start = tmp_path / "start"
    save_checkpoint(start, model, model.config, SamplingConfig(), "start", torch.float32)

    def train(out: str, *more: object) -> None:
        words = ["--latents", cache_folder, "--out", tmp_path / out, "--steps", 3, "--batch", 4]
        monkeypatch.setattr("sys.argv", ["dit", *map(str, [*words, *more])])
        dit.main()

    train("map", "--start-from", start, "--flow-map")
    state = torch.load(tmp_path / "map" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3 and state["shape"]["has_end_time"]
    model.add_end_time()
    model.load_state_dict(state["model"])
    added = model.condition_embedder.end_time_embedder
    assert added is not None and float(added.linear_2.weight.detach().norm()) > 0
    done = tmp_path / "done"
    sampling = SamplingConfig(scheduler="flow_map")
    save_checkpoint(done, model, model.config, sampling, "done", torch.float32)
    again = load_checkpoint(done, device="cpu")
    assert again.config.has_end_time and again.sampling.scheduler == "flow_map"
    for name, parameter in again.transformer.named_parameters():
        assert torch.equal(parameter, state["model"][name]), name
    with pytest.raises(TrainingError, match="is a flow map, which training on plain flow"):
        train("plain", "--start-from", done)
    with pytest.raises(RequestError, match="--flow-map belongs to --start-from"):
        train("scratch", "--flow-map")


def test_a_far_target_of_a_step_pulls_no_more_than_others() -> None:
    error = torch.tensor([0.2, 0.2, 0.2, 1e4], requires_grad=True)
    level, end = torch.full((4,), 0.5), torch.tensor([0.5, 0.5, 0.0, 0.0])
    balanced(error, level, end)["loss"].backward()
    assert error.grad is not None
    plain, _, near, far = (error.grad * error).tolist()
    assert near < far < 2 * near and plain == pytest.approx((near + far) / 2)
