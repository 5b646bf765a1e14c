"""The VAE, the text encoder and its tokenizer that a transformer needs, in every published layout.

| where            | VAE                      | text encoder                 | tokenizer        |
| diffusers folder | `vae/`                   | `text_encoder/`              | `tokenizer/`     |
| Wan's own folder | `Wan2.1_VAE.pth`         | `models_t5_umt5-xxl-enc*`    | `google/umt5-xxl`|
| ComfyUI's        | `vae/*.safetensors`      | `text_encoders/umt5_xxl_*`   | none of its own  |
| one file         | under a prefix           | under a prefix               | none             |

Models that read image tokens have an image encoder, too: `image_encoder/`, or Wan's own
`models_clip*`.

Files are told by their tensors; their names say only which are worth a look.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mv2v_engine.checkpoints.identify import has_umt5
from mv2v_engine.checkpoints.names import bare, part_prefixes
from mv2v_engine.checkpoints.weights import (
    WEIGHT_SUFFIXES,
    TensorInfo,
    read_header,
    with_scales,
)
from mv2v_engine.errors import CheckpointError

# weights that lie beside a transformer in original Wan folders
COMPANION = re.compile(r"(?i)(.*vae.*|models_(t5|clip).*|.*umt5.*)")
PARTS = ("vae", "text_encoder", "tokenizer")
_FOLDERS = {"vae": ("vae",), "text_encoder": ("text_encoder", "text_encoders", "clip")}
_IMAGE_FILE = re.compile(r"(?i)models_clip.*")
_TOKENIZERS = ("tokenizer", "google/umt5-xxl", "umt5-xxl", ".")
_EXPECTED = {
    "vae": "a VAE: vae/ with config.json, or a file such as Wan2.1_VAE.pth or "
    "wan_2.1_vae.safetensors",
    "text_encoder": "a text encoder: text_encoder/ with config.json, or a file such as "
    "models_t5_umt5-xxl-enc-bf16.pth or text_encoders/umt5_xxl_fp16.safetensors",
    "tokenizer": "a tokenizer: tokenizer/ or google/umt5-xxl/ with tokenizer_config.json",
}


@dataclass(frozen=True)
class Components:
    """Where components lie: folders as diffusers and transformers save them, or single files.

    vaes: all that were found, with their latent channels, 0 of a folder. is_asked: the user named
    this place; of one that nobody named, several of a kind are as good as none.
    """

    place: Path
    vaes: tuple[tuple[Path, int], ...]
    text_encoders: tuple[Path, ...]
    tokenizer: Path | None
    image_encoder: Path | None = None
    is_asked: bool = True

    def vae(self, channels: int) -> Path | None:
        """The VAE of so many latent channels if there is one, else any; None if there is none.

        Raises:
            CheckpointError: there are several at a place that the user named.
        """
        fitting = [path for path, found in self.vaes if found == channels]
        return self._only(fitting or [path for path, _ in self.vaes], "VAEs")

    @property
    def text_encoder(self) -> Path | None:
        """The text encoder, as for `vae`."""
        return self._only(list(self.text_encoders), "text encoders")

    def _only(self, paths: list[Path], what: str) -> Path | None:
        if len(paths) > 1 and self.is_asked:
            listed = ", ".join(path.name for path in paths)
            raise CheckpointError(
                f"{self.place} holds several {what} ({listed}); give a folder with the one that is "
                "meant"
            )
        return paths[0] if len(paths) == 1 else None

    def require_all(self, parts: Sequence[str] = PARTS) -> None:
        """Refuse a place where one of them is missing, of all three or of `parts`.

        Raises:
            CheckpointError: names it and what it is looked for as.
        """
        found = {
            "vae": self.vaes,
            "text_encoder": self.text_encoders,
            "tokenizer": self.tokenizer,
        }
        for part in parts:
            if not found[part]:
                listed = self.place.name
                if self.place.is_dir():
                    names = sorted(path.name for path in self.place.iterdir())
                    listed = ", ".join(names[:8]) or "nothing"
                raise CheckpointError(
                    f"{self.place} lacks {_EXPECTED[part]} (there: {listed}); give a folder with "
                    "all parts, of diffusers' layout, Wan's or ComfyUI's"
                )


def find_components(place: Path, *, is_asked: bool = True) -> Components:
    """What lies in a folder or file.

    is_asked: the user named this place, so what cannot be read there is an error.

    Raises:
        CheckpointError: there is no such place, or a file that is one by its name is damaged.
    """
    place = place.expanduser()
    if not place.exists():
        raise CheckpointError(
            f"{place} does not exist; expected a folder with a VAE, a text encoder and a tokenizer"
        )
    folder = place if place.is_dir() else place.parent
    vaes = [(path, _latent_channels(path)) for path in _found(place, "vae", is_asked)]
    encoders = _found(place, "text_encoder", is_asked)
    tokenizers = [folder / name for name in _TOKENIZERS]
    tokenizer = next((t for t in tokenizers if (t / "tokenizer_config.json").is_file()), None)
    if tokenizer is None and tokenizers[0].is_dir():
        tokenizer = tokenizers[0]  # its loader says what it lacks
    image = _image_encoder(folder)
    return Components(place, tuple(vaes), tuple(encoders), tokenizer, image, is_asked)


def _image_encoder(folder: Path) -> Path | None:
    """The image encoder's file or folder, found by name alone: its loader says what it lacks."""
    if (folder / "image_encoder" / "config.json").is_file():
        return folder / "image_encoder"
    files = [path for path in sorted(folder.iterdir()) if path.suffix in WEIGHT_SUFFIXES]
    return next((path for path in files if _IMAGE_FILE.fullmatch(path.name)), None)


