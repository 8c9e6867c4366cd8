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

from lightning_kv.metrics.functional.frechet import numbered
from lightning_kv.metrics.functional.moments import Moments, as_features, check_widths

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
    real: Tensor | Moments,
    clips: int,
    kernel: PolynomialKernel = KVD,
    estimator: Estimator = "u",
    units: Tensor | None = None,
) -> float | None:
    """The distance to be expected if the clips came from the population of the real set.

    Exactly ``(1 / N + 1 / M) (E k(x, x) - E k(x, x'))`` for "v", estimated without bias from the
    real set, and 0 for "u". Where clips of one prompt are alike, pairs within a prompt take the
    place of pairs of a clip with itself, and lift "u" too, which leaves out only the latter.

    Args:
        real: Features of the real set, ``[M, d]``; or its moments, for the kernel ``JEDI``.
        clips: Number N of clips that are compared with it; where ``units`` are given, of their
            prompts, each taken to have as many clips as those of the real set.
        kernel: As in :func:`kernel_distance`.
        estimator: As in :func:`kernel_distance`.
        units: Prompt of each real clip, int64 ``[M]``; by default each has its own.

    Returns:
        The distance; None where the real clips are of one prompt.

    Raises:
        ValueError: The units do not fit, or come with moments; or as :func:`kernel_distance`.

    Example:
        >>> real = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> kernel_null(real, 2, JEDI, "v"), kernel_null(Moments.of(real), 2, JEDI, "v")
        (25.0, 25.0)
        >>> kernel_null(real, 2, JEDI, "u")
        0.0
    """
    if isinstance(real, Moments):
        if units is not None:
            raise ValueError(
                f"Moments of {real.n} clips do not say which are of one prompt. Pass the features, "
                "or no units."
            )
        within = _Within.from_moments(real)
        sizes, blocks = torch.ones(real.n, dtype=torch.float64), within.diagonal
    else:
        real = as_features(real)
        within, blocks = _Within.of(real, kernel), _blocks(real, kernel, units)[1].sum()
        sizes = numbered(units, len(real))[0].bincount().double()
    if len(sizes) < 2:
        return None
    return kernel.scale * _lift(within, blocks, sizes, clips, estimator)


def _lift(
    within: _Within, blocks: Tensor, sizes: Tensor, clips: int, estimator: Estimator
) -> float:
    """What the pairs within prompts lift the distance by, before scaling."""
    alone = 0 if estimator == "v" else 1  # pairs of a clip with itself that are left out
    pairs, n, size = (sizes * (sizes - alone)).sum(), within.n, sizes.mean()
    if pairs == 0:
        return 0.0
    apart = (within.total - blocks) / (n**2 - sizes.square().sum())
    alike = (blocks - alone * within.diagonal) / pairs
    shares = pairs / (n * (n - alone)) + (size - alone) / (clips * size - alone)
    return (shares * (alike - apart)).item()


def kernel_error(
    x: Tensor,
    y: Tensor,
    kernel: PolynomialKernel = KVD,
    estimator: Estimator = "u",
    units: Tensor | None = None,
) -> float | None:
    """Standard error of :func:`kernel_distance` over prompts of the first set, by the jackknife.

    The clips of a prompt are left out together. The second set is taken as given.

    Args:
        x: Features of the set that is measured, ``[N, d]``.
        y: Features of the set it is compared with, ``[M, d]``.
        kernel: As in :func:`kernel_distance`.
        estimator: As in :func:`kernel_distance`.
        units: Prompt of each clip of the first set, int64 ``[N]``; by default each has its own.

    Returns:
        The standard error; None for fewer than 3 prompts.

    Raises:
        ValueError: The units do not fit, or as :func:`kernel_distance`.

    Example:
        >>> x, y = torch.randn(2, 32, 4, generator=torch.Generator().manual_seed(0))
        >>> 0 < kernel_error(x, y) < 1
        True
    """
    x, y = _both(x, y)
    (group, blocks), prompts = _blocks(x, kernel, units), numbered(units, len(x))[1]
    if prompts < 3:
        return None

    def by_prompt(values: Tensor) -> Tensor:
        return values.new_zeros(prompts).index_add(0, group, values)

    rows, diagonal, across = kernel.rows(x, x), kernel.diagonal(x), kernel.rows(x, y)
    # Sums without each prompt in turn: its rows and its columns go, and its block went twice.
    left = _Within(
        len(x) - by_prompt(torch.ones_like(rows)),
        rows.sum() - 2 * by_prompt(rows) + blocks,
        diagonal.sum() - by_prompt(diagonal),
    )
    values = _mmd(left, _Within.of(y, kernel), across.sum() - by_prompt(across), estimator)
    return kernel.scale * math.sqrt((prompts - 1) * values.var(correction=0).item())


def _blocks(x: Tensor, kernel: PolynomialKernel, units: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prompt of each clip ``[N]``, and the sum of the kernel over the pairs within each prompt."""
    group, prompts = numbered(units, len(x))
    group = group.to(x.device)
    if prompts == len(x):
        return group, kernel.diagonal(x)[group.argsort()]
    parts = (x[group == prompt] for prompt in range(prompts))
    return group, torch.stack([kernel.rows(part, part).sum() for part in parts])


@dataclass(frozen=True)
class _Within:
    """Kernel values of n clips with each other: their sum, and the sum of those with themselves."""

    n: int | Tensor
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
