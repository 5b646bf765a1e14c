"""What a file or folder is, told from its content: names of files, configs and tensor keys.

| format      | what it is                                                                  |
| mv2v_engine | this project's folder: `mv2v.json` and `transformer.safetensors`            |
| wan_diffusers | a pipeline folder, a transformer folder or a file with diffusers' names   |
| wan_original  | a file, shards or a folder with original Wan names                        |
| recammaster | either naming, plus `cam_encoder` and `projector` in the blocks             |
| memory_v2v  | recammaster plus conditioning tokenizers and token mergers of any name      |
| lucy_edit   | either naming, with the source's latents on the target's channels           |
| echo_memory | original Wan names, with cameras as actions of frames in every block        |
| bernini_r   | a diffusers folder of Wan names whose JSON says that it is Bernini's        |
| redirector  | self-attention with rotary phases alone, on a base with an adapter of rays  |
| vace        | either naming, with VACE's blocks beside the main ones                      |
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mv2v_engine.checkpoints.components import COMPANION
from mv2v_engine.checkpoints.gguf_files import architecture_of
from mv2v_engine.checkpoints.identify import lora_of, of_tensors
from mv2v_engine.checkpoints.names import (
    Naming,
    Renames,
    Translation,
    bare,
    transformer_prefixes,
    translate,
)
from mv2v_engine.checkpoints.weights import (
    WEIGHT_SUFFIXES,
    TensorInfo,
    file_kind,
    read_header,
    with_scales,
)
from mv2v_engine.errors import CheckpointError, nearest_names
from mv2v_engine.files import file_digest

Format = Literal[
    "mv2v_engine",
    "wan_diffusers",
    "wan_original",
    "recammaster",
    "memory_v2v",
    "lucy_edit",
    "redirector",
    "bernini_r",
    "echo_memory",
    "vace",
]

OWN_CONFIG = "mv2v.json"
OWN_WEIGHTS = "transformer.safetensors"
# latent cells of a token: Wan's patches are 1x2x2
PATCH_CELLS = 4
_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
# one of Wan2.2 A14B's two experts, by the name of its file or folder: no tensor tells them apart
_EXPERT = re.compile(
    r"(?i).*(high|low)[-_ ]?noise.*|transformer_2"
    r"|.*(a14b|wan[-_.]?2[-_.]?2).*[-_. ](high|low)([-_. ].*)?"
)
# what configs call a transformer with VACE's blocks
_VACE_CLASSES = ("WanVACETransformer3DModel", "VaceWanModel")
# in the names of classes whose frames do not see later ones
_CAUSAL = "causal"
# where trainers of causal, distilled models keep the model
_GENERATOR = re.compile(r"generator(_ema)?\.")
_EXPERTS = (
    ("transformer", "transformer_2"),
    ("high_noise_model", "low_noise_model"),
    ("high", "low"),
)
_WHOLE = "expected a whole transformer (Wan2.1 1.3B or 14B, Wan2.2 5B, or one made from them)"
_UNSUPPORTED = {
    "control_adapter.": "camera-control (Wan-Fun; base=PATH of ReDirector's trained tensors)",
    "img_emb.": "image-to-video",
    ".k_img.": "image-to-video",
    ".add_k_proj.": "image-to-video",
    "image_embedder.": "image-to-video",
    "spatial_memory_module.": "spatial memory (Echo-Memory)",
    ".videossm_hybrid.": "hybrid state-space memory (Echo-Memory)",
    ".block_wise_ssm.gate": "state-space memory of the first version (Echo-Memory)",
    "motion_encoder.": "Animate",
    "audio_injector.": "speech-to-video",
}
_CAMERA_BRANCH = ".prope_attn."
_ACTIONS = ".action_mlp."
# rows of Echo-Memory that no tensor tells from the one with a single context frame
_ECHO_ROW = re.compile(r"(?i)(context_k|ctx_?)(5|20)|framepack\w*|\w*moc\w*")
# learned rotary phases of cameras, whose base has an adapter of their rays and reads image tokens
_PHASES = ".rope_phase_qk."
BASE_OF_REDIRECTOR = "alibaba-pai/Wan2.1-Fun-V1.1-1.3B-Control-Camera"
_OF_PHASES = ("control_adapter.", "img_emb.", ".k_img.", ".add_k_proj.", "image_embedder.")


@dataclass(frozen=True)
class Detected:
    """A checkpoint found on disk.

    folder: where `vae/`, `text_encoder/` and `tokenizer/` are looked for. files: the weight
    files. config_file: the JSON that describes the transformer, None when shapes must do.
    is_causal: whether the caller said that it makes frames block by block. base: what trained
    tensors alone lie on; its folder and config file are the checkpoint's then.
    tensors: the files' keys with shapes and dtypes. translation: these keys in our words.
    """

    format: Format
    path: Path
    folder: Path
    files: tuple[Path, ...]
    config_file: Path | None
    tensors: dict[str, TensorInfo]
    translation: Translation
    reason: str
    is_causal: bool = False
    base: Path | None = None


@dataclass(frozen=True)
class _Found:
    files: tuple[Path, ...]
    folder: Path
    config_file: Path | None = None
    is_own: bool = False


def embedded_folder(name: str) -> Path:
    """Where an embedded checkpoint lies."""
    return _ASSETS / name


def embedded_names() -> tuple[str, ...]:
    """Names of the checkpoints that ship with the package."""
    return tuple(sorted(path.parent.name for path in _ASSETS.glob(f"*/{OWN_CONFIG}")))


def detect(
    path: Path | str,
    renames: Renames | None = None,
    *,
    causal: bool = False,
    base: Path | str | None = None,
) -> Detected:
    """Tell what a checkpoint is; reads headers only.

    Args:
        path: a file, a folder, or the bare name of an embedded checkpoint; `PATH#NAME` takes the
            transformer under a name (`generator_ema`) of several in a file.
        renames: the user's renames, see `names.read_renames`.
        causal: it was trained to make frames block by block, which no tensor tells.
        base: the transformer whose other tensors a file of trained ones leaves out.

    Raises:
        CheckpointError: nothing there, no checkpoint, a missing shard, or unreadable weights.
    """
    root, chosen, found = _find(path)
    if found.config_file is not None and not causal:
        _require_whole_view(found.config_file)
    _require_whole(root, found)
    tensors: dict[str, TensorInfo] = {}
    for file in found.files:
        tensors |= read_header(file)
    under = None
    if base is not None:
        under, _, found_under = _find(base)
        if _is_whole(tensors):
            raise CheckpointError(
                f"{root} is a whole transformer, and base is for a file of trained tensors alone; "
                "leave base out"
            )
        beneath: dict[str, TensorInfo] = {}
        for file in found_under.files:
            beneath |= read_header(file)
        tensors = beneath | tensors
        found = replace(found_under, files=(*found_under.files, *found.files))
    elif found.is_own and (named := read_json(_config_of(found)).get("base")) is not None:
        under = _own_base(root, found.folder, named)
        (beneath_file,) = _find_in_folder(under).files
        tensors = read_header(beneath_file) | tensors
        found = replace(found, files=(beneath_file, *found.files))
    elif not _is_whole(tensors) and any(_PHASES in key for key in tensors):
        raise CheckpointError(
            f"{root} holds ReDirector's trained tensors, self-attention with rotary phases, and "
            "not the rest of the transformer; give the one that they were trained on with "
            f"base=PATH, {BASE_OF_REDIRECTOR}"
        )
    stored, tensors = tensors, with_scales(tensors)
    shapes = {key: info.shape for key, info in tensors.items()}
    if lora := lora_of(shapes):
        raise CheckpointError(f"{root} is {lora}")
    _require_no_experts(root, tensors)
    try:
        scales = stored.keys() - tensors.keys()
        translation = translate(tensors, renames, aside=scales, chosen=chosen)
    except CheckpointError as error:
        raise CheckpointError(f"{root}: {error}") from error
    tensors = {key: info for key, info in tensors.items() if key not in translation.aside}
    _require_supported(root, tensors, translation.naming)
    if chosen is None and not causal and _GENERATOR.match(translation.prefix):
        raise CheckpointError(_generator(root, translation.prefix.rstrip(".")))
    format_, reason = _classify(found, translation, tensors)
    return Detected(
        format_,
        root,
        found.folder,
        found.files,
        found.config_file,
        tensors,
        translation,
        reason if under is None else f"{reason}, on {under.name}",
        is_causal=causal,
        base=under,
    )


def wrong_base(base: Path, path: Path, what: str) -> CheckpointError:
    """The error for a base that is not that of trained tensors. what: how they differ."""
    return CheckpointError(
        f"{base} is not the base of {path}: {what}; give the one that it was trained on with "
        f"base=PATH, {BASE_OF_REDIRECTOR}"
    )


def _config_of(found: _Found) -> Path:
    assert found.config_file is not None
    return found.config_file


def _own_base(root: Path, folder: Path, named: object) -> Path:
    """The checkpoint of this project's on which another's tensors were trained, as it says itself.

    Raises:
        CheckpointError: it is not there, or has other weights by now.
    """
    place, digest = (
        (named.get("folder"), named.get("sha256")) if isinstance(named, dict) else (None, None)
    )
    if not isinstance(place, str) or not place or Path(place).is_absolute():
        raise CheckpointError(
            f"{root / OWN_CONFIG} has base {named!r}; expected the folder, relative to this one, "
            "and the SHA-256 of the weights that these were trained on"
        )
    base = (folder / place).resolve()
    weights = base / OWN_WEIGHTS
    if not (base / OWN_CONFIG).is_file() or not weights.is_file():
        raise CheckpointError(
            f"{root} holds trained tensors alone, and the checkpoint that has the others is not at "
            f"{base}; copy it there"
        )
    if file_digest(weights) != digest:
        raise CheckpointError(
            f"{root} was trained on other weights than those in {weights} (SHA-256 "
            f"{str(digest)[:12]}…); put those back, or train it on these"
        )
    return base


def _is_whole(tensors: Iterable[str]) -> bool:
    """Whether a transformer's first layer is there, which no fine-tuning of attention saves."""
    return any(bare(key).endswith("patch_embedding.weight") for key in tensors)


