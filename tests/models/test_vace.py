"""VACE: its forward against a written-out reference and diffusers', its context, files, an edit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.checkpoints import inspect_checkpoint, load_checkpoint, render_inspection
from mv2v_engine.checkpoints.names import to_original
from mv2v_engine.config import ParallelConfig, StreamConfig, TransformerConfig
from mv2v_engine.engine.step import vace_context
from mv2v_engine.engine.stream import require_causal
from mv2v_engine.errors import CheckpointError, RequestError, StorageError, VideoError
from mv2v_engine.models.autoencoder import Autoencoder
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.sampling.flow_match import initial_noise
from mv2v_engine.testing import cpu_flops, randomise, relative_error, tiny_config
from mv2v_engine.tokens.flops import flop_table
from mv2v_engine.tokens.plan import turn_plan
from mv2v_engine.vae import VideoVAE
from tests.models.drawn import in_diffusers_words

GRID = (3, 6, 10)
State = dict[str, Tensor]


def _config(**changes: Any) -> TransformerConfig:
    """Two latents of 16 channels and 64 of a mask; blocks beside 0, 2 and 3 of four."""
    base: dict[str, Any] = {"camera_conditioning": "none", "tokenizers": (), "merger": None}
    base |= {"in_channels": 112, "out_channels": 16, "source_channels": 96}
    base |= {"num_layers": 4, "vace_layers": (0, 2, 3)}
    return tiny_config(**base | changes)


def _model(config: TransformerConfig) -> MV2VTransformer:
    model = MV2VTransformer(config).eval().requires_grad_(False)
    randomise(model)
    return model


def _inputs(config: TransformerConfig) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(2, config.in_channels, *GRID, generator=generator)
    text = torch.randn(2, config.text_len, config.text_dim, generator=generator)
    return latents, torch.tensor([999.0, 371.5]), text


def _original(model: MV2VTransformer) -> State:
    """The weights under Wan's own names."""
    names = {name: to_original(name) for name in model.state_dict()}
    assert None not in names.values()
    return {str(names[name]): weight for name, weight in model.state_dict().items()}


