"""Blocks that wait on the host: the same bits, two places, and no copy into one that is in use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.kept import ConditioningCache, TargetResidual
from mv2v_engine.models.offload import BlockOffload, CudaCopies, places_bytes
from mv2v_engine.models.quantized import QuantizedLinear, large_linears, quantize_linears
from mv2v_engine.models.sample import Sample
from mv2v_engine.testing import randomise, tiny_config
from mv2v_engine.tokens.plan import TokenPlan, turn_plan

GRID = (3, 6, 10)
CPU = torch.device("cpu")


class LateCopies:
    """Each copy happens as late as its order allows, or as soon as it is queued; a place holds
    nothing of use meanwhile. Knows which places are in use, and in what order all was asked."""

    def __init__(self, *, is_late: bool) -> None:
        self.is_late = is_late
        self.waiting: dict[int, tuple[Tensor, Tensor]] = {}
        self.in_use: set[int] = set()
        self.said: list[str] = []

    def fill(self, place: int, target: Tensor, source: Tensor) -> None:
        assert place not in self.in_use, "a place is overwritten while a block runs in it"
        self.said.append(f"fill {place}")
        target.fill_(0xFF)
        self.waiting[place] = target, source
        if not self.is_late:
            target.copy_(source)

    def ready(self, place: int) -> None:
        self.said.append(f"ready {place}")
        self.in_use.add(place)
        if place in self.waiting:
            target, source = self.waiting.pop(place)
            target.copy_(source)

    def leave(self, place: int) -> None:
        self.said.append(f"leave {place}")
        self.in_use.remove(place)


def _model(num_layers: int = 3, dtype: torch.dtype = torch.float32) -> MV2VTransformer:
    model = MV2VTransformer(tiny_config(num_layers=num_layers, merge_blocks=(1, 2)))
    randomise(model)
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model.keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def _quantized(kind: Any) -> MV2VTransformer:
    model = _model()
    weights = {name: linear.weight for name, linear in large_linears(model).items()}
    quantize_linears(model, kind)
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        layer.quantize(weight)
    return model


def _offloaded(model: MV2VTransformer, copies: Any) -> MV2VTransformer:
    other = deepcopy(model)
    other.offload = BlockOffload(list(other.blocks), CPU, copies)
    return other


def _sample(plan: TokenPlan, seed: int = 0, **given: Any) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    cameras = torch.randn(1, len(plan.segments), GRID[0], 12, generator=generator)
    latents = [torch.randn(1, 4, *segment.grid, generator=generator) for segment in plan.segments]
    return Sample(
        latents=latents,
        timestep=1000 * torch.rand(1, generator=generator),
        encoder_hidden_states=torch.randn(1, 6, 10, generator=generator),
        plan=plan,
        cameras=cameras,
        **given,
    )


def _joint(model: MV2VTransformer) -> list[Tensor]:
    plan = turn_plan(model.config, GRID, (4, 8), merge="conv", fraction=0.5)
    return [*model.forward_samples([_sample(plan)]), *model.forward_samples([_sample(plan, 1)])]


def _static(model: MV2VTransformer) -> list[Tensor]:
    plan = turn_plan(model.config, GRID, (4, 8), fraction=0.5, conditioning="static")
    cache = ConditioningCache(plan)
    first = model.forward_samples([_sample(plan, kept=cache)])
    return [*first, *model.forward_samples([_sample(plan, 1, kept=cache)])]


def _packed(model: MV2VTransformer) -> list[Tensor]:
    plans = [
        turn_plan(model.config, GRID, (4, 8), fraction=0.5),
        turn_plan(model.config, GRID, (), source=False),
    ]
    return model.forward_samples([_sample(plan, seed) for seed, plan in enumerate(plans)])


def _skipping(model: MV2VTransformer) -> list[Tensor]:
    plan, residual = turn_plan(model.config, GRID, (4,)), TargetResidual()
    sample = _sample(plan, residual=residual)
    found = model.forward_samples([sample])
    latents, time = sample.latents[0], sample.timestep
    return [*found, model.forward_residual(latents, time, plan=plan, residual=residual)]


FORWARDS: dict[str, Callable[[MV2VTransformer], list[Tensor]]] = {
    "joint": _joint,
    "static": _static,
    "packed": _packed,
    "skipping": _skipping,
}
MODELS: dict[str, Callable[[], MV2VTransformer]] = {
    "float32": _model,
    "bfloat16": lambda: _model(dtype=torch.bfloat16),
    "int8": lambda: _quantized("int8"),
    "fp8": lambda: _quantized("fp8"),
    "four blocks": lambda: _model(num_layers=4),
}


@pytest.mark.parametrize("is_late", [None, True, False])
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("weights", MODELS)
@torch.no_grad()
def test_the_same_bits(weights: str, forward: str, is_late: bool | None) -> None:
    """However late or early the copies come; None: a CPU's own."""
    model = MODELS[weights]()
    copies = None if is_late is None else LateCopies(is_late=is_late)
    other = _offloaded(model, copies)
    run = FORWARDS[forward]
    for found, expected in zip(run(other), run(model), strict=True):
        assert torch.equal(found, expected)
    assert float(expected.abs().amax()) > 0
    assert copies is None or not copies.in_use


