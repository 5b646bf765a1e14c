"""What several processes cannot do is refused by name, before anything is loaded."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from mv2v_engine import Engine, EngineConfig, run
from mv2v_engine.config import WAN_1_3B, ParallelConfig
from mv2v_engine.errors import RequestError
from mv2v_engine.options import parallel_config
from mv2v_engine.parallel.context import even_lengths, head_lengths
from mv2v_engine.parallel.device import rank_device
from mv2v_engine.parallel.traffic import step_traffic
from mv2v_engine.tokens.plan import novel_view_plan

TWO = EngineConfig(parallel=ParallelConfig(context=2))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    def launch(rank: int, size: int) -> None:
        for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))

    return launch


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guidance": 3}, "guidance has one forward or two, got guidance=3"),
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"timeout_seconds": 0.0}, "timeout_seconds must be positive, got 0"),
    ],
)
def test_a_mesh_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ParallelConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step_cache": 0.1}, "exact steps alone"),
        ({"graphs": "on"}, "gloo cannot be captured"),
    ],
)
def test_combinations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        EngineConfig(**fields, parallel=ParallelConfig(guidance=2))


def test_other_processes_than_asked_for(launched: Any) -> None:
    with pytest.raises(RequestError, match="need 2 processes, got 1; start the same command with"):
        Engine.from_pretrained(device="cpu", config=TWO)
    launched(0, 3)
    with pytest.raises(RequestError, match="need 2 processes, got 3"):
        Engine.from_pretrained(device="cpu", config=TWO)


def test_each_process_has_its_own_call(launched: Any) -> None:
    launched(1, 2)
    with pytest.raises(RequestError, match=r"rank 1 of 2: call Engine\.follow"):
        Engine.from_pretrained(device="cpu", config=TWO)
    launched(0, 2)
    with pytest.raises(RequestError, match=r"rank 0.*Engine\.from_pretrained"):
        Engine.follow(device="cpu", config=TWO)


def test_one_gpu_for_all_is_refused() -> None:
    with pytest.raises(RequestError, match="takes a GPU of its own, got device 'cuda:0'"):
        rank_device("cuda:0", TWO.parallel)
    assert rank_device("cpu", TWO.parallel) == torch.device("cpu")


def test_evaluate_has_processes_of_its_own(
    launched: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    launched(0, 2)
    assert run.main(["evaluate", "--out", "unused"]) == 2
    assert "run it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "scale", "asked", "expected"),
    [
        (1, 5.0, (None, None), (1, 1)),
        (2, 5.0, (None, None), (2, 1)),
        (2, 1.0, (None, None), (1, 2)),
        (3, 5.0, (None, None), (1, 3)),
        (8, 5.0, (None, None), (2, 4)),
        (8, 5.0, (1, None), (1, 8)),
        (8, 5.0, (None, 4), (2, 4)),
        (4, 5.0, (None, 4), (1, 4)),
        (4, 5.0, (2, 4), (2, 4)),
    ],
)
def test_the_command_uses_all_processes(
    launched: Any, size: int, scale: float, asked: tuple[Any, Any], expected: tuple[int, int]
) -> None:
    launched(0, size)
    args = argparse.Namespace(guidance=asked[0], context=asked[1], guidance_scale=None)
    found = parallel_config(args, scale)
    assert (found.guidance, found.context) == expected


def test_tokens_and_heads_that_do_not_divide() -> None:
    assert even_lengths(32_763, 4) == [8191, 8191, 8191, 8190]
    assert head_lengths(12, 8) == [2, 2, 2, 2, 1, 1, 1, 1]
    with pytest.raises(RequestError, match=r"the model has 12; use at most 12.*1, 2, 3, 4, 6, 12"):
        head_lengths(12, 16)


def test_bytes_of_a_full_size_step() -> None:
    """docs/parallel.md: ReCamMaster's shape, four remembered videos, unmerged, bf16."""
    plan = novel_view_plan(memory=4, merge="off")
    tokens, width, layers = plan.length, WAN_1_3B.dim, WAN_1_3B.num_layers
    two = step_traffic(plan, guidance=1, context=2, rank=0, element_bytes=2)
    # of each of q, k, v and the result a rank sends away half of its half
    assert two["attention"] == 2 * layers * 4 * (tokens * width // 4) * 2
    assert two["guidance"] == 0
    both = step_traffic(plan, guidance=2, context=1, rank=0, element_bytes=2)
    assert both["attention"] == both["head"] == 0
    assert both["guidance"] == 21 * 60 * 104 * 16 * 2
