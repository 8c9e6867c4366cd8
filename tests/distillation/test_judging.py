"""Measures of rankings against loops, every random set, and torchmetrics' own; sums over shards."""

import math
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torchmetrics.functional.retrieval import retrieval_normalized_dcg

sys.path.insert(0, str(Path(__file__).parent))
from random_lists import random_lists

from lightning_kv.distillation.judging import ListMetric, cuts_of
from lightning_kv.distillation.lists import concatenated

L, H, BUDGETS = 3, 4, (1, 3, 6)
NAMES = {"mass", "regret", "recall", "age_residual_recall", "ndcg", "output_error", "output_regret"}


def metric(budgets=BUDGETS, **given):
    return ListMetric(budgets, layers=L, heads=H, **({"outputs": True} | given))


def judged(lists, scores, **given):
    made = metric(**given)
    made.update(scores, lists)
    return made


def scores_of(lists, seed=5):
    return torch.randn(lists.candidate.shape, generator=torch.Generator().manual_seed(seed))


def oldest_wanted(lists):
    """Scores with the opposite order of recency."""
    return -torch.arange(lists.places).float().expand(lists.candidate.shape)


def subsets(lists, n, k):
    return [*combinations(lists.candidate[n].nonzero().flatten().tolist(), k)]


def by_hand(lists, scores, attention, k):
    """Each measure in loops: what is above and below the line, and whose it is."""
    for n in range(len(lists)):
        places = lists.candidate[n].nonzero().flatten().tolist()
        if not 0 < k < len(places):
            continue
        order = sorted(places, key=lambda u: (-scores[n, u].item(), u))
        t = {u: lists.target[n, u].item() for u in places}
        ideal = sorted(places, key=lambda u: (-t[u], u))
        total = sum(t.values()) or 1.0
        kept, best, newest = set(order[:k]), set(ideal[:k]), set(places[-k:])
        have, most = (sum(t[u] for u in own) / total for own in (kept, best))
        every = [sum(t[u] for u in own) / total for own in subsets(lists, n, k)]
        chance = sum(every) / len(every)
        wanted = {u for u in best if t[u] > 0}
        gain, ideal_gain = (
            sum(t[u] / math.log2(2 + i) for i, u in enumerate(own[:k])) for own in (order, ideal)
        )

        def error(places, n=n):
            mask = torch.zeros_like(lists.candidate)
            mask[n, list(places)] = True
            return attention.error(mask)[n].item()

        yield (
            n,
            {
                "mass": (have, most),
                "regret": (most - have, most - chance),
                "recall": (len(kept & wanted) / len(wanted), 1) if wanted else (0, 0),
                "age_residual_recall": (len(kept & (wanted - newest)), len(wanted - newest)),
                "ndcg": (gain / ideal_gain, 1) if ideal_gain else (0, 0),
                "output_error": (error(kept), error(())),
            },
        )


def ratio(parts, lists):
    above = sum(lists.weight[n].item() * own[0] for n, own in parts)
    below = sum(lists.weight[n].item() * own[1] for n, own in parts)
    return above / below if below else math.nan


def close(found, expected):
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)


def test_measures_are_those_of_loops():
    lists, attention = random_lists(count=60)
    scores = scores_of(lists)
    made = judged(lists, scores)
    found = made.compute()
    for k in BUDGETS:
        hand = [*by_hand(lists, scores, attention, k)]
        for name in NAMES - {"output_regret"}:
            own = [(n, parts[name]) for n, parts in hand]
            close(found[f"{name}@{k}"], ratio(own, lists))


def test_gain_is_that_of_torchmetrics():
    lists, _ = random_lists(full=True)
    scores = scores_of(lists)
    for k in (1, 3, 6):
        each = [
            retrieval_normalized_dcg(scores[n], lists.target[n], top_k=k) for n in range(len(lists))
        ]
        every = replace(lists, weight=torch.ones_like(lists.weight))
        close(judged(every, scores).compute()[f"ndcg@{k}"], torch.stack(each).mean().item())


def test_the_oracle_has_no_regret_and_the_mean_random_ranking_all_of_it():
    lists, attention = random_lists(count=100, places=9)
    lists = replace(lists, target=attention.greedy(lists.candidate))
    found = judged(lists, lists.target.masked_fill(~lists.candidate, torch.nan)).compute()
    for k in BUDGETS:
        assert found[f"regret@{k}"] == found[f"output_regret@{k}"] == 0
        assert found[f"worst_regret@{k}"] == 0
        for name in ("mass", "recall", "ndcg", "age_residual_recall"):
            assert found[f"{name}@{k}"] == pytest.approx(1)
    made, cuts = metric(), cuts_of(lists, BUDGETS, outputs=True)
    for seed in range(200):
        made.update(scores_of(lists, seed), lists, cuts)
    for k in BUDGETS:
        assert made.compute()[f"regret@{k}"] == pytest.approx(1, abs=0.03)
        assert made.compute()[f"output_regret@{k}"] == pytest.approx(1, abs=0.06)


