"""How far latents are from those of a reference; no weights, no decoding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_kv.stats.divergence import ONSET
from lightning_kv.stats.divergence import divergence_onset as seconds_to_onset

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


def divergence(preds: Tensor, target: Tensor) -> Tensor:
    """Relative latent distance of every frame, 1 being that of two independent samples.

    :func:`latent_relative` by the root of 2, which it is between samples of equal power that have
    nothing in common.

    Args:
        preds: ``[F, C, h, w]``.
        target: The same shape.

    Returns:
        float64 ``[F]``; NaN where the target is zero.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> first, second = torch.eye(2).view(2, 1, 1, 2, 1)
        >>> divergence(first, second).item(), divergence(first, first).item()
        (1.0, 0.0)
    """
    return latent_relative(preds, target) / math.sqrt(2)


def divergence_onset(calibrated: Tensor, threshold: float = ONSET) -> int | None:
    """Number of frames until a divergence first exceeds a threshold; all if it never does.

    Args:
        calibrated: ``[F]``, as :func:`divergence` says it; frames are counted from the first that
            is not NaN.
        threshold: What counts as diverged.

    Returns:
        Frames; None where no frame counts.

    Example:
        >>> curve = torch.tensor([float("nan"), 0.0, 0.05, 0.2, 0.0])
        >>> divergence_onset(curve), divergence_onset(curve[:3])
        (2, 2)
    """
    counted = (~calibrated.isnan()).nonzero()[:, 0].tolist()
    if not counted:
        return None
    curve = calibrated[counted[0] :].tolist()
    onset = seconds_to_onset(curve, rate=1, threshold=threshold)
    return len(curve) if onset is None else int(onset)


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
