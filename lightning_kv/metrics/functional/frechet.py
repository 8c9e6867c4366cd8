"""Frechet distance between two sets of clips, and what it says at the sizes one can afford.

It is the distance of Gaussians fitted to the sets, ``|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½)``
(Heusel et al., 2017, arXiv 1706.08500; for videos Unterthiner et al., 2018, arXiv 1812.01717).
From few clips it is large even between two sets of one population. So it comes with the distance
to be expected then, with a standard error, and with its limit for many clips.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lightning_kv.metrics.functional.moments import (
    Covariance,
    Moments,
    as_features,
    check_widths,
    divisor,
)
from lightning_kv.stats.inference import jackknife

TOLERANCE = 1e-6
"""How far rounding may push a value below zero, as a share of what it was computed from."""

CONSTANT = 1e-12
"""A variance below this share of the mean square is rounding: all clips are the same."""

GROUPS = 64
"""The jackknife leaves out single prompts up to so many, and beyond so many random groups."""


def frechet_distance(x: Tensor, y: Tensor, covariance: Covariance = "unbiased") -> Tensor:
    """Frechet distance of two sets of features, a float64 scalar.

    With centred features ``X`` and ``Y``, ``tr (C1 C2)^½`` is the sum of the singular values of
    ``X Yᵀ``. So no covariance is formed, and fewer clips than features are no problem.

    Args:
        x: Features of one set, ``[N, d]``.
        y: Features of the other, ``[M, d]``.
        covariance: "unbiased" divides by n - 1, "ml" by n.

    Raises:
        ValueError: A set has fewer than 2 clips, clips that are all the same, or values that are
            not finite, or the widths differ.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]])
        >>> frechet_distance(x, x + torch.tensor([3.0, 4.0])).round(decimals=9).item()
        25.0
    """
    return AgainstReal(varied(x), varied(y), covariance)()


def frechet_from_moments(x: Moments, y: Moments, covariance: Covariance = "unbiased") -> Tensor:
    """Frechet distance of two sets of which only the moments were kept, a float64 scalar.

    ``C1 C2`` has the eigenvalues of the symmetric ``Sᵀ C2 S``, where ``S Sᵀ = C1``. For fewer clips
    than features their square roots are less exact than :func:`frechet_distance`.

    Args:
        x: Moments of one set.
        y: Moments of the other.
        covariance: As in :func:`frechet_distance`.

    Raises:
        ValueError: A set has fewer than 2 clips or clips that are all the same, the widths differ,
            or the sums have lost too many digits.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]])
        >>> shifted = Moments.of(x + torch.tensor([3.0, 4.0]))
        >>> frechet_from_moments(Moments.of(x), shifted).round(decimals=9).item()
        25.0
    """
    check_widths(x.width, y.width)
    first, second = x.covariance(covariance), y.covariance(covariance)
    for moments, spread in ((x, first), (y, second)):
        if spread.trace() <= CONSTANT * moments.outer.trace() / moments.n:
            raise _constant(moments.n)
    half, failed = torch.linalg.cholesky_ex(first)
    if failed:  # as with fewer clips than features
        values, vectors = torch.linalg.eigh(first)
        half = vectors * _roots(values)
    root = _roots(torch.linalg.eigvalsh(half.T @ second @ half)).sum()
    return _distance(x.mean - y.mean, first.trace() + second.trace(), root)


def null_distance(
    real: Tensor,
    clips: int,
    draws: int = 16,
    seed: int = 0,
    covariance: Covariance = "unbiased",
    units: Tensor | None = None,
) -> float | None:
    """The distance to be expected if the clips came from the population of the real set.

    Nothing is assumed about that population: the real set is split at random into two samples of
    the right ratio. As it is too small for the full sizes, the samples are a half, a quarter and an
    eighth as large (where both sets are equal), and the curve through their mean distances is
    continued to the full sizes: a parabola in the logarithms of distance and size. Samples of a
    Gaussian fitted to fewer clips than features would say about half of the truth or less.

    Clips of one prompt are alike and stay together. So what counts is the number of prompts, each
    taken to have as many clips as those of the real set.

    Args:
        real: Features of the real set, ``[M, d]``.
        clips: Number N of clips that are compared with it; of their prompts, where ``units`` are
            given.
        draws: Number of splits of each size.
        seed: The same seed gives the same number.
        covariance: As in :func:`frechet_distance`.
        units: Prompt of each real clip, int64 ``[M]``; by default each has its own.

    Returns:
        The distance; None where the real set cannot be split at two sizes.

    Raises:
        ValueError: The units do not fit, or as :func:`frechet_distance`.

    Example:
        >>> real = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> null_distance(real, 16) > null_distance(real, 64) > 0
        True
        >>> null_distance(real[:4], 4) is None
        True
    """
    real, generator = varied(real), torch.Generator().manual_seed(seed)
    group, prompts = numbered(units, len(real))
    whole = prompts / (clips + prompts)
    points: list[tuple[float, float]] = []
    for share in (whole, whole / 2, whole / 4):
        few = round(clips * share)
        many = min(round(prompts * share), prompts - few)
        if min(few, many) < 2:
            break
        places = (_order(prompts, generator)[group] for _ in range(draws))
        splits = ((real[at < few], real[(at >= few) & (at < few + many)]) for at in places)
        mean = math.fsum(AgainstReal(*split, covariance)().item() for split in splits) / draws
        size = (1 / clips + 1 / prompts) / (1 / few + 1 / many)
        if mean > 0:  # it is not where all samples of a set that repeats itself are the same
            points.append((math.log(size), math.log(mean)))
    if len(points) < 2:
        return None
    curve = np.polynomial.Polynomial.fit(*zip(*points, strict=True), len(points) - 1)
    return math.exp(curve(0.0))


@dataclass(frozen=True)
class FrechetLimit:
    """Distance continued to infinitely many clips.

    Args:
        value: Intercept of the line through the distances of subsets against ``1 / N``.
        residual: Root mean square of what the line leaves over, in units of the distance.
    """

    value: float
    residual: float


def frechet_infinity(
    x: Tensor, y: Tensor, draws: int = 4, seed: int = 0, covariance: Covariance = "unbiased"
) -> FrechetLimit:
    """Distance in the limit of many clips (Chong and Forsyth, 2020, arXiv 1911.07023).

    For many clips the distance is a straight line in ``1 / N``. It is fitted to means over random
    subsets with the same share of both sets, from a half to all, evenly spaced in ``1 / N``.

    Args:
        x: Features of one set, ``[N, d]``.
        y: Features of the other, ``[M, d]``.
        draws: Number of subsets of each size.
        seed: The same seed gives the same number.
        covariance: As in :func:`frechet_distance`.

    Raises:
        ValueError: A set has fewer than 4 d clips, where the line is not straight yet; or as
            :func:`frechet_distance`.

    Example:
        >>> x, y = torch.randn(2, 400, 2, generator=torch.Generator().manual_seed(0))
        >>> frechet_infinity(x, y).value < frechet_distance(x, y).item()
        True
    """
    x, y = varied(x), varied(y)
    width = x.shape[1]
    if min(len(x), len(y)) < 4 * width:
        raise ValueError(
            f"The limit cannot be told from {len(x)} and {len(y)} clips with {width} features. "
            f"Pass {4 * width} clips or more in both sets, or read null_distance beside the value."
        )
    generator = torch.Generator().manual_seed(seed)
    inverse, means = np.linspace(1, 2, 5), []
    for share in 1 / inverse:
        subsets = (
            [z[_order(len(z), generator)[: round(len(z) * share)]] for z in (x, y)]
            for _ in range(draws)
        )
        means.append(math.fsum(AgainstReal(*two, covariance)().item() for two in subsets) / draws)
    line = np.polynomial.Polynomial.fit(inverse, means, 1)
    residual = np.sqrt(np.mean((line(inverse) - means) ** 2))
    return FrechetLimit(float(line(0)), float(residual))


def frechet_error(
    x: Tensor, y: Tensor, covariance: Covariance = "unbiased", units: Tensor | None = None
) -> float | None:
    """Standard error of :func:`frechet_distance` over prompts of the first set, by the jackknife.

    The second set is taken as given. (The bootstrap takes clips twice, which inflates the distance
    beyond its own interval.) The clips of a prompt are left out together: up to 64 prompts one by
    one, more in 64 random groups.

    Args:
        x: Features of the set that is measured, ``[N, d]``.
        y: Features of the set it is compared with, ``[M, d]``.
        covariance: As in :func:`frechet_distance`.
        units: Prompt of each clip of the first set, int64 ``[N]``; by default each has its own.

    Returns:
        The standard error; None for fewer than 3 prompts.

    Raises:
        ValueError: The units do not fit, or as :func:`frechet_distance`.

    Example:
        >>> x, y = torch.randn(2, 32, 4, generator=torch.Generator().manual_seed(0))
        >>> 0 < frechet_error(x, y) < 1
        True
    """
    distances = AgainstReal(varied(x), varied(y), covariance)
    group, prompts = numbered(units, len(x))
    if prompts < 3:
        return None
    parts = min(prompts, GROUPS)
    part = _order(prompts, torch.Generator().manual_seed(0))[group] % parts
    return jackknife(np.arange(parts), lambda kept: distances(within(part, kept)).item())[1]


class AgainstReal:
    """Distances of many subsets of one pool of clips from one real set, whose factor is found once.

    Args:
        pool: Features of all clips, float64 ``[P, d]``.
        real: Features of the real set, float64 ``[M, d]``.
        covariance: As in :func:`frechet_distance`.
    """

    def __init__(self, pool: Tensor, real: Tensor, covariance: Covariance) -> None:
        check_widths(pool.shape[1], real.shape[1])
        mean, self.covariance = real.mean(0), covariance
        self.pool, real = pool - mean, real - mean
        scale = divisor(len(real), covariance)
        self.real_trace = torch.linalg.vector_norm(real) ** 2 / scale
        self.factor = _factor(real) / math.sqrt(scale)

    @cached_property
    def products(self) -> Tensor:
        """Products of the pool and the factor of the real set, or a square matrix like them."""
        products = self.pool @ self.factor.T
        # Singular values depend on the products of rows alone, and R has the same ones.
        wide = products.shape[1] > len(products)
        return torch.linalg.qr(products.T, mode="r").R.T if wide else products

    def __call__(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Distance of the chosen rows of the pool, all of them by default."""
        x = self.pool[rows]
        scale, shift = divisor(len(x), self.covariance), x.mean(0)
        x = x - shift
        if len(x) > x.shape[1]:
            products = _factor(x) @ self.factor.T
        else:
            products = self.products[rows]
            products = products - products.mean(0)
        trace = torch.linalg.vector_norm(x) ** 2 / scale
        root = torch.linalg.svdvals(products).sum() / math.sqrt(scale)
        return _distance(shift, trace + self.real_trace, root)


