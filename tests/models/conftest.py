"""A slow float64 transformer over a plan: one Python object a frame, one loop a rule.

It shares no code with the engine beyond the plan's segments: METHOD 3 to 7 and 13 written out,
for a batch of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear, silu

from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.tokens.plan import Segment, TokenPlan


@dataclass
class Frame:
    """One frame of one video: tokens x [P, C], their rotary factors [P, D / 2] (complex)."""

    index: int
    is_target: bool
    grid: tuple[int, int]
    x: Tensor
    turn: Tensor
    camera: Tensor | None
    is_candidate: bool


@dataclass
class Explicit:
    """velocity [C, F, H, W]; merged: block to frame indices; scores: block to index to R_t."""

    velocity: Tensor
    merged: dict[int, list[int]] = field(default_factory=dict)
    scores: dict[int, dict[int, float]] = field(default_factory=dict)
    conditioning: list[Tensor] = field(default_factory=list)


def _window(image: Tensor, row: int, column: int, height: int, width: int) -> Tensor:
    """A window of [rows, columns, ...]; past the border the border repeats."""
    rows = [min(row * height + i, image.shape[0] - 1) for i in range(height)]
    columns = [min(column * width + i, image.shape[1] - 1) for i in range(width)]
    return image[rows][:, columns]


def _turns(plan: TokenPlan, segment: Segment, frame: int) -> Tensor:
    """Mean of exp(i angle) over the 1x2x2 cells of every token of a frame."""
    dim, still = plan.shape.attention_head_dim, 0
    if plan.shape.camera_attention in ("prope", "prope_dual"):
        dim, still = dim // 2, dim // 4  # half of the channels are the cameras'
    axis = 2 * (dim // 6)
    dims, theta = (dim - 2 * axis, axis, axis), plan.shape.rope_theta
    last = [-(-size // 2) - 1 for size in segment.grid[1:]]
    extent = segment.tokenizer // 2
    tau = segment.tau + (segment.num_frames - 1 - frame if segment.reverse else frame)

    def cell(place: tuple[float, float, float]) -> Tensor:
        angles = [
            value * theta ** (-2 * i / size)
            for value, size in zip(place, dims, strict=True)
            for i in range(size // 2)
        ]
        angles = [0.0] * still + angles
        return torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles])

    tokens = []
    for row in range(segment.token_grid[0]):
        for column in range(segment.token_grid[1]):
            rows = [min(row * extent + i, last[0]) for i in range(extent)]
            columns = [min(column * extent + i, last[1]) for i in range(extent)]
            if plan.rope == "centre":
                centre = (float(tau), sum(rows) / extent, sum(columns) / extent)
                tokens.append(cell(centre))
            else:
                cells = [cell((tau, r, c)) for r in rows for c in columns]
                tokens.append(torch.stack(cells).mean(0))
    return torch.stack(tokens)


def _projection(camera: Tensor, scale: float) -> Tensor:
    """[K 0; 0 1] [R t; 0 1] of a camera-to-world pose and intrinsics: world to image [4, 4]."""
    to_world, k = torch.eye(4).double(), torch.eye(4).double()
    to_world[:3] = camera[:12].reshape(3, 4)
    to_world[:3, 3] /= scale
    k[0, 0], k[1, 1], k[0, 2], k[1, 2] = camera[12:]
    return k @ to_world.inverse()


class _Explicit:
    def __init__(self, model: MV2VTransformer, plan: TokenPlan) -> None:
        self.config, self.plan = model.config, plan
        self.w = {name: tensor.double() for name, tensor in model.state_dict().items()}
        self.heads = self.config.num_attention_heads
        self.head_mode = model.responsiveness_heads

    def lin(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def rms(self, name: str, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.eps).sqrt() * self.w[name]

    def time(self, timestep: float) -> tuple[Tensor, Tensor]:
        half = self.config.freq_dim // 2
        angles = [timestep * 10000 ** (-i / half) for i in range(half)]
        sinusoid = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        hidden = silu(self.lin("condition_embedder.time_embedder.linear_1", sinusoid.double()))
        temb = self.lin("condition_embedder.time_embedder.linear_2", hidden)
        projected = self.lin("condition_embedder.time_proj", silu(temb))
        return temb, projected.reshape(6, -1)

    def tokenize(self, latents: list[Tensor], cameras: Tensor | None) -> list[Frame]:
        frames: list[Frame] = []
        for segment, latent in zip(self.plan.segments, latents, strict=True):
            name = "patch_embedding"
            if segment.role != "target":
                name = f"tokenizers.{segment.tokenizer}"
            kernel, bias = self.w[f"{name}.weight"][:, :, 0], self.w[f"{name}.bias"]
            k, (rows, columns) = segment.tokenizer, segment.token_grid
            for number in range(segment.num_frames):
                image = latent[0, :, number].double().permute(1, 2, 0)
                tokens = [
                    torch.einsum("yxc,dcyx->d", _window(image, r, c, k, k), kernel) + bias
                    for r in range(rows)
                    for c in range(columns)
                ]
                camera = None
                if cameras is not None:
                    camera = cameras[0, segment.camera or 0, number].double()
                frames.append(
                    Frame(
                        index=len(frames),
                        is_target=segment.role == "target",
                        grid=(rows, columns),
                        x=torch.stack(tokens),
                        turn=_turns(self.plan, segment, number),
                        camera=camera,
                        is_candidate=segment.role != "target",
                    )
                )
        return frames

    def modulated(self, block: int, frame: Frame, six: Tensor) -> Tensor:
        """What q, k and v of the block are made from."""
        shift, scale = (self.w[f"blocks.{block}.scale_shift_table"][0] + six)[:2]
        hidden = layer_norm(frame.x, (self.config.dim,), eps=self.config.eps) * (1 + scale) + shift
        if frame.camera is not None and self.config.camera_conditioning != "none":
            hidden = hidden + self.lin(f"blocks.{block}.cam_encoder", frame.camera[:12])
        return hidden

    def scores(
        self, block: int, frames: list[Frame], six: Tensor, still: Tensor
    ) -> dict[int, float]:
        name = f"blocks.{block}.attn1"
        queries = [
            self.rms(
                f"{name}.norm_q.weight", self.lin(f"{name}.to_q", self.modulated(block, f, six))
            )
            for f in frames
            if f.is_target
        ]
        others = [f for f in frames if not f.is_target]
        means = torch.stack(
            [
                self.rms(
                    f"{name}.norm_k.weight",
                    self.lin(f"{name}.to_k", self.modulated(block, f, still)),
                ).mean(0)
                for f in others
            ]
        )
        q = torch.cat(queries)
        if self.head_mode == "concat":
            shares = (q @ means.T / math.sqrt(self.config.dim)).softmax(-1)
        else:
            per_head = zip(q.chunk(self.heads, -1), means.chunk(self.heads, -1), strict=True)
            scale = math.sqrt(self.config.attention_head_dim)
            shares = torch.stack([(a @ b.T / scale).softmax(-1) for a, b in per_head]).mean(0)
        best = shares.amax(0).tolist()
        return {f.index: value for f, value in zip(others, best, strict=True)}

    def choose(self, frames: list[Frame], scores: dict[int, float]) -> list[Frame]:
        """The frames to merge: least responsive first, the later one of equals."""
        candidates = [f for f in frames if f.is_candidate]
        groups: dict[tuple[int, int], list[Frame]] = {}
        for f in candidates:
            key = (0, 0) if self.plan.scope == "joint" else f.grid
            groups.setdefault(key, []).append(f)
        chosen = []
        for group in groups.values():
            group.sort(key=lambda f: (scores[f.index], -f.index))
            # METHOD 7's floor, on the decimal fraction
            count = math.floor(self.plan.merge_fraction * len(group) + 1e-9)
            chosen += group[:count]
        return chosen

    def fuse(self, block: int, frame: Frame) -> None:
        """One frame through C_theta, or its cells' mean; rotary factors always average."""
        merger = self.config.merger
        kernel = merger.kernel if merger else (2, 2)
        image, turn = (t.reshape(*frame.grid, -1) for t in (frame.x, frame.turn))
        grid = tuple(-(-size // step) for size, step in zip(frame.grid, kernel, strict=True))
        places = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
        windows = torch.stack([_window(image, r, c, *kernel) for r, c in places])
        frame.turn = torch.stack([_window(turn, r, c, *kernel).mean((0, 1)) for r, c in places])
        frame.grid, frame.is_candidate = (grid[0], grid[1]), False
        if merger is None:
            frame.x = windows.mean((1, 2))
            return
        name = f"mergers.{self.config.merging_blocks[0] if merger.shared else block}"
        weight, bias = self.w[f"{name}.weight"], self.w.get(f"{name}.bias")
        if merger.pooled:
            frame.x = linear(windows.mean((1, 2)), weight, bias)
        else:
            stacked = windows.permute(0, 3, 1, 2)
            frame.x = conv2d(stacked, weight, bias, groups=merger.groups).flatten(1)

    def heads_of(self, name: str, norm: str, x: Tensor, turn: Tensor | None) -> Tensor:
        """[N, P, D], normalised and rotated."""
        y = self.rms(norm, self.lin(name, x)).reshape(len(x), self.heads, -1)
        if turn is not None:
            pairs = torch.view_as_complex(y.reshape(*y.shape[:2], -1, 2).contiguous())
            y = torch.view_as_real(pairs * turn[:, None]).flatten(-2)
        return y.transpose(0, 1)

    def relative(self, f: Frame, seen: list[Frame]) -> Tensor | None:
        """What takes the keys and values of every token of `seen` to f's image [L, D, D]."""
        form = self.config.camera_attention
        if form == "none" or f.camera is None:
            return None
        dim, scale = self.config.attention_head_dim, self.config.scene_scale
        turned = dim if "fused" in form else dim // 2
        tokens = []
        for g in seen:
            assert g.camera is not None
            matrix = _projection(f.camera, scale) @ _projection(g.camera, scale).inverse()
            if form.endswith("dual"):
                matrix = matrix.inverse().T
            whole = torch.block_diag(*[matrix] * (turned // 4), torch.eye(dim - turned).double())
            tokens += [whole] * len(g.x)
        return torch.stack(tokens)

    def attend(
        self, name: str, q: Tensor, k: Tensor, values: Tensor, by: Tensor | None = None
    ) -> Tensor:
        v = self.lin(f"{name}.to_v", values).reshape(len(values), self.heads, -1).transpose(0, 1)
        if by is not None:
            k, v = ((by @ each[..., None])[..., 0] for each in (k, v))
        shares = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.lin(f"{name}.to_out.0", (shares @ v).transpose(0, 1).flatten(1))

    def block(self, i: int, frames: list[Frame], six: Tensor, still: Tensor, text: Tensor) -> None:
        name, eps, width = f"blocks.{i}", self.config.eps, (self.config.dim,)
        is_static = self.plan.conditioning == "static"
        own = {f.index: six if f.is_target or not is_static else still for f in frames}
        hidden = {f.index: self.modulated(i, f, own[f.index]) for f in frames}
        table = self.w[f"{name}.scale_shift_table"][0]
        updates = []
        for f in frames:
            seen = (
                frames if f.is_target or not is_static else [g for g in frames if not g.is_target]
            )
            values = torch.cat([hidden[g.index] for g in seen])
            turn = torch.cat([g.turn for g in seen])
            q = self.heads_of(
                f"{name}.attn1.to_q", f"{name}.attn1.norm_q.weight", hidden[f.index], f.turn
            )
            k = self.heads_of(f"{name}.attn1.to_k", f"{name}.attn1.norm_k.weight", values, turn)
            attended = self.attend(f"{name}.attn1", q, k, values, self.relative(f, seen))
            if self.config.camera_conditioning != "none":
                attended = self.lin(f"{name}.projector", attended)
            updates.append(f.x + attended * (table + own[f.index])[2])
        for f, x in zip(frames, updates, strict=True):
            if f.is_target or not is_static:
                normed = layer_norm(
                    x, width, self.w[f"{name}.norm2.weight"], self.w[f"{name}.norm2.bias"], eps
                )
                q, k = (
                    self.heads_of(f"{name}.attn2.to_{p}", f"{name}.attn2.norm_{p}.weight", t, None)
                    for p, t in (("q", normed), ("k", text))
                )
                x = x + self.attend(f"{name}.attn2", q, k, text)
            shift, scale, gate = (table + own[f.index])[3:]
            inner = layer_norm(x, width, eps=eps) * (1 + scale) + shift
            inner = gelu(self.lin(f"{name}.ffn.net.0.proj", inner), approximate="tanh")
            f.x = x + self.lin(f"{name}.ffn.net.2", inner) * gate

    def head(self, frames: list[Frame], temb: Tensor) -> Tensor:
        shift, scale = self.w["scale_shift_table"][0] + temb
        images = []
        for f in frames:
            if not f.is_target:
                continue
            x = layer_norm(f.x, (self.config.dim,), eps=self.config.eps) * (1 + scale) + shift
            patches = self.lin("proj_out", x).reshape(*f.grid, 2, 2, -1)
            rows = [
                torch.cat([patches[r, c, y] for c in range(f.grid[1])])
                for r in range(f.grid[0])
                for y in range(2)
            ]
            images.append(torch.stack(rows))
        return torch.stack(images).permute(3, 0, 1, 2)


@torch.no_grad()
def explicit_forward(
    model: MV2VTransformer,
    latents: list[Tensor],
    timestep: float,
    text: Tensor,
    plan: TokenPlan,
    cameras: Tensor | None,
) -> Explicit:
    """The velocity [C, F, H, W] of a batch of one, and what merged."""
    run = _Explicit(model, plan)
    temb, six = run.time(timestep)
    still = run.time(0.0)[1] if plan.conditioning == "static" else six
    embedder = "condition_embedder.text_embedder"
    context = gelu(run.lin(f"{embedder}.linear_1", text[0].double()), approximate="tanh")
    context = run.lin(f"{embedder}.linear_2", context)
    frames = run.tokenize(latents, cameras)
    result = Explicit(torch.empty(0))
    for block in range(model.config.num_layers):
        is_merging = plan.merge != "off" and block in model.config.merging_blocks
        if is_merging and any(f.is_candidate for f in frames):
            scores = run.scores(block, frames, six, still)
            chosen = run.choose(frames, scores)
            if chosen:
                result.scores[block] = scores
                result.merged[block] = sorted(f.index for f in chosen)
            for f in chosen:
                if plan.merge == "discard":
                    frames.remove(f)
                else:
                    run.fuse(block, f)
        run.block(block, frames, six, still, context)
        result.conditioning.append(torch.cat([f.x for f in frames if not f.is_target] or [text[0]]))
    result.velocity = run.head(frames, temb)
    return result


@pytest.fixture
def explicit() -> Callable[..., Explicit]:
    """`explicit_forward(model, latents, timestep, text, plan, cameras)`."""
    return explicit_forward
