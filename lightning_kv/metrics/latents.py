"""How far the latents of a rollout moved from those of its reference; no weights, no decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from lightning_kv.metrics.base import ClipMetric
from lightning_kv.metrics.functional.latents import (
    divergence,
    divergence_onset,
    latent_cosine,
    latent_mse,
    latent_relative,
    latent_shift,
    latent_snr,
)
from lightning_kv.metrics.inputs import Labels, latents_of
from lightning_kv.metrics.reading import per_frame
from lightning_kv.stats.divergence import ONSET


class LatentMetric(ClipMetric):
    """A metric that compares the latents of each frame with those of the reference.

    A subclass sets ``measure``, a function of both, ``[F, C, h, w]``, that gives float64 ``[F]``;
    or writes :meth:`curve`.

    Args:
        kwargs: As in :class:`~lightning_kv.metrics.base.ClipMetric`.

    Example:
        >>> import torch
        >>> class Largest(LatentMetric):
        ...     measure = lambda preds, target: (preds - target).abs().flatten(1).amax(1)
        >>> metric = Largest()
        >>> metric.update(torch.ones(1, 5, 16, 4, 4), torch.zeros(1, 5, 16, 4, 4))
        >>> metric.compute().item()
        1.0
    """

    needs: ClassVar[tuple[str, ...]] = ("latents", "reference_latents")
    measure: Callable[[Tensor, Tensor], Tensor]

    def curve(self, preds: Tensor, target: Tensor) -> Tensor:
        """Value of every frame of one clip, float64 ``[F]``; adds nothing.

        Args:
            preds: ``[F, C, h, w]``.
            target: The same shape.

        Raises:
            ValueError: ``measure`` does not say one value per frame.
        """
        return per_frame(self.name, type(self).measure(preds, target), len(preds), "its measure")

    def update(
        self,
        preds: Tensor | Sequence[Tensor],
        target: Tensor | Sequence[Tensor],
        *,
        ids: Labels = None,
        units: Labels = None,
    ) -> None:
        """Add a batch of clips.

        Args:
            preds: Latents ``[B, F, C, h, w]``; or a list of ``[F, C, h, w]`` of any lengths.
            target: What they are compared with, of the same shapes.
            ids: As in :meth:`~lightning_kv.metrics.base.VideoMetric.update`.
            units: As there.

        Raises:
            ValueError: Shapes, types or numbers do not fit, or a value is not finite.
        """
        clips = latents_of("preds", preds, self.device)
        targets = latents_of("target", target, self.device, like=clips)
        curves = (self.curve(one, other) for one, other in zip(clips, targets, strict=True))
        self._add_all(curves, ids, units, len(clips))


class LatentMSE(LatentMetric):
    """Mean squared error of the latents against the reference rollout.

    See :func:`~lightning_kv.metrics.functional.latent_mse`.

    Example:
        >>> import torch
        >>> zeros = torch.zeros(1, 2, 16, 4, 4)
        >>> metric = LatentMSE()
        >>> metric.update(zeros + 2, zeros)
        >>> metric.compute().item()
        4.0
    """

    name = "latent_mse"
    unit = "latent^2"
    higher_is_better = False
    recipe = (
        "against the reference: mean over frames after the context of the mean squared "
        "latent difference, float64"
    )
    identical = 0.0
    plot_lower_bound = 0.0
    measure = staticmethod(latent_mse)


class LatentRelative(LatentMetric):
    """Relative error of the latents against the reference rollout.

    See :func:`~lightning_kv.metrics.functional.latent_relative`.

    Example:
        >>> import torch
        >>> ones = torch.ones(1, 2, 16, 4, 4)
        >>> metric = LatentRelative()
        >>> metric.update(1.5 * ones, ones)
        >>> metric.compute().item()
        0.5
    """

    name = "latent_relative"
    unit = ""
    higher_is_better = False
    recipe = (
        "against the reference: mean over frames after the context of "
        "|latent - reference| / |reference|, L2 norms over a frame, float64; frames with a zero "
        "reference have no value"
    )
    identical = 0.0
    plot_lower_bound = 0.0
    measure = staticmethod(latent_relative)


class LatentCosine(LatentMetric):
    """Cosine between the latents and those of the reference rollout.

    See :func:`~lightning_kv.metrics.functional.latent_cosine`.

    Example:
        >>> import torch
        >>> ones = torch.ones(1, 2, 16, 4, 4)
        >>> metric = LatentCosine()
        >>> metric.update(1.5 * ones, ones)
        >>> metric.compute().item()
        1.0
    """

    name = "latent_cosine"
    unit = ""
    higher_is_better = True
    recipe = (
        "against the reference: mean over frames after the context of the cosine between "
        "the latents of a frame, float64; zero frames have no value"
    )
    identical = 1.0
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0
    measure = staticmethod(latent_cosine)


class LatentSNR(LatentMetric):
    """Signal-to-noise ratio of the latents against the reference rollout.

    See :func:`~lightning_kv.metrics.functional.latent_snr`.

    Example:
        >>> import torch
        >>> ones = torch.ones(1, 2, 16, 4, 4)
        >>> metric = LatentSNR()
        >>> metric.update(1.1 * ones, ones)
        >>> round(metric.compute().item(), 4)
        20.0
    """

    name = "latent_snr"
    unit = "dB"
    higher_is_better = True
    recipe = (
        "against the reference: mean over frames after the context of 10 log10(1/max(r^2,"
        "1e-10)), r = |latent - reference| / |reference|, float64; frames with a zero reference "
        "have no value"
    )
    identical = 100.0
    plot_upper_bound = 100.0
    measure = staticmethod(latent_snr)


class LatentShift(LatentMetric):
    """Colour and contrast drift away from the reference rollout.

    See :func:`~lightning_kv.metrics.functional.latent_shift`.

    Example:
        >>> import torch
        >>> ones = torch.ones(1, 2, 16, 4, 4)
        >>> metric = LatentShift()
        >>> metric.update(1.5 * ones, ones)
        >>> metric.compute().item()
        0.5
    """

    name = "latent_shift"
    unit = "latent"
    higher_is_better = False
    recipe = (
        "against the reference: mean over frames after the context of the root mean square "
        "over channels of sqrt((mean shift)^2 + (deviation shift)^2), float64"
    )
    identical = 0.0
    plot_lower_bound = 0.0
    measure = staticmethod(latent_shift)


class DivergenceOnset(LatentMetric):
    """How many frames a rollout stays with its reference before it goes ways of its own.

    The curve is the relative latent distance by the root of 2: 1 is what two samples have that have
    nothing in common. The value is the number of frames after the given ones before it first
    exceeds 0.1; a clip that never does counts all of its frames, so clips of different lengths
    are not to be compared. See :func:`~lightning_kv.metrics.functional.divergence_onset`.

    Args:
        kwargs: As in :class:`LatentMetric`.

    Example:
        >>> import torch
        >>> ones = torch.ones(1, 4, 16, 4, 4)
        >>> drift = torch.tensor([0.0, 0.1, 0.2, 0.3]).view(4, 1, 1, 1)
        >>> metric = DivergenceOnset()
        >>> metric.update(ones + drift, ones)
        >>> metric.compute().item()
        2.0
    """

    name = "divergence_onset"
    unit = "frames"
    higher_is_better = True
    recipe = (
        "against the reference: frames after the context before |latent - reference| / "
        f"|reference| / sqrt(2), L2 norms over a frame, float64, first exceeds {ONSET:g}; all "
        "frames after the context where it never does; curve: that distance"
    )
    plot_lower_bound = 0.0
    measure = staticmethod(divergence)

    def value(self, curve: Tensor) -> float | None:
        """Frames before the curve first exceeds the threshold; None where no frame counts."""
        onset = divergence_onset(curve)
        return None if onset is None else float(onset)
