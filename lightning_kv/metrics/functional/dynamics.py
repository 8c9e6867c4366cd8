"""How much moves, by optical flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_kv.metrics.functional.motion import eight_bit

RATE = 8  # frames per second at which flow is measured
TOP = 0.05  # share of the pixels that move most
THRESHOLD = 6.0  # pixels, in a frame whose shorter side has SIDE
SIDE = 256


def sampling_interval(fps: float) -> int:
    """Every how many frames VBench looks, so that it sees about 8 of them per second.

    Args:
        fps: Frames per second of the clip.

    Example:
        >>> [sampling_interval(fps) for fps in (6, 8, 16, 20, 24)]
        [1, 1, 2, 2, 3]
    """
    return max(1, round(fps / RATE))


def dynamic_rule(frames: int, side: int) -> tuple[float, int]:
    """VBench's rule for a clip that moves: the threshold of a step, and how many must pass it.

    Args:
        frames: Number of frames looked at.
        side: Shorter side of a frame, in pixels.

    Returns:
        Pixels of motion that a step must exceed, and the number of steps.

    Example:
        81 frames of 480 x 832 at 16 frames per second, of which every second is looked at:

        >>> dynamic_rule(41, 480)
        (11.25, 10)
    """
    # round() takes halves to the even number, as VBench's does.
    return THRESHOLD * side / SIDE, round(4 * frames / 16)


def is_dynamic(scores: Sequence[float] | Tensor, side: int) -> bool:
    """Whether a clip moves, by VBench's rule (Huang et al., arXiv 2311.17982).

    Args:
        scores: :func:`motion_score` of each step from one frame looked at to the next.
        side: Shorter side of a frame, in pixels.

    Example:
        >>> is_dynamic([12.0] * 10 + [0.0] * 30, 480), is_dynamic([12.0] * 9 + [0.0] * 31, 480)
        (True, False)
    """
    threshold, needed = dynamic_rule(len(scores) + 1, side)
    return len(scores) > 0 and sum(float(score) > threshold for score in scores) >= needed


def motion_score(flow: Tensor) -> Tensor:
    """Mean length of the 5 % longest vectors of a flow.

    Args:
        flow: ``[N, 2, H, W]`` in pixels; of a tiny one, the longest vector counts.

    Returns:
        float64 ``[N]`` in pixels.

    Example:
        >>> flow = torch.zeros(1, 2, 5, 8)
        >>> flow[0, :, 0, 0] = torch.tensor([3.0, 4.0])
        >>> motion_score(flow).tolist()
        [2.5]
    """
    lengths = _lengths(flow)
    return lengths.topk(max(1, int(lengths.shape[1] * TOP)), dim=1).values.mean(1)


def mean_motion(flow: Tensor) -> Tensor:
    """Mean length of the vectors of a flow.

    Args:
        flow: ``[N, 2, H, W]`` in pixels.

    Returns:
        float64 ``[N]`` in pixels.

    Example:
        >>> mean_motion(torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 5, 8)).tolist()
        [5.0]
    """
    return _lengths(flow).mean(1)


def _lengths(flow: Tensor) -> Tensor:
    return flow.double().square().sum(1).sqrt().flatten(1)


def motion_smoothness(pixels: Tensor, imagine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """How well dropped frames can be imagined from their neighbours, by VBench's formula.

    Of frames 2k, 2k + 1, 2k + 2 the middle one is dropped and imagined again. Its value,
    (255 - mean absolute difference) / 255, stands at frame 2k + 2, where it becomes known; frames
    are rounded to 8 bits and imagined ones cut off to 8 bits, as VBench's files and code have it.

    Args:
        pixels: Frames in order, ``[F, 3, H, W]`` in [0, 1].
        imagine: Takes two frames ``[1, 3, H, W]`` in [0, 1] and gives the one between them.

    Returns:
        float64 ``[F]`` in [0, 1]; NaN in other frames.

    Example:
        >>> frames = torch.tensor([0.0, 0.4, 0.8, 0.2, 0.8]).view(5, 1, 1, 1).expand(5, 3, 8, 8)
        >>> motion_smoothness(frames, lambda a, b: (a + b) / 2).round(decimals=2).tolist()
        [nan, nan, 1.0, nan, 0.4]
    """
    frames = eight_bit(pixels)
    values = torch.full((len(frames),), torch.nan, dtype=torch.float64)
    for end in range(2, len(frames), 2):
        values[end] = likeness(*frames[end - 2 : end + 1].split(1), imagine)
    return values


def likeness(
    first: Tensor, dropped: Tensor, second: Tensor, imagine: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Of a dropped frame to the one imagined between its neighbours, all with values up to 255."""
    imagined = (imagine(first / 255, second / 255) * 255).clamp(0, 255).floor()
    return (255 - (imagined.double() - dropped.double()).abs().mean()) / 255
