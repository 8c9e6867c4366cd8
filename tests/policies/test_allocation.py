"""Rules that divide frames among heads: against brute force, other solvers and closed forms."""

import itertools
import math
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, isotonic_regression, milp

from lightning_kv.policies.allocation import (
    RULES,
    Heads,
    Knobs,
    allocate,
    decay,
    focused,
    logarithmic,
    matched,
    proportional,
    shuffled,
    uniform,
)
from lightning_kv.policies.budget.pyramid import pyramid
from lightning_kv.policies.knapsack import gap, greedy, in_levels, minorant, optimal, threshold
from lightning_kv.policies.tables import shipped

EXACT = [rule for rule in RULES if rule != "focused"]
EQUIVARIANT = ["focused", "focused-matched", "proportional", "log", "optimal", "greedy", "levels"]
PUBLISHED = torch.tensor(shipped()["focused-forcing-wan-1.3b"].rows, dtype=torch.float64)
seeds = st.integers(0, 10**6)


def drawn(seed, layers=2, heads=3, values=4, falling=False):
    """Curves and importances that look like noise."""
    generator = torch.Generator().manual_seed(seed)
    curves = torch.rand(layers, heads, values, generator=generator, dtype=torch.float64)
    if falling:
        curves = curves.sort(-1, descending=True).values
    return curves, torch.rand(layers, heads, generator=generator, dtype=torch.float64)


def loss(curves, budgets, low):
    return sum(
        curves[layer, head, budgets[layer, head] - low].item()
        for layer in range(curves.shape[0])
        for head in range(curves.shape[1])
    )


def brute(curves, total, low, levels=None):
    """The least loss over every way to give six heads their budgets."""
    costs = curves.flatten(0, 1).tolist()
    best = math.inf
    for own in itertools.product(range(curves.shape[2]), repeat=len(costs)):
        if sum(own) + low * len(costs) == total and len(set(own)) <= (levels or len(own)):
            best = min(best, sum(cost[b] for cost, b in zip(costs, own, strict=True)))
    return best


@settings(max_examples=12, deadline=None)
@given(seeds, st.integers(0, 18), st.booleans())
def test_optimal_is_what_brute_force_finds(seed, spare, falling):
    curves, _ = drawn(seed, falling=falling)
    found = optimal(curves, 6 * 2 + spare, 2)
    assert found.sum() == 12 + spare
    assert loss(curves, found, 2) == pytest.approx(brute(curves, 12 + spare, 2), abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(0, 18), st.booleans(), st.sampled_from([2, 3]))
@example(310434, 17, False, 3)  # 0, 1 and 3 cannot sum to 17 over six heads
def test_levels_are_what_brute_force_finds(seed, spare, falling, levels):
    curves, _ = drawn(seed, falling=falling)
    best = brute(curves, 12 + spare, 2, levels)
    if math.isinf(best):
        with pytest.raises(ValueError, match=r"sum to .* over 6 heads. Give more levels"):
            in_levels(curves, 12 + spare, 2, levels)
        return
    found = in_levels(curves, 12 + spare, 2, levels)
    assert found.sum() == 12 + spare and len(found.unique()) <= levels
    assert loss(curves, found, 2) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_optimal_is_what_an_integer_programme_finds(seed):
    """Twenty-four heads of nine budgets, by scipy's branch and bound."""
    curves, _ = drawn(seed, 4, 6, 9)
    costs, values = curves.flatten(0, 1).numpy(), np.arange(9)
    one_each = np.kron(np.eye(24), np.ones(9))
    spent = np.tile(values, 24)[None]
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(spent, 70, 70)]
    best = milp(costs.ravel(), integrality=1, bounds=Bounds(0, 1), constraints=limits)
    found = optimal(curves, 24 * 3 + 70, 3)
    assert loss(curves, found, 3) == pytest.approx(best.fun, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 9))
def test_the_minorant_is_the_isotonic_regression_of_the_increments(seed, values):
    """scipy's pool-adjacent-violators, summed up again."""
    curves, _ = drawn(seed, values=values)
    found = minorant(curves)
    for own, low in zip(curves.flatten(0, 1).numpy(), found.flatten(0, 1).numpy(), strict=True):
        steps = isotonic_regression(np.diff(own)).x
        expected = own[0] + np.concatenate([[0], np.cumsum(steps)])
        np.testing.assert_allclose(low, expected, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(0, 48), st.booleans())
