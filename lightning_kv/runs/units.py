"""What statistics count: the unit, a prompt. Several samples of it are one value, their mean.

A record's ``unit`` says which clips belong together; without it every key is its own. Whatever is
averaged, tested or drawn goes through here, so that samples of one prompt, which are alike, are
never taken for independent ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from lightning_kv.runs.directory import Record
from lightning_kv.utilities.formatting import several

Clips = dict[str, Record]
"""A policy's records by key."""

Value = Callable[[Record], "float | None"]
"""Reads a number off a record; None where it has none."""


def unit_of(record: Record) -> str:
    """What a record counts for.

    >>> unit_of({"key": "cat#1", "unit": "cat"}), unit_of({"key": "dog"})
    ('cat', 'dog')
    """
    return record.get("unit") or record["key"]


def grouped(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by unit, in the order in which units come."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(unit_of(record), []).append(record)
    return found


def metric_of(metric: str) -> Value:
    """Reads the value of a metric off a record."""
    return lambda record: record["metrics"].get(metric)


def unit_means(records: Iterable[Record], value: Value) -> dict[str, float]:
    """One value per unit, the mean of its clips; units without a value are left out."""
    found = {unit: _there(map(value, own)) for unit, own in grouped(records).items()}
    return {unit: mean_of(values) for unit, values in found.items() if values}


def clips_with(records: Iterable[Record], value: Value) -> int:
    """Number of clips that have a value."""
    return len(_there(map(value, records)))


@dataclass(frozen=True)
class Paired:
    """Two policies on the units that both have a value for, in the order of their names.

    Args:
        values: Of the policy, one per unit.
        others: Of what it is compared with.
        clips: Number of clips that the values of the policy are means of.
    """

    values: tuple[float, ...]
    others: tuple[float, ...]
    clips: int

    @property
    def differences(self) -> list[float]:
        """Of the policy less the other, one per unit."""
        return [a - b for a, b in zip(self.values, self.others, strict=True)]


def paired_units(own: Clips, base: Clips, value: Value, other: Value | None = None) -> Paired:
    """Values of two policies, unit by unit.

    Within a unit the samples that both have are compared, as they share their noise; where both
    have values but share no sample, the means of all.

    Args:
        own: Records of the policy.
        base: Records of what it is compared with.
        value: What is compared.
        other: The same for ``base``, where that is another number.
    """
    able = {key: record for key, record in own.items() if value(record) is not None}
    other = other or value
    rivals = {key: record for key, record in base.items() if other(record) is not None}
    shared = {unit_of(able[key]) for key in able.keys() & rivals.keys()}

    def judged(clips: Clips, partners: Clips) -> list[Record]:
        return [
            record
            for key, record in clips.items()
            if key in partners or unit_of(record) not in shared
        ]

    mine, theirs = judged(able, rivals), judged(rivals, able)
    values, others = unit_means(mine, value), unit_means(theirs, other)
    both = sorted(values.keys() & others.keys())
    return Paired(
        tuple(values[unit] for unit in both),
        tuple(others[unit] for unit in both),
        sum(unit_of(record) in others for record in mine),
    )


def unit_curves(records: Iterable[Record], metric: str) -> list[list[float | None]]:
    """A metric over time, one curve per unit: frame by frame the mean of the clips that have it."""
    return [
        [mean_of(values) if (values := _there(frame)) else None for frame in zip_longest(*curves)]
        for own in grouped(records).values()
        if (curves := [c for record in own if (c := record["curves"].get(metric))])
    ]


def finished_units(
    records: Iterable[Record], policies: Collection[str], run: Mapping[str, Any]
) -> int:
    """Number of prompts of which every sample is there under every policy.

    Args:
        records: Records of the run.
        policies: All that it compares.
        run: What a summary holds about it: ``prompts``, and ``samples`` of each (1 where absent).
            In a run ``unpaired``, no clip is of all policies, and each counts.
    """
    done: dict[str, set[str]] = {}
    units: dict[str, set[str]] = {}
    for record in records:
        done.setdefault(record["key"], set()).add(record["policy"])
        units.setdefault(unit_of(record), set()).add(record["key"])
    whole = {key for key, own in done.items() if run.get("unpaired") or own >= set(policies)}
    samples = run.get("samples") or 1
    if len(whole) >= run["prompts"] * samples:
        return run["prompts"]
    return sum(keys <= whole and len(keys) >= samples for keys in units.values())


def mean_of(values: Sequence[float]) -> float | None:
    """Mean of some values; None without any."""
    return math.fsum(values) / len(values) if values else None


def _there(values: Iterable[float | None]) -> list[float]:
    """The values that are there."""
    return [value for value in values if value is not None]


def counted(prompts: int, clips: int | None = None) -> str:
    """A number of prompts, and of the clips that they are means of where that is another.

    >>> counted(1), counted(3, 3), counted(1, 6)
    ('1 prompt', '3 prompts', '1 prompt (6 samples)')
    """
    samples = "" if clips is None or clips == prompts else f" ({clips} samples)"
    return several(prompts, "prompt") + samples


def planned(run: dict[str, Any]) -> str:
    """How many prompts a run is about, and samples of them.

    >>> planned({"prompts": 8}), planned({"prompts": 1, "samples": 6})
    ('8 prompts', '1 prompt (6 samples)')
    """
    return counted(run["prompts"], run["prompts"] * (run.get("samples") or 1))


def sets_words(found: dict[str, Any]) -> str:
    """The two sets of a distance: what each is made of, as far as a summary says.

    >>> sides = {"n": 3, "clips": 6, "windows": 12, "against": "the real set", "windows_real": 8}
    >>> sets_words(sides | {"n_real": 4, "clips_real": 4})
    '12 windows of 3 prompts (6 samples) against the real set (8 windows of 4 clips)'
    """
    if "windows_real" in found:
        clips, prompts = found["clips_real"], found["n_real"]
        other = f"{several(found['windows_real'], 'window')} of {several(clips, 'clip')}"
        other += "" if clips == prompts else f" of {counted(prompts)}"
    else:  # of a version that called the number of windows so
        other = several(found["n_real"], "window")
    own = f"{several(found['windows'], 'window')} of {counted(found['n'], found.get('clips'))}"
    return f"{own} against {found['against']} ({other})"
