"""A gate for continuous integration: is a run worse than an earlier one by more than is allowed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_kv.runs.directory import RunDirectory
from lightning_kv.runs.margins import check_margin, default_margins
from lightning_kv.runs.units import counted
from lightning_kv.stats.inference import NonInferiority, non_inferiority, prompts_needed
from lightning_kv.utilities.formatting import number, several
from lightning_kv.utilities.nearest import hint

PASS, REGRESSION, THIN = 0, 1, 2
"""Exit codes."""

ENDLESS = 1_000_000
"""Prompts that nobody runs: a test that needs more is settled by no number of them."""

SETTINGS = ("frames", "context_frames", "size", "seed", "samples", "data_seed", "alignment")
"""Of a run, without which its values are others; ``samples`` are 1 where it says nothing."""


@dataclass(frozen=True)
class Judgement:
    """One policy and metric against the baseline, prompt by prompt.

    Args:
        policy: Its name.
        metric: Its name.
        verdict: ``not worse``, ``worse`` or ``unclear``; a prompt that fails now is worse.
        found: How the mean loss lies to the margin; positive is worse. None where every prompt
            fails now.
        needed: Prompts in all that would settle it, if mean and spread stay what they are; None
            where it is settled, or no number would.
        failed: Prompts with a value in the baseline and none now.
        clips: Clips of the run that its values are means of, where that is known.
    """

    policy: str
    metric: str
    verdict: str
    found: NonInferiority | None
    needed: int | None
    failed: int = 0
    clips: int | None = None

    @property
    def prompts(self) -> int:
        """How many have a value in both."""
        return self.found.n if self.found else 0

    @property
    def nearness(self) -> float:
        """The mean loss ÷ the margin."""
        if self.found is None:
            return math.inf
        return self.found.mean / self.found.margin if self.found.margin else self.found.mean

    @property
    def words(self) -> str:
        """The test in a sentence."""
        if self.found is None:
            return f"{self.policy} {self.metric}: no value now on {counted(self.failed)}"
        change = self.found.mean
        said = f"{number(abs(change))} {'worse' if change > 0 else 'better'}" if change else "equal"
        bounds = (self.found.lower, self.found.upper)
        low, high = (None if bound is None else bound + 0.0 for bound in bounds)  # no -0
        spread = "" if low is None or low == high else f" [{number(low)}, {number(high)}]"
        lost = f", and {counted(self.failed)} without a value now" if self.failed else ""
        margin = number(self.found.margin)
        return f"{self.policy} {self.metric}: {said}{spread}, margin {margin}{lost}"


@dataclass(frozen=True)
class Checked:
    """The verdict.

    Args:
        tests: Every policy and metric, the most telling first.
        missing: Prompts of the baseline that the run lacks.
        level: Confidence of each bound.
        absent: Policies of the baseline that the run lacks, where none were named.
    """

    tests: tuple[Judgement, ...]
    missing: int
    level: float
    absent: tuple[str, ...] = ()

    @property
    def code(self) -> int:
        """Exit code: 1 where anything got worse, else 2 where anything is unclear, else 0.

        What the baseline measured and the run did not is unclear: a gate must not reward gaps.
        """
        verdicts = {test.verdict for test in self.tests}
        if "worse" in verdicts:
            return REGRESSION
        return THIN if "unclear" in verdicts or self.missing or self.absent else PASS

    @property
    def words(self) -> list[str]:
        """The verdict in three lines."""
        kind = {PASS: "not worse", REGRESSION: "worse", THIN: "unclear"}[self.code]
        same = [test for test in self.tests if test.verdict == kind]
        passes = kind == "not worse" or not same
        named = (
            "Nearest to its margin" if passes else "Worst" if kind == "worse" else "Worst so far"
        )
        lacks = f"; {counted(self.missing)} of the baseline missing" if self.missing else ""
        if self.absent:
            lacks += f"; the run lacks {', '.join(self.absent)} (name --policies to leave them out)"
        advice = self._advice(same or self.tests)
        return [self._head(same), f"{named}: {self.tests[0].words}.", f"{advice}{lacks}."]

    def _head(self, same: Sequence[Judgement]) -> str:
        """The verdict itself."""
        tests = several(len(self.tests), "test")
        share = f"{len(same)} of {len(self.tests)} tests"
        if self.code == REGRESSION:
            lost = " or has lost a value" if any(test.failed for test in same) else ""
            return (
                f"REGRESSION: in {share} the run is worse than the baseline by more than the "
                f"margin{lost}."
            )
        if self.code == PASS:
            return (
                "PASS: nothing is worse than the baseline by more than its margin "
                f"({tests}, {100 * self.level:g} % confidence each)."
            )
        if same:
            return f"TOO FEW PROMPTS: {share} may turn out either way, within the margin or beyond."
        return "INCOMPLETE: what was measured passes, but part of the baseline is missing."

    def _advice(self, same: Sequence[Judgement]) -> str:
        """What the numbers rest on, and what would help."""
        fewest = min(same, key=lambda test: test.prompts)
        differ = len({test.prompts for test in same}) > 1
        said = f"Over {counted(fewest.prompts, fewest.clips)}" + (" or more" if differ else "")
        if not fewest.prompts and not differ:
            return "No prompt has a value in both the run and the baseline"
        if all(test.verdict != "unclear" for test in same):
            return f"{said}, paired with the baseline's"
        needed = [test.needed for test in same]
        if None in needed:
            return f"{said}: at its margin, no number of prompts settles it; change the margin"
        more = max(test.needed - test.prompts for test in same)
        return f"{said}: about {counted(more)} more would settle it, if they are like these"


def check(
    run: Path,
    baseline: Path,
    margins: dict[str, float] | None = None,
    policies: Sequence[str] | None = None,
    level: float = 0.95,
) -> Checked:
    """Compare a run with a baseline, prompt by prompt: tests of non-inferiority.

    A test passes where the mean loss is within the margin with the confidence ``level``, fails
    where it is beyond it with that confidence, and is unclear otherwise. All have to pass, so no
    correction for their number is needed (an intersection-union test); that any fails is corrected
    for it (Bonferroni). The reference is not judged by metrics that compare with it.

    Args:
        run: A run directory, or its ``summary.json``.
        baseline: The same of an earlier run on the same prompts.
        margins: Largest mean loss per metric, in its unit; see `margins.MARGINS` where None.
        policies: Which; all that both have where None.
        level: Confidence of a verdict.

    Raises:
        ValueError: No common policies or prompts, another recipe or reference, a metric without
            values, other frames or seeds, or a margin that means nothing.
    """
    new, old = read_summary(run), read_summary(baseline)
    check_settings(new.get("run", {}), old.get("run", {}))
    names = common(new, old, policies)
    first = new["policies"][names[0]]["metrics"]
    if margins is None:
        able = [m for m in first if any(values(new, old, name, m) for name in names)]
        margins = default_margins(able)
    asked = [(name, metric) for name in names for metric in margins]
    able = [one for one in asked if not is_reference(new, *one) or values(new, old, *one)]
    asked = able or asked
    tests = [judge(new, old, *one, margins[one[1]], level, len(asked)) for one in asked]
    order = {"worse": 0, "unclear": 1, "not worse": 2}
    tests.sort(key=lambda test: (order[test.verdict], -test.nearness))
    units = [[set(s["policies"][name]["units"]) for name in names] for s in (old, new)]
    lacking = set().union(*(there - here for there, here in zip(*units, strict=True)))
    absent = [] if policies else [name for name in old["policies"] if name not in names]
    return Checked(tuple(tests), len(lacking), level, tuple(absent))


def check_settings(new: dict[str, Any], old: dict[str, Any]) -> None:
    """Refuse two runs that did not do the same: their differences would say nothing.

    Raises:
        ValueError: Names what differs.
    """
    new, old = ({"samples": 1} | run for run in (new, old))
    other = [
        f"{name} ({old[name]} in the baseline, {new[name]} in the run)"
        for name in SETTINGS
        if name in old and name in new and old[name] != new[name]
    ]
    if other:
        raise ValueError(
            f"The run cannot be checked against this baseline. These differ: {', '.join(other)}. "
            "Run with the baseline's settings, or make a new baseline."
        )


def is_reference(summary: dict[str, Any], policy: str, metric: str) -> bool:
    """Whether a metric would compare this policy with itself."""
    fact = summary["policies"][policy]["metrics"].get(metric, {"against_reference": False})
    return policy == summary["reference"] and fact["against_reference"]


def read_summary(path: Path) -> dict[str, Any]:
    """Content of ``summary.json``, of a run directory or the file itself.

    Raises:
        ValueError: There is none, or it is older than the values by prompt that this needs.
    """
    file = RunDirectory(path).summary if path.is_dir() else path
    try:
        found = json.loads(file.read_bytes())
        units = [policy["units"] for policy in found["policies"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is no summary that a run can be checked against "
            f"({type(error).__name__}: {error}). Give a directory or summary.json of `lightning-kv "
            "evaluate` or `compare`. Either command, given again, writes it anew and measures "
            "nothing twice."
        ) from error
    if not any(units):
        raise ValueError(f"{file} holds no values: nothing of that run is measured. Finish it.")
    return found


def common(new: dict[str, Any], old: dict[str, Any], asked: Sequence[str] | None) -> list[str]:
    """Policies to check: those asked for, else all that both have.

    Raises:
        ValueError: There is none, or one that was asked for is missing.
    """
    here, there = list(new["policies"]), list(old["policies"])
    if asked is None:
        both = [name for name in here if name in there]
        if both:
            return both
        asked = here
    lacking = [name for name in asked if name not in here or name not in there]
    if not lacking and asked:
        return list(asked)
    raise ValueError(
        f"These policies are not in both: {', '.join(lacking) or 'none was named'}. The run has "
        f"{', '.join(here)}; the baseline has {', '.join(there)}. Name some that both have: "
        "--policies full,top-attention@9f."
    )


def values(
    new: dict[str, Any], old: dict[str, Any], policy: str, metric: str
) -> list[tuple[float | None, float]]:
    """Values of the run and of the baseline on each prompt of both where the baseline has one."""
    own, base = (summary["policies"][policy]["units"] for summary in (new, old))
    pairs = ((own[unit].get(metric), base[unit].get(metric)) for unit in sorted(own.keys() & base))
    return [(a, b) for a, b in pairs if b is not None]


def judge(
    new: dict[str, Any],
    old: dict[str, Any],
    policy: str,
    metric: str,
    margin: float,
    level: float,
    tests: int = 1,
) -> Judgement:
    """One test of several: "worse" has to hold for all of them together (Bonferroni).

    Raises:
        ValueError: The metric is missing, has no values by prompt, is another recipe there or
            compares with another reference; or the margin means nothing.
    """
    here, there = same_metric(new, old, policy, metric)
    check_margin(metric, margin, here)
    pairs = values(new, old, policy, metric)
    if not pairs:
        raise ValueError(
            f"No prompt has a value of {metric} under {policy} in both: {here['status']} in the "
            f"run, {there['status']} in the baseline. Leave that margin out, or evaluate the same "
            "prompts. (Distances between sets have no value by prompt.)"
        )
    sign = -1.0 if here["higher_is_better"] else 1.0
    losses = [sign * (a - b) for a, b in pairs if a is not None]
    found = non_inferiority(losses, margin, level)
    failed = len(pairs) - len(losses)
    verdict = "worse" if failed else found.verdict
    if verdict == "worse" and not failed:
        again = non_inferiority(losses, margin, 1 - (1 - level) / tests)
        verdict = "worse" if again.verdict == "worse" else "unclear"
    needed = more_prompts(losses, margin, level) if verdict == "unclear" else None
    clips = here.get("clips") if here.get("n") == len(losses) else None
    return Judgement(policy, metric, verdict, found, needed, failed, clips)


def more_prompts(losses: list[float], margin: float, level: float) -> int | None:
    """Prompts in all that would settle a test that is unclear; None where no number would."""
    if math.fsum(losses) / len(losses) > margin:  # then it has to be shown that it is worse
        losses, margin = [-loss for loss in losses], -margin
    # One prompt has no spread; the planned test and the bootstrap differ by a prompt or two.
    needed = prompts_needed(losses if len(losses) > 1 else 2 * losses, margin, level=level)
    if needed is None or needed > ENDLESS:
        return None
    return max(needed, len(losses) + 1)


def same_metric(
    new: dict[str, Any], old: dict[str, Any], policy: str, metric: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both summaries say about a metric of a policy.

    Raises:
        ValueError: One says nothing, or it is not the same metric.
    """
    own, base = (summary["policies"][policy]["metrics"] for summary in (new, old))
    if metric not in own or metric not in base:
        both = [name for name in own if name in base]
        raise ValueError(
            f"A margin is given for {metric!r}, which not both have.{hint(metric, both)} Both have "
            f"{', '.join(both)}."
        )
    here, there = own[metric], base[metric]
    ways = [f"{each['recipe']} {each.get('weights') or ''}".rstrip() for each in (here, there)]
    if ways[0] != ways[1]:
        raise ValueError(
            f"{metric} was computed in another way: {ways[0]!r} in the run, {ways[1]!r} in the "
            "baseline. Evaluate the baseline again."
        )
    if here["against_reference"] and new["reference"] != old["reference"]:
        raise ValueError(
            f"{metric} compares with {new['reference']!r} in the run and with "
            f"{old['reference']!r} in the baseline. Evaluate one of them with the other's "
            "--reference, or judge by a metric that compares with none."
        )
    return here, there
