"""The autoencoder of Wan2.1 and of Wan2.2: a video walked in causal chunks, to latents and back.

The layers and their names are those of diffusers' `AutoencoderKLWan`, so its folders load as they
are. The first chunk is one frame, every other `scale_factor_temporal` frames, or one latent frame.
A causal layer sees the frames before a chunk in a `Past`, which lives as long as one walk; the
model itself keeps nothing. Wan2.2 adds pixel patches, and a shortcut around every stage.

B batch, C channels, T frames, F latent frames, H W rows and columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mv2v_engine.arguments import fit_fields
from mv2v_engine.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The fields of a Wan VAE's config.json; the defaults are Wan2.1's.

    base_dim, decoder_base_dim: channels of the first stage, and of the decoder's last one (None:
        the same). dim_mult: these times so much, stage by stage. num_res_blocks: blocks of a stage.
    temperal_downsample: whether a stage halves the frames too, for all but the last (diffusers
        spells it so). dropout: of training alone. attn_scales: attention outside of the middle,
        which no Wan model has. is_residual, patch_size: Wan2.2's shortcuts and pixel patches.

    Raises:
        RequestError: a field of another type, or fields that contradict each other.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    # fmt: off
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )
    # fmt: on
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> AutoencoderConfig:
        """What a config.json says; fields that are none of these are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in fields.items() if name in known})

    def __post_init__(self) -> None:
        fit_fields(self)
        sizes = (self.base_dim, self.decoder_width, self.z_dim, self.patch, *self.dim_mult)
        if min(sizes) < 1 or not self.dim_mult or self.num_res_blocks < 1:
            raise RequestError(
                "base_dim, decoder_base_dim, z_dim, patch_size, num_res_blocks and every dim_mult "
                "must be at least 1"
            )
        if self.attn_scales:
            raise RequestError(f"attn_scales must be empty, got {list(self.attn_scales)}")
        halvings = len(self.dim_mult) - 1
        pixels = 3 * self.patch**2
        expected: dict[str, tuple[object, object]] = {
            "the length of temperal_downsample": (len(self.temperal_downsample), halvings),
            "scale_factor_temporal": (
                self.scale_factor_temporal,
                2 ** sum(self.temperal_downsample),
            ),
            "scale_factor_spatial": (self.scale_factor_spatial, self.patch * 2**halvings),
            "in_channels": (self.in_channels, pixels),
            "out_channels": (self.out_channels, pixels),
        }
        for name, (got, due) in expected.items():
            if got != due:
                raise RequestError(
                    f"{name} is {got}, but dim_mult, temperal_downsample and patch_size make it "
                    f"{due}"
                )

    @property
    def decoder_width(self) -> int:
        return self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim

    @property
    def patch(self) -> int:
        return 1 if self.patch_size is None else self.patch_size


class Tiles(NamedTuple):
    """Overlapping squares that a large frame is cut into; both in latent rows or columns."""

    side: int
    stride: int


class Past:
    """The last frames of every causal layer's input, in one walk; none before its first chunk.

    Whoever keeps it between two walks goes on where the first one ended.
    """

    def __init__(self) -> None:
        self.frames: dict[nn.Module, Tensor] = {}
        self.is_first = True


class CausalConv3d(nn.Conv3d):
    """A convolution that sees no later frame: T becomes T / stride, rows and columns stay."""

    def __init__(
        self,
        width_in: int,
        width: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__(width_in, width, kernel, stride)
        self.num_kept = kernel[0] - stride[0]
        rows, columns = kernel[1] // 2, kernel[2] // 2
        self.margins = (columns, columns, rows, rows, self.num_kept, 0)

    def forward(self, x: Tensor, past: Past) -> Tensor:  # type: ignore[override]
        x = F.pad(x, self.margins)
        if self in past.frames:
            x[:, :, : self.num_kept] = past.frames[self]
        past.frames[self] = x[:, :, -self.num_kept :].clone()
        out: Tensor = super().forward(x)
        return out


class RMSNorm(nn.Module):
    """Channels of length sqrt(C) times a weight. num_axes: how many follow them, T H W or H W."""

    def __init__(self, width: int, num_axes: int = 3) -> None:
        super().__init__()
        self.scale: float = width**0.5
        self.gamma = nn.Parameter(torch.ones(width, *[1] * num_axes))

    def forward(self, x: Tensor) -> Tensor:
        is_half = x.dtype in (torch.float16, torch.bfloat16)
        # no name for the float32 copy, which would live longer
        normal = F.normalize(x.float() if is_half else x, dim=1).to(x.dtype)
        return normal * self.scale * self.gamma


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width_in)
        self.conv1 = CausalConv3d(width_in, width)
        self.norm2 = RMSNorm(width)
        self.conv2 = CausalConv3d(width, width)
        is_alike = width_in == width
        self.conv_shortcut = nn.Identity() if is_alike else nn.Conv3d(width_in, width, 1)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        shortcut: Tensor = self.conv_shortcut(x)
        x = self.conv1(F.silu(self.norm1(x)), past)
        x = self.conv2(F.silu(self.norm2(x)), past)
        return x + shortcut


