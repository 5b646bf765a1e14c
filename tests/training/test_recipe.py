"""What the recipe's samples hold, and in what shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mv2v_engine.config import TransformerConfig
from mv2v_engine.errors import TrainingError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.testing import randomise, tiny_config
from mv2v_engine.tokens.plan import TokenPlan
from mv2v_engine.training.dit import TINY_MEMORY_RECIPE
from mv2v_engine.training.latents import LatentCache
from mv2v_engine.training.losses import flow_loss
from mv2v_engine.training.recipe import Batch, Recipe, SceneSampler, Tracks

FRAMES = 3


def _draws(source: LatentCache, count: int, recipe: Recipe | None = None) -> list[Batch]:
    sampler = SceneSampler(
        source, tiny_config(), recipe or replace(TINY_MEMORY_RECIPE, batch=3, targets=1)
    )
    return [sampler.draw(torch.Generator().manual_seed(seed)) for seed in range(count)]


def _numbers(latents: Tensor) -> list[int]:
    """Which track every sample of a batch is, seen through the noise on memory."""
    return [round(value) for value in latents.mean((1, 2, 3, 4)).tolist()]


def _samples(batch: Batch) -> list[list[int]]:
    """The tracks of every sample, in the plan's order."""
    samples: list[list[int]] = torch.tensor([_numbers(x) for x in batch.latents]).T.tolist()
    return samples


