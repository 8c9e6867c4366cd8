"""What single frames look like: sharpness, light and colour."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_kv.metrics.functional.motion import checked_pixels

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
