"""From records of clips to curves of heads: means in one order, whoever measured the clips.

Shapes: P prompts, L layers, H heads, N budgets of the grid, E budgets that are measured exactly,
S steps, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kv.calibration.clips import ClipRecord
from lightning_kv.calibration.sites import SiteSettings, losses
from lightning_kv.policies.head_curves import HeadCurves

Summary = dict[str, Tensor]
"""Means over the sites of a clip, or of a prompt's clips."""


def summary_of(clip: ClipRecord, settings: SiteSettings, at: int) -> Summary:
    """Means over the sites of a clip, in the order of chunk and step.

    Args:
        clip: A record.
        settings: By which it was made.
        at: Frames of history at which the effects of heads are compared with each other.

    Returns:
        ``SCORER/METRIC`` ``[L, H, N]``, ``lag/mass`` ``[L, H, S, reach]``, ``query/mean`` and
        ``query/square`` ``[L, H, D]``, ``query/length`` ``[L, H, D / 2]``, ``gram/gn``
        ``[L H, L H]`` where there are probes; in clips that validate ``exact/SCORER``
        ``[L, H, E]``, ``zero`` ``[L, H]`` and ``floor`` (the largest, not the mean); with profiles
        ``profile/mass`` and ``profile/logits``.
    """
    order = sorted(clip.sites)
    records = [clip.sites[place] for place in order]
    metrics = ("mass", "output", *(("gn",) if settings.probes else ()))
    found = {
        f"{scorer}/{metric}": mean_of(losses(record, metric, scorer) for record in records)
        for scorer in settings.scorers
        for metric in metrics
    }
    for name in ("query/mean", "query/square", "query/length"):
        found[name] = mean_of(record[name] for record in records)
    steps = sorted({step for _, step in order})
    lags = [
        mean_of(clip.sites[place]["lag/mass"] for place in order if place[1] == s) for s in steps
    ]
    found["lag/mass"] = torch.stack(lags, 2)
    if settings.probes:
        found["gram/gn"] = mean_of(gram(record, settings, at) for record in records)
    if clip.validates:
        names = ["zero", *(f"exact/{own}" for own in settings.scorers if settings.exact)]
        found |= {name: mean_of(record[name] for record in records) for name in names}
        found["floor"] = torch.stack([record["floor"] for record in records]).amax()
    return found | {f"profile/{name}": own for name, own in clip.profile.items()}


def gram(record: Mapping[str, Tensor], settings: SiteSettings, at: int) -> Tensor:
    """Products of the effects of any two heads on the estimate, ``[L H, L H]``.

    The diagonal is the loss of each head at this budget, and the sum over all places that of all
    heads together, to second order.

    Args:
        record: Of one pass.
        settings: By which it was made; the first scorer is meant.
        at: Frames of history.
    """
    products = record[f"gn/{settings.scorers[0]}"][..., at - settings.sink].flatten(1)  # [K, L H]
    return products.T @ products / (len(products) * record["norm"])


def mean_of(values: Iterable[Tensor]) -> Tensor:
    """Their mean: summed one after the other in float64, so that the order is all that counts."""
    total, count = None, 0
    for value in values:
        total = value.double() if total is None else total + value
        count += 1
    return total / count


@dataclass(frozen=True, eq=False)
class Reduced:
    """Means over the clips of each prompt.

    Args:
        prompts: Keys, ascending.
        summaries: One of each prompt.
        settings: By which clips were measured.
    """

    prompts: tuple[str, ...]
    summaries: tuple[Summary, ...]
    settings: SiteSettings

    def stacked(self, name: str, prompts: Sequence[str] | None = None) -> Tensor:
        """Of each prompt, ``[P, ...]``; of some where they are named."""
        chosen = [
            own
            for key, own in zip(self.prompts, self.summaries, strict=True)
            if prompts is None or key in prompts
        ]
        return torch.stack([own[name] for own in chosen])

    def mean(self, name: str, prompts: Sequence[str] | None = None) -> Tensor:
        """Over prompts."""
        return mean_of(self.stacked(name, prompts))

    def has(self, name: str) -> bool:
        """Whether every prompt has it."""
        return all(name in own for own in self.summaries)

    @property
    def metric(self) -> str:
        """What curves are judged by: ``gn``, or ``output`` where there are no probes."""
        return "gn" if self.settings.probes else "output"

    def curves(self, validated: Sequence[str]) -> HeadCurves:
        """What goes into the file, but for what it says about itself.

        Args:
            validated: Keys of the prompts whose losses were also measured exactly.
        """
        settings, grid = self.settings, self.settings.budgets
        metrics = ("mass", "output", "gn")
        names = [f"{own}/{metric}" for own in settings.scorers for metric in metrics]
        curves = {name: self.stacked(name) for name in names if self.has(name)}
        whole = settings.exact == grid and len(validated) == len(self.prompts)
        for scorer in settings.scorers if whole else ():
            curves[f"{scorer}/exact"] = self.stacked(f"exact/{scorer}")
        importance = {}
        if settings.probes:  # with the least nothing is kept but the sink, whatever the scorer
            importance["history"] = self.mean(f"{settings.scorers[0]}/gn")[..., 0]
        if validated:
            importance["zero"] = self.mean("zero", validated)
        mean, square = self.mean("query/mean"), self.mean("query/square")
        extra = {"lag/mass": self.mean("lag/mass"), "query/mean": mean}
        extra["query/var"] = (square - mean.square()).clamp_min(0)
        extra["query/length"] = self.mean("query/length")
        if settings.probes:
            extra["gram/gn"] = self.mean("gram/gn")
        return HeadCurves(grid, curves, importance, extra)


def reduced(clips: Iterable[ClipRecord], settings: SiteSettings, at: int) -> Reduced:
    """Means over sites, then over the clips of each prompt, in the order of their keys.

    Args:
        clips: In any order; each is let go before the next is asked for.
        settings: By which they were measured.
        at: As in :func:`summary_of`.
    """
    found: dict[str, dict[str, Summary]] = {}
    for clip in clips:
        found.setdefault(clip.unit, {})[clip.key] = summary_of(clip, settings, at)
    prompts = tuple(sorted(found))
    return Reduced(prompts, tuple(_together(found[unit]) for unit in prompts), settings)


def _together(summaries: Mapping[str, Summary]) -> Summary:
    """The mean of a prompt's clips, of what all of them have; floors are the largest."""
    every = [summaries[key] for key in sorted(summaries)]
    names = [name for name in every[0] if all(name in own for own in every)]
    both = {name: mean_of(own[name] for own in every) for name in names}
    if "floor" in both:
        both["floor"] = torch.stack([own["floor"] for own in every]).amax()
    return both
