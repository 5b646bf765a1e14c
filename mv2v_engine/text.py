"""A thin face of transformers' UMT5 encoder, prompt by prompt as Wan uses it.

Prompts are cleaned (broken Unicode, HTML entities, whitespace), padded to `max_length`, and the
embedding is zero past the prompt: cross-attention has no mask and sees those zeros, as in training
(BASE_MODELS 2.3).

S text tokens.
"""

from __future__ import annotations

import functools
import html
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mv2v_engine.checkpoints.components import part_of
from mv2v_engine.checkpoints.identify import has_umt5
from mv2v_engine.checkpoints.weights import WeightReader, read_header, with_scales
from mv2v_engine.config import QuantizeName
from mv2v_engine.defaults import inference, torch_defaults, without_memory
from mv2v_engine.errors import CheckpointError, RequestError
from mv2v_engine.finite import refuse_weights, require_finite, weight_fault
from mv2v_engine.models.quantized import QuantizedLinear
from mv2v_engine.progress import without_bars

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

_CACHED_PROMPTS = 16
# what transformers raises of folders that it cannot load: ImportError where a config asks for a
# quantiser or a tokenizer's library that is not installed
_UNLOADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError)
# Wan's own encoder file in transformers' words; its gate is the activated half
_ORIGINAL_NAMES = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_ORIGINAL_TOP = {
    "token_embedding.weight": "shared.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
}


# what ftfy changes and a tokenizer does not: curly quotes, and letters read in another encoding
_UNMENDED = re.compile("[\u0080-\u009f\u2018-\u201f]|[\u00c2-\u00f4][\u0080-\u00bf\u2013-\u20ac]")


def clean_prompt(prompt: str) -> str:
    """A prompt as Wan's own code hands it to its tokenizer.

    ftfy mends broken Unicode and makes quotes straight, HTML entities are undone twice, whitespace
    is folded. Without ftfy, which is optional, the first is left out.
    """
    mended = prompt if (mend := _mender()) is None else mend(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(mended))).strip()


@functools.cache
def _mender() -> Callable[[str], str] | None:
    """`ftfy.fix_text`, None where it is not installed."""
    try:
        import ftfy
    except ImportError:
        return None
    return cast("Callable[[str], str]", ftfy.fix_text)


def shortened(prompt: str) -> str:
    """The beginning of a prompt, for a message."""
    return prompt if len(prompt) <= 40 else f"{prompt[:37]}..."


