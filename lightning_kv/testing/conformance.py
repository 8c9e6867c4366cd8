"""The conformance suite: every rule on every tape, for one policy.

``pytest --pyargs lightning_kv.testing --policy NAME`` runs it (see :mod:`.test_conformance`); in a
test of one's own it is ``obey(policy)``, or ``obey(policy, "budgets_are_kept")``.
"""

from __future__ import annotations

import json
from dataclasses import replace

from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.registry import load_policy, policy_from_dict, policy_to_dict, presets
from lightning_kv.testing.candidate import Candidate, Refused, refusal, tape
from lightning_kv.testing.rules import RULES, on

__all__ = ["RULES", "Refused", "candidate_of", "cells", "obey", "presets", "tried"]


def candidate_of(spec: str) -> Candidate:
    """The policy of a name, ``NAME@BUDGET``, a class by its path, or a YAML file.

    Raises:
        ValueError: There is none.
    """
    return Candidate(load_policy(spec))


def cells(policy: CachePolicy) -> list[tuple[str, str]]:
    """Rule and tape of all that is tried on a policy."""
    return [(n, name) for n, own in RULES.items() if own.about(policy) for name in own.tapes]


def tried(candidate: Candidate, rule: str, name: str) -> None:
    """One cell: a rule on a tape.

    Raises:
        AssertionError: The rule is broken, and how. What the cache itself refuses, or what a part
            stumbles over, comes as it is.
        Refused: The policy says that it cannot work there.
    """
    try:
        RULES[rule].rule(candidate, name)
    except ValueError as error:  # only the first commit shows that no pass is clean
        noisy = any(step.final and not step.clean for step in tape(name).steps)
        if noisy and "clean" in str(error):
            refusal(error)
        raise


def obey(policy: CachePolicy, *names: str) -> dict[tuple[str, str], str]:
    """Hold a policy against some rules (all where none is named), on all their tapes.

    Returns:
        What it refuses, by rule and tape, and why.

    Raises:
        AssertionError: See :func:`tried`.
        KeyError: There is no such rule.
    """
    candidate, refused = Candidate(policy), {}
    wanted = [RULES[name] for name in names] or list(RULES.values())
    for rule, name in cells(policy):
        if RULES[rule] in wanted:
            try:
                tried(candidate, rule, name)
            except Refused as refusal:
                refused[rule, name] = str(refusal)
    return refused


@on("chunks of 3")
def policies_are_plain_data(candidate: Candidate, name: str) -> None:
    """A policy survives as a dictionary and as JSON, and its parts are hashable."""
    policy = candidate.policy
    values = policy_to_dict(policy)
    for again in (values, json.loads(json.dumps(values))):
        made = replace(policy_from_dict(again), asked=policy.asked)
        assert made == policy and repr(made) == repr(policy), f"{made} was {policy}"
    for part in policy.parts:
        assert hash(part) == hash(replace(part)), f"{part!r} is not the same twice"
