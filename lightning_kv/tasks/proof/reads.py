"""From the records of chunks that read less to a verdict on budgets by head, for each mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_kv.calibration.clips import ClipRecord
from lightning_kv.report.proof_page import Section, ranged
from lightning_kv.stats.additivity import Additivity, additivity
from lightning_kv.stats.bootstrap import bca_interval
from lightning_kv.stats.comparison import Comparison, Losses, compare
from lightning_kv.stats.proof import FAMILY, Proof, change, prove
from lightning_kv.tasks.calibration.records import CalibrationDirectory, Wanted
from lightning_kv.tasks.proof.design import JUDGED, NEARLY_UNIFORM, UNIFORM, Design
from lightning_kv.utilities.formatting import number, percent, several

NOTHING = 0.02
"""By how much a loss may differ from that of uniform budgets and count as the same."""
SQUARES = ("gn", "exact")
"""Metrics of curves that are squared errors of the clean estimate, as chunks have them."""

ByCondition = dict[str, dict[str, list[float]]]
"""Losses by condition and prompt, one per sample and chunk."""


@dataclass(frozen=True)
class Row:
    """One condition at one mean.

    Args:
        rule: Of its budgets.
        loss: Geometric mean over prompts of the relative error of a chunk's latents.
        low: Lower end of its 95 % interval; None for one prompt.
        high: Upper end.
        against: The comparison with uniform budgets, its p value not adjusted; None of uniform.
        predicted: Loss over that of uniform budgets, by the curves alone; None where they say
            nothing.
    """

    rule: str
    loss: float
    low: float | None
    high: float | None
    against: Comparison | None
    predicted: float | None


@dataclass(frozen=True)
class MeanProof:
    """What was found at one mean.

    Args:
        mean: History frames per head.
        rows: Of the table.
        proof: Tests and verdict.
        predicted: Loss of optimal budgets over that of uniform ones, by the curves alone.
        found: The same as it was measured.
    """

    mean: int
    rows: tuple[Row, ...]
    proof: Proof
    predicted: float | None
    found: float

    @property
    def words(self) -> tuple[str, ...]:
        """The verdict and what it rests on, a sentence each."""
        near = [row.against for row in self.rows if row.rule == NEARLY_UNIFORM]
        said = [*self.proof.words, *map(nearly_uniform, near)]
        if self.predicted is not None:
            said.append(
                f"Curves alone, on the prompts they were solved on, predicted a change of "
                f"{change(self.predicted)}; found was {change(self.found)}."
            )
        return tuple(said)


@dataclass(frozen=True)
class ReadsProof:
    """What budgets by head are worth where frames are read.

    Args:
        select: Part that chose what is read.
        reading: Which curves, in words.
        reach: History frames that the reference reads.
        prompts: Keys of the held-out prompts.
        chunks: Number of chunks that were made again, in all clips.
        means: What was found at each mean.
        additivity: True losses against sums of curves; None where that cannot be said.
        tables: Conditions that it looks at, in its order.
        absent: Rules that were not measured, and why.
        note: What differs from the measurement of the curves; nothing where nothing does.
    """

    select: str
    reading: str
    reach: int
    prompts: tuple[str, ...]
    chunks: int
    means: tuple[MeanProof, ...]
    additivity: Additivity | None
    tables: tuple[str, ...]
    absent: Mapping[str, str]
    note: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """What holds for all means."""
        said = [
            f"{several(len(self.prompts), 'held-out prompt')}, {several(self.chunks, 'chunk')} "
            f"made again under each condition, read by {self.select}; history as the reference "
            f"made it. Curves: {self.reading}."
        ]
        if self.additivity is None:
            said.append("Whether losses of heads add up cannot be said from these tables.")
        else:
            worst = self.additivity.worst
            where = "" if worst is None else f" (The worst is {self.tables[worst]}.)"
            said.append(self.additivity.words + where)
        if len(self.means) > 1:
            said.append(
                f"{len(self.means)} verdicts, one for each mean; p values are adjusted within a "
                "verdict, not for their number."
            )
        said += [self.note] * bool(self.note)
        return (*said, *(f"Not measured: {rule}, {why}" for rule, why in self.absent.items()))


def conclude(run: CalibrationDirectory, wanted: Mapping[str, Wanted], design: Design) -> ReadsProof:
    """Read all records that are asked for, and say what they prove.

    Args:
        run: The records.
        wanted: Clips by key.
        design: What was compared.

    Raises:
        ValueError: A record is damaged, or no clip has one.
    """
    return proved(run.measured(wanted), design)


def proved(clips: Sequence[ClipRecord], design: Design) -> ReadsProof:
    """What clips prove.

    Args:
        clips: Their records; in any order.
        design: What was compared.
    """
    losses = losses_of(clips)
    means = tuple(at_mean(losses, mean, design) for mean in design.means)
    sums, tables = adding_up(losses, design)
    return ReadsProof(
        design.select.name,
        design.source.reading().words,
        design.source.curves.reach,
        tuple(sorted({clip.unit for clip in clips})),
        sum(len(clip.sites) for clip in clips),
        means,
        sums,
        tables,
        design.absent,
        design.note,
    )


def losses_of(clips: Iterable[ClipRecord]) -> ByCondition:
    """Relative errors, by samples and chunks in the order of their keys and places."""
    found: ByCondition = {}
    for clip in sorted(clips, key=lambda clip: clip.key):
        for _, site in sorted(clip.sites.items()):
            for name, loss in site.items():
                found.setdefault(name, {}).setdefault(clip.unit, []).append(float(loss))
    return found


def at_mean(losses: ByCondition, mean: int, design: Design) -> MeanProof:
    """Tests, verdict and table of one mean."""
    own: dict[str, Losses] = {rule: losses[f"{rule}@{mean}f"] for rule in design.rules}
    others = [r for r in own if r not in (*FAMILY, JUDGED, *design.shuffled)]
    proof = prove(own, JUDGED, FAMILY, design.shuffled, others)
    flat, rows = design.predicted(UNIFORM, mean), []
    for rule, values in own.items():
        by_prompt = [float(np.log(seeds).mean()) for _, seeds in sorted(values.items())]
        ends = bca_interval(by_prompt)
        predicted = design.predicted(rule, mean) if design.source.metric in SQUARES else None
        rows.append(
            Row(
                rule,
                math.exp(math.fsum(by_prompt) / len(by_prompt)),
                *((None, None) if ends is None else map(math.exp, ends)),
                None if rule == UNIFORM else compare(own, rule, UNIFORM),
                None if not predicted or not flat else math.sqrt(predicted / flat),
            )
        )
    best = next(row for row in rows if row.rule == JUDGED)
    return MeanProof(mean, tuple(rows), proof, best.predicted, best.against.ratio)


def adding_up(losses: ByCondition, design: Design) -> tuple[Additivity | None, tuple[str, ...]]:
    """True losses of whole tables against sums of curves, both as squared errors."""
    if design.source.metric not in SQUARES:
        return None, ()
    names, true, predicted, means = [], [], [], []
    for mean in design.means:
        for rule in design.rules:
            name, sums = f"{rule}@{mean}f", design.predicted(rule, mean)
            if not sums or sums <= 0:
                continue
            squares = [float(np.square(seeds).mean()) for seeds in losses[name].values()]
            names.append(name)
            true.append(math.fsum(squares) / len(squares))
            predicted.append(sums)
            means.append(mean)
    if len(names) < 3:
        return None, tuple(names)
    return additivity(true, predicted, means), tuple(names)


def nearly_uniform(other: Comparison) -> str:
    """What it changes to be as uneven as a published table that is nearly uniform."""
    if other.low is None or other.high is None:
        verdict = "is not known with so few prompts"
    elif max(abs(own - 1) for own in (other.low, other.high)) < NOTHING:
        verdict = "came true"
    elif other.low > 1 + NOTHING or other.high < 1 - NOTHING:
        verdict = "did not come true"
    else:
        verdict = "is neither shown nor excluded"
    return (
        f"Budgets as uneven as Focused Forcing's published ones ({NEARLY_UNIFORM}) change the loss "
        f"of uniform ones by {ranged(other.ratio, other.low, other.high, change)}. Expected "
        f"beforehand was less than {percent(NOTHING, 0)} either way: that {verdict}."
    )


HEADS = ("budgets", "relative error", "against uniform", "p", "predicted")


def sections(found: ReadsProof) -> list[Section]:
    """Of the page and the terminal."""
    return [
        Section(
            f"{own.mean} of {found.reach} history frames",
            own.words,
            HEADS,
            tuple(map(cells, own.rows)),
        )
        for own in found.means
    ]


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table, as text."""
    other, found = row.against, (row.rule, ranged(row.loss, row.low, row.high))
    if other is None:
        return (*found, "", "", "")
    predicted = "" if row.predicted is None else change(row.predicted)
    gain = ranged(other.ratio, other.low, other.high, change)
    return (*found, gain, number(other.p), predicted)
