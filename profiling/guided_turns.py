"""What guidance makes of turns, before weights learn it: the protocol with more forwards a step.

`python profiling/guided_turns.py --guide source=1.5 training=1.25 --weaker OLD -- evaluate --out D
--scenes 8 --rows independent,memory --jobs 1` runs `mv2v_engine.run` with that guidance in every
step. Then `--collect RESULT base=DIR source=DIR ...` writes the measures of several into one file.
`training.dit --guide` teaches a student what is worth it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mv2v_engine.checkpoints import load_checkpoint  # noqa: E402
from mv2v_engine.engine import denoise  # noqa: E402
from mv2v_engine.engine.denoise import ForwardKind  # noqa: E402
from mv2v_engine.engine.step import Branch  # noqa: E402
from mv2v_engine.files import replacing  # noqa: E402
from mv2v_engine.models.dit import MV2VTransformer  # noqa: E402
from mv2v_engine.run import main as run  # noqa: E402
from mv2v_engine.tokens.plan import Role  # noqa: E402
from mv2v_engine.training.teacher import Lack, read_scales  # noqa: E402

MEASURES = ("consistency", "source_psnr", "sharpness", "source_sharpness", "unseen_sharpness")


def without(branch: Branch, role: Role) -> Branch | None:
    """The branch without segments of a role; None if it has none, or would have no other."""
    found, given = branch.plan.without(role), branch.conditioning
    if found is None:
        return None
    plan = replace(found[0], conditioning="joint")
    latents = [given.latents[place] for place in found[1]]
    return Branch(branch.transformer, plan, replace(given, latents=latents), branch.text, None)


def guided_by(scales: dict[Lack, float], weaker: MV2VTransformer | None) -> None:
    """Let every step of every turn be guided: eager ones of one branch."""

    def forward(self: denoise.Denoiser) -> list[ForwardKind]:
        given = (self.buffers.noisy, self.buffers.timestep, self.buffers.end_timestep)
        (branch,) = self.branches
        kind: ForwardKind = "target" if branch.runs_target else "whole"
        own = self.transformer.forward_samples([branch.sample(*given)])[0].float()
        guided = own
        for lack, scale in scales.items():
            model, other = self.transformer, None
            if lack in ("source", "memory"):
                other = without(branch, lack)
            elif weaker is not None:
                plan, model = replace(branch.plan, conditioning="joint"), weaker
                other = Branch(weaker, plan, branch.conditioning, branch.text, None)
            if other is not None:
                velocity = model.forward_samples([other.sample(*given)])[0]
                guided = guided + (scale - 1) * (own - velocity.float())
        self._guide([guided])
        return [kind]

    denoise.Denoiser._forward = forward  # type: ignore[method-assign]


def collect(out: Path, named: list[str]) -> None:
    """The measures of several evaluations in one file."""
    found = {}
    for word in named:
        name, _, folder = word.partition("=")
        results = json.loads((Path(folder) / "results.json").read_text())
        rows = {
            method: {measure: (row[measure], row[f"{measure}_ci"]) for measure in MEASURES}
            for method, row in results["rows"].items()
        }
        found[name] = {"rows": rows, "settings": results["settings"]}
    with replacing(out) as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--guide", nargs="+", default=(), metavar="WHAT=SCALE")
    parser.add_argument("--weaker", metavar="NAME_OR_PATH", help="of training=SCALE")
    parser.add_argument("--collect", type=Path, metavar="RESULT")
    parser.add_argument("rest", nargs="*", help="a command of mv2v_engine.run, or name=DIR ...")
    args = parser.parse_args()
    if args.collect is not None:
        collect(args.collect, args.rest)
        return 0
    scales = read_scales(args.guide)
    if "text" in scales:
        parser.error("text=SCALE is `run --guidance`; guide by source, memory or training")
    if ("training" in scales) != (args.weaker is not None):
        parser.error("training=SCALE and --weaker belong together")
    weaker = None
    if args.weaker is not None:
        weaker = load_checkpoint(args.weaker, device="cpu", dtype=torch.float32).transformer.eval()
    guided_by(scales, weaker)
    return run(args.rest)


if __name__ == "__main__":
    sys.exit(main())
