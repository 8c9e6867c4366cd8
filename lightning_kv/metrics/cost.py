"""What a cache policy costs: memory held, rows read, time taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_kv.metrics.base import SavedMetric

MEANS = ("kv_bytes_mean", "kv_rows_read", "kv_rows_scored")


class CacheCost(SavedMetric):
    """Cost of the clips of a run: peak over clips, means over clips, time per chunk.

    The bytes of a clip are those of all distinct storages that its cache and its policy's state
    hold. The states are sums, and lists with one largest value per clip, so ranks with uneven
    numbers of clips merge; sums to rounding, as the order of addition differs.

    * ``kv_bytes_peak``: most bytes that any clip held.
    * ``kv_bytes_mean``: bytes held after a chunk, mean over chunks, then over clips.
    * ``kv_rows_read``, ``kv_rows_scored``: mean over clips.
    * ``seconds_per_chunk``, ``seconds_per_chunk_max``: mean and largest over all timed chunks.

    Example:
        >>> cost = CacheCost()
        >>> cost.update(1200, [600, 1000], rows_read=50, rows_scored=0, seconds=[0.5, 1.0])
        >>> cost.update(900, [900, 900], rows_read=70, rows_scored=8, seconds=[0.75, 0.75])
        >>> {name: value.item() for name, value in cost.compute().items()}  # doctest: +ELLIPSIS
        {'kv_bytes_peak': 1200.0, 'kv_bytes_mean': 850.0, 'kv_rows_read': 60.0, ...
    """

    higher_is_better = False

    peaks: list[Tensor]
    sums: Tensor
    clips: Tensor
    seconds: Tensor
    chunks: Tensor
    slowest: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("peaks", "slowest"):
            self.add_state(name, [], dist_reduce_fx="cat", persistent=True)
        for name, shape in (
            ("sums", (len(MEANS),)),
            ("clips", ()),
            ("seconds", ()),
            ("chunks", ()),
        ):
            zeros = torch.zeros(shape, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum", persistent=True)

    def update(
        self,
        peak_bytes: float,
        chunk_bytes: Sequence[float],
        rows_read: float,
        rows_scored: float,
        seconds: Sequence[float] = (),
    ) -> None:
        """Add one clip.

        Args:
            peak_bytes: Most bytes held at any time.
            chunk_bytes: Bytes held after each chunk.
            rows_read: History rows read, over passes, layers, heads and queries.
            rows_scored: The same for keys touched only to score them.
            seconds: Wall-clock of each chunk that was timed.

        Raises:
            ValueError: There is no chunk, a number is negative or not finite, or a chunk holds
                more than the peak.
        """
        numbers = [peak_bytes, *chunk_bytes, rows_read, rows_scored, *seconds]
        if not chunk_bytes or not all(math.isfinite(x) and x >= 0 for x in numbers):
            raise ValueError(
                f"A clip cannot cost this: peak {peak_bytes} bytes, {list(chunk_bytes)} bytes per "
                f"chunk, {rows_read} rows read, {rows_scored} scored, {list(seconds)} seconds. "
                "Pass finite numbers from 0 on, of at least one chunk."
            )
        if max(chunk_bytes) > peak_bytes:
            raise ValueError(
                f"A chunk holds {max(chunk_bytes)} bytes, more than the peak of {peak_bytes}. Pass "
                "the largest number of bytes as the peak."
            )
        self.peaks.append(self.sums.new_tensor([peak_bytes]))
        mean = math.fsum(chunk_bytes) / len(chunk_bytes)
        self.sums += self.sums.new_tensor([mean, rows_read, rows_scored])
        self.clips += 1
        self.seconds += math.fsum(seconds)
        self.chunks += len(seconds)
        if seconds:
            self.slowest.append(self.sums.new_tensor([max(seconds)]))

    def compute(self) -> dict[str, Tensor]:
        """Every cost, a float64 scalar; NaN where no clip, or no timed chunk, was seen."""
        found = {"kv_bytes_peak": self._largest(self.peaks)}
        found |= zip(MEANS, self.sums / self.clips, strict=True)
        found["seconds_per_chunk"] = self.seconds / self.chunks
        found["seconds_per_chunk_max"] = self._largest(self.slowest)
        return found

    def _largest(self, values: list[Tensor] | Tensor) -> Tensor:
        """Largest of some values, which are one tensor once they were gathered."""
        if isinstance(values, list):
            values = torch.cat([self.sums.new_zeros(0), *values])
        return values.max() if len(values) else self.sums.new_tensor(torch.nan)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # A process without clips must gather what the others gather: torchmetrics takes float32.
        for state in (self.peaks, self.slowest):
            if not state:
                state.append(self.sums.new_zeros(0))
        super()._sync_dist(*args, **kwargs)
