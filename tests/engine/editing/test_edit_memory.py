"""What a window remembers: in which order and where, of which shot, within which budget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.engine import parts
from mv2v_engine.engine import window as windows
from mv2v_engine.engine.denoise import Denoiser
from mv2v_engine.errors import CheckpointError, RequestError
from mv2v_engine.memory.segment_retrieval import latent_descriptor, segment_scores
from mv2v_engine.synthetic.edit_clips import make_cut_clip
from tests.engine.editing.conftest import SIZE, long_clip

PROMPT = "a red ball"
VIDEO_BYTES = 16 * 2 * 4 * 6 * 4


@pytest.fixture
def denoisers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Denoiser]]:
    """The denoiser of every window that runs."""
    made: list[Denoiser] = []
    make = windows.engine_denoiser

    def noted(*given: Any, **named: Any) -> Denoiser:
        made.append(make(*given, **named))
        return made[-1]

    monkeypatch.setattr(windows, "engine_denoiser", noted)
    yield made


def retrieved(report: dict[str, Any]) -> list[list[int]]:
    """By window, the numbers of those that it remembers."""
    return [[row["turn"] for row in window["memory"]["retrieved"]] for window in report["windows"]]


def test_the_plan_that_ran(editor: Engine, denoisers: list[Denoiser]) -> None:
    frames = long_clip(25)
    turn = editor.session(frames, cuts=()).edit(PROMPT)
    sources = [editor.vae.encode(frames[start : start + 5]) for start in range(0, 25, 5)]
    for number, (denoiser, remembered) in enumerate(
        zip(denoisers, retrieved(turn.report), strict=True)
    ):
        target, *memory = denoiser.plan.segments
        assert target.role == "target" and target.tau == 0 and not target.reverse
        # T latent frames: the window before at T, all others at 2T, every one backwards
        assert [segment.tau for segment in memory] == [2, 4, 4, 4][:number]
        assert [segment.tokenizer for segment in memory] == [4, 4, 4, 8][:number]
        assert all(segment.role == "memory" and segment.reverse for segment in memory)
        given = denoiser.buffers.conditioning
        assert given.source is not None and torch.equal(given.source[0], sources[number])
        assert len(given.latents) == number
        for latents, which in zip(given.latents, remembered, strict=True):
            assert torch.equal(latents[0], turn.latents[which - 1])
    # the last one first, then by how alike the sources look
    scores = segment_scores(
        latent_descriptor(sources[4]), [_key(latent_descriptor(each)) for each in sources[:3]]
    )
    order = [int(index) + 1 for index in scores.argsort(descending=True)]
    assert retrieved(turn.report)[4] == [4, *order]


def _key(descriptor: Tensor) -> Any:
    from mv2v_engine.memory.segment_retrieval import SegmentKey

    return SegmentKey("", 0, descriptor)


def test_at_most_so_many_and_none_without_memory(editor: Engine) -> None:
    frames = long_clip(15)
    remembering = editor.session(frames, cuts=()).edit(PROMPT)
    one = editor.reconfigured(EngineConfig(max_memory=1)).session(frames, cuts=()).edit(PROMPT)
    assert retrieved(one.report) == [[], [1], [2]]
    without = editor.session(frames, cuts=()).edit(PROMPT, memory="none")
    assert retrieved(without.report) == [[], [], []]
    assert without.report["windows"][1]["memory"]["reason"] == "memory is off"
    # nothing else differs between them before there is something to remember
    same = [torch.equal(*pair) for pair in zip(remembering.latents, without.latents, strict=True)]
    assert same == [True, False, False]


def test_no_object_of_one_shot_enters_another(editor_folder: Path) -> None:
    """Whatever the first shot shows, the second one's conditioning and frames keep every bit."""
    shots, others = (make_cut_clip(seed, (13, 9), size=SIZE) for seed in (3, 40))
    first, second, other = (each.source.frames for each in (*shots, others[0]))
    engines = [
        Engine.from_pretrained(
            editor_folder, device="cpu", config=EngineConfig(cross_shot_similarity=similarity)
        )
        for similarity in (None, -1.0)
    ]
    for engine, is_apart in zip(engines, (True, False), strict=True):
        turns = []
        for begin in (first, other):
            session = engine.session(torch.cat([begin, second]))
            assert session.cuts == (13,)  # found
            turns.append(session.edit(PROMPT))
        one, two = (turn.latents for turn in turns)
        assert not torch.equal(one[:3], two[:3])
        assert torch.equal(one[3:], two[3:]) == is_apart
        of_second = retrieved(turns[0].report)[3:]
        assert of_second[0] == [] if is_apart else sorted(of_second[0]) == [1, 2, 3]
        assert (set(of_second[1]) == {4}) == is_apart and of_second[1][0] == 4


