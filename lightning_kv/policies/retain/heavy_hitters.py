"""Keep what was looked at most so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_kv.cache.decisions import Retention
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.base import UnitPart
from lightning_kv.policies.checks import between
from lightning_kv.policies.part import Preset
from lightning_kv.policies.statistics import collected_mass, observe_mass


@dataclass(frozen=True)
class HeavyHitters(UnitPart):
    """Keep what was looked at most so far, and the newest chunk.

    H2O, Heavy-Hitter Oracle (arXiv 2306.14048): the softmax mass that a row received from the
    queries of all clean passes since it was made.

    Args:
        queries: Query rows sampled per pass.
    """

    name: ClassVar[str] = "heavy-hitters"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "h2o",
            "Keep the frames with the largest accumulated softmax mass and the newest chunk; drop "
            "the others.",
            "H2O, arXiv 2306.14048",
            ("memory", "reads"),
            {"retain": {"part": "heavy-hitters", "budget": "9f"}},
            "single tokens of a text: half by mass, half the newest",
        ),
    )
    columns: ClassVar[dict[str, str]] = {"mass": "sum"}
    observes: ClassVar[tuple[str, ...]] = ("prefill", "commit")
    queries: int = 520

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 1, None, "queries")

    def observe(self, view: PassView, state: Any) -> None:
        """What this pass looks at."""
        observe_mass(view, state, self.queries)

    def commit(self, views: list[CacheView], state: Any) -> list[Retention | None]:
        """The accumulated mass decides; it is written down for the next time."""
        state["total"] = {v.layer: collected_mass(v, state, "mass") for v in views}
        return super().commit(views, state)

    def keep(self, view: CacheView, state: Any) -> Retention:
        """The same for one layer, in the middle of a pass or at an event."""
        state.setdefault("total", {})[view.layer] = collected_mass(view, state, "mass")
        return super().keep(view, state)

    def kept(self, view: CacheView, units: Tensor | None, state: Any) -> Retention:
        """The rows that stay, and the mass of all of them."""
        own, total = super().kept(view, units, state), state["total"].pop(view.layer)
        return Retention(write={"mass": total}, keep=own.keep if own else None)

    def scores(self, view: CacheView, state: Any) -> Tensor:
        """The accumulated mass, of a frame that of all its rows."""
        mass = state["total"][view.layer].unsqueeze(1)
        return view.by_frame(mass) if self.unit == "frame" else mass
