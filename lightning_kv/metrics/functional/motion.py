"""How much a clip changes from frame to frame."""

from __future__ import annotations

import torch
from torch import Tensor


def checked_pixels(pixels: Tensor) -> Tensor:
    """The pixels, if they are what every metric of pixels expects.

    Args:
        pixels: ``[F, 3, H, W]``.

    Raises:
        ValueError: They have another shape, or are not floats in [0, 1].

    Example:
        >>> checked_pixels(torch.ones(1, 3, 2, 2)).shape
        torch.Size([1, 3, 2, 2])
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.numel():
        raise ValueError(
            f"These are not frames: their shape is {tuple(pixels.shape)}. "
            "Pass pixels [frames, 3, height, width]."
        )
    low, high = (float(limit) for limit in pixels.aminmax())
    # Written so that NaN is refused too.
    if not (pixels.is_floating_point() and low >= 0 and high <= 1):
        raise ValueError(
            f"Pixels are out of range: {pixels.dtype} from {low:g} to {high:g}. "
            "Pass floats in [0, 1]; divide 8-bit values by 255."
        )
    return pixels


def eight_bit(pixels: Tensor) -> Tensor:
    """Pixels as a video of 8 bits holds them: whole numbers from 0 to 255, as floats.

    Args:
        pixels: ``[F, 3, H, W]`` in [0, 1].

    Example:
        >>> eight_bit(torch.full((1, 3, 1, 1), 0.5))[0, 0].tolist()
        [[128.0]]
    """
    return (checked_pixels(pixels).float() * 255).round()


def flicker(pixels: Tensor) -> Tensor:
    """How little every frame differs from the one before, after rounding to 8 bits.

    The formula of VBench (Huang et al., arXiv 2311.17982): (255 - mean absolute difference) / 255.

    Args:
        pixels: Frames in order, ``[F, 3, H, W]`` in [0, 1].

    Returns:
        float64 ``[F]``: 1 where nothing changes, 0 from black to white; NaN in the first frame.

    Example:
        >>> black = torch.zeros(1, 3, 4, 4)
        >>> flicker(torch.cat([black, black, black + 1])).tolist()
        [nan, 1.0, 0.0]
    """
    difference = eight_bit(pixels).diff(dim=0).abs()
    return _later((255 - difference.double().mean((1, 2, 3))) / 255)


def frame_change(pixels: Tensor) -> Tensor:
    """Mean absolute difference of every frame to the one before, not rounded.

    Args:
        pixels: Frames in order, ``[F, 3, H, W]`` in [0, 1].

    Returns:
        float64 ``[F]`` in [0, 1]; NaN in the first frame.

    Example:
        >>> black = torch.zeros(1, 3, 4, 4)
        >>> frame_change(torch.cat([black, black + 0.25])).tolist()
        [nan, 0.25]
    """
    return _later(checked_pixels(pixels).double().diff(dim=0).abs().mean((1, 2, 3)))


def _later(values: Tensor) -> Tensor:
    """Values of all frames but the first, which has none."""
    return torch.cat([values.new_full((1,), torch.nan), values])
