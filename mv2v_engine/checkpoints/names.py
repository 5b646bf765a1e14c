"""Every rename of a parameter: original Wan names to diffusers', both ways, and users' own files.

Translation is strict: a key is known whole or not at all. Original Wan calls its blocks' norms
in the order norm1, norm3, norm2, so norm2 and norm3 change places. This project's names are
diffusers' plus `blocks.N.cam_encoder`, `blocks.N.projector`, `tokenizers.K`, `mergers.N`,
`history_encoders.RATE`, `blocks.N.attn_history`, `control_adapter` and
`blocks.N.attn1.rope_phase_qk` and `_vo`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mv2v_engine.errors import CheckpointError, nearest_names

Naming = Literal["original", "diffusers"]
Renames = Mapping[str, str | None]

# CLIP's tokens of image-to-video models, and Wan-Fun's convolutions of camera rays
_IMAGE = ((0, "norm1"), (1, "ff.net.0.proj"), (3, "ff.net.2"), (4, "norm2"))
_ADAPTER = tuple(
    f"control_adapter.{name}"
    for name in ("conv", "residual_blocks.0.conv1", "residual_blocks.0.conv2")
)
_TOP_MODULES = {
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    **{f"img_emb.proj.{n}": f"condition_embedder.image_embedder.{name}" for n, name in _IMAGE},
    **{name: name for name in _ADAPTER},
}
_BLOCK_MODULES = {
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "norm2": "norm3",
    "cam_encoder": "cam_encoder",
    "projector": "projector",
    "action_mlp.proj": "action_mlp.proj",
    # the names of VACE's own blocks
    "before_proj": "proj_in",
    "after_proj": "proj_out",
}
_ATTENTIONS = {
    "self_attn": "attn1",
    "cross_attn": "attn2",
    # Echo-Memory's, over frames
    "self_attn_with_action": "attn_frames",
}
# Echo-Memory's state-space memory
_STATE_SPACE = (
    *(f"{name}.{kind}" for name in ("in_proj", "out_proj", "norm") for kind in ("weight", "bias")),
    "decay_logit",
    "residual_logit",
)
_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}


def _leaves() -> tuple[dict[str, str], dict[str, str]]:
    """Whole parameter names outside and inside a block, original to diffusers."""
    kinds = ("weight", "bias")
    top = {f"{old}.{k}": f"{new}.{k}" for old, new in _TOP_MODULES.items() for k in kinds}
    top["head.modulation"] = "scale_shift_table"
    block = {f"{old}.{k}": f"{new}.{k}" for old, new in _BLOCK_MODULES.items() for k in kinds}
    block["modulation"] = "scale_shift_table"
    for old, new in _ATTENTIONS.items():
        for p, q in _PROJECTIONS.items():
            block |= {f"{old}.{p}.{k}": f"{new}.{q}.{k}" for k in kinds}
        block |= {f"{old}.norm_{p}.weight": f"{new}.norm_{p}.weight" for p in "qk"}
    block |= {f"block_wise_ssm.{name}": f"state_space.{name}" for name in _STATE_SPACE}
    for p in "kv":
        block |= {f"cross_attn.{p}_img.{k}": f"attn2.add_{p}_proj.{k}" for k in kinds}
    block["cross_attn.norm_k_img.weight"] = "attn2.norm_added_k.weight"
    for name in ("rope_phase_qk.1.weight", "rope_phase_vo.1.weight"):
        block[f"self_attn.{name}"] = f"attn1.{name}"
    return top, block


_TOP, _BLOCK = _leaves()
_TOP_BACK = {new: old for old, new in _TOP.items()}
_BLOCK_BACK = {new: old for old, new in _BLOCK.items()}


def _flat(naming: Naming) -> tuple[dict[str, str], dict[str, str]]:
    """The leaves of a naming with underscores for their dots, to ours."""
    is_original = naming == "original"
    top, block = (
        {(old if is_original else new).replace(".", "_"): new for old, new in leaves.items()}
        for leaves in (_TOP, _BLOCK)
    )
    return top, block


_FLAT: dict[Naming, tuple[dict[str, str], dict[str, str]]] = {
    "original": _flat("original"),
    "diffusers": _flat("diffusers"),
}
_FLAT_BLOCK = re.compile(r"((?:vace_)?blocks)_(0|[1-9]\d*)_(.+)")
_BLOCK_KEY = re.compile(r"((?:vace_)?blocks)\.(0|[1-9]\d*)\.(.+)")
# keys of modules that are this project's own
_EXTRA_KEY = re.compile(
    r"(?:(?:tokenizers|mergers)\.(?:0|[1-9]\d*)|condition_embedder\.end_time_embedder\.linear_[12]"
    r"|(?:history_encoders\.\dx\dx\d|blocks\.(?:0|[1-9]\d*)\.attn_history)(?:\.\w+)+)"
    r"\.(?:weight|bias)"
)
# what compilers, sharding, checkpointing and data parallelism write between the parts of a key:
# _orig_mod, _fsdp_wrapped_module, _checkpoint_wrapped_module, _forward_module and their like
_WRAPPER = re.compile(r"(?<![^.])(?:_\w+|module)\.")
# keys that one kind of model has and no other, below whatever stands before all of its keys
_MARKS: dict[str, tuple[str, ...]] = {
    "vae": ("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"),
    "text_encoder": (
        "blocks.0.attn.q.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
    ),
}
_TRANSFORMER = re.compile(r"((?:.*\.)?)blocks\.\d+\.(?:self_attn|attn1)\.")
_AVERAGED = re.compile(r"(?i)(?:^|[._])ema(?:[._]|$)")
# how many models torch's AveragedModel has averaged, beside the average
_AVERAGE_COUNT = "n_averaged"


def to_diffusers(key: str) -> str | None:
    """An original Wan name in diffusers' words; None when it is not one."""
    return _lookup(key, _TOP, _BLOCK)


