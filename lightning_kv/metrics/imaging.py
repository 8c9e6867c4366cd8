"""What single frames look like: sharpness, light and colour, and a learned score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_kv.metrics.base import PixelMetric, Reader
from lightning_kv.metrics.features import FeatureMetric
from lightning_kv.metrics.motion import checked_pixels

LUMA = (299, 587, 114)  # thousandths, ITU-R BT.601; whole numbers keep a grey what it is


def luma(pixels: Tensor) -> Tensor:
    """Brightness of every pixel: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601).

    Args:
        pixels: ``[F, 3, H, W]`` in [0, 1].

    Returns:
        float64 ``[F, H, W]`` in [0, 1].

    Example:
        >>> green = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
        >>> luma(green).item()
        0.587
    """
    weights = torch.tensor(LUMA, dtype=torch.float64, device=pixels.device)
    return torch.einsum("fchw,c->fhw", checked_pixels(pixels).double(), weights) / 1000


def sharpness(pixels: Tensor) -> Tensor:
    """Variance of the Laplacian of the luma (Pech-Pacheco et al., ICPR 2000).

    The kernel has 4 neighbours and is applied inside the frame only, without padding.

    Args:
        pixels: ``[F, 3, H, W]`` in [0, 1], H and W at least 3.

    Returns:
        float64 ``[F]``, 0 for a frame without edges.

    Example:
        >>> board = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(2, 2).expand(1, 3, 4, 4)
        >>> round(sharpness(board).item(), 6)
        16.0
    """
    light = luma(pixels)
    edges = light[:, :-2, 1:-1] + light[:, 2:, 1:-1] + light[:, 1:-1, :-2] + light[:, 1:-1, 2:]
    return (edges - 4 * light[:, 1:-1, 1:-1]).flatten(1).var(1, correction=0)


def brightness(pixels: Tensor) -> Tensor:
    """Mean luma of every frame.

    Args:
        pixels: ``[F, 3, H, W]`` in [0, 1].

    Returns:
        float64 ``[F]`` in [0, 1].

    Example:
        >>> brightness(torch.full((1, 3, 4, 4), 0.25)).item()
        0.25
    """
    return luma(pixels).mean((1, 2))


def contrast(pixels: Tensor) -> Tensor:
    """Standard deviation of the luma (root mean square contrast; Peli, JOSA A 1990).

    Args:
        pixels: ``[F, 3, H, W]`` in [0, 1].

    Returns:
        float64 ``[F]``, from 0 for a plain frame to 0.5.

    Example:
        >>> half = torch.tensor([0.0, 1.0]).expand(1, 3, 2, 2)
        >>> contrast(half).item()
        0.5
    """
    return luma(pixels).flatten(1).std(1, correction=0)


def colourfulness(pixels: Tensor) -> Tensor:
    """How colourful a frame is: M3 of Hasler and Suesstrunk (SPIE 2003), on a scale of 255.

    With rg = R - G and yb = (R + G) / 2 - B it is the root of the summed variances plus 0.3
    times the root of the summed squared means. About 15 is slightly colourful, 109 extremely.

    Args:
        pixels: ``[F, 3, H, W]`` in [0, 1].

    Returns:
        float64 ``[F]``, 0 for grey.

    Example:
        >>> red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
        >>> round(colourfulness(red).item(), 4)
        85.5296
    """
    red, green, blue = (255 * checked_pixels(pixels).double()).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], 1).flatten(2)
    spread = opponents.var(2, correction=0).sum(1).sqrt()
    return spread + 0.3 * opponents.mean(2).square().sum(1).sqrt()


def saturation(pixels: Tensor) -> Tensor:
    """Mean saturation of the pixels, as in HSV: (max - min) / max over the channels, 0 for black.

    Args:
        pixels: ``[F, 3, H, W]`` in [0, 1].

    Returns:
        float64 ``[F]`` in [0, 1].

    Example:
        >>> pink = torch.tensor([1.0, 0.5, 0.5]).view(1, 3, 1, 1)
        >>> saturation(pink).item()
        0.5
    """
    low, high = checked_pixels(pixels).double().aminmax(dim=1)
    return torch.where(high > 0, (high - low) / high, 0.0).mean((1, 2))


class FrameMetric(PixelMetric):
    """A metric whose value of a frame depends on that frame alone.

    A subclass sets ``measure``, which takes frames ``[f, 3, H, W]`` and says ``[f]``.
    """

    measure: Callable[[Tensor], Tensor]

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """The measure of every frame."""
        return lambda pixels, _: self.measure(pixels)


class Sharpness(FrameMetric):
    """How sharp the frames are; see :func:`sharpness`. Noise counts as sharp.

    Example:
        >>> from lightning_kv.metrics.base import Clip
        >>> Sharpness().curve(Clip(pixels=torch.zeros(2, 3, 4, 4))).tolist()
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


class Brightness(FrameMetric):
    """How bright the frames are; see :func:`brightness`.

    Neither way is good in itself; what counts is that it does not drift. The same holds of
    contrast, colourfulness and saturation.

    Example:
        >>> from lightning_kv.metrics.base import Clip
        >>> Brightness().curve(Clip(pixels=torch.full((2, 3, 4, 4), 0.5))).tolist()
        [0.5, 0.5]
    """

    name = "brightness"
    unit = "intensity"
    higher_is_better = None
    recipe = "mean over frames after the context of the mean BT.601 luma, range [0,1], float64"
    measure = staticmethod(brightness)


class Contrast(FrameMetric):
    """Contrast of the frames; see :func:`contrast`; neither way is good in itself.

    Example:
        >>> from lightning_kv.metrics.base import Clip
        >>> Contrast().curve(Clip(pixels=torch.zeros(2, 3, 4, 4))).tolist()
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


class Colourfulness(FrameMetric):
    """Colourfulness; see :func:`colourfulness`; neither way is good in itself.

    Example:
        >>> from lightning_kv.metrics.base import Clip
        >>> Colourfulness().curve(Clip(pixels=torch.ones(2, 3, 4, 4))).tolist()
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


class Saturation(FrameMetric):
    """Saturation; see :func:`saturation`; neither way is good in itself.

    Example:
        >>> from lightning_kv.metrics.base import Clip
        >>> Saturation().curve(Clip(pixels=torch.ones(2, 3, 4, 4))).tolist()
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
        >>> from torch import nn
        >>> from lightning_kv.metrics.base import Clip
        >>> class Light(nn.Module):
        ...     def forward(self, frames):
        ...         return frames.mean((1, 2, 3)).unsqueeze(1)
        >>> ImagingQuality(Light()).curve(Clip(pixels=torch.full((2, 3, 4, 4), 0.5))).tolist()
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

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """Score of every frame."""

        def read(pixels: Tensor, _: Tensor | None) -> Tensor:
            return self.backbone.features(pixels).double().squeeze(1)

        return read
