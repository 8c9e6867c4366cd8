"""How rows are stored: as computed, or in few bits with scales.

What is coded together forms a segment, and its rows may share scales or a codebook. A row is
decoded by what its segment shares and its place in it, without its neighbours, so evicting or
gathering rows never quantises twice.

Shapes: h heads, n rows coded together, D head width, b numbers of a block, B blocks, r directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lightning_kv.cache.grids import blocks, four_levels, pack, three_levels, unpack, wide

Shared = dict[str, Tensor | int]
"""What all rows of a segment share: tensors ``[h, ...]``, or plain numbers."""

FULL = torch.float32


class Codec(Protocol):
    """Encodes vectors ``[h, n, D]`` and decodes them again."""

    placed: ClassVar[bool]
    """Rows of a segment share scales by their place in it. When some of them go, the others bring
    their places under ``at``, an integer ``[h, n]``."""

    def encode(self, x: Tensor) -> tuple[dict[str, Tensor], Shared]:
        """Tensors with a row axis ``[h, n, ...]``, and what all rows share."""
        ...

    def row_bytes(self, width: int, element: int, rows: int) -> float:
        """Bytes of one vector of ``width`` numbers, of ``rows`` that are coded together.

        Args:
            width: D.
            element: Bytes of one number as computed.
            rows: n; what they share is divided among them.
        """
        ...

    def decode(self, rows: dict[str, Tensor], shared: Shared) -> Tensor:
        """The vectors ``[h, n, D]``, in the dtype of the stored scale or in float32."""
        ...


@dataclass(frozen=True)
class Integer:
    """Symmetric round-to-nearest integers with one scale per row.

    Args:
        bits: 8, 4 or 2; 4 and 2 are packed into bytes.
    """

    placed: ClassVar[bool] = False
    bits: int

    def encode(self, x: Tensor) -> tuple[dict[str, Tensor], Shared]:
        """See :class:`Codec`."""
        top = 2 ** (self.bits - 1) - 1
        scale = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / top
        codes = (x / scale).round().clamp(-top, top).to(torch.int16) + top
        return {"codes": pack(codes.to(torch.uint8), self.bits), "scale": scale}, {
            "width": x.shape[-1]
        }

    def row_bytes(self, width: int, element: int, rows: int) -> float:
        """See :class:`Codec`."""
        return -(-width * self.bits // 8) + element

    def decode(self, rows: dict[str, Tensor], shared: Shared) -> Tensor:
        """See :class:`Codec`."""
        top = 2 ** (self.bits - 1) - 1
        codes = unpack(rows["codes"], self.bits, shared["width"])
        return (codes.to(rows["scale"].dtype) - top) * rows["scale"]


@dataclass(frozen=True)
class TokenBlocks:
    """Four levels between the least and the largest of some channels of one row.

    Args:
        size: Channels that share them, in fp8 e4m3; D where that is less.
    """

    placed: ClassVar[bool] = False
    size: int = 64

    def encode(self, x: Tensor) -> tuple[dict[str, Tensor], Shared]:
        """See :class:`Codec`."""
        width = x.shape[-1]
        codes, scale, low = four_levels(blocks(_full(x), min(self.size, width)))
        packed = pack(codes.flatten(-2)[..., :width], 2)
        return {"codes": packed, "scale": scale, "low": low}, {"width": width}

    def row_bytes(self, width: int, element: int, rows: int) -> float:
        """See :class:`Codec`."""
        return -(-width // 4) + 2 * -(-width // min(self.size, width))

    def decode(self, rows: dict[str, Tensor], shared: Shared) -> Tensor:
        """See :class:`Codec`."""
        width = shared["width"]
        size = min(self.size, width)
        scale, low = (_spread(wide(rows[x], FULL), size, width) for x in ("scale", "low"))
        return unpack(rows["codes"], 2, width) * scale + low


@dataclass(frozen=True)
class ChannelBlocks:
    """Four levels between the least and the largest of one channel in some rows.

    Zeros fill up the last block, so that its range holds 0; they are not stored.

    Args:
        size: Rows that share them, in fp8 e4m3; all that are coded together where these are fewer.
        factors: Divide them by a power of two for each channel before they are stored.
    """

    placed: ClassVar[bool] = True
    size: int = 128
    factors: bool = False

    def encode(self, x: Tensor) -> tuple[dict[str, Tensor], Shared]:
        """See :class:`Codec`."""
        width, rows, x = x.shape[-1], x.shape[1], _full(x)
        size = min(self.size, rows)
        cut = blocks(x.transpose(1, 2), size)  # [h, D, B, b]
        by, shared = 1.0, {"width": width, "size": size}
        if self.factors:
            most = torch.maximum((cut.amax(-1) - cut.amin(-1)) / 3, cut.amin(-1).abs()).amax(-1)
            power = most.clamp_min(2.0**-120).log2().ceil().clamp(-120, 120)  # [h, D]
            by, shared = power.exp2().unsqueeze(-1), shared | {"power": power.to(torch.int8)}
        codes, scale, low = four_levels(cut, by, by)
        codes = codes.flatten(-2)[..., :rows].transpose(1, 2)
        shared |= {"scale": scale.transpose(1, 2).contiguous()}
        return {"codes": pack(codes, 2)}, shared | {"low": low.transpose(1, 2).contiguous()}

    def row_bytes(self, width: int, element: int, rows: int) -> float:
        """See :class:`Codec`."""
        each = 2 * -(-rows // min(self.size, rows)) + self.factors
        return -(-width // 4) + each * width / rows

    def decode(self, rows: dict[str, Tensor], shared: Shared) -> Tensor:
        """See :class:`Codec`."""
        codes = unpack(rows["codes"], 2, shared["width"])
        at = rows.get("at")
        if at is None:
            at = torch.arange(codes.shape[1], device=codes.device).expand(codes.shape[:2])
        block = (at // shared["size"]).long().unsqueeze(-1).expand_as(codes)
        scale, low = (wide(shared[x].gather(1, block), FULL) for x in ("scale", "low"))
        found = codes * scale + low
        return found * shared["power"].to(FULL).exp2().unsqueeze(1) if self.factors else found


@dataclass(frozen=True)
class Centroids:
    """Distance to the nearest of some centroids, in three levels (Quant VideoGen).

    Args:
        count: Centroids per head, in float32, at most 256; never more than one for 16 rows, whose
            codebook costs as much as the codes.
        iterations: Of k-means, started from evenly spaced rows.
        size: Channels that share a scale in fp8 e4m3; D where that is less.
    """

    placed: ClassVar[bool] = False
    count: int = 256
    iterations: int = 2
    size: int = 64

    def of(self, rows: int) -> int:
        """Centroids for so many rows."""
        return min(self.count, rows // 16)

    def encode(self, x: Tensor) -> tuple[dict[str, Tensor], Shared]:
        """See :class:`Codec`."""
        width, x = x.shape[-1], _full(x)
        rows, shared = {}, {"width": width}
        if self.of(x.shape[1]):
            centre = self.centres(x).to(FULL)
            near = torch.cdist(x, centre.to(x)).argmin(-1)  # [h, n]
            x = x - centre.to(x).gather(1, near.unsqueeze(-1).expand_as(x))
            rows, shared = {"near": near.to(torch.uint8)}, shared | {"centre": centre}
        codes, scale = three_levels(blocks(x, min(self.size, width)))
        packed = pack(codes.flatten(-2)[..., :width], 2)
        return rows | {"codes": packed, "scale": scale}, shared

    def centres(self, x: Tensor) -> Tensor:
        """By k-means, ``[h, count, D]``; one without rows stays where it is."""
        count = self.of(x.shape[1])
        names = torch.arange(count, device=x.device)
        centre = x.index_select(1, names * (x.shape[1] - 1) // max(1, count - 1))
        for _ in range(self.iterations):
            near = torch.cdist(x, centre).argmin(-1, keepdim=True)
            member = (near == names).to(x)  # [h, n, count]
            size = member.sum(1).unsqueeze(-1)
            mean = member.transpose(1, 2) @ x / size.clamp_min(1)
            centre = torch.where(size > 0, mean, centre)
        return centre

    def row_bytes(self, width: int, element: int, rows: int) -> float:
        """See :class:`Codec`."""
        own = -(-width // 4) + -(-width // min(self.size, width)) + (self.of(rows) > 0)
        return own + FULL.itemsize * width * self.of(rows) / rows

    def decode(self, rows: dict[str, Tensor], shared: Shared) -> Tensor:
        """See :class:`Codec`."""
        width = shared["width"]
        scale = _spread(wide(rows["scale"], FULL), min(self.size, width), width)
        rest = (unpack(rows["codes"], 2, width) - 1) * scale
        if "near" not in rows:
            return rest
        return rest + shared["centre"].gather(1, rows["near"].long().unsqueeze(-1).expand_as(rest))


@dataclass(frozen=True)
class Principal:
    """Mean and principal directions, themselves coded, and the rest in blocks (Budget-PCA).

    Coefficients have four levels for each row; scales and least numbers of them are divided by one
    factor of all rows each, so that the largest fills the range of fp8.

    Args:
        rank: Directions r; D or the rows that are coded together where these are fewer.
        steps: Of the subspace iteration that finds them.
        rest: How what is left of a row is stored.
    """

    placed: ClassVar[bool] = True
    rank: int = 4
    steps: int = 5
    rest: ChannelBlocks = ChannelBlocks(factors=True)

    def encode(self, x: Tensor) -> tuple[dict[str, Tensor], Shared]:
        """See :class:`Codec`."""
        x, half = _full(x), torch.bfloat16
        mean = x.mean(1).to(half)  # [h, D]
        x = x - mean.to(x).unsqueeze(1)
        basis = self.directions(x).to(half)  # [h, D, r]
        turned = x @ basis.to(x)
        low, high = turned.amin(-1), turned.amax(-1)
        most = torch.stack([(high - low) / 3, low.abs()], 1).amax(-1)  # [h, 2]
        by = (most.clamp_min(1e-30) / torch.finfo(torch.float8_e4m3fn).max).to(FULL)
        codes, scale, least = four_levels(turned, *by.to(x).unsqueeze(-1).unbind(1))
        rows = {"turned": pack(codes, 2), "turned_scale": scale, "turned_low": least}
        shared = {"mean": mean, "basis": basis, "by": by}
        own, common = self.rest.encode(x - self._along(rows, shared).to(x))
        return rows | own, shared | common

    def directions(self, x: Tensor) -> Tensor:
        """About the eigenvectors of the largest eigenvalues of the covariance, ``[h, D, r]``.

        By subspace iteration from the first columns of the covariance, in float64: unlike an
        eigensolver it waits for nothing. The largest entry of each is positive; where the start
        has fewer directions than r, the rest is nothing or noise, and costs no more than itself.
        """
        spread = x.transpose(1, 2) @ x / x.shape[1]
        spread = spread.double()
        found = _orthonormal(spread[..., : min(self.rank, *x.shape[1:])])
        for _ in range(self.steps):
            found = _orthonormal(spread @ found)
        found = found.to(x)
        largest = found.gather(1, found.abs().argmax(1, keepdim=True))
        return torch.where(largest < 0, -found, found)

    def _along(self, rows: dict[str, Tensor], shared: Shared) -> Tensor:
        """What the coded coefficients stand for, ``[h, n, D]``."""
        basis, by = shared["basis"].to(FULL), shared["by"].unsqueeze(-1).unbind(1)
        scale, low = (wide(rows[f"turned_{x}"], FULL) for x in ("scale", "low"))
        scale, low = ((x * own).unsqueeze(-1) for x, own in zip((scale, low), by, strict=True))
        return (unpack(rows["turned"], 2, basis.shape[2]) * scale + low) @ basis.transpose(1, 2)

    def row_bytes(self, width: int, element: int, rows: int) -> float:
        """See :class:`Codec`."""
        rank = min(self.rank, width, rows)
        shared = 2 * width * (1 + rank) + 2 * FULL.itemsize
        own = -(-rank // 4) + 2
        return own + shared / rows + self.rest.row_bytes(width, element, rows)

    def decode(self, rows: dict[str, Tensor], shared: Shared) -> Tensor:
        """See :class:`Codec`."""
        mean = shared["mean"].to(FULL).unsqueeze(1)
        return mean + self._along(rows, shared) + self.rest.decode(rows, shared)


@dataclass(frozen=True)
class Coding:
    """How keys and how values are stored.

    Args:
        keys: Of keys.
        values: Of values.
        raw: Keys are coded before rotation, and turned when they are read.
    """

    keys: Codec
    values: Codec
    raw: bool = False

    def of(self, name: str) -> Codec:
        """That of keys (``k``) or values (``v``)."""
        return self.keys if name == "k" else self.values

    @property
    def placed(self) -> bool:
        """Whether either needs the places of its rows."""
        return self.keys.placed or self.values.placed

    def row_bytes(self, width: int, element: int, rows: int) -> float:
        """Bytes of a key and a value, see :class:`Codec`."""
        return sum(own.row_bytes(width, element, rows) for own in (self.keys, self.values))

    def bits(self, width: int, element: int, rows: int) -> float:
        """Bits of one number, all that is stored for it counted."""
        return self.row_bytes(width, element, rows) * 8 / (2 * width)


CODECS: dict[str, Coding] = {
    "int8": Coding(Integer(8), Integer(8)),
    "int4": Coding(Integer(4), Integer(4)),
    "kivi": Coding(ChannelBlocks(), TokenBlocks(), raw=True),
    "quant-video-gen": Coding(Centroids(), Centroids(), raw=True),
    "budget-pca": Coding(Principal(), Principal(), raw=True),
}


def _full(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, FULL))


def _orthonormal(x: Tensor) -> Tensor:
    """Columns ``[h, D, r]`` made orthonormal from left to right; what depends on others fades."""
    x = x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    gram = x.transpose(1, 2) @ x
    gram.diagonal(dim1=1, dim2=2).add_(1e-13)
    lower = torch.linalg.cholesky_ex(gram, check_errors=False)[0]
    return torch.linalg.solve_triangular(lower.transpose(1, 2), x, upper=True, left=False)


def _spread(x: Tensor, size: int, width: int) -> Tensor:
    """Numbers of blocks ``[..., B]`` at each of ``width`` channels."""
    return x.repeat_interleave(size, dim=-1)[..., :width]
