"""Bernini-R: a diffusers folder whose JSON says so, ids of videos, and projected guidance.

The reference is diffusers' own Wan transformer over [target, source] frames, with a rotary table
made here: every video's positions begin at zero, and id n turns all 64 pairs of a head as position
n of a table over the whole head does (2 of 12 channels here).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5EncoderModel

from mv2v_engine import Engine, run
from mv2v_engine.checkpoints import inspect_checkpoint, load_checkpoint, save_checkpoint
from mv2v_engine.engine.graphs import Graphs
from mv2v_engine.errors import RequestError
from mv2v_engine.sampling.flow_match import initial_noise, make_solver
from mv2v_engine.sampling.guidance import guide_projected
from mv2v_engine.testing import randomise, relative_error
from mv2v_engine.tokens.flops import flop_table
from mv2v_engine.tokens.plan import turn_plan
from mv2v_engine.video.transforms import cover_and_crop
from tests.conftest import VAE, _save_text, configured, smooth_frames, windowed
from tests.engine.graph_stand_in import StandIn

SIZE, FRAMES, HEADS, HEAD_DIM = (32, 48), 9, 2, 12
SYSTEM = "You are a helpful assistant specialized in video editing."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`Bernini-R-1.3B-Diffusers`, small: a Wan pipeline, and the renderer's config at its root."""
    root = tmp_path_factory.mktemp("hub") / "Bernini-R-1.3B-Diffusers"
    _save_text(root, 16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLWan(**VAE)
        transformer = WanTransformer3DModel(
            num_layers=3,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            ffn_dim=48,
            in_channels=16,
            out_channels=16,
            text_dim=16,
            freq_dim=32,
            rope_max_seq_len=64,
        )
    randomise(transformer)
    WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(root / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(root / "text_encoder"),
        vae=vae,
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(flow_shift=3.0),
    ).save_pretrained(root)
    words = {"model_type": "bernini_renderer", "shift": 3.0, "use_src_id_rotary_emb": True}
    (root / "config.json").write_text(json.dumps(words))
    return root


@pytest.fixture(scope="module")
def editor(folder: Path) -> Engine:
    return small(folder)


def small(folder: Path, **config: Any) -> Engine:
    """Its engine for a small window."""
    return windowed(configured(folder, **config))


@pytest.fixture(scope="module")
def frames() -> Tensor:
    return smooth_frames(FRAMES, SIZE)


def factors(grid: tuple[int, int, int], source_id: float) -> Tensor:
    """complex128 [L, D / 2] of one video."""

    def axis(dim: int, positions: Tensor) -> Tensor:
        angles = torch.outer(positions.double(), 10000 ** -(torch.arange(0, dim, 2).double() / dim))
        return torch.polar(torch.ones_like(angles), angles)

    third = 2 * (HEAD_DIM // 6)
    dims = (HEAD_DIM - 2 * third, third, third)
    axes = [axis(dim, torch.arange(n)) for dim, n in zip(dims, grid, strict=True)]
    shapes = ((grid[0], 1, 1, -1), (1, grid[1], 1, -1), (1, 1, grid[2], -1))
    parts = [a.view(s).expand(*grid, -1) for a, s in zip(axes, shapes, strict=True)]
    own = axis(HEAD_DIM, torch.tensor([source_id]))
    return torch.cat(parts, -1).flatten(0, 2) * own


class Table(nn.Module):
    """In place of diffusers' positions."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        real = self.table.repeat_interleave(2, 1)[None, :, None]
        return real.real.float(), real.imag.float()


def predicted(
    folder: Path, videos: list[Tensor], ids: list[float], t: Tensor, text: Tensor
) -> Tensor:
    """Velocity of the first of videos [1, 16, F, H, W]."""
    model = WanTransformer3DModel.from_pretrained(folder / "transformer").eval()
    tables, tokens = [], []
    for video, source_id in zip(videos, ids, strict=True):
        frames, rows, columns = video.shape[2:]
        tables.append(factors((frames, rows // 2, columns // 2), source_id))
        # one token high and wide: sizes that differ join, and patches stay what they are
        cells = video.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 2, 3, 5, 4, 6)
        tokens.append(cells.flatten(2, 4).reshape(1, 16, -1, 2, 2))
    model.rope = Table(torch.cat(tables))
    with torch.no_grad():
        out: Tensor = model(torch.cat(tokens, 2), t, text, return_dict=False)[0]
    frames, rows, columns = videos[0].shape[2:]
    own = out[:, :, : frames * rows * columns // 4]
    own = own.reshape(1, 16, frames, rows // 2, columns // 2, 2, 2)
    return own.permute(0, 1, 2, 3, 5, 4, 6).reshape(videos[0].shape)


def projected(x: Tensor, sigma: float, own: Tensor, other: Tensor, scale: float) -> Tensor:
    """Frame by frame, as the paper words it."""
    guided = []
    for n in range(x.shape[2]):
        clean, base = (x[:, :, n] - sigma * v[:, :, n] for v in (own, other))
        difference = (clean - base) * min(1.0, 50 / float((clean - base).norm()))
        unit = clean / clean.norm()
        along = (difference * unit).sum() * unit
        guided.append(base + scale * (difference - along + 0.5 * along))
    return (x - torch.stack(guided, 2)) / sigma


def test_it_is_told_by_its_json(folder: Path, editor: Engine, tmp_path: Path) -> None:
    found = inspect_checkpoint(folder)
    assert found.format == "bernini_r" and found.problem is None and found.command == "run edit"
    sampling = editor.checkpoint.sampling
    assert (sampling.guidance, sampling.guidance_scale, sampling.flow_shift) == ("apg", 4.0, 5.0)
    assert (sampling.scheduler, sampling.num_inference_steps) == ("unipc", 40)
    assert load_checkpoint(folder / "transformer").format == "bernini_r"
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "transformer").symlink_to(folder / "transformer")
    assert load_checkpoint(plain).format == "wan_diffusers"
    loaded = load_checkpoint(folder)
    save_checkpoint(
        tmp_path / "own", loaded.transformer, loaded.config, loaded.sampling, "x", torch.float32
    )
    again = load_checkpoint(tmp_path / "own")
    assert (again.config, again.sampling) == (loaded.config, loaded.sampling)
    (folder / "transformer_2").mkdir()
    assert run.main(["inspect", str(folder)]) == 2  # the 14B one has two experts
    (folder / "transformer_2").rmdir()


def test_an_edit_is_that_of_the_published_pipeline(
    folder: Path, editor: Engine, frames: Tensor
) -> None:
    session = editor.session(frames, cuts=())
    session.edit("a red ball", seed=3, num_inference_steps=5)
    source = editor.vae.encode(frames)[None]
    assert editor.text is not None
    texts = [
        editor.text.encode(f"{SYSTEM} a red ball"),
        editor.text.encode(editor.sampling.negative_prompt),
    ]
    latents = initial_noise(tuple(source.shape), 3)
    solver = make_solver("unipc", 5, 5.0)
    for index in range(5):
        t = solver.timesteps[index : index + 1]
        own, other = (predicted(folder, [latents, source], [0, 1], t, text) for text in texts)
        velocity = projected(latents, float(solver.sigmas[index]), own, other, 4.0)
        latents = solver.step(velocity, index, latents)
    assert relative_error(session._kept.drafts[0].windows[0].read()[None], latents) <= 1e-5


def test_remembered_windows_have_ids_of_their_own(folder: Path, editor: Engine) -> None:
    model, generator = editor.transformer, torch.Generator().manual_seed(1)
    plan = turn_plan(model.config, (3, 4, 6), (2,), merge="off")
    assert [s.source_id for s in plan.segments] == [0, 1, 2]
    videos = [torch.randn(1, 16, 3, 4, 6, generator=generator) for _ in plan.segments]
    t, text = torch.tensor([700.0]), torch.randn(1, 4, 16, generator=generator)
    with torch.no_grad():
        got = model(videos, t, text, plan=plan)
    assert relative_error(got, predicted(folder, videos, [0, 1, 2], t, text)) <= 1e-5
    many = turn_plan(model.config, (3, 4, 6), (4,) * 8)
    assert [s.source_id for s in many.segments[1:]] == [1 + n / 2 for n in range(9)]


def test_images_are_segments_with_the_ids_after_the_sources(
    folder: Path, editor: Engine, frames: Tensor, tmp_path: Path
) -> None:
    """Each keeps its shape, in whole patches, and is made no larger; its own words stand first."""
    generator = torch.Generator().manual_seed(8)
    wide = torch.randint(0, 256, (16, 32, 3), generator=generator, dtype=torch.uint8)
    tall = torch.randint(0, 256, (100, 50, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(wide.numpy()).save(tmp_path / "wide.png")
    session = editor.session(frames, cuts=(), references=[tmp_path / "wide.png", tall.numpy()])
    turn = session.edit("a red ball", seed=3, num_inference_steps=3)
    assert turn.report["source"]["references"] == [[16, 32], [48, 32]]
    small_tall = cover_and_crop(tall[None], (48, 32))[0]
    given = [frames, wide[None], small_tall]
    source, *images = (editor.vae.encode(each)[None] for each in given)
    assert editor.text is not None
    texts = [
        editor.text.encode(f"{SYSTEM[:-1]} with reference. a red ball"),
        editor.text.encode(editor.sampling.negative_prompt),
    ]

    def walked(scales: tuple[float, ...]) -> Tensor:
        """`rv2v` of its code; without scales, the two forwards of edits without images."""
        latents = initial_noise(tuple(source.shape), 3)
        solver, ids = make_solver("unipc", 3, 5.0), [0.0, 1.0, 2.0, 3.0]
        for index in range(3):
            t, videos = solver.timesteps[index : index + 1], [latents, source, *images]
            own, other = (predicted(folder, videos, ids, t, text) for text in texts)
            if scales:
                of_video, of_nothing = (
                    predicted(folder, videos[:count], ids[:count], t, texts[1]) for count in (2, 1)
                )
                velocity = of_nothing + scales[1] * (of_video - of_nothing)
                velocity += scales[0] * (other - of_video) + 4.0 * (own - other)
            else:
                velocity = projected(latents, float(solver.sigmas[index]), own, other, 4.0)
            latents = solver.step(velocity, index, latents)
        return latents

    assert editor.sampling.reference_scales == (4.5, 1.25)
    made = session._kept.drafts[0].windows[0]
    assert relative_error(made.read()[None], walked((4.5, 1.25))) <= 1e-5
    # what the totals hold: two whole forwards a step, one without the images, one of the target
    row = made.report
    assert row["forwards"] == 12 and row["work"] == {"whole": 6}
    assert [each["work"] for each in row["lesser"]] == [{"whole": 3}] * 2
    whole = turn_plan(editor.transformer.config, (3, 4, 6), (), references=[(2, 4), (6, 4)])
    less = turn_plan(editor.transformer.config, (3, 4, 6), ())
    counts = [sum(flop_table(plan).values()) for plan in (whole, less)]
    assert [each["tokens"] for each in row["lesser"]] == [less.length, less.target.length]
    alone = sum(flop_table(replace(less, segments=less.segments[:1])).values())
    assert row["flops"] == 3 * (2 * counts[0] + counts[1] + alone)
    plain = replace(editor.checkpoint, sampling=replace(editor.sampling, reference_scales=()))
    options: dict[str, Any] = {"device": editor.device, "config": editor.config}
    other = Engine(plain, editor.vae, editor.text, **options).session(
        frames, cuts=(), references=[tmp_path / "wide.png", tall.numpy()]
    )
    other.edit("a red ball", seed=3, num_inference_steps=3)
    assert relative_error(other._kept.drafts[0].windows[0].read()[None], walked(())) <= 1e-5
    # at scale 1 there is nothing to guide towards
    turn = session.edit("a red ball", seed=3, num_inference_steps=3, guidance_scale=1.0)
    assert turn.report["windows"][0]["forwards"] == 3 and "lesser" not in turn.report["windows"][0]
    plan = turn_plan(editor.transformer.config, (3, 4, 6), (4,) * 4, references=[(2, 4)] * 2)
    assert [s.source_id for s in plan.segments[1:]] == [1 + n * 4 / 6 for n in range(7)]
    with pytest.raises(RequestError, match=r"-R-1\.3B-Diffusers takes no mask; leave it out"):
        editor.session(frames, cuts=(), mask=frames)


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_images_are_guided_alike_in_captured_and_in_kept_steps(
    folder: Path, frames: Tensor, conditioning: Any
) -> None:
    image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    made = []
    for recorder in (None, StandIn()):
        engine = small(folder, conditioning=conditioning)
        if recorder is not None:
            engine.graphs = Graphs("on", 1 << 28, recorder, None)
        session = engine.session(frames, cuts=(), references=[image])
        row = session.edit("a red ball", seed=3, num_inference_steps=4).report["windows"][0]
        assert (row["graphs"]["replayed_steps"] > 0) == (recorder is not None)
        made.append(session._kept.drafts[0].windows[0].read())
        kept = {"whole": 8} if conditioning == "joint" else {"whole": 1, "kept": 7}
        assert row["work"] == kept and [e["work"] for e in row["lesser"]] == [{"whole": 4}] * 2
    assert torch.equal(*made)


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_a_long_edit_remembers_and_captured_steps_are_the_same(
    folder: Path, frames: Tensor, conditioning: Any
) -> None:
    long = torch.cat([frames, frames.flip(0)])
    images = [frames[0, :16, :32]]
    latents = []
    for captured in (False, True):
        engine = small(folder, conditioning=conditioning, memory="retrieved")
        if captured:
            engine.graphs = Graphs("on", 1 << 30, StandIn(), None)
        session = engine.session(long, cuts=(), references=images)
        session.edit("a ball", num_inference_steps=3)
        windows = session._kept.drafts[0].windows
        latents.append([window.read() for window in windows])
        assert windows[-1].report["plan"]["memory_tokenizers"] == [4]
    for one, other in zip(*latents, strict=True):
        assert torch.equal(one, other)


def test_projected_guidance_of_large_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    x, own, other = (torch.randn(1, 16, 3, 4, 6, generator=generator) for _ in range(3))
    own = 30 * own
    sigma = torch.tensor([0.7])
    got = guide_projected([own, other], 4.0, x, sigma)
    assert relative_error(got, projected(x, 0.7, own, other, 4.0)) <= 1e-5
    assert torch.equal(guide_projected([own], 4.0, x, sigma), own)
