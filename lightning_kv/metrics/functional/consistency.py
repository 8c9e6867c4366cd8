"""How much frames look like others, by their features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Consistency:
    """What the features of a clip say, frame by frame.

    Args:
        previous: Cosine with the frame before, ``[F]``, negative ones as 0; NaN in the first frame.
        first: Cosine with the anchor frame, likewise.
        value: Mean of the two, ``[F]``; its mean over frames is VBench's score.
    """

    previous: Tensor
    first: Tensor
    value: Tensor


def consistency(features: Tensor, anchor: int = 0) -> Consistency:
    """How like the frame before, and the first one, every frame is (VBench, arXiv 2311.17982).

    Args:
        features: ``[F, d]``, of the frames in order.
        anchor: The frame that ``first`` compares with; VBench's is frame 0.

    Returns:
        The curves, float64.

    Raises:
        ValueError: There is no such anchor, or a feature is zero or not finite.

    Example:
        >>> there_and_back = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> consistency(there_and_back).value.tolist()
        [nan, 0.0, 0.5]
    """
    if features.ndim != 2 or not 0 <= anchor < len(features):
        raise ValueError(
            f"There is no frame {anchor} in features {tuple(features.shape)}. Pass features "
            "[frames, width] and an anchor among the frames."
        )
    features = directions(features)
    unknown = features.new_full((1,), torch.nan)
    steps = cosine(features[1:], features[:-1]).clamp_min(0)
    jumps = cosine(features[1:], features[anchor]).clamp_min(0)
    return Consistency(*(torch.cat([unknown, x]) for x in (steps, jumps, (steps + jumps) / 2)))


def lag_coherence(features: Tensor, lag: int) -> Tensor:
    """Cosine of every frame with the one ``lag`` frames earlier.

    Its mean over frames is the mean over all pairs at that distance.

    Args:
        features: ``[F, d]``, of the frames in order.
        lag: Distance in frames, at least 1.

    Returns:
        float64 ``[F]``; NaN in the first ``lag`` frames.

    Raises:
        ValueError: The lag is below 1, or a feature is zero or not finite.

    Example:
        >>> turning = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> lag_coherence(turning, 2).tolist()
        [nan, nan, -1.0]
    """
    check_lag(lag)
    features = directions(features)
    unknown = features.new_full((min(lag, len(features)),), torch.nan)
    return torch.cat([unknown, cosine(features[lag:], features[:-lag])])


def similarity(preds: Tensor, target: Tensor) -> Tensor:
    """Cosine of the features of every frame with those of its target.

    Args:
        preds: ``[F, d]``.
        target: The same shape; or ``[d]`` for all, such as the features of a prompt.

    Returns:
        float64 ``[F]``.

    Raises:
        ValueError: A feature is zero or not finite.

    Example:
        >>> similarity(torch.tensor([[3.0, 4.0]]), torch.tensor([0.0, 2.0])).tolist()
        [0.8]
    """
    return cosine(directions(preds), directions(target))


def directions(features: Tensor) -> Tensor:
    """Features of length one, in float64.

    Args:
        features: ``[F, d]``.

    Raises:
        ValueError: A feature is zero or not finite, so it has no direction.

    Example:
        >>> from torch import tensor
        >>> directions(tensor([[3.0, 4.0]])).tolist()
        [[0.6, 0.8]]
    """
    length = features.double().norm(dim=-1)
    broken = ~(length.isfinite() & (length > 0))
    if broken.any():
        raise ValueError(
            f"{int(broken.sum())} of {broken.numel()} features have no direction: their length is "
            f"{length[broken][0].item():g}. Pass features that are finite and not zero."
        )
    return features.double() / length.unsqueeze(-1)


def cosine(left: Tensor, right: Tensor) -> Tensor:
    """Cosine of every pair of :func:`directions`; rounding does not push it past 1.

    Args:
        left: ``[F, d]``.
        right: ``[F, d]``, or ``[d]`` for all.

    Returns:
        float64 ``[F]``.

    Example:
        >>> from torch import tensor
        >>> cosine(directions(tensor([[3.0, 4.0]])), tensor([0.0, 1.0])).tolist()
        [0.8]
    """
    return (left * right).sum(-1).clamp(-1, 1)


def check_lag(lag: int) -> None:
    """Refuse a lag that is no distance to an earlier frame.

    Raises:
        ValueError: It is below 1.
    """
    if lag < 1:
        raise ValueError(
            f"A lag is a distance to an earlier frame: {lag} was given. Pass 1 or more frames."
        )
