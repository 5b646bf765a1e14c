"""Approximate attention from the door to the report: by name, never resumed by another kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine, EngineConfig, run
from mv2v_engine.engine.batch import TurnBatch
from mv2v_engine.engine.graphs import open_graphs
from mv2v_engine.errors import KernelUnavailableError, RequestError, StorageError
from mv2v_engine.models.attention import CrossAttention, SelfAttention
from mv2v_engine.ops import attention as op
from mv2v_engine.serving.work.host import Host


def _engine(checkpoint: Path, attention: str = "sage-reference") -> Engine:
    config = EngineConfig(attention=attention)  # type: ignore[arg-type]
    return Engine.from_pretrained(checkpoint, device="cpu", config=config)


def test_sessions_and_reports_say_it(
    tiny_checkpoint: Path, source_frames: Tensor, tmp_path: Path
) -> None:
    exact = Engine.from_pretrained(tiny_checkpoint, device="cpu")
    latents = exact.session(source_frames).render("pan_right").latents
    engine = _engine(tiny_checkpoint)
    session = engine.session(source_frames, store=tmp_path / "session")
    turn = session.render("pan_right")
    session.close()
    assert turn.report["attention"] == "sage-reference"
    assert "self-attention over queries and keys in eight bits" in turn.report["approximations"]
    error = float((turn.latents - latents).norm() / latents.norm())
    assert 1e-6 < error < 0.05, error
    others = (exact, _engine(tiny_checkpoint, "sparge-reference"))
    digests = {Host(each, max_open=1).about["digest"] for each in (engine, *others)}
    assert len(digests) == 3
    for other in others:
        with pytest.raises(StorageError, match=r"checkpoint.*tiny \(sage-reference attention\)"):
            other.session(source_frames, store=tmp_path / "session", resume=True)
    with pytest.raises(RequestError, match="attention is shared by all engines on these weights"):
        engine.reconfigured(EngineConfig())
    again = engine.session(source_frames, store=tmp_path / "session", resume=True)
    assert len(again.turns) == 1


def test_self_attention_alone(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine(tiny_checkpoint)
    for module in engine.transformer.modules():
        if isinstance(module, SelfAttention):
            assert module.attention_backend == "sage-reference"
        elif isinstance(module, CrossAttention):
            # as `auto` goes with the backend that a CPU has
            assert module.attention_backend in ("auto", "reference")
    # warmed up as any other
    asked: list[str] = []
    choose = op.backends.choose

    def watch(backend: str, *tensors: Tensor, **given: Any) -> str | None:
        asked.append(backend)
        return choose(backend, *tensors, **given)

    monkeypatch.setattr(op.backends, "choose", watch)
    (row,) = engine.warmup([engine.plan_of(0)])
    assert row["tokens"] and "sage-reference" in asked


def test_turns_of_several_sessions_run_one_by_one(
    tiny_checkpoint: Path, source_frames: Tensor
) -> None:
    """It takes no packs; the batch goes on without, and says why."""
    engine = _engine(tiny_checkpoint)
    batch = TurnBatch(engine, token_budget=100_000)
    sessions = [engine.session(source_frames) for _ in range(2)]
    alone = engine.session(source_frames).render("pan_right", seed=4).latents
    asked = [(session, session.request("pan_right", seed=4)) for session in sessions]
    for turn in batch.answer_all(asked):
        assert not isinstance(turn, Exception), turn
        torch.testing.assert_close(turn.latents, alone, rtol=0, atol=0)
    assert batch.token_budget == 1
    assert batch.pack_failure is not None and "takes no packed sequences" in batch.pack_failure


def test_steps_are_not_captured(tiny_checkpoint: Path) -> None:
    with pytest.raises(RequestError, match="graphs=\"on\" cannot be met with attention='sage'"):
        EngineConfig(attention="sage", graphs="on")
    graphs = open_graphs(EngineConfig(attention="sparge"), torch.device("cuda"))
    plan = Engine.from_pretrained(tiny_checkpoint, device="cpu").plan_of(0)
    assert not graphs.serves(plan) and graphs.mode == "auto"
    assert graphs._reason == "attention by sparge is not known to replay rightly"


def test_what_cannot_run_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(KernelUnavailableError, match="'sage', but it needs a CUDA device, not cpu"):
        _engine(tmp_path / "there is no such file", "sage")


def test_on_the_command_line(
    tiny_checkpoint: Path, source_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["novel-view", str(source_clip), "--out", str(tmp_path / "out"), "--device", "cpu"]
    words += ["--camera", "pan_right", "--checkpoint", str(tiny_checkpoint), "--steps", "2"]
    assert run.main([*words, "--attention", "sparge-reference"]) == 0
    (turn,) = json.loads((tmp_path / "out" / "report.json").read_text())["turns"]
    assert turn["attention"] == "sparge-reference"
    capsys.readouterr()
    assert run.main([*words, "--resume"]) == run.REFUSED
    assert "tiny (sparge-reference attention)" in capsys.readouterr().err
