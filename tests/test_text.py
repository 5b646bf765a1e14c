"""Prompts become padded, zero-tailed embeddings; long ones are cut aloud; folders are checked."""

from __future__ import annotations

import html
import json
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from mv2v_engine import text
from mv2v_engine.engine.budget import module_bytes
from mv2v_engine.errors import CheckpointError, RequestError
from mv2v_engine.models.quantized import QuantizedLinear
from mv2v_engine.shapes import TextShape
from mv2v_engine.text import TextEncoder, clean_prompt, load_text_encoder

CPU = torch.device("cpu")
WORDS = ["a", "red", "ball", "rolls", "over", "the", "floor", "&"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_model(vocab_size: int = 16) -> UMT5EncoderModel:
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=vocab_size, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return UMT5EncoderModel(config).eval()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    tiny_model().save_pretrained(tmp_path / "text_encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "text_encoder", tmp_path / "tokenizer"


def load(folders: tuple[Path, Path], max_length: int = 12) -> TextEncoder:
    return load_text_encoder(*folders, max_length=max_length, device=CPU, dtype=torch.float32)


@torch.no_grad()
def test_embedding_is_umt5s_and_zero_past_the_prompt(folders: tuple[Path, Path]) -> None:
    encoder = load(folders)
    embedding = encoder.encode("a red ball")
    assert embedding.shape == (1, 12, 16) and encoder.dim == 16
    ids = torch.tensor([[3, 4, 5, 1]])  # three words and the end
    expected = tiny_model()(ids).last_hidden_state
    torch.testing.assert_close(embedding[:, :4], expected, atol=1e-5, rtol=1e-5)
    assert not embedding[:, 4:].any()
    assert embedding[:, :4].abs().min() > 0


def test_empty_prompt_keeps_its_end_token(folders: tuple[Path, Path]) -> None:
    embedding = load(folders).encode("")
    assert embedding[:, 0].any() and not embedding[:, 1:].any()


def test_prompts_are_cleaned_as_wan_does(folders: tuple[Path, Path]) -> None:
    assert clean_prompt("  a red\n\t ball &amp;amp; floor ") == "a red ball & floor"
    encoder = load(folders)
    assert encoder.encode(" a  red\nball ") is encoder.encode("a red ball")


CURLY = "a \u201cred\u201d ball\u2019s floor"


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        (CURLY, 'a "red" ball\'s floor'),
        ("a cafÃ© floor", "a café floor"),
        ("a \ufb02oor &amp;amp; a  ball", "a floor & a ball"),
    ],
)
def test_ftfy_mends_prompts_as_in_the_originals(prompt: str, cleaned: str) -> None:
    ftfy = pytest.importorskip("ftfy", reason="the extra `text` is not installed")
    assert clean_prompt(prompt) == cleaned == " ".join(html.unescape(ftfy.fix_text(prompt)).split())


def test_it_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_mender", lambda: lambda prompt: prompt.replace("x", "&lt;  a"))
    assert clean_prompt(" x ") == "< a"


