"""Keep what any query of the newest chunk looks at, in most heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.base import UnitPart
from lightning_kv.policies.checks import between
from lightning_kv.policies.part import Preset
from lightning_kv.policies.statistics import final_salience


@dataclass(frozen=True)
class PaFuKV(UnitPart):
    """Keep what at least one query of the newest chunk looks at, the same rows in all heads.

    PaFu-KV (arXiv 2601.21896) trains a small network to foretell the salience of a row: the largest
    mass, averaged over heads, that it gets from any query, later ones included.

    Ours: a stand-in that needs no training. Salience is the largest softmax mass, averaged over the
    heads of a layer, from any query of the clean pass over the newest chunk, over all held rows and
    the chunk's own; it knows no later query. It is not what the paper measures. Whole frames, by
    the sum of their rows, are the default as in ``snap-kv``.

    Args:
        queries: Query rows of the chunk, evenly spaced; all where it has no more.
    """

    name: ClassVar[str] = "pa-fu-kv"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "pa-fu-kv",
            "Keep the frames that any query of the newest chunk looks at, the same in all heads; "
            "drop the others (a stand-in for the trained salience).",
            "PaFu-KV, arXiv 2601.21896",
            ("memory", "reads"),
            {"retain": {"part": "pa-fu-kv", "budget": "15f"}},
            "15f: one chunk of 3 less than a window of 21; salience from a trained network",
        ),
    )
    observes: ClassVar[tuple[str, ...]] = ("prefill", "commit")
    queries: int = 520

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 1, None, "queries")

    def observe(self, view: PassView, state: Any) -> None:
        """What the frames that become final look at."""
        state.setdefault("salience", {})[view.layer] = final_salience(view, self.queries)

    def scores(self, view: CacheView, state: Any) -> Tensor:
        """The salience of each row, of a frame that of all its rows."""
        rows = state["salience"].pop(view.layer).unsqueeze(1)
        return view.by_frame(rows) if self.unit == "frame" else rows
