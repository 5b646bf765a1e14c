"""LoRAs: every spelling of the keys gives the same weights, x + s B A x; the rest is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mv2v_engine.checkpoints import load_checkpoint
from mv2v_engine.checkpoints.inspect import inspect_lora, render_lora
from mv2v_engine.checkpoints.lora import find_lora, find_loras, lora_pair, read_lora
from mv2v_engine.config import EngineConfig
from mv2v_engine.errors import CheckpointError, RequestError
from tests.checkpoints.small_hub import SmallHub

State = dict[str, Tensor]
Rename = Callable[[str], str]
RANK = 4
# original names of layers, with the shape of each: of SMALL, 128 wide with 96 hidden
LAYERS = {
    "blocks.0.self_attn.q": (128, 128),
    "blocks.1.self_attn.o": (128, 128),
    "blocks.2.cross_attn.v": (128, 128),
    "blocks.0.ffn.0": (96, 128),
    "blocks.2.ffn.2": (128, 96),
    "time_projection.1": (768, 128),
    "head.head": (16, 128),
}


def products(seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """B [rows, r] and A [r, columns] of every layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rows, RANK, generator=generator),
            torch.randn(RANK, columns, generator=generator),
        )
        for name, (rows, columns) in LAYERS.items()
    }


def comfy(name: str) -> str:
    return f"diffusion_model.{name}"


def kohya(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


SPELLINGS: dict[str, tuple[Callable[[str], str], tuple[str, str]]] = {
    "comfy": (comfy, ("lora_A.weight", "lora_B.weight")),
    "comfy_down": (comfy, ("lora_down.weight", "lora_up.weight")),
    "none": (lambda name: name, ("lora_A.weight", "lora_B.weight")),
    "peft_of_originals": (
        lambda name: f"base_model.model.{name}",
        ("lora_A.weight", "lora_B.weight"),
    ),
    "with_adapter": (lambda name: name, ("lora_A.default.weight", "lora_B.default.weight")),
    "kohya": (kohya, ("lora_down.weight", "lora_up.weight")),
    "kohya_twice": (
        lambda name: kohya(name).replace("unet_", "unet__"),
        ("lora_down.weight", "lora_up.weight"),
    ),
}


def spelt(
    pairs: dict[str, tuple[Tensor, Tensor]],
    key: Callable[[str], str],
    leaves: tuple[str, str] = ("lora_A.weight", "lora_B.weight"),
) -> State:
    state = {}
    for name, (up, down) in pairs.items():
        state[f"{key(name)}.{leaves[0]}"], state[f"{key(name)}.{leaves[1]}"] = down, up
    return state


def saved(folder: Path, state: State, name: str = "change.safetensors", **words: str) -> Path:
    path = folder / name
    state = {key: value.contiguous().clone() for key, value in state.items()}
    if name.endswith(".pth"):
        torch.save(state, path)
    else:
        save_file(state, str(path), words or None)
    return path


def deltas(pairs: dict[str, tuple[Tensor, Tensor]], scale: float) -> State:
    """scale * B A of every layer's weight, float64."""
    return {f"{n}.weight": scale * (up.double() @ down.double()) for n, (up, down) in pairs.items()}


def module_of(renamed: Rename, name: str) -> str:
    return renamed(f"{name}.weight").removesuffix(".weight")


def weights(path: Path, *loras: tuple[Path, float], dtype: torch.dtype | None = None) -> State:
    loaded = load_checkpoint(path, lora=loras, dtype=dtype)
    return {name: value.detach() for name, value in loaded.transformer.named_parameters()}


@pytest.fixture
def base(tmp_path: Path, wan: State) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    return saved(folder, wan, "wan.safetensors")


def changed(wan: State, renamed: Rename, changes: State) -> State:
    """By our names: the base's weights, with what is given by original names added in float64."""
    return {
        renamed(key): (value.double() + changes[key].double()).float() if key in changes else value
        for key, value in wan.items()
    }


def assert_weights(got: State, expected: State) -> None:
    assert got.keys() >= expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_every_spelling_adds_the_same_products(
    tmp_path: Path, wan: State, base: Path, renamed: Rename, spelling: str, alpha: float | None
) -> None:
    key, leaves = SPELLINGS[spelling]
    pairs = products()
    state = spelt(pairs, key, leaves)
    if alpha is not None:
        state |= {f"{key(name)}.alpha": torch.tensor(alpha) for name in LAYERS}
    scale = 0.8 * (1.0 if alpha is None else alpha / RANK)
    path = saved(tmp_path, state)
    assert_weights(weights(base, (path, 0.8)), changed(wan, renamed, deltas(pairs, scale)))


@pytest.mark.parametrize("prefix", ["transformer.", "", "base_model.model."])
@pytest.mark.parametrize("name", ["change.safetensors", "change.pth"])
def test_names_of_diffusers(
    tmp_path: Path, wan: State, base: Path, renamed: Rename, prefix: str, name: str
) -> None:
    pairs = products()
    state = spelt(pairs, lambda layer: prefix + module_of(renamed, layer))
    path = saved(tmp_path, state, name)
    assert_weights(weights(base, (path, 1.0)), changed(wan, renamed, deltas(pairs, 1.0)))
    assert "diffusers' names" in read_lora(path).sentence


def test_a_forward_is_x_plus_s_b_a_x(tmp_path: Path, wan: State, base: Path) -> None:
    up, down = products()["blocks.0.ffn.0"]
    path = saved(tmp_path, spelt({"blocks.0.ffn.0": (up, down)}, comfy))
    plain = load_checkpoint(base).transformer.get_submodule("blocks.0.ffn.net.0.proj")
    merged = load_checkpoint(base, lora=[(path, -0.5)]).transformer
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    expected = plain(x).double() - 0.5 * (x.double() @ down.double().T) @ up.double().T
    got = merged.get_submodule("blocks.0.ffn.net.0.proj")(x)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5)


