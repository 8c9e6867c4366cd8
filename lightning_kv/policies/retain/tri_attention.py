"""Keep the rows that the mean query, asked at later times, will look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_kv.cache.checks import named
from lightning_kv.cache.decisions import Retention
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.base import UnitPart
from lightning_kv.policies.checks import between, choice
from lightning_kv.policies.future_score import QueryMeans, future_scores, update_query_means
from lightning_kv.policies.part import Preset
from lightning_kv.policies.query_tables import NO_QUERIES, QueryTable
from lightning_kv.policies.statistics import standardised


@dataclass(frozen=True)
class TriAttention(UnitPart):
    """Keep the rows that the mean query, asked at later times, will look at.

    TriAttention (arXiv 2604.04921), as on LongLive. Before rotation the queries of a head gather
    around a centre, so the logit of a key is a function of the time between them. Its mean over 1,
    2, 4, ... frames to come, and what queries have beyond the centre times the length of the key,
    is the score of a row, standardised over all that a head holds.

    Ours: the statistics, which the paper takes from videos made beforehand, are those of the clean
    queries of this very rollout up to the ``horizon``, unless a file is given. Lags are those of
    the frames themselves (the released code counts from the end of the buffer, wrong once a row has
    gone). Ties go to the earlier row, without noise; a frame scores as much as all its rows. The
    paper's 6 frames, less a sink of 3 and the last 3, would leave nothing to choose: no sink here.

    Args:
        mode: ``perhead``: heads of one number keep the same rows in all layers, by their mean score
            (the paper's); ``layer_perhead``: every head of every layer ranks for itself.
        furthest: Largest offset in frames, never beyond what the model has been trained on.
        horizon: Frames whose queries count; what the model has been trained on where None.
        statistics: Path of a file with queries made beforehand: that of ``lightning-kv calibrate``
            (.safetensors), or JSON with their ``mean`` and ``length`` by layer, head and number.
    """

    name: ClassVar[str] = "tri-attention"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "tri-attention",
            "Keep the rows that the mean query will look at later, drop the others.",
            "TriAttention, arXiv 2604.04921",
            ("memory", "reads"),
            {"retain": {"part": "tri-attention", "granularity": "token", "budget": "6f"}},
            "6f: sink 3, offsets 1 to 128, perhead, statistics of 81 pixel frames made beforehand",
        ),
    )
    observes: ClassVar[tuple[str, ...]] = ("prefill", "commit")
    mode: str = "perhead"
    furthest: int = 128
    horizon: int | None = None
    statistics: QueryTable = NO_QUERIES

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, mode=("perhead", "layer_perhead"))
        between(self, 1, None, "furthest", *(["horizon"] if self.horizon is not None else []))
        object.__setattr__(self, "statistics", QueryTable.of(self.statistics))

    @property
    def comparable(self) -> bool:
        """Standardised scores rank within a head."""
        return False

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """The statistics are the model's, and layers that rank together keep equally much."""
        self.statistics.check(geometry)
        if self.mode == "perhead":
            self.evenly("mode: layer_perhead")

    def observe(self, view: PassView, state: Any) -> None:
        """The queries of a clean pass, until the horizon; those of the first pass in any case."""
        horizon = self.horizon or view.geometry.train_horizon
        if not self.statistics.mean:
            begun = view.layer in state.get("query_means", {})
            update_query_means(view, state, horizon if begun else None)

    def commit(self, views: list[CacheView], state: Any) -> list[Retention | None]:
        """All layers rank together, or each for itself."""
        if self.mode == "perhead" and not all(map(self.fits, views)):
            state["ranking"] = sum(self.expected(view, state) for view in views) / len(views)
        found = super().commit(views, state)
        state.pop("ranking", None)
        return found

    def scores(self, view: CacheView, state: Any) -> Tensor:
        """The score of each row, of a frame that of all its rows."""
        rows = (state["ranking"] if "ranking" in state else self.expected(view, state)).unsqueeze(1)
        return view.by_frame(rows) if self.unit == "frame" else rows

    def expected(self, view: CacheView, state: Any) -> Tensor:
        """Standardised expected logits of one layer's rows, ``[H, N]``."""
        means = self.known(view, state)
        view.scored += sum(view.lengths)  # one query meets every key
        lag, most = view.ahead().step.query_times[0] - view.time, view.geometry.train_horizon
        offsets = [2**i for i in range(min(self.furthest, most).bit_length())]
        score = future_scores(means, view.keys("raw"), lag, offsets, view.geometry.rotary)
        return standardised(score, view.valid)

    def known(self, view: CacheView, state: Any) -> QueryMeans:
        """What the queries of a layer are like."""
        if self.statistics.mean:
            given = state.setdefault("given", {})
            if view.layer not in given:
                given[view.layer] = self.statistics.means(view)
            return given[view.layer]
        if view.layer not in state.get("query_means", {}):
            raise ValueError(
                f"{named(self, view)} knows no query of a clean pass. Use a sampler that commits "
                "frames in a pass at t = 0, or give statistics: FILE."
            )
        return state["query_means"][view.layer]
