"""Metrics that are computed from other metrics of the same clip.

A clip has such a value where all that it needs is among the metrics of its record; means,
intervals and differences follow as for any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_kv.stats.vbench import METRICS as VBENCH
from lightning_kv.stats.vbench import vbench_quality

Metrics = Mapping[str, "float | None"]


@dataclass(frozen=True)
class Derived:
    """A metric that is computed from others.

    Args:
        name: As in results.
        needs: Names of the metrics that it is made of.
        value: From their values, in that order, to its own. May raise ValueError.
        facts: Of :class:`lightning_kv.runs.summary.MetricInfo`.
    """

    name: str
    needs: tuple[str, ...]
    value: Callable[..., float]
    facts: dict[str, Any] = field(default_factory=dict)

    def of(self, metrics: Metrics) -> float | None:
        """Its value; None where one that it needs has none, or is out of range."""
        values = [metrics[name] for name in self.needs]
        if None in values:
            return None
        try:
            return self.value(*values)
        except ValueError:
            return None


DERIVED = (
    Derived(
        "vbench_quality",
        tuple(VBENCH.values()),
        lambda *values: vbench_quality(dict(zip(VBENCH, values, strict=True))),
        {
            "unit": "",
            "higher_is_better": True,
            "recipe": "VBench's quality score (arXiv 2311.17982) of each clip: weighted mean, each "
            f"on VBench's scale, of {', '.join(VBENCH.values())}; flicker of every clip, not of "
            "static ones alone",
            "undefined": "a dimension that it is made of has no value",
            "comparable": False,  # VBench filters for static clips before it measures flicker
        },
    ),
)
"""Every derived metric."""


def derivable(metrics: Iterable[str]) -> list[Derived]:
    """Derived metrics that have all they need among these, and are not there themselves."""
    known = set(metrics)
    return [each for each in DERIVED if known.issuperset(each.needs) and each.name not in known]


def with_derived(metrics: Metrics) -> dict[str, float | None]:
    """Values of the metrics of one clip, and of those that can be computed from them."""
    return {**metrics, **{each.name: each.of(metrics) for each in derivable(metrics)}}
