"""From the records of rankings to a verdict on a learned scorer.

Shapes: M measures, L layers, H heads.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightning_kv.calibration.clips import ClipRecord
from lightning_kv.distillation.baselines import HAND_MADE
from lightning_kv.distillation.judging import OUTPUTS, RANKED, WORST
from lightning_kv.report.proof_page import Section, ranged
from lightning_kv.stats.bootstrap import Array, bca_interval
from lightning_kv.stats.inference import holm
from lightning_kv.stats.proof import ALPHA, fewest_prompts
from lightning_kv.stats.score_proof import Difference, as_losses, difference, signed
from lightning_kv.stats.scorer_proof import (
    Quotient,
    State,
    gap_closed,
    mean_of_worst,
    prompts_that_show,
    quotient,
    state_of,
)
from lightning_kv.tasks.calibration.records import CalibrationDirectory, Wanted
from lightning_kv.tasks.proof.scorer_design import (
    JUDGED,
    LINEAR,
    ORACLE,
    RANDOM,
    ScorerDesign,
    ScorerSource,
)
from lightning_kv.tasks.proof.scorer_meter import SCORER_LED, TEACHER_LED
from lightning_kv.tasks.rollouts.policies import taught_words
from lightning_kv.tasks.trainer import is_first
from lightning_kv.utilities.formatting import number, percent, several

ALLOWED = 1.15
"""The most that the regret on the scorer's own memories may be of that on its teacher's."""
REGRET, SKILL = "regret", "age_residual_recall"

Value = tuple[float | None, float | None, float | None]
"""Mean over prompts and its 95 % interval, as far as they are known."""


@dataclass(frozen=True)
class RankingRow:
    """One ranking at one budget.

    Args:
        ranking: Its name.
        teacher_led: Every measure on the memories of the teacher (off-policy).
        scorer_led: The same on those of the scorer (on-policy).
        worst: Regret of the worst 5 % of the heads, off-policy.
        against: The scorer's regret against this one's, off-policy, p not adjusted; None of itself.
    """

    ranking: str
    teacher_led: Mapping[str, Value]
    scorer_led: Mapping[str, Value]
    worst: float | None
    against: Difference | None


@dataclass(frozen=True)
class BudgetProof:
    """What was found at one budget. Comparisons are off-policy.

    Args:
        budget: History frames of each head.
        rows: Of the table.
        best: The training-free ranking with the least regret on these very prompts.
        state: Of the scorer against it.
        against_best: The comparison of regrets, above 0 the scorer is better; p not adjusted.
        p: Adjusted for the number of budgets (Holm).
        gap: Share of the best one's regret that is gone.
        on_policy_gap: The same on the memories of the scorer, against the best ranking there.
        linear: Against the linear student; None without one.
        linear_p: Adjusted.
        skill: Recall of what recency drops, against chance; None where it drops nothing wanted.
        skill_p: Adjusted.
        ratio: On-policy regret over off-policy regret.
        needed: Prompts on which the gain would show, if it is undecided and some number would do.
    """

    budget: int
    rows: tuple[RankingRow, ...]
    best: str
    state: State
    against_best: Difference
    p: float
    gap: Quotient
    on_policy_gap: Quotient
    linear: Difference | None
    linear_p: float | None
    skill: Difference | None
    skill_p: float | None
    ratio: Quotient
    needed: int | None

    @property
    def name(self) -> str:
        """As it is written."""
        return f"{self.budget}f"

    def mean(self, ranking: str, measure: str = REGRET) -> float | None:
        """Over prompts, off-policy."""
        row = next(row for row in self.rows if row.ranking == ranking)
        return row.teacher_led[measure][0]

    @property
    def hoarders(self) -> tuple[str, ...]:
        """Training-free rankings that keep more of what recency drops."""
        own = self.mean(JUDGED, SKILL)
        return tuple(name for name in HAND_MADE if (self.mean(name, SKILL) or 0) > (own or 0))

    @property
    def words(self) -> tuple[str, ...]:
        """What holds at this budget."""
        said = [
            f"Against {self.best}, the best of {len(HAND_MADE)} training-free rankings on these "
            f"prompts: {self.state}, {closed(self.gap)} (p {number(self.p)}).",
            f"On the scorer's own memories: {closed(self.on_policy_gap)}.",
        ]
        if self.hoarders:
            said.append(
                f"More of what recency drops is kept by {', '.join(self.hoarders)}, at a higher "
                "regret: who keeps what is old keeps that, and misses what is new."
            )
        return tuple(said)


@dataclass(frozen=True)
class ScorerProof:
    """What a learned scorer is worth as a ranking.

    Args:
        scorer: Name of the file.
        prompts: Keys of the held-out prompts.
        lists: Number of decisions that were judged.
        target: What the teacher says frames are worth.
        budgets: What was found at each.
        verdict: ``learned``, ``learned in part``, ``no better`` or ``undecided``.
        notes: What differs from the making of the scorer.
    """

    scorer: str
    prompts: tuple[str, ...]
    lists: int
    target: str
    budgets: tuple[BudgetProof, ...]
    verdict: str
    notes: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The verdict, in three sentences, and what it rests on."""
        return (
            headline(self.verdict, self.budgets, len(self.prompts)),
            f"{linear_words(self.budgets)}; {skill_words(self.budgets)}.",
            on_policy_words(self.budgets),
            f"{several(len(self.prompts), 'held-out prompt')}, {several(self.lists, 'decision')} "
            f"of heads on both memories, worth by {self.target}. Tests are on those that the "
            "teacher leads to; the best training-free ranking was chosen on the same prompts, "
            "which flatters it.",
            *self.notes,
        )