def test_whole_differences(tmp_path: Path, wan: State, base: Path, renamed: Rename) -> None:
    generator = torch.Generator().manual_seed(3)
    keys = {
        "head.head.diff": "head.head.weight",
        "head.head.diff_b": "head.head.bias",
        # a bias without its weight
        "time_projection.1.diff_b": "time_projection.1.bias",
        "blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
        "blocks.1.self_attn.norm_k.diff": "blocks.1.self_attn.norm_k.weight",
        "blocks.1.diff_m": "blocks.1.modulation",
        "blocks.2.modulation.diff": "blocks.2.modulation",
        "head.diff_m": "head.modulation",
        "patch_embedding.diff": "patch_embedding.weight",
    }
    state = {
        comfy(key): torch.randn(wan[name].shape, generator=generator) for key, name in keys.items()
    }
    changes = {name: 2.0 * state[comfy(key)] for key, name in keys.items()}
    # changes of norms that this transformer does not have, which do nothing
    state |= {comfy(f"blocks.0.{n}.diff"): torch.zeros(128) for n in ("norm1", "norm2")}
    state[comfy("blocks.0.cross_attn.norm_k_img.diff")] = torch.zeros(128)
    path = saved(tmp_path, state)
    assert len(read_lora(path).dropped) == 3
    assert_weights(weights(base, (path, 2.0)), changed(wan, renamed, changes))


def test_a_product_of_a_convolution(
    tmp_path: Path, wan: State, base: Path, renamed: Rename
) -> None:
    up, down = torch.randn(128, RANK, 1, 1, 1), torch.randn(RANK, 4, 1, 2, 2)
    path = saved(tmp_path, spelt({"patch_embedding": (up, down)}, comfy) | spelt(products(), comfy))
    delta = torch.einsum("orxyz,rcfhw->ocfhw", up.double(), down.double())
    got = weights(base, (path, 1.0))["patch_embedding.weight"]
    expected = (wan["patch_embedding.weight"].double() + delta).float()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=2e-6)