class TextEncoder:
    """Prompts to embeddings, with the last few prompts kept.

    Args:
        model: the encoder, anywhere; its weights take `dtype`.
        tokenizer: any transformers tokenizer with a padding token.
        max_length: S, tokens that the transformer expects.
        device: where prompts are encoded and embeddings lie.
        is_offloaded: the weights stay on the host; a prompt that is not kept brings a copy to
            the device, which is gone when it is encoded. The same bits either way.
    """

    def __init__(
        self,
        model: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        is_offloaded: bool = False,
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise CheckpointError("the tokenizer has no padding token; use the one of UMT5")
        if len(tokenizer) > model.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {len(tokenizer)} tokens, the text encoder knows "
                f"{model.config.vocab_size}; use the tokenizer that belongs to it"
            )
        # transformers' models are only partly typed
        self.model = cast(Any, model)
        self.model.eval().requires_grad_(False)
        for module in self.model.modules():
            # what is made of eight bits has its dtype already
            if not isinstance(module, QuantizedLinear):
                for weight in module._parameters.values():
                    if weight is not None:
                        weight.data = weight.data.to(dtype)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.device = device
        self.dtype = dtype
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        # sessions of several threads share the weights, of which there may be one copy for a while
        self._lock = threading.RLock()
        self.offload(is_offloaded)

    def offload(self, is_offloaded: bool) -> None:
        """Let the weights live on the host, or on the device."""
        with self._lock:
            self.is_offloaded = is_offloaded
            self.model.to("cpu" if is_offloaded else self.device)

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return int(self.model.config.d_model)

    def encode(self, prompt: str) -> Tensor:
        """Embedding [1, S, dim] of a prompt, zero past its tokens; do not write into it.

        A prompt of more than `max_length` tokens is cut, with a warning.

        Raises:
            NotFiniteError: the embedding is not finite.
        """
        return self.encode_all([prompt])[0]

    def encode_all(self, prompts: Sequence[str]) -> list[Tensor]:
        """`encode` of several, for which offloaded weights travel once, and not for kept ones."""
        prompts = [clean_prompt(prompt) for prompt in prompts]
        with self._lock:
            found = {prompt: self._cache[prompt] for prompt in prompts if prompt in self._cache}
            if len(found) < len(set(prompts)):
                with self._on_device():
                    for prompt in prompts:
                        if prompt not in found:
                            found[prompt] = self._embed(prompt)
            for prompt in prompts:
                self._cache[prompt] = found[prompt]
                self._cache.move_to_end(prompt)
            while len(self._cache) > _CACHED_PROMPTS:
                self._cache.popitem(last=False)
        return [found[prompt] for prompt in prompts]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """The weights where prompts are encoded, for as long as the block runs."""
        if not self.is_offloaded:
            yield
            return
        homes = [(t, t.data) for t in (*self.model.parameters(), *self.model.buffers())]
        try:
            for tensor, home in homes:
                tensor.data = home.to(self.device, copy=True)
            yield
        finally:
            # the weights never change, so the copies need no way back
            for tensor, home in homes:
                tensor.data = home

    @inference
    def _embed(self, prompt: str) -> Tensor:
        if _mender() is None and _UNMENDED.search(prompt):
            warnings.warn(
                f"the prompt {shortened(prompt)!r} has curly quotes or broken Unicode, which the "
                "original code mends and this installation cannot: pip install ftfy, or type "
                "plain ones",
                stacklevel=4,
            )
        with torch_defaults():
            tokens = self.tokenizer(
                prompt,
                max_length=self.max_length,
                padding="max_length",
                truncation=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
        ids: Tensor = tokens["input_ids"]
        mask: Tensor = tokens["attention_mask"]
        if bool(mask.all()) and (length := self.num_tokens(prompt)) > self.max_length:
            warnings.warn(
                f"the prompt has {length} tokens, the model reads {self.max_length}; "
                "the rest is ignored: shorten it",
                stacklevel=4,
            )
        with torch_defaults():
            output = self.model(ids.to(self.device), mask.to(self.device))
        embedding: Tensor = output.last_hidden_state
        kept = mask[..., None].to(self.device, self.dtype)
        embedding = embedding.to(self.dtype) * kept
        dtype = str(self.dtype).removeprefix("torch.")
        require_finite(
            embedding,
            f"the text encoder's numbers for the prompt {shortened(prompt)!r}",
            f"use dtype=bfloat16 or float32 if {dtype} has no room for its numbers, or look for "
            "damaged weights with `run inspect PATH --deep`",
        )
        return embedding

    def num_tokens(self, prompt: str) -> int:
        """Tokens of a prompt, its end included, however many the model reads."""
        return len(self.tokenizer(clean_prompt(prompt), verbose=False)["input_ids"])

    def require_whole(self, prompt: str) -> None:
        """Refuse a prompt of which `encode` would read only the beginning.

        Raises:
            RequestError: it has more than `max_length` tokens.
        """
        length = self.num_tokens(prompt)
        if length > self.max_length:
            raise RequestError(
                f"the prompt has {length} tokens, the model reads {self.max_length}; shorten it"
            )


def load_text_encoder(
    text_path: Path | str,
    tokenizer_path: Path | str,
    *,
    max_length: int,
    device: torch.device,
    dtype: torch.dtype,
    quantize: QuantizeName | None = None,
    is_offloaded: bool = False,
    check_weights: bool = True,
) -> TextEncoder:
    """Load a UMT5 encoder and its tokenizer folder, without any network access.

    text_path: a transformers folder, or a single file: Wan's own, ComfyUI's, or one with other
    models in it. quantize: the blocks' linear weights in eight bits, with a scale a row; of fp8,
    those of a file that have scales stay as they are. check_weights: refuse weights that are not
    finite as `dtype`. The other arguments are `TextEncoder`'s.

    Raises:
        CheckpointError: a folder is missing or incomplete, holds another kind of model, or weights
            that are not finite.
    """
    import transformers

    text_path, tokenizer_path = Path(text_path), Path(tokenizer_path)
    if not (tokenizer_path / "tokenizer_config.json").is_file():
        raise CheckpointError(_no_folder(tokenizer_path, "tokenizer_config.json"))
    if text_path.is_file():
        model = _read_file(text_path, dtype, quantize)
    else:
        model = _read_folder(text_path, dtype)
    try:
        with without_bars(), torch_defaults():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(tokenizer_path), local_files_only=True
            )
    except _UNLOADABLE as error:
        raise CheckpointError(_unloadable(f"the tokenizer from {tokenizer_path}", error)) from error
    if check_weights:
        found = (weight_fault(name, weight) for name, weight in model.named_parameters())
        refuse_weights(text_path, [fault for fault in found if fault is not None])
    if quantize is not None:
        _quantize(model, quantize, dtype, {})
    return TextEncoder(model, tokenizer, max_length, device, dtype, is_offloaded=is_offloaded)


def _no_folder(path: Path, lacking: str) -> str:
    return (
        f"{path} holds no {lacking}; give a folder as transformers' save_pretrained writes it, as "
        "Wan's google/umt5-xxl/ is"
    )


def _unloadable(what: str, error: Exception) -> str:
    return (
        f"cannot load {what}: {str(error).splitlines()[0]}; give whole transformers folders of "
        "UMT5 and its tokenizer"
    )