class Reference:
    """The paper's model, written out over Wan's own names, in float64, one sample at a time."""

    def __init__(self, weights: State, config: TransformerConfig) -> None:
        self.w = {name: weight.double() for name, weight in weights.items()}
        self.heads, self.eps = config.num_attention_heads, config.eps
        self.layers, self.depth = config.vace_layers, config.num_layers
        self.freq_dim = config.freq_dim

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def norm(self, x: Tensor, name: str | None = None) -> Tensor:
        pair = (None, None) if name is None else (self.w[f"{name}.weight"], self.w[f"{name}.bias"])
        return F.layer_norm(x, x.shape[-1:], *pair, eps=self.eps)

    def heads_of(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(0, 1)

    def attention(self, name: str, x: Tensor, seen: Tensor, turn: Tensor | None) -> Tensor:
        given = {"q": x, "k": seen, "v": seen}
        q, k, v = (self.linear(f"{name}.{part}", y) for part, y in given.items())
        for part, y in (("q", q), ("k", k)):
            y *= (y.square().mean(-1, keepdim=True) + self.eps).rsqrt()
            y *= self.w[f"{name}.norm_{part}.weight"]
        q, k, v = map(self.heads_of, (q, k, v))
        if turn is not None:
            pairs = (y.contiguous().unflatten(-1, (-1, 2)) for y in (q, k))
            turned = (torch.view_as_complex(y) * turn for y in pairs)
            q, k = (torch.view_as_real(y).flatten(2) for y in turned)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        out = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        return self.linear(f"{name}.o", out)

    def block(self, name: str, x: Tensor, text: Tensor, time: Tensor, turn: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.w[f"{name}.modulation"][0] + time
        seen = self.norm(x) * (1 + scale) + shift
        x = x + self.attention(f"{name}.self_attn", seen, seen, turn) * gate
        x = x + self.attention(f"{name}.cross_attn", self.norm(x, f"{name}.norm3"), text, None)
        hidden = self.linear(f"{name}.ffn.0", self.norm(x) * (1 + scale2) + shift2)
        return x + self.linear(f"{name}.ffn.2", F.gelu(hidden, approximate="tanh")) * gate2

    def turns(self, grid: tuple[int, int, int], width: int) -> Tensor:
        sizes = (width - 4 * (width // 6), 2 * (width // 6), 2 * (width // 6))
        parts = []
        for axis, size in enumerate(sizes):
            rate = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
            angle = torch.arange(grid[axis], dtype=torch.float64)[:, None] * rate
            shape = [1, 1, 1, -1]
            shape[axis] = grid[axis]
            parts.append(angle.reshape(shape).expand(*grid, -1))
        angles = torch.cat(parts, -1).flatten(0, 2)
        return torch.polar(torch.ones_like(angles), angles)

    def patches(self, name: str, video: Tensor) -> Tensor:
        pair = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return F.conv3d(video[None], *pair, stride=(1, 2, 2))[0].flatten(1).T

    def __call__(self, latents: Tensor, context: Tensor, time: float, text: Tensor) -> Tensor:
        frames, rows, columns = latents.shape[1:]
        x = self.patches("patch_embedding", latents.double())
        half = self.freq_dim // 2
        rate = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        wave = torch.cat([(time * rate).cos(), (time * rate).sin()])
        embedded = self.linear("time_embedding.2", F.silu(self.linear("time_embedding.0", wave)))
        modulation = self.linear("time_projection.1", F.silu(embedded)).unflatten(0, (6, -1))
        hidden = F.gelu(self.linear("text_embedding.0", text.double()), approximate="tanh")
        words = self.linear("text_embedding.2", hidden)
        turn = self.turns((frames, rows // 2, columns // 2), x.shape[-1] // self.heads)
        seen = self.patches("vace_patch_embedding", context.double())
        seen, hints = self.linear("vace_blocks.0.before_proj", seen) + x, []
        for place in range(len(self.layers)):
            seen = self.block(f"vace_blocks.{place}", seen, words, modulation, turn)
            hints.append(self.linear(f"vace_blocks.{place}.after_proj", seen))
        for index in range(self.depth):
            x = self.block(f"blocks.{index}", x, words, modulation, turn)
            if index in self.layers:
                x = x + hints[self.layers.index(index)]
        shift, scale = self.w["head.modulation"][0] + embedded
        out = self.linear("head.head", self.norm(x) * (1 + scale) + shift)
        cells = out.reshape(frames, rows // 2, columns // 2, 2, 2, -1)
        return cells.permute(5, 0, 1, 3, 2, 4).reshape(-1, frames, rows, columns)


def test_it_is_the_papers_forward() -> None:
    config = _config()
    model = _model(config)
    reference = Reference(_original(model), config)
    latents, times, text = _inputs(config)
    plan = turn_plan(config, GRID, ())
    got = model([latents], times, text, plan=plan)
    expected = torch.stack(
        [
            reference(latents[n, :16], latents[n, 16:], float(times[n]), text[n])
            for n in range(len(latents))
        ]
    )
    assert relative_error(got, expected) <= 1e-5
    # and the context is read
    other = torch.cat([latents[:, :16], -latents[:, 16:]], 1)
    assert relative_error(model([other], times, text, plan=plan), expected) > 1e-2


def test_it_is_diffusers_model() -> None:
    from diffusers import WanVACETransformer3DModel

    config = _config()
    theirs = WanVACETransformer3DModel(
        in_channels=16,
        vace_layers=list(config.vace_layers),
        vace_in_channels=96,
        **in_diffusers_words(config),
    )
    theirs = theirs.eval().requires_grad_(False)
    randomise(theirs)
    model = MV2VTransformer(config).eval().requires_grad_(False)
    model.load_state_dict(theirs.state_dict(), strict=True)
    latents, times, text = _inputs(config)
    expected = theirs(
        hidden_states=latents[:, :16],
        timestep=times,
        encoder_hidden_states=text,
        control_hidden_states=latents[:, 16:],
        return_dict=False,
    )[0]
    got = model([latents], times, text, plan=turn_plan(config, GRID, ()))
    assert relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_memory_stands_beside_it(conditioning: Any) -> None:
    """Hints go to the target's tokens alone; kept K and V give what a whole forward gives."""
    from mv2v_engine.models.kept import ConditioningCache

    config = _config(tokenizers=(2, 4))
    model = _model(config)
    latents, times, text = (each[:1] for each in _inputs(config))
    plan = turn_plan(config, GRID, (2, 4), merge="off", conditioning=conditioning)
    shapes = plan.latent_shapes[1:]
    memory = [torch.randn(1, *s, generator=torch.Generator().manual_seed(3)) for s in shapes]
    whole = model([latents, *memory], times, text, plan=plan)
    alone = model([latents], times, text, plan=turn_plan(config, GRID, ()))
    assert relative_error(whole, alone) > 1e-3
    if conditioning == "static":
        kept = ConditioningCache(plan)
        with torch.no_grad():
            first = model([latents, *memory], times, text, plan=plan, kept=kept)
            again = model([latents], times, text, plan=plan, kept=kept)
        assert relative_error(first, whole) == 0 and relative_error(again, whole) < 1e-5


def test_its_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = _config()
    latents, times, text = (each[:1] for each in _inputs(config))
    plan = turn_plan(config, GRID, ())
    with FlopCounterMode(display=False, custom_mapping=cpu_flops()) as counter:
        _model(config)([latents], times, text, plan=plan)
    assert counter.get_total_flops() == sum(flop_table(plan).values())
    assert flop_table(plan)["vace"] > 0


def test_what_it_does_not_do() -> None:
    config = _config()
    model = _model(config)
    latents, times, text = (each[:1] for each in _inputs(config))
    with pytest.raises(RequestError, match="VACE's blocks, which see a whole video"):
        require_causal(config, "vace", StreamConfig())
    from mv2v_engine.models.sample import Sample

    sample = Sample(
        latents=[latents],
        timestep=times,
        encoder_hidden_states=text,
        plan=turn_plan(config, GRID, ()),
    )
    with pytest.raises(ValueError, match="not in packs, streams or over ranks"):
        model.forward_samples([sample, sample])
    for wrong in ((1, 2), (0, 0), (0, 4)):
        with pytest.raises(RequestError, match="vace_layers must rise from 0"):
            _config(vace_layers=wrong)
    with pytest.raises(RequestError, match="VACE takes its context beside the target"):
        _config(in_channels=110)


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    torch.manual_seed(0)
    fields = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return VideoVAE(Autoencoder(fields))


def test_the_context_of_a_source_and_a_mask(vae: VideoVAE) -> None:
    """VACE's authors encode both halves of the video, and the mask's cells by channel."""
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (9, 32, 48, 3), generator=generator, dtype=torch.uint8)
    mask = (torch.rand(9, 32, 48, generator=generator) > 0.5).float()
    got = vace_context(vae, frames, mask)
    assert got.shape == (96, 3, 4, 6)
    pixels = (frames.permute(3, 0, 1, 2).float() / 127.5 - 1)[None]
    mean, std = (
        torch.tensor(each).reshape(16, 1, 1, 1)
        for each in (vae.model.config.latents_mean, vae.model.config.latents_std)
    )
    for place, chosen in ((0, 1 - mask), (1, mask)):
        latents = (vae.model.encode(pixels * chosen)[0] - mean) / std
        torch.testing.assert_close(got[16 * place : 16 * place + 16], latents)
    for frame, nearest in enumerate((1, 4, 7)):  # the middle of each third of nine frames
        for row, column in ((0, 0), (3, 5)):
            cell = mask[nearest, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert torch.equal(got[32:, frame, row, column], cell.flatten())
    # without a mask all of it is made anew
    whole = vace_context(vae, frames, whole=vae.encode(frames))
    torch.testing.assert_close(whole, vace_context(vae, frames, torch.ones(9, 32, 48)))
    assert torch.equal(whole[32:], torch.ones(64, 3, 4, 6))
    with pytest.raises(VideoError, match="the mask must have shape"):
        vace_context(vae, frames, mask[:5])


def _file(folder: Path, model: MV2VTransformer, *, layers: list[int] | None) -> Path:
    folder.mkdir()
    config = model.config
    words: dict[str, Any] = {"_class_name": "VaceWanModel", "model_type": "vace"}
    words |= {"num_heads": config.num_attention_heads, "dim": config.dim, "text_len": 8}
    words |= {} if layers is None else {"vace_layers": layers}
    (folder / "config.json").write_text(json.dumps(words))
    weights = {name: weight.contiguous() for name, weight in _original(model).items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def test_its_file_is_recognised_and_edits(
    worded_checkpoint: Path, moving_frames: Callable[..., Tensor], tmp_path: Path
) -> None:
    config = _config(num_attention_heads=2, attention_head_dim=24, text_dim=16, text_len=8)
    model = _model(config)
    folder = _file(tmp_path / "vace", model, layers=[0, 2, 3])
    found = inspect_checkpoint(folder)
    assert found.problem is None and found.format == "vace" and found.command == "run edit"
    told = render_inspection(found)
    assert "a Wan VACE transformer" in told and "3 VACE blocks beside the main ones" in told
    loaded = load_checkpoint(folder)
    assert loaded.config.vace_layers == (0, 2, 3) and loaded.config.in_channels == 112
    assert loaded.sampling.flow_shift == 16 and loaded.sampling.size == (480, 832)
    ours = model.state_dict()
    state = loaded.transformer.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in ours.items())
    # the layers of a file that does not say them are spread evenly, if they can be
    even = _model(replace(config, vace_layers=(0, 2)))
    assert load_checkpoint(_file(tmp_path / "even", even, layers=None)).config.vace_layers == (0, 2)
    with pytest.raises(CheckpointError, match="has 3 VACE blocks, and 4 vace_layers"):
        load_checkpoint(_file(tmp_path / "uneven", model, layers=None))
    wrong: list[Any] = [5, "0", [0, "2", 3], [0, 2.5, 3], [False, 2, 3], {"0": 2}]
    for number, layers in enumerate(wrong):
        path = _file(tmp_path / f"wrong{number}", model, layers=layers)
        with pytest.raises(CheckpointError, match="vace_layers must be a list of whole numbers"):
            load_checkpoint(path)

    engine = Engine.from_pretrained(folder, device="cpu", components=worded_checkpoint)
    small = replace(loaded.sampling, num_frames=5, size=(32, 48), num_inference_steps=2)
    checkpoint = replace(engine.checkpoint, sampling=small)
    options: dict[str, Any] = {"device": engine.device}
    editor = Engine(checkpoint, engine.vae, engine.text, config=EngineConfig(), **options)
    frames = moving_frames(9)
    turn = editor.session(frames, cuts=()).edit("a red ball", seed=3)
    assert turn.frames.shape == (9, 32, 48, 3)
    other = editor.session(255 - frames, cuts=()).edit("a red ball", seed=3)
    assert not torch.equal(turn.frames, other.frames)
    shared = EngineConfig(parallel=ParallelConfig(context=2))
    with pytest.raises(RequestError, match="tokens are not shared between processes"):
        Engine(checkpoint, engine.vae, engine.text, config=shared, **options)


@pytest.fixture
def editor(worded_checkpoint: Path, tmp_path: Path) -> Engine:
    """An engine of windows of 5 frames of 32x48, two steps without guidance."""
    config = _config(num_attention_heads=2, attention_head_dim=24, text_dim=16, text_len=8)
    folder = _file(tmp_path / "vace", _model(config), layers=[0, 2, 3])
    engine = Engine.from_pretrained(folder, device="cpu", components=worded_checkpoint)
    changes: dict[str, Any] = {"num_frames": 5, "size": (32, 48), "num_inference_steps": 2}
    sampling = replace(engine.sampling, guidance_scale=1.0, flow_shift=5.0, **changes)
    checkpoint = replace(engine.checkpoint, sampling=sampling)
    return Engine(checkpoint, engine.vae, engine.text, device=engine.device, config=EngineConfig())


def _context(vae: VideoVAE, frames: Tensor, mask: Tensor, images: list[Tensor]) -> Tensor:
    """The paper's context: what stays and what does not, apart; the mask's pixels of the nearest
    frames; and before them the images on white, which stay."""
    pixels = frames.permute(3, 0, 1, 2).float() / 127.5 - 1
    parts = [vae.encode_pixels(pixels * (1 - mask)), vae.encode_pixels(pixels * mask)]
    # the frames of five that are nearest to the middles of two halves
    cells = mask[[1, 3]].reshape(2, 4, 8, 6, 8).permute(2, 4, 0, 1, 3).flatten(0, 1)
    context = torch.cat([*parts, cells])
    for image in reversed(images):
        latents = vae.encode(image[None])
        context = torch.cat([torch.cat([latents, torch.zeros(80, 1, 4, 6)]), context], 1)
    return context


def test_images_and_a_mask_are_what_its_blocks_are_given(
    editor: Engine, moving_frames: Callable[..., Tensor], tmp_path: Path
) -> None:
    """Euler over the reference forward; the images are frames before the target's, cut off."""
    frames = moving_frames(5)
    mask = torch.zeros(5, 32, 48)
    mask[1:, 8:24, 11:37] = 1
    generator = torch.Generator().manual_seed(6)
    wide, tall = (
        torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
        for size in ((16, 48), (32, 16))
    )
    Image.fromarray(wide.numpy()).save(tmp_path / "wide.png")
    given = {"references": [tmp_path / "wide.png", tall], "mask": _video(mask)}
    session = editor.session(frames, cuts=(), **given)
    turn = session.edit("a red ball", seed=3)
    assert turn.frames.shape == (5, 32, 48, 3)
    assert turn.report["source"]["references"] == [[32, 48], [32, 48]]
    assert turn.report["source"]["mask"] == "mask"

    canvas = [torch.full((32, 48, 3), 255, dtype=torch.uint8) for _ in range(2)]
    canvas[0][8:24], canvas[1][:, 16:32] = wide, tall
    context = _context(editor.vae, frames, mask, canvas)
    assert context.shape == (96, 4, 4, 6)
    assert editor.text is not None
    text = editor.text.encode("a red ball")[0]
    file = editor.checkpoint.report.path / "diffusion_pytorch_model.safetensors"
    reference = Reference(load_file(str(file)), editor.transformer.config)
    latents = initial_noise((1, 16, 4, 4, 6), 3)[0].double()
    levels = torch.linspace(1, 0, 3, dtype=torch.float64)
    levels = 5 * levels / (1 + 4 * levels)
    for level, after in pairwise(levels):
        velocity = reference(latents, context, float(1000 * level), text)
        latents = latents + (after - level) * velocity
    assert relative_error(session._kept.drafts[0].windows[0].read(), latents[:, 2:].float()) <= 1e-4


def _video(mask: Tensor) -> Tensor:
    return (255 * mask).to(torch.uint8)[..., None].expand(*mask.shape, 3)


def test_a_mask_of_a_long_video_and_what_is_refused(
    editor: Engine, moving_frames: Callable[..., Tensor], tmp_path: Path, monkeypatch: Any
) -> None:
    frames, seen = moving_frames(9), list[Tensor]()
    original = vace_context

    def watched(vae: VideoVAE, frames: Tensor, mask: Tensor | None = None, **how: Any) -> Tensor:
        assert mask is not None
        seen.append(mask)
        return original(vae, frames, mask, **how)

    monkeypatch.setattr("mv2v_engine.engine.window.vace_context", watched)
    mask = torch.zeros(9, 32, 48)
    for number in range(9):
        mask[number, number] = 1
    session = editor.session(frames, cuts=(), mask=_video(mask))
    session.edit("a red ball")
    for window, own in zip(session.windows, seen, strict=True):
        assert torch.equal(own, mask[list(window.indices)])
    # one image is every frame's, and a folder knows its session by it and by the references
    seen.clear()
    Image.fromarray(_video(mask)[3].numpy()).save(tmp_path / "mask.png")
    store = tmp_path / "session"
    about: dict[str, Any] = {"cuts": (), "store": store}
    session = editor.session(frames, mask=tmp_path / "mask.png", references=[frames[0]], **about)
    session.edit("a red ball")
    assert all(torch.equal(own, mask[3].expand(5, -1, -1)) for own in seen)
    assert session.turns[0].report["source"]["mask"] == "mask.png"
    session.close()
    with pytest.raises(StorageError, match="a session whose mask is '"):
        editor.session(frames, references=[frames[0]], resume=True, **about)
    with pytest.raises(StorageError, match="a session whose references is"):
        editor.session(frames, mask=tmp_path / "mask.png", resume=True, **about)
    again = editor.session(
        frames, mask=_video(mask)[3:4], references=[frames[0].numpy()], resume=True, **about
    )
    assert len(again.turns) == 1

    refused: list[tuple[dict[str, Any], str]] = [
        ({"mask": _video(mask)[:5]}, "mask has 5 frames, and the source that it masks 9; give as"),
        ({"mask": _video(mask)[:, :16]}, "mask is 48x16, and the source that it masks 48x32"),
        ({"mask": tmp_path / "none.png"}, "no image at .*none.png; give a file that exists"),
        ({"references": [tmp_path / "none.jpg"]}, "no image at .*none.jpg"),
        ({"references": [Path(__file__)]}, "test_vace.py cannot be read as an image"),
        ({"references": [frames]}, "references must be a list, each an image file"),
        ({"references": [frames[0].float()]}, "references must be a list, each an image file"),
        ({"references": [frames[0, :1]]}, "one side more than 16 times the other"),
        ({"references": "one.png"}, "references must be images"),
    ]
    for given, words in refused:
        with pytest.raises((VideoError, RequestError), match=words):
            editor.session(frames, cuts=(), **given)


def test_who_takes_none_says_so(
    moving_frames: Callable[..., Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mv2v_engine import run
    from mv2v_engine.video.io import write_video

    clip, image = tmp_path / "clip.mp4", tmp_path / "one.png"
    write_video(clip, moving_frames(5), 8)
    Image.fromarray(moving_frames(1)[0].numpy()).save(image)
    common = ["edit", str(clip), "--prompt", "x", "--out", str(tmp_path / "out.mp4")]
    assert run.main([*common, "--mask", str(image)]) == 2
    assert "tiny-edit takes no mask; leave it out, or use" in capsys.readouterr().err
    assert run.main([*common, "--reference", str(image)]) == 2
    assert "tiny-edit takes no reference images; leave them out" in capsys.readouterr().err
    assert not (tmp_path / "out.mp4").exists()


def test_a_lora_of_its_blocks(tmp_path: Path) -> None:
    """Ditto's files are such: changes of VACE's own blocks alone."""
    model = _model(_config(num_attention_heads=2, attention_head_dim=24, text_len=8))
    folder, generator = _file(tmp_path / "vace", model, layers=[0, 2, 3]), torch.Generator()
    name, width = "vace_blocks.1.self_attn.q", model.config.dim
    down = torch.randn(4, width, generator=generator)
    up = torch.randn(width, 4, generator=generator)
    keys = {f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up}
    save_file(keys, tmp_path / "ditto_small.safetensors")
    loaded = load_checkpoint(folder, lora=((tmp_path / "ditto_small.safetensors", 0.5),))
    got = loaded.transformer.state_dict()["vace_blocks.1.attn1.to_q.weight"]
    expected = model.state_dict()["vace_blocks.1.attn1.to_q.weight"] + 0.5 * up @ down
    torch.testing.assert_close(got, expected)