def test_random_sets_are_the_mean_of_all_sets():
    """Over lists: 16 sets of each stand for all 35."""
    lists, attention = random_lists(count=400, full=True)
    (cut,) = cuts_of(lists, [3], outputs=True)
    every = []
    for places in combinations(range(7), 3):
        kept = torch.zeros_like(lists.candidate)
        kept[:, list(places)] = True
        every.append(attention.error(kept))
    chance, spread = torch.stack(every).mean(0), torch.stack(every).std(0)
    away = (cut.errors[1] - chance) / (spread / math.sqrt(16))
    assert away.mean().abs() < 4 / math.sqrt(400)
    assert 0.8 < away.std() < 1.2
    half = cuts_of(lists.select(slice(200, 400)).padded(9), [3], outputs=True)[0].errors
    torch.testing.assert_close(half, cut.errors[:, 200:])  # whatever the batch and its padding


def test_recency_has_no_recall_beyond_recency():
    lists, _ = random_lists(count=80)
    newest, oldest = (judged(lists, sign * oldest_wanted(lists)).compute() for sign in (-1, 1))
    for k in (1, 3):
        assert newest[f"age_residual_recall@{k}"] == 0 < newest[f"recall@{k}"]
        assert oldest[f"age_residual_recall@{k}"] > 0.1


def test_the_worst_heads_are_a_twentieth_of_all():
    lists, _ = random_lists(count=900, full=True)
    lists = replace(lists, layer=torch.arange(900) % 5, head=torch.arange(900) // 5 % 9)
    made = ListMetric([3], layers=5, heads=9)
    made.update(scores_of(lists), lists)
    above, below = made.sums[made.names.index("regret"), :, 0]
    each = (above / below).sort(descending=True).values
    close(made.compute()["worst_regret@3"], each[:3].mean().item())  # 3 of 45, 2.25 rounded up


def test_lists_with_nothing_to_decide_have_no_part_in_it():
    lists, _ = random_lists(count=60)
    enough = lists.candidate.sum(-1) > 3
    some = lists.select(enough)
    scores = scores_of(lists)
    whole = judged(lists, scores, budgets=(3,)).compute()
    alone = judged(some, scores[enough], budgets=(3,)).compute()
    assert 0 < enough.sum() < 60 and whole.keys() == alone.keys()
    for name in whole:
        close(whole[name], alone[name].item())
    none = judged(lists.select(slice(0, 0)), scores[:0]).compute()
    assert all(value.isnan() for value in none.values())
    nothing = judged(lists, scores, budgets=(7,)).compute()
    assert all(value.isnan() for value in nothing.values())


def test_a_list_counts_by_its_weight():
    lists, _ = random_lists(count=30)
    scores = scores_of(lists)
    twice = judged(
        concatenated([lists, lists.select(slice(0, 9))]), torch.cat([scores, scores[:9]])
    )
    weight = lists.weight.clone()
    weight[:9] *= 2
    once = judged(replace(lists, weight=weight), scores)
    for name, value in twice.compute().items():
        close(once.compute()[name], value.item())


def test_sums_over_uneven_shards_are_those_of_the_whole():
    lists, _ = random_lists(count=61)
    scores, whole = scores_of(lists), metric()
    whole.update(scores, lists)
    ranks = []
    for rank in range(3):
        own = metric()
        index = torch.arange(rank, 61, 3)
        for batch in index.split((4, 7, 1)[rank]) if rank < 2 else ():  # the third has nothing
            own.update(scores[batch], lists.select(batch))
        ranks.append(own)
    ranks[2].update(scores[2::3], lists.select(torch.arange(2, 61, 3)))
    idle, total = metric(), metric()
    for own in (*ranks, idle):
        total.merge_state(own)
    assert torch.allclose(total.sums, whole.sums, rtol=1e-12, atol=1e-14)
    one, other = total.compute(), whole.compute()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-12, equal_nan=True)


def test_tables_are_over_all_ranks():
    """With a gathering that pretends there are two ranks, the other with other lists."""
    lists, _ = random_lists(count=40)
    scores, half = scores_of(lists), (slice(0, 13), slice(13, 40))
    other = judged(lists.select(half[1]), scores[half[1]])

    def gather(value, group=None):
        return [value, other.sums]

    one = metric(dist_sync_fn=gather, distributed_available_fn=lambda: True)
    one.update(scores[half[0]], lists.select(half[0]))
    whole = judged(lists, scores)
    found, expected = one.compute(), whole.compute()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], equal_nan=True)
    assert not torch.allclose(one.sums, whole.sums)  # what it holds itself is its own again


def test_without_outputs_nothing_is_said_of_them():
    lists, _ = random_lists()
    bare = replace(lists, share=None, gram=None, query=None)
    found = judged(bare, scores_of(lists), outputs=False).compute()
    assert {name.partition("@")[0] for name in found} == {
        "worst_regret", *(name for name in NAMES if not name.startswith("output"))
    }  # fmt: skip
    with pytest.raises(ValueError, match="no outputs of later queries"):
        judged(bare, scores_of(lists))


def test_scores_without_order_are_refused():
    lists, _ = random_lists(count=20)
    scores = scores_of(lists).masked_fill(~lists.candidate, torch.nan)
    judged(lists, scores)
    scores[lists.candidate.any(-1).nonzero()[:2, 0], 0] = torch.nan
    with pytest.raises(ValueError, match="Of 20 lists 2 were given scores with NaN"):
        judged(lists, scores)


def test_lists_of_another_model_are_refused():
    lists, _ = random_lists()
    for name, count in (("layer", L), ("head", H)):
        wrong = replace(lists, **{name: getattr(lists, name) + 1})
        said = f"made for {count} {name}s, counted from 0, and lists have numbers from 1 to {count}"
        with pytest.raises(ValueError, match=said):
            judged(wrong, scores_of(lists))