def test_greedy_is_within_its_bound(seed, spare, falling):
    curves, _ = drawn(seed, values=9, falling=falling)
    total = 6 * 4 + spare
    best, quick = optimal(curves, total, 4), greedy(curves, total, 4)
    assert quick.sum() == total
    extra = loss(curves, quick, 4) - loss(curves, best, 4)
    assert -1e-12 <= extra <= gap(curves) + 1e-12


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 47))
def test_greedy_is_exact_on_convex_curves_and_every_gain_taken_is_worth_the_threshold(seed, spare):
    curves = minorant(drawn(seed, values=9)[0])
    total = 24 + spare
    best, quick = optimal(curves, total, 4), greedy(curves, total, 4)
    assert loss(curves, quick, 4) == pytest.approx(loss(curves, best, 4), abs=1e-12)
    last, gains = threshold(curves, quick, 4), -curves.diff(dim=-1)
    taken = torch.arange(8) < (quick - 4).unsqueeze(-1)
    assert gains[taken].min() >= last - 1e-12 >= gains[~taken].max() - 2e-12


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from(EXACT), st.floats(0, 1), st.integers(1, 6), st.integers(0, 9))
def test_every_rule_gives_the_total_within_the_limits(seed, rule, where, low, room):
    curves, importance = drawn(seed, 3, 4, room + 1)
    curves, mean = curves.sort(-1, descending=True).values, low + where * room
    of = Heads(3, 4, low, low + room, curves, importance)
    try:
        found = allocate(rule, mean, of)
    except ValueError as error:
        assert rule == "levels" and "Give more levels" in str(error)
        return
    assert found.shape == (3, 4) and found.dtype == torch.int64
    assert found.sum() == round(12 * mean)
    assert found.min() >= low and found.max() <= low + room
    assert torch.equal(found, allocate(rule, mean, of))


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from(EQUIVARIANT))
def test_heads_have_no_order(seed, rule):
    """Heads in another order get the same budgets in that order."""
    curves, importance = drawn(seed, 3, 4, 8, falling=True)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    moved = curves.flatten(0, 1)[order].view_as(curves)
    mixed = importance.flatten()[order].view_as(importance)
    found = allocate(rule, 5.5, Heads(3, 4, 2, 9, curves, importance))
    again = allocate(rule, 5.5, Heads(3, 4, 2, 9, moved, mixed))
    assert torch.equal(again.flatten(), found.flatten()[order])


def test_ties_go_to_the_earlier_head():
    curves = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64).expand(2, 3, 3)
    of = Heads(2, 3, 4, 6, curves, torch.ones(2, 3))
    for rule in ("optimal", "greedy", "log", "proportional", "focused-matched", "pyramid"):
        beta = 1.0 if rule == "pyramid" else 20.0
        found = allocate(rule, 4 + 2 / 6, of, Knobs(beta=beta))
        assert found.tolist() == [[5, 5, 4], [4, 4, 4]], rule


# -- each rule alone -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "counts", "mean"),
    [
        (9, {4: 14, 5: 341, 6: 4, 9: 1}, 1794 / 360),
        (12, {4: 2, 5: 208, 6: 145, 7: 4, 12: 1}, 1958 / 360),
    ],
)
def test_focused_on_the_published_table(most, counts, mean):
    """The paper's 4 to 9 and 4 to 12 count the current chunk of 3 frames."""
    found = focused(PUBLISHED, 1, most - 3) + 3
    assert Counter(found.flatten().tolist()) == counts
    assert found.double().mean() == pytest.approx(mean)
    of = Heads(30, 12, 1, most - 3, importance=PUBLISHED)
    assert torch.equal(allocate("focused", most - 3, of) + 3, found)


def test_the_published_table_is_nearly_uniform():
    """Layer means from 4.83 to 5.25; with 5 on average, 347 of 360 heads get 5."""
    means = (focused(PUBLISHED, 1, 6) + 3).double().mean(1)
    assert (round(float(means.min()), 2), round(float(means.max()), 2)) == (4.83, 5.25)
    even = matched(PUBLISHED, 360 * 2, 1, 6) + 3
    assert Counter(even.flatten().tolist()) == {4: 8, 5: 347, 6: 4, 9: 1}


def test_published_budgets_are_those_of_the_table_and_nearly_uniform_elsewhere():
    of = Heads(30, 12, 1, 6, importance=PUBLISHED)
    own = allocate("published", 1794 / 360 - 3, of) + 3  # the total of the table under its rule
    assert torch.equal(own, focused(PUBLISHED, 1, 6) + 3)
    importance = torch.arange(24.0).view(6, 4)
    few = allocate("published", 6, Heads(6, 4, 0, 24, importance=importance))
    assert Counter(few.flatten().tolist()) == {5: 1, 6: 22, 7: 1} and few[0, 0] == 5


def test_matched_has_the_shape_of_focused():
    """Where the shift is nothing, it is the same before rounding."""
    importance = torch.tensor([[0.0, 0.5], [0.75, 1.0]], dtype=torch.float64)
    real = 2 + 8 * importance**2  # 2, 4, 6.5, 10
    assert matched(importance, 23, 2, 10).tolist() == [[2, 4], [7, 10]]
    assert sorted(matched(importance, 22, 2, 10).flatten().tolist()) == [2, 4, 6, 10]
    for total in range(8, 41):
        off = matched(importance, total, 2, 10) - real
        inside = off[(real + off > 2) & (real + off < 10)]
        assert inside.numel() == 0 or inside.max() - inside.min() <= 1 + 1e-9
    same = torch.full((2, 2), 0.3)
    assert matched(same, 22, 2, 10).tolist() == [[6, 6], [5, 5]]


