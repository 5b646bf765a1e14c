"""A thin face of transformers' UMT5 encoder, prompt by prompt as Wan uses it.

Prompts are cleaned (HTML entities, whitespace), padded to `max_length`, and the embedding is zero
past the prompt: cross-attention has no mask and sees those zeros, as in training (BASE_MODELS 2.3).

S text tokens.
"""

from __future__ import annotations

import html
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mv2v_engine.errors import CheckpointError, RequestError
from mv2v_engine.finite import refuse_weights, require_finite, weight_fault
from mv2v_engine.progress import without_bars

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

_CACHED_PROMPTS = 16


def clean_prompt(prompt: str) -> str:
    """Undo HTML entities (twice, as Wan does) and collapse whitespace."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


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
        self.model.to(dtype=dtype).eval().requires_grad_(False)
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

    @torch.no_grad()
    def _embed(self, prompt: str) -> Tensor:
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
        if bool(mask.all()):
            self._warn_if_cut(prompt)
        embedding: Tensor = self.model(ids.to(self.device), mask.to(self.device)).last_hidden_state
        kept = mask[..., None].to(self.device, self.dtype)
        embedding = embedding.to(self.dtype) * kept
        dtype = str(self.dtype).removeprefix("torch.")
        require_finite(
            embedding,
            f"the text encoder's numbers for the prompt {shortened(prompt)!r}",
            f"run it in bfloat16 or float32 if {dtype} has no room for its numbers, or look for "
            "damaged weights with `run inspect PATH --deep`",
        )
        return embedding

    def _warn_if_cut(self, prompt: str) -> None:
        length = self.num_tokens(prompt)
        if length > self.max_length:
            warnings.warn(
                f"the prompt has {length} tokens, the model reads {self.max_length}; "
                "the rest is ignored: shorten it",
                stacklevel=5,
            )

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
    is_offloaded: bool = False,
    check_weights: bool = True,
) -> TextEncoder:
    """Load a transformers UMT5 folder and its tokenizer folder, without any network access.

    check_weights: refuse weights that are not finite as `dtype`. The other arguments are
    `TextEncoder`'s.

    Raises:
        CheckpointError: a folder is missing or incomplete, holds another kind of model, or weights
            that are not finite.
    """
    import transformers
    from safetensors import SafetensorError

    encoder = cast(Any, transformers.UMT5EncoderModel)
    text_path, tokenizer_path = Path(text_path), Path(tokenizer_path)
    for path, needed in ((text_path, "config.json"), (tokenizer_path, "tokenizer_config.json")):
        if not (path / needed).is_file():
            raise CheckpointError(
                f"{path} holds no {needed}; give a folder as transformers' save_pretrained "
                "writes it"
            )
    try:
        with without_bars():
            model, loading = encoder.from_pretrained(
                str(text_path), local_files_only=True, dtype=dtype, output_loading_info=True
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(tokenizer_path), local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"cannot load the text encoder from {text_path} and {tokenizer_path}: {reason}; "
            "give whole transformers folders of UMT5 and its tokenizer"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{text_path} lacks {len(missing)} tensors of its config, first {missing[0]}; "
            "give the complete folder of a UMT5 encoder"
        )
    if check_weights:
        found = (weight_fault(name, weight) for name, weight in model.named_parameters())
        refuse_weights(text_path, [fault for fault in found if fault is not None])
    return TextEncoder(model, tokenizer, max_length, device, dtype, is_offloaded=is_offloaded)