class Attention(nn.Module):
    """Every frame's cells attend to each other; one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, num_axes=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return _frame_by_frame(self._attend, x) + x

    def _attend(self, frames: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)[:, None].contiguous()
        out = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        projected: Tensor = self.proj(out[:, 0].transpose(1, 2).unflatten(2, frames.shape[2:]))
        return projected


class MidBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(width)])
        self.resnets = nn.ModuleList([ResidualBlock(width, width) for _ in range(2)])

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, past))
        out: Tensor = self.resnets[1](x, past)
        return out


class Downsample(nn.Module):
    """Half the rows and columns and, if temporal, half the frames: of the first chunk its one."""

    def __init__(self, width: int, *, is_temporal: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(width, width, 3, stride=2)
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv)
        self.time_conv = CausalConv3d(width, width, (3, 1, 1), (2, 1, 1)) if is_temporal else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = _frame_by_frame(self.resample, x)
        if self.time_conv is None:
            return x
        if past.is_first:
            past.frames[self.time_conv] = x.clone()
            return x
        out: Tensor = self.time_conv(x, past)
        return out


class Upsample(nn.Module):
    """Twice the rows and columns and, if temporal, the frames: of the first chunk its one."""

    def __init__(self, width_in: int, width: int, *, is_temporal: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(width_in, width, 3, padding=1)
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"), conv)
        self.time_conv = CausalConv3d(width_in, 2 * width_in, (3, 1, 1)) if is_temporal else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        if self.time_conv is not None and not past.is_first:
            x = self.time_conv(x, past)
            x = x.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)  # the two halves turn about
        return _frame_by_frame(self.resample, x)


class Stage(nn.Module):
    """A stage of Wan2.1's decoder: blocks, and an upsampling unless it is the last."""

    def __init__(self, blocks: list[ResidualBlock], upsampler: Upsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(blocks)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(self, x: Tensor, past: Past) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, past)
        return x


class DownStage(nn.Module):
    """A stage of Wan2.2's encoder; around it, the mean of the values that become one.

    rates: how many frames, and how many rows and columns, become one.
    """

    def __init__(self, blocks: list[ResidualBlock], width: int, rates: tuple[int, int]) -> None:
        super().__init__()
        self.width, self.rates = width, rates
        self.resnets = nn.ModuleList(blocks)
        frames, side = rates
        self.downsampler = Downsample(width, is_temporal=frames > 1) if side > 1 else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        shortcut = self._mean(x)
        for block in self.resnets:
            x = block(x, past)
        if self.downsampler is not None:
            x = self.downsampler(x, past)
        return x + shortcut

    def _mean(self, x: Tensor) -> Tensor:
        frames, side = self.rates
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % frames, 0))
        x = x.unflatten(4, (-1, side)).unflatten(3, (-1, side)).unflatten(2, (-1, frames))
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).contiguous().flatten(1, 4)
        return torch.mean(x.unflatten(1, (self.width, -1)), dim=2)


