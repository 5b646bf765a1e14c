"""Both stages of TinyHistory's training: what they ask, what they move, one full-size step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

from mv2v_engine.checkpoints import load_checkpoint, save_checkpoint
from mv2v_engine.config import WAN_1_3B, HistoryConfig, SamplingConfig
from mv2v_engine.errors import RequestError, TrainingError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.feed_forward import Linear
from mv2v_engine.testing import randomise, tiny_config
from mv2v_engine.tokens.plan import Segment, TokenPlan, history_segments
from mv2v_engine.training import history
from mv2v_engine.training.edit_latents import EditLatents
from mv2v_engine.training.history import (
    HistoryRecipe,
    HistorySampler,
    ViewHistorySampler,
    add_history,
    make_optimizer,
    prepare,
    query_plan,
)
from mv2v_engine.training.latents import LatentCache
from mv2v_engine.training.low_rank import add_low_rank, merge_low_rank
from tests.training.full_size import assert_a_step_fits

WINDOWS = (3, 4, 5)


def save_clips(folder: Path, channels: int = 16, text_dim: int = 16) -> Path:
    """Clips whose latents say clip, window and frame: 100, 10 and 1; the source has half of it."""
    folder.mkdir(parents=True)
    for clip, windows in enumerate(WINDOWS):
        number = 100 * clip + 10 * torch.arange(windows)[:, None] + torch.arange(2)
        edited = number[:, None, :, None, None].expand(-1, channels, -1, 4, 6).half()
        tensors = {
            "source": edited / 2,
            "edited": edited,
            "mask": torch.zeros(windows, 2, 4, 6).half(),
            "text": torch.ones(2, text_dim).bfloat16(),
        }
        tensors["mask"][..., 0, :] = 1
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / f"edit_{clip:07d}.safetensors",
        )
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clips(tmp_path_factory.mktemp("latents") / "clips")


def sampler(clips: Path, **recipe: int) -> HistorySampler:
    shape = tiny_config(
        camera_conditioning="none", in_channels=32, out_channels=16, source_channels=16,
        text_dim=16, history=HistoryConfig(rates=("2x2x2",)),
    )  # fmt: skip
    made = HistoryRecipe(batch=3, rate="2x2x2", **recipe)  # type: ignore[arg-type]
    return HistorySampler(EditLatents(clips), shape, made, empty_text=torch.zeros(1, 16))


def test_stage_1_asks_for_the_frames_that_are_clean(clips: Path) -> None:
    drawn = sampler(clips, stage=1, max_memory=5)
    lengths, asked = set(), set()
    for seed in range(150):
        batch = drawn.draw(torch.Generator().manual_seed(seed))
        target, past = batch.latents
        taus, length = batch.plan.target.taus, past.shape[2]
        lengths.add(length)
        numbers = [tau + length for tau in taus]
        asked.update(numbers)
        assert len(set(numbers)) == 2 and batch.plan.segments[1].tau == -length
        assert batch.source is not None and not batch.source.any()
        for frame in range(length):
            is_clean = [bool(p[:, frame].unique().numel() == 1) for p in past]
            assert is_clean == [frame in numbers] * 3
        for place, number in enumerate(numbers):
            assert torch.equal(target[:, :, place], past[:, :, number])
    assert lengths == {4, 6, 8, 10} and asked == set(range(10))


def test_stage_2_asks_for_the_window_after_a_clean_history(clips: Path) -> None:
    drawn, with_whole = sampler(clips, stage=2, max_memory=3, whole_frames=3), 0
    for seed in range(20):
        batch = drawn.draw(torch.Generator().manual_seed(seed))
        target, past, *whole = batch.latents
        with_whole += len(whole)
        assert batch.plan.target.taus == () and batch.source is not None
        first = past[:, 0, 0, 0, 0]
        windows = past.shape[2] // 2
        assert torch.equal(target[:, 0, 0, 0, 0], first + 10 * windows)
        assert torch.equal(2 * batch.source, target)
        assert batch.weight is not None
        edited, other = batch.weight[..., 0, :], batch.weight[..., 1:, :]
        torch.testing.assert_close(edited / 16, other[..., 0, :])  # the weight of edited cells
        torch.testing.assert_close(batch.weight.mean((1, 2, 3)), torch.ones(3))
        assert all(torch.equal(frames, past[:, :, -3:]) for frames in whole)
        steps = past[:, 0, :, 0, 0] - first[:, None]
        assert torch.equal(steps[:, 0::2], (10.0 * torch.arange(windows)).expand(3, -1))
    assert 5 < with_whole < 15  # half of the batches, so that weights serve without them too


@pytest.mark.parametrize("share", [0, 1])
def test_what_was_edited_is_read_from_the_history(clips: Path, share: int) -> None:
    """A clip's text is ones, the empty prompt's zeros."""
    drawn = sampler(clips, stage=2, max_memory=3, text_from_memory=share)
    texts = [drawn.draw(torch.Generator().manual_seed(seed)).text for seed in range(5)]
    assert all(bool(text[:, :2].eq(1 - share).all()) for text in texts)
    asked = sampler(clips, stage=1, max_memory=3).draw(torch.Generator().manual_seed(0))
    assert asked.weight is None


def test_what_it_cannot_be_trained_on(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"latents have 4 channels.* takes 16"):
        sampler(save_clips(tmp_path / "other", channels=4), stage=1, max_memory=4)
    found = EditLatents(clips)
    found.pairs = tuple(
        replace(p, source=p.source[:1], edited=p.edited[:1], mask=p.mask[:1]) for p in found.pairs
    )
    shape = sampler(clips, stage=1, max_memory=4).shape
    for stage in (1, 2):
        with pytest.raises(
            TrainingError, match=f"stage {stage} needs histories of {3 - stage} windows"
        ):
            recipe = HistoryRecipe(stage=stage, rate="2x2x2")
            HistorySampler(found, shape, recipe, empty_text=torch.zeros(1, 16))


def test_histories_shorter_than_what_is_asked_for(clips: Path) -> None:
    with pytest.raises(TrainingError, match=r"longest clip has 5 .* at most 1 \(--max-windows\)"):
        sampler(clips, stage=1, max_memory=1)


def view_sampler(cache: LatentCache, **recipe: Any) -> ViewHistorySampler:
    shape = tiny_config(history=HistoryConfig(rates=("2x2x1",)))
    made = HistoryRecipe(**{"batch": 3, "rate": "2x2x1", "max_memory": 3} | recipe)
    return ViewHistorySampler(cache, shape, made)


def test_the_shortest_history_of_views_has_a_whole_token(cache: LatentCache) -> None:
    shape = tiny_config(history=HistoryConfig(rates=("1x1x8",)))
    longest = HistoryRecipe(stage=2, rate="1x1x8", min_memory=3, max_memory=3)
    ViewHistorySampler(cache, shape, longest)
    with pytest.raises(RequestError, match="covers 8 latent frames, the history has 6"):
        ViewHistorySampler(cache, shape, replace(longest, min_memory=2))


def test_stage_1_asks_views_for_frames_with_their_cameras(cache: LatentCache) -> None:
    """A video's number is its latents' value and its camera's place (`cache_folder`)."""
    drawn, lengths = view_sampler(cache, stage=1), set()
    for seed in range(40):
        batch = drawn.draw(torch.Generator().manual_seed(seed))
        target, past = batch.latents
        segment, length = batch.plan.segments[1], past.shape[2]
        lengths.add(length)
        numbers = [tau + length for tau in batch.plan.target.taus]
        assert segment.grid[0] == length and len(set(numbers)) == 3
        assert batch.cameras is not None and batch.cameras.shape[1:3] == (3, length)
        for place, number in enumerate(numbers):
            assert torch.equal(target[:, :, place], past[:, :, number])
            assert torch.equal(batch.cameras[:, 0, place], batch.cameras[:, 2, number])
        for frame in set(range(length)) - set(numbers):
            assert past[:, :, frame].flatten(1).std(1).min() > 0.1
        # relative places of cameras are those of the videos' numbers
        videos = target[:, 0, :, 0, 0]
        places = batch.cameras[:, 0, :3].unflatten(-1, (3, 4))[..., 0, 3]
        torch.testing.assert_close(videos - videos[:, :1], places - places[:, :1])
    assert lengths == {3, 6, 9}


