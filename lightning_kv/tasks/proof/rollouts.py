"""From the records of whole rollouts to the same verdict, for each policy, mean and metric.

A run is made by ``evaluate`` with policies that are called ``NAME-RULE@MEAN``, such as
``snap-kv-optimal@6f``.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_kv.report.proof_page import Section, ranged
from lightning_kv.runs.directory import Record, RunDirectory
from lightning_kv.runs.margins import MARGINS
from lightning_kv.runs.units import unit_of
from lightning_kv.stats.bootstrap import bca_interval
from lightning_kv.stats.comparison import Comparison, compare
from lightning_kv.stats.proof import (
    Proof,
    Quality,
    change,
    keeps_quality,
    prove,
    quality_words,
)
from lightning_kv.stats.score_proof import (
    Difference,
    ScoreProof,
    as_losses,
    difference,
    prove_score,
    signed,
)
from lightning_kv.tasks.proof.design import BY_ZERO, JUDGED, ONLINE, SHUFFLED, TABLES, UNIFORM
from lightning_kv.tasks.report import open_run
from lightning_kv.tasks.rollouts.policies import fitted_words
from lightning_kv.utilities.formatting import number, several
from lightning_kv.utilities.nearest import unknown

NAMES = re.compile(
    rf"(?P<name>.+?)-(?P<rule>{'|'.join([*TABLES, *BY_ZERO, *ONLINE])}|{SHUFFLED}\d+)@(?P<mean>\w+)"
)
USUAL = ("recall", "latent_relative", "revisit_error")
"""Metrics that are looked at where none is named, as far as a run has them."""

Values = dict[str, dict[str, list[float]]]
"""A metric by rule and prompt, one number per sample."""


@dataclass(frozen=True)
class GroupProof:
    """What one policy's budgets are worth at one mean, by one metric.

    Args:
        policy: Name without rule and mean.
        mean: As it stands in the names.
        metric: Its name.
        kind: ``ratio`` of losses, or ``difference`` of scores.
        values: Mean and 95 % interval over prompts by rule; no interval for one prompt.
        against: Each rule against uniform budgets, p not adjusted.
        proof: Tests and verdict.
        left_out: Clips that have no value under some rule.
        quality: Whether other metrics keep within their margin of uniform budgets.
    """

    policy: str
    mean: str
    metric: str
    kind: str
    values: Mapping[str, tuple[float, float | None, float | None]]
    against: Mapping[str, Comparison | Difference]
    proof: Proof | ScoreProof
    left_out: tuple[str, ...]
    quality: tuple[Quality, ...] = ()

    @property
    def title(self) -> str:
        """What is compared."""
        return f"{self.policy} at {self.mean}, {self.metric}"

    @property
    def words(self) -> tuple[str, ...]:
        """The verdict and what it rests on."""
        said = [*self.proof.words, *map(quality_words, self.quality)]
        if self.left_out:
            some = ", ".join(self.left_out[:3]) + (", ..." if len(self.left_out) > 3 else "")
            said.append(f"Without a value under some budgets, so left out: {some}.")
        return tuple(said)


def of_run(run: RunDirectory, metrics: Sequence[str] | None = None) -> tuple[GroupProof, ...]:
    """What a finished run proves.

    Args:
        run: Its directory.
        metrics: By which; the usual ones that it has where None.

    Raises:
        ValueError: It is no run, has no such policies or metrics, or too few prompts.
    """
    opened = open_run(run.path)
    about, records = opened.about(), opened.records()
    groups = grouped_by_policy(about["policies"])
    if not groups:
        raise ValueError(
            f"{run.path} compares no budgets by head: its policies are "
            f"{', '.join(about['policies'])}. Evaluate policies that are called NAME-RULE@MEAN, "
            f"such as snap-kv-{UNIFORM}@6f and snap-kv-{JUDGED}@6f: see "
            "configs/prove_budgets_memory.yaml."
        )
    facts = about["metrics"]
    warn_fitted_run(about["policies"], {unit_of(record) for record in records})
    chosen = chosen_metrics(facts, records, metrics)
    guards = {name: facts[name] for name in MARGINS if name in facts and name not in chosen}
    found = []
    for (policy, mean), rules in groups.items():
        quality = kept(records, rules, guards)
        for metric in chosen:
            own = judged(records, policy, mean, rules, metric, facts[metric])
            found.append(replace(own, quality=quality))
    return tuple(found)


def kept(
    records: Sequence[Record], rules: Mapping[str, str], guards: Mapping[str, Any]
) -> tuple[Quality, ...]:
    """Whether metrics keep within their margin of uniform budgets; those that have values.

    Args:
        records: Of the run.
        rules: Name of the policy by rule.
        guards: What the run says of each of them.
    """
    both = {rule: rules[rule] for rule in (JUDGED, UNIFORM)}
    found = []
    for metric, fact in guards.items():
        values, _ = values_of(records, both, metric)
        if len(values[JUDGED]) > 1:
            higher = bool(fact["higher_is_better"])
            found.append(keeps_quality(values, metric, JUDGED, UNIFORM, MARGINS[metric], higher))
    return tuple(found)


def grouped_by_policy(names: Iterable[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Policies that differ in their budgets alone: names by rule, by policy and mean.

    >>> grouped_by_policy(["full", "h2o-uniform@6f", "h2o-optimal@6f", "h2o-pyramid@9f"])
    {('h2o', '6f'): {'uniform': 'h2o-uniform@6f', 'optimal': 'h2o-optimal@6f'}}
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name in names:
        if one := NAMES.fullmatch(name):
            found.setdefault((one["name"], one["mean"]), {})[one["rule"]] = name
    return {key: own for key, own in found.items() if {UNIFORM, JUDGED} <= own.keys()}


def chosen_metrics(
    facts: Mapping[str, Any], records: Sequence[Record], asked: Sequence[str] | None
) -> list[str]:
    """Metrics to judge by.

    Raises:
        ValueError: The run has no such metric, neither way of it is better, or none is usual.
    """
    there = {name for record in records for name, x in record["metrics"].items() if x is not None}
    able = [name for name in facts if name in there and facts[name]["higher_is_better"] is not None]
    for name in asked or ():
        if name not in able:
            raise ValueError(unknown("metric by which this run can be judged", name, able))
    found = list(asked or [name for name in USUAL if name in able])
    if not found:
        raise ValueError(
            f"None of {', '.join(USUAL)} was measured in this run, and --metric names none. Name "
            f"one of {', '.join(able) or 'its metrics (it has none)'}."
        )
    return found


def values_of(
    records: Iterable[Record], rules: Mapping[str, str], metric: str
) -> tuple[Values, tuple[str, ...]]:
    """A metric by rule and prompt, of the clips that have it under every rule, and the others.

    Args:
        records: Of the run.
        rules: Name of the policy by rule.
        metric: Its name.
    """
    by_name = {name: rule for rule, name in rules.items()}
    found: dict[tuple[str, str], dict[str, float]] = {}
    keys: set[tuple[str, str]] = set()
    for record in records:
        if rule := by_name.get(record["policy"]):
            place = (unit_of(record), record["key"])
            keys.add(place)
            if (value := record["metrics"].get(metric)) is not None:
                found.setdefault(place, {})[rule] = value
    whole = sorted(place for place, own in found.items() if own.keys() == rules.keys())
    values: Values = {rule: {} for rule in rules}
    for place in whole:
        for rule in rules:
            values[rule].setdefault(place[0], []).append(found[place][rule])
    return values, tuple(sorted(key for _, key in keys - set(whole)))


def judged(
    records: Sequence[Record],
    policy: str,
    mean: str,
    rules: Mapping[str, str],
    metric: str,
    fact: Mapping[str, Any],
) -> GroupProof:
    """The verdict on one policy at one mean.

    Losses that are all above 0 are compared as ratios, of squares their roots; scores as
    differences.

    Raises:
        ValueError: Fewer than two prompts have a value under all rules.
    """
    values, left_out = values_of(records, rules, metric)
    if (count := len(values[JUDGED])) < 2:
        raise ValueError(
            f"Too few prompts: {count} of {policy} at {mean} have a value of {metric} under all "
            "its budgets. Let the evaluation finish, on 8 prompts or more."
        )
    shuffles = [rule for rule in rules if rule.startswith(SHUFFLED)]
    every = [x for side in values.values() for own in side.values() for x in own]
    others = [rule for rule in rules if rule != UNIFORM]
    if not fact["higher_is_better"] and min(every) > 0:
        if str(fact["unit"]).endswith("^2"):
            values = {r: {p: [*map(math.sqrt, x)] for p, x in v.items()} for r, v in values.items()}
        proof, kind = prove(values, JUDGED, shuffles=shuffles, expects=False), "ratio"
        against = {rule: compare(values, rule, UNIFORM) for rule in others}
    else:
        higher, kind = bool(fact["higher_is_better"]), "difference"
        proof = prove_score(values, higher, shuffles=shuffles, margin=MARGINS.get(metric))
        losses = as_losses(values, higher)
        against = {rule: difference(losses, rule, UNIFORM) for rule in others}
    shown = {rule: middle(side) for rule, side in values.items()}
    return GroupProof(policy, mean, metric, kind, shown, against, proof, left_out)


def middle(side: Mapping[str, Sequence[float]]) -> tuple[float, float | None, float | None]:
    """Mean over prompts, and its 95 % interval."""
    means = [math.fsum(own) / len(own) for _, own in sorted(side.items())]
    ends = bca_interval(means) or (None, None)
    return math.fsum(means) / len(means), *ends


def warn_fitted_run(policies: Mapping[str, Any], prompts: set[str]) -> None:
    """Say which prompts of a run its budgets were fitted on.

    Args:
        policies: What the run says of each.
        prompts: Keys of its prompts.
    """
    found: dict[str, tuple[list[str], list[str]]] = {}
    for name, parts in policies.items():
        for own in parts.values():
            budget = own.get("budget") if isinstance(own, dict) else None
            heads = budget.get("heads") if isinstance(budget, dict) else None
            heads = heads if isinstance(heads, dict) else {}
            if both := [key for key in heads.get("prompts") or () if key in prompts]:
                found.setdefault(heads.get("file"), (both, []))[1].append(name)
    for file, own in found.items():
        warnings.warn(fitted_words(file, *own), stacklevel=2)


HEADS = ("budgets", "mean", "against uniform", "p")


def cells(found: GroupProof) -> list[tuple[str, ...]]:
    """Rows of the table, as text."""
    rows = []
    for rule, (value, low, high) in found.values.items():
        other, gain, p = found.against.get(rule), "", ""
        if other is not None:
            ratio = isinstance(other, Comparison)
            mean, shown = (other.ratio, change) if ratio else (other.gain, signed)
            gain, p = ranged(mean, other.low, other.high, shown), number(other.p)
        rows.append((rule, ranged(value, low, high), gain, p))
    return rows


def sections(found: Sequence[GroupProof]) -> list[Section]:
    """Of the page and the terminal."""
    return [Section(own.title, own.words, HEADS, tuple(cells(own))) for own in found]


def extent(found: Sequence[GroupProof]) -> tuple[str, ...]:
    """How much there is, in sentences."""
    prompts = max(own.proof.comparisons[0].prompts for own in found)
    return (
        f"{several(prompts, 'held-out prompt')}, whole rollouts. Losses are compared as ratios (of "
        "squares, their roots), scores as differences in which more is better.",
    )
