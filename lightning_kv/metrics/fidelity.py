"""How far the pixels of a rollout moved from those of its reference, frame by frame."""

from __future__ import annotations

from torch import Tensor

from lightning_kv.metrics.base import VideoMetric
from lightning_kv.metrics.functional.fidelity import (
    identical_frames,
    ms_ssim,
    pooled_psnr,
    psnr,
    ssim,
)


class PSNRMean(VideoMetric):
    """Mean over frames of the peak signal-to-noise ratio against the reference rollout.

    Decibels are averaged and not errors, so frames that equal those of the reference lift it: read
    it beside :class:`IdenticalFrames`. See :func:`~lightning_kv.metrics.functional.psnr`.

    Example:
        >>> import torch
        >>> black = torch.zeros(1, 2, 3, 32, 32)
        >>> error = torch.tensor([0.01, 0.1]).view(2, 1, 1, 1)
        >>> metric = PSNRMean()
        >>> metric.update(black + error, black)
        >>> round(metric.compute().item(), 4)
        30.0
    """

    name = "psnr_mean"
    unit = "dB"
    higher_is_better = True
    recipe = (
        "against the reference: mean over frames after the context of "
        "10 log10(1/max(mse,1e-10)), range [0,1]"
    )
    paired = True
    identical = 100.0  # dB of the smallest error that is told from none
    plot_lower_bound = 0.0
    plot_upper_bound = 100.0

    def frame_values(self, preds: Tensor, target: Tensor | None = None) -> Tensor:
        """PSNR of every frame."""
        return psnr(preds, target)


class PSNR(PSNRMean):
    """Peak signal-to-noise ratio of the error of a whole clip against the reference rollout.

    Errors are averaged and not decibels, so the worst frames decide: for clips of one length it is
    torchmetrics' number of each clip, 100 dB at most. The curve is that of :class:`PSNRMean`, and
    where several pixel frames show one latent frame, it pools them too.

    Example:
        >>> import torch
        >>> black = torch.zeros(1, 2, 3, 32, 32)
        >>> error = torch.tensor([0.01, 0.1]).view(2, 1, 1, 1)
        >>> metric = PSNR()
        >>> metric.update(black + error, black)
        >>> round(metric.compute().item(), 4)
        22.9671
    """

    name = "psnr"
    recipe = (
        "against the reference: 10 log10(1/m) of each clip, m the mean over frames after "
        "the context of max(mse,1e-10), range [0,1]"
    )

    def pooled(self, values: Tensor) -> Tensor:
        """PSNR of the mean error of the frames that show one latent frame."""
        return pooled_psnr(values)

    def value(self, curve: Tensor) -> float | None:
        """PSNR of the mean error."""
        return None if curve.isnan().all() else pooled_psnr(curve).item()


class IdenticalFrames(VideoMetric):
    """Share of frames that equal those of the reference: what lifts a mean of capped PSNRs.

    Example:
        >>> import torch
        >>> black = torch.zeros(1, 4, 3, 32, 32)
        >>> error = torch.tensor([0.0, 0.0, 0.0, 0.1]).view(4, 1, 1, 1)
        >>> metric = IdenticalFrames()
        >>> metric.update(black + error, black)
        >>> metric.compute().item()
        0.75
    """

    name = "identical_frames"
    unit = "share"
    higher_is_better = True
    recipe = (
        "against the reference: share of frames after the context with mse <= 1e-10, range [0,1]"
    )
    paired = True
    identical = 1.0
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def frame_values(self, preds: Tensor, target: Tensor | None = None) -> Tensor:
        """1 for frames that are the same, 0 for others."""
        return identical_frames(preds, target)


class SSIM(VideoMetric):
    """Structural similarity to the reference; see :func:`~lightning_kv.metrics.functional.ssim`.

    Example:
        >>> import torch
        >>> black = torch.zeros(1, 2, 3, 32, 32)
        >>> metric = SSIM()
        >>> metric.update(black, black)
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
    paired = True
    identical = 1.0
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    def frame_values(self, preds: Tensor, target: Tensor | None = None) -> Tensor:
        """SSIM of every frame."""
        return ssim(preds, target)


class MSSSIM(VideoMetric):
    """Multi-scale structural similarity; see :func:`~lightning_kv.metrics.functional.ms_ssim`.

    Example:
        >>> import torch
        >>> black = torch.zeros(1, 2, 3, 176, 176)
        >>> metric = MSSSIM()
        >>> metric.update(black, black)
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
    paired = True
    identical = 1.0
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def frame_values(self, preds: Tensor, target: Tensor | None = None) -> Tensor:
        """MS-SSIM of every frame."""
        return ms_ssim(preds, target)