class UpStage(nn.Module):
    """A stage of Wan2.2's decoder; around it, every value repeated where it becomes several."""

    def __init__(self, blocks: list[ResidualBlock], width: int, rates: tuple[int, int]) -> None:
        super().__init__()
        self.width, self.rates = width, rates
        self.resnets = nn.ModuleList(blocks)
        frames, side = rates
        self.upsampler = Upsample(width, width, is_temporal=frames > 1) if side > 1 else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        shortcut = x
        for block in self.resnets:
            x = block(x, past)
        if self.upsampler is None:
            return x
        x = self.upsampler(x, past)
        return x + self._repeated(shortcut, is_first=past.is_first)

    def _repeated(self, x: Tensor, *, is_first: bool) -> Tensor:
        frames, side = self.rates
        x = x.repeat_interleave(self.width * frames * side**2 // x.shape[1], dim=1)
        x = x.unflatten(1, (self.width, frames, side, side)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return x[:, :, frames - 1 :] if is_first else x


class Encoder(nn.Module):
    """Patches of a chunk's pixels [B, C, T, H, W] to the moments of its latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.base_dim * times for times in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        for rates, width_in, width in zip(_rates(config), widths, widths[1:], strict=False):
            blocks = _blocks(width_in, width, config.num_res_blocks)
            frames, side = rates
            if config.is_residual:
                _require_whole(width_in * frames * side**2, width)
                self.down_blocks.append(DownStage(blocks, width, rates))
                continue
            self.down_blocks.extend(blocks)
            if side > 1:
                self.down_blocks.append(Downsample(width, is_temporal=frames > 1))
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.conv_in(x, past)
        for block in self.down_blocks:
            x = block(x, past)
        x = self.mid_block(x, past)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)), past)
        return out


class Decoder(nn.Module):
    """One latent frame [B, C, 1, H, W] to the patches of its chunk's pixels."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        multiples = (config.dim_mult[-1], *reversed(config.dim_mult))
        widths = [config.decoder_width * times for times in multiples]
        self.conv_in = CausalConv3d(config.z_dim, widths[0])
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        *halving, last = _rates(config)
        for index, rates in enumerate([*reversed(halving), last]):
            width_in, width = widths[index : index + 2]
            frames, side = rates
            if config.is_residual:
                if side > 1:
                    _require_whole(width * frames * side**2, width_in)
                blocks = _blocks(width_in, width, config.num_res_blocks + 1)
                self.up_blocks.append(UpStage(blocks, width, rates))
                continue
            # Wan2.1's upsampling halves the channels
            blocks = _blocks(width_in // 2 if index else width_in, width, config.num_res_blocks + 1)
            up = Upsample(width, width // 2, is_temporal=frames > 1) if side > 1 else None
            self.up_blocks.append(Stage(blocks, up))
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.out_channels)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.mid_block(self.conv_in(x, past), past)
        for block in self.up_blocks:
            x = block(x, past)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)), past)
        return out