def weight_files(path: Path | str) -> tuple[Path, ...]:
    """The files that hold a checkpoint's transformer, told from names and JSON alone.

    Raises:
        CheckpointError: there are none, or several that could be.
    """
    return _find(path)[2].files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def _find(path: Path | str) -> tuple[Path, str | None, _Found]:
    """Where a checkpoint lies, the name behind its #, and its files."""
    try:
        root, chosen = _resolve(path)
        found = _find_in_folder(root) if root.is_dir() else _find_by_file(root)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return root, chosen, found


def _generator(root: Path, name: str) -> str:
    return (
        f"{root} holds a distilled generator ({name!r}), which trainers such as Self-Forcing save "
        "of causal models of a few steps, and no tensor tells which kind it is: if it makes frames "
        "block by block, stream it (run stream --causal); if it looks at all frames at once, say "
        f"so with {root.name}#{name}"
    )


def _resolve(path: Path | str) -> tuple[Path, str | None]:
    """The path, and the name behind its #."""
    name = str(path)
    embedded = embedded_names()
    if name in embedded:
        return embedded_folder(name), None
    root = Path(path).expanduser()
    place, mark, chosen = name.rpartition("#")
    if mark and chosen and not root.exists() and Path(place).expanduser().exists():
        return Path(place).expanduser(), chosen
    if not root.exists():
        known = nearest_names(name, embedded) if embedded else "none are installed"
        raise CheckpointError(
            f"no checkpoint at {name!r}; expected a file, a folder, a hub's owner/name or an "
            f"embedded name ({known})"
        )
    return root, None


