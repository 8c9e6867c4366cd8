"""Where heads are judged, and what is written down there: one record for each pass.

Shapes: L layers, H heads, N budgets of the grid, K probes, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.passes import CONDITIONAL, Pass
from lightning_kv.calibration.memory import Held, Memory
from lightning_kv.calibration.passes import (
    Looked,
    exact_losses,
    look,
    masses_and_errors,
    probe_products,
)
from lightning_kv.calibration.scorers import scorer_of
from lightning_kv.models.samplers import stable_seed
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.future_score import pair_lengths
from lightning_kv.rollout import Call
from lightning_kv.utilities.formatting import several


@dataclass(frozen=True)
class SiteSettings:
    """What is measured in a pass; a record depends on this, the model and the clip alone.

    Args:
        reach: Frames of history that curves end at; the reference reads as many, or more.
        scorers: What decides which frames heads keep: ``mass``, ``recency``, a select part with
            scores, such as ``focused``, or a retain part, such as ``snap-kv``, whose memory at
            each budget is looked up.
        sink: First frames of the clip that every head keeps.
        chunks: Sites of a clip: one chunk in each of so many equal parts of those with enough
            history.
        steps: Denoising steps of a chunk at which to measure; -1 is the last.
        probes: Random directions of a pass; 0 leaves the probes out.
        rows: Queries of a pass that stand for all where attention itself is judged.
        exact: Budgets at which losses are also measured exactly, in clips that validate.
        batch: Rows that go through the layers together in exact measurements.
        every: Memories are looked up at every so many frames of the grid; a chunk of them where
            None.
        seed: Of sites, probes and rows.

    Raises:
        ValueError: Nothing is measured, or a number makes no sense.
    """

    reach: int = 18
    scorers: tuple[str, ...] = ("mass", "recency")
    sink: int = 0
    chunks: int = 3
    steps: tuple[int, ...] = (0, -1)
    probes: int = 4
    rows: int = 520
    exact: tuple[int, ...] = ()
    batch: int = 12
    every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = {
            "reach": self.reach <= max(1, self.sink),
            "sink": self.sink < 0,
            "chunks": self.chunks < 1,
            "steps": not self.steps,
            "probes": self.probes < 0,
            "rows": self.rows < 1,
            "batch": self.batch < 2,
            "every": self.every is not None and self.every < 1,
            "scorers": not self.scorers,
            "exact": any(not self.sink <= b <= self.reach for b in self.exact),
        }
        if names := [name for name, bad in wrong.items() if bad]:
            given = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
            raise ValueError(
                f"Nothing can be calibrated with {given}. Give a reach above the sink, one chunk, "
                "step, row and scorer or more, a batch of 2 or more, and exact budgets from the "
                "sink to the reach."
            )

        if self.sink and (memories := [*self.memories(1)]):
            raise ValueError(
                f"The first {self.sink} frames are to be kept in every head, and what "
                f"{memories[0]} keeps is its own affair. Give a sink of 0 where a scorer is a "
                "memory, or leave the memories out."
            )

    @property
    def budgets(self) -> tuple[int, ...]:
        """The grid: history frames from the sink to all that are within reach."""
        return tuple(range(self.sink, self.reach + 1))

    def memories(self, chunk: int) -> dict[str, Memory]:
        """Scorers that are memories, by name.

        Args:
            chunk: Frames of a chunk.
        """
        found = {name: scorer_of(name) for name in self.scorers}
        return {
            name: Memory(own, self.budgets, chunk, self.every or chunk)
            for name, own in found.items()
            if isinstance(own, CachePolicy)
        }


def sites_of(
    key: str, frames: int, chunk: int, settings: SiteSettings, given: int = 0
) -> tuple[int, ...]:
    """The chunks of a clip at which heads are judged, ascending; told by its key alone.

    Args:
        key: Of the clip.
        frames: Latent frames of the clip.
        chunk: Frames of a chunk.
        settings: How far the reference reads, and how many.
        given: Frames that are not made: no chunk of theirs is one.

    Raises:
        ValueError: The clip is too short.
    """
    first, count = max(-(-settings.reach // chunk), -(-given // chunk)), -(-frames // chunk)
    if count - first < settings.chunks:
        behind = f", {given} of them given," if given else ""
        raise ValueError(
            f"A clip of {frames} latent frames{behind} has "
            f"{several(max(0, count - first), 'chunk')} with {settings.reach} frames of history "
            f"before them, and {settings.chunks} are to be measured. Give clips of "
            f"{(first + settings.chunks) * chunk} frames or more (--frames), fewer chunks, or a "
            "smaller reach."
        )
    found = []
    for part in range(settings.chunks):
        low, high = (first + (count - first) * edge // settings.chunks for edge in (part, part + 1))
        found.append(low + stable_seed(settings.seed, f"{key} site {part}") % (high - low))
    return tuple(found)


@dataclass
class SiteRecorder:
    """Measures heads at the sites of one clip: ``rollout(..., before=SiteRecorder(...))``.

    Args:
        key: Of the clip.
        settings: What to measure.
        chunks: From :func:`sites_of`.
        steps: Denoising steps of the sampler.
        validates: Losses are measured exactly too.
        memories: What those scorers hold that are memories, by name.

    Attributes:
        records: By chunk and step, float64 on the CPU: ``norm`` (squared, of the estimate),
            ``mass/SCORER`` and ``output/SCORER`` ``[L, H, N]``, ``gn/SCORER`` ``[K, L, H, N]``
            (products with probes: a loss is their mean square over ``norm``), ``lag/mass``
            ``[L, H, reach]`` (softmax mass on history, the newest frame first), ``query/mean``
            and ``query/square`` ``[L, H, D]`` and ``query/length`` ``[L, H, D / 2]`` (of queries
            before rotation and of their complex pairs), in clips that validate
            ``exact/SCORER`` ``[L, H, budgets]``, ``zero`` ``[L, H]`` and ``floor``.
    """

    key: str
    settings: SiteSettings
    chunks: Sequence[int]
    steps: int
    validates: bool = False
    memories: Mapping[str, Held] = field(default_factory=dict)
    records: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)

    def __call__(self, call: Call) -> None:
        """Measure, if this pass is a site."""
        step, asked = call.step, {own % self.steps for own in self.settings.steps}
        here = step.chunk in self.chunks and step.step in asked
        if here and step.phase == "denoise" and step.namespace == CONDITIONAL:
            self.records[step.chunk, step.step] = self.measured(call)

    def measured(self, call: Call) -> dict[str, Tensor]:
        """The record of one pass.

        Raises:
            ValueError: The reference does not hold what it should, or a gradient is not a number.
        """
        settings, step = self.settings, call.step
        looked = look(call, self._probes(call))
        check_history(looked.views[0].frames, settings, step.chunk)
        found = {"norm": looked.norm.cpu(), "lag/mass": mass_by_lag(looked, settings.reach)}
        found |= query_moments(looked)
        rows, floors = self._rows(step, looked), []
        for name in settings.scorers:
            kept = self._kept(name, looked)
            found[f"mass/{name}"], found[f"output/{name}"] = masses_and_errors(looked, kept, rows)
            if settings.probes:
                found[f"gn/{name}"] = probe_products(looked, kept)
            if self.validates and settings.exact:
                places = [own - settings.sink for own in settings.exact]
                some = [own[places] for own in kept]
                losses, floor = exact_losses(looked, some, batch=settings.batch)
                found[f"exact/{name}"] = losses.unflatten(0, (len(looked.views), -1))
                floors.append(floor)
        if self.validates:
            losses, floor = exact_losses(looked, None, batch=settings.batch)
            found["zero"] = losses.view(len(looked.views), -1)
            found["floor"] = torch.tensor(max([*floors, floor]), dtype=torch.float64)
        found = {name: value.cpu().double() for name, value in found.items()}
        if wrong := [name for name, value in found.items() if not bool(value.isfinite().all())]:
            raise ValueError(
                f"{', '.join(wrong)} of clip {self.key!r} (chunk {step.chunk}, step {step.step}) "
                "are not finite. The model gives no usable numbers or gradients here: try "
                "--precision reference, and look at the clip."
            )
        return found

    def _kept(self, name: str, looked: Looked) -> list[Tensor]:
        """Frames that heads keep at each budget of the grid, ``[N, H, F]`` of each layer.

        Raises:
            ValueError: A memory holds frames that the reference has dropped.
        """
        settings, chunk = self.settings, looked.call.step.chunk
        if name not in self.memories:
            return looked.kept(scorer_of(name), settings.budgets, settings.sink)
        held, frames = self.memories[name][chunk], list(looked.views[0].frames)
        for layer, own in enumerate(held):
            if int(own.sum()) != int(own[..., frames].sum()):
                raise ValueError(
                    f"The memory of {name!r} holds frames before chunk {chunk} (layer {layer}) "
                    "that the reference has dropped. Give a reference that drops none, such as "
                    "full."
                )
        return [own[..., frames] for own in held]

    def _probes(self, call: Call) -> list[Tensor]:
        """Independent signs, told by the site alone."""
        return [
            torch.randint(0, 2, call.x.shape, generator=self._rng(call.step, f"probe {k}")) * 2.0
            - 1
            for k in range(self.settings.probes)
        ]

    def _rows(self, step: Pass, looked: Looked) -> Tensor:
        count = looked.views[0].query.shape[1]
        order = torch.randperm(count, generator=self._rng(step, "rows"))
        return order[: self.settings.rows].sort().values.to(looked.x0.device)

    def _rng(self, step: Pass, what: str) -> torch.Generator:
        text = f"{self.key} {step.chunk} {step.step} {what}"
        return torch.Generator().manual_seed(stable_seed(self.settings.seed, text))


def check_history(frames: Sequence[int], settings: SiteSettings, chunk: int) -> None:
    """Refuse a reference that does not hold what curves start from and end at.

    Raises:
        ValueError: It holds fewer frames than are within reach, or not the sink.
    """
    if len(frames) < settings.reach:
        raise ValueError(
            f"The reference holds {len(frames)} frames of history in chunk {chunk}, and curves are "
            f"to reach {settings.reach}. Give the reference a budget of {settings.reach}f or more, "
            "or a smaller reach."
        )
    if gone := sorted(set(range(settings.sink)) - set(frames)):
        raise ValueError(
            f"Every head is to keep the first {settings.sink} frames, and in chunk {chunk} the "
            f"reference has dropped frame {gone[0]}. Give a reference that keeps them, such as "
            "{retain: {part: window, sink: "
            f"{settings.sink}, budget: {settings.reach}f}}}}, or a sink of 0."
        )


def mass_by_lag(looked: Looked, reach: int) -> Tensor:
    """Softmax mass on held frames, the newest first, ``[L, H, reach]``."""
    frames = looked.views[0].frames
    newest = sorted(range(len(frames)), key=lambda place: -frames[place])[:reach]
    return torch.stack(looked.masses)[..., newest]


def query_moments(looked: Looked) -> dict[str, Tensor]:
    """Means of queries before rotation and of their squares ``[L, H, D]``, and of the lengths of
    their complex pairs ``[L, H, D / 2]``, float64.
    """
    found: dict[str, list[Tensor]] = {"query/mean": [], "query/square": [], "query/length": []}
    for view in looked.views:  # a layer at a time: in float64 all of them are large
        own = view.raw_query.double()  # [H, T, D]
        each = own, own.square(), pair_lengths(own)
        for line, values in zip(found.values(), each, strict=True):
            line.append(values.mean(1))
    return {name: torch.stack(line) for name, line in found.items()}


def losses(record: dict[str, Tensor], metric: str, scorer: str) -> Tensor:
    """The losses of a record, ``[L, H, N]``.

    Args:
        record: Of one pass.
        metric: ``mass``, ``output``, ``gn`` or ``exact``.
        scorer: Name.
    """
    found: Any = record[f"{metric}/{scorer}"]
    return found.square().mean(0) / record["norm"] if metric == "gn" else found
