"""What samples of long editing hold, and in what shares."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine.config import TransformerConfig
from mv2v_engine.errors import TrainingError
from mv2v_engine.files import save_tensors
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.testing import tiny_config
from mv2v_engine.training.dit import TINY_EDIT_MEMORY_RECIPE
from mv2v_engine.training.edit_latents import EditLatents
from mv2v_engine.training.edit_recipe import EditSampler
from mv2v_engine.training.losses import flow_loss, flow_step
from mv2v_engine.training.recipe import Batch

WINDOWS = (5, 6, 8)
GRID = (2, 6, 10)
SHAPE = tiny_config(in_channels=8, source_channels=4, camera_conditioning="none")
RECIPE = replace(TINY_EDIT_MEMORY_RECIPE, batch=3)
EMPTY = torch.full((1, SHAPE.text_dim), 7.0)


def _latents(number: int) -> Tensor:
    return torch.full((4, *GRID), float(number))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Window w of clip c is 20c + w in every number, its source half a unit more."""
    folder = tmp_path_factory.mktemp("edit_latents")
    for clip, windows in enumerate(WINDOWS):
        edited = torch.stack([_latents(20 * clip + w) for w in range(windows)])
        mask = torch.zeros(windows, *GRID)
        mask[:, :, : clip + 1] = 0.5
        save_tensors(
            folder / f"edit_{clip:07d}.safetensors",
            {
                "source": (edited + 0.5).half(),
                "edited": edited.half(),
                "mask": mask.half(),
                "text": torch.full((2, SHAPE.text_dim), float(clip + 1)).bfloat16(),
            },
        )
    return folder


@pytest.fixture(scope="module")
def sampler(folder: Path) -> EditSampler:
    return EditSampler(EditLatents(folder), SHAPE, RECIPE, empty_text=EMPTY)


def _draws(sampler: EditSampler, count: int) -> list[Batch]:
    return [sampler.draw(torch.Generator().manual_seed(seed)) for seed in range(count)]


def _numbers(latents: Tensor) -> list[int]:
    return [round(value) for value in latents.mean((1, 2, 3, 4)).tolist()]


def test_memory_is_other_windows_of_the_same_clip_the_one_before_first(
    sampler: EditSampler,
) -> None:
    followed = left_out = 0
    for batch in _draws(sampler, 150):
        memory = [segment for segment in batch.plan.segments if segment.role == "memory"]
        assert all(segment.reverse for segment in memory)
        assert [s.tau for s in memory[1:]] == [2 * GRID[0]] * len(memory[1:])
        assert batch.source is not None and batch.cameras is None
        targets = _numbers(batch.latents[0])
        assert _numbers(batch.source - 0.5) == targets
        for row, target in enumerate(targets):
            remembered = [_numbers(video)[row] for video in batch.latents[1:]]
            assert all(number // 20 == target // 20 for number in remembered)
            assert len({target, *remembered}) == 1 + len(remembered)
            if memory and memory[0].tau == GRID[0]:
                assert remembered[0] == target - 1
                followed += 1
            elif memory:
                assert target - 1 not in remembered
                left_out += 1
    assert left_out / (left_out + followed) == pytest.approx(0.1, abs=0.07)


def test_shares_of_memory_and_of_dropped_text(sampler: EditSampler) -> None:
    batches = _draws(sampler, 400)
    counts = Counter(batch.plan.num_memory for batch in batches)
    assert set(counts) == {0, 1, 2, 3, 4} and counts[0] / 400 == pytest.approx(0.25, abs=0.07)
    for has_memory, share in ((False, 0.1), (True, 0.5)):
        some = [batch for batch in batches if bool(batch.plan.num_memory) == has_memory]
        texts = torch.cat([batch.text[:, 0, 0] for batch in some])
        assert set(texts.tolist()) == {1.0, 2.0, 3.0, 7.0}
        assert float((texts == 7).float().mean()) == pytest.approx(share, abs=0.06)
    assert not any(bool(batch.text[:, 2:].any()) for batch in batches)  # zeros past a prompt
    static = sum(batch.plan.conditioning == "static" for batch in batches)
    assert static / 400 == pytest.approx(0.3, abs=0.07)


def test_the_edited_part_counts_more_and_every_sample_the_same(sampler: EditSampler) -> None:
    seen = set()
    for batch in _draws(sampler, 20):
        assert batch.weight is not None
        torch.testing.assert_close(batch.weight.mean((1, 2, 3)), torch.ones(3))
        for weight, number in zip(batch.weight, _numbers(batch.latents[0]), strict=True):
            rows = number // 20 + 1
            seen.add(rows)
            torch.testing.assert_close(
                weight[:, 0, 0] / weight[:, -1, 0], torch.full((2,), 1 + RECIPE.edit_weight / 2)
            )
            assert torch.equal(weight[:, rows - 1], weight[:, 0])
    assert seen == {1, 2, 3}


def test_memory_is_perturbed_and_neither_target_nor_source_is(sampler: EditSampler) -> None:
    for batch in _draws(sampler, 10):
        assert batch.source is not None
        for exact in (batch.latents[0], batch.source):
            assert not exact.flatten(1).std(1).any()
        for video in batch.latents[1:]:
            assert float(video.flatten(1).std(1).mean()) == pytest.approx(0.1, abs=0.02)


def test_a_batch_follows_from_its_generator(sampler: EditSampler) -> None:
    for first, second in zip(_draws(sampler, 8), _draws(sampler, 8), strict=True):
        assert first.plan == second.plan
        for a, b in zip(first.latents, second.latents, strict=True):
            assert torch.equal(a, b)


def test_the_loss_is_the_weighted_error_and_trains_everything(sampler: EditSampler) -> None:
    torch.manual_seed(0)
    model = MV2VTransformer(SHAPE)
    batch = next(b for b in _draws(sampler, 60) if b.plan.num_memory == 2 and b.plan.merge_steps)
    device = torch.device("cpu")

    def loss(weight: Tensor | None) -> float:
        generator = torch.Generator().manual_seed(1)
        given = replace(batch, weight=weight)
        return float(flow_loss(model, given, generator, flow_shift=3.0, device=device).detach())

    ones = torch.ones(3, *GRID)
    assert loss(None) == pytest.approx(loss(ones))
    first = torch.zeros_like(ones)
    first[0] = 1
    rest = ones - first
    assert loss(first) + loss(rest) == pytest.approx(loss(ones))
    assert loss(2 * first) == pytest.approx(2 * loss(first))

    metrics = flow_step(model, sampler, device)(torch.Generator().manual_seed(3))
    metrics["loss"].backward()  # type: ignore[no-untyped-call]
    patches = model.patch_embedding.weight.grad
    assert patches is not None and bool(patches[:, 4:].any())  # the source's channels


@pytest.mark.parametrize(
    ("shape", "most", "message"),
    [
        (SHAPE, 7, "need clips of 9 windows, the longest of 3 clips has 8"),
        (tiny_config(), 4, "source_channels 0"),
        (
            tiny_config(
                in_channels=32, out_channels=16, source_channels=16, camera_conditioning="none"
            ),
            4,
            "latents have 4 channels, the transformer takes 16",
        ),
    ],
    ids=["short", "novel-view", "channels"],
)
def test_what_does_not_fit_is_refused(
    folder: Path, shape: TransformerConfig, most: int, message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        EditSampler(EditLatents(folder), shape, replace(RECIPE, max_memory=most), empty_text=EMPTY)
