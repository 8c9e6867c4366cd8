"""How well an order of frames serves lists: what it keeps of their worth, and what outputs lose.

A budget k is the number of candidates that a list keeps; ``own`` is that of the rollout that the
list is from. Every measure is a ratio of two sums over lists, so it is the same however lists are
spread over batches and ranks; lists with nothing to decide (k is 0, or all candidates) have no part
in it. Sums are kept by head.

Shapes: N lists, U places of a list, B budgets, M measures, L layers, H heads of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_kv.cache.table import summed
from lightning_kv.distillation.lists import Lists
from lightning_kv.distillation.losses import output_error, ranks

OWN = "own"
"""The budget of the rollout that a list is from."""
DRAWS = 16  # random sets of a list that stand for all
WORST = 0.05  # share of heads


class Ratio(NamedTuple):
    """What each list adds above and below the line, float64 ``[N]``."""

    above: Tensor
    below: Tensor


@dataclass(frozen=True, eq=False)
class Cut:
    """What a budget makes of lists, whoever ranks their frames.

    Args:
        k: int64 ``[N]``: candidates that are kept.
        candidate: bool ``[N, U]``.
        worth: float64 ``[N, U]``: targets as shares of their sum; 0 where all targets are 0.
        ideal: int64 ``[N, U]``: ranks of the targets.
        newest: bool ``[N, U]``: the k newest candidates.
        errors: float64 ``[3, N]``: squared output errors of keeping the k highest targets, as the
            oracle does, of a random set (mean over :data:`DRAWS`, which depend on clip, layer and
            head alone), and of keeping nothing; None without outputs.
    """

    k: Tensor
    candidate: Tensor
    worth: Tensor
    ideal: Tensor
    newest: Tensor
    errors: Tensor | None

    @property
    def best(self) -> Tensor:
        """What the oracle keeps, bool ``[N, U]``."""
        return self.top(self.ideal)

    def top(self, rank: Tensor) -> Tensor:
        """What a ranking keeps, bool ``[N, U]``."""
        return (rank < self.k.unsqueeze(-1)) & self.candidate

    def ratio(self, above: Tensor, below: Tensor) -> Ratio:
        """Both sides of the lists in which there is something to decide, 0 of the others."""
        count = self.candidate.sum(-1)
        decides = ((count > self.k) & (self.k > 0)).double()
        return Ratio(above.double() * decides, below.double() * decides)


def cuts_of(lists: Lists, budgets: Sequence[int | str], outputs: bool = False) -> list[Cut]:
    """What each budget makes of lists; once for all rankings that are judged on them.

    Args:
        lists: With targets.
        budgets: Candidates that are kept, for each cut; ``own`` for those of the rollout.
        outputs: Whether errors of outputs are wanted, which take longest.

    Raises:
        ValueError: Outputs are wanted of lists that have none.
    """
    target = lists.target.double().masked_fill(~lists.candidate, 0.0)
    total = target.sum(-1, keepdim=True)
    worth = target / torch.where(total > 0, total, 1.0)
    ideal = ranks(lists.target, lists.candidate)
    place = torch.arange(lists.places, device=ideal.device).double().expand_as(target)
    age = ranks(place, lists.candidate)
    noise = [
        ranks(random_scores(lists, n), lists.candidate) for n in range(DRAWS if outputs else 0)
    ]
    found = []
    for budget in budgets:
        k = lists.keep if budget == OWN else torch.full_like(lists.keep, budget)
        newest = (age < k.unsqueeze(-1)) & lists.candidate
        one = Cut(k, lists.candidate, worth, ideal, newest, None)
        if outputs:
            sets = [one.best, torch.zeros_like(one.best), *(one.top(rank) for rank in noise)]
            best, none, *random = output_error(lists, torch.stack(sets))
            errors = [best, torch.stack(random).mean(0), none]
            one = replace(one, errors=torch.stack(errors))
        found.append(one)
    return found


def random_scores(lists: Lists, draw: int = -1) -> Tensor:
    """Scores without sense, ``[N, U]``, the same for a list in whatever batch it comes.

    Args:
        lists: Told apart by clip, layer and head.
        draw: Other numbers give other scores.
    """
    place = torch.arange(lists.places, device=lists.layer.device)
    seed = torch.full_like(lists.layer, draw)
    for part in (lists.clip, lists.layer, lists.head):
        seed = _scrambled(seed + part)
    return _scrambled(seed.unsqueeze(1) + place).double()


def _scrambled(x: Tensor) -> Tensor:
    """Each int64 to another without pattern, as SplitMix64 does; products wrap around.

    Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    x = x - 0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x


# -- measures ------------------------------------------------------------------------------


