"""Which policies a run compares: names, files and plain data, crossed with budgets."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from typing import Any

from lightning_kv.cache.passes import Geometry
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.budget.calibrated import Calibrated
from lightning_kv.policies.budgets import Amount
from lightning_kv.policies.curve_tables import CurveTable
from lightning_kv.policies.plugins import imported
from lightning_kv.policies.registry import load_policy
from lightning_kv.policies.scored import ScoredPart
from lightning_kv.policies.scorer.artifact import Scorer, ScorerFile
from lightning_kv.tasks.class_paths import divided
from lightning_kv.tasks.trainer import is_first
from lightning_kv.utilities import addresses
from lightning_kv.utilities.formatting import several
from lightning_kv.utilities.lists import items_of

NAMED = 6  # prompts that a warning names
OTHERS = "Evaluate on others: another set, or another --data.seed."

Spec = str | dict[str, Any] | CachePolicy


def chosen_policies(
    policies: Sequence[Spec],
    reference: Spec = "full",
    budgets: str | list[str | float] | None = None,
) -> tuple[dict[str, CachePolicy], CachePolicy]:
    """Policies by name, and the reference.

    Args:
        policies: Names, files, plain data, or policies.
        reference: The same of the reference.
        budgets: Crossed with every policy whose budget is not named.

    Raises:
        ValueError: They are no list, one is unknown, a budget cannot be crossed, or another policy
            is called like the reference.
    """
    if isinstance(policies, str | dict | CachePolicy):
        raise ValueError(f"Policies come in a list: {policies!r} was given. Write [{policies!r}].")
    if not policies:
        raise ValueError(
            "No policies to evaluate: [] was given. Try --policies [sliding-window@9f]."
        )
    loaded = [_policy(spec) for spec in policies]
    if budgets is not None:
        loaded = crossed(loaded, read_budgets(budgets))
    found, reference = by_name(loaded), _policy(reference)
    if found.get(reference.name, reference) != reference:
        raise ValueError(
            f"A policy is called {reference.name!r} like the reference, but is another one: "
            f"{found[reference.name]}. Give it its own name."
        )
    if reference.needs:
        raise ValueError(
            f"The reference {reference.name!r} needs {', '.join(reference.needs)} of a reference "
            "rollout, which it would have to be itself. Give --reference full."
        )
    if needs := needs_of(loaded):
        whole = all(getattr(reference, k).name == "everything" for k in ("retain", "select"))
        if not whole:
            raise ValueError(
                f"{', '.join(needs)} of the reference rollout is asked for, to bound what can be "
                f"won, and the reference {reference.name!r} itself drops frames or does not read "
                "them. Give --reference full."
            )
    return found, reference


def _policy(spec: Spec) -> CachePolicy:
    if isinstance(spec, CachePolicy):
        return spec
    if isinstance(spec, dict) and "class_path" in spec:
        spec = _of_class(spec)
    return load_policy(spec)


def _of_class(spec: dict[str, Any]) -> dict[str, Any]:
    """A part by ``class_path`` and ``init_args``, as plain data of a policy of that name."""
    path, init = divided(spec, "--policies")
    address = ":".join(addresses.divided(path))
    amount = f"@{init['budget']}" if isinstance(init.get("budget"), str | int | float) else ""
    part = {"part": address, **init}
    return {"name": address + amount, imported(address).kind: part}


def needs_of(policies: Iterable[CachePolicy]) -> dict[str, dict[str, Any]]:
    """Reference tables that policies ask for, by name, with their settings.

    Raises:
        ValueError: Two want one table with different settings.
    """
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for policy in policies:
        for name, how in policy.needs.items():
            owner, known = found.setdefault(name, (policy.name, how))
            if known != how:
                raise ValueError(
                    f"One reference rollout records {name!r} once: {owner!r} wants it with {known} "
                    f"and {policy.name!r} with {how}. Give both the same settings, or evaluate "
                    "them in two runs."
                )
    return {name: how for name, (_, how) in found.items()}


def check_inputs(policies: Iterable[CachePolicy], model: str, world: bool) -> None:
    """Refuse policies that need what a model's world does not bring.

    Raises:
        ValueError: Names the policy and the side input.
    """
    for policy in policies:
        absent = [name for name in policy.inputs if not (world and name == "pose")]
        if absent:
            raise ValueError(
                f"The policy {policy.name!r} needs the side input {', '.join(absent)} of every "
                f"frame, and {model!r} brings none. Use a model of the panorama, or a setting that "
                "does without, such as by: keys of world-kv."
            )


def curve_files(
    policies: Iterable[CachePolicy], geometry: Geometry
) -> list[tuple[CurveTable, list[str]]]:
    """Files of head curves, each with the names of the policies that use it.

    Args:
        policies: Of a run.
        geometry: Of the model.
    """
    found: dict[str, tuple[CurveTable, list[str]]] = {}
    for policy in policies:
        tables = [part.table(geometry) for part in policy.parts if isinstance(part, Calibrated)]
        for mark, table in {own.sha256: own for own in tables if own}.items():
            found.setdefault(mark, (table, []))[1].append(policy.name)
    return list(found.values())


def scorer_files(
    policies: Iterable[CachePolicy], geometry: Geometry
) -> list[tuple[str, Scorer, list[str]]]:
    """Files of learned scorers: name, what is in it, and the names of the policies that use it.

    Args:
        policies: Of a run.
        geometry: Of the model.
    """
    found: dict[str, tuple[str, Scorer, list[str]]] = {}
    for policy in policies:
        values = [getattr(part, own.name) for part in policy.parts for own in fields(part)]
        files = {own.sha256: own for own in values if isinstance(own, ScorerFile)}
        for mark, own in files.items():
            made = found.setdefault(mark, (own.file, own.scorer(geometry), []))
            made[2].append(policy.name)
    return list(found.values())


def warn_fitted(
    policies: Iterable[CachePolicy], geometry: Geometry, prompts: Collection[str]
) -> None:
    """Say which prompts of an evaluation head curves or scorers come from: they look too good.

    The first rank says it, once for each file.

    Args:
        policies: Of the run.
        geometry: Of the model.
        prompts: Keys of the prompts.
    """
    policies = tuple(policies)
    for table, names in curve_files(policies, geometry) if is_first() else ():
        if both := [key for key in table.prompts if key in prompts]:
            warnings.warn(fitted_words(table.file, both, names), stacklevel=2)
    for file, scorer, names in scorer_files(policies, geometry) if is_first() else ():
        if both := [key for key in scorer.prompts if key in prompts]:
            warnings.warn(taught_words(file, both, names), stacklevel=2)


def fitted_words(file: str | None, prompts: Sequence[str], policies: Sequence[str]) -> str:
    """What to say of prompts that a file of head curves was measured on.

    Args:
        file: Its name.
        prompts: Their keys.
        policies: Names of those that use it.
    """
    whose = repr(policies[0]) if len(policies) == 1 else f"{len(policies)} policies"
    return (
        f"Head curves ({file}) were fitted on {several(len(prompts), 'prompt')} of this "
        f"evaluation, where the budgets of {whose} look too good: {_named(prompts)}. {OTHERS}"
    )


def taught_words(file: str, prompts: Sequence[str], policies: Sequence[str]) -> str:
    """What to say of prompts that a scorer was taught on, or stopped by.

    Args:
        file: Its name.
        prompts: Their keys.
        policies: Names of those that use it.
    """
    looks = f"{policies[0]!r} looks" if len(policies) == 1 else f"{len(policies)} policies look"
    return (
        f"A scorer ({file}) was taught on {several(len(prompts), 'prompt')} of this evaluation, or "
        f"stopped by them, and there {looks} too good: {_named(prompts)}. {OTHERS}"
    )


def _named(prompts: Sequence[str]) -> str:
    return ", ".join(prompts[:NAMED]) + (" and others" if len(prompts) > NAMED else "")


def foreign_curves(
    policies: Iterable[CachePolicy], geometry: Geometry, weights: str, warn: bool = False
) -> list[str]:
    """What is to be said of head curves and scorers of other models, or of other weights of it.

    Once for each file.

    Args:
        policies: Of the run.
        geometry: Of the model.
        weights: What tells its weights from others.
        warn: The first rank also warns of other weights; of other models, policies do so.
    """
    policies, found = tuple(policies), []
    files: list[CurveTable | Scorer] = [table for table, _ in curve_files(policies, geometry)]
    files += [scorer for _, scorer, _ in scorer_files(policies, geometry)]
    for own in files:
        if said := own.foreign(geometry.model, weights):
            found.append(said)
            if warn and is_first() and not own.foreign(geometry.model):
                warnings.warn(said, stacklevel=2)
    return found


def by_name(policies: list[CachePolicy]) -> dict[str, CachePolicy]:
    """Policies by name.

    Raises:
        ValueError: Two of the same name.
    """
    found: dict[str, CachePolicy] = {}
    for policy in policies:
        if policy.name in found:
            names = [other.name for other in policies]
            raise ValueError(
                f"Two policies are called {policy.name!r}: {names}. "
                "The name is the key in results: give each its own."
            )
        found[policy.name] = policy
    return found


def read_budgets(given: str | list[str | float]) -> list[str]:
    """Amounts from ``6f,9f,15f`` or a list.

    >>> read_budgets("6f, 9f"), read_budgets([0.25])
    (['6f', '9f'], ['0.25'])

    Raises:
        ValueError: None, one that is no amount, or two that are the same.
    """
    amounts = [str(each).strip() for each in (items_of(given) if isinstance(given, str) else given)]
    if not any(amounts):
        raise ValueError(
            f"No budgets to cross the policies with: {given!r} was given. Try --budgets 6f,9f,15f."
        )
    seen: dict[tuple[Amount, ...], str] = {}
    for text in amounts:
        amount = tuple(Amount.parse(part) for part in text.split("/"))
        if amount in seen:
            raise ValueError(
                f"One budget twice: {seen[amount]} and {text} of --budgets {','.join(amounts)} "
                "are the same. Give each once."
            )
        seen[amount] = text
    return amounts


def crossed(policies: list[CachePolicy], amounts: list[str]) -> list[CachePolicy]:
    """Every policy that has a budget and no ``@`` in its name, once with each amount.

    Policies without a budget, and those that name theirs, stay as they are.

    Raises:
        ValueError: Nothing could be crossed.
    """
    if not any(map(takes_budget, policies)):
        raise ValueError(
            f"--budgets {','.join(amounts)} meets no policy that it could be crossed with: "
            f"no budget to set in {', '.join(p.name for p in policies)}. Name a policy "
            f"without it: --policies [full,sliding-window] --budgets {','.join(amounts)}."
        )
    found = []
    for policy in policies:
        if takes_budget(policy):
            found += [policy.budgeted(amount, f"{policy.name}@{amount}") for amount in amounts]
        else:
            found.append(policy)
    return found


def takes_budget(policy: CachePolicy) -> bool:
    """Whether a part of it has a budget, and its name does not say which."""
    parts = (policy.retain, policy.select)
    budgets = [part.budget for part in parts if isinstance(part, ScoredPart)]
    return "@" not in policy.name and any(budget is not None for budget in budgets)