def _find_in_folder(root: Path) -> _Found:
    if (root / OWN_CONFIG).is_file():
        weights = root / OWN_WEIGHTS
        if not weights.is_file():
            raise CheckpointError(f"{root} has {OWN_CONFIG} but no {OWN_WEIGHTS}; copy it there")
        return _Found((weights,), root, root / OWN_CONFIG, is_own=True)
    if any(all((root / name).is_dir() for name in names) for names in _EXPERTS):
        raise CheckpointError(_two_experts(root))
    if (root / "model_index.json").is_file():
        _require_wan_pipeline(root / "model_index.json")
        inner = root / "transformer"
        if not inner.is_dir():
            raise CheckpointError(f"{root} has model_index.json but no transformer folder")
    else:
        inner = root / "transformer" if (root / "transformer" / "config.json").is_file() else root
    folder = inner.parent if inner.name == "transformer" else inner
    return _Found(_weights_in(inner), folder, _config_beside(inner))


def _find_by_file(path: Path) -> _Found:
    if path.name in (OWN_CONFIG, "model_index.json", "config.json"):
        return _find_in_folder(path.parent)
    if path.name == OWN_WEIGHTS and (path.parent / OWN_CONFIG).is_file():
        return _find_in_folder(path.parent)
    folder = path.parent.parent if path.parent.name == "transformer" else path.parent
    if path.name.endswith(".index.json"):
        return _Found(indexed_files(path), folder, _config_beside(path.parent))
    files = _all_shards(path) if _SHARD.fullmatch(path.name) else (path,)
    return _Found(files, folder, _config_beside(path.parent))