def test_several_add_up_and_the_order_of_loading_is_float32(
    tmp_path: Path, wan: State, base: Path, renamed: Rename
) -> None:
    first, second = products(1), products(2)
    one = saved(tmp_path, spelt(first, comfy), "one.safetensors")
    halves = {key: value.bfloat16() for key, value in spelt(second, kohya).items()}
    two = saved(tmp_path, halves, "two.safetensors")
    changes = {
        f"{name}.weight": 0.5 * (first[name][0].double() @ first[name][1].double())
        - 0.25 * (second[name][0].bfloat16().double() @ second[name][1].bfloat16().double())
        for name in LAYERS
    }
    expected = changed(wan, renamed, changes)
    assert_weights(weights(base, (one, 0.5), (two, -0.25)), expected)
    # rounded once, after the sum
    low = weights(base, (one, 0.5), (two, -0.25), dtype=torch.bfloat16)
    name = renamed("blocks.0.self_attn.q.weight")
    error = (low[name].float() - expected[name]).abs()
    assert (error <= expected[name].abs() * 2**-8 + 1e-5).all()


def test_as_peft_merges_it(tmp_path: Path, wan: State, base: Path, renamed: Rename) -> None:
    peft = pytest.importorskip("peft", reason="peft is one of the development tools")
    model = load_checkpoint(base).transformer
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=6,
        target_modules=["to_q", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "proj_out"],
        alpha_pattern={"ffn.net.2": 10},
        rank_pattern={"to_q": 2},
        use_rslora=True,
        init_lora_weights=False,
    )
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, config)
    folder = tmp_path / "adapter"
    wrapped.save_pretrained(str(folder))
    expected = dict(wrapped.merge_and_unload().named_parameters())
    got = weights(base, (folder, 1.0))
    plain = weights(base)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value.detach(), rtol=1e-5, atol=1e-5, msg=name)
    assert sum(not torch.equal(got[name], plain[name]) for name in got) == 3 * 6 + 1