def test_logarithmic_is_the_optimum_of_one_decay():
    """b - mean b = (ln A - mean ln A) / k, and what uniform loses over it is AM / GM."""
    extra = torch.tensor([[0, 1, 2], [3, 4, 8]], dtype=torch.float64)
    rate = 0.7
    importance = (rate * extra).exp()
    found = logarithmic(importance, rate, int(6 * 4 + extra.sum()), 4, 18)
    assert torch.equal(found, 4 + extra.long())
    step = torch.arange(15, dtype=torch.float64)
    curves = importance.unsqueeze(-1) * (-rate * step).exp()
    assert torch.equal(optimal(curves, 42, 4), found)
    assert decay(curves) == pytest.approx(rate)
    even, best = loss(curves, uniform(2, 3, 42), 4), loss(curves, found, 4)
    ratio = importance.mean() / importance.log().mean().exp()
    assert even / best == pytest.approx(float(ratio))


def test_a_curve_that_does_not_fall_has_no_decay():
    for curves in (torch.ones(1, 2, 4), torch.zeros(1, 2, 4)):
        with pytest.raises(ValueError, match=r"does not fall .* Use the rule optimal"):
            decay(curves.double())


def test_proportional_shares_the_pool():
    importance = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert proportional(importance, 4 * 2 + 6, 2, 9).tolist() == [[3, 4], [5, 2]]
    assert proportional(importance, 4 * 2 + 11, 2, 6).tolist() == [[5, 6], [6, 2]]
    assert proportional(importance, 4 * 6, 2, 6).tolist() == [[6, 6], [6, 6]]
    assert proportional(torch.zeros(2, 2), 10, 2, 6).tolist() == [[3, 3], [2, 2]]


@pytest.mark.parametrize(("mean", "beta"), [(9, 20.0), (6, 3.0), (4, 20.0)])
def test_pyramid_is_that_of_the_budget_part(mean, beta):
    found = allocate("pyramid", mean, Heads(30, 12, 3, 40), Knobs(beta=beta))
    layers = torch.tensor(pyramid(30, mean, 3, beta))
    assert torch.equal(found, layers.unsqueeze(1).expand(-1, 12))
    turned = allocate("pyramid-reversed", mean, Heads(30, 12, 3, 40), Knobs(beta=beta))
    assert turned.sum() == found.sum() and turned[0, 0] < turned[-1, 0]


def test_what_is_left_of_uniform_is_spaced_evenly():
    assert uniform(2, 3, 12).tolist() == [[2, 2, 2], [2, 2, 2]]
    assert uniform(2, 3, 14).tolist() == [[3, 2, 2], [3, 2, 2]]
    assert uniform(2, 3, 17).tolist() == [[3, 3, 3], [3, 3, 2]]


def test_shuffled_is_the_same_multiset():
    own = torch.arange(12).view(3, 4)
    found = [shuffled(own, seed) for seed in range(5)]
    assert all(torch.equal(x.flatten().sort().values, own.flatten()) for x in found)
    assert len({tuple(x.flatten().tolist()) for x in found}) == 5
    assert torch.equal(shuffled(own, 3), found[3])


def test_360_heads_take_a_moment():
    curves, _ = drawn(0, 30, 12, 15, falling=True)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        optimal(curves, 360 * 8, 4)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5  # 0.02 s on a quiet core


# -- what cannot be divided ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "mean", "said"),
    [
        ("best", 5, "No allocation rule 'best'. Use one of: uniform, .*shuffled"),
        ("optimal", 3.9, "mean of 3.9 frames cannot be divided into budgets from 4 to 7"),
        ("uniform", 7.5, "mean of 7.5 frames cannot be divided into budgets from 4 to 7"),
    ],
)
def test_what_cannot_be_divided(rule, mean, said):
    of = Heads(2, 3, 4, 7, *drawn(0))
    with pytest.raises(ValueError, match=said):
        allocate(rule, mean, of)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_says_what_it_lacks(rule):
    nothing, of = Heads(2, 3, 4, 7), Heads(2, 3, 4, 7, *drawn(0))
    if rule in ("uniform", "pyramid", "pyramid-reversed"):
        assert torch.equal(allocate(rule, 5, nothing), allocate(rule, 5, of))
        return
    with pytest.raises(ValueError, match=r"looks at (importances|curves).*or use uniform, pyramid"):
        allocate(rule, 5, nothing)
    lacking = replace(of, importance=None) if rule == "focused" else replace(of, curves=None)
    if rule in ("focused", "log", "optimal", "greedy", "levels", "shuffled"):
        with pytest.raises(ValueError, match="none are given"):
            allocate(rule, 5, lacking)


@pytest.mark.parametrize("wrong", [{"gamma": 0.0}, {"beta": 0.5}, {"levels": 1}, {"levels": 4}])
def test_settings_that_no_rule_can_use(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* does not work. Give"):
        Knobs(**wrong)
