"""Two processes train as one process on both their batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mv2v_engine.checkpoints import load_checkpoint, save_checkpoint
from mv2v_engine.config import SamplingConfig
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.testing import randomise, tiny_config
from mv2v_engine.training.distributed import data_parallel, first_says, own_generator, rank
from mv2v_engine.training.finetune import is_trained
from tests.launched import both_succeed

STEPS = 4

# run by two processes: each saves what it ended with
WORKER = """
import sys
from pathlib import Path

import torch

from mv2v_engine.training.distributed import (
    data_parallel, first_says, from_first, join, leave, own_generator, rank,
)
from mv2v_engine.training.loop import LoopConfig, TrainingLoop

out = Path(sys.argv[1])
join("cpu")
torch.manual_seed(0)
# the second layer takes part in no step, as a merger in steps without merging
model = torch.nn.ModuleList([torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)])


class Objective(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = model

    def forward(self, x):
        return (self.layers[0](x) - x[:, :3].sin()).pow(2).mean()


objective = data_parallel(Objective())
optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]
config = LoopConfig(out=out, minutes=1e6, max_steps=STEPS, log_every=2)
loop = TrainingLoop(model, optimizers, config)
drawn = []


def step(shared):
    drawn.append(torch.randn(5, 6, generator=own_generator(shared)))
    return {"loss": objective(drawn[-1])}


loop.run(step)
said = first_says(10.0 + rank())
made = from_first(lambda: torch.tensor([rank() + 5.0]))
state = {"model": model.state_dict(), "drawn": drawn, "elapsed": loop.elapsed}
state |= {"said": said, "made": made}
torch.save(state, out / f"rank{rank()}.pt")
# as in the commands, nothing of DistributedDataParallel outlives the processes' group
del objective, step
leave()
""".replace("STEPS", str(STEPS))


def _train_alone(batches: list[Tensor]) -> nn.Linear:
    torch.manual_seed(0)
    layer, _ = nn.Linear(6, 3), nn.Linear(6, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step, x in enumerate(batches):
        optimizer.zero_grad()
        (layer(x) - x[:, :3].sin()).pow(2).mean().backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        for group in optimizer.param_groups:  # the loop's schedule, in its warm-up of 100 steps
            group["lr"] = 0.1 * _schedule(step)
        optimizer.step()
    return layer


def _schedule(step: int) -> float:
    cosine = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / STEPS))))
    return (step + 1) / 100 * (0.02 + 0.98 * cosine)


@pytest.mark.slow
def test_two_processes_fine_tune_a_base(tmp_path: Path, cache_folder: Path) -> None:
    """Frozen parameters, recomputed blocks and modules that a plan leaves out, all at once."""
    config = tiny_config()
    model = MV2VTransformer(config)
    randomise(model)
    save_checkpoint(tmp_path / "base", model, config, SamplingConfig(), "base", torch.float32)
    arguments = ["--checkpoint", str(tmp_path / "base"), "--latents", str(cache_folder)]
    arguments += ["--out", str(tmp_path / "out"), "--steps", "6", "--device", "cpu"]
    first, second = both_succeed("-m", "mv2v_engine.training.finetune", *arguments)
    # the first process alone speaks and writes
    assert first.count("the averaged weights") == 1 and not second
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["processes"] == 2
    moved = load_checkpoint(tmp_path / "out" / "model").transformer
    for name, parameter in moved.named_parameters():
        stood = torch.equal(parameter, model.get_parameter(name).to(parameter.dtype))
        assert bool(parameter.isfinite().all())
        if not is_trained(name):
            assert stood, name
    state = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    last = "blocks.2.attn1.to_q.weight"
    assert not torch.equal(state["model"][last], model.get_parameter(last))


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    both_succeed(str(script), str(tmp_path))
    first, second = (
        torch.load(tmp_path / f"rank{index}.pt", weights_only=True) for index in (0, 1)
    )
    # each drew its own samples, and clocks and schedules are the first one's
    assert not any(torch.equal(a, b) for a, b in zip(first["drawn"], second["drawn"], strict=True))
    assert first["said"] == second["said"] == 10.0
    assert first["elapsed"] == second["elapsed"]
    assert float(first["made"]) == float(second["made"]) == 5.0
    both = [torch.cat(pair) for pair in zip(first["drawn"], second["drawn"], strict=True)]
    alone = _train_alone(both)
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    torch.testing.assert_close(first["model"]["0.weight"], alone.weight.detach())
    torch.testing.assert_close(first["model"]["0.bias"], alone.bias.detach())
    assert sum(1 for _ in (tmp_path / "log.csv").open()) == 1 + STEPS // 2


def test_alone_there_is_one_process() -> None:
    module = nn.Linear(2, 2)
    assert data_parallel(module) is module
    assert rank() == 0 and first_says(3.5) == 3.5
    draws = [own_generator(torch.Generator().manual_seed(1)).initial_seed() for _ in range(2)]
    assert draws[0] == draws[1]
    assert draws[0] != own_generator(torch.Generator().manual_seed(2)).initial_seed()