def to_original(key: str) -> str | None:
    """A diffusers name in original Wan's words; None when it has none there."""
    return _lookup(key, _TOP_BACK, _BLOCK_BACK)


def is_known(key: str) -> bool:
    """Whether a key is one of this project's own parameter names."""
    return to_original(key) is not None or bool(_EXTRA_KEY.fullmatch(key))


def parameter_of(key: str, naming: Naming) -> str | None:
    """Our name of a parameter whose dots may be underscores, as LoRAs have it; None of no such."""
    if _EXTRA_KEY.fullmatch(key):
        return key
    (top, block), flat = _FLAT[naming], key.replace(".", "_")
    if match := _FLAT_BLOCK.fullmatch(flat):
        leaf = block.get(match[3])
        return f"{match[1]}.{match[2]}.{leaf}" if leaf else None
    return top.get(flat)


def block_of(key: str) -> int | None:
    """The block index that a key, ours or foreign, names."""
    match = re.search(r"(?:^|\.)blocks\.(\d+)\.", key)
    return int(match[1]) if match else None


def _lookup(key: str, top: Mapping[str, str], block: Mapping[str, str]) -> str | None:
    if match := _BLOCK_KEY.fullmatch(key):
        leaf = block.get(match[3])
        return f"{match[1]}.{match[2]}.{leaf}" if leaf else None
    return top.get(key)


@dataclass(frozen=True, slots=True)
class Translation:
    """Keys of a file in our words.

    names: the file's key to ours. unknown: keys that no table knows. dropped: keys that the
    user's rename file maps to null. prefix: what stands before every key of the transformer.
    others: prefixes of further transformers, which are left aside. unnamed: where averages lie
    whose weights have no names of their own, and are left aside, too. parts: prefixes of other
    models in the same file, by component. aside: all keys of these, and averages' counts.
    """

    naming: Naming | None
    names: dict[str, str]
    unknown: tuple[str, ...]
    dropped: tuple[str, ...]
    prefix: str = ""
    others: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)
    aside: frozenset[str] = frozenset()

    @property
    def averaged(self) -> bool:
        """Whether a name, or a count beside them, says that the weights are averaged."""
        return bool(_AVERAGED.search(self.prefix)) or _AVERAGE_COUNT in self.aside


def bare(key: str) -> str:
    """A key without what training wrappers write into it, wherever they stand."""
    return _WRAPPER.sub("", key)


def part_prefixes(keys: Iterable[str], part: str) -> list[str]:
    """What stands before all keys of each Wan VAE ("vae") or T5 encoder ("text_encoder")."""
    found = {key.removesuffix(mark) for key in keys for mark in _MARKS[part] if key.endswith(mark)}
    return sorted(prefix for prefix in found if prefix == "" or prefix.endswith("."))


