"""Kernel distance between two sets of clips: the maximum mean discrepancy of a polynomial kernel.

``MMD² = E k(x, x') + E k(y, y') - 2 E k(x, y)`` (Gretton et al., 2012, JMLR 13, lemma 6) with
``k(a, b) = (a·b / d + coef0)^degree``. Unlike the Frechet distance it has an unbiased estimator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_kv.metrics.moments import Moments, as_features, check_widths

Estimator = Literal["u", "v"]

BLOCK = 2**22
"""Kernel values that are held at once."""


@dataclass(frozen=True)
class PolynomialKernel:
    """A kernel ``(a·b / d + coef0)^degree`` of features of width d.

    Args:
        degree: Exponent.
        coef0: What is added to the scaled product.
        scale: By what the discrepancy is multiplied.
    """

    degree: int
    coef0: float
    scale: float

    def rows(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of ``k(x_i, y_j)`` over j, ``[N]``."""
        step = max(1, BLOCK // len(y))
        blocks = (self._of(block @ y.T, x.shape[1]).sum(1) for block in x.split(step))
        return torch.cat(list(blocks))

    def diagonal(self, x: Tensor) -> Tensor:
        """``k(x_i, x_i)``, ``[N]``."""
        return self._of(x.square().sum(1), x.shape[1])

    def _of(self, products: Tensor, width: int) -> Tensor:
        return (products / width + self.coef0) ** self.degree


JEDI = PolynomialKernel(degree=2, coef0=0.0, scale=100.0)
"""The kernel of JEDi (Luo et al., 2024, arXiv 2410.05203)."""

KVD = PolynomialKernel(degree=3, coef0=1.0, scale=1.0)
"""The kernel of KID (Binkowski et al., 2018, arXiv 1801.01401), for videos."""


def kernel_distance(
    x: Tensor, y: Tensor, kernel: PolynomialKernel = KVD, estimator: Estimator = "u"
) -> Tensor:
    """Kernel distance of two whole sets of features, a float64 scalar.

    Args:
        x: Features of one set, ``[N, d]``.
        y: Features of the other, ``[M, d]``.
        kernel: ``KVD`` or ``JEDI``.
        estimator: "u" has no bias and may fall below zero; "v", as published for JEDi, also counts
            each clip with itself, which lifts it above zero between two sets of one population.

    Raises:
        ValueError: A set has fewer than 2 clips or values that are not finite, the widths differ,
            or the estimator is unknown.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
        >>> y = torch.tensor([[7.0, 6.0, 5.0], [4.0, 3.0, 2.0], [1.0, 1.0, 8.0], [0.0, 2.0, 5.0]])
        >>> kernel_distance(x, y, JEDI, estimator="v").round(decimals=6).item()
        27072.222222
    """
    x, y = _both(x, y)
    across = kernel.rows(x, y).sum()
    return kernel.scale * _mmd(_Within.of(x, kernel), _Within.of(y, kernel), across, estimator)


def jedi_from_moments(x: Moments, y: Moments, estimator: Estimator = "u") -> Tensor:
    """:func:`kernel_distance` with the kernel ``JEDI`` of two sets of which moments were kept.

    The kernel is ``(a·b)² / d²``, and sums of ``(a·b)²`` are products of sums of outer products.

    Args:
        x: Moments of one set.
        y: Moments of the other.
        estimator: As in :func:`kernel_distance`.

    Raises:
        ValueError: As :func:`kernel_distance`.

    Example:
        >>> x, y = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 2.0]]])
        >>> jedi_from_moments(Moments.of(x), Moments.of(y), estimator="v").item()
        112.5
    """
    check_widths(x.width, y.width)
    across = (x.outer * y.outer).sum() / x.width**2
    return JEDI.scale * _mmd(_Within.from_moments(x), _Within.from_moments(y), across, estimator)


def kernel_null(
    real: Tensor | Moments, clips: int, kernel: PolynomialKernel = KVD, estimator: Estimator = "u"
) -> float:
    """The distance to be expected if the clips came from the population of the real set.

    Exactly ``(1 / N + 1 / M) (E k(x, x) - E k(x, x'))`` for "v", estimated without bias from the
    real set, and 0 for "u".

    Args:
        real: Features of the real set, ``[M, d]``; or its moments, for the kernel ``JEDI``.
        clips: Number N of clips that are compared with it.
        kernel: As in :func:`kernel_distance`.
        estimator: As in :func:`kernel_distance`.

    Raises:
        ValueError: As :func:`kernel_distance`.

    Example:
        >>> real = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> kernel_null(real, 2, JEDI, "v"), kernel_null(Moments.of(real), 2, JEDI, "v")
        (25.0, 25.0)
        >>> kernel_null(real, 2, JEDI, "u")
        0.0
    """
    if isinstance(real, Moments):
        within = _Within.from_moments(real)
    else:
        within = _Within.of(as_features(real), kernel)
    if estimator == "u":
        return 0.0
    apart = within.diagonal / within.n - within.mean("u")
    return kernel.scale * (1 / clips + 1 / within.n) * apart.item()


def kernel_error(
    x: Tensor, y: Tensor, kernel: PolynomialKernel = KVD, estimator: Estimator = "u"
) -> float | None:
    """Standard error of :func:`kernel_distance` over the clips of the first set, by the jackknife.

    The second set is taken as given.

    Args:
        x: Features of the set that is measured, ``[N, d]``.
        y: Features of the set it is compared with, ``[M, d]``.
        kernel: As in :func:`kernel_distance`.
        estimator: As in :func:`kernel_distance`.

    Returns:
        The standard error; None for fewer than 3 clips.

    Raises:
        ValueError: As :func:`kernel_distance`.

    Example:
        >>> x, y = torch.randn(2, 32, 4, generator=torch.Generator().manual_seed(0))
        >>> 0 < kernel_error(x, y) < 1
        True
    """
    x, y = _both(x, y)
    n = len(x)
    if n < 3:
        return None
    rows, diagonal, across = kernel.rows(x, x), kernel.diagonal(x), kernel.rows(x, y)
    # Sums without each clip in turn: its row and its column go.
    left = _Within(n - 1, rows.sum() - 2 * rows + diagonal, diagonal.sum() - diagonal)
    values = _mmd(left, _Within.of(y, kernel), across.sum() - across, estimator)
    return kernel.scale * math.sqrt((n - 1) * values.var(correction=0).item())


@dataclass(frozen=True)
class _Within:
    """Kernel values of n clips with each other: their sum, and the sum of those with themselves."""

    n: int
    total: Tensor
    diagonal: Tensor

    @classmethod
    def of(cls, x: Tensor, kernel: PolynomialKernel) -> _Within:
        return cls(len(x), kernel.rows(x, x).sum(), kernel.diagonal(x).sum())

    @classmethod
    def from_moments(cls, x: Moments) -> _Within:
        if x.n < 2:
            raise ValueError(f"A set of {x.n} clips is too small. Pass 2 clips or more.")
        return cls(x.n, x.outer.square().sum() / x.width**2, x.fourth / x.width**2)

    def mean(self, estimator: Estimator) -> Tensor:
        """Mean over pairs, those of a clip with itself included ("v") or not ("u")."""
        if estimator not in ("u", "v"):
            raise ValueError(
                f"There is no estimator '{estimator}'. Choose 'u' (no bias) or 'v' (as in JEDi)."
            )
        if estimator == "v":
            return self.total / self.n**2
        return (self.total - self.diagonal) / (self.n * (self.n - 1))


def _mmd(x: _Within, y: _Within, across: Tensor, estimator: Estimator) -> Tensor:
    return x.mean(estimator) + y.mean(estimator) - 2 * across / (x.n * y.n)


def _both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = as_features(x), as_features(y)
    check_widths(x.shape[1], y.shape[1])
    return x, y