def _factor(x: Tensor) -> Tensor:
    """A matrix of d rows or fewer with the same ``XᵀX``."""
    if len(x) <= x.shape[1]:
        return x
    factor, failed = torch.linalg.cholesky_ex(x.T @ x, upper=True)
    # Many clips that span few dimensions have none; the slower way always works.
    return torch.linalg.qr(x, mode="r").R if failed else factor


def _distance(shift: Tensor, trace: Tensor, root: Tensor) -> Tensor:
    """``|shift|² + trace - 2 root``; what rounding puts below zero is zero."""
    value = shift.square().sum() + trace - 2 * root
    if value < -TOLERANCE * trace:
        raise ValueError(
            f"The Frechet distance came out as {value.item():.3g}, beyond what rounding explains "
            f"(traces of {trace.item():.3g}). Pass features whose mean and spread are fewer orders "
            "of magnitude apart, or the features in place of their moments."
        )
    return value.clamp(min=0)


def _roots(eigenvalues: Tensor) -> Tensor:
    """Square roots of eigenvalues that are not negative but for rounding."""
    if eigenvalues.min() < -TOLERANCE * eigenvalues.abs().sum():
        raise ValueError(
            f"A covariance has the eigenvalue {eigenvalues.min().item():.3g}: its sums have lost "
            "their digits. Sum in float64, or pass the features in place of their moments."
        )
    return eigenvalues.clamp(min=0).sqrt()


