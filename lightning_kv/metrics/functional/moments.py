"""Sums over a set of features that merge by addition: count, mean, covariance, fourth power."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Covariance = Literal["unbiased", "ml"]


def as_features(features: Tensor, least: int = 2) -> Tensor:
    """The features in float64, checked; on the CPU where their device has no float64.

    Args:
        features: ``[N, d]``, one row for each clip.
        least: Fewest rows that make sense.

    Raises:
        ValueError: There are too few rows, the shape or type is wrong, or a value is not finite.

    Example:
        >>> as_features(torch.ones(2, 3)).dtype
        torch.float64
    """
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(
            f"These are no features of clips: shape {tuple(features.shape)}, {features.dtype}. "
            "Pass floating point numbers [N, d], one row for each clip."
        )
    if len(features) < least:
        raise ValueError(
            f"A set of {len(features)} clips is too small. Pass {least} clips or more."
        )
    features = (features.cpu() if features.device.type == "mps" else features).double()
    # One sum is finite or tells at once, and is faster than a look at every number.
    broken = ~features.isfinite().all(1) if not features.sum().isfinite() else None
    if broken is not None and broken.any():
        raise ValueError(
            f"Features must be finite, but {broken.sum()} of {len(features)} clips have NaN or "
            "infinite ones. Record these rollouts as failed instead of measuring them."
        )
    return features


def check_widths(x: int, y: int) -> None:
    """Refuse two sets whose features differ in width.

    Raises:
        ValueError: They do.
    """
    if x != y:
        raise ValueError(
            f"The features of the two sets differ in width: {x} and {y}. "
            "Compute both with the same backbone."
        )


def divisor(n: int, covariance: Covariance) -> int:
    """What the sum of squared deviations of n clips is divided by: n - 1, or n for "ml".

    Raises:
        ValueError: The convention is unknown.

    Example:
        >>> divisor(8, "unbiased"), divisor(8, "ml")
        (7, 8)
    """
    if covariance not in ("unbiased", "ml"):
        raise ValueError(
            f"There is no covariance '{covariance}'. Choose 'unbiased' (divided by n - 1) or 'ml' "
            "(divided by n)."
        )
    return n - 1 if covariance == "unbiased" else n


@dataclass(frozen=True)
class Moments:
    """What a stream of features leaves behind; two streams merge with ``+``.

    The sums are float64: in float32, features that lie far from zero have a covariance with
    negative eigenvalues.

    Args:
        n: Number of clips.
        total: Sum of the features, ``[d]``.
        outer: Sum of their outer products, ``[d, d]``.
        fourth: Sum of the fourth powers of their lengths.

    Example:
        >>> first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 2.0]])
        >>> both = Moments.of(first) + Moments.of(second)
        >>> both.n, both.mean.tolist(), both.covariance().tolist()
        (2, [2.0, 1.0], [[2.0, 2.0], [2.0, 2.0]])
    """

    n: int
    total: Tensor
    outer: Tensor
    fourth: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of one batch ``[N, d]``, which may be empty.

        Raises:
            ValueError: As :func:`as_features`.
        """
        x = as_features(features, least=0)
        return cls(len(x), x.sum(0), x.T @ x, x.square().sum(1).square().sum())

    def __add__(self, other: Moments) -> Moments:
        check_widths(self.width, other.width)
        return Moments(
            self.n + other.n,
            self.total + other.total,
            self.outer + other.outer,
            self.fourth + other.fourth,
        )

    @property
    def width(self) -> int:
        """Number d of features."""
        return len(self.total)

    @property
    def mean(self) -> Tensor:
        """Mean feature ``[d]``."""
        return self.total / self.n

    def covariance(self, covariance: Covariance = "unbiased") -> Tensor:
        """Covariance ``[d, d]``.

        Args:
            covariance: "unbiased" divides by n - 1, "ml" by n.

        Raises:
            ValueError: There are fewer than 2 clips, or the convention is unknown.
        """
        if self.n < 2:
            raise ValueError(f"A set of {self.n} clips has no covariance. Pass 2 clips or more.")
        scatter = self.outer - torch.outer(self.total, self.mean)
        return scatter / divisor(self.n, covariance)
