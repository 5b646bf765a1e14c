"""The shape of a transformer, and those of the known models.

C transformer width, k spatial patch of a tokenizer.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from mv2v_engine import arguments
from mv2v_engine.errors import RequestError

CameraConditioning = Literal["own", "target", "none"]
CameraAttention = Literal[
    "none", "prope", "prope_fused", "prope_dual", "prope_fused_dual", "phases"
]
HistoryBranches = Literal["both", "hr", "lr", "kernel"]

_HISTORY_LAYERS = 4
# tokens of CLIP's ViT-H/14 at 224 pixels: one of the whole image, 16x16 patches
IMAGE_TOKENS = 257


@dataclass(frozen=True, kw_only=True, slots=True)
class MergerConfig:
    """The convolution C_theta that fuses a frame's neighbouring tokens (METHOD 7, Eq. 6).

    kernel: rows and columns, equal to the stride. groups: 1 dense, C depth-wise.
    pooled: average the cells first and apply a linear layer (a 1x1 kernel's weights).
    shared: one module serves every merging block.
    """

    kernel: tuple[int, int] = (2, 2)
    groups: int = 1
    bias: bool = True
    pooled: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        if min(self.kernel) < 1 or self.kernel == (1, 1):
            raise RequestError(f"a merge kernel must cover at least two cells, got {self.kernel}")


def rate_of(rate: str) -> tuple[int, int, int]:
    """Rows, columns and latent frames of a rate of history tokens, as "4x4x2".

    Raises:
        RequestError: it is no rate that four convolutions of strides 1 and 2 reach.
    """
    parts = rate.split("x") if isinstance(rate, str) else []
    if len(parts) == 3 and parts[0] == parts[1] and set(parts) <= {"1", "2", "4", "8"}:
        rows, columns, frames = (int(part) for part in parts)
        # the patches below the rate are one more halving
        if rows.bit_length() + frames.bit_length() - 1 <= _HISTORY_LAYERS:
            return rows, columns, frames
    raise RequestError(
        f"a rate of history tokens is ROWSxCOLUMNSxFRAMES with as many rows as columns, powers of "
        f"two that {_HISTORY_LAYERS} convolutions reach, as 4x4x2, 2x2x2 or 2x2x1, got {rate!r}"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryConfig:
    """Shape of TinyHistory's encoders of remembered videos (METHOD 17).

    rates: 1x2x2 patches and latent frames that a token covers, as "4x4x2", an encoder each; the
        first is the default. channels: of the four convolutions of the branch at full resolution,
        the last of them with attention of so many heads.
    branches: of which a token is the sum; one alone is an ablation, and so is "kernel", one large
        trained patch embedding as the tokenizers are.
    cross_attention: blocks that also attend to the encoder's last hidden states.
    """

    rates: tuple[str, ...] = ("4x4x2",)
    channels: tuple[int, int, int, int] = (64, 128, 256, 512)
    heads: int = 8
    branches: HistoryBranches = "both"
    cross_attention: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.rates or len(self.channels) != _HISTORY_LAYERS:
            raise RequestError(
                f"a history encoder has a rate at least and {_HISTORY_LAYERS} numbers of channels, "
                f"got rates {self.rates} and channels {self.channels}"
            )
        for rate in self.rates:
            rate_of(rate)
        arguments.choice("branches", self.branches, get_args(HistoryBranches))
        if self.channels[-1] % (2 * self.heads):
            raise RequestError(
                f"{self.heads} heads of history attention do not divide {self.channels[-1]} "
                "channels into even parts"
            )
        if self.cross_attention and not self.has_convolutions:
            raise RequestError(
                "cross_attention reads the full-resolution branch, which branches="
                f"{self.branches!r} leaves out"
            )

    @property
    def has_convolutions(self) -> bool:
        """Whether there is a branch at full resolution."""
        return self.branches in ("both", "hr")


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Shape of an `MV2VTransformer`; the words are diffusers' `WanTransformer3DModel`'s.

    source_channels: how many of in_channels, the last ones, hold the source's latents beside the
        target's (Lucy-Edit); 0 where a source is tokens of its own.
    vace_layers: blocks to whose target tokens VACE's own blocks add a hint of the source, one each;
        empty for a model without them. Its source_channels are VACE's context, which has a patch
        embedding of its own.
    tokenizers: spatial patches k of the conditioning tokenizers, empty for a base without them.
    merge_blocks: 0-indexed blocks before whose attention tokens merge; None takes METHOD 7's
        thirds. camera_conditioning: whose camera a conditioning token gets (METHOD 5); "none"
        for a base without camera modules.
    camera_attention: PRoPE inside self-attention (METHOD 5), which has no weights: "prope" turns
        the first half of a head's channels by cameras and the others by positions, "prope_fused"
        all of them by both; "_dual" takes the inverse transpose of every matrix. scene_scale:
        metres that are 1 there. "phases" is ReDirector's: an adapter makes tokens of the cameras'
        rays, which are added to the videos' and turn q, k, v and the result by learned phases.
    shared_time: the source and the memory have the target's temporal ids, in place of later ones.
    source_ids: an editor whose source is tokens of its own, and whose videos have ids beside their
        positions (Bernini): id n turns all pairs of a head's channels as position n would.
    camera_actions: a layer of every frame's camera is added to its tokens in every block
        (Echo-Memory); action_attention: attention over frames makes of them what is added.
        state_space: blocks with a state that runs from the context through the target's frames.
    context_frames: how many of the source's latent frames, the first ones, are its segment; 0 all.
    image_dim: channels of the image tokens that cross-attention reads beside the text, CLIP's of
        the source's first frame; 0 for a model without them.
    has_end_time: the weights are a flow map (METHOD 8): they are also told the time to which a step
        goes, by a second time embedding.
    history: the encoders of remembered videos beside the tokenizers; None for a model without.
    """

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    source_channels: int = 0
    vace_layers: tuple[int, ...] = ()
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    eps: float = 1e-6
    rope_theta: float = 10000.0
    camera_conditioning: CameraConditioning = "own"
    tokenizers: tuple[int, ...] = (2, 4, 8)
    merger: MergerConfig | None = MergerConfig()
    merge_blocks: tuple[int, ...] | None = None
    camera_attention: CameraAttention = "none"
    scene_scale: float = 4.0
    shared_time: bool = False
    source_ids: bool = False
    camera_actions: bool = False
    action_attention: bool = False
    state_space: tuple[int, ...] = ()
    context_frames: int = 0
    image_dim: int = 0
    has_end_time: bool = False
    history: HistoryConfig | None = None

    def __post_init__(self) -> None:
        if self.attention_head_dim % 2:
            raise RequestError(f"attention_head_dim must be even, got {self.attention_head_dim}")
        if any(k % 2 or k < 2 for k in self.tokenizers):
            raise RequestError(f"tokenizer patches must be even, got {self.tokenizers}")
        self._check_vace()
        if (
            self.source_channels
            and not self.vace_layers
            and not (self.source_channels == self.out_channels == self.latent_channels)
        ):
            raise RequestError(
                "a source on channels has as many as the target: expected in_channels twice "
                f"out_channels, got {self.in_channels} in, {self.out_channels} out and "
                f"source_channels {self.source_channels}"
            )
        depth = self.num_layers
        if self.merge_blocks is None:
            blocks = (depth // 3, 2 * depth // 3) if depth >= 3 else ()
            object.__setattr__(self, "merge_blocks", blocks)
        if any(not 0 <= block < depth for block in self.merging_blocks):
            raise RequestError(f"merge_blocks {self.merge_blocks} must lie below {depth} blocks")
        attending = self.history.cross_attention if self.history else ()
        if any(not 0 <= block < depth for block in attending):
            raise RequestError(f"cross_attention {attending} must lie below {depth} blocks")
        if attending and self.vace_layers:
            raise RequestError("VACE's blocks attend to no history; leave cross_attention out")
        self._check_cameras()

    def _check_vace(self) -> None:
        layers = self.vace_layers
        if not layers:
            return
        is_rising = all(a < b for a, b in pairwise((-1, *layers, self.num_layers)))
        if not is_rising or layers[0] != 0:
            raise RequestError(
                f"vace_layers must rise from 0 and lie below {self.num_layers} blocks, got {layers}"
            )
        if not self.source_channels or self.latent_channels != self.out_channels:
            raise RequestError(
                "VACE takes its context beside the target: expected in_channels of out_channels "
                f"and source_channels, got {self.in_channels} in, {self.out_channels} out and "
                f"source_channels {self.source_channels}"
            )

    def _check_cameras(self) -> None:
        for name, known in (
            ("camera_conditioning", CameraConditioning),
            ("camera_attention", CameraAttention),
        ):
            arguments.choice(name, getattr(self, name), get_args(known))
        arguments.number("scene_scale", self.scene_scale, 1e-3, 1e6)
        if self.history and self.camera_conditioning == "target":
            raise RequestError(
                "a history's tokens take the cameras of their own frames, "
                'camera_conditioning="target" has the target\'s alone; give "own", as '
                'training.finetune makes it, or "none"'
            )
        if self.camera_attention == "none":
            return
        if self.camera_attention == "phases":
            if self.camera_conditioning != "none":
                raise RequestError(
                    'camera_attention="phases" has the cameras\' rays in place of '
                    f'camera_conditioning, got {self.camera_conditioning!r}; give "none"'
                )
            return
        if self.camera_conditioning == "target":
            raise RequestError(
                f"camera_attention={self.camera_attention!r} compares the cameras of all videos, "
                'camera_conditioning="target" has the target\'s alone; give "own" or "none"'
            )
        if self.camera_channels % 4:
            raise RequestError(
                f"camera_attention={self.camera_attention!r} turns channels by fours: "
                f"attention_head_dim must be a multiple of {4 if self._is_fused else 8}, got "
                f"{self.attention_head_dim}"
            )

    @property
    def dim(self) -> int:
        """C, the transformer width."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """The channels of one video's latents."""
        return self.in_channels - self.source_channels

    def channels_of(self, role: str) -> int:
        """The channels of a segment's latents: the target's may hold the source's, too."""
        return self.in_channels if role == "target" else self.latent_channels

    @property
    def is_editor(self) -> bool:
        """Whether it edits by instruction; else it renders novel views."""
        return self.source_channels > 0 or self.source_ids

    @property
    def has_camera(self) -> bool:
        """Whether its videos come with cameras."""
        modules = self.has_camera_modules or self.camera_actions
        return modules or self.camera_attention != "none"

    @property
    def is_by_frames(self) -> bool:
        """Whether blocks have operations over all frames of a place, beside attention."""
        return self.action_attention or bool(self.state_space)

    @property
    def has_camera_modules(self) -> bool:
        """`cam_encoder` and `projector` in every block."""
        return self.camera_conditioning != "none"

    @property
    def camera_dim(self) -> int:
        """Numbers of a frame's camera: the pose, and its intrinsics where attention needs them.

        With phases a latent frame has the cameras of its four frames.
        """
        if self.has_phases:
            return 4 * 16
        return 12 if self.camera_attention == "none" else 16

    @property
    def has_phases(self) -> bool:
        """Whether rays of cameras are tokens, and phases in attention."""
        return self.camera_attention == "phases"

    @property
    def num_phases(self) -> int:
        """How many of a head's pairs of channels, its last ones, phases turn: rows and columns."""
        return 2 * (self.attention_head_dim // 6)

    @property
    def camera_channels(self) -> int:
        """How many of a head's channels, its first ones, attention turns by cameras."""
        if self.camera_attention == "none" or self.has_phases:
            return 0
        return self.attention_head_dim if self._is_fused else self.attention_head_dim // 2

    @property
    def rotary_dim(self) -> int:
        """How many of a head's channels, its last ones, turn with time, row and column."""
        unturned = 0 if self._is_fused else self.camera_channels
        return self.attention_head_dim - unturned

    @property
    def _is_fused(self) -> bool:
        return self.camera_attention.startswith("prope_fused")

    @property
    def merging_blocks(self) -> tuple[int, ...]:
        return self.merge_blocks or ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TextShape:
    """Shape of a UMT5 encoder, whose words are transformers' `UMT5Config`'s."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32

    @property
    def num_parameters(self) -> int:
        """Every block: q, k, v, o, a table of relative positions, the gated feed-forward, norms."""
        attention = 4 * self.d_model * self.d_kv * self.num_heads
        positions = self.relative_attention_num_buckets * self.num_heads
        block = attention + positions + 3 * self.d_model * self.d_ff + 2 * self.d_model
        return self.vocab_size * self.d_model + self.num_layers * block + self.d_model

    def quantizable_bytes(self, element: int) -> int:
        """What eight bits save of linear layers of so many bytes an element: a byte each stays, and
        a float32 scale a row."""
        inner = self.d_kv * self.num_heads
        weights = 4 * self.d_model * inner + 3 * self.d_model * self.d_ff
        rows = 3 * inner + 2 * self.d_model + 2 * self.d_ff
        return self.num_layers * ((element - 1) * weights - 4 * rows)


# what all of Wan's models read their prompts with
UMT5_XXL = TextShape(
    vocab_size=256_384, d_model=4096, d_kv=64, d_ff=10_240, num_layers=24, num_heads=64
)

# Wan2.1-T2V-1.3B with ReCamMaster's camera modules and Memory-V2V's tokenizers and mergers.
WAN_1_3B = TransformerConfig(
    num_layers=30,
    num_attention_heads=12,
    attention_head_dim=128,
    ffn_dim=8960,
    in_channels=16,
    out_channels=16,
)

# Wan2.2-TI2V-5B with Memory-V2V's tokenizers and mergers, no camera.
WAN_5B = TransformerConfig(
    num_layers=30,
    num_attention_heads=24,
    attention_head_dim=128,
    ffn_dim=14336,
    in_channels=48,
    out_channels=48,
    camera_conditioning="none",
)

# Lucy-Edit: the same with the source on the target's channels; memory is extra tokens.
LUCY_5B = dataclasses.replace(WAN_5B, in_channels=96, source_channels=48)

# Wan2.1-VACE-1.3B: a block of its own beside every second one; its context are two videos' latents
# and a mask's 8x8 pixels.
VACE_1_3B = dataclasses.replace(
    WAN_1_3B,
    in_channels=112,
    source_channels=96,
    vace_layers=tuple(range(0, 30, 2)),
    camera_conditioning="none",
    merger=None,
)

# The embedded default's transformer, small enough to be trained and run on two CPU cores.
TINY = TransformerConfig(
    num_layers=8,
    num_attention_heads=3,
    attention_head_dim=48,
    ffn_dim=576,
    in_channels=16,
    out_channels=16,
    text_dim=64,
    text_len=8,
    freq_dim=128,
)

# The embedded editing model's: for instructions. Wider, for target and source share a token.
TINY_EDIT = TransformerConfig(
    num_layers=5,
    num_attention_heads=5,
    attention_head_dim=48,
    ffn_dim=720,
    in_channels=32,
    out_channels=16,
    source_channels=16,
    text_dim=64,
    text_len=16,
    freq_dim=128,
    camera_conditioning="none",
    merger=MergerConfig(shared=True),
)
