"""From the records of whole rollouts to a verdict on a learned scorer as a policy.

A run is made by ``evaluate`` with policies that are called ``NAME@BUDGET``, one of which is
``distilled``.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_kv.policies.scorer.artifact import Scorer, ScorerFile, shipped_scorers
from lightning_kv.report.proof_page import Section, ranged
from lightning_kv.runs.candidates import EQUAL
from lightning_kv.runs.costs import policy_cost
from lightning_kv.runs.directory import Record, RunDirectory
from lightning_kv.runs.margins import MARGINS
from lightning_kv.runs.units import unit_of
from lightning_kv.stats.inference import holm
from lightning_kv.stats.proof import ALPHA, fewest_prompts
from lightning_kv.stats.score_proof import Difference, as_losses, difference, signed
from lightning_kv.stats.scorer_proof import Quotient, gap_closed
from lightning_kv.tasks.proof.rollouts import Values, chosen_metrics, middle, values_of
from lightning_kv.tasks.proof.scorer import closed
from lightning_kv.tasks.report import open_run
from lightning_kv.tasks.rollouts.policies import taught_words
from lightning_kv.utilities.formatting import format_bytes, number, several

PART = "distilled"
LEARNED = (PART, "distilled-reads")
"""Parts in which a scorer decides: none of them is training-free."""
BOUND = "oracle"
AIM = 2
"""Budgets at which the scorer is to be better, and nowhere worse."""

SHOWN = 3
"""Policies of other budgets in a table."""

RIVALS = ("equal", "more bytes", "other budget")
"""Training-free policies of its budget, whatever they hold, and all that hold no more bytes."""
Role = Literal["judged", "student", "equal", "more bytes", "other budget", "bound", "reference"]
RANKS: tuple[Role, ...] = (
    *("judged", "student", "bound", "reference", "equal", "more bytes", "other budget"),
)


@dataclass(frozen=True)
class PolicyRow:
    """One policy beside the scorer at one budget.

    Args:
        policy: Its name.
        role: ``judged``; ``student``: another scorer; ``equal``: training-free, of the same budget
            and no more bytes (or 1 % of the reference's); ``more bytes``: of the same budget;
            ``other budget``: of no more bytes; ``bound``: knows what is to come; or ``reference``.
        bytes_peak: Most bytes that the cache of a clip ever held.
        ms_per_chunk: Median, of a whole batch.
        value: Mean of the metric and its 95 % interval over prompts.
        gain: Of the judged one on this one, more is better; None of itself.
        p: Adjusted for all training-free policies at all budgets; None of others.
        left_out: Clips that have no value under one of the two.
    """

    policy: str
    role: Role
    bytes_peak: int | None
    ms_per_chunk: float | None
    value: tuple[float, float | None, float | None]
    gain: Difference | None
    p: float | None = None
    left_out: int = 0


@dataclass(frozen=True)
class PolicyProof:
    """What a scorer is worth as a policy at one budget, by one metric.

    Args:
        policy: Name of the judged one.
        budget: As it stands in the names.
        metric: Its name.
        margin: A loss within it counts as none; None where nobody says.
        rows: Of all policies that it is compared with.
        best: The best training-free policy of the budget, or of no more bytes.
        gap: Share of the way from that to the bound that is gone; None without a bound above it.
    """

    policy: str
    budget: str
    metric: str
    margin: float | None
    rows: tuple[PolicyRow, ...]
    best: str
    gap: Quotient | None

    def of(self, *roles: Role) -> tuple[PolicyRow, ...]:
        """Rows of some roles."""
        return tuple(row for row in self.rows if row.role in roles)

    @property
    def rivals(self) -> tuple[PolicyRow, ...]:
        """Training-free policies of this budget, or of no more bytes."""
        return self.of(*RIVALS)

    def row(self, policy: str) -> PolicyRow:
        """Of a policy."""
        return next(row for row in self.rows if row.policy == policy)

    @property
    def better(self) -> bool:
        """Whether it is better than every rival."""
        return all(row.p <= ALPHA and row.gain.gain > 0 for row in self.rivals)

    @property
    def not_worse(self) -> bool | None:
        """Whether it loses less than the margin on the best one; None where nobody knows."""
        low = self.row(self.best).gain.low
        return None if low is None or self.margin is None else low > -self.margin

    @property
    def surely_worse(self) -> bool:
        """Whether it is worse than the best one, by however little."""
        best = self.row(self.best)
        return best.p <= ALPHA and best.gain.gain < 0

    @property
    def words(self) -> tuple[str, ...]:
        """The verdict at this budget and what it rests on."""
        rivals, best, own = self.rivals, self.row(self.best), self.row(self.policy)
        beaten = sum(row.p <= ALPHA and row.gain.gain > 0 for row in rivals)
        gain = ranged(best.gain.gain, best.gain.low, best.gain.high, signed)
        said = [
            f"Surely better than {beaten} of {len(rivals)} training-free policies of this budget "
            f"or of no more bytes; on the best of them, {self.best}, it gains {gain} "
            f"(p {number(best.p)}).",
        ]
        if self.gap is not None:
            said.append(f"Of what {self.best} leaves: {closed(self.gap)}.")
        said += [self._overhead(own, best), self._dearer(own)]
        said += [
            f"Against {row.policy}: {ranged(row.gain.gain, row.gain.low, row.gain.high, signed)}."
            for row in self.of("student")
        ]
        return tuple(filter(None, said))

    def _overhead(self, own: PolicyRow, best: PolicyRow) -> str:
        """What it takes beside the reference and the best."""
        others = [*self.of("reference"), best]
        if own.ms_per_chunk is None or any(row.ms_per_chunk is None for row in others):
            return ""
        told = " and ".join(
            f"{own.ms_per_chunk - row.ms_per_chunk:+.1f} ms against {row.policy}" for row in others
        )
        return f"A chunk takes {own.ms_per_chunk:.1f} ms, of all clips of a batch: {told}."

    def _dearer(self, own: PolicyRow) -> str:
        """What it holds, against the policies of this budget."""
        alike = [row for row in self.of("equal", "more bytes") if row.bytes_peak]
        if not own.bytes_peak or not alike:
            return ""
        least, most = (f(row.bytes_peak / own.bytes_peak for row in alike) for f in (min, max))
        return (
            f"Policies of this budget hold {least:.2f} to {most:.2f} times the bytes that it does."
        )


def of_run(run: RunDirectory, metrics: Sequence[str] | None = None) -> tuple[PolicyProof, ...]:
    """What a finished run proves of a scorer.

    Args:
        run: Its directory.
        metrics: By which; the usual ones that it has where None.

    Raises:
        ValueError: It is no run, has no such policies or metrics, or too few prompts.
    """
    opened = open_run(run.path)
    about, records = opened.about(), opened.records()
    judged = judged_policies(run, about["policies"])
    warn_taught_policies(about, judged.values(), {unit_of(record) for record in records})
    by_policy: dict[str, list[Record]] = {}
    for record in records:
        by_policy.setdefault(record["policy"], []).append(record)
    costs = {
        name: policy_cost(own, by_policy[about["reference"]]) for name, own in by_policy.items()
    }
    found = []
    for metric in chosen_metrics(about["metrics"], records, metrics):
        every = [
            _proof(about, records, costs, own, budget, metric) for budget, own in judged.items()
        ]
        found += _adjusted(every)
    return tuple(found)


def judged_policies(run: RunDirectory, policies: Mapping[str, Any]) -> dict[str, str]:
    """Names of the policies that are judged, by budget.

    Args:
        run: Whose.
        policies: What it says of each.

    Raises:
        ValueError: There are none, or it is not clear which of several scorers is meant.
    """
    learned = [name for name, own in policies.items() if uses_scorer(own) and "@" in name]
    bases = list(dict.fromkeys(name.partition("@")[0] for name in learned))
    if not bases:
        raise ValueError(
            f"{run.path} has no learned scorer at a budget: its policies are "
            f"{', '.join(policies)}. Evaluate distilled@9f and others of that budget: see "
            "configs/distilled_vs_training_free.yaml."
        )
    if PART not in bases and len(bases) > 1:
        raise ValueError(
            f"{run.path} has several learned scorers, {', '.join(bases)}, and none that is called "
            f"{PART!r}. Call the one that is judged so; the others are compared with it."
        )
    base = PART if PART in bases else bases[0]
    return {name.partition("@")[2]: name for name in learned if name.partition("@")[0] == base}


def uses_scorer(policy: Mapping[str, Any]) -> bool:
    """Whether a learned scorer decides in a policy, from what a run says of it."""
    parts = [policy.get(kind) for kind in ("retain", "select")]
    return any(isinstance(own, dict) and own.get("part") in LEARNED for own in parts)


def _proof(
    about: Mapping[str, Any],
    records: Sequence[Record],
    costs: Mapping[str, Mapping[str, float | None]],
    own: str,
    budget: str,
    metric: str,
) -> PolicyProof:
    """What is found at one budget, p values not adjusted.

    Raises:
        ValueError: There is nothing to compare with, or too few prompts.
    """
    higher = bool(about["metrics"][metric]["higher_is_better"])
    roles = roles_of(about, costs, own, budget)
    rows = [
        _row(records, costs, own, name, role, metric, higher)
        for name, role in sorted(roles.items(), key=lambda each: RANKS.index(each[1]))
    ]
    rivals = [row for row in rows if row.role in RIVALS]
    if not rivals:
        raise ValueError(
            f"Nothing can be compared with {own}: this run has no training-free policy of the "
            f"budget {budget}, or of no more bytes. Evaluate some, such as h2o@{budget} and "
            f"future-forcing@{budget}."
        )
    best = min(rivals, key=lambda row: row.value[0] if not higher else -row.value[0]).policy
    bounds = [row.policy for row in rows if row.role == "bound"]
    bound = next((name for name in bounds if name.partition("@")[0] == BOUND), None)
    means = {row.policy: row.value[0] if higher else -row.value[0] for row in rows}
    open_ = bound is not None and means[bound] > means[best]  # else there is nothing to close
    gap = _gap(records, own, best, bound, metric) if open_ else None
    return PolicyProof(own, budget, metric, MARGINS.get(metric), tuple(rows), best, gap)


def roles_of(
    about: Mapping[str, Any], costs: Mapping[str, Mapping[str, float | None]], own: str, budget: str
) -> dict[str, Role]:
    """What each policy of a run is to the scorer at one budget; those that are nothing to it are
    left out.

    Args:
        about: What the run says of itself.
        costs: Of every policy.
        own: Name of the judged one.
        budget: As it stands in the names.
    """
    reference, peak = about["reference"], "kv_bytes_peak"
    room = (costs[own][peak] or 0) + EQUAL * (costs[reference][peak] or 0)
    found: dict[str, Role] = {}
    for name, spec in about["policies"].items():
        alike = name.partition("@")[2] == budget
        fits = costs.get(name, {}).get(peak) is not None and costs[name][peak] <= room
        if name not in costs:
            continue
        if name in (own, reference):
            found[name] = "judged" if name == own else "reference"
        elif name in about["run"].get("hindsight", ()):
            found |= {name: "bound"} if alike else {}
        elif uses_scorer(spec):
            found |= {name: "student"} if alike else {}
        elif alike:
            found[name] = "equal" if fits else "more bytes"
        elif fits:
            found[name] = "other budget"
    return found


def _row(
    records: Sequence[Record],
    costs: Mapping[str, Mapping[str, float | None]],
    own: str,
    name: str,
    role: Role,
    metric: str,
    higher: bool,
) -> PolicyRow:
    both = {"own": own} | ({"other": name} if name != own else {})
    values, left_out = values_of(records, both, metric)
    if (count := len(values["own"])) < 2:
        raise ValueError(
            f"Too few prompts: {count} have a value of {metric} under {own} and {name}. Let the "
            "evaluation finish, on 8 prompts or more."
        )
    gain = None if name == own else difference(as_losses(values, higher), "own", "other")
    gain = gain and replace(gain, condition=own, against=name)
    seconds, peak = (costs[name][key] for key in ("seconds_per_chunk_p50", "kv_bytes_peak"))
    return PolicyRow(
        name,
        role,
        peak,
        None if seconds is None else 1000 * seconds,
        middle(values["own" if name == own else "other"]),
        gain,
        gain.p if gain and role in RIVALS else None,
        len(left_out),
    )


def _gap(records: Sequence[Record], own: str, best: str, bound: str, metric: str) -> Quotient:
    values, _ = values_of(records, {"own": own, "best": best, "bound": bound}, metric)
    return gap_closed(*(_means(values, name) for name in ("own", "best", "bound")))


def _means(values: Values, name: str) -> list[float]:
    return [sum(own) / len(own) for _, own in sorted(values[name].items())]


def _adjusted(found: Sequence[PolicyProof]) -> list[PolicyProof]:
    """The same with p values adjusted for all rivals at all budgets."""
    each = iter(holm([row.p for own in found for row in own.rows if row.role in RIVALS]))
    return [
        replace(
            own,
            rows=tuple(
                replace(row, p=next(each)) if row.role in RIVALS else row for row in own.rows
            ),
        )
        for own in found
    ]


def warn_taught_policies(
    about: Mapping[str, Any], judged: Collection[str], prompts: set[str]
) -> None:
    """Say which prompts of a run its scorer was taught on, or that this cannot be told.

    Args:
        about: What the run says of itself.
        judged: Names of the policies.
        prompts: Keys of its prompts.
    """
    specs = [about["policies"][name] for name in judged]
    files = [own["scorer"] for spec in specs for own in spec.values() if _with_scorer(own)]
    for file in {own["sha256"]: own for own in files}.values():
        try:
            told = ScorerFile.of(dict(file))
            scorer = Scorer.load(told.path or shipped_scorers()[about["model"].get("model", "")])
        except (ValueError, LookupError):
            warnings.warn(
                f"The scorer {file['file']} of this run is not at hand as it was, so it cannot be "
                "told whether it was taught on these prompts.",
                stacklevel=3,
            )
            continue
        if both := [key for key in scorer.prompts if key in prompts]:
            warnings.warn(taught_words(file["file"], both, list(judged)), stacklevel=3)


def _with_scorer(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("scorer"), dict)


# -- in words ------------------------------------------------------------------------------


def extent(found: Sequence[PolicyProof]) -> tuple[str, ...]:
    """The verdict by each metric, and what it rests on."""
    prompts = max(own.row(own.best).gain.prompts for own in found)
    metrics = list(dict.fromkeys(own.metric for own in found))
    tests = len([row for own in found if own.metric == metrics[0] for row in own.rivals])
    said = [verdict([own for own in found if own.metric == metric]) for metric in metrics]
    said.append(
        f"{several(prompts, 'held-out prompt')}, whole rollouts; differences, more is better. P "
        f"values are adjusted for {tests} training-free policies of all budgets (Holm). The best "
        "of many was chosen on the same prompts, which flatters it."
    )
    fewer = {
        row.policy: row.gain.prompts
        for own in found
        for row in own.rows
        if row.gain and row.gain.prompts < prompts
    }
    if fewer:
        told = ", ".join(f"{name} ({count})" for name, count in fewer.items())
        said.append(f"Compared over fewer prompts, as the run has no more of them: {told}.")
    if prompts < (least := fewest_prompts(tests)):
        said.append(f"No effect can be shown on fewer than {least} prompts.")
    return tuple(said)


def verdict(found: Sequence[PolicyProof]) -> str:
    """By one metric, at all budgets."""
    name, metric = found[0].policy.partition("@")[0], found[0].metric
    better = [own.budget for own in found if own.better]
    first = f"better than every training-free policy of its budget or bytes at {', '.join(better)}"
    if not better:
        first = "at no budget shown to be better than every training-free policy of it or its bytes"
    said = f"By {metric}, {name} is {first}"
    if any(own.not_worse is None for own in found):
        return f"{said}; what loss would count as none is not known in this metric."
    margin = number(found[0].margin)
    worse = [own.budget for own in found if not own.not_worse]
    slightly = [own.budget for own in found if own.not_worse and own.surely_worse]
    said += f", and not shown to be within {margin} of the best at {', '.join(worse)}" * bool(worse)
    said += f", and nowhere worse than the best by {margin}" * (not worse)
    said += f", though surely worse by less at {', '.join(slightly)}" * bool(slightly)
    met = "is met" if len(better) >= AIM and not worse else "is not met"
    return f"{said}. The aim, better at {AIM} budgets and nowhere worse, {met}."


HEADS = ("policy", "role", "peak", "ms a chunk", "mean", "gain of the scorer", "p")


def sections(found: Sequence[PolicyProof]) -> list[Section]:
    """Of the page and the terminal."""
    return [
        Section(
            f"{own.policy}, {own.metric}",
            own.words,
            HEADS,
            tuple(map(cells, _ordered(own))),
        )
        for own in found
    ]


def _ordered(found: PolicyProof) -> list[PolicyRow]:
    """The scorer and its controls, then the others by what it gains on them."""
    first = found.of("judged", "student", "bound", "reference")
    equal, dearer, other = (
        sorted(found.of(role), key=lambda row: row.gain.gain)
        for role in ("equal", "more bytes", "other budget")
    )
    return [*first, *equal, *dearer, *other[:SHOWN]]


def cells(row: PolicyRow) -> tuple[str, ...]:
    """A row of the table, as text."""
    gain = row.gain
    return (
        row.policy,
        row.role,
        "" if row.bytes_peak is None else format_bytes(row.bytes_peak),
        "" if row.ms_per_chunk is None else f"{row.ms_per_chunk:.1f}",
        ranged(*row.value),
        "" if gain is None else ranged(gain.gain, gain.low, gain.high, signed),
        "" if row.p is None else number(row.p),
    )
