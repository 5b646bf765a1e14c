"""Peak bytes of a turn's forwards from the plan alone: the tensors alive at once, batch of one.

Counted in rows: a row is one token's C elements. A block that enters with L tokens holds, beside
the L rows that it was given, at its fullest moments
    the modulated rows, q, k's projection and k;  or q, k, v and what attention makes of them:  5 L
    the next sum and its norm, the feed-forward's result and the hidden rows of one chunk:
    4 L rows and chunk H.
With static conditioning the target's moments come on top of the conditioning's K and V of all
blocks so far, and of one copy that joins them to the target's own. What a library allocates inside
an operation is not seen. t target tokens, c conditioning tokens, L = t + c.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from mv2v_engine.shapes import IMAGE_TOKENS
from mv2v_engine.tokens.encoders import history_peak
from mv2v_engine.tokens.flops import residual_bytes
from mv2v_engine.tokens.plan import TokenPlan


@dataclass(frozen=True, slots=True)
class Execution:
    """What the arithmetic must know of the way a forward runs.

    element_bytes: of a token's element. chunk: the feed-forward's tokens at once, None for all.
    is_fused: operations are kernels, without intermediates of their own; the reference has
    float32 ones. residuals: of skipped steps, one a guidance branch. is_quantized: a layer makes
    its weight when it is used.
    """

    element_bytes: int
    chunk: int | None = None
    is_fused: bool = True
    residuals: int = 0
    is_quantized: bool = False


def forward_peak_bytes(plan: TokenPlan, execution: Execution) -> int:
    """The most that a forward has made and not freed, and with static conditioning a whole turn.

    What a turn keeps of the conditioning is part of it; weights and inputs are not. With scope
    "joint" the lengths depend on data, so that of no merge is taken.
    """
    steps = () if plan.scope == "joint" else plan.merge_steps
    lengths = plan.lengths_by_block(steps)
    block = _Block(plan, execution)
    if plan.conditioning == "joint":
        peak = max(block.joint(length) + _merged_table(plan, length) for length in lengths)
    else:
        own = [length - plan.target.length for length in lengths]
        kept = [0, *accumulate(2 * block.row * count for count in own)]
        first = (
            before + block.static(count) + _merged_table(plan, length)
            for before, count, length in zip(kept, own, lengths, strict=False)
        )
        chosen = (kept[step.block] + block.choose(step.before.length) for step in steps)
        later = (kept[-1] + block.over_kept(count) for count in own)
        peak = max(*first, *chosen, *later)
    table = plan.length * plan.shape.attention_head_dim * 4
    # what a branch's blocks added to the target's tokens, and those as they were before
    residuals = 2 * execution.residuals * residual_bytes(plan, execution.element_bytes)
    rays = plan.length * block.row if plan.shape.has_phases else 0
    image = IMAGE_TOKENS * block.row if plan.shape.image_dim else 0
    # tokens by their places, and attention's
    places = 3 * plan.length * block.row if plan.shape.is_by_frames else 0
    # VACE's context, what it becomes, its hint, and the target's tokens with it
    vace = 4 * plan.target.length * block.row if plan.shape.vace_layers else 0
    more = rays + image + places + vace
    if plan.attended_history is not None:
        length, channels = plan.attended_history
        more += length * channels * execution.element_bytes
    for each in plan.segments if plan.shape.history is not None else ():
        if each.encoder == "history" and plan.shape.history is not None:
            size = (each.grid, each.tokenizer, each.frames_per_token)
            made = history_peak(plan.shape.history, plan.shape.latent_channels, *size)
            # beside the tokens of all segments
            peak = max(peak, made * execution.element_bytes + plan.length * block.row)
    return peak + more + residuals + table + plan.shape.text_len * block.row


def _merged_table(plan: TokenPlan, length: int) -> int:
    """The float32 rotary table of tokens that have merged, beside the plan's."""
    return length * plan.shape.attention_head_dim * 4 if length < plan.length else 0


class _Block:
    """The fullest moments of a block in bytes."""

    def __init__(self, plan: TokenPlan, execution: Execution) -> None:
        self.plan, self.run, self.target = plan, execution, plan.target.length
        self.row = plan.shape.dim * execution.element_bytes
        self.hidden_row = plan.shape.ffn_dim * execution.element_bytes
        made = plan.shape.dim * execution.element_bytes if execution.is_quantized else 0
        self.square_weight, self.ffn_weight = made * plan.shape.dim, made * plan.shape.ffn_dim
        self.widened = 4 * plan.shape.dim if execution.element_bytes < 4 else 0
        # what the reference holds: q or k normalised in float32; narrow ones are widened before and
        # rounded, and scaled, after. A LayerNorm's result, scaled, shifted
        self.rotating = 0 if execution.is_fused else plan.shape.dim * 4
        if self.rotating and self.widened:
            self.rotating += self.widened + 2 * self.row
        if plan.shape.has_phases:
            # turned by phases in float32, as pairs that are put together again
            self.rotating = max(self.rotating, plan.shape.dim * 12)
        history = plan.attended_history
        self.history = 0 if history is None else 2 * history[0] * self.row
        self.norming = 0 if execution.is_fused else plan.shape.dim * 12

    def joint(self, length: int) -> int:
        """All tokens together."""
        attend = max(self._attend(length), self._read_history(length))
        return max(length * self.row + attend, self._feed_forward(length))

    def static(self, own: int) -> int:
        """The conditioning by itself, whose K and V stay, then the target over both."""
        length, kept = self.target + own, 2 * own * self.row
        conditioning = max(
            self._attend(own),
            kept + own * max(4 * self.row, 2 * self.row + self.norming),
            kept + self._feed_forward(own) - own * self.row,
        )
        after = own * self.row + kept
        joined = (2 * self.target + 2 * length) * self.row
        forward = self._feed_forward(self.target) - self.target * self.row
        attend = max(self._attend(self.target), self._read_history(self.target))
        target = max(attend, joined, forward)
        return length * self.row + max(conditioning, after + target)

    def choose(self, length: int) -> int:
        """Before a merge: the target's queries and the conditioning's keys, without positions."""
        own = length - self.target
        keys = own * max(self.row, self.rotating)
        return (2 * length + self.target + own) * self.row + keys

    def over_kept(self, own: int) -> int:
        """The target alone, over what was kept."""
        joined = (2 * self.target + 2 * (self.target + own)) * self.row
        read = max(self._attend(self.target), self._read_history(self.target))
        attend = self.target * self.row + max(read, joined)
        return max(attend, self._feed_forward(self.target))

    def _attend(self, length: int) -> int:
        """q, k and v of so many tokens, beside the tokens."""
        projecting = 3 * length * self.row + self.square_weight
        return max(length * (4 * self.row + self.rotating), projecting)

    def _read_history(self, length: int) -> int:
        """What so many tokens read of a history, beside the tokens: its k and v; the next sum, its
        norm, the text's result, and two rows a token from queries to what is added."""
        return 5 * length * self.row + self.history if self.history else 0

    def _feed_forward(self, length: int) -> int:
        """The feed-forward of so many tokens, which it counts too."""
        at_once = min(length, self.run.chunk or length)
        hidden = at_once * self.hidden_row
        if self.run.is_fused or not self.widened:
            return 4 * length * self.row + hidden + self.ffn_weight
        # the GELU's input and output, of narrow elements; in one piece, the result comes after
        made = 4 if at_once < length else 3
        whole = max(made * length * self.row + 2 * hidden, 4 * length * self.row + hidden)
        return whole + self.ffn_weight