def test_stage_2_asks_views_for_another_camera(cache: LatentCache) -> None:
    roles = set()
    odds = {"source_dropped": 0.5, "memory_noise": 0.0}
    drawn = view_sampler(cache, stage=2, min_memory=2, whole_frames=2, **odds)
    for seed in range(40):
        batch = drawn.draw(torch.Generator().manual_seed(seed))
        segments, cameras = batch.plan.segments, batch.cameras
        roles.add(tuple(segment.role for segment in segments))
        number = [segment.encoder for segment in segments].index("history")
        (target, *source), (past, *whole) = batch.latents[:number], batch.latents[number:]
        assert past.shape[2] in (6, 9) and batch.plan.target.taus == ()
        assert cameras is not None
        if whole:
            assert torch.equal(whole[0], past[:, :, -2:])
            assert torch.equal(cameras[:, 3, :2], cameras[:, 2, -2:])
        videos = torch.cat([target, *source, past], 2)[:, 0, :, 0, 0]
        for sample in videos[:, ::3].tolist():
            assert len(set(sample)) == len(sample) and len({n // 20 for n in sample}) == 1
        tracks = [cameras[:, 0, :3], *([cameras[:, 1, :3]] if source else []), cameras[:, 2]]
        places = torch.cat(tracks, 1).unflatten(-1, (3, 4))[..., 0, 3]
        torch.testing.assert_close(videos - videos[:, :1], places - places[:, :1])
    assert roles == {
        ("target", *source, "memory", *whole)
        for source in ((), ("source",))
        for whole in ((), ("memory",))
    }


def test_a_camera_returns_to_any_video_of_its_history(cache: LatentCache) -> None:
    odds = {"min_memory": 2, "max_memory": 2, "revisited": 1.0, "source_dropped": 0.0}
    drawn, places = view_sampler(cache, stage=2, memory_noise=0.0, **odds), set()
    for seed in range(10):
        target, _, past = drawn.draw(torch.Generator().manual_seed(seed)).latents
        same = past[:, 0, ::3, 0, 0] == target[:, :1, 0, 0, 0]
        assert same.sum(1).eq(1).all()
        places |= set(same.int().argmax(1).tolist())
    assert places == {0, 1}


def test_views_by_command(
    cache_folder: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, base = tiny_config(), tmp_path / "base"
    model = MV2VTransformer(config)
    randomise(model)
    save_checkpoint(base, model, config, SamplingConfig(), "base", torch.float32)
    shared = ["--rate", "2x2x1", "--rank", 3, "--batch", 2, "--steps", 2, "--max-windows", 2]
    small = ["--channels", 4, 4, 8, 8, "--heads", 2]
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["--stage", 1, "--checkpoint", base, "--out", one, *small, *shared]
    with pytest.raises(TrainingError, match=r"camera_conditioning is 'own'; give .* --latents"):
        _run(monkeypatch, *words, "--edits", clips)
    _run(monkeypatch, *words, "--latents", cache_folder)
    words = ["--stage", 2, "--checkpoint", one / "model", "--out", two, *shared]
    _run(monkeypatch, *words, "--latents", cache_folder)
    first, second = (load_checkpoint(each / "model") for each in (one, two))
    assert second.config == first.config and second.config.has_camera
    name = "history_encoders.2x2x1.convs.0.weight"
    trained = [dict(each.transformer.named_parameters())[name] for each in (first, second)]
    assert not torch.equal(*trained)


@torch.no_grad()
def test_updates_of_low_rank_are_merged_into_the_weights() -> None:
    model = MV2VTransformer(tiny_config())
    randomise(model)
    names = {name: p.clone() for name, p in model.named_parameters()}
    layer = model.blocks[1].get_submodule("attn1.to_q")
    assert isinstance(layer, Linear)
    x = torch.randn(3, 24)
    before = layer(x)
    add_low_rank(model, 4)
    assert torch.equal(layer(x), before)
    update = layer.parametrizations.weight[0]  # type: ignore[union-attr, index]
    update.up.normal_()
    assert update.up.shape == (24, 4) and update.down.shape == (4, 24)
    expected = names["blocks.1.attn1.to_q.weight"] + update.up @ update.down
    changed = layer(x)
    merge_low_rank(model)
    torch.testing.assert_close(layer(x), changed)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in names.items()
    }
    for name, parameter in model.named_parameters():
        is_updated = name == "blocks.1.attn1.to_q.weight"
        torch.testing.assert_close(parameter, expected if is_updated else names[name])


def _run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["history", *map(str, words), "--device", "cpu"])
    history.main()


def test_both_stages_by_command(
    editor_folder: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    shared = ["--edits", clips, "--rate", "2x2x2", "--rank", 3, "--batch", 2, "--steps"]
    small = ["--channels", 4, 4, 8, 8, "--heads", 2]
    with pytest.raises(TrainingError, match=r"none of rate 2x2x2; give the model that stage 1"):
        _run(monkeypatch, "--stage", 2, "--checkpoint", editor_folder, "--out", two, *shared, 2)
    words = ["--stage", 1, "--checkpoint", editor_folder, "--out", one, *small, *shared]
    _run(monkeypatch, *words, 2)
    _run(monkeypatch, *words, 3)
    assert torch.load(one / "checkpoint.pt", weights_only=True)["step"] == 3
    base, first = load_checkpoint(editor_folder), load_checkpoint(one / "model")
    assert first.config.history == HistoryConfig(rates=("2x2x2",), channels=(4, 4, 8, 8), heads=2)
    assert first.vae_path is not None and first.conditioning == ("joint", "static")
    # its own: the base may be gone
    assert first.text_path == one / "model" / "text_encoder"
    assert first.tokenizer_path == one / "model" / "tokenizer"
    before = dict(base.transformer.named_parameters())
    moved = {
        name
        for name, parameter in first.transformer.named_parameters()
        if name in before and not torch.equal(parameter, before[name].to(parameter.dtype))
    }
    assert moved and all(name.startswith("blocks.") for name in moved)
    _run(
        monkeypatch, "--stage", 2, "--checkpoint", one / "model", "--out", two,
        "--whole-frames", 2, "--components", editor_folder, *shared, 2,
    )  # fmt: skip
    second = load_checkpoint(two / "model")
    assert second.config == first.config
    assert second.name == first.name == f"{base.name}-history"
    assert second.text_path is second.tokenizer_path is None
    name = "history_encoders.2x2x2.convs.0.weight"
    trained = [dict(each.transformer.named_parameters())[name] for each in (first, second)]
    assert not torch.equal(*trained)  # stage 2 goes on with the encoder


def test_what_is_refused_leaves_its_folder_to_others(
    editor_folder: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["--stage", 1, "--checkpoint", editor_folder, "--out", out, "--rate", "2x2x2"]
    words += ["--channels", 4, 4, 8, 8, "--heads", 2, "--rank", 3, "--steps", 1]
    with pytest.raises(TrainingError, match="holds no edit"):
        _run(monkeypatch, *words, "--edits", tmp_path)
    for given, message in (
        (("--whole-frames", -3), "--whole-frames must be at least 0, got -3"),
        (("--text-from-memory", 2), "--text-from-memory must be a share from 0 to 1, got 2.0"),
        (("--rate", "4x4x1"), "covers 8x8 latent cells, the video has 4x6; use a finer rate"),
        (("--rate", "1x1x8"), "covers 8 latent frames, the history has 4; use a finer rate"),
    ):
        with pytest.raises(RequestError, match=message):
            _run(monkeypatch, *words, "--edits", clips, *given)
    assert not out.exists()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_full_size_step(stage: int) -> None:
    """20 s of history at 480x832 beside 21 latent frames, updates of rank 128, on fake tensors.

    In six blocks: every other one adds the same.
    """
    shape = replace(WAN_1_3B, num_layers=6, merge_blocks=None, camera_conditioning="none")
    grid, length = (21, 60, 104), 80
    past: list[Segment] = []

    def prepared(model: MV2VTransformer) -> tuple[list[nn.Parameter], Optimizer, TokenPlan]:
        config = add_history(model, HistoryConfig())
        trained = prepare(model, 128)
        past.extend(history_segments(config, (length, *grid[1:]), "4x4x2", 3 * (stage - 1)))
        plan = query_plan(config, grid, tuple(past), list(range(21)) if stage == 1 else None)
        return trained, make_optimizer(trained, 1e-4), plan

    model, count = assert_a_step_fits(shape, prepared)
    encoder = sum(parameter.numel() for parameter in model.history_encoders.parameters())
    print(f"{encoder:,} of them the encoder's")
    width, ffn = shape.dim, shape.ffn_dim
    # q, k, v and o of self- and cross-attention, and the feed-forward's two
    updates = 6 * 128 * (8 * 2 * width + 2 * (width + ffn))
    assert count == encoder + updates
    assert past[0].length == 7 * 13 * 40
