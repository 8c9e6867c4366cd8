"""How far frames are from those of a reference, from the pixels alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_kv.metrics.functional.latents import check_shapes

MSE_FLOOR = 1e-10  # of pixels in [0, 1]: identical frames have 100 dB, not infinity
C1, C2 = 0.01**2, 0.03**2  # of SSIM, for values in [0, 1]
RADIUS, SIGMA = 5, 1.5  # of its window, in pixels
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of MS-SSIM, from fine to coarse
TILE = 64  # pixels that one product of matrices blurs
WORKING_SET = 2**19  # values of a clip in hand: the arrays made of them should fit a CPU's cache
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
    return decibels(pixel_mse(preds, target, device))


def pixel_mse(preds: Tensor, target: Tensor, device: Place = None) -> Tensor:
    """Mean squared error of the pixels of every frame.

    Args:
        preds: ``[F, 3, H, W]`` in [0, 1].
        target: The same shape and range.
        device: Where to compute.

    Returns:
        float64 ``[F]``.

    Raises:
        ValueError: The shapes differ, or the values are not floats in [0, 1].

    Example:
        >>> pixel_mse(torch.ones(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5)).tolist()
        [0.25]
    """
    check_pixels(preds, target)
    return _of_planes(lambda a, b: (a - b).square_().mean((1, 2)), preds, target, device)


def decibels(mse: Tensor) -> Tensor:
    """PSNR of a mean squared error of pixels in [0, 1], 100 dB at most.

    Example:
        >>> decibels(torch.tensor([0.01, 0.0], dtype=torch.float64)).round(decimals=9).tolist()
        [20.0, 100.0]
    """
    return -10 * mse.clamp_min(MSE_FLOOR).log10()


def pooled_psnr(values: Tensor) -> Tensor:
    """PSNR of the mean error of several frames, of which each has a PSNR.

    Args:
        values: ``[..., n]`` in dB, as :func:`psnr` says them; NaN where a frame does not count.

    Returns:
        float64 ``[...]`` in dB; NaN where no frame counts.

    Example:
        >>> pooled_psnr(torch.tensor([20.0, 40.0, float("nan")])).round(decimals=4).item()
        22.9671
    """
    return decibels((10 ** (-values.double() / 10)).nanmean(-1))


def identical_frames(preds: Tensor, target: Tensor) -> Tensor:
    """1 for every frame that equals its target but for rounding, 0 for others.

    Args:
        preds: ``[F, 3, H, W]`` in [0, 1].
        target: The same shape and range.

    Returns:
        float64 ``[F]``: whether the mean squared error is at most 1e-10.

    Raises:
        ValueError: The shapes differ, or the values are not floats in [0, 1].

    Example:
        >>> black = torch.zeros(1, 3, 16, 16)
        >>> identical_frames(black, black).tolist(), identical_frames(black + 0.1, black).tolist()
        ([1.0], [0.0])
    """
    return (pixel_mse(preds, target) <= MSE_FLOOR).double()


def ssim(preds: Tensor, target: Tensor, device: Place = None) -> Tensor:
    """Structural similarity of every frame (Wang et al., 2004), computed in float64.

    Gaussian window of 11 x 11 pixels with a deviation of 1.5, K1 = 0.01, K2 = 0.03, reflected at
    the border, mean over the RGB channels: the recipe of torchmetrics, hundreds of times as fast.

    Args:
        preds: ``[F, 3, H, W]`` in [0, 1], H and W at least 6.
        target: The same shape and range.
        device: Where to compute.

    Returns:
        float64 ``[F]``, 1 for identical frames (up to rounding, 1e-13).

    Raises:
        ValueError: The shapes differ, the values are not floats in [0, 1], or frames are smaller.

    Example:
        >>> dark = torch.full((1, 3, 16, 16), 0.25)
        >>> [round(value, 6) for value in ssim(dark, dark + 0.5).tolist()]
        [0.600064]
    """
    check_pixels(preds, target)
    _check_sides(preds, RADIUS + 1, "SSIM")
    return _of_planes(lambda a, b: _similarity(a, b)[0], preds, target, device)


def ms_ssim(preds: Tensor, target: Tensor, device: Place = None) -> Tensor:
    """Multi-scale structural similarity of every frame (Wang et al., 2003), in float64.

    Five scales, halved by means of 2 x 2 pixels, with the window and constants of :func:`ssim`. Of
    the finer four the contrast and structure count, without the border that was reflected; of the
    coarsest, the whole index; negative ones count as 0. The recipe of torchmetrics (which refuses
    sides below 176).

    Args:
        preds: ``[F, 3, H, W]`` in [0, 1], H and W more than 160.
        target: The same shape and range.
        device: Where to compute.

    Returns:
        float64 ``[F]``, 1 for identical frames (up to rounding, 1e-13).

    Raises:
        ValueError: The shapes differ, the values are not floats in [0, 1], or frames are smaller.

    Example:
        >>> dark = torch.full((1, 3, 161, 161), 0.25)
        >>> [round(value, 6) for value in ms_ssim(dark, dark + 0.5).tolist()]
        [0.934187]
    """
    check_pixels(preds, target)
    _check_sides(preds, 2 * RADIUS * 2 ** (len(SCALES) - 1) + 1, "MS-SSIM")
    scales = _of_planes(_scales, preds, target, device).relu()
    return scales.pow(scales.new_tensor(SCALES).view(-1, 1)).prod(0)


def _of_planes(
    measure: Callable[[Tensor, Tensor], Tensor], preds: Tensor, target: Tensor, device: Place
) -> Tensor:
    """Mean over the channels of every frame, where each channel is measured alone.

    Args:
        measure: Maps two stacks of planes, float64 ``[n, H, W]``, to values ``[..., n]``.
        preds: ``[F, C, H, W]``.
        target: The same shape.
        device: Where to compute.

    Returns:
        float64 ``[..., F]``.
    """
    planes = max(1, WORKING_SET // preds[0, 0].numel())
    pairs = zip(preds.flatten(0, 1).split(planes), target.flatten(0, 1).split(planes), strict=True)
    values = [measure(*(x.to(device or x.device).double() for x in pair)) for pair in pairs]
    return torch.cat(values, -1).unflatten(-1, preds.shape[:2]).mean(-1)


def _scales(a: Tensor, b: Tensor) -> Tensor:
    """What MS-SSIM multiplies of every plane, ``[5, n]``."""
    found = []
    for _ in SCALES[:-1]:
        found.append(_similarity(a, b)[1])
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return torch.stack([*found, _similarity(a, b)[0]])


def _similarity(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM of every plane ``[n, H, W]``, and its contrast and structure without the border."""
    a, b = (F.pad(x, [RADIUS] * 4, mode="reflect") for x in (a, b))
    tops = range(0, a.shape[1] - 2 * RADIUS, TILE)
    strips = [_rows(*(x[:, top : top + TILE + 2 * RADIUS] for x in (a, b))) for top in tops]
    similarity, contrast = (torch.cat(rows, 1) for rows in zip(*strips, strict=True))
    return similarity.mean(1), contrast[:, RADIUS:-RADIUS].mean(1)


