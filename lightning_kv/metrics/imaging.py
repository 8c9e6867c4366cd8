"""What single frames look like: sharpness, light and colour, and a learned score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_kv.metrics.base import VideoMetric
from lightning_kv.metrics.features import FeatureMetric
from lightning_kv.metrics.functional.imaging import (
    brightness,
    colourfulness,
    contrast,
    saturation,
    sharpness,
)


class FrameMetric(VideoMetric):
    """A metric whose value of a frame depends on that frame alone.

    A subclass sets ``measure``, which takes frames ``[f, 3, H, W]`` and says ``[f]``.
    """

    measure: Callable[[Tensor], Tensor]

    def frame_values(self, preds: Tensor, target: Tensor | None = None) -> Tensor:
        """The measure of every frame."""
        return type(self).measure(preds)


class Sharpness(FrameMetric):
    """How sharp the frames are; noise counts as sharp.

    See :func:`~lightning_kv.metrics.functional.sharpness`.

    Example:
        >>> import torch
        >>> Sharpness().curve(torch.zeros(2, 3, 4, 4)).tolist()
        [0.0, 0.0]
    """

    name = "sharpness"
    unit = "intensity^2"
    higher_is_better = None
    recipe = (
        "mean over frames after the context of the variance of the Laplacian (4 neighbours, no "
        "padding) of the BT.601 luma, range [0,1], float64"
    )
    measure = staticmethod(sharpness)
    plot_lower_bound = 0.0


class Brightness(FrameMetric):
    """How bright the frames are; see :func:`~lightning_kv.metrics.functional.brightness`.

    Neither way is good in itself; what counts is that it does not drift. The same holds of
    contrast, colourfulness and saturation.

    Example:
        >>> import torch
        >>> Brightness().curve(torch.full((2, 3, 4, 4), 0.5)).tolist()
        [0.5, 0.5]
    """

    name = "brightness"
    unit = "intensity"
    higher_is_better = None
    recipe = "mean over frames after the context of the mean BT.601 luma, range [0,1], float64"
    measure = staticmethod(brightness)
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0


class Contrast(FrameMetric):
    """Contrast of the frames; neither way is good in itself.

    See :func:`~lightning_kv.metrics.functional.contrast`.

    Example:
        >>> import torch
        >>> Contrast().curve(torch.zeros(2, 3, 4, 4)).tolist()
        [0.0, 0.0]
    """

    name = "contrast"
    unit = "intensity"
    higher_is_better = None
    recipe = (
        "mean over frames after the context of the standard deviation (over all pixels, 1/N) of "
        "the BT.601 luma, range [0,1], float64"
    )
    measure = staticmethod(contrast)
    plot_lower_bound = 0.0
    plot_upper_bound = 0.5


class Colourfulness(FrameMetric):
    """Colourfulness of the frames; neither way is good in itself.

    See :func:`~lightning_kv.metrics.functional.colourfulness`.

    Example:
        >>> import torch
        >>> Colourfulness().curve(torch.ones(2, 3, 4, 4)).tolist()
        [0.0, 0.0]
    """

    name = "colourfulness"
    unit = ""
    higher_is_better = None
    recipe = (
        "mean over frames after the context of M3 of Hasler and Suesstrunk (2003), variances with "
        "1/N, range [0,255], not rounded, float64"
    )
    measure = staticmethod(colourfulness)
    plot_lower_bound = 0.0


class Saturation(FrameMetric):
    """Saturation of the frames; neither way is good in itself.

    See :func:`~lightning_kv.metrics.functional.saturation`.

    Example:
        >>> import torch
        >>> Saturation().curve(torch.ones(2, 3, 4, 4)).tolist()
        [0.0, 0.0]
    """

    name = "saturation"
    unit = ""
    higher_is_better = None
    recipe = (
        "mean over frames after the context of the mean HSV saturation (max - min) / max, 0 for "
        "black, float64"
    )
    measure = staticmethod(saturation)
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0


class ImagingQuality(FeatureMetric):
    """How good frames look to MUSIQ, a network trained on people's ratings of phone pictures.

    VBench's imaging quality (Huang et al., arXiv 2311.17982). The weights forbid commercial use,
    and the network is in the optional package ``pyiqa``.

    Args:
        backbone: ``musiq-spaq``, or a module that maps frames ``[N, 3, H, W]`` in [0, 1] to scores
            ``[N, 1]`` of about 0 to 1.
        given: Where the weights lie; by default they are looked for.
        accept: Licences accepted, ``CC-BY-NC-SA-4.0`` for ``musiq-spaq``.
        kwargs: What every torchmetrics metric takes.

    Raises:
        ValueError: The network does not fit, or does not give one score per frame.
        WeightsUnavailable: The weights, the licence or the package is missing.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Light(nn.Module):
        ...     def forward(self, frames):
        ...         return frames.mean((1, 2, 3)).unsqueeze(1)
        >>> ImagingQuality(Light()).curve(torch.full((2, 3, 4, 4), 0.5)).tolist()
        [0.5, 0.5]
    """

    name = "imaging_quality"
    unit = ""
    higher_is_better = True
    recipe = "mean over frames after the context of a learned score of single frames"
    backbones = ("musiq-spaq",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.backbone.num_features != 1:
            raise ValueError(
                f"The metric '{type(self).name}' needs one score per frame, and "
                f"'{self.backbone.name}' gives {self.backbone.num_features} numbers. Choose "
                f"{', '.join(self.backbones)}, or pass a module that gives [N, 1]."
            )

    def frame_values(self, preds: Tensor, target: Tensor | None = None) -> Tensor:
        """Score of every frame."""
        return self.backbone.features(preds).double().squeeze(1)
