"""What a file is that is no checkpoint of ours, in one sentence: by its bytes or by its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from mv2v_engine.checkpoints.names import bare, part_prefixes

# first bytes, where they stand, what they are
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"GIF8", "a GIF image"),
    (8, b"WEBP", "a WebP image"),
    (0, b"BM", "a BMP image"),
    (4, b"ftyp", "a video (MP4 or QuickTime) or an image of that kind (HEIC, AVIF)"),
    (0, b"\x1a\x45\xdf\xa3", "a video (Matroska or WebM)"),
    (8, b"AVI ", "a video (AVI)"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x89HDF", "an HDF5 file, as Keras saves weights"),
    (0, b"\x1f\x8b", "a gzip archive: unpack it"),
    (0, b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (0, b"Rar!", "a RAR archive: unpack it"),
    (0, b"%PDF", "a PDF document"),
)
_LORA = re.compile(
    r"\.(lora_(A|B|down|up|a|b)|hada_w[12]_[ab]|lokr_w[12]|diff|diff_b)(\.|$)|^lora_(unet|te)"
)
# what quantisers leave of a weight, but for the plain float8 that is read
_QUANTISED = (
    (r"\.(nested_)?(absmax|quant_map)$|\.quant_state\.|\.SCB$", "bitsandbytes keeps them"),
    (r"\.weight\._(data|scale|shift|packed)$", "optimum-quanto keeps them"),
    (r"\.(qweight|qzeros|wscales)$", "GPTQ, AWQ or SVDQuant keep them"),
    (r"\.weight_packed$", "compressed-tensors keeps them"),
)
_COMPONENT = "a component and no transformer: give components=FOLDER, which it lies in"
# what a key of one kind of model looks like, and no other's; the first that fits
_MODELS: tuple[tuple[str, str], ...] = (
    (r"_flat_param$", "one rank's part of a sharded model (FSDP): save the whole state dict"),
    (r"(^|\.)exp_avg(_sq)?$", "an optimizer's state"),
    (r"(^|\.)(input_blocks|output_blocks)\.\d+\.", "a Stable Diffusion checkpoint (a U-Net)"),
    (r"^down_blocks\.\d+\..*transformer_blocks\.", "a Stable Diffusion U-Net of diffusers"),
    (r"(^|\.)individual_token_refiner\.", "a HunyuanVideo transformer"),
    (r"(^|\.)double_blocks\.0\.", "a FLUX transformer"),
    (r"(^|\.)joint_blocks\.0\.", "a Stable Diffusion 3 transformer"),
    (r"(^|\.)patchify_proj\.", "an LTX-Video transformer"),
    (r"(^|\.)transformer_blocks\.0\.", "another model's transformer, not Wan's"),
    (r"(^|\.)vision_model\.|(^|\.)visual\.", "a CLIP image encoder"),
    (r"(^|\.)text_model\.encoder\.", "a CLIP text encoder"),
    (r"(^|\.)layers\.0\.self_attn\.q_proj\.", "a language model"),
    (
        r"(^|\.)encoder\.layer\.0\.attention\.",
        "a feature encoder (as DINOv2), for descriptor=FOLDER",
    ),
    (r"(^|\.)decoder\.up\.0\.|(^|\.)decoder\.up_blocks\.0\.", "a VAE of another model than Wan"),
    (r"^decoder\.\d+\.(conv\.)?", "a tiny autoencoder (as TAEHV)"),
    (r"(^|\.)encoder\.(conv1|conv_in)\.", "a part of a VAE"),
)


def of_bytes(head: bytes) -> str | None:
    """What a file's first bytes say that it is; None if they are no known kind's."""
    for at, mark, what in _MAGIC:
        if head[at : at + len(mark)] == mark:
            return what
    try:
        decoded = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # more than a letter that the end cuts
            return None
        decoded = head[: error.start].decode("utf-8")
    text = " ".join(decoded.split())
    if not text or not text.isprintable():
        return None
    kind = "JSON" if text.startswith(("{", "[")) else "text"
    return f"{kind} that begins {text[:40]!r}"


def of_tensors(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What model a file's tensors are of, by key and shape; None if it is no known kind's."""
    keys = {bare(key): shape for key, shape in shapes.items()}
    if lora := lora_of(keys):
        return lora
    if prefixes := part_prefixes(keys, "vae"):
        channels = {
            shape[0]
            for name in ("conv2.weight", "post_quant_conv.weight")
            if (shape := keys.get(prefixes[0] + name))
        }
        of = {16: "Wan2.1's VAE", 48: "Wan2.2's VAE"}.get(max(channels, default=0), "a Wan VAE")
        return f"{of}, {_COMPONENT}"
    if part_prefixes(keys, "text_encoder"):
        kind = "UMT5" if has_umt5(keys) else "T5"
        return f"a text encoder ({kind}), {_COMPONENT}"
    for pattern, what in _MODELS:
        if any(re.search(pattern, key) for key in keys):
            return what
    return None


def has_umt5(keys: Iterable[str]) -> bool:
    """Whether keys are of a UMT5, whose blocks all have their own positions, T5's the first."""
    own = r"block\.1\.layer\.0\.SelfAttention\.relative|blocks\.1\.pos_embedding"
    return any(re.search(own, key) for key in keys)


def quantised_by(keys: Iterable[str]) -> str | None:
    """Whose form the weights have, of quantisers that are not read; None if it is no such form."""
    for key in keys:
        for pattern, whose in _QUANTISED:
            if re.search(pattern, key):
                return f"{whose} ({key})"
    return None


def lora_of(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The sentence of a LoRA's tensors; None if they are none."""
    own = [key for key in shapes if _LORA.search(key)]
    if not own:
        return None
    down = [shapes[key] for key in own if re.search(r"lora_(A|down|a)\b", key) and shapes[key]]
    rank = f" of rank {down[0][0]} for {len(down)} layers" if down else ""
    return (
        f"a LoRA{rank}, a change to a model's weights and no model: give it as --lora, and its "
        "base as --checkpoint"
    )
