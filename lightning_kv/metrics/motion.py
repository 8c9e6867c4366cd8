"""How much a clip changes from frame to frame, from the pixels alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_kv.metrics.base import Reader, VideoMetric
from lightning_kv.metrics.functional.motion import flicker, frame_change


def against_previous(measure: Callable[[Tensor], Tensor]) -> Reader:
    """A reader that compares every frame with the one before; the first has no value.

    Args:
        measure: Takes frames in order, ``[f, 3, H, W]``; says ``[f]``, nothing of the first.

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
        values = measure(pixels) if last is None else measure(torch.cat([last, pixels]))[1:]
        # A copy, because a view would hold the whole block.
        last = pixels[-1:].clone()
        return values

    return read


class TemporalFlicker(VideoMetric):
    """How steady a clip is from frame to frame, by VBench's formula.

    See :func:`~lightning_kv.metrics.functional.flicker`.
    VBench scores static videos only, which it picks with an optical flow; on moving ones the
    number falls with every motion, so compare it with that of the reference.

    Example:
        >>> TemporalFlicker().curve(torch.ones(3, 3, 8, 8)).tolist()
        [nan, 1.0, 1.0]
    """

    name = "temporal_flicker"
    unit = ""
    higher_is_better = True
    recipe = (
        "mean over frames after the context of (255 - mean |I(t) - I(t-1)|) / 255, rounded to "
        "8 bits, all channels, every clip (no filter for static ones)"
    )
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """Steadiness of every frame against the one before."""
        return against_previous(flicker)


class FrameChange(VideoMetric):
    """How much a clip changes from frame to frame; in absolute intensities.

    Neither way is good: a frozen clip has 0, a broken one much. Read it beside the reference's.

    Example:
        >>> frames = torch.tensor([0.0, 0.5, 0.25]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
        >>> FrameChange().curve(frames).tolist()
        [nan, 0.5, 0.25]
    """

    name = "frame_change"
    unit = "intensity"
    higher_is_better = None
    recipe = "mean over frames after the context of mean |I(t) - I(t-1)|, all channels, range [0,1]"
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """Change of every frame against the one before."""
        return against_previous(frame_change)
