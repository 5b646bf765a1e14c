"""Turns of a flow map: packed, captured, static, skipped or shared, each step is told its end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine.engine.batch import TOKENS
from mv2v_engine.engine.request import Request
from mv2v_engine.errors import RequestError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.sampling.flow_match import make_solver
from mv2v_engine.testing import cpu_flops, randomise, relative_error, tiny_config
from mv2v_engine.tokens.flops import flop_table
from mv2v_engine.tokens.plan import turn_plan
from tests.conftest import configured
from tests.engine.graphed_turns import Asked, steps
from tests.engine.graphed_turns import StandInTurns as Turns


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    folder: Path = make_checkpoint(
        tmp_path_factory.mktemp("map"), has_end_time=True, sampling={"scheduler": "flow_map"}
    )
    return folder


@torch.no_grad()
def test_what_a_forward_is_told() -> None:
    model = MV2VTransformer(tiny_config(has_end_time=True))
    randomise(model)
    plan = turn_plan(model.config, (3, 6, 10), (4,))
    torch.manual_seed(0)
    latents = [torch.randn(2, 4, *segment.grid) for segment in plan.segments]
    timestep = torch.tensor([300.0, 900.0])
    given: dict[str, Any] = {"plan": plan, "cameras": torch.randn(2, 3, 3, 12)}

    def run(timestep: Tensor, end: Tensor | None) -> Tensor:
        text = torch.ones(2, 6, 10)
        velocity: Tensor = model(latents, timestep, text, **given, end_timestep=end)
        return velocity

    # a step of no length is plain flow
    assert torch.equal(run(timestep, None), run(timestep, timestep))
    long = run(timestep, torch.zeros(2))
    assert relative_error(long, run(timestep, None)) > 1e-2
    with pytest.raises(ValueError, match=r"must have the shape of timestep \[2\], got \[1\]"):
        run(timestep, torch.zeros(1))
    embedder = model.condition_embedder
    assert embedder.end_time_embedder is not None
    alone = embedder.time_embedding(timestep, timestep)
    # how far it goes is what is embedded
    far = embedder.time_embedding(timestep, timestep - 250) - alone
    torch.testing.assert_close(far[0], far[1])
    # weights without the embedding refuse an end
    plain = MV2VTransformer(tiny_config())
    with pytest.raises(ValueError, match="told the timestep alone"):
        plain(
            latents,
            timestep,
            torch.ones(2, 6, 10),
            plan=turn_plan(plain.config, (3, 6, 10), (4,)),
            cameras=given["cameras"],
            end_timestep=timestep,
        )


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_steps_are_the_loop_written_out(conditioning: str) -> None:
    """To the bit; static K and V are of no step, so they are kept whatever its end."""
    turns, asked = Turns(has_end_time=True), Asked(1, 3, 1.0, "flow_map")
    plan = turns.plan(conditioning, merge="off")
    given = turns.denoiser(plan, asked, None).buffers
    solver, latents = make_solver("flow_map", asked.steps, 3.0), given.latents.clone()
    assert solver.ends is not None and solver.deltas is not None
    for index, (timestep, end) in enumerate(zip(solver.timesteps, solver.ends, strict=True)):
        with torch.no_grad():
            velocity = turns.model(
                [latents, *given.conditioning.latents],
                timestep[None],
                given.conditioning.text,
                plan=plan,
                cameras=given.conditioning.cameras,
                end_timestep=end[None],
            )
        latents = latents + velocity * solver.deltas[index]
    found = turns.run(plan, asked, None).latents
    if conditioning == "joint":
        assert torch.equal(found, latents[0])
    assert relative_error(found, latents[0]) < 1e-5
    # plain flow of the same weights goes elsewhere
    assert relative_error(turns.run(plan, Asked(1, 3), None).latents, found) > 1e-2


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_replay_equals_eager(conditioning: str) -> None:
    turns = Turns(has_end_time=True)
    plan = turns.plan(conditioning)
    first = turns.check(plan, Asked(0, 4, 1.0, "flow_map"))
    assert first["captured_steps"] == 1
    assert steps(turns.check(plan, Asked(1, 3, 1.0, "flow_map")))[2] >= 2
    # plain flow is told less, so its steps are others
    assert turns.check(plan, Asked(2, 4))["captured_steps"] == 1


def test_a_turn_of_a_few_steps(checkpoint: Path, source_frames: Tensor) -> None:
    engine = configured(checkpoint)
    session = engine.session(source_frames)
    for count in (1, 2, 20):
        turn = session.render("pan_right", seed=3, num_inference_steps=count, memory="none")
        assert turn.report["scheduler"] == "flow_map"
        assert (turn.report["num_inference_steps"], turn.report["forwards"]) == (count, count)
        assert turn.report["approximations"] == []
    with pytest.raises(RequestError, match="guidance moves velocities"):
        session.render("pan_right", guidance_scale=2.0)
    # the same weights as plain flow, where that is asked for
    plain = configured(checkpoint, scheduler="euler").session(source_frames)
    other = plain.render("pan_right", seed=3, num_inference_steps=20)
    assert other.report["scheduler"] == "euler"
    assert relative_error(other.latents, turn.latents) > 1e-3


def test_weights_that_were_never_told_are_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(RequestError, match='never told where a step goes; use scheduler="euler"'):
        configured(tiny_checkpoint, scheduler="flow_map")


def test_old_weights_in_a_new_place_are_the_old_ones(
    tiny_checkpoint: Path, source_frames: Tensor
) -> None:
    engine = configured(tiny_checkpoint)
    before = engine.session(source_frames).render("pan_right", seed=3).latents
    engine.transformer.add_end_time()
    after = engine.session(source_frames).render("pan_right", seed=3).latents
    assert torch.equal(after, before)


def test_packed_turns_are_what_they_are_alone(checkpoint: Path, source_frames: Tensor) -> None:
    engine = configured(checkpoint, batch_tokens=TOKENS)

    def request(camera: str, seed: int, count: int) -> Request:
        asked = Request.view(camera, engine.sampling, memory="none", seed=seed)
        return replace(asked, num_inference_steps=count)

    # turns of different lengths, so that one pack holds steps to different ends
    asked = [request("pan_right", 1, 4), request("arc_left", 2, 3), request("pan_right", 1, 2)]
    sessions = [engine.session(source_frames) for _ in asked]
    results = engine.answer_all(list(zip(sessions, asked, strict=True)))
    for result, one in zip(results, asked, strict=True):
        assert not isinstance(result, Exception) and result.report["packed_steps"] >= 2
        alone = engine.session(source_frames).ask(one)
        assert relative_error(result.latents, alone.latents) < 1e-4


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_a_closed_step_cache_is_the_exact_path(
    checkpoint: Path, source_frames: Tensor, conditioning: Any
) -> None:
    exact, cached = (
        configured(checkpoint, conditioning=conditioning, step_cache=threshold)
        .session(source_frames)
        .render("pan_right", seed=3, num_inference_steps=4)
        for threshold in (None, 0.0)
    )
    assert torch.equal(exact.latents, cached.latents)
    skipped = (
        configured(checkpoint, conditioning=conditioning, step_cache=9.0)
        .session(source_frames)
        .render("pan_right", seed=3, num_inference_steps=4)
    )
    assert skipped.report["forwards"] == 2
    assert bool(skipped.latents.isfinite().all())


@torch.no_grad()
def test_the_flops_of_a_step_are_the_counted_ones() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = MV2VTransformer(tiny_config(has_end_time=True))
    randomise(model)
    plan = turn_plan(model.config, (3, 6, 10), (4,), merge="off")
    latents = [torch.zeros(1, 4, *segment.grid) for segment in plan.segments]
    with FlopCounterMode(display=False, custom_mapping=cpu_flops()) as counter:
        model(
            latents,
            torch.tensor([500.0]),
            torch.zeros(1, 6, 10),
            plan=plan,
            cameras=torch.zeros(1, 3, 3, 12),
            end_timestep=torch.tensor([0.0]),
        )
    assert sum(flop_table(plan).values()) == counter.get_total_flops()
