"""Distances between generated and real clips: FVD, JEDi and KVD, in any backbone's features."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from lightning_kv.metrics.frechet import (
    frechet_distance,
    frechet_error,
    frechet_from_moments,
    null_distance,
)
from lightning_kv.metrics.kernel import (
    JEDI,
    KVD,
    Estimator,
    jedi_from_moments,
    kernel_distance,
    kernel_error,
    kernel_null,
)
from lightning_kv.metrics.moments import Covariance, Moments, divisor
from lightning_kv.metrics.set_base import SetMetric, SetResult, check_comparable

__all__ = [
    "FrechetVideoDistance",
    "SetMetric",
    "SetResult",
    "VideoKernelDistance",
    "check_comparable",
]

KERNELS = {"jedi": JEDI, "kvd": KVD}
"""Forms of the kernel distance, by name."""


class FrechetVideoDistance(SetMetric):
    """FVD: the Frechet distance between generated and real clips, in the features of a backbone.

    Unterthiner et al., 2018, arXiv 1812.01717; see
    :func:`~lightning_kv.metrics.frechet.frechet_distance`. It has a bias that shrinks with the
    number of clips: read it beside ``report().null``.

    Args:
        backbone: As in :class:`SetMetric`.
        covariance: "unbiased" divides by n - 1, "ml" by n.
        kwargs: As in :class:`SetMetric`.

    Example:
        >>> import torch
        >>> metric = FrechetVideoDistance(num_features=4)
        >>> real, generated = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0))
        >>> metric.update_features(real, real=True, ids=torch.arange(64))
        >>> metric.update_features(generated + 1, real=False, ids=torch.arange(64))
        >>> result = metric.report()
        >>> result.name, result.null < 1 < result.value, result.status
        ('fvd/given', True, 'ok')
    """

    name = "fvd"

    def __init__(
        self,
        backbone: nn.Module | None = None,
        *,
        covariance: Covariance = "unbiased",
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        divisor(2, covariance)
        self.covariance = covariance

    @property
    def recipe(self) -> str:
        """One exact sentence; values of different recipes must not be compared."""
        return (
            f"Frechet distance, {self.features_name} features of clips of {self.frames} frames, "
            f"{self.covariance} covariance, float64"
        )

    def value(self, generated: Tensor | Moments, real: Tensor | Moments) -> Tensor:
        """Distance of two sets, both features or both moments."""
        distance = frechet_distance if self.keep_features else frechet_from_moments
        return distance(generated, real, self.covariance)

    def null(self, real: Tensor | Moments, clips: int) -> float | None:
        """Distance to be expected of so many clips of the real population; needs features."""
        return (
            null_distance(real, clips, covariance=self.covariance) if self.keep_features else None
        )

    def error(self, generated: Tensor, real: Tensor) -> float | None:
        """Standard error of the value over the generated clips."""
        return frechet_error(generated, real, self.covariance)

    def status(self, n: int, n_real: int) -> str:
        """What to beware of with so many clips."""
        if min(n, n_real) < self.num_features:
            return "n < d: biased, see the null distance"
        return "ok"


class VideoKernelDistance(SetMetric):
    """The kernel distance between generated and real clips, in the features of a backbone.

    See :func:`~lightning_kv.metrics.kernel.kernel_distance`. The form "jedi" needs no features to
    be kept.

    Args:
        backbone: As in :class:`SetMetric`.
        form: "jedi" (Luo et al., 2024, arXiv 2410.05203) or "kvd" (the kernel of KID: Binkowski et
            al., 2018, arXiv 1801.01401).
        estimator: "u" has no bias; "v" is the published JEDi.
        kwargs: As in :class:`SetMetric`.

    Raises:
        ValueError: The form or the estimator is unknown, or "kvd" is to do without features.

    Example:
        >>> import torch
        >>> metric = VideoKernelDistance(num_features=4, form="jedi")
        >>> real, generated = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0))
        >>> metric.update_features(real, real=True, ids=torch.arange(64))
        >>> metric.update_features(generated * 2, real=False, ids=torch.arange(64))
        >>> result = metric.report()
        >>> result.name, result.null < 10 < result.value
        ('jedi/given', True)
    """

    name = "jedi"

    def __init__(
        self,
        backbone: nn.Module | None = None,
        *,
        form: Literal["jedi", "kvd"] = "jedi",
        estimator: Estimator = "u",
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        if form not in KERNELS or estimator not in ("u", "v"):
            raise ValueError(
                f"There is no kernel distance '{form}' with the estimator '{estimator}'. Choose "
                f"among {', '.join(KERNELS)}, and 'u' or 'v'."
            )
        if form == "kvd" and not self.keep_features:
            raise ValueError(
                "'kvd' cannot be computed from moments. Keep features, or choose 'jedi'."
            )
        self.name, self.estimator, self.kernel = form, estimator, KERNELS[form]

    @property
    def recipe(self) -> str:
        """One exact sentence; values of different recipes must not be compared."""
        k = self.kernel
        return (
            f"{k.scale:g} MMD² of the kernel (a·b / d + {k.coef0:g})^{k.degree} by the "
            f"estimator {self.estimator}, {self.features_name} features of clips of {self.frames} "
            "frames, float64"
        )

    def value(self, generated: Tensor | Moments, real: Tensor | Moments) -> Tensor:
        """Distance of two sets, both features or both moments."""
        if self.keep_features:
            return kernel_distance(generated, real, self.kernel, self.estimator)
        return jedi_from_moments(generated, real, self.estimator)

    def null(self, real: Tensor | Moments, clips: int) -> float:
        """Distance to be expected of so many clips of the real population."""
        return kernel_null(real, clips, self.kernel, self.estimator)

    def error(self, generated: Tensor, real: Tensor) -> float | None:
        """Standard error of the value over the generated clips."""
        return kernel_error(generated, real, self.kernel, self.estimator)
