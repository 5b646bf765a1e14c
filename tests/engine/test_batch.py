"""Turns of several sessions in one batch: each as it is alone, whatever happens to the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine import CancelToken, Engine, EngineConfig, Session, Turn
from mv2v_engine.engine import graphs
from mv2v_engine.engine.batch import TOKENS, TurnBatch, TurnEvent
from mv2v_engine.engine.denoise import Denoiser, StepDue
from mv2v_engine.engine.request import Request
from mv2v_engine.errors import CancelledError, KernelUnavailableError, RequestError
from mv2v_engine.models.sample import Sample
from mv2v_engine.progress import StepDone
from mv2v_engine.testing import relative_error
from tests.engine.graph_stand_in import StandIn

# cameras of earlier turns, the camera asked for, steps, guidance scale
TURNS: list[tuple[tuple[str, ...], str, int, float]] = [
    (("pan_right", "arc_left"), "pan_left", 3, 1.0),
    ((), "arc_right", 2, 3.0),
    (("tilt_up",), "tilt_down", 4, 2.0),
    ((), "zoom_in", 1, 1.0),
]
# float32 sums in another order, through the blocks, three steps and guidance
ROUNDING = 1e-4


@pytest.fixture
def engine(tiny_checkpoint: Path) -> Engine:
    config = EngineConfig(batch_tokens=TOKENS)
    return Engine.from_pretrained(tiny_checkpoint, device="cpu", config=config)


def _request(engine: Engine, camera: str, steps: int = 2, scale: float = 1.0) -> Request:
    return Request.view(
        camera,
        engine.sampling,
        memory="retrieved",
        seed=7,
        num_inference_steps=steps,
        guidance_scale=scale,
    )


def _session(engine: Engine, frames: Tensor, cameras: tuple[str, ...] = ()) -> Session:
    """With finished turns of one step."""
    session = engine.session(frames)
    for camera in cameras:
        session.ask(_request(engine, camera, 1))
    return session


def _turn(result: Turn | Exception) -> Turn:
    assert isinstance(result, Turn), result
    return result


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[list[Sample]]:
    """Every pack that is run."""
    from mv2v_engine.models.dit import MV2VTransformer

    seen: list[list[Sample]] = []
    real = MV2VTransformer.forward_samples

    def watch(self: MV2VTransformer, samples: list[Sample]) -> list[Tensor]:
        if len(samples) > 1:
            seen.append(samples)
        return real(self, samples)

    monkeypatch.setattr(MV2VTransformer, "forward_samples", watch)
    return seen


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_each_turn_is_what_it_is_alone(
    conditioning: Any, worded_checkpoint: Path, source_frames: Tensor, packs: list[list[Sample]]
) -> None:
    config = EngineConfig(conditioning=conditioning, merge_fraction=0.5, batch_tokens=TOKENS)
    engine = Engine.from_pretrained(worded_checkpoint, device="cpu", config=config)
    batched, alone = (
        [_session(engine, source_frames, earlier) for earlier, *_ in TURNS] for _ in range(2)
    )
    requests = [_request(engine, *asked) for _, *asked in TURNS]
    results = engine.answer_all(list(zip(batched, requests, strict=True)))
    for result, session, twin, request in zip(results, batched, alone, requests, strict=True):
        turn, expected = _turn(result), twin.ask(request)
        assert relative_error(turn.latents, expected.latents) < ROUNDING
        assert (turn.frames.int() - expected.frames.int()).abs().max() <= 1
        assert session.turns[-1] is turn and turn.number == expected.number
        same = ("forwards", "flops", "merged_frames", "plan", "conditioning_bytes")
        assert {k: turn.report[k] for k in same} == {k: expected.report[k] for k in same}
        assert expected.report["packed_steps"] == 0 and turn.report["merged_frames"]
    # the last of four steps is alone; a first static step keeps K and V, and is alone too
    packed = [_turn(result).report["packed_steps"] for result in results]
    assert packed == ([3, 2, 3, 1] if conditioning == "joint" else [2, 1, 2, 0])
    assert [len(pack) for pack in packs] == ([6, 5, 3] if conditioning == "joint" else [5, 3])


def test_turns_of_one_session_remember_each_other(engine: Engine, source_frames: Tensor) -> None:
    cameras = ("pan_right", "arc_left", "pan_right")
    session, beside, twin = (engine.session(source_frames) for _ in range(3))
    asked = [(session, _request(engine, camera)) for camera in cameras]
    results = engine.answer_all([*asked, (beside, _request(engine, "tilt_up", 5))])
    for result, camera in zip(results[:3], cameras, strict=True):
        turn, expected = _turn(result), twin.ask(_request(engine, camera))
        own, theirs = (report["memory"]["retrieved"] for report in (turn.report, expected.report))
        assert [row["turn"] for row in own] == [row["turn"] for row in theirs]
        assert len(own) == turn.number - 1
        assert relative_error(turn.latents, expected.latents) < ROUNDING
    assert [turn.number for turn in session.turns] == [1, 2, 3]
    # as one leaves, the next enters beside the turn that is still running
    assert _turn(results[3]).report["packed_steps"] == 5


def test_packs_keep_the_budget(
    engine: Engine, source_frames: Tensor, packs: list[list[Sample]]
) -> None:
    # 84 tokens with a memory, else 72; a turn that fits beside the first passes one that does not
    for budget, expected in ((156, [[84, 72], [84, 72]]), (155, [[72, 72]]), (1, [])):
        packs.clear()
        sessions = [_session(engine, source_frames, ("pan_left",) * n) for n in (1, 0, 0)]
        requests = [_request(engine, "pan_right", steps) for steps in (2, 2, 1)]
        for result in engine.answer_all(
            list(zip(sessions, requests, strict=True)), token_budget=budget
        ):
            _turn(result)
        assert [[s.num_tokens for s in pack] for pack in packs] == expected


def test_on_a_cpu_turns_run_one_after_the_other_unless_told_otherwise(
    engine: Engine, source_frames: Tensor, packs: list[list[Sample]]
) -> None:
    plain = engine.reconfigured(EngineConfig())
    sessions = [plain.session(source_frames) for _ in range(2)]
    ended: list[int] = []

    def listen(event: TurnEvent) -> None:
        if isinstance(event.event, StepDone):
            ended.append(event.turn)

    request = _request(plain, "pan_left")
    turns = [(session, request) for session in sessions]
    expected = plain.session(source_frames).ask(request)
    for result in plain.answer_all(turns, on_progress=listen):
        assert torch.equal(_turn(result).latents, expected.latents)
    assert ended == [0, 0, 1, 1] and not packs


def test_a_turn_can_be_added_while_others_run(engine: Engine, source_frames: Tensor) -> None:
    batch, late = TurnBatch(engine), []

    def add_another(event: TurnEvent) -> None:
        if isinstance(event.event, StepDone) and not late:
            late.append(batch.add(engine.session(source_frames), _request(engine, "tilt_up")))

    first = batch.add(
        engine.session(source_frames), _request(engine, "pan_left", 4), on_progress=add_another
    )
    batch.run()
    assert first.is_done and late[0].is_done
    assert [_turn(t.result).report["packed_steps"] for t in (first, *late) if t.result] == [2, 2]


def test_events_name_their_turn(engine: Engine, source_frames: Tensor) -> None:
    sessions = [engine.session(source_frames, id=name) for name in ("ann", "bob")]
    events: list[TurnEvent] = []
    asked = [(session, _request(engine, "pan_left")) for session in sessions]
    engine.answer_all([*asked, asked[0]], on_progress=events.append)
    twin, expected = engine.session(source_frames), []
    twin.ask(_request(engine, "pan_left"), expected.append)
    for number, session in enumerate(("ann", "bob")):
        own = [e.event for e in events if (e.turn, e.session) == (number, session)]
        assert [type(event) for event in own] == [type(event) for event in expected]
    assert {(e.turn, e.session) for e in events} == {(0, "ann"), (1, "bob"), (2, "ann")}


def _break_step(monkeypatch: pytest.MonkeyPatch, engine: Engine, steps: int) -> None:
    """Turns of so many steps fail at their second one."""
    real = Denoiser.advance

    def advance(self: Denoiser, velocities: list[Tensor]) -> None:
        if self.total == steps and self.index == 1:
            raise RuntimeError("broken step")
        real(self, velocities)

    monkeypatch.setattr(Denoiser, "advance", advance)


@pytest.mark.parametrize("fault", ["prepare", "step", "progress", "pack", "finish", "cancel"])
def test_a_failing_turn_leaves_the_others_as_they_are(
    fault: str,
    engine: Engine,
    source_frames: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sessions = [engine.session(source_frames) for _ in range(3)]
    requests = [_request(engine, "pan_left", steps) for steps in (3, 4, 2)]
    expected = {i: engine.session(source_frames).ask(requests[i]) for i in (0, 2)}
    again, cancels = (sessions[1], _request(engine, "zoom_in")), [CancelToken() for _ in range(4)]
    error, heard = RuntimeError, list[TurnEvent]()

    def listen(event: TurnEvent) -> None:
        heard.append(event)
        is_second_step = isinstance(event.event, StepDone) and event.event.step == 2
        if event.turn == 1 and is_second_step and fault == "progress":
            raise RuntimeError("broken listener")
        if event.turn == 1 and is_second_step and fault == "cancel":
            cancels[1].cancel()

    if fault == "prepare":
        monkeypatch.setattr(sessions[1]._recall, "recall", _raise)
    elif fault == "step":
        _break_step(monkeypatch, engine, 4)
    elif fault == "pack":
        _refuse_packs(monkeypatch, engine, RuntimeError("broken"))
    elif fault == "finish":
        monkeypatch.setattr(sessions[1]._kept, "keep_view", _raise)
    else:
        error = CancelledError if fault == "cancel" else RuntimeError
    turns = [*zip(sessions, requests, strict=True), again]
    results = engine.answer_all(turns, cancels=cancels, on_progress=listen)
    for i, turn in expected.items():
        assert relative_error(_turn(results[i]).latents, turn.latents) < ROUNDING
    if fault == "pack":
        assert all(_turn(result).report["packed_steps"] == 0 for result in results)
    else:
        assert isinstance(results[1], error)
    if fault in ("step", "progress", "cancel"):
        # the session goes on without the turn that failed
        assert sessions[1].turns == [results[3]]
    assert {event.turn for event in heard} == {0, 1, 2, 3} and not engine.cache._pins


def _raise(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("broken")


def _refuse_packs(monkeypatch: pytest.MonkeyPatch, engine: Engine, error: Exception) -> list[int]:
    """Forwards of several samples fail; how many samples each had."""
    real, asked = engine.transformer.forward_samples, list[int]()

    def run(samples: list[Sample]) -> list[Tensor]:
        if len(samples) == 1:
            return real(samples)
        asked.append(len(samples))
        raise error

    monkeypatch.setattr(engine.transformer, "forward_samples", run)
    return asked


def test_a_pack_that_does_not_fit_runs_apart_and_halves_the_budget(
    engine: Engine, source_frames: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuse_packs(monkeypatch, engine, torch.OutOfMemoryError("CUDA out of memory"))
    batch = TurnBatch(engine)
    turns = [(engine.session(source_frames), _request(engine, "pan_left")) for _ in range(3)]
    results = batch.answer_all(turns)
    # 3 x 72 tokens, then 72 + ... no two fit
    assert batch.token_budget == 108 and batch.pack_failure == "CUDA out of memory"
    assert [_turn(result).report["packed_steps"] for result in results] == [0, 0, 0]


def test_a_library_that_takes_no_packs_is_asked_once(
    engine: Engine, source_frames: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = KernelUnavailableError("cudnn takes no packed sequences")
    asked = _refuse_packs(monkeypatch, engine, error)
    batch = TurnBatch(engine)
    turns = [(engine.session(source_frames), _request(engine, "pan_left", 3)) for _ in range(2)]
    for result in batch.answer_all(turns):
        _turn(result)
    assert asked == [2] and batch.pack_failure == "cudnn takes no packed sequences"


def test_cancelled_and_abandoned_turns_end(engine: Engine, source_frames: Tensor) -> None:
    cancelled = CancelToken()
    cancelled.cancel()
    batch = TurnBatch(engine, 72)
    sessions = [engine.session(source_frames) for _ in range(3)]
    turns = [
        batch.add(session, _request(engine, "pan_left"), cancel=token)
        for session, token in zip(sessions, (None, cancelled, None), strict=True)
    ]
    assert batch.tick()
    assert [turn.is_done for turn in turns] == [False, True, False]
    batch.close()
    assert not batch.tick() and not engine.cache._pins
    assert all(isinstance(turn.result, CancelledError) for turn in turns)
    assert not any(session.turns for session in sessions)
    # nothing of it stays: the session serves on
    assert sessions[0].render("pan_left").number == 1


def test_rejects_what_it_cannot_batch(
    engine: Engine, tiny_checkpoint: Path, source_frames: Tensor
) -> None:
    turn = (engine.session(source_frames), _request(engine, "pan_left"))
    with pytest.raises(RequestError, match="1 turns need as many cancel tokens, got 2"):
        engine.answer_all([turn], cancels=[None, None])
    with pytest.raises(RequestError, match="token_budget must be at least 1, got 0"):
        TurnBatch(engine, 0)
    with pytest.raises(RequestError, match="batch_tokens must be at least 1"):
        EngineConfig(batch_tokens=-1)
    other = Engine.from_pretrained(tiny_checkpoint, device="cpu")
    with pytest.raises(RequestError, match="a batch takes sessions of one engine"):
        other.answer_all([turn])
    assert engine.answer_all([]) == []


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_packed_and_captured_steps_make_one_turn(
    conditioning: Any, engine: Engine, source_frames: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longer turn is packed with the shorter one first, then runs alone: replayed."""
    monkeypatch.setattr(graphs, "open_recorder", lambda device: StandIn())
    config = EngineConfig(conditioning=conditioning, graphs="on", merge_fraction=0.5)
    captured = engine.reconfigured(config)
    plain = engine.reconfigured(replace(config, graphs="off"))
    requests = [_request(engine, "pan_left", steps) for steps in (6, 2)]
    sessions = [_session(captured, source_frames, ("tilt_up",)) for _ in requests]
    for result, request in zip(
        captured.answer_all(list(zip(sessions, requests, strict=True)), token_budget=TOKENS),
        requests,
        strict=True,
    ):
        turn = _turn(result)
        expected = _session(plain, source_frames, ("tilt_up",)).ask(request)
        assert relative_error(turn.latents, expected.latents) < ROUNDING
        assert turn.report["merged_frames"] == expected.report["merged_frames"] != []
        if request.num_inference_steps == 6:
            assert turn.report["graphs"]["replayed_steps"] > 0 < turn.report["packed_steps"]


