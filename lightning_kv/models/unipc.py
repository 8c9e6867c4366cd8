"""UniPC of second order for flow matching: a predictor and a corrector from clean estimates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor


class UniPC:
    """One trajectory from noise to data along given noise levels.

    UniPC: A Unified Predictor-Corrector Framework (arXiv 2302.04867), order 2, ``B(h) = e^h - 1``,
    data prediction, for ``x = (1 - sigma) x0 + sigma noise``. The first and the last step are of
    order 1; the last one ends at the clean estimate. The corrector costs no pass of the network.

    Args:
        sigmas: Noise levels of the steps, falling, all below 1 and above 0.

    Raises:
        ValueError: Levels out of range, or not falling.
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        falling = all(a > b for a, b in pairwise(sigmas))
        if not sigmas or not falling or not 0 < sigmas[-1] <= sigmas[0] < 1:
            raise ValueError(
                f"UniPC cannot follow the noise levels {list(sigmas)}. "
                "Give falling levels between 0 and 1 (timesteps below 1000), both left out."
            )
        self.sigmas = [*sigmas, 0.0]
        self.done = 0
        self.estimates: list[Tensor] = []  # of the last two steps, oldest first
        self.start: Tensor | None = None  # where the last step began

    def step(self, x0: Tensor, x: Tensor) -> Tensor:
        """The next latents.

        Args:
            x0: Clean estimate at ``x``.
            x: Latents that the estimate was made from.
        """
        if self.done:
            x = self._move(self.start, self.done - 1, x0)
        self.estimates = [*self.estimates[-1:], x0]
        self.start, self.done = x, self.done + 1
        return self._move(x, self.done - 1, None)

    def _move(self, x: Tensor, index: int, seen: Tensor | None) -> Tensor:
        """From level ``index`` to the next; ``seen`` is the estimate there, once it is known."""
        here, there = self.sigmas[index], self.sigmas[index + 1]
        if there == 0:
            return self.estimates[-1]
        span = _log_snr(there) - _log_snr(here)
        phi = math.expm1(-span)
        latest = self.estimates[-1]
        moved = there / here * x - (1 - there) * phi * latest
        second = len(self.estimates) == 2
        change, ratio = 0.0, 1.0
        if second:
            ratio = (_log_snr(self.sigmas[index - 1]) - _log_snr(here)) / span  # negative
            change = (self.estimates[0] - latest) / ratio
        if seen is None:
            return moved - (1 - there) * phi * 0.5 * change
        old, new = _corrector(span, ratio) if second else (0.0, 0.5)
        return moved - (1 - there) * phi * (old * change + new * (seen - latest))


def _log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)


def _corrector(span: float, ratio: float) -> tuple[float, float]:
    """Weights of the past and of the new difference: two conditions, solved by hand."""
    phi = math.expm1(-span)
    first = (phi / -span - 1) / phi
    second = 2 * ((phi / -span - 1) / -span - 0.5) / phi
    old = (second - first) / (ratio - 1)
    return old, first - old
