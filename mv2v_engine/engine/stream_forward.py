"""A causal model's forward, captured once its stream's window is full.

From then on a block's forwards differ in numbers alone: K and V are written to the same places, and
seen with the same positions. A stream that fills its window, or reads a new prompt, runs eagerly. A
graph reads the stream's own cache, so it is of one stream and one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mv2v_engine.engine.graphs import Graphs
from mv2v_engine.engine.step import Conditioning, StepBuffers
from mv2v_engine.errors import RequestError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.stream_cache import StreamCache
from mv2v_engine.tokens.plan import TokenPlan

_KINDS = ("stream",)
_FILLS = "the window is not full yet"


class StreamForward:
    """Called as the transformer is; the graphs are leased from call to call.

    Raises:
        RequestError: graphs="on", and the cache grows with every block.
    """

    def __init__(self, transformer: MV2VTransformer, graphs: Graphs, policy: str) -> None:
        if graphs.mode == "on" and policy == "all":
            raise RequestError(
                'graphs="on" cannot be met by a stream of policy "all", whose blocks see more and '
                'more; use another policy, or graphs="auto"'
            )
        self._transformer, self._graphs, self._grows = transformer, graphs, policy == "all"
        self._owner: object = None
        self._reason: str | None = _FILLS
        self._steps = {"eager_steps": 0, "captured_steps": 0, "replayed_steps": 0}

    def __call__(
        self,
        latents: Sequence[Tensor],
        timestep: Tensor,
        text: Tensor,
        *,
        plan: TokenPlan,
        stream: StreamCache,
    ) -> Tensor:
        """The velocity of a stream's newest block [B, C, F, H, W].

        Raises:
            KernelUnavailableError: graphs="on", and it cannot be captured.
        """
        if self._owner is not stream.era:
            self.close()
            self._owner = stream.era
        own = self._buffers(latents[0], timestep, text, stream)
        if own is None:
            self._steps["eager_steps"] += 1
            return self._eager(latents[0], timestep, text, stream)
        held = stream.capacity * stream.tokens_per_frame - plan.length
        lease = self._graphs.lease(self._transformer, plan, own, owner=stream.era, held=held)
        try:
            buffers = lease.buffers or own
            velocity = buffers.velocity
            assert velocity is not None

            def forward() -> tuple[str, ...]:
                given = buffers.latents, buffers.timestep, buffers.conditioning.text
                velocity.copy_(self._eager(*given, stream))
                return _KINDS

            lease.run(_KINDS, forward)
            report = lease.report(1)
            self._reason = report["reason"]
            for name in self._steps:
                self._steps[name] += report[name]
            # the next forward writes over it
            return velocity.clone()
        finally:
            lease.release()

    def _eager(
        self, latents: Tensor, timestep: Tensor, text: Tensor, stream: StreamCache
    ) -> Tensor:
        result: Tensor = self._transformer(
            [latents], timestep, text, plan=stream.plan, stream=stream
        )
        return result

    def _buffers(
        self, latents: Tensor, timestep: Tensor, text: Tensor, stream: StreamCache
    ) -> StepBuffers | None:
        """The tensors of a forward that may be captured; None: it may not."""
        if self._grows or stream.num_frames < stream.capacity or stream.text is None:
            self._reason = "every block sees more than the one before" if self._grows else _FILLS
            return None
        shape, dtype = self._transformer.config, self._transformer.patch_embedding.weight.dtype
        # of the same step as a turn's, which has more in it
        unused = timestep.new_zeros(1)
        return StepBuffers(
            latents,
            timestep,
            unused,
            unused,
            latents.new_zeros((len(latents), shape.out_channels, *latents.shape[2:]), dtype=dtype),
            unused,
            Conditioning([], None, text, None),
        )

    def report(self) -> dict[str, Any]:
        """How the forwards ran, what all graphs of the engine hold, and why the last one was not
        captured."""
        return {
            "mode": self._graphs.mode,
            **self._steps,
            "bytes": self._graphs.bytes(),
            "reason": self._reason,
        }

    def close(self) -> None:
        """Give back the graphs of this stream."""
        if self._owner is not None:
            self._graphs.forget(self._owner)
        self._owner = None
