"""How far the pixels of a rollout moved from those of its reference, frame by frame."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_kv.metrics.base import Clip, PixelMetric, Reader, clip_value, read_clip
from lightning_kv.metrics.latents import check_shapes

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
        "against the reference: mean over frames after the context of "
        "10 log10(1/max(mse,1e-10)), range [0,1]"
    )
    needs = ("pixels", "reference_pixels")

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """PSNR of every frame."""
        return psnr


class PSNRPooled(PixelMetric):
    """PSNR of the error of a whole clip: the other number that goes by the name of PSNR.

    Errors are averaged and not decibels, so the worst frames decide. The curve is that of
    :class:`PSNR`, and where several pixel frames show one latent frame, it pools them too.

    Example:
        >>> black = torch.zeros(2, 3, 32, 32)
        >>> error = torch.tensor([0.01, 0.1]).view(2, 1, 1, 1)
        >>> clip = Clip(pixels=black + error, reference_pixels=black)
        >>> [round(metric.value(metric.curve(clip)), 2) for metric in (PSNR(), PSNRPooled())]
        [30.0, 22.97]
    """

    name = "psnr_pooled"
    unit = "dB"
    higher_is_better = True
    recipe = (
        "against the reference: 10 log10(1/m) of each clip, m the mean over frames after "
        "the context of max(mse,1e-10), range [0,1]; mean over clips"
    )
    needs = ("pixels", "reference_pixels")

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """PSNR of every frame."""
        return psnr

    def frame_values(self, clip: Clip) -> Tensor:
        """PSNR of the frames, pooled where several show one latent frame."""
        values = read_clip({"": self}, clip.blocks())[""]
        return decibels(clip.per_frame(10 ** (-values / 10)))

    def value(self, curve: Tensor) -> float | None:
        """PSNR of the mean error."""
        mse = clip_value(10 ** (-curve / 10))
        return None if mse is None else decibels(torch.tensor(mse, dtype=torch.float64)).item()


class IdenticalFrames(PixelMetric):
    """Share of frames that equal those of the reference: what lifts a mean of capped PSNRs.

    Example:
        >>> black = torch.zeros(4, 3, 32, 32)
        >>> error = torch.tensor([0.0, 0.0, 0.0, 0.1]).view(4, 1, 1, 1)
        >>> metric = IdenticalFrames()
        >>> metric.update(Clip(pixels=black + error, reference_pixels=black))
        >>> metric.compute().item()
        0.75
    """

    name = "identical_frames"
    unit = "share"
    higher_is_better = True
    recipe = (
        "against the reference: share of frames after the context with mse <= 1e-10, range [0,1]"
    )
    needs = ("pixels", "reference_pixels")
    identical = 1.0

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """1 for frames that are the same, 0 for others."""
        return lambda pixels, reference: (pixel_mse(pixels, reference) <= MSE_FLOOR).double()


class SSIM(PixelMetric):
    """Structural similarity to the reference rollout; see :func:`ssim`.

    Example:
        >>> black = torch.zeros(2, 3, 32, 32)
        >>> metric = SSIM()
        >>> metric.update(Clip(torch.zeros(2, 16, 4, 4), black, reference_pixels=black))
        >>> round(metric.compute().item(), 12)
        1.0
    """

    name = "ssim"
    unit = ""
    higher_is_better = True
    recipe = (
        "against the reference: mean over frames after the context of torchmetrics SSIM, "
        "gaussian 11x11 sigma 1.5, K1 0.01, K2 0.03, reflect padding, no crop, RGB mean, "
        "range [0,1], float64"
    )
    needs = ("pixels", "reference_pixels")
    identical = 1.0

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """SSIM of every frame."""
        return ssim


class MSSSIM(PixelMetric):
    """Multi-scale structural similarity to the reference rollout; see :func:`ms_ssim`.

    Example:
        >>> black = torch.zeros(2, 3, 176, 176)
        >>> metric = MSSSIM()
        >>> metric.update(Clip(pixels=black, reference_pixels=black))
        >>> round(metric.compute().item(), 12)
        1.0
    """

    name = "ms_ssim"
    unit = ""
    higher_is_better = True
    recipe = (
        "against the reference: mean over frames after the context of torchmetrics "
        "MS-SSIM, 5 scales, gaussian 11x11 sigma 1.5, K1 0.01, K2 0.03, reflect padding, contrast "
        "without the border, negative scales 0, RGB mean, range [0,1], float64"
    )
    needs = ("pixels", "reference_pixels")
    identical = 1.0

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """MS-SSIM of every frame."""
        return ms_ssim


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
