"""Distances between sets of clips, from the features that a run keeps on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor

from lightning_kv.metrics.functional.frechet import measurable
from lightning_kv.metrics.functional.frechet_difference import delta_frechet
from lightning_kv.metrics.set_base import SetMetric
from lightning_kv.metrics.suite import set_metric
from lightning_kv.runs.directory import RunDirectory
from lightning_kv.runs.features import FeatureStore, part_of_path
from lightning_kv.runs.units import unit_of

Rows = tuple[Tensor, list[str]]
"""Features ``[n, d]``, and the clip of each row."""


def distances(
    run: RunDirectory,
    metrics: Mapping[str, Mapping[str, Any]],
    policies: Collection[str],
    reference: str,
) -> dict[str, dict[str, dict[str, Any]]]:
    """What the metrics of sets say about every policy.

    The clips of a policy are compared with the real set; where there is none, with the clips of
    the reference, which itself has no value then.

    Args:
        run: Where features are.
        metrics: What is known about each metric of sets, see ``Suite.facts``.
        policies: Their names.
        reference: The policy that others are compared with.

    Returns:
        Policy, then metric, then ``mean``, ``null``, ``se``, how many prompts ``n``,
        ``clips`` and ``windows`` there are, the same of the other set, ``n_real``, ``clips_real``
        and ``windows_real``, and ``against``, ``status`` and ``paired``.
    """
    store = FeatureStore(run.features)
    units = {part_of_path(record["key"]): unit_of(record) for record in run.records()}
    found: dict[str, dict[str, dict[str, Any]]] = {policy: {} for policy in policies}
    for name, facts in metrics.items():
        if facts.get("encoder") is None:  # unavailable, which the summary says
            continue
        sets = {policy: _rows(store, policy, facts["encoder"]) for policy in policies}
        real = _rows(store, None, facts["encoder"])
        given = bool(len(real[0]))
        against = "the real set" if given else f"the clips of {reference}"
        for policy, own in sets.items():
            if not given and policy == reference:
                continue
            base = sets[reference] if given and policy != reference else None
            others = real if given else sets[reference]
            one = distance(name, facts, own, others, base, units)
            found[policy][name] = one | {"against": against}
    return found


def _rows(store: FeatureStore, name: str | None, encoder: str) -> Rows:
    rows, keys = store.rows(name, encoder)
    return torch.from_numpy(rows), keys


def distance(
    name: str,
    facts: Mapping[str, Any],
    own: Rows,
    real: Rows,
    base: Rows | None,
    units: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """One metric of one policy.

    Args:
        name: Of the metric.
        facts: What is known about it.
        own: Clips of the policy.
        real: What they are compared with.
        base: Clips of the reference, prompt by prompt; None where there is nothing to compare.
        units: What the clips count for, by key; one that is not named counts for itself.
    """
    units = units or {}
    counts = {
        f"{what}{side}": count
        for side, rows in (("", own), ("_real", real))
        for what, count in counted(rows, units).items()
    }
    empty = {"mean": None, "null": None, "se": None, **counts}
    try:
        metric = metric_of(
            name,
            facts["recipe"],
            num_features=own[0].shape[1],
            features_name=facts["encoder"],
            frames=facts["frames"],
            sync_on_compute=False,  # one process concludes, from the features of all
        )
        for side, rows in ((False, own), (True, real)):
            clips = by_clip(rows)
            whole = [units.get(key, key) for key in clips]
            metric.update_features([*clips.values()], side, ids=[*clips], units=whole)
        result = asdict(metric.report())
    except ValueError as error:
        return empty | {"status": f"no value: {error}", "paired": None}
    return {
        "mean": result["value"],
        "null": result["null"],
        "se": result["standard_error"],
        **counts,
        "status": result["status"],
        "paired": versus(own, base, real[0], units) if base and metric.tests_difference else None,
    }


def counted(rows: Rows, units: Mapping[str, str]) -> dict[str, int]:
    """What a set is made of: what counts, its clips, and their windows."""
    clips = set(rows[1])
    return {
        "n": len({units.get(key, key) for key in clips}),
        "clips": len(clips),
        "windows": len(rows[0]),
    }


def metric_of(name: str, recipe: str, **given: Any) -> SetMetric:
    """The metric of a run: ours, or one of its name that was given to this process as an object.

    Raises:
        ValueError: None has the run's recipe, beside how features were made, which are on disk.
    """
    for own in (True, False):
        metric = set_metric(name, own=own, **given)
        before, _, after = metric.recipe.partition(metric.features)
        if recipe.startswith(before) and recipe.endswith(after):
            return metric
    raise ValueError(
        f"the run measured '{recipe}', and this process knows '{name}' as '{metric.recipe}'. "
        "Conclude where the metric was made"
    )


def by_clip(rows: Rows) -> dict[str, Tensor]:
    """Features of the windows of every clip, ``[windows, d]``."""
    places: dict[str, list[int]] = {}
    for place, key in enumerate(rows[1]):
        places.setdefault(key, []).append(place)
    return {key: rows[0][own] for key, own in places.items()}


def versus(
    own: Rows, base: Rows, real: Tensor, units: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """How much further from the real set than the reference, over the prompts that both have.

    The interval is Student's with one degree of freedom less than prompts, from the jackknife; p is
    that of the sign-flip test. These are two approximations and may differ near the threshold, and
    most where prompts are few: below 6 there is no interval. Clips are paired by key; what is
    swapped and left out together is a prompt, with all of its samples.

    Returns:
        As :func:`lightning_kv.runs.analysis.difference`; None for fewer than two prompts that have
        as many windows in both, or where the reference has no distance.
    """
    first, second = Counter(own[1]), Counter(base[1])
    common = {key for key in first if first[key] == second[key]}
    whole = {key: (units or {}).get(key, key) for key in common}
    order = {unit: place for place, unit in enumerate(sorted(set(whole.values())))}
    if len(order) < 2:
        return None
    mine, theirs = ([key in common for key in keys] for _, keys in (own, base))
    ids = torch.tensor([order[whole[key]] for key in own[1] if key in common])
    sides = own[0][mine], base[0][theirs]
    if not all(measurable(side, real.shape[1]) for side in sides):
        return None  # the status of the reference says why
    found = delta_frechet(*sides, real, ids)
    spread = None
    if found.prompts >= 6:
        arm = stdtrit(found.prompts - 1, 0.975).item() * found.standard_error
        spread = [found.value - arm, found.value + arm]
    return {
        "difference": found.value,
        "ci95": spread,
        "se": found.standard_error,
        "p": found.p_value,
        "p_holm": None,
        "d_z": None,
        "n": found.prompts,
        "clips": len(common),
    }
