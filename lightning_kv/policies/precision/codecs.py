"""As computed, or with a codec once rows are old enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_kv.cache.codecs import CODECS
from lightning_kv.cache.decisions import Recode
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import PrecisionPart


@dataclass(frozen=True)
class AsComputed(PrecisionPart):
    """Rows are stored as the model computed them."""

    name: ClassVar[str] = "as-computed"
    codes: ClassVar[bool] = False


@dataclass(frozen=True)
class Aged(PrecisionPart):
    """Rows get a codec when they reach an age.

    Round-to-nearest integers per row, or 2 bits around centroids (Quant VideoGen,
    arXiv 2602.02958).

    Args:
        codec: ``int8``, ``int4`` or ``int2-centroids``.
        age: Frames that stay as computed, counted back from the newest; 0 encodes at once.
    """

    name: ClassVar[str] = "aged"
    codec: str = "int8"
    age: int = 0

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(
                f"No codec {self.codec!r}. Codecs here: {', '.join(CODECS)}. "
                "For none, use the part as-computed."
            )
        if self.age < 0:
            raise ValueError(
                f"age={self.age} frames. Rows are coded at an age of 0 frames or more."
            )

    def assign(self, view: CacheView, state: Any) -> list[Recode]:
        """All rows older than ``age`` frames."""
        if not view.frames or view.frames[0] > view.frames[-1] - self.age:
            return []
        old = view.frame_ids <= view.frames[-1] - self.age
        return [Recode(self.codec, view.rows_of(old.unsqueeze(0)))]

    def ends_in(self) -> tuple[str, int]:
        """The codec, from the age on."""
        return self.codec, self.age
