"""Turns of a session: what they remember, what they report, and that they can be repeated."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine import CameraTrajectory, CancelToken, Engine, Session
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.engine.request import Request
from mv2v_engine.errors import CameraError, CancelledError, CheckpointError, RequestError
from mv2v_engine.memory.ranking import Ranker
from mv2v_engine.progress import Event, StageDone, StageStarted, StepDone
from mv2v_engine.testing import randomise
from mv2v_engine.video.io import read_video
from tests.conftest import configured, has_products, save_tiny

CAMERAS = ("pan_right", "arc_left", "pan_right")


def test_later_turns_remember_earlier_ones(engine: Engine, source_frames: Tensor) -> None:
    session = engine.session(source_frames)
    turns = [session.render(camera) for camera in CAMERAS]
    assert [turn.number for turn in session.turns] == [1, 2, 3]
    for turn in turns:
        assert turn.frames.shape == source_frames.shape and turn.frames.dtype == torch.uint8
        assert turn.latents.shape == (16, 3, 6, 8) and bool(turn.latents.isfinite().all())
    memories = [turn.report["memory"] for turn in turns]
    assert [len(memory["retrieved"]) for memory in memories] == [0, 1, 2]
    assert "empty" in memories[0]["reason"] and memories[2]["reason"] is None
    first, second = memories[2]["retrieved"]
    # the third turn repeats the first one's camera, so that is what it sees best
    assert (first["turn"], second["turn"]) == (1, 2)
    assert first["score"] == 1.0 > second["score"] > 0
    assert {row["tokenizer"] for row in memories[2]["retrieved"]} == {"1x4x4"}


def test_a_report_is_whole_and_plain(engine: Engine, source_frames: Tensor) -> None:
    session = engine.session(source_frames)
    session.render("pan_right")
    report = session.render("arc:-20").report
    assert json.loads(json.dumps(report)) == report
    assert report["turn"] == 2 and report["camera"] == "arc:-20"
    # 3 frames of 6x8 latents: 12 tokens of 2x2 each, 4 of a memory's 4x4
    assert report["plan"]["tokens_by_kind"] == {"target": 36, "source": 36, "memory": 12}
    for merge, planned in zip(report["merged_frames"], report["plan"]["merges"], strict=True):
        merged = [frame for frames in merge["frames"].values() for frame in frames]
        assert len(merged) == planned["frames"] > 0
        assert merge["frames"].keys() <= {"source", "turn 1"}
        assert merge["tokens_after"] < merge["tokens_before"]
    assert report["forwards"] == 3
    assert report["flops"] == 3 * sum(report["flops_per_forward"].values()) > 0
    assert set(report["seconds"]) == {"vae", "text", "memory", "sampling"}
    assert all(report["process_peak_bytes"][stage] > 0 for stage in report["seconds"])
    assert report["backend"] == engine.backend and report["device"] == "cpu"


def test_same_seed_same_bits(tiny_checkpoint: Path, engine: Engine, source_frames: Tensor) -> None:
    session = engine.session(source_frames)
    frames = [session.render(camera, seed=3).frames for camera in CAMERAS]
    # another engine, another session, other memory in the cache
    again = Engine.from_pretrained(tiny_checkpoint, device="cpu")
    again.session(source_frames).render("tilt_up")
    repeated = again.session(source_frames)
    for camera, expected in zip(CAMERAS, frames, strict=True):
        assert torch.equal(repeated.render(camera, seed=3).frames, expected)
    other = engine.session(source_frames).render(CAMERAS[0], seed=4)
    assert not torch.equal(other.frames, frames[0])


def test_memory_none_forgets(engine: Engine, source_frames: Tensor) -> None:
    session = engine.session(source_frames)
    first = session.render("pan_right", memory="none")
    session.render("arc_left")
    forgetful = session.render("pan_right", memory="none")
    assert torch.equal(forgetful.latents, first.latents)
    assert forgetful.report["memory"]["retrieved"] == []
    assert not torch.equal(session.render("pan_right").latents, first.latents)


def test_memory_previous_takes_the_last_turn_as_source(
    engine: Engine, source_frames: Tensor
) -> None:
    session = engine.session(source_frames)
    first = session.render("pan_right", memory="previous")
    assert torch.equal(first.latents, engine.session(source_frames).render("pan_right").latents)
    second = session.render("arc_left", memory="previous")
    assert second.report["plan"]["tokens_by_kind"] == {"target": 36, "source": 36, "memory": 0}
    # the same turn, asked of a session whose source is that last turn
    other = engine.session(source_frames, cameras=first.trajectory)
    other._runner.source_latents = first.latents
    assert torch.equal(other.render("arc_left").latents, second.latents)


def test_memory_alone_drops_the_source_once_there_is_memory(
    engine: Engine, source_frames: Tensor
) -> None:
    session = engine.session(source_frames)
    first = session.render("pan_right", memory="alone")
    assert torch.equal(first.latents, engine.session(source_frames).render("pan_right").latents)
    second = session.render("arc_left", memory="alone")
    assert second.report["plan"]["tokens_by_kind"] == {"target": 36, "source": 0, "memory": 12}
    assert [row["turn"] for row in second.report["memory"]["retrieved"]] == [1]
    # the source's pixels are out of reach, its camera still is the world's origin
    other = engine.session(255 - source_frames)
    other.adopt(first)
    assert torch.equal(other.render("arc_left", memory="alone").latents, second.latents)
    assert not torch.equal(other.render("arc_left").latents, second.latents)


def test_uniform_tokens_and_random_retrieval(tiny_checkpoint: Path, source_frames: Tensor) -> None:
    uniform = configured(tiny_checkpoint, memory_tokenizers="uniform").session(source_frames)
    uniform.render("pan_right")
    report = uniform.render("arc_left").report
    assert report["plan"]["tokens_by_kind"] == {"target": 36, "source": 36, "memory": 36}
    assert report["memory"]["retrieved"][0]["tokenizer"] == "1x2x2"

    engine = configured(tiny_checkpoint, memory_ranking="random", max_memory=1)
    session = engine.session(source_frames)
    for camera in ("pan:10", "pan:-10", "tilt:5", "arc:12"):
        session.render(camera, num_inference_steps=1)
    request = functools.partial(Request.view, "pan:10", engine.sampling, memory="retrieved")
    drawn = [session.plan_turn(request(seed=seed))[0] for seed in range(30)]
    # overlap would always choose the first turn
    assert {retrieval.turns for retrieval in drawn} == {(1,), (2,), (3,), (4,)}
    assert all(0 <= retrieval.scores[0] <= 1 for retrieval in drawn)
    again = [session.plan_turn(request(seed=seed))[0].ids for seed in range(30)]
    assert again == [retrieval.ids for retrieval in drawn]
    assert session.render("tilt:1").report["memory"]["ranking"] == "random"


def test_rankings_by_what_a_video_adds(tmp_path: Path, source_frames: Tensor) -> None:
    """Two of four turns: the second one shows what neither the source nor the first one does."""
    folder = save_tiny(tmp_path / "tiny")
    with pytest.raises(CheckpointError, match=r"no ranking.safetensors.*training.ranking"):
        configured(folder, memory_ranking="learned")
    ranker = Ranker(16)
    randomise(ranker)
    ranker.save(folder)
    rankings = {}
    for name in ("fov", "coverage", "learned"):
        session = configured(folder, memory_ranking=name, max_memory=2).session(source_frames)
        for camera in ("static", "pan:20", "pan:19", "tilt:15"):
            session.render(camera, num_inference_steps=1)
        turn = session.render("pan:25+tilt:15", num_inference_steps=1)
        assert turn.report["memory"]["ranking"] == name
        rankings[name] = [row["turn"] for row in turn.report["memory"]["retrieved"]]
        # a turn of what the source shows needs none that shows the same
        still = session.plan_turn(
            Request.view("static", session.parts.sampling, memory="retrieved")
        )[0]
        assert (still.ids == ()) == (name != "fov")
    assert rankings["fov"] == [2, 3]
    assert sorted(rankings["coverage"]) == [2, 4] or sorted(rankings["coverage"]) == [3, 4]
    assert 1 not in rankings["learned"] and len(rankings["learned"]) == 2
    # the same weights, the same choice
    again = configured(folder, memory_ranking="learned", max_memory=2).session(source_frames)
    for earlier in session.turns[:4]:
        again.adopt(earlier)
    planned = again.plan_turn(
        Request.view("pan:25+tilt:15", session.parts.sampling, memory="retrieved")
    )[0]
    assert list(planned.turns) == rankings["learned"]


def test_a_planned_turn_is_the_one_that_runs(engine: Engine, source_frames: Tensor) -> None:
    session = engine.session(source_frames)
    session.render("pan_right")
    request = Request.view("arc_left", engine.sampling, memory="retrieved")
    retrieval, plan = session.plan_turn(request)
    assert len(session.turns) == 1
    report = session.ask(request).report
    assert report["plan"] == plan.describe()
    assert report["memory"]["retrieved"] == retrieval.to_dict()["retrieved"]


def test_turns_are_adopted_in_order(engine: Engine, source_frames: Tensor) -> None:
    one = engine.session(source_frames)
    turns = [one.render(camera) for camera in CAMERAS]
    # what is given need not be encoded again
    latents = engine.vae.encode(source_frames)
    other = engine.session(source_frames, source_latents=latents)
    with pytest.raises(RequestError, match=r"must have shape \[16, 3, 6, 8\], got \[16, 2, 6, 8\]"):
        engine.session(source_frames, source_latents=latents[:, 1:])
    with pytest.raises(RequestError, match="next turn is number 1, got a turn that was number 2"):
        other.adopt(turns[1])
    for turn in turns[:2]:
        other.adopt(turn)
    events: list[Event] = []
    last = other.render(CAMERAS[2], on_progress=events.append)
    assert torch.equal(last.latents, turns[2].latents)
    assert events[0] == StageStarted("text")


@pytest.mark.parametrize("count", [0, 1])
def test_at_most_so_many_are_remembered(
    tiny_checkpoint: Path, source_frames: Tensor, count: int
) -> None:
    session = configured(tiny_checkpoint, max_memory=count).session(source_frames)
    for camera in CAMERAS:
        turn = session.render(camera)
    assert [row["turn"] for row in turn.report["memory"]["retrieved"]] == [1][:count]


def test_a_small_cache_forgets_the_oldest(tiny_checkpoint: Path, source_frames: Tensor) -> None:
    one_video = 16 * 3 * 6 * 8 * 4
    engine = configured(tiny_checkpoint, cache_bytes=one_video)
    session = engine.session(source_frames)
    for camera in CAMERAS:
        turn = session.render(camera)
        assert engine.cache.bytes_used == one_video
    assert [row["turn"] for row in turn.report["memory"]["retrieved"]] == [2]


def test_sessions_do_not_see_each_other(engine: Engine, source_frames: Tensor) -> None:
    one, other = engine.session(source_frames, id="one"), engine.session(source_frames, id="o")
    one.render("pan_right")
    assert other.render("pan_right").report["memory"]["num_candidates"] == 0
    one.close()
    assert engine.cache.ids() == ("o/1",)


@pytest.mark.parametrize("conditioning", ["joint", "static"])
@pytest.mark.parametrize("scope", ["group", "joint"])
@pytest.mark.parametrize("merge", ["conv", "discard", "off"])
def test_every_plan_runs(
    tiny_checkpoint: Path, source_frames: Tensor, conditioning: str, scope: str, merge: str
) -> None:
    engine = configured(
        tiny_checkpoint,
        conditioning=conditioning,
        merge_scope=scope,
        merge=merge,
        merge_fraction=0.5,
    )
    session = engine.session(source_frames)
    session.render("pan_right")
    report = session.render("pan_left", num_inference_steps=2).report
    assert json.loads(json.dumps(report)) == report
    assert bool(report["merged_frames"]) == (merge != "off")
    assert ("conditioning_blocks" in report["flops_first_forward"]) == (conditioning == "static")


def test_static_conditioning_costs_less(tiny_checkpoint: Path, source_frames: Tensor) -> None:
    joint, static = (
        configured(tiny_checkpoint, conditioning=mode).session(source_frames).render("pan_left")
        for mode in ("joint", "static")
    )
    assert 0 < static.report["flops"] < joint.report["flops"]
    assert not torch.equal(joint.latents, static.latents)


def test_unipc_is_repeatable_and_another_path(tiny_checkpoint: Path, source_frames: Tensor) -> None:
    engine = configured(tiny_checkpoint, scheduler="unipc")
    one, again = (engine.session(source_frames).render("pan_left") for _ in range(2))
    assert torch.equal(one.latents, again.latents)
    euler = configured(tiny_checkpoint).session(source_frames).render("pan_left")
    assert not torch.equal(one.latents, euler.latents)


@has_products
def test_half_precision_stays_near(tiny_checkpoint: Path, source_frames: Tensor) -> None:
    half = Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype=torch.bfloat16)
    turn = half.session(source_frames).render("pan_left")
    full = configured(tiny_checkpoint).session(source_frames).render("pan_left")
    assert turn.report["dtype"] == "bfloat16" and turn.latents.dtype == torch.float32
    difference = (turn.latents - full.latents).norm() / full.latents.norm()
    assert 0 < difference < 0.05


def test_guidance_and_prompts(worded_checkpoint: Path, source_frames: Tensor) -> None:
    engine = configured(worded_checkpoint)

    def latents(prompt: str, scale: float) -> Tensor:
        turn = engine.session(source_frames).render(
            "pan_right", prompt=prompt, guidance_scale=scale
        )
        assert turn.report["forwards"] == (3 if scale == 1 else 6)
        return turn.latents

    plain = latents("a red ball", 1.0)
    assert torch.equal(plain, latents("a  red ball ", 1.0))
    assert not torch.equal(plain, latents("the floor", 1.0))
    assert not torch.equal(plain, latents("a red ball", 3.0))
    # the negative prompt is empty here, so guiding an empty prompt changes rounding alone
    torch.testing.assert_close(latents("", 3.0), latents("", 1.0), rtol=1e-4, atol=1e-4)


def test_a_model_without_text_refuses_words_and_guidance(
    engine: Engine, source_frames: Tensor
) -> None:
    session = engine.session(source_frames)
    with pytest.raises(RequestError, match="no text encoder, got the prompt 'a red ball'; leave"):
        session.render("pan_right", prompt="a red ball")
    with pytest.raises(RequestError, match=r"guidance_scale 5\.0; use 1"):
        session.render("pan_right", guidance_scale=5.0)
    assert not session.turns


def test_events_come_in_order(engine: Engine, source_frames: Tensor) -> None:
    session = engine.session(source_frames)
    events: list[Event] = []
    session.render("pan_right", num_inference_steps=4, on_progress=events.append)
    shape = [(type(event), event.stage) for event in events]
    expected: list[tuple[type, str]] = []
    for stage in ("vae", "text", "memory", "sampling", "vae"):
        expected.append((StageStarted, stage))
        expected += [(StepDone, stage)] * (4 if stage == "sampling" else 0)
        expected.append((StageDone, stage))
    assert shape == expected
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [(step.step, step.total) for step in steps] == [(i, 4) for i in (1, 2, 3, 4)]
    assert all(math.isfinite(step.seconds_left) for step in steps)
    assert steps[0].seconds_left > 0 == steps[-1].seconds_left
    assert all(event.seconds > 0 for event in events if isinstance(event, StageDone))
    # the source is encoded once a session
    events.clear()
    session.render("pan_right", on_progress=events.append)
    assert events[0] == StageStarted("text")


def test_an_iterator_of_events_returns_the_turn(engine: Engine, source_frames: Tensor) -> None:
    session = engine.session(source_frames)
    events = session.events(session.request("pan_right"))
    while True:
        try:
            next(events)
        except StopIteration as stop:
            assert session.turns == [stop.value]
            break


@pytest.mark.parametrize("step", [0, 1, 3])
def test_cancelling_leaves_the_session_as_it_was(
    engine: Engine, source_frames: Tensor, step: int
) -> None:
    session = engine.session(source_frames)
    first = session.render("pan_right")
    ids, token, seen = engine.cache.ids(), CancelToken(), [0]

    def cancel_at(event: Event) -> None:
        if isinstance(event, StepDone):
            seen[0] = event.step
        if seen[0] == step:
            token.cancel()

    with pytest.raises(CancelledError, match="what was finished before is kept"):
        session.render("arc_left", on_progress=cancel_at, cancel=token)
    assert seen[0] == step
    assert session.turns == [first] and engine.cache.ids() == ids
    undisturbed = engine.session(source_frames)
    undisturbed.render("pan_right")
    expected = undisturbed.render("arc_left").frames
    assert torch.equal(session.render("arc_left").frames, expected)


def test_a_failing_callback_leaves_the_session_as_it_was(
    engine: Engine, source_frames: Tensor
) -> None:
    session = engine.session(source_frames)

    def fail(event: Event) -> None:
        raise KeyError("the caller's own trouble")

    with pytest.raises(KeyError):
        session.render("pan_right", on_progress=fail)
    assert not session.turns and not engine.cache.ids()
    assert session.render("pan_right").number == 1


def test_a_trajectory_of_another_size_is_scaled(engine: Engine, source_frames: Tensor) -> None:
    large = named_trajectory("pan_right", 9, (480, 640))
    turn = engine.session(source_frames).render(large)
    expected = engine.session(source_frames).render("pan_right")
    assert turn.trajectory.size == (48, 64)
    assert torch.equal(turn.latents, expected.latents)


def test_the_sources_own_camera_counts(engine: Engine, source_frames: Tensor) -> None:
    moving = named_trajectory("zoom_in", 9, (48, 64))
    static = engine.session(source_frames).render("pan_right")
    turn = engine.session(source_frames, cameras=moving).render("pan_right")
    assert not torch.equal(turn.latents, static.latents)
    # the world begins at the source's first frame, wherever the file had put that
    offset = torch.tensor([3.0, -2.0, 5.0])
    poses = moving.poses.clone()
    poses[:, :, 3] += offset
    moved = CameraTrajectory(poses, moving.intrinsics, moving.size)
    again = engine.session(source_frames, cameras=moved).render("pan_right")
    torch.testing.assert_close(again.latents, turn.latents, rtol=1e-4, atol=1e-4)


Change = Callable[[Session], object]
BAD_REQUESTS: list[tuple[Change, type[Exception], str]] = [
    (lambda s: s.render("pan_rigth"), CameraError, "nearest: pan_right"),
    (lambda s: s.render(named_trajectory("static", 5, (48, 64))), CameraError, "has 5 poses"),
    (lambda s: s.render("pan_right", num_inference_steps=0), RequestError, "1..1000, got 0"),
    (lambda s: s.render("pan_right", num_inference_steps=1001), RequestError, "got 1001"),
    (lambda s: s.render("pan_right", guidance_scale=math.nan), RequestError, "got nan"),
    (lambda s: s.render("pan_right", guidance_scale=-1.0), RequestError, "got -1"),
    (lambda s: s.render("pan_right", seed=-1), RequestError, "seed must lie"),
    (lambda s: s.render("pan_right", memory="all"), RequestError, "got 'all'"),
]


@pytest.mark.parametrize(("ask", "kind", "words"), BAD_REQUESTS)
def test_bad_requests_are_refused_before_any_work(
    engine: Engine, source_frames: Tensor, ask: Change, kind: type[Exception], words: str
) -> None:
    session = engine.session(source_frames)
    with pytest.raises(kind, match=words):
        ask(session)
    assert session._runner.source_latents is None and not session.turns


def test_a_source_camera_must_fit(engine: Engine, source_frames: Tensor) -> None:
    with pytest.raises(CameraError, match="source's camera has 5 poses"):
        engine.session(source_frames, cameras=named_trajectory("static", 5, (48, 64)))


def test_a_turn_is_saved_as_a_video(engine: Engine, source_frames: Tensor, tmp_path: Path) -> None:
    turn = engine.session(source_frames, fps=12).render("pan_right")
    turn.save(tmp_path / "turn.mp4")
    clip = read_video(tmp_path / "turn.mp4")
    assert clip.fps == 12 and clip.frames.shape == turn.frames.shape