def translate(
    keys: Iterable[str],
    renames: Renames | None = None,
    *,
    aside: Iterable[str] = (),
    chosen: str | None = None,
) -> Translation:
    """Users' renames first, then what wrappers and exporters put before keys, then the tables.

    naming is None when no block of a Wan transformer is among the keys. aside: keys of the file
    that are no parameters; renaming them is no error, and changes nothing. chosen: under which
    name the transformer lies, where there are several; None takes the one that is averaged over
    training (EMA), as samples are made with it.

    Raises:
        CheckpointError: a rename that meets no key, two keys that end up with one name, or several
            transformers and none of them chosen.
    """
    keys = list(keys)
    names, dropped = _apply_renames(keys, renames or {}, aside)
    bares = {key: bare(key) for key in keys if key not in names and key not in dropped}
    found = transformer_prefixes(bares.values())
    prefix, others = _choose(found, chosen)
    parts = {
        part: places[0]
        for part in _MARKS
        if (places := part_prefixes(bares.values(), part)) and places[0]
    }
    besides = (*others, *(_top(part, prefix) for part in parts.values()))
    unused, unnamed = set(), set()
    for key, name in bares.items():
        if prefix and name.startswith(prefix):
            continue
        if name.startswith(besides) or name == _AVERAGE_COUNT:
            unused.add(key)
        elif found and _AVERAGED.search(name.split(".")[0]):
            # a list's, or names without their dots
            unused.add(key)
            unnamed.add(name.split(".")[0])
    unnamed -= {each.split(".")[0] for each in (prefix, *others)}
    rest = {key: name.removeprefix(prefix) for key, name in bares.items() if key not in unused}
    naming = _naming(list(rest.values()) or list(names.values()))
    unknown = []
    for key, name in rest.items():
        ours = to_diffusers(name) if naming == "original" else None
        if ours is None and (naming != "original" or _EXTRA_KEY.fullmatch(name)):
            ours = name if is_known(name) else None
        if ours is None:
            unknown.append(key)
        else:
            names[key] = ours
    seen: dict[str, str] = {}
    for key, name in names.items():
        if name in seen:
            raise CheckpointError(
                f"{seen[name]!r} and {key!r} both become {name!r}; expected one key for each "
                "parameter, correct the rename file"
            )
        seen[name] = key
    return Translation(
        naming,
        names,
        tuple(unknown),
        tuple(dropped),
        prefix,
        tuple(others),
        tuple(sorted(unnamed)),
        parts,
        frozenset(unused),
    )


def transformer_prefixes(names: Iterable[str]) -> list[str]:
    """What stands before all keys of each Wan transformer, of keys as `bare` leaves them."""
    matches = map(_TRANSFORMER.match, names)
    return sorted({match[1] for match in matches if match is not None})


def _choose(found: list[str], chosen: str | None) -> tuple[str, list[str]]:
    """The prefix of the transformer that is meant, and those of the others."""
    if chosen is not None:
        fitting = [prefix for prefix in found if (prefix + ".").startswith(chosen + ".")]
    else:
        fitting = found if len(found) < 2 else [p for p in found if _AVERAGED.search(p)]
    if chosen is None and not found:
        return "", []
    if len(fitting) != 1:
        listed = ", ".join(repr(prefix.rstrip(".")) for prefix in found) or "none with a name"
        got = f"no transformer {chosen!r}" if chosen is not None else "several transformers"
        raise CheckpointError(
            f"the file holds {got} (there: {listed}); name the one that is meant behind the path, "
            "PATH#NAME"
        )
    return fitting[0], [prefix for prefix in found if prefix != fitting[0]]


def _top(part: str, prefix: str) -> str:
    """All of a part's group, unless the transformer lies in the same one."""
    top = part.split(".")[0] + "."
    return part if prefix.startswith(top) else top


def _naming(keys: list[str]) -> Naming | None:
    if any(".self_attn." in key for key in keys if key.startswith("blocks.")):
        return "original"
    if any(".attn1." in key for key in keys if key.startswith("blocks.")):
        return "diffusers"
    return None


def _apply_renames(
    keys: list[str], renames: Renames, aside: Iterable[str]
) -> tuple[dict[str, str], list[str]]:
    names: dict[str, str] = {}
    dropped: list[str] = []
    used = set()
    # the longest rule wins, so that a module's rule may have exceptions
    rules = sorted(renames, key=len, reverse=True)
    others = set(aside)
    for key in (*keys, *others):
        rule = next((r for r in rules if key == r or key.startswith(r + ".")), None)
        if rule is None:
            continue
        used.add(rule)
        if key in others:
            continue
        target = renames[rule]
        if target is None:
            dropped.append(key)
        else:
            names[key] = target + key[len(rule) :]
    if idle := [rule for rule in rules if rule not in used]:
        raise CheckpointError(
            f"the rename file names {idle[0]!r}, which the checkpoint does not hold; "
            f"nearest keys: {nearest_names(idle[0], keys)}"
        )
    return names, dropped


def read_renames(path: Path) -> dict[str, str | None]:
    """A user's rename file: JSON {"their.key": "our.key"}, prefixes allowed, null to leave out.

    Raises:
        CheckpointError: the file is missing or is not such a mapping.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); expected a rename file") from error
    if not isinstance(value, dict) or not all(
        isinstance(target, str) or target is None for target in value.values()
    ):
        raise CheckpointError(
            f'{path} is no rename file; expected JSON {{"their.key": "our.key"}}, null to leave '
            "a key out"
        )
    return value
