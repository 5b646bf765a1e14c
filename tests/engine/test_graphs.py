"""Captured steps, on a CPU that acts CUDA's graphs out: replay is eager, nothing is baked in."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from mv2v_engine import CancelToken
from mv2v_engine.config import WAN_1_3B
from mv2v_engine.engine.denoise import denoise
from mv2v_engine.engine.graphs import FLOPS_PER_LAUNCH, flops_per_launch
from mv2v_engine.errors import CancelledError, KernelUnavailableError
from mv2v_engine.sampling.flow_match import make_solver
from mv2v_engine.sampling.guidance import guide
from mv2v_engine.tokens.plan import TokenPlan, novel_view_plan
from tests.engine.graph_stand_in import raising, storage
from tests.engine.graphed_turns import Asked, steps
from tests.engine.graphed_turns import StandInTurns as Turns


@pytest.mark.parametrize("scales", [(4.0, 4.0, 1.7), (1.0, 1.0, 1.0)], ids=["guided", "plain"])
@pytest.mark.parametrize("merge", ["conv", "discard", "off"])
@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_replay_equals_eager(conditioning: str, merge: str, scales: tuple[float, ...]) -> None:
    """Over turns of one plan that share nothing else: nothing of a turn is baked in."""
    turns = Turns()
    plan = turns.plan(conditioning, merge=merge)
    reports = []
    for seed, scale in enumerate(scales):
        reports.append(turns.check(plan, Asked(seed, 4 - seed, scale)))
    filling = int(conditioning == "static")
    # filling runs no forward of the target alone, unless for the other guidance branch
    eager = 1 + (filling and scales[0] == 1)
    later = [(filling, 0, count - filling) for count in (3, 2)]
    assert [steps(report) for report in reports] == [(eager, 1, 3 - eager), *later]
    assert turns.recorder.captures == 1 and turns.recorder.paced == turns.recorder.replays


def test_everything_that_a_graph_reads_lives_with_it() -> None:
    """A tensor that nobody holds is given to others, while a graph goes on to read its address."""
    turns = Turns()
    for conditioning in ("joint", "static"):
        turns.check(turns.plan(conditioning))
    held = [*turns.model.state_dict().values()]
    assert turns.graphs._arena is not None
    held.append(turns.graphs._arena)
    for entry in turns.graphs._entries.values():
        held += [*entry.buffers.tensors(), *entry.constants]
    owned = {storage(tensor) for tensor in held}
    for graph in turns.recorder.live:
        strangers = [t.shape for key, t in graph.read.items() if key not in owned]
        assert not strangers and graph.read


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_a_solver_on_the_host_moves_the_latents_itself(conditioning: str) -> None:
    turns = Turns()
    plan = turns.plan(conditioning)
    for seed, solver in enumerate(("unipc", "dmd", "rcm")):
        report = turns.check(plan, Asked(seed, 4, solver=solver))
    assert report["replayed_steps"] == 4 - int(conditioning == "static")
    # the update is not in the graph, so Euler's has one of its own
    assert turns.check(plan)["captured_steps"] == 1


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_steps_in_place_are_the_loop_written_out(solver: Any) -> None:
    """To the bit; UniPC remembers the tensors that it is given, and would see them change."""
    turns, asked = Turns(), Asked(1, 5, 3.0, solver)
    plan = turns.plan(merge="off")
    given = turns.denoiser(plan, asked, None).buffers
    loop, latents = make_solver(solver, asked.steps, 3.0), given.latents.clone()
    for index, timestep in enumerate(loop.timesteps):
        inputs = ([latents, *given.conditioning.latents], timestep[None])
        with torch.no_grad():
            velocities = [
                turns.model(*inputs, text, plan=plan, cameras=given.conditioning.cameras)
                for text in given.conditioning.texts
            ]
        latents = loop.step(guide(velocities, asked.scale), index, latents)
    assert torch.equal(turns.run(plan, asked, None).latents, latents[0])


@pytest.mark.parametrize(
    "shape",
    [
        {"camera_conditioning": "none"},
        {"camera_attention": "prope", "attention_head_dim": 16},
        {"camera_attention": "prope_fused_dual", "camera_conditioning": "none"},
    ],
    ids=["none", "prope", "prope alone"],
)
def test_other_cameras(shape: dict[str, Any]) -> None:
    turns = Turns(**shape)
    for conditioning in ("joint", "static"):
        turns.check(turns.plan(conditioning))
        assert turns.check(turns.plan(conditioning), Asked(5))["captured_steps"] == 0


def test_a_capture_that_fails_leaves_an_eager_turn() -> None:
    turns = Turns("auto")
    plan = turns.plan("static")
    turns.recorder.fail = raising(torch.OutOfMemoryError("CUDA out of memory:\n 2 GiB"))
    report = turns.check(plan)
    assert steps(report) == (3, 0, 0)
    assert report["reason"].endswith("could not be captured (CUDA out of memory: 2 GiB)")
    assert set(turns.graphs.bytes().values()) == {0} and not turns.recorder.live
    # it is not tried again before someone asks, and other plans are served
    turns.recorder.fail = None
    assert turns.check(plan)["reason"] == report["reason"] and turns.recorder.captures == 1
    assert turns.check(turns.plan("joint"))["captured_steps"] == 1
    turns.graphs.clear()
    assert steps(turns.check(plan)) == (2, 1, 0)


def test_a_capture_that_was_asked_for_fails_aloud() -> None:
    turns = Turns("on")
    plan = turns.plan()
    turns.recorder.fail = raising(RuntimeError("operation not permitted"))
    with pytest.raises(KernelUnavailableError, match=r"could not be captured \(operation not perm"):
        turns.run(plan, Asked(), turns.graphs)
    assert set(turns.graphs.bytes().values()) == {0} and not turns.recorder.turns
    turns.recorder.fail = None
    turns.graphs.clear()
    assert turns.check(plan)["captured_steps"] == 1


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()])
def test_other_errors_of_a_capture_are_the_turns(error: BaseException) -> None:
    turns = Turns("auto")
    plan = turns.plan("static")
    turns.recorder.fail = raising(error)
    with pytest.raises(type(error)):
        turns.run(plan, Asked(), turns.graphs)
    assert not turns.recorder.live and not turns.recorder.turns
    turns.recorder.fail = None
    # what ran before is warm still
    assert steps(turns.check(plan)) == (1, 1, 1)


def test_a_step_that_waits_for_data_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns("auto")
    plan = turns.plan(merge="off")
    head = turns.model._velocity
    monkeypatch.setattr(turns.model, "_velocity", lambda x, *rest: head(x * float(x.any()), *rest))
    report = turns.check(plan)
    assert "_local_scalar_dense" in report["reason"] and steps(report) == (3, 0, 0)


@pytest.mark.parametrize("moment", ["capture", "replay"])
@pytest.mark.parametrize("end", ["cancelled", "closed", "dropped"])
def test_a_turn_that_ends_early_leaves_nothing(moment: str, end: str) -> None:
    turns, token = Turns(), CancelToken()
    plan = turns.plan("static")
    if moment == "replay":
        turns.check(plan)
    elif end == "cancelled":
        turns.recorder.fail = token.cancel
    denoiser = turns.denoiser(plan, Asked(steps=9), turns.graphs)
    cache = denoiser.cache
    assert cache is not None
    turn = denoise(denoiser, token)
    for _ in range(3):
        next(turn)
    assert cache.is_filled and turns.recorder.turns == 1
    if end == "cancelled":
        token.cancel()
        with pytest.raises(CancelledError):
            next(turn)
    elif end == "closed":
        turn.close()
    else:
        del turn
    assert denoiser.index == 3 and not turns.recorder.turns
    assert cache.blocks == [] and cache.cameras is None
    turns.recorder.fail = None
    assert steps(turns.check(plan, Asked(7))) == (1, 0, 2)


def test_two_turns_that_take_steps_by_turns() -> None:
    """The second finds the graphs in use, runs eagerly, and says so."""
    turns = Turns()
    plan = turns.plan("static")
    turns.check(plan)
    expected = [turns.run(plan, Asked(seed), None) for seed in (1, 2)]
    pair = [turns.denoiser(plan, Asked(seed), turns.graphs) for seed in (1, 2)]
    for _ in range(3):
        for denoiser in pair:
            denoiser.step()
    results = [denoiser.result() for denoiser in pair]
    for denoiser in pair:
        denoiser.release()
    for got, alone in zip(results, expected, strict=True):
        assert torch.equal(got.latents, alone.latents)
        for ours, theirs in zip(got.records, alone.records, strict=True):
            assert torch.equal(ours.merged, theirs.merged)
    first, second = (result.graphs for result in results)
    assert steps(first) == (1, 0, 2) and first["reason"] is None
    assert steps(second) == (3, 0, 0) and "another turn" in second["reason"]


def test_threads_share_the_graphs() -> None:
    turns = Turns()
    plans = [turns.plan(conditioning) for conditioning in ("joint", "static")]
    expected = [turns.run(plan, Asked(seed), None) for seed, plan in enumerate(plans)]
    wrong: list[str] = []

    def work(seed: int, plan: TokenPlan) -> None:
        for _ in range(4):
            got = turns.run(plan, Asked(seed), turns.graphs)
            if not torch.equal(got.latents, expected[seed].latents):
                wrong.append(f"{seed}: {got.graphs}")

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(plans)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and not turns.recorder.turns


def test_steps_that_run_elsewhere_need_no_graphs() -> None:
    """A turn whose velocities others compute, and one that goes on alone after such a step."""
    turns = Turns()
    forward = turns.model.forward_samples
    for conditioning in ("joint", "static"):
        plan = turns.plan(conditioning)
        denoiser = turns.denoiser(plan, Asked(), turns.graphs)
        with torch.no_grad():
            while denoiser.index < 2:
                velocities = [
                    forward([branch.sample(denoiser.latents, denoiser.timestep)])[0]
                    for branch in denoiser.branches
                ]
                denoiser.advance(velocities)
        denoiser.step()
        result = denoiser.result()
        denoiser.release()
        assert torch.equal(result.latents, turns.run(plan, Asked(), None).latents)
        assert steps(result.graphs) == (3, 0, 0) and result.num_forwards == 3
        kept_before = conditioning == "static"
        assert (result.graphs["reason"] is not None) == kept_before
    assert not turns.recorder.captures and not turns.recorder.turns


def test_merging_by_data_stays_eager() -> None:
    turns = Turns("auto")
    report = turns.check(turns.plan(scope="joint"))
    assert steps(report) == (3, 0, 0) and "the data decide" in report["reason"]
    turns.graphs.mode = "on"
    with pytest.raises(KernelUnavailableError, match="the data decide"):
        turns.run(turns.plan(scope="joint"), Asked(), turns.graphs)


def test_where_graphs_gain() -> None:
    """At the 1.3B shape below about 3,300 tokens: the break-even is where both take 15 ms."""

    def tokens_and_flops(frames: int, size: tuple[int, int]) -> tuple[int, float]:
        plan = novel_view_plan(memory=0, frames=frames, size=size, merge="off", shape=WAN_1_3B)
        return plan.length, flops_per_launch(plan)

    below, above = tokens_and_flops(13, (320, 320)), tokens_and_flops(17, (320, 320))
    assert below[0] == 3200 and below[1] < FLOPS_PER_LAUNCH
    assert above[0] == 4000 and above[1] > FLOPS_PER_LAUNCH

    turns = Turns("auto")
    assert turns.check(turns.plan())["captured_steps"] == 1
    full = novel_view_plan(memory=0)
    denoiser = turns.denoiser(turns.plan(), Asked(), None)
    lease = turns.graphs.lease(turns.model, full, denoiser.buffers)
    assert lease.buffers is None and lease.reason is not None
    assert "products bound a step of this plan, not launches: 905.6" in lease.reason