def _config_beside(folder: Path) -> Path | None:
    """`config.json` of a Wan transformer in this folder; other models' configs do not count."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = read_json(path)
    described = str(config.get("_class_name", "WanModel"))
    is_wan = described in ("WanTransformer3DModel", "WanModel", *_VACE_CLASSES)
    return path if is_wan or _CAUSAL in described.lower() else None


def _require_whole_view(path: Path) -> None:
    """Refuse a config file that describes a model of frames one after the other.

    Raises:
        CheckpointError: it does.
    """
    described = str(read_json(path).get("_class_name"))
    if _CAUSAL in described.lower():
        raise CheckpointError(
            f"{path} describes a {described}, which makes frames one after the other, and a turn "
            f"looks at all frames at once: stream it (run stream --causal); for turns, {_WHOLE}"
        )


def _require_wan_pipeline(path: Path) -> None:
    index = read_json(path)
    kind = (index.get("transformer") or [None, None])[1]
    if kind not in ("WanTransformer3DModel", *_VACE_CLASSES):
        raise CheckpointError(
            f"{path} describes a {index.get('_class_name')} with transformer {kind}; expected a "
            "pipeline of WanTransformer3DModel"
        )
    if (index.get("transformer_2") or [None])[0] is not None or index.get("boundary_ratio"):
        raise CheckpointError(_two_experts(path.parent))


def _two_experts(folder: Path) -> str:
    return (
        f"{folder} has two experts, as Wan2.2 A14B: one for the first, noisy steps and one for the "
        f"rest, and this engine runs one transformer for all steps; {_WHOLE}: neither expert is one"
    )


def _require_whole(root: Path, found: _Found) -> None:
    """Refuse an expert of two, which has the tensors of a whole transformer.

    Raises:
        CheckpointError: its name, or what lies beside it, says that it is one.
    """
    if found.is_own:
        return
    # a link may lie elsewhere and have another name
    for file in (found.files[0].parent.resolve() / found.files[0].name, found.files[0].resolve()):
        inner = file.parent
        for names in _EXPERTS:
            if inner.name in names and all((inner.parent / name).is_dir() for name in names):
                reason = f"{' and '.join(names)} lie beside each other"
                raise CheckpointError(_one_expert(root, reason))
        for name in (file.stem, inner.name):
            if _EXPERT.fullmatch(name):
                raise CheckpointError(_one_expert(root, f"by its name, {name}"))
        index = inner.parent / "model_index.json"
        if inner.name == "transformer" and index.is_file():
            _require_wan_pipeline(index)


def _require_no_experts(root: Path, tensors: Iterable[str]) -> None:
    """Refuse experts by the names under which they lie in a file."""
    prefixes = transformer_prefixes(map(bare, tensors))
    experts = [p.rstrip(".") for p in prefixes if any(map(_EXPERT.fullmatch, p.split(".")))]
    if experts and len(prefixes) > 1:
        raise CheckpointError(_two_experts(root))
    if experts:
        raise CheckpointError(_one_expert(root, f"by the name that it lies under, {experts[0]}"))


def _one_expert(root: Path, reason: str) -> str:
    return (
        f"{root} is one of two experts ({reason}), as Wan2.2 A14B's: trained for the noisy steps "
        f"or for the rest alone, it cannot make a video from noise; {_WHOLE}"
    )


def _weights_in(folder: Path) -> tuple[Path, ...]:
    """The transformer's weight files of a folder."""
    if indices := sorted(folder.glob("*.index.json")):
        return indexed_files(indices[0])
    files = [p for p in sorted(folder.iterdir()) if p.suffix in WEIGHT_SUFFIXES and p.is_file()]
    named = [p for p in files if p.name.startswith("diffusion_pytorch_model")]
    files = named or [p for p in files if not COMPANION.fullmatch(p.name)]
    plain = [p for p in files if p.name == "diffusion_pytorch_model.safetensors"]
    if plain:
        return (plain[0],)
    if files and _SHARD.fullmatch(files[0].name):
        return _all_shards(files[0])
    if not files:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise CheckpointError(
            f"{folder} holds no transformer weights (found {there}); expected {OWN_CONFIG}, "
            "model_index.json, or .safetensors, .ckpt or .pth files"
        )
    if len(files) > 1 and all(_EXPERT.fullmatch(p.stem) for p in files):
        raise CheckpointError(_two_experts(folder))
    if len(files) > 1:
        there = ", ".join(p.name for p in files[:6])
        raise CheckpointError(f"{folder} holds several weight files ({there}); give one of them")
    return (files[0],)


