"""Three-axis rotary position embedding (time, height, width), computed from positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Rotary angles of causal Wan, for any position: no table, so no longest rollout.

    A head vector of width D is D/2 interleaved complex pairs. The first pairs turn with time, the
    next with the row, the last with the column of a token; each axis has its own series
    ``theta ** (-2 i / d_axis)``. Source: Wan2.1 (arXiv 2503.20314) and RoFormer (arXiv 2104.09864).

    Args:
        head_dim: Width D of one head; even, and at least 6.
        theta: Base of the series for time, height and width.
        work: Smallest dtype in which vectors are turned.
    """

    head_dim: int
    theta: tuple[float, float, float] = (10000.0, 10000.0, 10000.0)
    work: torch.dtype = torch.float32

    @property
    def axes(self) -> tuple[int, int, int]:
        """Real dimensions given to time, height and width; Wan's rule gives time the remainder."""
        side = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * side, side, side

    def frequencies(self, axis: int, device: torch.device | str = "cpu") -> Tensor:
        """Radians per unit of position for the pairs of one axis, in float64."""
        width = self.axes[axis]
        pairs = torch.arange(0, width, 2, dtype=torch.float64, device=device)
        return self.theta[axis] ** (-pairs / width)

    def angles(self, time: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Angles in radians, shape ``[..., D/2]``, for positions that broadcast to ``[...]``."""
        parts = [
            position.to(torch.float64).unsqueeze(-1) * self.frequencies(axis, position.device)
            for axis, position in enumerate(torch.broadcast_tensors(time, row, column))
        ]
        return torch.cat(parts, dim=-1)


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x: Tensor, angles: Tensor, work: torch.dtype = torch.float32) -> Tensor:
    """Turn the complex pairs of ``x`` ``[..., D]`` by ``angles`` (broadcast to ``[..., D/2]``).

    ``rotate(rotate(x, a), -a)`` is ``x`` up to rounding. Sine and cosine are taken in float64; the
    product is formed in ``work``, or in float64 for float64 input.
    """
    work = torch.promote_types(x.dtype, work)
    cos, sin = angles.cos().to(work), angles.sin().to(work)
    return rotate_by(x, cos, sin)


def rotate_by(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """:func:`rotate` with the cosine and sine already at hand."""
    even, odd = x.unflatten(-1, (-1, 2)).to(cos.dtype).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