def test_a_replayed_step_forgets_the_merges_of_a_packed_one(
    engine: Engine, source_frames: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "open_recorder", lambda device: StandIn())
    captured = engine.reconfigured(EngineConfig(graphs="on", merge_fraction=0.5))
    turn = captured.session(source_frames).hand_over(_request(captured, "pan_left", 4))
    due = next(event for event in turn if isinstance(event, StepDue)).denoiser
    for index in range(4):
        if index == 2:
            own = due.samples()
            assert own is not None
            due.advance(captured.transformer.forward_samples([*own, *own])[:1])
            stale = list(due.branches[0].records)
        else:
            due.step()
    assert due.graph_report()["replayed_steps"] == 1 and stale
    records = due.result().records
    assert len(records) == 2 and not any(record is old for record in records for old in stale)
    turn.close()


def test_steps_that_reuse_earlier_ones_run_alone(engine: Engine, source_frames: Tensor) -> None:
    reusing = engine.reconfigured(EngineConfig(step_cache=9.0))
    sessions = [reusing.session(source_frames) for _ in range(2)]
    request = _request(engine, "pan_left", 4)
    expected = reusing.session(source_frames).ask(request)
    turns = [(session, request) for session in sessions]
    for result in reusing.answer_all(turns, token_budget=TOKENS):
        assert torch.equal(_turn(result).latents, expected.latents)
        assert _turn(result).report["reuse"] == expected.report["reuse"]


def test_a_fault_of_the_program_ends_the_batch(engine: Engine, source_frames: Tensor) -> None:
    def broken(event: TurnEvent) -> None:
        raise KeyError("no such thing")

    batch = TurnBatch(engine)
    turns = [
        batch.add(engine.session(source_frames), _request(engine, "pan_left"), on_progress=listen)
        for listen in (None, broken)
    ]
    with pytest.raises(KeyError):
        batch.run()
    assert all(isinstance(turn.result, CancelledError) for turn in turns)
    assert not engine.cache._pins


def test_an_engine_on_the_same_weights_shares_a_batch(
    engine: Engine, source_frames: Tensor
) -> None:
    other = engine.reconfigured(EngineConfig(conditioning="static", merge="off"))
    request = _request(engine, "pan_left", 3)
    turns = [(own.session(source_frames), request) for own in (engine, other)]
    results = engine.answer_all(turns)
    for result, own in zip(results, (engine, other), strict=True):
        expected = own.session(source_frames).ask(request)
        assert relative_error(_turn(result).latents, expected.latents) < ROUNDING
    assert [_turn(result).report["packed_steps"] for result in results] == [2, 2]
