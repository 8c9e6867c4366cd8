"""Differences to the reference in words: which are sure, and what that was corrected for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_kv.report.entries import Entry, PageRun, direction, metric_facts
from lightning_kv.report.table import NOTHING, format_number

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Difference:
    """One policy against its reference in one metric.

    Args:
        label: Of the policy.
        metric: Its name.
        test: ``difference``, ``ci95``, ``p``, ``p_holm``, ``d_z`` and ``n``.
        differs: Whether it is significant after correction.
        says: ``better`` or ``worse``; empty where it is not sure or neither way is better.
    """

    label: str
    metric: str
    test: dict[str, Any]
    differs: bool
    says: str


def differences(entries: Sequence[Entry]) -> list[Difference]:
    """Every paired difference to the reference, metric by metric."""
    return [
        Difference(entry.label, metric, test, entry.differs(metric), _says(entries, entry, metric))
        for metric in metric_facts(entries)
        for entry in entries
        if not entry.is_reference and (test := entry.paired(metric))
    ]


def family_words(summary: dict[str, Any]) -> str:
    """One sentence about what p values were corrected for; empty where nothing was tested."""
    family = summary.get("family")
    if not family or not family["tests"]:
        return ""
    few = ""
    if family.get("prompts", 0) < family.get("prompts_needed", 0):
        few = (
            f" However large, none can be sure with {family['prompts']} prompts: so many tests "
            f"take {family['prompts_needed']} prompts or more."
        )
    return (
        "Differences are tested prompt by prompt with a two-sided sign-flip permutation test; p "
        f"values are corrected by {family['correction']}'s method over all {family['tests']} "
        f"differences to {summary['reference']} in this run, policies times metrics, at a level "
        f"of {family['level']:.0%}.{few}"
    )


def families_words(runs: Sequence[PageRun]) -> list[str]:
    """The same for several runs, each sentence once."""
    return list(dict.fromkeys(filter(None, (family_words(run.summary) for run in runs))))


def difference_words(test: dict[str, Any]) -> str:
    """A difference with everything known about it, in one line.

    >>> difference_words({"difference": -0.2, "ci95": [-0.3, -0.1], "p": 0.002, "p_holm": 0.04,
    ...             "d_z": -1.5, "n": 16})
    'difference to the reference -0.2 [-0.3, -0.1], p = 0.002, corrected 0.04, d_z = -1.5, n = 16'
    """
    said = f"difference to the reference {test['difference']:.4g}"
    if test["ci95"]:
        said += f" [{test['ci95'][0]:.4g}, {test['ci95'][1]:.4g}]"
    for name, words in (("p", "p ="), ("p_holm", "corrected"), ("d_z", "d_z =")):
        if test.get(name) is not None:
            said += f", {words} {test[name]:.2g}"
    return f"{said}, n = {n_text(test)}"


def n_text(found: dict[str, Any]) -> str:
    """What something was counted over: prompts, and their samples where they are more.

    >>> n_text({"n": 8, "clips": 8}), n_text({"n": 1, "clips": 6})
    ('8', '1 (6 samples)')
    """
    clips = found.get("clips")
    return str(found["n"]) if clips in (None, found["n"]) else f"{found['n']} ({clips} samples)"


def signed(value: float, scale: float | None = None) -> str:
    """A number with its sign.

    >>> signed(0.25), signed(-0.25), signed(0.0)
    ('+0.250', '\N{MINUS SIGN}0.250', '0')
    """
    text = format_number(abs(value), abs(value) if scale is None else scale)
    return text if value == 0 else f"{'+' if value > 0 else MINUS}{text}"


def signed_interval(bounds: Sequence[float] | None, scale: float | None = None) -> str:
    """Both ends of an interval, or a dash."""
    if not bounds:
        return NOTHING
    size = max(map(abs, bounds)) if scale is None else scale
    return " … ".join(signed(bound, size) for bound in bounds)


def p_text(p: float | None) -> str:
    """A p value, short, or a dash.

    >>> p_text(0.00001), p_text(0.0123), p_text(0.5)
    ('< 0.0001', '0.012', '0.50')
    """
    if p is None:
        return NOTHING
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.001 else f"{p:.{3 if p < 0.1 else 2}f}"


def effect_text(d_z: float | None) -> str:
    """Cohen's d_z with its sign, or a dash.

    >>> effect_text(1.234)
    '+1.23'
    """
    return NOTHING if d_z is None else f"{d_z:+.2f}".replace("-", MINUS)


def _says(entries: Sequence[Entry], entry: Entry, metric: str) -> str:
    better = direction(entries, metric)
    if better is None or not entry.differs(metric):
        return ""
    return "better" if (entry.paired(metric)["difference"] > 0) == better else "worse"
