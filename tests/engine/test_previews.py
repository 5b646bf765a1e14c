"""Previews: a picture of every step's clean latents, whoever runs the step, for those who ask."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.engine.batch import TurnBatch, TurnEvent
from mv2v_engine.engine.turn import Turn
from mv2v_engine.models.latent_rgb import LatentRGB, wan21
from mv2v_engine.progress import Event, Preview, StepDone
from mv2v_engine.sampling.flow_match import make_solver
from mv2v_engine.sampling.preview import Previewer
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import make_world
from tests.engine.graphed_turns import Asked, StandInTurns, steps

LATENTS = (1, 16, 3, 6, 8)


def colours() -> LatentRGB:
    generator = torch.Generator().manual_seed(7)
    return LatentRGB(0.3 * torch.randn(16, 3, generator=generator), torch.tensor([0.1, -0.1, 0.0]))


def close(one: Tensor, other: Tensor) -> bool:
    """Within rounding of a colour."""
    return int((one.int() - other.int()).abs().max()) <= 1


def pictures(events: list[Event]) -> list[Tensor]:
    """The pictures of previews, each of which follows its own step."""
    found = [event for event in events if isinstance(event, StepDone | Preview)]
    done, previews = found[::2], found[1::2]
    assert [(type(event), event.step) for event in done] == [
        (StepDone, number) for number in range(1, len(done) + 1)
    ]
    assert [(type(event), event.step, event.total) for event in previews] == [
        (Preview, event.step, event.total) for event in done
    ]
    return [event.picture for event in previews if isinstance(event, Preview)]


@pytest.mark.parametrize(
    ("solver", "total"),
    [
        ("euler", 1),
        ("euler", 9),
        ("unipc", 2),
        ("unipc", 9),
        ("lightx2v", 4),
        ("dmd", 3),
        ("rcm", 4),
    ],
)
def test_every_step_shows_the_data_that_the_velocity_points_to(solver: Any, total: int) -> None:
    torch.manual_seed(0)
    data, latents = torch.randn(LATENTS), torch.randn(LATENTS)
    integrates = make_solver(solver, total, 5.0, generator=torch.Generator().manual_seed(1))
    previewer = Previewer(colours().picture, integrates, latents)
    shown = []
    for index in range(total):
        target = data + index  # another one in each step
        velocity = (latents - target) / float(integrates.sigmas[index])
        previewer.before(latents)
        if integrates.deltas is None:
            latents.copy_(integrates.step(velocity, index, latents.clone()))
            previewer.after(latents, velocity, index)
        else:
            latents.add_(velocity * integrates.deltas[index])
            previewer.after(latents, None, index)
        shown += previewer.arrived(is_last=index + 1 == total)
    assert [(each.step, each.total) for each in shown] == [(n + 1, total) for n in range(total)]
    for index, preview in enumerate(shown):
        assert close(preview.picture, colours().picture(data[0, :, 1] + index))


@pytest.mark.parametrize("conditioning", ["joint", "static"])
@pytest.mark.parametrize("changes", [{}, {"scheduler": "unipc"}, {"step_cache": 0.5}])
def test_previews_change_nothing_and_end_at_the_result(
    tiny_checkpoint: Path, source_frames: Tensor, conditioning: Any, changes: dict[str, Any]
) -> None:
    config = EngineConfig(conditioning=conditioning, **changes)
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", config=config)
    plain, session = engine.session(source_frames), engine.session(source_frames)
    for number, camera in enumerate(("pan_right", "tilt_up")):
        events, quiet = list[Event](), list[Event]()
        expected = plain.render(camera, num_inference_steps=4, on_progress=quiet.append)
        assert not any(isinstance(event, Preview) for event in quiet)
        turn = session.render(
            camera, num_inference_steps=4, on_progress=events.append, previews=True
        )
        assert torch.equal(turn.latents, expected.latents)
        shown = pictures(events)
        assert [picture.shape for picture in shown] == [(6, 8, 3)] * 4
        assert session._runner.fitted is not None, number
        if engine.scheduler == "euler":  # its last step goes to the data itself
            assert close(shown[-1], session._runner.fitted.picture(turn.latents[:, 1]))
        assert not torch.equal(shown[0], shown[-1])


def test_turns_in_one_pack_have_their_own_previews(
    tiny_checkpoint: Path, source_frames: Tensor
) -> None:
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu")
    batch, heard = TurnBatch(engine, 1000), dict[int, list[Event]]()

    def listen(event: TurnEvent) -> None:
        heard.setdefault(event.turn, []).append(event.event)

    turns = []
    for camera, previews in (("pan_left", True), ("zoom_in", False), ("tilt_up", True)):
        session = engine.session(source_frames)
        request = session.request(camera)
        turns.append(batch.add(session, request, on_progress=listen, previews=previews))
    batch.run()
    for turn in turns:
        assert isinstance(turn.result, Turn) and turn.result.report["packed_steps"] == 3
        events = heard[turn.number]
        if turn.number == 1:
            assert not any(isinstance(event, Preview) for event in events)
            continue
        fitted = turn.session._runner.fitted
        assert fitted is not None
        assert close(pictures(events)[-1], fitted.picture(turn.result.latents[:, 1]))


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_replayed_steps_have_previews(solver: Any) -> None:
    turns, shown = StandInTurns(), []
    plan, few = turns.plan(), LatentRGB(colours().factors[:4], colours().bias)
    for graphs in (turns.graphs, None):
        denoiser, seen = turns.denoiser(plan, Asked(steps=4, solver=solver), graphs, few), []
        while not denoiser.is_finished:
            denoiser.step()
            seen += [preview.picture for preview in denoiser.previews()]
        assert steps(denoiser.graph_report()) == ((1, 1, 2) if graphs else (4, 0, 0))
        denoiser.release()
        assert len(seen) == 4
        shown.append(seen)
    for replayed, eager in zip(*shown, strict=True):
        assert torch.equal(replayed, eager)


def test_the_embedded_vae_knows_its_colours() -> None:
    engine = Engine.from_pretrained("tiny-nvs", device="cpu")
    vae, camera = engine.vae, named_trajectory("pan_right", 17, (96, 160))
    assert vae.latent_rgb is not None
    frames = render(make_world(3_000_011), camera).frames
    middle = vae.encode(frames)[:, 2]
    # the four frames of the middle latent, in cells of 8x8
    expected = frames[5:9].float().reshape(4, 12, 8, 20, 8, 3).mean(dim=(0, 2, 4))
    error = (vae.latent_rgb.picture(middle).float() - expected).pow(2).mean()
    assert 10 * math.log10(255**2 / float(error)) > 20
    # Wan2.1's are other colours
    other = (wan21().picture(middle).float() - expected).pow(2).mean()
    assert float(other) > 4 * float(error)