def _rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same of every row inside the border of 5 that was added to a strip: ``[n, h]``."""
    moments = torch.stack([a, b, a.square() + b.square(), a * b])
    mean_a, mean_b, squares, products = _blur(moments)
    both, power = mean_a * mean_b, mean_a.square_() + mean_b.square_()
    # Rounding leaves variances of flat regions slightly below zero.
    variance = squares.sub_(power).clamp_min_(0).add_(C2)
    contrast = products.sub_(both).mul_(2).add_(C2).div_(variance)
    luminance = both.mul_(2).add_(C1).div_(power.add_(C1))
    return luminance.mul_(contrast).mean(2), contrast[..., RADIUS:-RADIUS].mean(2)


def _blur(strip: Tensor) -> Tensor:
    """Gaussian means inside the border of 5: of ``[..., h + 10, w + 10]``, ``[..., h, w]``.

    Libraries convolve float64 slowly on CPUs; they multiply it with a band of a matrix fast.
    """
    height, width = (side - 2 * RADIUS for side in strip.shape[-2:])
    band = _band(max(TILE, height), strip)
    blurred, columns = band[:height, : height + 2 * RADIUS] @ strip, []
    for left in range(0, width, TILE):
        part = blurred[..., left : left + TILE + 2 * RADIUS]
        columns.append(part @ band[: part.shape[-1] - 2 * RADIUS, : part.shape[-1]].T)
    return torch.cat(columns, -1)


def _band(rows: int, like: Tensor) -> Tensor:
    """Matrix ``[rows, rows + 10]`` that takes the Gaussian mean around each of its rows."""
    offsets = torch.arange(-RADIUS, RADIUS + 1, dtype=like.dtype, device=like.device)
    taps = (-offsets.square() / (2 * SIGMA**2)).exp()
    band = like.new_zeros(rows, rows + 2 * RADIUS)
    for offset, tap in enumerate(taps / taps.sum()):
        band.diagonal(offset).fill_(tap)
    return band


def _check_sides(pixels: Tensor, smallest: int, name: str) -> None:
    height, width = pixels.shape[-2:]
    if min(height, width) < smallest:
        raise ValueError(
            f"Frames are too small for {name}: {height} x {width} pixels. "
            f"Pass frames with sides of more than {smallest - 1} pixels, or leave {name} out."
        )


def check_pixels(preds: Tensor, target: Tensor) -> None:
    """Check that the frames of two clips can be compared.

    Raises:
        ValueError: Their shapes differ, or the values are not floats in [0, 1].
    """
    check_shapes(preds, target)
    for pixels in (preds, target):
        low, high = (float(limit) for limit in pixels.aminmax())
        # Written so that NaN is refused too.
        if not (pixels.is_floating_point() and low >= 0 and high <= 1):
            raise ValueError(
                f"Pixels are out of range: {pixels.dtype} from {low:g} to {high:g}. "
                "Pass floats in [0, 1]; divide 8-bit values by 255."
            )