def test_no_window_is_just_before_the_first_of_a_shot(
    editor: Engine, denoisers: list[Denoiser]
) -> None:
    engine = editor.reconfigured(EngineConfig(cross_shot_similarity=-1.0))
    engine.session(long_clip(15), cuts=(5,)).edit(PROMPT)
    taus = [[segment.tau for segment in each.plan.segments[1:]] for each in denoisers]
    assert taus == [[], [4], [2, 4]]
    denoisers.clear()
    strict = editor.reconfigured(EngineConfig(cross_shot_similarity=1.0))
    strict.session(long_clip(15), cuts=(5,)).edit(PROMPT)
    assert [each.plan.num_memory for each in denoisers] == [0, 0, 1]


def test_a_small_cache_gives_the_same_edit(editor: Engine) -> None:
    frames = long_clip(25)
    expected = editor.session(frames, cuts=()).edit(PROMPT)
    small = editor.reconfigured(EngineConfig(cache_bytes=2 * VIDEO_BYTES))
    used = []
    session = small.session(frames, cuts=())
    turn = session.edit(PROMPT, on_window=lambda _: used.append(small.cache.bytes_used))
    assert torch.equal(turn.latents, expected.latents)
    assert max(used) == 2 * VIDEO_BYTES and small.cache.counters()["reloads"] > 0
    assert not len(small.cache) and not len(editor.cache)


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**shape, image_size=28, patch_size=14)).save_pretrained(folder)
    return folder


def test_segments_are_found_by_dinov2(editor: Engine, dino: Path) -> None:
    config = EngineConfig(descriptor=str(dino), descriptor_batch=3, descriptor_device="cpu")
    engine, frames = editor.reconfigured(config), long_clip(18)
    report = engine.session(frames, cuts=()).edit(PROMPT, num_inference_steps=1).report
    assert report["memory"]["descriptor"] == {
        "kind": "dinov2",
        "folder": str(dino),
        "side": 224,
        "batch": 3,
        "device": "cpu",
    }
    # computed from the frames that a window sees, by this very model
    embedded = engine.describer._encoder
    assert embedded is not None
    means = [embedded(frames[start : start + 5]).mean(0) for start in (0, 5, 10, 13)]
    expected = segment_scores(means[3], [_key(mean) for mean in means[:3]])
    rows = report["windows"][3]["memory"]["retrieved"]
    assert {row["turn"]: row["score"] for row in rows} == pytest.approx(
        dict(enumerate(expected.tolist(), 1)), abs=1e-5
    )


def test_a_folder_of_another_kind_is_refused_before_any_weights(
    editor_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "projection_dim": 8}
    config = CLIPVisionConfig(**shape, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")

    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(parts, "load_checkpoint", read)
    for folder, words in (
        (tmp_path / "clip", "holds a model of type 'clip_vision_model', expected dinov2"),
        (tmp_path, "holds no readable config.json"),
    ):
        with pytest.raises(CheckpointError, match=words):
            Engine.from_pretrained(
                editor_folder, device="cpu", config=EngineConfig(descriptor=folder)
            )


def test_settings_that_say_nothing() -> None:
    with pytest.raises(RequestError, match=r"cross_shot_similarity must lie in -1\.\.1"):
        EngineConfig(cross_shot_similarity=2.0)
    with pytest.raises(RequestError, match="descriptor_batch must be at least 1"):
        EngineConfig(descriptor_batch=0)
