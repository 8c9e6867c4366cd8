"""Keep what the newest chunk looks at, and what lies around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import avg_pool2d

from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.base import UnitPart
from lightning_kv.policies.checks import between, choice
from lightning_kv.policies.layout import Layout
from lightning_kv.policies.part import Preset
from lightning_kv.policies.statistics import final_mass


@dataclass(frozen=True)
class SnapKV(UnitPart):
    """Keep what the newest chunk looks at, and what lies around it.

    SnapKV (arXiv 2404.14469): the mean softmax mass that a row gets from the last queries, averaged
    over its neighbourhood; nothing is remembered of what was looked at before.

    Ours: the last queries (the end of a prompt in the paper) are those of the clean pass over the
    newest chunk, and their softmax is over all held rows and the chunk's own. The neighbourhood is
    a square of the frame, not a stretch of text, and of it only rows that are there count: neither
    dropped ones nor what lies beyond the border make a mean smaller. Whole frames, by the sum of
    their rows, are the default, since they recall more on the embedded model than the paper's
    single rows; even so they lose what the newest chunk does not show, which ``h2o`` remembers.

    Args:
        queries: Query rows of the chunk, evenly spaced; all where it has no more.
        pool: Side of the square in tokens, odd; 1 for the row alone.
    """

    name: ClassVar[str] = "snap-kv"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "snap-kv",
            "Keep the frames that the newest chunk looks at, neighbourhoods pooled, and the chunk; "
            "drop the others.",
            "SnapKV, arXiv 2404.14469",
            ("memory", "reads"),
            {"retain": {"part": "snap-kv", "budget": "9f"}},
            "single tokens of a text: the last 64 look and stay, 5 in a row are pooled",
        ),
    )
    observes: ClassVar[tuple[str, ...]] = ("prefill", "commit")
    queries: int = 520
    pool: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 1, None, "queries")
        choice(self, pool=tuple(range(1, 100, 2)))

    def observe(self, view: PassView, state: Any) -> None:
        """What the frames that become final look at."""
        state.setdefault("mass", {})[view.layer] = final_mass(view, self.queries)

    def scores(self, view: CacheView, state: Any) -> Tensor:
        """The pooled mass of each row, of a frame that of all its rows."""
        layout = Layout.of(view)
        mass = layout.spread(state["mass"].pop(view.layer))
        total, count = (
            avg_pool2d(
                x.unflatten(2, view.geometry.grid), self.pool, 1, self.pool // 2, divisor_override=1
            )
            for x in (mass, layout.there.to(mass))
        )
        mean = (total / count.clamp_min(1)).flatten(2)
        rows = layout.at_rows(view, mean).unsqueeze(1)
        return view.by_frame(rows) if self.unit == "frame" else rows
