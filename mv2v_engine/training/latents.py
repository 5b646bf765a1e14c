"""The latent cache: every video of every scene encoded once, so that training never runs the VAE.

`python -m mv2v_engine.training.latents --scenes runs/scenes --vae runs/vae/vae --out runs/latents`
`python -m mv2v_engine.training.latents --multicam MultiCamVideo --vae Wan/vae --text Wan ...`

One safetensors file a scene. What could not be encoded is counted, and why is in `skipped_*.json`.

K cameras of a scene, C F H W latents, S' text tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from tqdm import tqdm

from mv2v_engine.camera.poses import pose_vectors, relative_to
from mv2v_engine.errors import TrainingError
from mv2v_engine.files import save_json, save_tensors
from mv2v_engine.parallel.device import usable_device
from mv2v_engine.parser import Parser, count
from mv2v_engine.synthetic.worlds import Grade
from mv2v_engine.text import TextEncoder
from mv2v_engine.training.command import run_command, seeds, shard
from mv2v_engine.training.multicam import MultiCamVideo
from mv2v_engine.training.recipe import Tracks
from mv2v_engine.training.scenes import RenderedScenes, Scene, SceneSource, WorldScenes
from mv2v_engine.training.stored import reading, stored_in
from mv2v_engine.training.text import read_text_encoder, trim_text
from mv2v_engine.training.throughput import compute_dtype
from mv2v_engine.vae import VideoVAE, load_vae

_STILL_METRES = 1e-4
_ENCODED = ("encoded scene", "latents")


class LatentCache:
    """Folders of encoded scenes: latents float16 [K, C, F, H, W], poses [K, T, 3, 4]
    camera-to-world, where they are known normalised intrinsics [K, 4], and where captions were
    encoded, text bfloat16 [K, S', text_dim].

    Args:
        device: where all latents are kept; None reads each draw's from disk, for sets larger
            than memory.

    Raises:
        TrainingError: nothing there, a damaged file, or scenes of different shapes.
    """

    def __init__(self, *folders: Path, device: torch.device | None = None) -> None:
        self._paths = [path for f in folders for path in stored_in(f, "scene", "latents")]
        self._poses: list[Tensor] = []
        self._lenses: list[Tensor | None] = []
        self._has_text: list[bool] = []
        self._resident: list[Tensor] = []
        shapes: dict[tuple[int, ...], Path] = {}
        for path in self._paths:
            shape, poses, lenses, has_text = _header(path)
            shapes.setdefault(shape[1:], path)
            self._poses.append(poses)
            self._lenses.append(lenses)
            self._has_text.append(has_text)
            if device is not None:
                self._resident.append(_read(path, "latents", None).to(device))
        if len(shapes) > 1:
            listed = "; ".join(f"{path.name} {list(shape)}" for shape, path in shapes.items())
            raise TrainingError(
                f"{', '.join(map(str, folders))}: videos of different shapes ({listed}); encode "
                "each shape into a folder of its own"
            )
        channels, frames, rows, columns = next(iter(shapes))
        self.latent_shape = (channels, frames, rows, columns)

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def has_captions(self) -> bool:
        """Whether every scene has text."""
        return all(self._has_text)

    def num_tracks(self, scene: int) -> int:
        return len(self._poses[scene])

    def still_track(self, scene: int) -> int | None:
        """The first video whose camera moves less than a tenth of a millimetre, or None."""
        poses = self._poses[scene]
        moved = (poses - poses[:, :1]).abs().flatten(1).amax(1)
        still = (moved < _STILL_METRES).nonzero()
        return int(still[0]) if len(still) else None

    def draw(self, scene: int, tracks: Sequence[int], source: int) -> Tracks:
        path, poses = self._paths[scene], self._poses[scene]
        latents = self._resident[scene][list(tracks)] if self._resident else None
        if latents is None:
            latents = torch.stack([_read(path, "latents", track) for track in tracks])
        reference = poses[source, 0]
        cameras = torch.stack(
            [pose_vectors(relative_to(poses[track], reference)) for track in tracks]
        )
        lenses = self._lenses[scene]
        if lenses is not None:
            of_frames = lenses[list(tracks), None].expand(-1, cameras.shape[1], -1)
            cameras = torch.cat([cameras, of_frames], dim=-1)
        text = _read(path, "text", tracks[0]) if self._has_text[scene] else None
        return Tracks(latents.float(), cameras, text)


def save_latents(
    path: Path,
    latents: Tensor,
    poses: Tensor,
    text: Tensor | None = None,
    intrinsics: Tensor | None = None,
) -> None:
    """Write one scene of a latent cache: latents [K, C, F, H, W], poses [K, T, 3, 4], text, and
    normalised intrinsics [K, 4]."""
    tensors = {"latents": latents.half(), "poses": poses}
    if intrinsics is not None:
        tensors["intrinsics"] = intrinsics
    if text is not None:
        tensors["text"] = text.bfloat16()
    save_tensors(path, tensors)


def encode_scenes(
    source: SceneSource,
    names: Sequence[str],
    out: Path,
    encode: Callable[[Scene], tuple[Tensor, Tensor | None]],
    *,
    report: Path,
    strict: bool = False,
) -> dict[str, list[str]]:
    """Encode the scenes that are not in the cache yet; why scenes and cameras were left out.

    Args:
        encode: latents [K, C, F, H, W] and text of a scene.
        report: JSON of what was left out, by scene; kept up over resumptions.
        strict: raise at the first such thing instead.
    """
    skipped: dict[str, list[str]] = {}
    if report.exists():
        skipped = _read_report(report)
    bar = tqdm(names, unit="scene")
    for name in bar:
        target = out / f"{name}.safetensors"
        if target.exists():
            continue
        was_skipped = skipped.pop(name, None) is not None
        try:
            scene = source.load(name)
            if strict and scene.skipped:
                raise TrainingError(f"{name}: {'; '.join(scene.skipped)}")
        except TrainingError as error:
            if strict:
                raise
            skipped[name] = [str(error)]
        else:
            latents, text = encode(scene)
            save_latents(target, latents, scene.poses, text, scene.intrinsics)
            if scene.skipped:
                skipped[name] = list(scene.skipped)
        if name in skipped:
            bar.write(f"{name}: left out {'; '.join(skipped[name])}")
        if name in skipped or was_skipped:
            save_json(report, skipped)
    return skipped


def _header(path: Path) -> tuple[tuple[int, ...], Tensor, Tensor | None, bool]:
    """Shape of the latents, the poses, the intrinsics if known, and whether there is text."""
    with reading(path, *_ENCODED) as file:
        shape, names = tuple(file.get_slice("latents").get_shape()), file.keys()
        poses: Tensor = file.get_tensor("poses")
        lenses = file.get_tensor("intrinsics") if "intrinsics" in names else None
        if len(shape) != 5 or poses.shape != (shape[0], 4 * shape[2] - 3, 3, 4):
            raise ValueError(
                f"latents {list(shape)} and poses {list(poses.shape)} do not belong together"
            )
        if lenses is not None and lenses.shape != (shape[0], 4):
            raise ValueError(f"intrinsics {list(lenses.shape)} are not [{shape[0]}, 4]")
    return shape, poses, lenses, "text" in names


def _read(path: Path, name: str, track: int | None) -> Tensor:
    """A tensor, or the part of one track."""
    with reading(path, *_ENCODED) as file:
        tensor: Tensor = file.get_tensor(name) if track is None else file.get_slice(name)[track]
    return tensor


def _read_report(path: Path) -> dict[str, list[str]]:
    try:
        report: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
        return dict(report)
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); delete it") from error


def _encoder(
    vae: VideoVAE, text: TextEncoder | None
) -> Callable[[Scene], tuple[Tensor, Tensor | None]]:
    dtype = compute_dtype(vae.device)

    def encode(scene: Scene) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=dtype != torch.float32):
            latents = torch.stack([vae.encode(clip).cpu() for clip in scene.frames])
        if text is None:
            return latents, None
        return latents, trim_text(torch.cat([text.encode(c) for c in scene.captions]).cpu())

    return encode


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--scenes", type=Path, help="folder of mv2v_engine.training.scenes")
    sources.add_argument("--worlds", type=seeds, help="first:last seed, rendered on the way")
    sources.add_argument("--multicam", type=Path, help="root of a MultiCamVideo dataset")
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--grade", choices=get_args(Grade), default="plain", help="of --worlds")
    parser.add_argument("--cameras", type=count, default=8, help="that film each of --worlds")
    parser.add_argument(
        "--arcs", type=int, default=1, help="with --worlds: arcs for one of every other move"
    )
    parser.add_argument(
        "--shard", type=shard, default="0/1", help="i/n: every n-th scene from the i-th"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first thing left out")
    parser.add_argument("--device", default="cpu")
    group = parser.add_argument_group("with --multicam").add_argument
    group("--frames", type=count, default=81)
    group("--size", type=count, nargs=2, default=(480, 832), metavar=("HEIGHT", "WIDTH"))
    group("--text", type=Path, help="Wan folder with text_encoder and tokenizer, for captions")
    group("--captions", type=Path, help="CSV of file_name and text; default: DIR/metadata.csv")
    group("--text-length", type=count, default=512, help="text tokens of the transformer")
    args = parser.parse_args()

    device = usable_device(args.device)
    vae = load_vae(args.vae, device=device, dtype=torch.float32)
    source: SceneSource
    text = None
    if args.multicam is None:
        if args.text or args.captions:
            parser.error("--text and --captions belong to --multicam; rendered scenes have none")
        source = (
            RenderedScenes(args.scenes)
            if args.worlds is None
            else WorldScenes(
                args.worlds, args.grade, args.cameras, arcs=args.arcs, device=str(device)
            )
        )
    else:
        if args.captions is not None and args.text is None:
            parser.error("--captions needs --text, the folder of the encoder that reads them")
        source = _multicam(args, vae)
        if args.text is not None:
            text = read_text_encoder(args.text, args.text_length, device)
    names = source.names[args.shard]
    report = args.out / f"skipped_{args.shard.start}_of_{args.shard.step}.json"
    encoder = _encoder(vae, text)
    skipped = encode_scenes(source, names, args.out, encoder, report=report, strict=args.strict)
    encoded = {name for name in names if (args.out / f"{name}.safetensors").exists()}
    cameras = sum(len(why) for name, why in skipped.items() if name in encoded)
    print(
        f"{len(encoded)} of {len(names)} scenes are encoded in {args.out}; left out: "
        f"{len(names) - len(encoded)} scenes, {cameras} cameras of the others"
    )
    if text is not None and isinstance(source, MultiCamVideo) and source.num_uncaptioned:
        print(f"{source.num_uncaptioned} videos have no caption: they got the empty prompt")
    if not encoded:
        raise TrainingError(f"none of {len(names)} scenes could be encoded; {report} says why")


def _multicam(args: argparse.Namespace, vae: VideoVAE) -> MultiCamVideo:
    size = (args.size[0], args.size[1])
    vae.latent_shape(args.frames, size)
    captions = args.captions
    listed = args.multicam / "metadata.csv"
    if captions is None and listed.is_file():
        if args.text is not None:
            captions = listed
        else:
            print(f"{listed} stays unused: without --text there is no encoder for captions")
    return MultiCamVideo(args.multicam, num_frames=args.frames, size=size, captions=captions)


if __name__ == "__main__":
    run_command(main)
