"""As computed, or with a codec once rows are old enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_kv.cache.codecs import CODECS
from lightning_kv.cache.decisions import Recode
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import PrecisionPart, newest
from lightning_kv.policies.part import Preset


@dataclass(frozen=True)
class AsComputed(PrecisionPart):
    """Rows are stored as the model computed them."""

    name: ClassVar[str] = "as-computed"
    codes: ClassVar[bool] = False


def _preset(name: str, about: str, paper: str, defaults: str) -> Preset:
    """A codec for all rows but those of the newest chunk."""
    part = {"part": "aged", "codec": name, "age": None}
    return Preset(name, about, paper, ("memory",), {"precision": part}, defaults)


@dataclass(frozen=True)
class Aged(PrecisionPart):
    """Rows get a codec when they reach an age; rows of one age are coded together.

    - ``int8``, ``int4``: round to nearest, symmetric, one scale for each row, keys as they are held
      (rotated, where positions move nothing).
    - ``kivi``: four levels between the least and the largest number; keys in blocks of 128 rows of
      one channel, values in blocks of 64 channels of one row; scales in fp8 e4m3 (KIVI, arXiv
      2402.02750, as audited in github.com/JamesSand/Quant-VideoGen).
    - ``quant-video-gen``: distance to the nearest of 256 centroids, three levels in blocks of 64
      channels (arXiv 2602.02958); centroids in float32, which pays with long chunks only.
    - ``budget-pca``: mean and four principal directions, whose coefficients are coded too; the rest
      as ``kivi`` keys, scales with a power of two for each channel (the same audit).

    The latter three code keys before rotation, so these are turned when they are read. Ours: a
    block is never longer than the rows that are coded together, or than a head is wide; zeros that
    fill up a block count for its range but are not stored; codes are those of the scales as they
    are stored; k-means starts from evenly spaced rows, takes two steps and has at most one centroid
    for 16 rows; eigenvectors are exact. A row whose neighbours are dropped keeps its codes.

    Args:
        codec: ``int8``, ``int4``, ``kivi``, ``quant-video-gen`` or ``budget-pca``.
        age: Frames that stay as computed, counted back from the newest; 0 encodes at once. The
            newest chunk, however long it is, where None.
    """

    name: ClassVar[str] = "aged"
    presets: ClassVar[tuple[Preset, ...]] = (
        _preset(
            "int8",
            "Keep everything; all but the newest chunk in 8 bits, one scale for each row.",
            "KV quantisation study, arXiv 2603.27469",
            "no budget; rounded to nearest, which the study reports with 4 and 2 bits",
        ),
        _preset(
            "int4",
            "Keep everything; all but the newest chunk in 4 bits, one scale for each row.",
            "KV quantisation study, arXiv 2603.27469",
            "no budget; rounded to nearest in blocks, 3.2 times smaller with scales",
        ),
        _preset(
            "kivi",
            "Keep everything; older chunks in 2 bits, keys by channel and values by token.",
            "KIVI, arXiv 2402.02750",
            "no budget; 24f coded together, keys in blocks of 128 rows, values of 64 channels",
        ),
        _preset(
            "quant-video-gen",
            "Keep everything; older chunks as centroids and three levels around them.",
            "Quant VideoGen, arXiv 2602.02958",
            "no budget; 24f coded together: 256 centroids, blocks of 64 channels",
        ),
        _preset(
            "budget-pca",
            "Keep everything; older chunks as four principal directions and 2 bits for the rest.",
            "Budget-PCA in the re-audit of Quant VideoGen, no arXiv id",
            "no budget; 24f coded together: 4 directions, blocks of 128 rows",
        ),
    )
    codec: str = "int8"
    age: int | None = 0

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(
                f"No codec {self.codec!r}. Codecs here: {', '.join(CODECS)}. "
                "For none, use the part as-computed."
            )
        if self.age is not None and self.age < 0:
            raise ValueError(
                f"age={self.age} frames. Rows are coded at an age of 0 frames or more."
            )

    def assign(self, view: CacheView, state: Any) -> list[Recode]:
        """All rows older than ``age`` frames, or than the newest chunk."""
        if not view.frames:
            return []
        last = newest(view) - 1 if self.age is None else view.frames[-1] - self.age
        if view.frames[0] > last:
            return []
        return [Recode(self.codec, view.rows_of((view.frame_ids <= last).unsqueeze(0)))]

    def ends_in(self) -> tuple[str, int | None]:
        """The codec, from the age on."""
        return self.codec, self.age