def kept_mass(rank: Tensor, cut: Cut) -> Ratio:
    """Sum of the targets kept, relative to that of the oracle; each list's targets sum to 1.

    Args:
        rank: int64 ``[N, U]``, see :func:`~lightning_kv.distillation.losses.ranks`.
        cut: Of the same lists.
    """
    return cut.ratio(_worth(cut, cut.top(rank)), _worth(cut, cut.best))


def regret(rank: Tensor, cut: Cut) -> Ratio:
    """(oracle - kept) / (oracle - random) of sums of targets: 0 is the oracle, 1 is chance.

    A random set keeps ``k / n`` of the sum of n candidates on average. The part of the gap that a
    ranking closes which another leaves open is 1 minus the ratio of their regrets.

    Args:
        rank: int64 ``[N, U]``.
        cut: Of the same lists; each list's targets sum to 1.
    """
    best = _worth(cut, cut.best)
    random = cut.worth.sum(-1) * cut.k / cut.candidate.sum(-1).clamp_min(1)
    return cut.ratio(best - _worth(cut, cut.top(rank)), best - random)


def recall(rank: Tensor, cut: Cut) -> Ratio:
    """Share of the frames wanted that are kept, mean over lists.

    Wanted are the k candidates with the highest targets, as far as these are above 0.

    Args:
        rank: int64 ``[N, U]``.
        cut: Of the same lists.
    """
    wanted = cut.best & (cut.worth > 0)
    count = wanted.sum(-1)
    return cut.ratio((cut.top(rank) & wanted).sum(-1) / count.clamp_min(1), count > 0)


def age_residual_recall(rank: Tensor, cut: Cut) -> Ratio:
    """Recall of what recency drops: skill that is not a matter of age.

    Of the frames wanted (as in :func:`recall`) those count, over all lists together, that are not
    among the k newest candidates; the measure is the share of these that is kept. A ranking by
    recency has 0, the oracle 1, a random one about k / n.

    Args:
        rank: int64 ``[N, U]``.
        cut: Of the same lists.
    """
    old = cut.best & (cut.worth > 0) & ~cut.newest
    return cut.ratio((cut.top(rank) & old).sum(-1), old.sum(-1))


def ndcg(rank: Tensor, cut: Cut) -> Ratio:
    """Discounted gain of the first k over the best there is, gains as the targets; mean over lists.

    ``sum t / log2(2 + rank)`` over the ranks 0 to k - 1 (Järvelin and Kekäläinen, Cumulated
    gain-based evaluation of IR techniques, TOIS 2002).

    Args:
        rank: int64 ``[N, U]``.
        cut: Of the same lists.
    """
    gain, most = (
        (cut.worth / (2.0 + own.double()).log2()).masked_fill(~cut.top(own), 0.0).sum(-1)
        for own in (rank, cut.ideal)
    )
    return cut.ratio(gain / torch.where(most > 0, most, 1.0), most > 0)


def relative_output_error(error: Tensor, cut: Cut) -> Ratio:
    """Squared error of outputs, relative to that of keeping nothing.

    Both are summed over lists as they are: lists count by what there is to lose.

    Args:
        error: float64 ``[N]``, see :func:`~lightning_kv.distillation.losses.output_error`.
        cut: Of the same lists, with outputs.
    """
    return cut.ratio(error, cut.errors[2])


def output_regret(error: Tensor, cut: Cut) -> Ratio:
    """(kept - oracle) / (random - oracle) of squared errors of outputs; below 0: better.

    Args:
        error: float64 ``[N]``.
        cut: Of the same lists, with outputs.
    """
    best, random, _ = cut.errors
    return cut.ratio(error - best, random - best)


def _worth(cut: Cut, kept: Tensor) -> Tensor:
    return cut.worth.masked_fill(~kept, 0.0).sum(-1)


RANKED: dict[str, Callable[[Tensor, Cut], Ratio]] = {
    "mass": kept_mass,
    "regret": regret,
    "recall": recall,
    "age_residual_recall": age_residual_recall,
    "ndcg": ndcg,
}
OUTPUTS: dict[str, Callable[[Tensor, Cut], Ratio]] = {
    "output_error": relative_output_error,
    "output_regret": output_regret,
}


# -- over many lists -----------------------------------------------------------------------


