"""How far the latents of a rollout moved from those of its reference; no weights, no decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_kv.metrics.base import Clip, ClipMetric

RATIO_FLOOR = 1e-10  # of error to signal: identical frames have 100 dB, not infinity


def latent_mse(preds: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the latents of every frame.

    Args:
        preds: ``[F, C, h, w]``.
        target: The same shape.

    Returns:
        float64 ``[F]``.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> latent_mse(torch.zeros(2, 16, 4, 4), torch.full((2, 16, 4, 4), 2.0)).tolist()
        [4.0, 4.0]
    """
    a, b = _rows(preds, target)
    return (a - b).square().mean(1)


def latent_relative(preds: Tensor, target: Tensor) -> Tensor:
    """Length of the difference of every frame, divided by the length of the target.

    Args:
        preds: ``[F, C, h, w]``.
        target: The same shape.

    Returns:
        float64 ``[F]``; NaN where the target is zero.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> ones = torch.ones(1, 16, 4, 4)
        >>> latent_relative(1.5 * ones, ones).tolist()
        [0.5]
    """
    a, b = _rows(preds, target)
    length = b.norm(dim=1)
    return ((a - b).norm(dim=1) / length).masked_fill(length == 0, torch.nan)


def latent_cosine(preds: Tensor, target: Tensor) -> Tensor:
    """Cosine of the angle between the latents of every frame.

    Args:
        preds: ``[F, C, h, w]``.
        target: The same shape.

    Returns:
        float64 ``[F]``; NaN where one of the two is zero.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> ones = torch.ones(1, 16, 4, 4)
        >>> latent_cosine(-2 * ones, ones).tolist()
        [-1.0]
    """
    a, b = _rows(preds, target)
    lengths = a.norm(dim=1) * b.norm(dim=1)
    return ((a * b).sum(1) / lengths).clamp(-1, 1).masked_fill(lengths == 0, torch.nan)


def latent_snr(preds: Tensor, target: Tensor) -> Tensor:
    """Signal-to-noise ratio of every frame, the difference being the noise; 100 dB at most.

    Args:
        preds: ``[F, C, h, w]``.
        target: The same shape.

    Returns:
        float64 ``[F]`` in dB; NaN where the target is zero.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> ones = torch.ones(1, 16, 4, 4)
        >>> latent_snr(1.1 * ones, ones).round(decimals=4).tolist()
        [20.0]
    """
    return -10 * latent_relative(preds, target).square().clamp_min(RATIO_FLOOR).log10()


def channel_shift(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Difference of the mean, and of the deviation, of every channel: colour and contrast drift.

    Args:
        preds: ``[F, C, h, w]``.
        target: The same shape.

    Returns:
        Two float64 ``[F, C]``; the deviation is that of the population.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> ones = torch.ones(1, 2, 4, 4)
        >>> [shift.tolist() for shift in channel_shift(1.5 * ones, ones)]
        [[[0.5, 0.5]], [[0.0, 0.0]]]
    """
    check_shapes(preds, target)
    a, b = preds.double().flatten(2), target.double().flatten(2)
    return a.mean(2) - b.mean(2), a.std(2, correction=0) - b.std(2, correction=0)


def latent_shift(preds: Tensor, target: Tensor) -> Tensor:
    """How far means and deviations of the channels of every frame moved, in one number.

    Root mean square over channels of the 2-Wasserstein distance of two normal distributions with
    these moments, which is ``sqrt(mean shift^2 + deviation shift^2)``.

    Args:
        preds: ``[F, C, h, w]``.
        target: The same shape.

    Returns:
        float64 ``[F]``, in units of the latents.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> ones = torch.ones(1, 2, 4, 4)
        >>> latent_shift(1.5 * ones, ones).tolist()
        [0.5]
    """
    means, deviations = channel_shift(preds, target)
    return (means.square() + deviations.square()).mean(1).sqrt()


class LatentMetric(ClipMetric):
    """A metric that compares the latents of each frame with those of the reference.

    A subclass sets ``measure``: a function of both, ``[F, C, h, w]``, that gives float64 ``[F]``.
    """

    needs = ("latents", "reference_latents")
    measure: Callable[[Tensor, Tensor], Tensor]

    def frame_values(self, clip: Clip) -> Tensor:
        """Value of every frame."""
        return type(self).measure(clip.latents, clip.reference_latents)


class LatentMSE(LatentMetric):
    """Mean squared error of the latents against the reference rollout; see :func:`latent_mse`.

    Example:
        >>> zeros = torch.zeros(2, 16, 4, 4)
        >>> metric = LatentMSE()
        >>> metric.update(Clip(zeros + 2, reference_latents=zeros))
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
    measure = staticmethod(latent_mse)


class LatentRelative(LatentMetric):
    """Relative error of the latents against the reference rollout; see :func:`latent_relative`.

    Example:
        >>> ones = torch.ones(2, 16, 4, 4)
        >>> metric = LatentRelative()
        >>> metric.update(Clip(1.5 * ones, reference_latents=ones))
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
    measure = staticmethod(latent_relative)


class LatentCosine(LatentMetric):
    """Cosine between the latents and those of the reference rollout; see :func:`latent_cosine`.

    Example:
        >>> ones = torch.ones(2, 16, 4, 4)
        >>> metric = LatentCosine()
        >>> metric.update(Clip(1.5 * ones, reference_latents=ones))
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
    measure = staticmethod(latent_cosine)


class LatentSNR(LatentMetric):
    """Signal-to-noise ratio of the latents against the reference rollout; see :func:`latent_snr`.

    Example:
        >>> ones = torch.ones(2, 16, 4, 4)
        >>> metric = LatentSNR()
        >>> metric.update(Clip(1.1 * ones, reference_latents=ones))
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
    measure = staticmethod(latent_snr)


class LatentShift(LatentMetric):
    """Colour and contrast drift away from the reference rollout; see :func:`latent_shift`.

    Example:
        >>> ones = torch.ones(2, 16, 4, 4)
        >>> metric = LatentShift()
        >>> metric.update(Clip(1.5 * ones, reference_latents=ones))
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
    measure = staticmethod(latent_shift)


def check_shapes(preds: Tensor, target: Tensor) -> None:
    """Check that two clips can be compared.

    Raises:
        ValueError: Their shapes differ, or are not of four dimensions.
    """
    if preds.shape != target.shape or preds.ndim != 4:
        raise ValueError(
            f"Two clips cannot be compared: their shapes are {tuple(preds.shape)} and "
            f"{tuple(target.shape)}. Pass two tensors [frames, channels, height, width] "
            "of the same shape."
        )


def _rows(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 ``[F, C h w]``."""
    check_shapes(preds, target)
    return preds.double().flatten(1), target.double().flatten(1)
