"""A plan with a target alone is diffusers' `WanTransformer3DModel`, parameter for parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine.checkpoints.load import load_checkpoint
from mv2v_engine.config import TransformerConfig
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.testing import randomise, relative_error, tiny_config
from mv2v_engine.tokens.plan import turn_plan
from tests.models.drawn import in_diffusers_words

# frames, rows, columns of the latent grid: token grids of odd and prime sides among them
GRIDS = [(1, 2, 2), (3, 6, 10), (5, 12, 20), (2, 14, 26), (4, 10, 2)]
SHAPES = {
    "head dim 12": {},
    "head dim 20": {"num_attention_heads": 3, "attention_head_dim": 20},
    # spatial halves of 42 channels, as in the full-size model
    "head dim 128": {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 2},
    "source on channels": {"in_channels": 96, "out_channels": 48, "source_channels": 48},
}


def _config(**changes: Any) -> TransformerConfig:
    base = {"camera_conditioning": "none", "tokenizers": (), "merger": None}
    return tiny_config(**base | changes)


def _diffusers(config: TransformerConfig) -> Any:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        in_channels=config.in_channels,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        **in_diffusers_words(config),
    )
    randomise(model)
    return model.eval().requires_grad_(False)


def _pair(shape: str) -> tuple[MV2VTransformer, Any]:
    """Ours and diffusers' of the same weights."""
    config = _config(**SHAPES[shape])
    reference, model = _diffusers(config), MV2VTransformer(config).eval().requires_grad_(False)
    model.load_state_dict(reference.state_dict(), strict=True)
    return model, reference


def _inputs(config: TransformerConfig, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(grid))
    latents = torch.randn(2, config.in_channels, *grid, generator=generator)
    text = torch.randn(2, config.text_len, config.text_dim, generator=generator)
    return latents, torch.tensor([999.0, 371.5]), text


def _theirs(model: Any, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    result: Tensor = model(
        hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False
    )[0]
    return result


def _ours(model: MV2VTransformer, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    frames, rows, columns = latents.shape[2:]
    plan = turn_plan(model.config, (frames, rows, columns), (), source=False)
    result: Tensor = model([latents], timestep, text, plan=plan)
    return result


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_forward(shape: str, grid: tuple[int, int, int]) -> None:
    model, reference = _pair(shape)
    inputs = _inputs(model.config, grid)
    got, expected = _ours(model, *inputs), _theirs(reference, *inputs)
    assert got.shape == expected.shape
    assert relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize("grid", GRIDS[1:3], ids=str)
def test_a_timestep_for_every_token_is_one_for_all(grid: tuple[int, int, int]) -> None:
    """Lucy-Edit's pipeline expands t to every token, the same t: one a sample does as well."""
    model, reference = _pair("source on channels")
    latents, timestep, text = _inputs(model.config, grid)
    tokens = grid[0] * (grid[1] // 2) * (grid[2] // 2)
    expanded = _theirs(reference, latents, timestep[:, None].expand(-1, tokens), text)
    assert relative_error(_theirs(reference, latents, timestep, text), expanded) <= 1e-6
    assert relative_error(_ours(model, latents, timestep, text), expanded) <= 1e-5


def test_parameter_names_and_shapes_are_diffusers() -> None:
    config = _config()
    theirs = {name: p.shape for name, p in _diffusers(config).named_parameters()}
    assert {name: p.shape for name, p in MV2VTransformer(config).named_parameters()} == theirs
    # memory adds modules and touches none
    memory = {name: p.shape for name, p in MV2VTransformer(tiny_config()).named_parameters()}
    assert theirs.items() <= memory.items()
    extra = {name.split(".")[0 if name[:1] in "tm" else 2] for name in set(memory) - set(theirs)}
    assert extra == {"tokenizers", "mergers", "cam_encoder", "projector"}


@pytest.mark.parametrize("grid", GRIDS[1:4], ids=str)
def test_bfloat16_is_as_exact_as_diffusers(grid: tuple[int, int, int], tmp_path: Path) -> None:
    """Both load the same folder in bf16, float32 islands and all; judged by float64."""
    from diffusers import WanTransformer3DModel

    config = _config(**SHAPES["head dim 128"])
    exact = _diffusers(config)
    exact.save_pretrained(tmp_path / "transformer")
    theirs = WanTransformer3DModel.from_pretrained(
        tmp_path / "transformer", torch_dtype=torch.bfloat16
    )
    ours = load_checkpoint(tmp_path, dtype=torch.bfloat16).transformer
    dtypes = {name: p.dtype for name, p in ours.named_parameters()}
    assert {name: p.dtype for name, p in theirs.named_parameters()}.items() <= dtypes.items()
    # the weights that both hold, widened: rounding the weights is no error of the forward
    exact.load_state_dict(theirs.state_dict())
    exact.double()
    latents, timestep, text = _inputs(config, grid)
    latents, text = latents.bfloat16(), text.bfloat16()
    with torch.no_grad():
        oracle = _theirs(exact, latents.double(), timestep, text.double())
        plain = relative_error(_theirs(theirs, latents, timestep, text), oracle)
        error = relative_error(_ours(ours, latents, timestep, text), oracle)
    print(f"bf16 error: ours {error:.3g}, diffusers {plain:.3g}")
    assert 0 < error <= 2 * plain


@pytest.mark.parametrize("grid", GRIDS[1:3], ids=str)
def test_a_timestep_for_every_frame(grid: tuple[int, int, int]) -> None:
    """Frames at noise levels of their own, as Wan2.2 takes them: a timestep for every token."""
    model, reference = _pair("source on channels")
    latents, timestep, text = _inputs(model.config, grid)
    generator = torch.Generator().manual_seed(1)
    by_frame = 1000 * torch.rand(2, grid[0], generator=generator)
    by_token = by_frame.repeat_interleave(grid[1] // 2 * (grid[2] // 2), dim=1)
    expected = _theirs(reference, latents, by_token, text)
    assert relative_error(_ours(model, latents, by_frame, text), expected) <= 1e-5
    equal = timestep[:, None].expand(-1, grid[0])
    one = _ours(model, latents, timestep, text)
    assert relative_error(one, expected) > 1e-3
    for backend in ("reference", "auto"):
        model.set_backend(backend)
        one = _ours(model, latents, timestep, text)
        # products of more rows may round otherwise
        assert relative_error(_ours(model, latents, equal, text), one) <= 1e-6


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 4), r"\[B, 3\] for one a target frame, got \[2, 4\]"), ((2, 3, 1), r"got \[2, 3, 1\]")],
)
def test_timesteps_of_other_shapes(shape: tuple[int, ...], message: str) -> None:
    model = MV2VTransformer(_config())
    latents, _, text = _inputs(model.config, (3, 6, 10))
    with pytest.raises(ValueError, match=message):
        _ours(model, latents, torch.zeros(shape), text)


def test_conditioning_has_no_timesteps_by_frame() -> None:
    model = MV2VTransformer(tiny_config(camera_conditioning="none"))
    latents, _, text = _inputs(model.config, (3, 6, 10))
    plan = turn_plan(model.config, (3, 6, 10), ())
    with pytest.raises(ValueError, match="got 2 segments"):
        model([latents, latents], torch.zeros(2, 3), text, plan=plan)