@torch.no_grad()
def test_the_next_copy_is_queued_before_a_block_runs() -> None:
    """The next forward's first copy is queued before the last block."""
    copies = LateCopies(is_late=True)
    model = _offloaded(_model(), copies)
    assert model.offload is not None
    for _ in model.offload.resident():
        copies.said.append("run")
    one = ["ready 0", "run", "leave 0"]
    other = [word.replace("0", "1") for word in one]
    assert copies.said == ["fill 0", "fill 1", *one, "fill 0", *other, "fill 1", *one]
    copies.said.clear()
    next(model.offload.resident())
    # it lies in the other place this time, and is there
    assert copies.said[:2] == ["fill 0", "ready 1"]


def test_two_blocks_are_copied_once() -> None:
    copies = LateCopies(is_late=True)
    offload = BlockOffload([nn.Linear(3, 2), nn.Linear(3, 2)], CPU, copies)
    for _ in range(3):
        assert len(list(offload.resident())) == 2
    assert [word for word in copies.said if word.startswith("fill")] == ["fill 0", "fill 1"]


def test_a_single_block_has_a_single_place() -> None:
    linear = nn.Linear(3, 2)
    weight = linear.weight.detach().clone()
    offload = BlockOffload([linear], CPU)
    (place,) = list(offload.resident())
    assert isinstance(place, nn.Linear) and torch.equal(place.weight, weight)
    assert offload.num_bytes == 1024  # two tensors, each aligned


@torch.no_grad()
def test_a_forward_that_fails_leaves_the_places_to_others() -> None:
    copies = LateCopies(is_late=True)
    whole = _model()
    model = _offloaded(whole, copies)
    assert model.offload is not None

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    handle = model.offload.places[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        _joint(model)
    handle.remove()
    assert not copies.in_use and not model.offload._lock.locked()
    for found, expected in zip(_joint(model), _joint(whole), strict=True):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_forwards_of_several_threads_take_turns() -> None:
    whole = _model()
    model = _offloaded(whole, None)
    expected = [_joint(whole), _packed(whole)]
    found: dict[int, list[list[Tensor]]] = {0: [], 1: []}

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                found[number].append((_joint, _packed)[number](model))

    threads = [threading.Thread(target=work, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, runs in found.items():
        assert len(runs) == 5
        for run in runs:
            assert all(map(torch.equal, run, expected[number]))


def test_the_blocks_stay_whole_on_the_host() -> None:
    """What is saved, counted and compared is the model as ever."""
    model = _quantized("int8")
    other = _offloaded(model, None)
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert other.offload is not None
    assert other.offload.num_bytes == places_bytes(list(model.blocks))
    model.set_backend("native")
    other.set_backend("native")
    other.set_feed_forward_chunk(7)
    for place in other.offload.places:
        assert place.backend == "native" and place.ffn.chunk == 7  # type: ignore[union-attr]


class Driver:
    """torch.cuda's streams and events, of which it writes down what waits for what.

    ahead: all that each stream has queued, and what comes before that on others.
    """

    def __init__(self) -> None:
        self.ahead: dict[str, set[str]] = {"compute": set(), "copies": set()}
        self.current = "compute"

    def queue(self, what: str) -> None:
        self.ahead[self.current].add(what)


class Stream:
    def __init__(self, driver: Driver, name: str) -> None:
        self.driver, self.name = driver, name

    def record_event(self) -> set[str]:
        return set(self.driver.ahead[self.name])

    def wait_event(self, event: set[str]) -> None:
        self.driver.ahead[self.name] |= event


def test_the_order_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy comes after the last that reads its place, and after nothing else of the blocks; a
    block after its own copy."""
    driver = Driver()

    @contextmanager
    def stream(taken: Stream) -> Iterator[None]:
        driver.current = taken.name
        yield
        driver.current = "compute"

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(driver, "copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(driver, driver.current))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    copies = CudaCopies(torch.device("cuda"))
    blocks = [nn.Linear(3, 2) for _ in range(5)]
    offload = BlockOffload(blocks, CPU, copies)
    number = 0
    fill = copies.fill

    def filling(place: int, target: Tensor, source: Tensor) -> None:
        nonlocal number
        fill(place, target, source)
        seen = driver.ahead["copies"]
        # the block before the one that is about to run was the last in this place
        assert f"run {number - 2}" in seen or number < 2
        assert f"run {number - 1}" not in seen
        driver.ahead["copies"].add(f"copy {number}")
        copies._filled[place] = set(driver.ahead["copies"])  # type: ignore[assignment]
        number += 1

    monkeypatch.setattr(copies, "fill", filling)
    for forward in range(2):
        for index, _ in enumerate(offload.resident()):
            run = 5 * forward + index
            assert f"copy {run}" in driver.ahead["compute"]
            assert f"copy {run + 1}" not in driver.ahead["compute"]
            driver.queue(f"run {run}")