# -- from records --------------------------------------------------------------------------


def conclude(
    run: CalibrationDirectory, wanted: Mapping[str, Wanted], design: ScorerDesign
) -> ScorerProof:
    """Read all records that are asked for, and say what they prove.

    Args:
        run: The records.
        wanted: Clips by key.
        design: What was compared.

    Raises:
        ValueError: A record is damaged, or no clip has one.
    """
    return proved(run.measured(wanted), design)


def proved(records: Iterable[ClipRecord], design: ScorerDesign) -> ScorerProof:
    """What records prove, in whatever order they come.

    Args:
        records: Of clips.
        design: What was compared.
    """
    records, lists = sorted(records, key=lambda own: own.key), 0
    sums: Sums = {}
    for record in records:
        for (budget, who), site in record.sites.items():
            lists += int(site["lists"])
            for ranking in design.rankings:
                own = sums.setdefault((budget, who, ranking), {})
                value = site[ranking].numpy()
                own[record.unit] = own.get(record.unit, 0) + value
    fewest = fewest_prompts(len(design.budgets))
    budgets = _adjusted([_budget(sums, own, design, fewest) for own in design.budgets])
    units = tuple(sorted({own.unit for own in records}))
    return ScorerProof(
        design.source.path.name,
        units,
        lists,
        design.teacher.target,
        budgets,
        verdict_of([own.state for own in budgets]),
        design.notes,
    )


Sums = dict[tuple[int, int, str], dict[str, Array]]
"""Sums ``[M, 2, L H]`` by budget, leader of the memories, ranking, and prompt."""


def by_prompt(sums: Mapping[str, Array], measure: str) -> dict[str, float]:
    """A measure by prompt, of those that have it: over all heads together.

    Args:
        sums: Of one ranking, by prompt.
        measure: Its name.
    """
    place = [*RANKED, *OUTPUTS].index(measure)
    found = {}
    for unit, own in sorted(sums.items()):
        if place < len(own) and (below := own[place, 1].sum()) > 0:
            found[unit] = float(own[place, 0].sum() / below)
    return found


def value_of(values: Collection[float]) -> Value:
    """Mean and interval."""
    values = list(values)
    if not values:
        return None, None, None
    return math.fsum(values) / len(values), *(bca_interval(values) or (None, None))


