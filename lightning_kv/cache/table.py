"""The rows of one layer of one sample as a table, however the store holds them.

Shapes: H heads, N rows of the longest head, F frames, Q query frames, D head width. Fields are
``[1, N]`` where all heads agree, and zero where a shorter head has no row (``valid`` says so). How
the store groups heads, segments and codecs is not seen here.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lightning_kv.cache.host import upload
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.rotary import rotate, wide
from lightning_kv.cache.rows import Rows

BLOCK = 2**23  # numbers held at once while attention is scored
How = Literal["sum", "mean", "max", "logsumexp"]


class Table:
    """Rows of all heads of one layer, and where they come from.

    Args:
        rows: As stored.
        frames: Ids of the frames that some head may hold rows of, ascending; on the host.
        geometry: Sizes of the model.
        rotated: Keys are stored rotated at their recorded time, else raw.
        whole: Every head holds all rows of its frames, frame after frame.
    """

    def __init__(
        self, rows: Rows, frames: tuple[int, ...], geometry: Geometry, rotated: bool, whole: bool
    ) -> None:
        self._rows, self.frames, self.geometry = rows, frames, geometry
        self._rotated, self.whole = rotated, whole

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def heads(self) -> int:
        """Number H of heads."""
        return self.geometry.heads

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each head."""
        return self._rows.lengths

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._like.device

    @property
    def _like(self) -> Tensor:
        return self._rows.groups[0].meta["time"]

    @cached_property
    def valid(self) -> Tensor:
        """Which entries are rows, bool ``[1 or H, N]``."""
        if len(set(self.lengths)) == 1:
            return torch.ones(1, len(self), dtype=torch.bool, device=self.device)
        lengths = upload(self.lengths, self._like, torch.int64).unsqueeze(1)
        return torch.arange(len(self), device=self.device) < lengths

    @property
    def ragged(self) -> bool:
        """Whether some heads hold fewer rows than others."""
        return len(set(self.lengths)) > 1

    def field(self, name: str) -> Tensor:
        """A field or column, ``[1 or H, N]`` (``place`` is ``[1 or H, N, 2]``).

        Raises:
            ValueError: There is none of that name.
        """
        groups = self._rows.groups
        if name not in groups[0].meta:
            raise ValueError(
                f"Rows have no field or column {name!r}. They have: "
                f"{', '.join(groups[0].meta)}. Declare columns in the part's `columns`."
            )
        return self._rows.table([group.meta[name] for group in groups])

    @cached_property
    def frame_id(self) -> Tensor:
        """The frame of each row, int32 ``[1 or H, N]``."""
        return self.field("frame_id")

    @cached_property
    def time(self) -> Tensor:
        """The recorded rotary time of each row, ``[1 or H, N]``."""
        return self.field("time")

    @cached_property
    def place(self) -> Tensor:
        """Row and column in the frame, ``[1 or H, N, 2]``; fractional where rows were merged."""
        return self.field("place")

    @cached_property
    def weight(self) -> Tensor:
        """How many tokens each row stands for, ``[1 or H, N]``."""
        return self.field("weight")

    @cached_property
    def raster(self) -> Tensor:
        """Number of the token at each row's place, rounded down, int64 ``[1 or H, N]``."""
        row, column = self.place.long().unbind(-1)
        return row * self.geometry.grid[1] + column

    # -- keys and values -------------------------------------------------------------------

    def keys(self, name: Literal["raw", "read"] = "read") -> Tensor:
        """Keys ``[H, N, D]``: ``raw`` before rotation, or as queries ``read`` them."""
        stored = self._payload("k")
        if name == "read":
            times = self._read_times()
            if self._rotated and times is None:
                return stored
            at = self.time if times is None else times
            return self._turned(stored, at, 1) if not self._rotated else stored
        return self._turned(stored, self.time, -1) if self._rotated else stored

    def values(self) -> Tensor:
        """Values ``[H, N, D]``."""
        return self._payload("v")

    def _payload(self, name: str) -> Tensor:
        rows = self._rows
        return rows.table([group.payload(name) for group in rows.groups])

    def _read_times(self) -> Tensor | None:
        return None

    def _turned(self, keys: Tensor, time: Tensor, sign: int) -> Tensor:
        angles = sign * self.angles(time, self.place)
        return rotate(keys, angles, self.geometry.rotary.work)

    def angles(self, time: Tensor, place: Tensor) -> Tensor:
        """Rotary angles ``[..., D / 2]`` of rows at a time ``[...]`` and place ``[..., 2]``."""
        return self.geometry.rotary.angles(time, *place.unbind(-1))

    # -- frames ----------------------------------------------------------------------------

    @cached_property
    def frame_ids(self) -> Tensor:
        """:attr:`frames` on the device, int64 ``[F]``."""
        return upload(self.frames, self._like, torch.int64).clone()  # parts get their own

    @cached_property
    def frame_index(self) -> Tensor:
        """Index into ``frame_ids`` of every row, ``[1 or H, N]``."""
        found = torch.searchsorted(self.frame_ids, self.frame_id.long())
        return found.clamp_max(max(len(self.frames) - 1, 0))

    @cached_property
    def slot_of(self) -> Tensor:
        """Where whole frames lie: the place of each frame among those of a head, ``[1 or H, F]``.

        The number of places where a head has none. Only where :attr:`whole`.
        """
        tokens, size = self.geometry.tokens, len(self) // self.geometry.tokens
        index, real = self.frame_index[:, ::tokens], self.valid[:, ::tokens]
        index = torch.where(real, index, len(self.frames))
        place = torch.arange(size, device=self.device).expand_as(index)
        blank = index.new_full((len(index), len(self.frames) + 1), size)
        return blank.scatter(1, index, place)[:, :-1]

    @cached_property
    def rows_per_frame(self) -> Tensor:
        """Rows of each head in each frame, int64 ``[1 or H, F]``."""
        if self.whole and not self.ragged and len(self.frame_id) == 1:
            shape = (1, len(self.frames))
            return torch.full(shape, self.geometry.tokens, device=self.device)
        if self.whole:
            return (self.slot_of < len(self) // self.geometry.tokens) * self.geometry.tokens
        return self.rows_in(self.valid)

    def rows_in(self, mask: Tensor) -> Tensor:
        """How many of the rows ``[1 or H, N]`` each frame has, int64 ``[1 or H, F]``."""
        index, real = self.frame_index, (mask & self.valid).long()
        lines = max(len(index), len(real))
        blank = index.new_zeros(lines, len(self.frames))
        if not len(self.frames):
            return blank
        return blank.scatter_add(1, index.expand(lines, -1), real.expand(lines, -1))

    def rows_from(self, frames: Collection[int]) -> Tensor:
        """Rows of frames that are named, bool ``[1 or H, N]``."""
        named = upload([frame in frames for frame in self.frames], self._like, torch.bool)
        return self.rows_of(named.unsqueeze(0)) if self.frames else self.valid

    @property
    def present(self) -> Tensor:
        """Frames of which a head holds at least one row, bool ``[1 or H, F]``."""
        return self.rows_per_frame > 0

    def by_frame(self, values: Tensor, how: How = "sum") -> Tensor:
        """Row values put together over frames.

        Sums have one order on every device, so scores do not flicker.

        Args:
            values: ``[1 or H, Q, N]``.
            how: ``sum``, ``mean`` over the rows there are, ``max`` or ``logsumexp``.

        Returns:
            ``[1 or H, Q, F]``: 0 where a head has no row, -inf for ``max`` and ``logsumexp``.
        """
        if how == "logsumexp":
            top = self.by_frame(values, "max")
            rest = (values - self.at_rows(top)).masked_fill(~self.valid.unsqueeze(1), -torch.inf)
            return top + self.by_frame(rest.exp()).log()
        values = wide(values)
        if how == "max":
            index = self.frame_index.unsqueeze(1)
            lines = max(len(values), len(index))
            real = values.masked_fill(~self.valid.unsqueeze(1), -torch.inf)
            real = real.expand(max(lines, len(real)), -1, -1)
            blank = real.new_full((*real.shape[:2], len(self.frames)), -torch.inf)
            return blank.scatter_reduce(2, index.expand_as(real), real, "amax")
        total = self._summed(values)
        if how == "mean":
            total = total / self.rows_per_frame.clamp_min(1).unsqueeze(1)
        return total

    def _summed(self, values: Tensor) -> Tensor:
        if not self.frames:
            return values.new_zeros(*values.shape[:2], 0)
        lines = max(len(values), len(self.frame_index), len(self.valid))
        values = values.expand(lines, -1, -1)
        if self.whole:
            each = values.unflatten(2, (-1, self.geometry.tokens)).sum(3)
            each = torch.nn.functional.pad(each, (0, 1))
            slot = self.slot_of.unsqueeze(1).expand(lines, each.shape[1], -1)
            return each.gather(2, slot)
        bucket = torch.where(self.valid, self.frame_index, -1)
        return summed(values.transpose(1, 2), bucket, len(self.frames)).transpose(1, 2)

    def at_rows(self, frames: Tensor) -> Tensor:
        """Frame values ``[1 or H, Q, F]`` at every row, ``[1 or H, Q, N]``."""
        index = self.frame_index.unsqueeze(1)
        lines = max(len(frames), len(index))
        index = index.expand(lines, frames.shape[1], -1)
        return frames.expand(lines, -1, -1).gather(2, index)

    def rows_of(self, frames: Tensor) -> Tensor:
        """Rows of chosen frames, bool ``[1 or H, N]``; ``frames`` is bool ``[1 or H, F]``."""
        return self.at_rows(frames.unsqueeze(1))[:, 0] & self.valid


def summed(x: Tensor, bucket: Tensor, count: int) -> Tensor:
    """Rows ``[H, N, D]`` added up by bucket ``[1 or H, N]`` (-1: left out), ``[H, count, D]``.

    The order of the sum is the same every time, on every device.
    """
    heads = len(x)
    bucket = torch.where(bucket < 0, count, bucket).expand(heads, -1)
    blank = x.new_zeros(heads, count + 1, x.shape[2])
    if not x.is_cuda:
        return blank.scatter_add(1, bucket.unsqueeze(-1).expand_as(x), x)[:, :count]
    line = torch.arange(heads, device=x.device).unsqueeze(1).expand_as(bucket)
    return blank.index_put((line, bucket), x, accumulate=True)[:, :count]