def test_without_ftfy_what_is_left_is_said(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_mender", lambda: None)
    assert clean_prompt(CURLY) == CURLY
    encoder = load(folders)
    for prompt in (CURLY, "a cafÃ© floor"):
        with pytest.warns(UserWarning, match=r"curly quotes or broken.*pip install ftfy, or type"):
            encoder.encode(prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Wan's own negative prompt among them
        for prompt in ("a red ball", "a café", "色调艳丽\uff0c过曝"):
            encoder.encode(prompt)


def test_a_prompt_is_embedded_once(folders: tuple[Path, Path]) -> None:
    encoder = load(folders)
    calls: list[int] = []
    encoder.model.register_forward_hook(lambda *_: calls.append(1))
    first = encoder.encode("a red ball")
    encoder.encode("the floor")
    assert encoder.encode("a red ball") is first
    assert len(calls) == 2
    for count in range(40):
        encoder.encode(f"ball {count}")
        encoder.encode("a red ball")
    before = len(calls)
    assert encoder.encode("a red ball") is first  # in use, so never dropped
    encoder.encode("the floor")  # long unused, so embedded again
    assert len(calls) == before + 1


def test_long_prompts_are_cut_with_a_warning(folders: tuple[Path, Path]) -> None:
    encoder = load(folders, max_length=6)
    with pytest.warns(UserWarning, match=r"the prompt has 8 tokens, the model reads 6"):
        cut = encoder.encode("a red ball rolls over the floor")
    assert cut.shape == (1, 6, 16) and bool(cut.any(-1).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = encoder.encode("a red ball rolls over")  # exactly six with its end
    assert bool(full.any(-1).all())
    encoder.require_whole("a red  ball rolls &amp;amp;")
    assert encoder.num_tokens("a red  ball rolls &amp;amp;") == 6
    with pytest.raises(RequestError, match=r"8 tokens, the model reads 6; shorten it"):
        encoder.require_whole("a red ball rolls over the floor")


def test_dtype_is_the_one_asked_for(folders: tuple[Path, Path]) -> None:
    encoder = load_text_encoder(*folders, max_length=8, device=CPU, dtype=torch.bfloat16)
    embedding = encoder.encode("a red ball")
    assert embedding.dtype == torch.bfloat16 and not embedding[:, 4:].any()
    exact = load(folders, 8).encode("a red ball")
    assert 0 < (embedding.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_unusable_folders(folders: tuple[Path, Path], tmp_path: Path) -> None:
    text, tokenizer = folders
    with pytest.raises(CheckpointError, match=r"none holds no config.json"):
        load((tmp_path / "none", tokenizer))
    with pytest.raises(CheckpointError, match=r"text_encoder holds no tokenizer_config.json"):
        load((text, text))
    weights = text / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot load the text encoder"):
        load(folders)
    weights.write_bytes(whole[:-200])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        load(folders)
    weights.write_bytes(whole)
    config = json.loads((text / "config.json").read_text())
    (text / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors of its config"):
        load(folders)
    (text / "config.json").write_text(json.dumps({**config, "d_ff": 64}))
    with pytest.raises(CheckpointError, match="cannot load the text encoder"):
        load(folders)


def test_offloaded_weights_travel_once_and_say_the_same(folders: tuple[Path, Path]) -> None:
    """The device is this CPU's memory too, but a copy of the weights all the same."""
    resident = load(folders)
    encoder = load_text_encoder(
        *folders, max_length=12, device=CPU, dtype=torch.float32, is_offloaded=True
    )
    home = {name: weight.data_ptr() for name, weight in encoder.model.named_parameters()}
    used: list[dict[str, int]] = []
    copies: list[weakref.ref[torch.UntypedStorage]] = []

    def look(model: UMT5EncoderModel, *_: object) -> None:
        used.append({name: weight.data_ptr() for name, weight in model.named_parameters()})
        copies.extend(weakref.ref(w.untyped_storage()) for w in model.parameters())

    encoder.model.register_forward_hook(look)
    prompts = ["a red ball", "", "a red ball"]
    embeddings = encoder.encode_all(prompts)
    assert embeddings[0] is embeddings[2]
    for prompt, embedding in zip(prompts, embeddings, strict=True):
        assert torch.equal(embedding, resident.encode(prompt))
    # two prompts, one journey; afterwards the copies are gone
    assert len(used) == 2 and used[0] == used[1]
    assert not set(used[0].values()) & set(home.values())
    assert copies and not any(copy() for copy in copies)
    assert home == {name: w.data_ptr() for name, w in encoder.model.named_parameters()}
    encoder.encode_all(prompts)
    assert len(used) == 2  # kept prompts need no weights


def test_weights_come_home_after_a_failure(folders: tuple[Path, Path]) -> None:
    encoder = load(folders)
    encoder.offload(True)
    home = [weight.data_ptr() for weight in encoder.model.parameters()]
    handle = encoder.model.register_forward_pre_hook(lambda *_: [][0])
    with pytest.raises(IndexError):
        encoder.encode("a ball")
    handle.remove()
    assert home == [weight.data_ptr() for weight in encoder.model.parameters()]
    assert torch.equal(encoder.encode("a ball"), load(folders).encode("a ball"))


def test_tokenizer_must_belong_to_the_encoder() -> None:
    with pytest.raises(CheckpointError, match=r"11 tokens, the text encoder knows 8"):
        TextEncoder(tiny_model(8), tiny_tokenizer(), 8, CPU, torch.float32)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(CheckpointError, match="no padding token"):
        TextEncoder(tiny_model(), tokenizer, 8, CPU, torch.float32)


def original_t5_name(name: str) -> str:
    """transformers' UMT5 names as Wan's own file has them."""
    for theirs, ours in (
        ("shared.weight", "token_embedding.weight"),
        ("encoder.final_layer_norm", "norm"),
        ("encoder.block.", "blocks."),
        ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
        ("layer.0.SelfAttention.", "attn."),
        ("layer.0.layer_norm", "norm1"),
        ("layer.1.layer_norm", "norm2"),
        ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
        ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
        ("layer.1.DenseReluDense.wo", "ffn.fc2"),
    ):
        name = name.replace(theirs, ours)
    return name


def single_file(path: Path, kind: str) -> Path:
    state = dict(tiny_model().named_parameters())
    if kind == "wan":
        torch.save({original_t5_name(k): v.data for k, v in state.items()}, path)
    else:
        prefix = "text_encoders.umt5xxl.transformer." if kind == "all in one" else ""
        state = {prefix + key: value.data for key, value in state.items()}
        save_file(state | {"spiece_model": torch.zeros(3, dtype=torch.uint8)}, path)
    return path


@pytest.mark.parametrize("kind", ["wan", "comfyui", "all in one"])
def test_single_files_say_what_the_folder_says(
    folders: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    path = single_file(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth", kind)
    expected = load(folders).encode("a red ball")
    assert torch.equal(load((path, folders[1])).encode("a red ball"), expected)
    half = load_text_encoder(path, folders[1], max_length=12, device=CPU, dtype=torch.bfloat16)
    assert half.model.shared.weight.dtype == torch.bfloat16


def test_a_scaled_float8_file_is_its_products(folders: tuple[Path, Path], tmp_path: Path) -> None:
    state = {name: weight.data for name, weight in tiny_model().named_parameters()}
    key = "encoder.block.1.layer.1.DenseReluDense.wo"
    scale = state[f"{key}.weight"].abs().max() / 448
    bits = (state[f"{key}.weight"] / scale).to(torch.float8_e4m3fn)
    mark = torch.zeros(0, dtype=torch.float8_e4m3fn)
    scaled = {f"{key}.weight": bits, f"{key}.scale_weight": scale, "scaled_fp8": mark}
    save_file(state | scaled, tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    loaded = load((tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", folders[1]))
    weight = loaded.model.encoder.block[1].layer[1].DenseReluDense.wo.weight
    assert torch.equal(weight, bits.float() * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_layers_of_eight_bits(folders: tuple[Path, Path], kind: Any, dtype: torch.dtype) -> None:
    """Those of the blocks; what they make is near, of the dtype asked for, and comes home."""
    given: dict[str, Any] = {"max_length": 12, "device": CPU, "dtype": dtype}
    whole = load_text_encoder(*folders, **given)
    small = load_text_encoder(*folders, **given, quantize=kind)
    layers = [m for m in small.model.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == 7 * 2 and all(layer.scale.dtype == torch.float32 for layer in layers)
    assert all(layer.stored.itemsize == 1 and layer.weight.dtype == dtype for layer in layers)
    assert small.model.shared.weight.dtype == dtype
    expected, found = (encoder.encode("a red ball").float() for encoder in (whole, small))
    error = (found - expected).norm() / expected.norm()
    assert 1e-4 < float(error) < 0.1
    shape = TextShape(vocab_size=16, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    saved = module_bytes(whole.model) - module_bytes(small.model)
    assert saved == shape.quantizable_bytes(dtype.itemsize)
    small.offload(True)
    assert torch.equal(small.encode("a red ball").float(), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_float8_stays_in_eight_bits(
    folders: tuple[Path, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    """The same bits as of the file's products, in half the bytes."""
    state = {name: weight.data for name, weight in tiny_model().named_parameters()}
    scaled = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name in list(state):
        if "layer_norm" not in name and "shared" not in name and "bias" not in name:
            scale = state[name].abs().max() / 448
            state[name] = (state[name] / scale).to(torch.float8_e4m3fn)
            scaled[name.replace(".weight", ".scale_weight")] = scale
    path = tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    save_file(state | scaled, path)
    given: dict[str, Any] = {"max_length": 12, "device": CPU, "dtype": dtype}
    whole = load_text_encoder(path, folders[1], **given)
    small = load_text_encoder(path, folders[1], **given, quantize="fp8")
    layer = small.model.encoder.block[1].layer[1].DenseReluDense.wo
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    assert isinstance(layer, QuantizedLinear)
    assert torch.equal(layer.stored.float(), state[name].float())
    assert torch.equal(small.encode("a red ball"), whole.encode("a red ball"))
    again = load_text_encoder(path, folders[1], **given, quantize="int8")
    assert not torch.equal(again.encode("a red ball"), whole.encode("a red ball"))


def test_a_quantiser_that_is_not_installed(folders: tuple[Path, Path]) -> None:
    path = folders[0] / "config.json"
    said = {"quantization_config": {"quant_method": "aqlm"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    with pytest.raises(CheckpointError, match=r"cannot load the text encoder .*(?i:aqlm)"):
        load(folders)


def test_a_folder_of_scaled_float8_is_refused(folders: tuple[Path, Path]) -> None:
    path = folders[0] / "model.safetensors"
    state, key = load_file(path), "encoder.block.1.layer.1.DenseReluDense.wo"
    state[f"{key}.weight"] = state[f"{key}.weight"].to(torch.float8_e4m3fn)
    save_file(state | {f"{key}.scale_weight": torch.tensor(2.0)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"float8 weights with scales, which trans"):
        load(folders)


def test_unusable_single_files(folders: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "umt5.safetensors"
    state = {name: weight.data for name, weight in tiny_model().named_parameters()}
    positions = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    norm, wo = "encoder.final_layer_norm.weight", "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    for change, message in (
        ({norm: None}, f"lacks 1 tensors of its config, first {norm}"),
        ({wo: torch.ones(16, 16)}, r"wo.weight has shape \[16, 16\], expected \[16, 32\]"),
        ({"shared.weight": None}, "is no UMT5 encoder: it lacks shared.weight"),
        ({positions: None}, r"is a T5 encoder .*give UMT5's"),
        ({wo: torch.full((16, 32), torch.nan)}, "not finite"),
        ({wo: torch.ones(16, 32, dtype=torch.int8)}, "stores .*wo.weight as int8; expected float"),
    ):
        changed = {k: v for k, v in (state | change).items() if v is not None}
        save_file(changed, path)
        with pytest.raises(CheckpointError, match=message):
            load((path, folders[1]))
