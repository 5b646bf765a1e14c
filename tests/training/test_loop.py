"""The training loop: resumption bit for bit, whole checkpoints, its schedule and average."""

from __future__ import annotations

import csv
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import Tensor, nn

from mv2v_engine.errors import CheckpointError, StorageError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.testing import randomise, tiny_config
from mv2v_engine.training.loop import LoopConfig, TrainingLoop

STEPS = 8


class _Killed(Exception):
    """Stands for the process going away in the middle of a step."""


def _model() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    randomise(model)
    return model


def _loop(out: Path, *, seed: int = 0, max_steps: int = STEPS) -> TrainingLoop:
    model = _model()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=1e-2),
        torch.optim.AdamW(others, lr=1e-2),
    ]
    # every step is saved: a run can be killed at any of them
    config = LoopConfig(
        out=out,
        minutes=1e6,
        max_steps=max_steps,
        warmup_steps=3,
        save_seconds=-1,
        log_every=2,
        seed=seed,
    )
    return TrainingLoop(model, optimizers, config)


def _train(loop: TrainingLoop, *, killed_at: int | None = None) -> list[Tensor]:
    """Train to the end, or until the step is killed; the inputs that every step drew."""
    drawn = []

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        if loop.step == killed_at:
            raise _Killed
        inputs = torch.randn(5, 6, generator=generator)
        drawn.append(inputs)
        loss = (loop.model(inputs) - inputs[:, :3].sin()).pow(2).mean()
        return {"loss": loss, "extra": loss.detach() * 2}

    if killed_at is None:
        loop.run(step)
    else:
        with pytest.raises(_Killed):
            loop.run(step)
    return drawn


def test_a_run_is_resumed_with_its_own_transformer_alone(tmp_path: Path) -> None:
    """What has no weights is in no state dict: other cameras in attention would go unseen."""
    config = LoopConfig(out=tmp_path, minutes=1e6, max_steps=1)

    def loop(**changes: Any) -> TrainingLoop:
        model = MV2VTransformer(tiny_config(**changes))
        return TrainingLoop(model, [torch.optim.SGD(model.parameters(), lr=0.0)], config)

    loop(camera_attention="prope_fused").save()
    with pytest.raises(
        CheckpointError, match=r"transformer has camera_attention 'prope_fused', not 'none'"
    ):
        loop()
    with pytest.raises(CheckpointError, match=r"scene_scale 4\.0, not 2\.0"):
        loop(camera_attention="prope_fused", scene_scale=2.0)
    assert loop(camera_attention="prope_fused").step == 0
    # written before a run kept its shape
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["shape"]
    torch.save(state, tmp_path / "checkpoint.pt")
    loop()


@pytest.mark.parametrize("kills", [(3,), (1, 2, 6)])
def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path, kills: tuple[int, ...]) -> None:
    unbroken = _loop(tmp_path / "a")
    seen = _train(unbroken)
    drawn = []
    for kill in kills:
        drawn += _train(_loop(tmp_path / "b"), killed_at=kill)
    resumed = _loop(tmp_path / "b")
    assert resumed.step == kills[-1]
    drawn += _train(resumed)
    assert len(seen) == len(drawn) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(seen, drawn, strict=True))
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for name, value in unbroken.averaged().items():
        assert torch.equal(value, resumed.averaged()[name]), name
    assert not torch.equal(
        unbroken.model.state_dict()["0.weight"], _model().state_dict()["0.weight"]
    )


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    _train(_loop(tmp_path))
    again = _loop(tmp_path)
    before = {name: value.clone() for name, value in again.model.state_dict().items()}
    assert _train(again) == [] and again.step == STEPS
    assert all(torch.equal(value, before[n]) for n, value in again.model.state_dict().items())


def test_elapsed_time_counts_over_resumptions(tmp_path: Path) -> None:
    loop = _loop(tmp_path)
    loop.config = replace(loop.config, minutes=1.0)
    loop.elapsed = 60.0
    assert _train(loop) == []
    assert _loop(tmp_path).elapsed == 60.0


