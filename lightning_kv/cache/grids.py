"""Few-bit grids: codes in bytes, scales in eight bits, and numbers cut into blocks.

Shapes: h heads, n rows, D head width, b numbers of a block that share a scale, B blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

FP8 = torch.float8_e4m3fn
TOP = torch.finfo(FP8).max


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below ``2**bits`` along the last axis, packed into bytes (zero-padded)."""
    per = 8 // bits
    padded = pad(codes, (0, -codes.shape[-1] % per)).unflatten(-1, (-1, per))
    shifts = bits * torch.arange(per, device=codes.device)
    return (padded.long() << shifts).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of :func:`pack` for ``width`` codes."""
    per = 8 // bits
    shifts = bits * torch.arange(per, device=packed.device)
    codes = (packed.long().unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[..., :width]


def eight(x: Tensor) -> Tensor:
    """Numbers as fp8 e4m3, in bytes that can be gathered like any others."""
    return x.clamp(-TOP, TOP).to(FP8).view(torch.uint8)


def wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`eight`."""
    return x.view(FP8).to(dtype)


def blocks(x: Tensor, size: int) -> Tensor:
    """The last axis cut into blocks ``[..., B, size]``; zeros fill up the last one."""
    return pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def three_levels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0, 1, 2 for -s, 0, s of blocks ``[..., B, b]``, and s ``[..., B]`` in bytes.

    The fourth code of two bits is not used: a symmetric grid has an odd number of levels.
    """
    scale = eight(x.abs().amax(-1))
    step = wide(scale, x.dtype).unsqueeze(-1)
    codes = torch.where(step > 0, x / step, 0).round().clamp(-1, 1) + 1
    return codes.to(torch.uint8), scale


def four_levels(
    x: Tensor, by_scale: Tensor | float = 1.0, by_low: Tensor | float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 3 from the least to the largest number of blocks ``[..., B, b]``.

    Codes are those of the scales as they are stored.

    Args:
        x: The numbers.
        by_scale: What scales ``[..., B]`` are divided by before they are stored.
        by_low: The same of least numbers.

    Returns:
        Codes ``[..., B, b]``, and scale and least number ``[..., B]`` in bytes.
    """
    low, high = x.amin(-1), x.amax(-1)
    scale, least = eight((high - low) / 3 / by_scale), eight(low / by_low)
    step = (wide(scale, x.dtype) * by_scale).unsqueeze(-1)
    start = (wide(least, x.dtype) * by_low).unsqueeze(-1)
    codes = torch.where(step > 0, (x - start) / step, 0).round().clamp(0, 3)
    return codes.to(torch.uint8), scale, least
