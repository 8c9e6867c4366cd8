"""How much a clip changes from frame to frame, from the pixels alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_kv.metrics.base import PixelMetric, Reader


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


def flicker(previous: Tensor, frames: Tensor) -> Tensor:
    """How little every frame differs from the one before, after rounding to 8 bits.

    The formula of VBench (Huang et al., arXiv 2311.17982): (255 - mean absolute difference) / 255.

    Args:
        previous: The frames before, ``[F, 3, H, W]`` in [0, 1].
        frames: The frames, the same shape and range.

    Returns:
        float64 ``[F]``: 1 where nothing changes, 0 from black to white.

    Example:
        >>> black = torch.zeros(1, 3, 4, 4)
        >>> flicker(black, black).item(), flicker(black, black + 1).item()
        (1.0, 0.0)
    """
    difference = (eight_bit(frames) - eight_bit(previous)).abs()
    return (255 - difference.double().mean((1, 2, 3))) / 255


def frame_change(previous: Tensor, frames: Tensor) -> Tensor:
    """Mean absolute difference of every frame to the one before, not rounded.

    Args:
        previous: The frames before, ``[F, 3, H, W]`` in [0, 1].
        frames: The frames, the same shape and range.

    Returns:
        float64 ``[F]`` in [0, 1].

    Example:
        >>> black = torch.zeros(1, 3, 4, 4)
        >>> frame_change(black, black + 0.25).item()
        0.25
    """
    difference = checked_pixels(frames).double() - checked_pixels(previous).double()
    return difference.abs().mean((1, 2, 3))


def against_previous(compare: Callable[[Tensor, Tensor], Tensor]) -> Reader:
    """A reader that compares every frame with the one before; the first has no value.

    Args:
        compare: Takes the frames before and the frames, ``[f, 3, H, W]``; says ``[f]``.

    Example:
        >>> read = against_previous(frame_change)
        >>> read(torch.zeros(2, 3, 4, 4), None).tolist()
        [nan, 0.0]
        >>> read(torch.ones(1, 3, 4, 4), None).tolist()
        [1.0]
    """
    last: Tensor | None = None

    def read(pixels: Tensor, _: Tensor | None) -> Tensor:
        nonlocal last
        before = pixels[:1] if last is None else last
        values = compare(torch.cat([before, pixels[:-1]]), pixels)
        if last is None:
            values[0] = torch.nan
        # A copy, because a view would hold the whole block.
        last = pixels[-1:].clone()
        return values

    return read


class TemporalFlicker(PixelMetric):
    """How steady a clip is from frame to frame, by VBench's formula; see :func:`flicker`.

    VBench scores static videos only, which it picks with an optical flow; on moving ones the
    number falls with every motion, so compare it with that of the reference.

    Example:
        >>> from lightning_kv.metrics.base import Clip
        >>> TemporalFlicker().curve(Clip(pixels=torch.ones(3, 3, 8, 8))).tolist()
        [nan, 1.0, 1.0]
    """

    name = "temporal_flicker"
    unit = ""
    higher_is_better = True
    recipe = (
        "mean over frames after the context of (255 - mean |I(t) - I(t-1)|) / 255, rounded to "
        "8 bits, all channels, every clip (no filter for static ones)"
    )

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """Steadiness of every frame against the one before."""
        return against_previous(flicker)


class FrameChange(PixelMetric):
    """How much a clip changes from frame to frame; see :func:`frame_change`.

    Neither way is good: a frozen clip has 0, a broken one much. Read it beside the reference's.

    Example:
        >>> from lightning_kv.metrics.base import Clip
        >>> frames = torch.tensor([0.0, 0.5, 0.25]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
        >>> FrameChange().curve(Clip(pixels=frames)).tolist()
        [nan, 0.5, 0.25]
    """

    name = "frame_change"
    unit = "intensity"
    higher_is_better = None
    recipe = "mean over frames after the context of mean |I(t) - I(t-1)|, all channels, range [0,1]"

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """Change of every frame against the one before."""
        return against_previous(frame_change)