class Autoencoder(nn.Module):
    """A Wan VAE's encoder and decoder, of any of its shapes.

    fields: what a config.json says, by `AutoencoderConfig`'s names; fields that this model does not
        know are kept in `fields` and change nothing.

    Raises:
        RequestError: see `AutoencoderConfig`.
    """

    def __init__(self, fields: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        given = {name: value for name, value in (fields or {}).items() if not name.startswith("_")}
        self.config = AutoencoderConfig.of(given)
        self.fields = dataclasses.asdict(AutoencoderConfig()) | given
        width = self.config.z_dim
        self.encoder = Encoder(self.config)
        self.quant_conv = nn.Conv3d(2 * width, 2 * width, 1)
        self.post_quant_conv = nn.Conv3d(width, width, 1)
        self.decoder = Decoder(self.config)

    def encode(
        self,
        video: Tensor,
        *,
        tiles: Tiles | None = None,
        check: Callable[[], None] | None = None,
        pasts: list[Past] | None = None,
    ) -> Tensor:
        """Pixels [B, 3, T, height, width] in -1..1 to the posterior's mode [B, C, F, H, W].

        T is 1 + scale_factor_temporal (F - 1), behind earlier frames scale_factor_temporal F.
        tiles: into what larger frames are cut; None leaves them whole. check: called before every
        chunk of every tile. pasts: what earlier frames of the same video left, one of every tile;
        empty before the first ones, which fill it. None: these are all.
        """
        rate, cells = self.config.scale_factor_temporal, self.config.scale_factor_spatial
        past_of = _pasts_by_tile(pasts)

        def whole(pixels: Tensor) -> Tensor:
            past = past_of()
            first = 1 if past.is_first else rate
            sizes = [first, *[rate] * ((pixels.shape[2] - first) // rate)]
            patches = (_patched(chunk, self.config.patch) for chunk in pixels.split(sizes, dim=2))
            moments: Tensor = self.quant_conv(_walk(self.encoder, patches, check, past))
            return moments

        moments = _by_tiles(whole, video, tiles, before=cells, after=1)
        return moments.chunk(2, dim=1)[0]

    def decode(
        self,
        latents: Tensor,
        *,
        tiles: Tiles | None = None,
        check: Callable[[], None] | None = None,
        pasts: list[Past] | None = None,
    ) -> Tensor:
        """The inverse of `encode`; pixels are not clamped.

        pasts: what earlier latents of the same video left, one of every tile; empty before the
        first ones, which fill it. None: these are all.
        """
        past_of = _pasts_by_tile(pasts)

        def whole(part: Tensor) -> Tensor:
            frames = iter(self.post_quant_conv(part).split(1, dim=2))
            return _walk(self.decoder, frames, check, past_of())

        patch = self.config.patch
        cells = self.config.scale_factor_spatial // patch
        return _pixels(_by_tiles(whole, latents, tiles, before=1, after=cells), patch)


def _pasts_by_tile(pasts: list[Past] | None) -> Callable[[], Past]:
    """Gives the past of one tile after the other, and makes those that are not there yet."""
    if pasts is None:
        return Past
    walks = count()

    def past_of() -> Past:
        tile = next(walks)
        if tile == len(pasts):
            pasts.append(Past())
        return pasts[tile]

    return past_of


def _walk(
    part: nn.Module, chunks: Iterator[Tensor], check: Callable[[], None] | None, past: Past
) -> Tensor:
    done = []
    for chunk in chunks:
        if check is not None:
            check()
        done.append(part(chunk, past))
        past.is_first = False
    return torch.cat(done, dim=2)


def _by_tiles(
    run: Callable[[Tensor], Tensor], x: Tensor, tiles: Tiles | None, *, before: int, after: int
) -> Tensor:
    """Run overlapping tiles of x one by one, and blend each into those above and left of it.

    before, after: cells of a latent cell's width, before and after `run`.
    """
    if tiles is None or max(x.shape[-2:]) <= tiles.side * before:
        return run(x)
    side, stride = tiles.side * before, tiles.stride * before
    overlap, shown = (tiles.side - tiles.stride) * after, tiles.stride * after
    rows: list[Tensor] = []
    above: list[Tensor] = []
    for top in range(0, x.shape[-2], stride):
        row: list[Tensor] = []
        for left in range(0, x.shape[-1], stride):
            tile = run(x[..., top : top + side, left : left + side])
            if above:
                tile = _blended(above[len(row)], tile, overlap, dim=-2)
            if row:
                tile = _blended(row[-1], tile, overlap, dim=-1)
            row.append(tile)
        rows.append(torch.cat([tile[..., :shown, :shown] for tile in row], dim=-1))
        above = row
    return torch.cat(rows, dim=-2)


def _blended(first: Tensor, second: Tensor, overlap: int, *, dim: int) -> Tensor:
    """`second`, whose beginning comes out of the end of `first` by degrees."""
    count = min(first.shape[dim], second.shape[dim], overlap)
    # weights are exact to fp32 whatever the model computes in
    exact = torch.promote_types(second.dtype, torch.float32)
    kind: dict[str, Any] = {"dtype": exact, "device": second.device}
    share = torch.tensor([step / count for step in range(count)], **kind)
    rest = torch.tensor([1 - step / count for step in range(count)], **kind)
    if dim == -2:
        share, rest = share[:, None], rest[:, None]
    begin, end = second.split([count, second.shape[dim] - count], dim)
    old = first.narrow(dim, first.shape[dim] - count, count)
    mixed = (old * rest).to(second.dtype) + (begin * share).to(second.dtype)
    return torch.cat([mixed, end], dim)


def _frame_by_frame(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run [B T, C, H, W] on a video [B, C, T, H, W]."""
    out = run(x.transpose(1, 2).flatten(0, 1))
    video: Tensor = out.unflatten(0, (len(x), -1)).transpose(1, 2)
    return video


def _patched(x: Tensor, patch: int) -> Tensor:
    """[B, C, T, H p, W p] to [B, C p p, T, H, W]; a patch's columns come before its rows."""
    if patch == 1:
        return x
    x = x.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def _pixels(x: Tensor, patch: int) -> Tensor:
    """The inverse of `_patched`."""
    if patch == 1:
        return x
    x = x.unflatten(1, (-1, patch, patch)).permute(0, 1, 4, 5, 3, 6, 2)
    return x.flatten(5, 6).flatten(3, 4)


def _rates(config: AutoencoderConfig) -> list[tuple[int, int]]:
    """The factors by which each of the encoder's stages divides frames, and rows and columns."""
    return [(2 if is_temporal else 1, 2) for is_temporal in config.temperal_downsample] + [(1, 1)]


def _blocks(width_in: int, width: int, count: int) -> list[ResidualBlock]:
    return [ResidualBlock(width if index else width_in, width) for index in range(count)]


def _require_whole(values: int, groups: int) -> None:
    if values % groups:
        raise RequestError(
            f"dim_mult makes a shortcut of {values} values into {groups}; expected a multiple"
        )
