"""What an edit is asked for, checked before anything is computed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mv2v_engine import arguments
from mv2v_engine.config import MemoryMode, SamplingConfig
from mv2v_engine.engine.request import sampled
from mv2v_engine.errors import RequestError

if TYPE_CHECKING:
    from mv2v_engine.engine.engine import Engine

_MODES: tuple[MemoryMode, ...] = ("retrieved", "none")
# the engine's settings on which an edit's latents depend, beside its own weights
_SETTINGS = (
    "max_memory",
    "cross_shot_similarity",
    "memory_tokenizers",
    "merge_scope",
    "merge_fraction",
    "rope",
    "responsiveness_heads",
    "conditioning",
    "step_cache",
)
# what older folders hold of a choice that is gone, where nothing was reused
_EXACT = {"reuse": "exact", "reuse_refresh": 4, "reuse_drift": 0.1}


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """One instruction for the whole of a video. Two equal requests give the same edit."""

    prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    memory: MemoryMode

    @classmethod
    def of(
        cls,
        prompt: str,
        sampling: SamplingConfig,
        *,
        memory: MemoryMode,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> EditRequest:
        """A request as a user makes it; None takes the checkpoint's default.

        Raises:
            RequestError: no instruction, or what no checkpoint can serve.
        """
        if not arguments.text("prompt", prompt).strip():
            raise RequestError(
                f"an edit needs an instruction, got the prompt {arguments.shown(prompt)}; say what "
                "to change"
            )
        return cls(
            prompt=str(prompt),
            memory=arguments.choice("memory", memory, _MODES),
            **sampled(sampling, seed, num_inference_steps, guidance_scale),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for a report and a folder's manifest."""
        return asdict(self)

    def difference(self, report: dict[str, Any]) -> str | None:
        """How an edit's report differs from this request, in words; None if it answers it."""
        for name, value in self.to_dict().items():
            done = report["memory"]["mode"] if name == "memory" else report[name]
            if done != value:
                return f"{name} {done!r} instead of {value!r}"
        return None


def engine_settings(engine: Engine) -> dict[str, Any]:
    """What an edit's latents depend on beside its request; windows of one edit share it."""
    settings = {name: getattr(engine.config, name) for name in _SETTINGS}
    # exact ones stand in no folder of before there was a choice
    rounded = {} if engine.timesteps == "exact" else {"timesteps": engine.timesteps}
    own = {"merge": engine.merge, "scheduler": engine.scheduler}
    return {**settings, **_EXACT, **own, **rounded}
