"""Train a small `AutoencoderKLWan` (diffusers' own class) on rendered scenes.

`python -m mv2v_engine.training.vae --scenes runs/scenes --out runs/vae --minutes 40`

The small VAE is the Wan2.2 architecture with fewer stages: 2x2 pixel patches, two residual
down-stages, so 8x8x4 compression into 16 channels as Wan2.1's. Its result is a diffusers folder
whose config holds the latent statistics measured on the training scenes.

B batch, C channels, T frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mv2v_engine.evaluation.reconstruction import reconstruction_psnr
from mv2v_engine.parser import Parser, count, positive
from mv2v_engine.training.command import run_command
from mv2v_engine.training.distributed import data_parallel, join, leave, own_generator
from mv2v_engine.training.loop import LoopConfig, TrainingLoop
from mv2v_engine.training.optimizers import Muon
from mv2v_engine.training.scenes import load_scene
from mv2v_engine.vae import load_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

TINY_VAE: dict[str, Any] = {
    "base_dim": 32,
    "decoder_base_dim": 32,
    "z_dim": 16,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}
# Keeps latents bounded without costing reconstruction; the decoder sees sampled latents.
_KL_WEIGHT = 1e-4


class ClipPool:
    """Rendered clips in memory, uint8, grown as more scenes appear on disk."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.clips: list[Tensor] = []
        self._seen: set[Path] = set()
        self.refresh()

    def refresh(self) -> None:
        for path in sorted(self.folder.glob("scene_*.safetensors"))[: self.limit]:
            if path not in self._seen:
                self._seen.add(path)
                self.clips.extend(load_scene(path).frames)

    def crops(self, generator: torch.Generator, batch: int, frames: int, side: int) -> Tensor:
        """Random crops [B, 3, frames, side, side] in -1..1, mirrored half of the time."""

        def draw(high: int) -> int:
            return int(torch.randint(0, high, (1,), generator=generator))

        crops = []
        for _ in range(batch):
            clip = self.clips[draw(len(self.clips))]
            t, y, x = (
                draw(n - m + 1) for n, m in zip(clip.shape[:3], (frames, side, side), strict=True)
            )
            crop = clip[t : t + frames, y : y + side, x : x + side]
            crops.append(crop.flip(2) if draw(2) else crop)
        return to_model_range(torch.stack(crops))


def to_model_range(frames: Tensor) -> Tensor:
    """uint8 [..., T, height, width, 3] to float [..., 3, T, height, width] in -1..1."""
    return frames.movedim(-1, -4).float() / 127.5 - 1


class _Autoencode(nn.Module):
    """Encode, sample, decode as one module, which is what data parallelism wraps."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, video: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Decoded video, posterior mean and log-variance."""
        posterior = self.vae.encode(video).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(video.device)
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        return decoded, posterior.mean.float(), posterior.logvar.float()


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKLWan, clips: list[Tensor]
) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of the mode latents of some clips."""
    latents = [vae.encode(to_model_range(clip)[None]).latent_dist.mode() for clip in clips]
    flat = torch.cat([latent.movedim(1, -1).flatten(0, -2) for latent in latents])
    return flat.mean(0).tolist(), flat.std(0).tolist()


def main() -> None:
    from diffusers import AutoencoderKLWan

    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=positive, default=40)
    parser.add_argument("--batch", type=count, default=4)
    # whole windows: trained on 9 frames, the causal caches of later chunks go astray (22 dB)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--side", type=count, default=48)
    parser.add_argument("--max-scenes", type=count, default=150)
    parser.add_argument("--learning-rate", type=positive, default=2e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--start-from", type=Path, help="a trained VAE folder to go on from")
    parser.add_argument(
        "--decoder-only",
        action="store_true",
        help="freeze the encoder of --start-from, so that latents made with it stay valid",
    )
    args = parser.parse_args()

    torch.manual_seed(0)
    device = join(args.device)
    if args.start_from:
        vae = AutoencoderKLWan.from_pretrained(args.start_from).to(device)
    else:
        vae = AutoencoderKLWan(**TINY_VAE).to(device)
        with torch.no_grad():  # begin with a nearly deterministic posterior: std 0.14, not 1
            vae.quant_conv.bias[vae.config.z_dim :] -= 4
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    filters = [parameter for parameter in trained if parameter.ndim > 3]
    others = [parameter for parameter in trained if parameter.ndim <= 3]
    optimizers = [
        Muon(filters, lr=args.learning_rate, weight_decay=1e-3),
        torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    config = LoopConfig(out=args.out, minutes=args.minutes, ema_decay=0.998, batch=args.batch)
    loop = TrainingLoop(vae, optimizers, config)
    pool = ClipPool(args.scenes, args.max_scenes)
    autoencode = data_parallel(_Autoencode(vae))

    def step(shared: torch.Generator) -> dict[str, Tensor]:
        generator = own_generator(shared)
        if loop.step % 200 == 0:
            pool.refresh()
        video = pool.crops(generator, args.batch, args.frames, args.side).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            decoded, mean, logvar = autoencode(video, generator)
        # diffusers clamps decoded frames and a clamp has no gradient: ask for a little less
        error = decoded.float() - video * 0.98
        squared = error.pow(2).mean()
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
        return {
            "loss": squared + 0.05 * error.abs().mean() + _KL_WEIGHT * kl,
            "psnr": 10 * (4 / squared.detach()).log10(),
            "kl": kl.detach(),
        }

    loop.run(step)
    if not leave():
        return
    vae.load_state_dict(loop.averaged())
    vae.eval()
    if not args.decoder_only:
        mean, std = latent_statistics(vae, pool.clips[:: max(1, len(pool.clips) // 64)])
        vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(args.out / "vae")
    trained_vae = load_vae(args.out / "vae", device=device, dtype=torch.float32)
    scores = reconstruction_psnr(trained_vae, num_worlds=4)
    score = sum(scores) / len(scores)
    print(f"held-out reconstruction: {score:.2f} dB PSNR after {loop.step} steps")


if __name__ == "__main__":
    run_command(main)
