"""A small UMT5 encoder for the editing language, and its tokenizer.

`python -m mv2v_engine.training.text --out FOLDER` writes `text_encoder/` and `tokenizer/`, the same
bytes for the same seed; `mv2v_engine.text.load_text_encoder` reads them.

The weights are random and meant to stay so: what a prompt asks can be read from them linearly,
which is all that the transformer's text layers need. Attention's position biases are drawn wide:
cross-attention knows no word order, and "the red box blue" must not be "the blue box red".
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mv2v_engine.checkpoints.load import Checkpoint
from mv2v_engine.files import copy_file, save_json
from mv2v_engine.parser import Parser
from mv2v_engine.synthetic.instructions import all_prompts
from mv2v_engine.text import TextEncoder, load_text_encoder
from mv2v_engine.training.command import run_command

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TEXT_DIM = 64
TEXT_LEN = 16  # tokens of a prompt with its end; the longest prompt of the language has 10
VOCAB_SIZE = 192  # all words whole, and letters for the others

_POSITION_SCALE = 16.0  # the position biases at first, times UMT5's own

# UMT5's own numbers
_PAD, _EOS, _UNKNOWN = "<pad>", "</s>", "<unk>"
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"-&()"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs learnt on every prompt: known words are one token, others are spelt.

    A character outside of letters, digits and common signs is the unknown token. Case does not
    count, as in the prompts.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE(unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[_PAD, _EOS, _UNKNOWN],
        initial_alphabet=[*_LETTERS, "\u2581"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(all_prompts(), trainer)
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {_EOS}", special_tokens=[(_EOS, tokenizer.token_to_id(_EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_EOS, unk_token=_UNKNOWN
    )


def encoder_config() -> UMT5Config:
    """Two layers of width 64: about 0.1 million weights."""
    from transformers import UMT5Config

    return UMT5Config(
        vocab_size=VOCAB_SIZE,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=TEXT_LEN,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )


def build_encoder(seed: int = 0) -> UMT5EncoderModel:
    """The encoder with the random weights of a seed; the global generator is left as it was."""
    from transformers import UMT5EncoderModel

    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = cast(Any, UMT5EncoderModel(encoder_config())).eval()
    finally:
        torch.random.set_rng_state(state)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                parameter.mul_(_POSITION_SCALE)
    return cast("UMT5EncoderModel", model)


def write_text_encoder(out: Path, *, seed: int = 0) -> None:
    """Write `text_encoder/` (float16) and `tokenizer/` into a folder."""
    model = cast(Any, build_encoder(seed))
    cast(nn.Module, model).half()
    model.save_pretrained(out / "text_encoder")
    build_tokenizer().save_pretrained(out / "tokenizer")
    path = out / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 writes names that 4 does not know; both know this one
    config.pop("backend", None)
    save_json(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def read_text_encoder(folder: Path, max_length: int, device: torch.device) -> TextEncoder:
    """The encoder of a folder with text_encoder and tokenizer, in bfloat16 on a GPU.

    Raises:
        CheckpointError: a part is missing, or of another kind.
    """
    return load_text_encoder(
        folder / "text_encoder",
        folder / "tokenizer",
        max_length=max_length,
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )


def copy_text_parts(base: Checkpoint, out: Path) -> None:
    """A base's text encoder and tokenizer, where they are folders, into that of a model made of it.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    for part, path in (("text_encoder", base.text_path), ("tokenizer", base.tokenizer_path)):
        if path is not None and path.is_dir():
            shutil.copytree(path, out / part, copy_function=copy_file, dirs_exist_ok=True)


def trim_text(text: Tensor) -> Tensor:
    """Embeddings [K, S, dim] without the zeros past the longest prompt: [K, S', dim]."""
    used = text.abs().amax((0, 2)).nonzero()
    return text[:, : int(used[-1]) + 1] if len(used) else text[:, :1]


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args()
    write_text_encoder(args.out, seed=args.seed)


if __name__ == "__main__":
    run_command(main)
