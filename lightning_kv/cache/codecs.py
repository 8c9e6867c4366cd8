"""How rows are stored: as computed, or in few bits with a scale per row.

A row is decoded without its neighbours, so evicting or gathering rows never quantises twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shared = dict[str, Tensor | int]
"""What all rows of a segment share: tensors ``[h, ...]``, or plain numbers."""


class Codec(Protocol):
    """Encodes vectors ``[h, n, D]`` and decodes them again."""

    def encode(self, x: Tensor) -> tuple[dict[str, Tensor], Shared]:
        """Tensors with a row axis ``[h, n, ...]``, and what all rows share."""
        ...

    def row_bytes(self, width: int, element: int) -> float:
        """Bytes of one vector of ``width`` numbers of ``element`` bytes."""
        ...

    def decode(self, rows: dict[str, Tensor], shared: Shared) -> Tensor:
        """The vectors ``[h, n, D]``, in the dtype of the stored scale."""
        ...


@dataclass(frozen=True)
class Integer:
    """Symmetric round-to-nearest integers with one scale per row.

    Args:
        bits: 8, 4 or 2; 4 and 2 are packed into bytes.
    """

    bits: int

    def encode(self, x: Tensor) -> tuple[dict[str, Tensor], Shared]:
        """See :class:`Codec`."""
        top = 2 ** (self.bits - 1) - 1
        scale = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / top
        codes = (x / scale).round().clamp(-top, top).to(torch.int16) + top
        return {"codes": pack(codes.to(torch.uint8), self.bits), "scale": scale}, {
            "width": x.shape[-1]
        }

    def row_bytes(self, width: int, element: int) -> float:
        """See :class:`Codec`."""
        return -(-width * self.bits // 8) + element

    def decode(self, rows: dict[str, Tensor], shared: Shared) -> Tensor:
        """See :class:`Codec`."""
        top = 2 ** (self.bits - 1) - 1
        codes = unpack(rows["codes"], self.bits, shared["width"])
        return (codes.to(rows["scale"].dtype) - top) * rows["scale"]


@dataclass(frozen=True)
class Centroids:
    """Distance to the nearest of a few centroids, in 2 bits (Quant VideoGen, arXiv 2602.02958).

    Args:
        count: Centroids per head, at most 256; never more than one for 8 rows, whose codebook
            would be larger than what it saves.
        iterations: Of k-means, started from evenly spaced rows.
    """

    count: int = 16
    iterations: int = 2

    def encode(self, x: Tensor) -> tuple[dict[str, Tensor], Shared]:
        """See :class:`Codec`."""
        count = max(1, min(self.count, x.shape[1] // 8))
        start = torch.linspace(0, x.shape[1] - 1, count, device=x.device).long()
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        centre = x.index_select(1, start)
        for _ in range(self.iterations):
            near = torch.cdist(x, centre).argmin(-1)  # [h, n]
            member = torch.nn.functional.one_hot(near, count).to(x.dtype)  # [h, n, count]
            size = member.sum(1).unsqueeze(-1)
            mean = member.transpose(1, 2) @ x / size.clamp_min(1)
            centre = torch.where(size > 0, mean, centre)
        centre = centre.to(dtype).to(x.dtype)  # as it is stored
        near = torch.cdist(x, centre).argmin(-1)
        rest = x - centre.gather(1, near.unsqueeze(-1).expand_as(x))
        rows, shared = Integer(2).encode(rest.to(dtype))
        return rows | {"near": near.to(torch.uint8)}, shared | {"centre": centre.to(dtype)}

    def row_bytes(self, width: int, element: int) -> float:
        """See :class:`Codec`; a codebook of one vector for 8 rows is the most there is."""
        return Integer(2).row_bytes(width, element) + 1 + width * element / 8

    def decode(self, rows: dict[str, Tensor], shared: Shared) -> Tensor:
        """See :class:`Codec`."""
        rest = Integer(2).decode(rows, shared)
        near = rows["near"].long().unsqueeze(-1).expand_as(rest)
        return rest + shared["centre"].gather(1, near)


CODECS: dict[str, Codec] = {
    "int8": Integer(8),
    "int4": Integer(4),
    "int2-centroids": Centroids(),
}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below ``2**bits`` along the last axis, packed into bytes (zero-padded)."""
    per = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per)).unflatten(-1, (-1, per))
    shifts = bits * torch.arange(per, device=codes.device)
    return (padded.long() << shifts).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of :func:`pack` for ``width`` codes."""
    per = 8 // bits
    shifts = bits * torch.arange(per, device=packed.device)
    codes = (packed.long().unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[..., :width]