def varied(features: Tensor) -> Tensor:
    """Features in float64, checked; clips that are all the same are no population."""
    features = as_features(features)
    # Two clips tell at once nearly always, and faster than all of them.
    if (features[-1] == features[0]).all() and (features == features[0]).all():
        raise _constant(len(features))
    return features


def _constant(clips: int) -> ValueError:
    return ValueError(
        f"All {clips} clips of a set have the same features, so its distance means nothing. Check "
        "that the clips differ and that the backbone tells them apart."
    )


def _order(n: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(n, generator=generator)


def measurable(features: Tensor, width: int) -> bool:
    """Whether a set of features has a distance from one of this width.

    Example:
        >>> measurable(torch.eye(3), 3), measurable(torch.ones(3, 3), 3)
        (True, False)
    """
    if len(features) < 2 or features.shape[1] != width:
        return False
    return bool(features.isfinite().all() and (features != features[0]).any())


def numbered(units: Tensor | None, n: int) -> tuple[Tensor, int]:
    """Unit of each of n rows, counted from 0, and the number of units.

    Raises:
        ValueError: There is not one whole number for each row.

    Example:
        >>> numbered(torch.tensor([7, 3, 7]), 3)
        (tensor([1, 0, 1]), 2)
    """
    if units is None:
        return torch.arange(n), n
    if units.shape != (n,) or units.dtype != torch.int64:
        raise ValueError(
            f"The units do not fit {n} clips: {units.dtype} {tuple(units.shape)}. Pass one "
            "int64 for each clip."
        )
    found, group = units.cpu().unique(return_inverse=True)
    return group, len(found)


def within(group: Tensor, kept: np.ndarray) -> Tensor:
    """Which rows belong to a group that is kept, bool ``[N]``."""
    return torch.isin(group, torch.from_numpy(kept).long())
