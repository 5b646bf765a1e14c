"""The byte budget of captured steps: who goes, what is shared, what is given back."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from mv2v_engine.errors import KernelUnavailableError
from tests.engine.graph_stand_in import raising
from tests.engine.graphed_turns import Asked, steps
from tests.engine.graphed_turns import StandInTurns as Turns


def test_plans_share_the_arena_and_a_larger_one_takes_it_over() -> None:
    turns = Turns()
    small, large = (turns.plan("static", memory) for memory in (1, 3))
    turns.check(small)
    before = turns.graphs.bytes()["arena"]
    turns.check(large)
    grown = turns.graphs.bytes()["arena"]
    # the small plan's graph pointed into the arena that is gone
    assert 0 < before < grown and len(turns.graphs) == 1
    assert steps(turns.check(small)) == (2, 1, 0)
    for seed, plan in enumerate((large, small, large, small)):
        assert steps(turns.check(plan, Asked(seed))) == (1, 0, 2)
    assert turns.graphs.bytes()["arena"] == grown and turns.recorder.captures == 3


def test_the_least_recently_used_goes_when_bytes_run_out() -> None:
    turns = Turns()
    plans = [turns.plan(memory=memory) for memory in (1, 2, 3)]
    for plan in plans:
        turns.check(plan)
    held = turns.graphs.bytes()
    turns.graphs.clear()
    assert set(turns.graphs.bytes().values()) == {0} and not turns.recorder.live

    smallest = turns.denoiser(plans[0], Asked(), None).buffers.reserved(plans[0]).num_bytes
    # all three but for a byte; the pool is as large as the largest needs
    turns.graphs.capacity_bytes = sum(held.values()) - 1
    for plan in (plans[2], plans[0], plans[2]):
        turns.check(plan)
    turns.check(plans[1])
    assert sum(turns.graphs.bytes().values()) == sum(held.values()) - smallest
    captures = turns.recorder.captures
    assert steps(turns.check(plans[2])) == (0, 0, 3)
    assert steps(turns.check(plans[0])) == (1, 1, 1) and turns.recorder.captures == captures + 1


def test_a_plan_beyond_the_budget_runs_eagerly() -> None:
    turns = Turns("auto")
    small, large = turns.plan("static", 1), turns.plan("static", 3)
    turns.check(small)
    turns.graphs.capacity_bytes = sum(turns.graphs.bytes().values())
    report = turns.check(large)
    assert steps(report) == (3, 0, 0) and "bytes, graph_bytes allows" in report["reason"]
    # what there was is back afterwards, and within the budget
    assert turns.check(small)["reason"] is None
    assert sum(turns.graphs.bytes().values()) <= turns.graphs.capacity_bytes
    turns.graphs.mode = "on"
    with pytest.raises(KernelUnavailableError, match=r'graphs="on" was asked for.*graph_bytes'):
        turns.run(large, Asked(), turns.graphs)


def test_a_pool_sized_by_graphs_that_are_gone_is_given_back() -> None:
    turns = Turns()
    small, large = turns.plan(memory=0, source=False), turns.plan(memory=3)
    turns.check(small)
    alone = sum(turns.graphs.bytes().values())
    turns.check(large)
    turns.graphs.capacity_bytes = alone
    # the large plan's graph goes, and the pool is as large as it made it until the last one goes
    turns.graphs._drop(next(iter(turns.graphs._entries)))
    assert steps(turns.check(small)) == (1, 1, 1)
    assert sum(turns.graphs.bytes().values()) == alone


def test_wanted_memory_is_given_back_unless_it_is_in_use() -> None:
    turns = Turns()
    plan = turns.plan("static")
    denoiser = turns.denoiser(plan, Asked(steps=4), turns.graphs)
    for _ in range(3):
        denoiser.step()
    turns.graphs.trim()
    assert len(turns.graphs) == 1
    denoiser.step()
    assert denoiser.graph_report()["replayed_steps"] == 1
    denoiser.release()
    turns.graphs.trim()
    assert set(turns.graphs.bytes().values()) == {0} and not turns.recorder.live
    turns.check(plan)


def test_any_order_of_turns_keeps_the_budget() -> None:
    """Random plans, ends and failures: never over budget, never a graph too many, always right."""
    turns, choice = Turns("auto"), random.Random(3)
    turns.check(turns.plan("static", 3))
    # the largest plan fits alone, but not beside the others
    turns.graphs.capacity_bytes = int(1.2 * sum(turns.graphs.bytes().values()))
    captured = 0
    for number in range(24):
        plan = turns.plan(choice.choice(["joint", "static"]), choice.randrange(4))
        end = choice.choice(["whole", "whole", "cancelled", "failed"])
        if end == "whole":
            captured += turns.check(plan, Asked(number))["captured_steps"]
        elif end == "failed":
            turns.recorder.fail = raising(ZeroDivisionError())
            with suppress(ZeroDivisionError):
                turns.run(plan, Asked(number), turns.graphs)
            turns.recorder.fail = None
        else:
            denoiser = turns.denoiser(plan, Asked(number), turns.graphs)
            for _ in range(choice.randrange(3)):
                denoiser.step()
            denoiser.release()
        held, entries = turns.graphs.bytes(), turns.graphs._entries.values()
        assert sum(held.values()) <= turns.graphs.capacity_bytes and not turns.recorder.turns
        assert len(turns.graphs) == len(turns.recorder.live)
        assert (held["arena"] > 0) == any(entry.kept is not None for entry in entries)
    assert captured > 3
