"""Losses against loops and closed forms; the soft cut against finite differences."""

import math
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from random_lists import random_lists

from lightning_kv.distillation.losses import (
    Threshold,
    cut_aware,
    hard_top,
    listwise,
    output_error,
    output_loss,
    residual_penalty,
    soft_top,
)

LOSSES = {
    "listwise": lambda scores, lists, k: listwise(scores, lists, 2.0),
    "cut_aware": cut_aware,
    "output": lambda scores, lists, k: output_loss(scores, lists, k, 0.5),
}


def scores_of(lists, seed=5):
    return torch.randn(lists.candidate.shape, generator=torch.Generator().manual_seed(seed))


def budgets_of(lists, most=8, seed=6):
    return torch.randint(most, (len(lists),), generator=torch.Generator().manual_seed(seed))


def test_the_hard_top_is_that_of_a_sort():
    lists, _ = random_lists()
    scores, k = scores_of(lists).mul(2).round(), budgets_of(lists)  # with many ties
    scores[3, :4] = -torch.inf
    kept = hard_top(scores.masked_fill(~lists.candidate, torch.nan), lists.candidate, k)
    for n in range(len(lists)):
        places = lists.candidate[n].nonzero().flatten().tolist()
        best = sorted(places, key=lambda u: (-scores[n, u].item(), u))[: k[n]]
        assert kept[n].nonzero().flatten().tolist() == sorted(best)


def test_ties_go_to_the_earlier_place_and_never_to_what_is_no_candidate():
    candidate = torch.arange(200) % 2 == 1
    for tie in (0.0, -torch.inf):
        kept = hard_top(torch.full((1, 200), tie), candidate.unsqueeze(0), torch.tensor([30]))
        assert kept.nonzero()[:, 1].tolist() == list(range(1, 60, 2))


def test_the_error_of_a_kept_set_is_that_of_attention_over_it():
    lists, attention = random_lists(full=True)
    for kept in (hard_top(scores_of(lists), lists.candidate, budgets_of(lists)), lists.candidate):
        torch.testing.assert_close(
            output_error(lists, kept), attention.error(kept), rtol=1e-3, atol=1e-6
        )
    assert output_error(lists, lists.candidate).max() < 1e-6  # all of them: no error
    some, other = random_lists()
    pad = torch.nn.functional.pad(~some.candidate, (0, 1))
    rubbish = replace(
        some,
        share=some.share.masked_fill(pad.unsqueeze(1), 0.5),
        gram=some.gram.masked_fill(pad[:, None, :, None], 1.0),
    )
    found = output_error(rubbish, torch.ones_like(some.candidate))
    torch.testing.assert_close(found, other.error(some.candidate), rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="hold targets, and no outputs"):
        output_error(replace(lists, share=None, gram=None, query=None), kept)


def test_the_value_of_the_output_loss_is_that_of_the_hard_set():
    lists, attention = random_lists()
    scores, k = scores_of(lists), budgets_of(lists)
    none = attention.error(torch.zeros_like(lists.candidate))
    expected = attention.error(hard_top(scores, lists.candidate, k)) / none
    expected[~lists.candidate.any(-1)] = 0.0
    for tau in (1.0, 0.1):
        found = output_loss(scores, lists, k, tau).double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_the_gradient_of_the_output_loss_is_that_of_the_error_through_the_soft_set():
    lists, _ = random_lists(full=True)
    scores, k = scores_of(lists).requires_grad_(), budgets_of(lists)
    (found,) = torch.autograd.grad(output_loss(scores, lists, k, 0.5).sum(), scores)
    hard = hard_top(scores, lists.candidate, k).double().requires_grad_()
    mask = torch.nn.functional.pad(hard, (0, 1), value=1.0)
    last = torch.nn.functional.pad(torch.zeros_like(hard), (0, 1), value=1.0)

    def error(m):
        square = torch.einsum("nu,nruv,nv->nr", m, lists.gram.double(), m)
        each = square / torch.einsum("nru,nu->nr", lists.share.double(), m).square()
        return (each * lists.query).sum(-1) / lists.query.sum(-1)

    (at_hard,) = torch.autograd.grad((error(mask) / error(last)).sum(), hard)
    soft = soft_top(scores.double(), lists.candidate, k, 0.5)
    (expected,) = torch.autograd.grad(soft, scores, at_hard)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tau", [1.0, 0.1, 1e-3])
def test_the_soft_set_sums_to_the_budget(dtype, tau):
    lists, _ = random_lists(count=200, places=12)
    k, count = budgets_of(lists, 13), lists.candidate.sum(-1)
    for scale in (1e-4, 1.0, 50.0):
        scores = scores_of(lists).to(dtype) * scale
        scores[::3] = scores[::3].round()  # ties, of all candidates too
        soft = soft_top(scores, lists.candidate, k, tau)
        assert soft.dtype == dtype and (soft[~lists.candidate] == 0).all()
        assert (soft.double().sum(-1) - torch.minimum(k, count)).abs().max() < 1e-6