def _read_folder(path: Path, dtype: torch.dtype) -> UMT5EncoderModel:
    import transformers
    from safetensors import SafetensorError

    if not (path / "config.json").is_file():
        raise CheckpointError(_no_folder(path, "config.json"))
    files = sorted(path.glob("*.safetensors"))
    stored = (info for file in files for info in with_scales(read_header(file)).values())
    if scaled := next((info for info in stored if info.scale is not None), None):
        raise CheckpointError(
            f"{scaled.file} holds float8 weights with scales, which transformers would leave out; "
            "give the file without a folder of its own, as text_encoders/ of ComfyUI's layout"
        )
    encoder = cast(Any, transformers.UMT5EncoderModel)
    try:
        with without_bars(), torch_defaults():
            model, loading = encoder.from_pretrained(
                str(path), local_files_only=True, dtype=dtype, output_loading_info=True
            )
    except (*_UNLOADABLE, SafetensorError) as error:
        raise CheckpointError(_unloadable(f"the text encoder from {path}", error)) from error
    _require_all(path, loading["missing_keys"])
    return cast("UMT5EncoderModel", model)


def _read_file(path: Path, dtype: torch.dtype, quantize: QuantizeName | None) -> UMT5EncoderModel:
    """The encoder in a single file, by Wan's names or transformers'; every size is in a shape.

    quantize: of fp8, weights that are so stay so.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    infos = {_renamed(name): info for name, info in part_of(path, "text_encoder").items()}
    first = "encoder.block.0.layer."
    sizes = (
        "shared.weight",
        f"{first}0.SelfAttention.q.weight",
        f"{first}0.SelfAttention.relative_attention_bias.weight",
        f"{first}1.DenseReluDense.wi_0.weight",
    )
    if absent := [name for name in sizes if name not in infos or len(infos[name].shape) != 2]:
        raise CheckpointError(
            f"{path} is no UMT5 encoder: it lacks {absent[0]}; give "
            "models_t5_umt5-xxl-enc-bf16.pth, umt5_xxl_fp16.safetensors or a transformers folder"
        )
    (vocabulary, width), (inner, _), (buckets, heads), (hidden, _) = (
        infos[name].shape for name in sizes
    )
    blocks = {name.split(".")[2] for name in infos if name.startswith("encoder.block.")}
    if len(blocks) > 1 and not has_umt5(infos):
        raise CheckpointError(
            f"{path} is a T5 encoder (positions in its first block alone), as other models have; "
            "give UMT5's, such as models_t5_umt5-xxl-enc-bf16.pth or umt5_xxl_fp16.safetensors"
        )
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner // heads,
        d_ff=hidden,
        num_layers=len(blocks),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
    )
    with without_memory():
        model = UMT5EncoderModel(config)
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    _require_all(path, expected.keys() - infos.keys())
    weights, kept = {}, dict[str, tuple[Tensor, Tensor]]()
    linears = _linears(model) if quantize == "fp8" else {}
    with WeightReader() as reader:
        for name, shape in expected.items():
            if infos[name].shape != shape:
                raise CheckpointError(
                    f"{path}: {infos[name].key} has shape {list(infos[name].shape)}, expected "
                    f"{list(shape)}; give the weights of one UMT5 encoder"
                )
            # a copy even when nothing changes: the file must not stay mapped
            module, info = name.removesuffix(".weight"), infos[name]
            if module in linears and info.scale is not None and info.dtype == torch.float8_e4m3fn:
                bits, scale = (part.clone() for part in reader.read_scaled(info))
                kept[module] = bits, scale
            else:
                weights[name] = reader.read(info).to(dtype, copy=True)
    model.load_state_dict(weights, strict=False, assign=True)
    if kept:
        _quantize(model, "fp8", dtype, kept)
    model.tie_weights()
    return model


def _linears(model: UMT5EncoderModel) -> dict[str, nn.Linear]:
    """The linear layers of its blocks that are whole, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, QuantizedLinear)
    }


@torch.no_grad()
def _quantize(
    model: UMT5EncoderModel,
    kind: QuantizeName,
    dtype: torch.dtype,
    kept: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Put layers of eight bits in the place of the blocks' linear ones, one after the other.

    dtype: of what they make. kept: numbers and scales of layers that a file has so.
    """
    for name, linear in _linears(model).items():
        layer = QuantizedLinear(linear.to(dtype), kind)
        if name in kept:
            layer.keep(*kept[name])
        else:
            layer.quantize(linear.weight)
        model.set_submodule(name, layer)


def _renamed(name: str) -> str:
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name):
        ours = _ORIGINAL_NAMES.get(match[2], match[2])
        return f"encoder.block.{match[1]}.{ours}.weight"
    return _ORIGINAL_TOP.get(name, name)


def _require_all(path: Path, missing: Iterable[str]) -> None:
    if names := sorted(missing):
        raise CheckpointError(
            f"{path} lacks {len(names)} tensors of its config, first {names[0]}; "
            "give the complete UMT5 encoder"
        )
