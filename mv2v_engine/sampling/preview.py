"""Pictures of a turn while it is denoised: what each step takes the clean latents to be.

A step at noise level sigma sees x = (1 - sigma) x_0 + sigma noise and gives v = noise - x_0, so x_0
is x - sigma v. The picture is of its middle latent frame.

C latent channels, H W latent grid.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from mv2v_engine.progress import Preview
from mv2v_engine.sampling.flow_match import Solver


class Previewer:
    """Takes the pictures of one turn; the device is never waited for while it has no other work.

    On a GPU a picture is on its way while the next step is computed, and arrives with that one.

    Args:
        draw: a latent frame [C, H, W] to a picture uint8 [H, W, 3], on the latents' device.
        latents: the turn's [1, C, F, H, W], of which the shape and the device count.
    """

    def __init__(self, draw: Callable[[Tensor], Tensor], solver: Solver, latents: Tensor) -> None:
        self._draw, self._solver = draw, solver
        self._frame = latents.shape[2] // 2
        self._noisy: Tensor | None = None
        self._coming: deque[tuple[Preview, torch.cuda.Event | None]] = deque()

    def before(self, latents: Tensor) -> None:
        """Keep what the next step sees; the step moves it in place."""
        self._noisy = latents[0, :, self._frame].clone()

    def after(self, latents: Tensor, velocity: Tensor | None, index: int) -> None:
        """Take the picture of step `index`.

        latents: as the step left them. velocity: [1, C, F, H, W]; None where the step moved the
            latents by velocity * delta, which tells it.
        """
        noisy, solver = self._noisy, self._solver
        assert noisy is not None
        sigma = float(solver.sigmas[index])
        if velocity is None:
            assert solver.deltas is not None
            moved = latents[0, :, self._frame] - noisy
            clean = noisy - moved * (sigma / float(solver.deltas[index]))
        else:
            clean = noisy - velocity[0, :, self._frame].to(noisy.dtype) * sigma
        picture, arrives = self._draw(clean).to("cpu", non_blocking=True), None
        if latents.is_cuda:
            arrives = torch.cuda.Event()
            arrives.record()
        total = len(solver.timesteps)
        self._coming.append((Preview(index + 1, total, picture), arrives))

    def arrived(self, *, is_last: bool) -> list[Preview]:
        """The pictures that are here. is_last: wait for all of them, no step follows."""
        here = list[Preview]()
        while self._coming:
            preview, arrives = self._coming[0]
            if arrives is not None:
                if not is_last and len(self._coming) == 1:
                    break
                arrives.synchronize()
            self._coming.popleft()
            here.append(preview)
        return here