def _budget(sums: Sums, budget: int, design: ScorerDesign, fewest: int) -> BudgetProof:
    """What one budget shows, p values not adjusted."""

    def of(ranking: str, measure: str = REGRET, who: int = TEACHER_LED) -> dict[str, float]:
        return by_prompt(sums[budget, who, ranking], measure)

    def best(who: int) -> str:
        return min(HAND_MADE, key=lambda name: _mean(of(name, REGRET, who)))

    sides = {name: of(name) for name in design.rankings}
    losses = as_losses(sides, higher_is_better=False)
    against = {name: difference(losses, JUDGED, name) for name in sides if name != JUDGED}
    first, led = best(TEACHER_LED), best(SCORER_LED)
    own, other = of(JUDGED, who=SCORER_LED), of(led, who=SCORER_LED)
    skills = {name: of(name, SKILL) for name in (JUDGED, RANDOM)}
    skill = difference(as_losses(skills, True), JUDGED, RANDOM) if all(skills.values()) else None
    gap = _gone(sides[JUDGED], sides[first])
    return BudgetProof(
        budget=budget,
        rows=tuple(_row(sums, budget, name, against.get(name)) for name in design.rankings),
        best=first,
        state=state_of(against[first], against[first].p, gap),
        against_best=against[first],
        p=against[first].p,
        gap=gap,
        on_policy_gap=_gone(own, other),
        linear=against.get(LINEAR),
        linear_p=against[LINEAR].p if LINEAR in against else None,
        skill=skill,
        skill_p=skill and skill.p,
        ratio=quotient(list(own.values()), list(sides[JUDGED].values())),
        needed=prompts_that_show(
            [sides[first][u] - sides[JUDGED][u] for u in sides[first]], fewest
        ),
    )


def _adjusted(found: Sequence[BudgetProof]) -> tuple[BudgetProof, ...]:
    """The same with p values adjusted for the number of budgets, and what follows from them."""
    names = ("p", "linear_p", "skill_p")
    every = (holm([getattr(own, name) for own in found]) for name in names)
    done = []
    for own, *each in zip(found, *every, strict=True):
        state = state_of(own.against_best, each[0], own.gap)
        needed = own.needed if state == "undecided" else None
        done.append(replace(own, state=state, needed=needed, **dict(zip(names, each, strict=True))))
    return tuple(done)


def _row(sums: Sums, budget: int, ranking: str, against: Difference | None) -> RankingRow:
    sides = [sums[budget, who, ranking] for who in (TEACHER_LED, SCORER_LED)]
    every = [*RANKED, *OUTPUTS]
    shown = [{name: value_of(by_prompt(side, name).values()) for name in every} for side in sides]
    regrets = np.sum([own[every.index(REGRET)] for own in sides[0].values()], axis=0)
    return RankingRow(ranking, *shown, mean_of_worst(*regrets, WORST), against)


def _gone(own: Mapping[str, float], best: Mapping[str, float]) -> Quotient:
    """How much of a regret another leaves no longer; the oracle has none."""
    units = sorted(own.keys() & best.keys())
    return gap_closed([own[u] for u in units], [best[u] for u in units], [0.0] * len(units))


def _mean(values: Mapping[str, float]) -> float:
    return math.fsum(values.values()) / len(values) if values else 0.0


# -- in words ------------------------------------------------------------------------------


def verdict_of(states: Sequence[State]) -> str:
    """Of all budgets together.

    >>> verdict_of(["better", "better"]), verdict_of(["better", "undecided"])
    ('learned', 'learned in part')
    >>> verdict_of(["no better"]), verdict_of(["no better", "undecided"])
    ('no better', 'undecided')
    """
    if set(states) == {"better"}:
        return "learned"
    if "better" in states:
        return "learned in part"
    return "no better" if set(states) == {"no better"} else "undecided"


def headline(verdict: str, budgets: Sequence[BudgetProof], prompts: int) -> str:
    """The verdict against training-free rankings."""
    mixed = len({own.state for own in budgets}) > 1
    seen = ", ".join(
        f"{number(own.mean(JUDGED))} against {number(own.mean(own.best))} of {own.best} at "
        f"{own.name} ({f'{own.state}, ' if mixed else ''}{closed(own.gap)}, p {number(own.p)})"
        for own in budgets
    )
    start = {
        "learned": "Learned: less regret than the best training-free ranking",
        "learned in part": "Learned in part: less regret than the best training-free ranking at "
        "some budgets",
        "no better": "No better than the best training-free ranking",
        "undecided": "Undecided against the best training-free ranking",
    }[verdict]
    needed = [own.needed for own in budgets if own.needed]
    more = f"; about {max(needed)} prompts would do" if needed else ""
    return f"{start} on {several(prompts, 'held-out prompt')}: {seen}{more}."