def test_the_data_follow_seed_and_step(tmp_path: Path) -> None:
    first, same, other = (
        _train(_loop(tmp_path / str(i), seed=seed)) for i, seed in enumerate((0, 0, 1))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert len({float(inputs.sum()) for inputs in first}) == STEPS


def test_checkpoints_are_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = _loop(tmp_path)
    _train(loop, killed_at=2)
    whole = loop.checkpoint.read_bytes()

    def torn(state: object, file: BinaryIO) -> None:
        file.write(whole[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(StorageError, match="No space left"):
        loop.save()
    assert loop.checkpoint.read_bytes() == whole
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_the_schedule_warms_up_and_falls(tmp_path: Path) -> None:
    loop, scales = _loop(tmp_path, max_steps=40), []
    for loop.step in range(41):
        scales.append(loop._schedule())
    assert scales[0] == pytest.approx(1 / 3, rel=0.01)
    assert max(scales) == scales[2]  # the third of three warm-up steps
    assert all(a > b for a, b in pairwise(scales[2:]))
    assert scales[40] == pytest.approx(0.02)


def test_the_average_follows_the_weights(tmp_path: Path) -> None:
    loop = _loop(tmp_path)
    _train(loop)
    average = loop.averaged()
    live = {name: parameter.detach() for name, parameter in loop.model.named_parameters()}
    first = {name: parameter.detach() for name, parameter in _model().named_parameters()}
    assert set(average) == set(live)
    for name, value in average.items():
        from_start = float((value - first[name]).norm())
        assert from_start > 0
        assert float((value - live[name]).norm()) < float((first[name] - live[name]).norm())


def test_the_log_has_a_row_every_few_steps(tmp_path: Path) -> None:
    _train(_loop(tmp_path), killed_at=4)
    _train(_loop(tmp_path))
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8]
    assert {"loss", "extra", "seconds", "steps_per_second", "lr_scale"} <= set(rows[0])
    for row in rows:
        # one process, one batch of one sample a step
        assert float(row["samples_per_second"]) == float(row["steps_per_second"])
        assert float(row["extra"]) == pytest.approx(2 * float(row["loss"]), rel=1e-5)


def test_a_run_shorter_than_a_row_has_one_all_the_same(tmp_path: Path) -> None:
    loop = _loop(tmp_path)
    loop.config = replace(loop.config, log_every=100)
    _train(loop)
    with (tmp_path / "log.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [STEPS]


def test_a_finished_run_leaves_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _train(_loop(tmp_path))
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_accumulated_batches_make_one_step_of_their_mean(tmp_path: Path) -> None:
    weights, rows = [], []
    for accumulate, batch in ((2, 5), (1, 10)):
        loop = _loop(tmp_path / str(accumulate))
        loop.config = replace(loop.config, accumulate=accumulate, batch=batch, log_every=1)

        def step(generator: torch.Generator, loop: TrainingLoop = loop, batch: int = batch) -> Any:
            inputs = torch.rand(batch, 6, generator=generator)
            return {"loss": (loop.model(inputs) - inputs[:, :3].sin()).pow(2).mean()}

        loop.run(step)
        weights.append(loop.model.state_dict())
        with (loop.config.out / "log.csv").open() as file:
            rows.append(list(csv.DictReader(file)))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-5)
    for row in (*rows[0], *rows[1]):
        samples, steps = float(row["samples_per_second"]), float(row["steps_per_second"])
        assert samples == pytest.approx(10 * steps, rel=0.01)


def test_frozen_weights_are_neither_saved_nor_averaged(tmp_path: Path) -> None:
    model = _model()
    model.get_submodule("0").requires_grad_(False)

    def loop() -> TrainingLoop:
        trained = [p for p in model.parameters() if p.requires_grad]
        config = LoopConfig(out=tmp_path, max_steps=2)
        return TrainingLoop(model, [torch.optim.AdamW(trained)], config)

    first = loop()
    _train(first)
    state = torch.load(first.checkpoint, weights_only=True)
    assert set(state["model"]) == set(state["ema"]) == {"2.weight", "2.bias"}
    assert set(first.averaged()) == set(model.state_dict())
    assert loop().step == 2

    # earlier versions saved and averaged frozen weights too
    state["model"] = model.state_dict()
    state["ema"] = {name: p.detach() for name, p in model.named_parameters()}
    torch.save(state, first.checkpoint)
    again = loop()
    assert torch.equal(again.ema["2.weight"], state["ema"]["2.weight"])


def _damage_checkpoint(path: Path, how: str) -> None:
    content = path.read_bytes()
    state = torch.load(path, weights_only=True)
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("step,loss\n")
    else:
        if how == "keys":
            del state["optimizers"]
        elif how == "optimizers":
            state["optimizers"].pop()
        elif how == "shape":
            state["model"]["0.weight"] = torch.zeros(2, 2)
        elif how == "missing":
            del state["model"]["0.weight"]
        elif how == "average":
            del state["ema"]["0.weight"]
        torch.save(state, path)


@pytest.mark.parametrize(
    "how", ["cut", "empty", "text", "keys", "optimizers", "shape", "missing", "average"]
)
def test_a_checkpoint_that_cannot_be_resumed_from_is_named(tmp_path: Path, how: str) -> None:
    loop = _loop(tmp_path)
    _train(loop, killed_at=2)
    _damage_checkpoint(loop.checkpoint, how)
    before = loop.checkpoint.read_bytes()
    with pytest.raises(CheckpointError, match=rf"{loop.checkpoint.name}: .*delete it to start"):
        _loop(tmp_path)
    assert loop.checkpoint.read_bytes() == before