class ListMetric(Metric):
    """All measures of one ranking at some budgets: ``mass@4``, ``regret@4``, and so on.

    States are sums, so that any number of ranks with any number of lists each give the same. A
    measure without a list that it could be said of is NaN. Beside the measures above
    ``worst_regret@k``: the mean regret of the worst 5 % of the heads, of one at least.

    Args:
        budgets: Candidates that are kept; ``own`` for those of the rollout.
        layers: Of the model.
        heads: Of a layer.
        outputs: Whether outputs are judged; then lists must hold them.
        kwargs: Of ``torchmetrics.Metric``.

    Example:
        >>> metric = ListMetric([2], layers=1, heads=1)
        >>> one = torch.tensor([0])
        >>> lists = Lists(
        ...     torch.zeros(1, 4, 1), torch.zeros(1, 1), torch.ones(1, 4, dtype=torch.bool),
        ...     torch.tensor([[0.5, 0.5, 0.0, 0.0]]), one, one, one, torch.ones(1), one,
        ... )
        >>> metric.update(torch.tensor([[3.0, 0.0, 2.0, 1.0]]), lists)
        >>> {name: value.item() for name, value in metric.compute().items() if "a" in name}
        {'mass@2': 0.5, 'recall@2': 0.5, 'age_residual_recall@2': 0.5}
    """

    full_state_update = False
    sums: Tensor

    def __init__(
        self,
        budgets: Sequence[int | str],
        *,
        layers: int,
        heads: int,
        outputs: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.budgets, self.layers, self.heads = tuple(budgets), layers, heads
        self.outputs = outputs
        self.names = (*RANKED, *(OUTPUTS if outputs else ()))
        shape = (len(self.names), 2, len(self.budgets))
        empty = torch.zeros(*shape, layers * heads, dtype=torch.float64)
        self.add_state("sums", empty, dist_reduce_fx="sum")

    def update(self, scores: Tensor, lists: Lists, cuts: Sequence[Cut] | None = None) -> None:
        """Add lists.

        Args:
            scores: ``[N, U]``: the higher, the longer a frame stays.
            lists: That were scored.
            cuts: Of these lists, from :func:`cuts_of`, where several rankings are judged on them.

        Raises:
            ValueError: Lists are of layers or heads that there are not, or have NaN scores.
        """
        self._check(scores, lists)
        cuts = cuts or cuts_of(lists, self.budgets, self.outputs)
        rank = ranks(scores, lists.candidate)
        pairs = [[torch.stack(RANKED[name](rank, own)) for own in cuts] for name in RANKED]
        if self.outputs:
            errors = output_error(lists, torch.stack([own.top(rank) for own in cuts]))
            pairs += [
                [torch.stack(OUTPUTS[name](*own)) for own in zip(errors, cuts, strict=True)]
                for name in OUTPUTS
            ]
        values = torch.stack([torch.stack(own, 1) for own in pairs])  # [M, 2, B, N]
        values = (values * lists.weight.double()).flatten(0, 2).T.unsqueeze(0)  # [1, N, M 2 B]
        head = lists.layer * self.heads + lists.head
        self.sums += self._added(values, head, self.layers * self.heads)

    def compute(self) -> dict[str, Tensor]:
        """Every measure at every budget, as ``NAME@k``."""
        found = {}
        whole, each = self.sums.sum(-1), self.sums[self.names.index("regret")]
        for place, k in enumerate(self.budgets):
            for name, (above, below) in zip(self.names, whole[..., place], strict=True):
                found[f"{name}@{k}"] = above / below
            found[f"worst_regret@{k}"] = _worst(*each[:, place])
        return found

    def _added(self, values: Tensor, bucket: Tensor, count: int) -> Tensor:
        """Sums by bucket, ``[M, 2, B, count]``."""
        total = summed(values, bucket.unsqueeze(0), count)[0].T
        return total.unflatten(0, (len(self.names), 2, len(self.budgets)))

    def _check(self, scores: Tensor, lists: Lists) -> None:
        """Refuse lists that have no place in the sums, and scores that rank nothing."""
        if wrong := int((scores.isnan() & lists.candidate).any(-1).sum()):
            raise ValueError(
                f"Of {len(lists)} lists {wrong} were given scores with NaN, which have no order. "
                "Give numbers; if a student made them, a lower learning rate may help it."
            )
        for name, count in (("layer", self.layers), ("head", self.heads)):
            own = getattr(lists, name)
            if len(own) and not 0 <= int(own.min()) <= int(own.max()) < count:
                raise ValueError(
                    f"This metric was made for {count} {name}s, counted from 0, and lists have "
                    f"numbers from {int(own.min())} to {int(own.max())}. Make it for as many as "
                    "the lists have."
                )


def _worst(above: Tensor, below: Tensor) -> Tensor:
    """Mean over the heads with the highest ratios; NaN where no head has one."""
    ratios = (above / below)[below > 0]
    return ratios.topk(math.ceil(WORST * len(ratios))).values.mean()