def test_videos_of_a_sample_are_different_cameras_of_one_scene(cache: LatentCache) -> None:
    for batch in _draws(cache, 60, replace(TINY_MEMORY_RECIPE, batch=3, targets=1, revisited=0.0)):
        assert len(batch.latents) == len(batch.plan.segments)
        assert len(_samples(batch)) == 3
        for sample in _samples(batch):
            assert len({number // 20 for number in sample}) == 1
            assert len(set(sample)) == len(sample)


def test_siblings_are_further_videos_of_the_same_scene(cache: LatentCache) -> None:
    modes = set()
    for batch in _draws(cache, 60, replace(TINY_MEMORY_RECIPE, batch=6, targets=3, max_memory=2)):
        modes.add(batch.plan.conditioning)
        if batch.plan.conditioning == "joint":
            assert batch.siblings is None and len(batch.text) == 6
            continue
        assert batch.siblings is not None
        scenes, more = batch.siblings.latents.shape[:2]
        assert scenes == max(1, 6 // (1 + more)) == len(batch.text)
        assert len(batch.targets) == scenes * (1 + more)
        assert batch.siblings.cameras.shape == (scenes, more, *batch.cameras.shape[2:])
        numbers = batch.siblings.latents.flatten(2).mean(-1).round().int().tolist()
        for sample, siblings in zip(_samples(batch), numbers, strict=True):
            assert len({number // 20 for number in sample + siblings}) == 1
            assert not set(siblings) & set(sample)
    assert modes == {"joint", "static"}


def test_a_camera_returns_in_the_recipes_share(cache: LatentCache) -> None:
    returned = total = 0
    for batch in _draws(cache, 150, replace(TINY_MEMORY_RECIPE, batch=3, targets=1, revisited=0.4)):
        for target, *others in _samples(batch):
            memory = others[len(others) - batch.plan.num_memory :]
            if memory:
                total += 1
                returned += target in memory
            # the same video is what retrieval finds most relevant
            assert target not in memory[1:]
            assert len(set(memory)) == len(memory)
    assert abs(returned / total - 0.4) < 0.08


def test_two_latent_frames_alone_are_a_shorter_clip(cache: LatentCache) -> None:
    recipe = Recipe(batch=2, max_memory=2, frames=(0, 1))
    (batch,) = _draws(cache, 1, recipe)
    assert batch.plan.target.num_frames == 2
    assert all(latents.shape[2] == 2 for latents in batch.latents)
    assert batch.cameras is not None and batch.cameras.shape[2] == 2


def test_memory_comes_by_relevance(cache: LatentCache) -> None:
    """Cameras of a scene stand side by side: what is near the target sees most of what it sees."""
    recipe = Recipe(batch=3, max_memory=6, source_dropped=0.0)
    checked = 0
    for batch in _draws(cache, 40, recipe):
        for target, _, *memory in _samples(batch):
            distances = [abs(number - target) for number in memory]
            if min(distances) <= 2:
                checked += 1
                assert distances[0] == min(distances)
    assert checked > 60


def test_every_segment_gets_the_camera_of_its_own_video(cache: LatentCache) -> None:
    for batch in _draws(cache, 60):
        for latents, segment in zip(batch.latents, batch.plan.segments, strict=True):
            assert segment.camera is not None
            cameras = batch.cameras[:, segment.camera].unflatten(-1, (3, 4))
            assert cameras.shape == (3, FRAMES, 3, 4)
            # poses are relative to the source's first frame, whether or not it is shown
            source = torch.tensor([0.0] * 3)
            if len(batch.plan.segments) > 1 and batch.plan.segments[1].role == "source":
                source = torch.tensor(_numbers(batch.latents[1])) % 20
                place = torch.tensor(_numbers(latents)) % 20 - source
                torch.testing.assert_close(cameras[:, 0, 0, 3], place.float())
            assert torch.equal(cameras[:, 0, 1, 3], torch.zeros(3))


def test_a_transformer_that_compares_cameras_gets_their_lenses(cache: LatentCache) -> None:
    shape = tiny_config(camera_attention="prope_fused", camera_conditioning="none")
    sampler = SceneSampler(cache, shape, TINY_MEMORY_RECIPE)
    batch = sampler.draw(torch.Generator().manual_seed(0))
    poses = SceneSampler(cache, tiny_config(), TINY_MEMORY_RECIPE).draw(
        torch.Generator().manual_seed(0)
    )
    assert batch.cameras is not None and poses.cameras is not None
    assert torch.equal(batch.cameras[..., :12], poses.cameras)
    # the default lens, at the latents' aspect of 12 rows and 20 columns
    focal = 24 / 23.76
    lens = torch.tensor([focal, focal * 20 / 12, 0.0, 0.0])
    torch.testing.assert_close(batch.cameras[..., 12:], lens.expand(*batch.cameras.shape[:-1], 4))
    model = MV2VTransformer(shape)
    randomise(model)
    generator = torch.Generator().manual_seed(1)
    flow_loss(model, batch, generator, flow_shift=3.0, device=torch.device("cpu")).backward()
    for name, parameter in model.named_parameters():
        if ".attn1." in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all()
            assert parameter.grad.any()


def test_the_sources_own_camera_is_the_identity(cache: LatentCache) -> None:
    for batch in _draws(cache, 20):
        source = batch.cameras[:, 1].unflatten(-1, (3, 4))
        torch.testing.assert_close(source, torch.eye(3, 4).expand_as(source))


def test_the_odds_are_the_recipes(cache: LatentCache) -> None:
    batches = _draws(cache, 600, replace(TINY_MEMORY_RECIPE, batch=1))
    plans = [batch.plan for batch in batches]
    counts = Counter(plan.num_memory for plan in plans)
    assert set(counts) == {0, 1, 2, 3, 4} and abs(counts[0] / 600 - 0.2) < 0.06
    merging = [plan for plan in plans if plan.merge == "conv"]
    assert abs(len(merging) / 600 - 0.5) < 0.07
    assert all(0.3 <= plan.merge_fraction <= 0.7 for plan in plans)
    assert len({plan.fraction for plan in plans}) > 20
    with_memory = [plan for plan in plans if plan.num_memory]
    dropped = [plan for plan in with_memory if plan.segments[1].role != "source"]
    assert abs(len(dropped) / len(with_memory) - 0.3) < 0.06
    assert all(plan.segments[1].role == "source" for plan in plans if not plan.num_memory)
    rates = Counter(s.tokenizer for plan in with_memory for s in plan.segments if s.tau == 6)
    assert set(rates) == {2, 4, 8} and rates[4] > rates[2] and rates[4] > rates[8]
    static = [plan for plan in plans if plan.conditioning == "static"]
    assert abs(len(static) / 600 - 0.5) < 0.07
    # the modes mix with everything else: one checkpoint serves both
    assert {plan.num_memory for plan in static} == {0, 1, 2, 3, 4}
    assert {plan.merge for plan in static} == {"conv", "off"}


def test_the_source_stands_still_in_the_recipes_share(cache: LatentCache) -> None:
    # track 0 is a scene's static camera, as a user's clip of unknown camera is taken to be
    shown = [batch for batch in _draws(cache, 150) if batch.plan.segments[-1].role != "target"]
    sources = [
        number % 20
        for batch in shown
        if batch.plan.segments[1].role == "source"
        for number in _numbers(batch.latents[1])
    ]
    share = sources.count(0) / len(sources)
    assert 0.39 < share < 0.53  # two fifths, and a tenth of the rest


def test_memory_alone_is_perturbed_and_only_beside_a_source(cache: LatentCache) -> None:
    for batch in _draws(cache, 60):
        has_source = any(segment.role == "source" for segment in batch.plan.segments)
        for latents, segment in zip(batch.latents, batch.plan.segments, strict=True):
            spread = float(latents.flatten(1).std(1).mean())
            expected = 0.1 if segment.role == "memory" and has_source else 0.0
            assert spread == pytest.approx(expected, abs=0.01)


def test_a_batch_follows_from_its_generator(cache: LatentCache) -> None:
    for first, second in zip(_draws(cache, 10), _draws(cache, 10), strict=True):
        assert first.plan == second.plan
        assert torch.equal(first.cameras, second.cameras)
        for a, b in zip(first.latents, second.latents, strict=True):
            assert torch.equal(a, b)
    drawn = {(batch.plan, *_numbers(batch.latents[0])) for batch in _draws(cache, 10)}
    assert len(drawn) == 10


def test_the_full_size_recipe_has_one_to_six_memories(cache: LatentCache) -> None:
    sampler = SceneSampler(cache, tiny_config(), Recipe())
    plans = [sampler.draw_plan(torch.Generator().manual_seed(seed)) for seed in range(300)]
    counts = Counter(plan.num_memory for plan in plans)
    assert set(counts) == {1, 2, 3, 4, 5, 6} and min(counts.values()) > 25
    ranked = [plan for plan in plans if plan.num_memory == 6 and _rates(plan) == [4, 4, 4, 8, 8, 8]]
    assert 0.3 < len(ranked) / counts[6] < 0.7


def _rates(plan: TokenPlan) -> list[int]:
    return [segment.tokenizer for segment in plan.segments if segment.role == "memory"]


class _Filmed:
    """A source of another kind than the cache: the sampler needs the protocol alone."""

    latent_shape = (4, 2, 6, 10)

    def __init__(self, cameras: Sequence[int], text: Tensor | None = None) -> None:
        self.cameras, self.text = cameras, text
        self.drawn: list[int] = []

    def __len__(self) -> int:
        return len(self.cameras)

    def num_tracks(self, scene: int) -> int:
        return self.cameras[scene]

    def still_track(self, scene: int) -> int | None:
        return None

    def draw(self, scene: int, tracks: Sequence[int], source: int) -> Tracks:
        self.drawn.append(scene)
        assert tracks[1] == source
        latents = torch.zeros(len(tracks), *self.latent_shape)
        still = torch.eye(3, 4).flatten().expand(len(tracks), 2, 12)
        return Tracks(latents, still, self.text)


def test_scenes_of_too_few_cameras_are_left_out_and_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = _Filmed([3, 8, 4, 9])
    sampler = SceneSampler(source, tiny_config(), Recipe(batch=4))
    assert "left out 2 of 4 scenes" in capsys.readouterr().err
    for seed in range(8):
        sampler.draw(torch.Generator().manual_seed(seed))
    assert set(source.drawn) == {1, 3}


def test_captions_are_padded_with_zeros_and_their_lack_is_the_empty_prompt() -> None:
    shape = tiny_config()  # six text tokens of ten channels
    caption, empty = torch.full((4, 10), 2.0), torch.full((1, 10), 3.0)
    generator = torch.Generator().manual_seed(0)
    for source, length, value in ((_Filmed([8], caption), 4, 2.0), (_Filmed([8]), 1, 3.0)):
        batch = SceneSampler(source, shape, Recipe(), empty_text=empty).draw(generator)
        assert batch.text.shape == (1, 6, 10)
        assert bool((batch.text[0, :length] == value).all())
        assert not batch.text[0, length:].any()
    assert not SceneSampler(_Filmed([8]), shape, Recipe()).draw(generator).text.any()


@pytest.mark.parametrize(
    ("source", "shape", "message"),
    [
        (_Filmed([3, 5]), tiny_config(), "scenes of 8 cameras, the best of 2 scenes has 5"),
        (_Filmed([8]), tiny_config(in_channels=16, out_channels=16), "latents have 4 channels"),
        (_Filmed([8]), tiny_config(camera_conditioning="none"), "with cameras.*attention 'none'"),
        (_Filmed([8]), tiny_config(in_channels=8), "8 channels in and 4 out"),
    ],
    ids=["cameras", "channels", "no-camera-modules", "source-on-channels"],
)
def test_a_source_that_does_not_fit_is_refused(
    source: _Filmed, shape: TransformerConfig, message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        SceneSampler(source, shape, Recipe())


def test_a_caption_of_another_encoder_is_refused() -> None:
    sampler = SceneSampler(_Filmed([8], torch.zeros(3, 7)), tiny_config(), Recipe())
    with pytest.raises(TrainingError, match=r"shape \[3, 7\]"):
        sampler.draw(torch.Generator())


def test_a_recipe_without_memory_is_refused() -> None:
    with pytest.raises(TrainingError, match="max_memory 0"):
        Recipe(max_memory=0)
    with pytest.raises(TrainingError, match="min_memory 3, max_memory 2"):
        Recipe(min_memory=3, max_memory=2)