def linear_words(budgets: Sequence[BudgetProof]) -> str:
    """Whether the network earns its keep, without a full stop."""
    if budgets[0].linear is None:
        return "No linear student was given (--linear), so it is open whether it would do as well"
    better = [own.name for own in budgets if own.linear_p <= ALPHA and own.linear.gain > 0]
    worse = [own.name for own in budgets if own.linear_p <= ALPHA and own.linear.gain < 0]
    if not better:
        more = f", and better at {', '.join(worse)}" if worse else ""
        return f"The linear student does as well{more}: use that one"
    rest = [own.name for own in budgets if own.name not in better]
    gains = ", ".join(f"{signed(own.linear.gain)} at {own.name}" for own in budgets)
    more = f" and not at {', '.join(rest)}" if rest else ""
    return f"It is better than the linear student at {', '.join(better)}{more} (regret {gains})"


def skill_words(budgets: Sequence[BudgetProof]) -> str:
    """Whether it does more than to keep what is new, without a full stop."""
    known = [own for own in budgets if own.skill is not None]
    if not known:
        return "recency drops nothing that is wanted, so skill beyond it cannot be said"
    better = [own.name for own in known if own.skill_p <= ALPHA and own.skill.gain > 0]
    seen = ", ".join(
        f"{number(own.mean(JUDGED, SKILL))} at {own.name}, chance {number(own.mean(RANDOM, SKILL))}"
        for own in known
    )
    if not better:
        return f"no skill beyond recency is shown (of what that drops it keeps {seen})"
    return (
        f"it has skill beyond recency at {', '.join(better)} (of what that drops it keeps {seen})"
    )


def on_policy_words(budgets: Sequence[BudgetProof]) -> str:
    """What its own decisions cost it."""
    known = [own for own in budgets if own.ratio.value is not None]
    if not known:
        return "Its regret is 0 on the memories of the teacher, so nothing can be said of its own."
    seen = ", ".join(
        f"{ranged(own.ratio.value, own.ratio.low, own.ratio.high)} at {own.name}" for own in known
    )
    fine = all(own.ratio.value <= ALLOWED for own in known)
    return (
        f"On its own memories the regret is {seen} times that on the teacher's, "
        f"{'within' if fine else 'above'} the {ALLOWED} that are allowed."
    )


def closed(gap: Quotient) -> str:
    """The share of the gap to the oracle that is closed, in words."""
    if gap.value is None:
        return "there is no gap to the oracle"
    if gap.value <= 0:
        return "none of the gap to the oracle closed"
    ends = "" if gap.low is None else f" [{percent(gap.low, 1)}, {percent(gap.high, 1)}]"
    return f"{percent(gap.value, 1)}{ends} of the gap to the oracle closed"


def warn_taught(source: ScorerSource, prompts: Collection[str]) -> None:
    """Say which prompts of a proof a scorer was taught on; the first rank does.

    Args:
        source: The scorer.
        prompts: Keys of the prompts.
    """
    both = [key for key in source.scorer.prompts if key in prompts]
    if both and is_first():
        warnings.warn(taught_words(source.path.name, both, [JUDGED]), stacklevel=2)


# -- tables --------------------------------------------------------------------------------

HEADS = (
    *("ranking", "regret", "on-policy", "scorer gains", "p"),
    *("recall", "beyond recency", "ndcg", "worst heads", "output error", "output regret"),
)


def sections(found: ScorerProof) -> list[Section]:
    """Of the page and the terminal."""
    outputs = any(row.teacher_led["output_error"][0] is not None for row in found.budgets[0].rows)
    heads = HEADS if outputs else HEADS[:-2]
    return [
        Section(
            f"Memories of {own.name}",
            own.words,
            heads,
            tuple(cells(row)[: len(heads)] for row in own.rows),
        )
        for own in found.budgets
    ]


def cells(row: RankingRow) -> tuple[str, ...]:
    """A row of the table, as text."""
    own, other = row.teacher_led, row.against
    gain = ("", "")
    if other is not None and row.ranking != ORACLE:
        gain = (ranged(other.gain, other.low, other.high, signed), number(other.p))
    more = (own[name][0] for name in ("recall", SKILL, "ndcg"))
    outputs = (own[name][0] for name in ("output_error", "output_regret"))
    return (
        row.ranking,
        shown(own[REGRET]),
        plain(row.scorer_led[REGRET][0]),
        *gain,
        *(plain(value) for value in (*more, row.worst, *outputs)),
    )


def shown(value: Value) -> str:
    """A value and its interval."""
    return "" if value[0] is None else ranged(*value)


def plain(value: float | None) -> str:
    """A value, if there is one."""
    return "" if value is None else number(round(value, 9))