def named_components(place: Path) -> tuple[Path, ...]:
    """The files whose tensors `find_components` looks at."""
    if place.is_file():
        return (place,)
    return tuple(
        path
        for part, (own, *_) in _FOLDERS.items()
        if not any(_describes(folder, part) for folder in (place / own, place))
        for path in _candidates(place, part)
    )


def part_of(path: Path, part: str) -> dict[str, TensorInfo]:
    """A component's tensors in a file, by the names that they have without any prefix.

    Empty if the file holds none.

    Raises:
        CheckpointError: the file cannot be read, or holds several.
    """
    tensors = with_scales(read_header(path))
    bares = {bare(key): info for key, info in tensors.items()}
    prefixes = part_prefixes(bares, part)
    if not prefixes:
        return {}
    if len(prefixes) > 1:
        listed = ", ".join(repr(prefix.rstrip(".")) for prefix in prefixes)
        raise CheckpointError(f"{path} holds several {part} models ({listed}); give one in a file")
    prefix = prefixes[0]
    return {n.removeprefix(prefix): info for n, info in bares.items() if n.startswith(prefix)}


def _found(place: Path, part: str, is_asked: bool) -> list[Path]:
    if place.is_file():
        return [place] if part_of(place, part) else []
    for folder in (place / _FOLDERS[part][0], place):
        if _describes(folder, part):
            return [folder]
    found = [path for path in _candidates(place, part) if _is_part(path, part, is_asked)]
    if part == "text_encoder" and len(found) > 1:
        # what lies beside it for other models is T5
        found = [path for path in found if has_umt5(part_of(path, part))] or found
    return found


def _candidates(place: Path, part: str) -> Iterator[Path]:
    own = {place / name for name in _FOLDERS[part]}
    for folder in (place, *sorted(own)):
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                is_named = COMPANION.fullmatch(path.name) or folder in own
                if is_named and path.suffix in WEIGHT_SUFFIXES and path.is_file():
                    yield path


def _is_part(path: Path, part: str, is_asked: bool) -> bool:
    try:
        return bool(part_of(path, part))
    except CheckpointError:
        if is_asked and COMPANION.fullmatch(path.name):
            raise
        return False


def _describes(folder: Path, part: str) -> bool:
    """Whether a folder is a component's own, by the words of its config."""
    try:
        text = (folder / "config.json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    # a component's folder may hold another kind of model, which its loader names
    word = "Autoencoder" if part == "vae" else "EncoderModel"
    return word in text or folder.name == _FOLDERS[part][0]


def _latent_channels(path: Path) -> int:
    if path.is_dir():
        return 0
    tensors = part_of(path, "vae")
    info = tensors.get("conv2.weight") or tensors.get("post_quant_conv.weight")
    return info.shape[0] if info is not None and info.shape else 0