def indexed_files(path: Path) -> tuple[Path, ...]:
    """The weight files that an index of shards names.

    Raises:
        CheckpointError: it is none, or one of them is missing.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; expected an index of weight shards")
    shards = tuple(path.parent / str(name) for name in sorted(set(map(str, weight_map.values()))))
    _require_shards(shards)
    return shards


def _all_shards(path: Path) -> tuple[Path, ...]:
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return (path,)
    stem, _, count, suffix = match.groups()
    shards = tuple(
        path.parent / f"{stem}-{i:05d}-of-{count}{suffix}" for i in range(1, int(count) + 1)
    )
    _require_shards(shards)
    return shards


def _require_shards(shards: tuple[Path, ...]) -> None:
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{shards[0].parent} lacks {len(missing)} of {len(shards)} weight shards: "
            f"{', '.join(missing[:3])}; download the missing files"
        )


def _require_supported(root: Path, tensors: dict[str, TensorInfo], naming: Naming | None) -> None:
    has_phases = any(_PHASES in key for key in tensors)
    for mark, kind in _UNSUPPORTED.items():
        if has_phases and mark in _OF_PHASES:
            continue
        if any(mark in key for key in tensors):
            raise CheckpointError(
                f"{root} is a {kind} checkpoint; expected a Wan text-to-video transformer or one "
                "made from it"
            )
    if any(_ACTIONS in key for key in tensors):
        place = root.resolve()
        for name in (place.stem, place.parent.name):
            if row := _ECHO_ROW.search(name):
                raise CheckpointError(
                    f"{root} is, by its name, Echo-Memory's {row[0]}, whose context is chosen or "
                    "compressed in a way that is not made here; expected context_k1 or "
                    "block_wise_ssm_causal_v2 (rename it if it is one)"
                )
    branch = [key for key in tensors if _CAMERA_BRANCH in key]
    if branch:
        raise CheckpointError(
            f"{root} has a second attention beside every block, for cameras ({branch[0]} and "
            f"{len(branch) - 1} more keys, as Memorizon's): no weight tells its positions, its "
            "frame slots and masks, or the units of its cameras, and this engine has no such "
            "branch; expected PRoPE inside self-attention, which is in the camera_attention of "
            f"{OWN_CONFIG}, or a checkpoint without"
        )
    if naming is None:
        what = of_tensors({key: info.shape for key, info in tensors.items()})
        if what is not None:
            raise CheckpointError(f"{root} is {what}; {_WHOLE}")
        keys = ", ".join(list(tensors)[:3])
        raise CheckpointError(
            f"{root} holds no Wan transformer (first keys: {keys}); expected keys such as "
            "blocks.0.self_attn.q.weight or blocks.0.attn1.to_q.weight"
        )


def _classify(
    found: _Found, translation: Translation, tensors: dict[str, TensorInfo]
) -> tuple[Format, str]:
    names = set(translation.names.values())
    cameras = sum(name.endswith(".cam_encoder.weight") for name in names)
    memory = sorted(name for name in names if name.startswith(("tokenizers.", "mergers.")))
    says = [f"{translation.naming} Wan names"]
    if translation.prefix:
        says[0] += f" under {translation.prefix.rstrip('.')!r}"
    if file_kind(found.files[0]) == "gguf":
        said = architecture_of(found.files[0])
        says.append(f"a GGUF file of architecture {said!r}" if said else "a GGUF file")
    if translation.averaged:
        says[0] += ", averaged over training (EMA)"
    if translation.others:
        others = " and ".join(repr(other.rstrip(".")) for other in translation.others)
        says.append(f"{others} left aside (PATH#NAME takes another)")
    if translation.unnamed:
        averages = " and ".join(map(repr, translation.unnamed))
        says.append(f"{averages}, an average that does not name its weights, left aside")
    if translation.parts:
        says.append(f"{' and '.join(translation.parts)} in the same file")
    if found.is_own:
        return "mv2v_engine", f"{OWN_CONFIG} beside {OWN_WEIGHTS}"
    if cameras:
        says.append(f"camera modules in {cameras} blocks")
    if phases := sum(_PHASES in name for name in names):
        says.append(f"rotary phases of cameras in {phases} blocks and an adapter of their rays")
        return "redirector", ", ".join(says)
    if memory:
        says.append(f"{len(memory)} keys of tokenizers and mergers")
    if translation.unknown:
        says.append(f"{len(translation.unknown)} keys of unknown modules")
    vace = {ours.split(".")[1] for ours in translation.names.values() if ours.startswith("vace_bl")}
    if vace:
        return "vace", ", ".join([*says, f"{len(vace)} VACE blocks beside the main ones"])
    channels, outputs = _channels(translation, tensors)
    if channels == 2 * outputs and not cameras:
        says.append(f"the source on {outputs} of the target's {channels} channels")
        return "lucy_edit", ", ".join(says)
    if actions := sum(f"{_ACTIONS}proj.weight" in name for name in names):
        over = sum(".attn_frames.to_q.weight" in name for name in names)
        states = sum(".state_space.in_proj.weight" in name for name in names)
        says.append(f"cameras as actions in {actions} blocks")
        says += [f"attention over frames in {over}"] * bool(over)
        says += [f"a state-space memory in {states}"] * bool(states)
        return "echo_memory", ", ".join(says)
    if _is_bernini(found):
        says.append("a pipeline that its JSON says is Bernini's, of videos with ids")
        return "bernini_r", ", ".join(says)
    reason = ", ".join(says)
    if cameras:
        return ("memory_v2v" if memory or translation.unknown else "recammaster"), reason
    return ("wan_diffusers" if translation.naming == "diffusers" else "wan_original"), reason


def _is_bernini(found: _Found) -> bool:
    """Whether the JSON of a folder says so, for no tensor does."""
    places = [found.folder / name for name in ("config.json", "model_index.json")]
    places += [] if found.config_file is None else [found.config_file]
    for place in places:
        said = read_json(place) if place.is_file() else {}
        names = f"{said.get('model_type')} {said.get('_class_name')}".lower()
        if "bernini" in names or said.get("use_src_id_rotary_emb"):
            return True
    return False


def _channels(translation: Translation, tensors: dict[str, TensorInfo]) -> tuple[int, int]:
    """Latent channels in and out, (0, -1) where no tensor tells."""
    shapes = {ours: tensors[key].shape for key, ours in translation.names.items()}
    embedding, head = shapes.get("patch_embedding.weight", ()), shapes.get("proj_out.weight", ())
    if len(embedding) != 5 or not head:
        return 0, -1
    return embedding[1], head[0] // PATCH_CELLS
