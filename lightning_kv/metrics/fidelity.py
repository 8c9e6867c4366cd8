"""How far a rollout moved from its reference: same prompt, same noise, frame by frame."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from lightning_kv.metrics.base import BLOCK, Clip, ClipMetric, PixelMetric, Reader

MSE_FLOOR = 1e-10  # of pixels in [0, 1]: identical frames have 100 dB, not infinity

Place = torch.device | str | None
"""Where to compute; where the pixels are, if None."""


def psnr(preds: Tensor, target: Tensor, device: Place = None) -> Tensor:
    """Peak signal-to-noise ratio of every frame, 100 dB at most.

    Args:
        preds: ``[F, 3, H, W]`` in [0, 1].
        target: The same shape and range.
        device: Where to compute.

    Returns:
        float64 ``[F]`` in dB.

    Raises:
        ValueError: The shapes differ, or the values are not floats in [0, 1].

    Example:
        >>> black = torch.zeros(1, 3, 16, 16)
        >>> psnr(black + 0.1, black).round(decimals=4).tolist()
        [20.0]
        >>> psnr(black, black).tolist()
        [100.0]
    """
    _check_pixels(preds, target)
    mse = torch.cat([_frame_mse(a, b) for a, b in _blocks(preds, target, device)])
    return -10 * mse.clamp_min(MSE_FLOOR).log10()


def ssim(preds: Tensor, target: Tensor, device: Place = None) -> Tensor:
    """Structural similarity of every frame (Wang et al., 2004), computed in float64.

    Gaussian window of 11 x 11 pixels with a deviation of 1.5, K1 = 0.01, K2 = 0.03, reflected at
    the border, mean over the RGB channels: the recipe of torchmetrics, which does the work.

    Args:
        preds: ``[F, 3, H, W]`` in [0, 1], H and W at least 6.
        target: The same shape and range.
        device: Where to compute.

    Returns:
        float64 ``[F]``, 1 for identical frames.

    Raises:
        ValueError: The shapes differ, or the values are not floats in [0, 1].

    Example:
        >>> dark = torch.full((1, 3, 16, 16), 0.25)
        >>> [round(value, 6) for value in ssim(dark, dark + 0.5).tolist()]
        [0.600064]
    """
    _check_pixels(preds, target)
    values = [
        structural_similarity_index_measure(
            a.double(), b.double(), sigma=1.5, kernel_size=11, reduction="none", data_range=1.0
        )
        for a, b in _blocks(preds, target, device)
    ]
    return torch.cat([value.reshape(-1) for value in values])


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
    _check_shapes(preds, target)
    return _frame_mse(preds, target)


class PSNR(PixelMetric):
    """Peak signal-to-noise ratio against the reference rollout; see :func:`psnr`.

    Example:
        >>> black = torch.zeros(2, 3, 32, 32)
        >>> clip = Clip(torch.zeros(2, 16, 4, 4), black + 0.1, reference_pixels=black, context=1)
        >>> PSNR().curve(clip).round(decimals=4).tolist()
        [nan, 20.0]
    """

    name = "psnr"
    unit = "dB"
    higher_is_better = True
    recipe = (
        "against the reference rollout: mean over frames after the context of "
        "10 log10(1/max(mse,1e-10)), range [0,1]"
    )
    needs = ("pixels", "reference_pixels")

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """PSNR of every frame."""
        return psnr


class SSIM(PixelMetric):
    """Structural similarity to the reference rollout; see :func:`ssim`.

    Example:
        >>> black = torch.zeros(2, 3, 32, 32)
        >>> metric = SSIM()
        >>> metric.update(Clip(torch.zeros(2, 16, 4, 4), black, reference_pixels=black))
        >>> metric.compute().item()
        1.0
    """

    name = "ssim"
    unit = ""
    higher_is_better = True
    recipe = (
        "against the reference rollout: mean over frames after the context of torchmetrics SSIM, "
        "gaussian 11x11 sigma 1.5, K1 0.01, K2 0.03, reflect padding, no crop, RGB mean, "
        "range [0,1], float64"
    )
    needs = ("pixels", "reference_pixels")

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """SSIM of every frame."""
        return ssim


class LatentMSE(ClipMetric):
    """Mean squared error of the latents against the reference rollout; see :func:`latent_mse`.

    Example:
        >>> pixels, zeros = torch.zeros(2, 3, 32, 32), torch.zeros(2, 16, 4, 4)
        >>> metric = LatentMSE()
        >>> metric.update(Clip(zeros + 2, pixels, reference_latents=zeros))
        >>> metric.compute().item()
        4.0
    """

    name = "latent_mse"
    unit = "latent^2"
    higher_is_better = False
    recipe = (
        "against the reference rollout: mean over frames after the context of the mean squared "
        "latent difference, float64"
    )
    needs = ("reference_latents",)

    def frame_values(self, clip: Clip) -> Tensor:
        """Latent MSE of every frame."""
        return latent_mse(clip.latents, clip.reference_latents)


def _blocks(preds: Tensor, target: Tensor, device: Place) -> Iterator[tuple[Tensor, Tensor]]:
    """A few frames of both at a time, where they are to be compared."""
    for pair in zip(preds.split(BLOCK), target.split(BLOCK), strict=True):
        yield tuple(x if device is None else x.to(device) for x in pair)


def _frame_mse(preds: Tensor, target: Tensor) -> Tensor:
    return (preds.double() - target.double()).square().flatten(1).mean(1)


def _check_shapes(preds: Tensor, target: Tensor) -> None:
    if preds.shape != target.shape or preds.ndim != 4:
        raise ValueError(
            f"Two clips cannot be compared: their shapes are {tuple(preds.shape)} and "
            f"{tuple(target.shape)}. Pass two tensors [frames, channels, height, width] "
            "of the same shape."
        )


def _check_pixels(preds: Tensor, target: Tensor) -> None:
    _check_shapes(preds, target)
    for pixels in (preds, target):
        low, high = (float(limit) for limit in pixels.aminmax())
        # Written so that NaN is refused too.
        if not (pixels.is_floating_point() and low >= 0 and high <= 1):
            raise ValueError(
                f"Pixels are out of range: {pixels.dtype} from {low:g} to {high:g}. "
                "Pass floats in [0, 1]; divide 8-bit values by 255."
            )