def test_the_gradient_of_the_threshold_is_that_of_finite_differences():
    lists, _ = random_lists(count=12)
    scores, k = scores_of(lists).double(), budgets_of(lists)
    for tau in (1.0, 0.2):
        wide = scores.clone().requires_grad_()
        theta = Threshold.apply(wide, lists.candidate, k, tau)
        (found,) = torch.autograd.grad(theta.sum(), wide)
        for u in range(lists.places):
            moved = []
            for step in (1e-5, -1e-5):
                other = scores.clone()
                other[:, u] += step
                moved.append(Threshold.apply(other, lists.candidate, k, tau))
            slope = (moved[0] - moved[1]) / 2e-5
            torch.testing.assert_close(found[:, u], slope, rtol=1e-6, atol=1e-8)
        cut = (k > 0) & (k < lists.candidate.sum(-1))
        torch.testing.assert_close(found.sum(-1), cut.double())  # all scores up by 1: so is theta


def test_the_gradient_of_the_soft_set_is_that_of_finite_differences():
    lists, _ = random_lists(count=10)
    scores, k = scores_of(lists).double().requires_grad_(), budgets_of(lists)
    for tau in (1.0, 0.2):
        assert torch.autograd.gradcheck(
            lambda x, tau=tau: soft_top(x, lists.candidate, k, tau), scores
        )


def test_a_cut_without_softness_is_refused():
    lists, _ = random_lists(count=3)
    with pytest.raises(ValueError, match=r"cannot be 0.0 soft. Give a tau above 0"):
        soft_top(scores_of(lists), lists.candidate, budgets_of(lists), 0.0)


def test_the_listwise_loss_is_a_cross_entropy():
    lists, _ = random_lists()
    scores = scores_of(lists)
    for tau in (1.0, 2.0):
        found = listwise(scores, lists, tau)
        for n, line in enumerate(lists.candidate):
            target = lists.target[n, line] ** (1 / tau)
            expected = 0.0
            if target.sum() > 0:
                expected = torch.nn.functional.cross_entropy(scores[n, line], target / target.sum())
            torch.testing.assert_close(found[n], torch.as_tensor(expected))


def test_the_ranking_loss_is_a_sum_over_pairs_across_the_cut():
    lists, _ = random_lists()
    scores, k = scores_of(lists), budgets_of(lists)
    top, found = hard_top(lists.target, lists.candidate, k), cut_aware(scores, lists, k)
    for n in range(len(lists)):
        above, below = 0.0, 0.0
        for i in top[n].nonzero().flatten().tolist():
            for j in (lists.candidate[n] & ~top[n]).nonzero().flatten().tolist():
                cost = float(lists.target[n, i] - lists.target[n, j])
                above += cost * math.log1p(math.exp(float(scores[n, j] - scores[n, i])))
                below += cost
        assert found[n].item() == pytest.approx(above / below if below else 0.0, rel=1e-4)


def test_the_penalty_is_a_mean_over_candidates():
    lists, _ = random_lists()
    residual = scores_of(lists)
    found = residual_penalty(residual.masked_fill(~lists.candidate, torch.nan), lists.candidate)
    for n, line in enumerate(lists.candidate):
        expected = residual[n, line].square().mean() if line.any() else torch.tensor(0.0)
        torch.testing.assert_close(found[n], expected)


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_no_candidate_changes_no_loss_and_no_gradient(name):
    lists, _ = random_lists()
    k, found = budgets_of(lists), []
    for rubbish in (0.0, -torch.inf, torch.nan, 1e9):
        scores = scores_of(lists).masked_fill(~lists.candidate, rubbish).requires_grad_()
        loss = LOSSES[name](scores, lists, k)
        loss.sum().backward()
        found.append((loss.detach(), scores.grad))
        assert loss.isfinite().all() and scores.grad.isfinite().all()
        assert (scores.grad[~lists.candidate] == 0).all()
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(gradient, found[0][1])


@pytest.mark.parametrize("name", ["listwise", "cut_aware"])
def test_lists_that_are_worth_nothing_teach_nothing(name):
    lists, _ = random_lists()
    lists = replace(lists, target=torch.zeros_like(lists.target))
    scores = scores_of(lists).requires_grad_()
    loss = LOSSES[name](scores, lists, budgets_of(lists))
    loss.sum().backward()
    assert (loss == 0).all() and (scores.grad == 0).all()


def test_an_output_that_underflows_is_no_nan():
    lists, _ = random_lists(full=True)
    lists = replace(lists, share=lists.share * 0, gram=lists.gram * 0)
    scores = scores_of(lists).requires_grad_()
    output_loss(scores, lists, budgets_of(lists), 1.0).sum().backward()
    assert (scores.grad == 0).all()


def test_descending_the_output_loss_finds_good_sets():
    lists, attention = random_lists(count=60, places=6, full=True, seed=3)
    k, scores = torch.full((60,), 2), torch.zeros(60, 6, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.1)
    for step in range(150):
        optimizer.zero_grad()
        output_loss(scores, lists, k, tau=10 ** (-step / 150)).sum().backward()
        optimizer.step()
    errors = []
    for pair in combinations(range(6), 2):
        kept = torch.zeros(60, 6, dtype=torch.bool)
        kept[:, list(pair)] = True
        errors.append(attention.error(kept))
    errors = torch.stack(errors)
    best, chance = errors.amin(0).sum(), errors.mean(0).sum()
    found = attention.error(hard_top(scores, lists.candidate, k)).sum()
    assert (found - best) / (chance - best) < 0.25, (found, best, chance)
