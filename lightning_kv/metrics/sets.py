"""Distances between generated and real clips: FVD, JEDi and KVD, in any backbone's features."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lightning_kv.metrics.functional.frechet import (
    frechet_distance,
    frechet_error,
    frechet_from_moments,
    null_distance,
)
from lightning_kv.metrics.functional.kernel import (
    JEDI,
    KVD,
    jedi_from_moments,
    kernel_distance,
    kernel_error,
    kernel_null,
)
from lightning_kv.metrics.functional.moments import Covariance, Moments, divisor
from lightning_kv.metrics.set_base import SetMetric
from lightning_kv.metrics.set_result import SetResult, check_comparable

__all__ = [
    "FrechetVideoDistance",
    "JEDi",
    "SetMetric",
    "SetResult",
    "VideoKernelDistance",
    "check_comparable",
]

FORMS = {"jedi": (JEDI, "v"), "jedi-u": (JEDI, "u"), "kvd": (KVD, "u")}
"""Kernel and estimator of the forms of the kernel distance, by name."""


class FrechetVideoDistance(SetMetric):
    """FVD: the Frechet distance between generated and real clips, in the features of a backbone.

    Unterthiner et al., 2018, arXiv 1812.01717; see
    :func:`~lightning_kv.metrics.functional.frechet_distance`. It has a bias that shrinks with the
    number of clips: read it beside ``report().null``.

    Args:
        backbone: As in :class:`SetMetric`.
        covariance: "unbiased" divides by n - 1, "ml" by n.
        kwargs: As in :class:`SetMetric`.

    Example:
        >>> import torch
        >>> metric = FrechetVideoDistance(num_features=4)
        >>> real, generated = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0))
        >>> metric.update_features(real, real=True)
        >>> metric.update_features(generated + 1, real=False)
        >>> result = metric.report()
        >>> result.name, result.null < 1 < result.value, result.status
        ('fvd/given', True, 'ok')
    """

    name = "fvd"
    tests_difference = True
    plot_lower_bound = 0.0

    def __init__(
        self,
        backbone: str | Path | nn.Module | None = None,
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
            f"Frechet distance of Gaussians fitted to the sets, {self.features}, {self.covariance} "
            "covariance, float64"
        )

    def value(self, generated: Tensor | Moments, real: Tensor | Moments) -> Tensor:
        """Distance of two sets, both features or both moments."""
        distance = frechet_distance if self.keep_features else frechet_from_moments
        return distance(generated, real, self.covariance)

    def null(self, real: Tensor | Moments, n: int, units: Tensor) -> float | None:
        """Distance to be expected of so many units of the real population; needs features."""
        if isinstance(real, Moments):
            return None
        return null_distance(real, n, covariance=self.covariance, units=units)

    def error(self, generated: Tensor, real: Tensor, units: Tensor) -> float | None:
        """Standard error of the value over the units of the generated rows."""
        return frechet_error(generated, real, self.covariance, units)

    def status(self, n: int, n_real: int) -> str:
        """What to beware of with so many units."""
        if min(n, n_real) < self.num_features:
            return "fewer units than features: biased, see the null distance"
        return "ok"


class VideoKernelDistance(SetMetric):
    """The kernel distance between generated and real clips, in the features of a backbone.

    See :func:`~lightning_kv.metrics.functional.kernel_distance`. By default it is KID's distance
    (Binkowski et al., 2018, arXiv 1801.01401) for videos, which has no bias and may fall below 0.

    Args:
        backbone: As in :class:`SetMetric`.
        form: "kvd" has the kernel and the estimator u of KID; "jedi" and "jedi-u" are those of
            :class:`JEDi`.
        kwargs: As in :class:`SetMetric`.

    Raises:
        ValueError: The form is unknown, or "kvd" is to do without features.

    Example:
        >>> import torch
        >>> metric = VideoKernelDistance(num_features=4)
        >>> real, generated = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0))
        >>> metric.update_features(real, real=True)
        >>> metric.update_features(generated * 2, real=False)
        >>> result = metric.report()
        >>> result.name, result.null, result.value > 1
        ('kvd/given', 0.0, True)
    """

    name = "kvd"

    def __init__(
        self,
        backbone: str | Path | nn.Module | None = None,
        *,
        form: Literal["kvd", "jedi", "jedi-u"] = "kvd",
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        if form not in FORMS:
            raise ValueError(
                f"There is no kernel distance '{form}'. Choose among {', '.join(FORMS)}."
            )
        if form == "kvd" and not self.keep_features:
            raise ValueError(
                "'kvd' cannot be computed from moments. Keep features, or choose 'jedi'."
            )
        self.name, (self.kernel, self.estimator) = form, FORMS[form]

    @property
    def recipe(self) -> str:
        """One exact sentence; values of different recipes must not be compared."""
        k, bias = self.kernel, "with" if self.estimator == "v" else "without"
        return (
            f"{k.scale:g} MMD² of the kernel (a·b / d + {k.coef0:g})^{k.degree} by the "
            f"estimator {self.estimator} ({bias} pairs of a clip with itself), {self.features}, "
            "float64"
        )

    def value(self, generated: Tensor | Moments, real: Tensor | Moments) -> Tensor:
        """Distance of two sets, both features or both moments."""
        if self.keep_features:
            return kernel_distance(generated, real, self.kernel, self.estimator)
        return jedi_from_moments(generated, real, self.estimator)

    def null(self, real: Tensor | Moments, n: int, units: Tensor) -> float | None:
        """Distance to be expected of so many units of the real population.

        None from moments of clips of which several are of one unit.
        """
        if not isinstance(real, Moments):
            return kernel_null(real, n, self.kernel, self.estimator, units)
        alone = len(units.unique()) == len(units)
        return kernel_null(real, n, self.kernel, self.estimator) if alone else None

    def error(self, generated: Tensor, real: Tensor, units: Tensor) -> float | None:
        """Standard error of the value over the units of the generated rows."""
        return kernel_error(generated, real, self.kernel, self.estimator, units)


class JEDi(VideoKernelDistance):
    """JEDi's kernel distance between generated and real clips (Luo et al., 2024, arXiv 2410.05203).

    It needs no features to be kept. As published it has a bias: read it beside ``report().null``.
    The published backbone, V-JEPA ViT-H fine-tuned on Something-Something-v2, is not here: numbers
    on others are not those of the literature.

    Args:
        backbone: As in :class:`SetMetric`.
        form: "jedi" is the published one (estimator v), "jedi-u" the same kernel without the bias
            (estimator u).
        kwargs: As in :class:`SetMetric`.

    Raises:
        ValueError: The form is another one.

    Example:
        >>> import torch
        >>> metric = JEDi(num_features=4)
        >>> real, generated = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0))
        >>> metric.update_features(real, real=True)
        >>> metric.update_features(generated * 2, real=False)
        >>> result = metric.report()
        >>> result.name, result.null < 10 < result.value
        ('jedi/given', True)
    """

    name = "jedi"

    def __init__(
        self,
        backbone: str | Path | nn.Module | None = None,
        *,
        form: Literal["jedi", "jedi-u"] = "jedi",
        **kwargs: Any,
    ) -> None:
        if form not in ("jedi", "jedi-u"):
            raise ValueError(f"There is no form '{form}' of JEDi. Choose 'jedi' or 'jedi-u'.")
        super().__init__(backbone, form=form, **kwargs)