def test_from_a_hub_with_its_settings(
    hub: SmallHub, wan: State, base: Path, renamed: Rename
) -> None:
    """What PEFT wrote beside the file says how its products are scaled: both are fetched."""
    pairs, folder = products(), hub.root / "someone" / "style"
    folder.mkdir(parents=True)
    saved(
        folder, spelt(pairs, lambda name: f"base_model.model.{name}"), "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 1}))
    (folder / "README.md").write_text("a card")
    expected = changed(wan, renamed, deltas(pairs, 0.8 / RANK))
    for text in ("someone/style:0.8", "someone/style:adapter_model.safetensors:0.8"):
        name, strength = lora_pair(text)
        assert_weights(weights(base, (Path(name), strength)), expected)
    with pytest.raises(CheckpointError, match="someone/other"):
        find_lora("someone/other")


def test_the_scale_of_diffusers_headers(
    tmp_path: Path, wan: State, base: Path, renamed: Rename
) -> None:
    pairs = products()
    state = spelt(pairs, lambda layer: f"transformer.{module_of(renamed, layer)}")
    words = json.dumps({"transformer.lora_alpha": 2, "transformer.r": RANK})
    path = saved(tmp_path, state, lora_adapter_metadata=words)
    assert_weights(weights(base, (path, 1.0)), changed(wan, renamed, deltas(pairs, 0.5)))


def attention_of(width: int, blocks: int = 1) -> State:
    state = {}
    for block in range(blocks):
        module = comfy(f"blocks.{block}.self_attn.q")
        state[f"{module}.lora_A.weight"] = torch.ones(RANK, width)
        state[f"{module}.lora_B.weight"] = torch.ones(width, RANK)
    return state


Q = comfy("blocks.0.self_attn.q")
REFUSED: dict[str, tuple[State, str]] = {
    "a wider base": (
        attention_of(256),
        r"LoRA for a transformer of 1 blocks of 256 channels, and wan.safetensors has 3 of 128",
    ),
    "a deeper base": (attention_of(128, 4), "of 4 blocks of 128 channels, and .* has 3 of 128"),
    "other hidden rows": (
        attention_of(128)
        | spelt({"blocks.0.ffn.0": (torch.ones(64, 2), torch.ones(2, 128))}, comfy),
        r"changes 1 parameters that do not fit, blocks.0.ffn.net.0.proj.weight by \[64, 2\] x "
        r"\[2, 128\], which wan.safetensors has as \[96, 128\]",
    ),
    "cameras": (
        attention_of(128) | {comfy("blocks.0.cam_encoder.diff_b"): torch.ones(128)},
        r"blocks.0.cam_encoder.bias by \[128\], which wan.safetensors has not",
    ),
    "image to video": (
        attention_of(128)
        | spelt({"blocks.0.cross_attn.k_img": (torch.ones(128, 2), torch.ones(2, 128))}, comfy),
        r"2 keys .*\(an image-to-video model's\): .*cross_attn.k_img.lora_A.weight",
    ),
    "a norm that is none": (
        attention_of(128) | {comfy("blocks.0.cross_attn.norm_k_img.diff"): torch.ones(128)},
        "1 keys .*norm_k_img.diff; expected a LoRA of one alone",
    ),
    "a text encoder": (
        attention_of(128) | {"lora_te_layers_0_q.lora_down.weight": torch.ones(2, 8)},
        "1 keys .*lora_te_layers_0_q.lora_down.weight",
    ),
    "DoRA": (
        attention_of(128) | {f"{Q}.dora_scale": torch.ones(128, 1)},
        "is a DoRA, .*as --check",
    ),
    "PEFT's DoRA": (
        attention_of(128) | {f"{Q}.lora_magnitude_vector": torch.ones(128)},
        "is a DoRA, which rescales",
    ),
    "LoHa": ({f"{kohya('blocks.0.ffn.0')}.hada_w1_a": torch.ones(4, 4)}, "is a LoHa"),
    "LoKr": ({f"{kohya('blocks.0.ffn.0')}.lokr_w1": torch.ones(4, 4)}, "is a LoKr"),
    "another model": (
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, 8)},
        "is a LoRA of another model than Wan",
    ),
    "half of a product": ({f"{Q}.lora_A.weight": torch.ones(4, 128)}, "the other is missing"),
    "other ranks": (
        {f"{Q}.lora_A.weight": torch.ones(4, 128), f"{Q}.lora_B.weight": torch.ones(128, 3)},
        "no product",
    ),
    "an alpha of none": ({f"{Q}.alpha": torch.tensor(4.0)}, "no product that it scales"),
    "no number as alpha": (
        attention_of(128) | {f"{Q}.alpha": torch.tensor(float("nan"))},
        "no finite number to scale",
    ),
    "not finite": (
        attention_of(128) | {f"{Q}.lora_A.weight": torch.full((RANK, 128), float("inf"))},
        r"1 tensor has numbers that are not finite: .*lora_A.weight",
    ),
    "integers": (
        attention_of(128) | {f"{Q}.lora_A.weight": torch.ones(RANK, 128, dtype=torch.int8)},
        "as int8; expected floating-point",
    ),
    "two adapters": (
        attention_of(128) | {f"{Q}.lora_A.other.weight": torch.ones(RANK, 128)},
        "both change 'blocks.0.attn1.to_q.weight'; expected one adapter",
    ),
    "a VAE": ({"decoder.middle.0.residual.0.gamma": torch.ones(2)}, "is a Wan VAE"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(tmp_path: Path, base: Path, what: str) -> None:
    state, message = REFUSED[what]
    path = saved(tmp_path, state)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_checkpoint(base, lora=[(path, 1.0)])
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_one_expert_of_two(tmp_path: Path, base: Path) -> None:
    path = saved(tmp_path, attention_of(128), "wan2.2_t2v_high_noise_lora.safetensors")
    with pytest.raises(CheckpointError, match=r"one of the two LoRAs of Wan2\.2 A14B's experts"):
        load_checkpoint(base, lora=[(path, 1.0)])


def test_each_is_given_in_the_others_place(tmp_path: Path, base: Path) -> None:
    path = saved(tmp_path, attention_of(128))
    with pytest.raises(CheckpointError, match="give it as --lora, and its base as --checkpoint"):
        load_checkpoint(path)
    with pytest.raises(
        CheckpointError, match="transformer's weights and no change to them: give it"
    ):
        load_checkpoint(base, lora=[(base, 1.0)])
    with pytest.raises(CheckpointError, match="no LoRA at 'nowhere'"):
        load_checkpoint(base, lora=[("nowhere", 1.0)])


def test_weights_are_told_apart_by_file_and_strength(tmp_path: Path, base: Path) -> None:
    one = saved(tmp_path, spelt(products(1), comfy), "one.safetensors")
    other = saved(tmp_path, spelt(products(2), comfy), "other.safetensors")
    pairs = [(), ((one, 1.0),), ((one, 0.5),), ((other, 1.0),), ((one, 1.0), (other, 1.0))]
    names = [load_checkpoint(base, lora=lora).name for lora in pairs]
    assert len(set(names)) == len(names) and names[0] == "wan"
    assert names[1].startswith("wan+one:1@")
    # another content under the same name is another one
    one.unlink()
    saved(tmp_path, spelt(products(3), comfy), "one.safetensors")
    assert load_checkpoint(base, lora=[(one, 1.0)]).name not in names


def test_the_report_and_inspect(tmp_path: Path, base: Path) -> None:
    state = spelt(products(), comfy) | {comfy("head.head.diff_b"): torch.ones(16)}
    path = saved(tmp_path, state)
    report = load_checkpoint(base, lora=[(path, 0.5)]).report
    words = "7 products of rank 4 and 1 whole differences"
    assert f"merged {path} at strength 0.5: {words}" in report.lines()
    lora = inspect_lora(path)
    assert lora is not None
    text, problem = render_lora(lora, deep=True)
    assert problem is None and text.splitlines()[0] == (
        f"{path} is a LoRA under Wan's own names: {words}, for a Wan transformer of 3 blocks of "
        "128 channels; give it as --lora with its base as --checkpoint"
    )
    assert "15 tensors, all finite" in text
    assert inspect_lora(base) is None
    saved(tmp_path, REFUSED["image to video"][0], "image.safetensors")
    image = inspect_lora(tmp_path / "image.safetensors")
    assert image is not None
    text, problem = render_lora(image)
    assert problem is not None and "loads        no: " in text


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("owner/name:file.safetensors:-1", ("owner/name:file.safetensors", -1.0)),
        ("owner/name:file", ("owner/name:file", 1.0)),
        (":0.5", (":0.5", 1.0)),
    ],
)
def test_a_file_and_its_strength(text: str, pair: tuple[str, float]) -> None:
    assert lora_pair(text) == pair


def test_a_file_whose_name_ends_like_a_strength(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:0.5").touch()
    assert lora_pair("a:0.5") == ("a:0.5", 1.0)


def test_a_folder_of_several(tmp_path: Path) -> None:
    saved(tmp_path, attention_of(8), "a.safetensors")
    assert find_lora(tmp_path).name == "a.safetensors"
    saved(tmp_path, attention_of(8), "b.safetensors")
    with pytest.raises(CheckpointError, match="2 weight files"):
        find_loras([(tmp_path, 1.0)])


@pytest.mark.parametrize(
    "lora", ["a", ("a",), (("a",),), (("a", "much"),), (("a", 1e9),), ((1, 1),)]
)
def test_what_is_no_setting(lora: object) -> None:
    with pytest.raises(RequestError, match=r"lora|LoRA"):
        EngineConfig(lora=lora)  # type: ignore[arg-type]
