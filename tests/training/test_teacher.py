"""A teacher: what guidance makes of frozen weights, and a student that learns it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mv2v_engine.config import ConditioningMode
from mv2v_engine.errors import TrainingError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.testing import randomise, tiny_config
from mv2v_engine.tokens.plan import turn_plan
from mv2v_engine.training.flow_map import flow_map_loss
from mv2v_engine.training.losses import Noised, flow_loss
from mv2v_engine.training.recipe import Batch
from mv2v_engine.training.teacher import Teacher, lacking, read_scales

CPU = torch.device("cpu")


def make_model(seed: int) -> MV2VTransformer:
    model = MV2VTransformer(tiny_config())
    torch.manual_seed(seed)
    randomise(model)
    return model


def make_batch(conditioning: ConditioningMode = "joint", memory: int = 1) -> Batch:
    plan = turn_plan(
        tiny_config(), (2, 6, 10), (4,) * memory, fraction=0.5, conditioning=conditioning
    )
    torch.manual_seed(0)
    latents = [torch.randn(2, 4, *segment.grid) for segment in plan.segments]
    return Batch(plan, latents, torch.randn(2, 2 + memory, 2, 12), torch.randn(2, 6, 10))


def noised(batch: Batch) -> Noised:
    return Noised.drawn(batch.targets, torch.Generator().manual_seed(1), 3.0)


@torch.no_grad()
@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_the_velocity_goes_away_from_every_forward_that_lacks_something(
    conditioning: ConditioningMode,
) -> None:
    model, weaker, batch = make_model(1), make_model(2), make_batch(conditioning)
    scales = read_scales(["source=1.5", "memory=2", "text=3", "training=1.25"])
    empty = torch.randn(6, 10)
    given = noised(batch)

    def run(who: MV2VTransformer, segments: list[int], text: torch.Tensor) -> torch.Tensor:
        plan = replace(batch.plan, segments=tuple(batch.plan.segments[i] for i in segments))
        latents = [given.latents, *(batch.latents[i] for i in segments[1:])]
        return who(latents, given.level * 1000, text, plan=plan, cameras=batch.cameras)

    own = run(model, [0, 1, 2], batch.text)
    expected = own + 0.5 * (own - run(model, [0, 2], batch.text))
    expected += 1.0 * (own - run(model, [0, 1], batch.text))
    expected += 2.0 * (own - run(model, [0, 1, 2], empty.expand(2, 6, 10)))
    expected += 0.25 * (own - run(weaker, [0, 1, 2], batch.text))
    teacher = Teacher(model, scales, weaker=weaker, empty_text=empty)
    torch.testing.assert_close(teacher.velocity(batch, given), expected, rtol=1e-4, atol=1e-4)


def test_a_batch_is_not_guided_by_the_lack_of_all_that_it_has() -> None:
    model = make_model(1)
    teacher = Teacher(model, {"source": 2.0, "memory": 2.0})
    alone = make_batch(memory=0)
    assert lacking(alone, "source") is None and lacking(alone, "memory") is None
    plain = Teacher(model, {})
    given = noised(alone)
    assert torch.equal(teacher.velocity(alone, given), plain.velocity(alone, given))


def test_a_student_that_is_its_teacher_has_no_loss_and_guidance_gives_it_one() -> None:
    batch = make_batch()
    student = make_model(1)

    def loss(scales: dict[str, float]) -> float:
        teacher = Teacher(make_model(1), scales)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(3)
        found = flow_loss(student, batch, generator, flow_shift=3.0, device=CPU, teacher=teacher)
        found.backward()
        assert all(p.grad is None for p in teacher._model.parameters())
        return float(found.detach())

    assert loss({}) < 1e-10
    assert loss({"source": 2.0}) > 1e-4


def test_a_map_is_learned_from_the_teacher() -> None:
    batch, student = make_batch(), make_model(1)
    student.add_end_time()
    batch = replace(batch, plan=replace(batch.plan, shape=student.config))
    losses = [
        float(
            flow_map_loss(
                student,
                batch,
                torch.Generator().manual_seed(3),
                longest=0.0,
                flow_shift=3.0,
                device=CPU,
                teacher=teacher,
            )["loss"].detach()
        )
        for teacher in (None, Teacher(make_model(1), {}))
    ]
    assert losses[0] > 1e-2 > losses[1]


@pytest.mark.parametrize("word", ["sauce=2", "source", "source=0.5", "source=nan", "source=11"])
def test_what_is_no_scale_is_refused(word: str) -> None:
    with pytest.raises(TrainingError, match=r"source, memory, text, training.*got"):
        read_scales([word])


def test_weaker_weights_and_their_scale_belong_together() -> None:
    with pytest.raises(TrainingError, match=r"belong together.*no weaker weights"):
        Teacher(make_model(1), {"training": 2.0})
    with pytest.raises(TrainingError, match="belong together"):
        Teacher(make_model(1), {"source": 2.0}, weaker=make_model(2))
