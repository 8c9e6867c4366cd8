"""Tests over prompts against closed forms, SciPy, all permutations and simulation."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import nct, permutation_test
from scipy.stats import t as student

from lightning_kv.stats.bootstrap import bca_interval, ceiling, confidence_below
from lightning_kv.stats.inference import (
    detectable,
    effect_size,
    holm,
    jackknife,
    non_inferiority,
    prompt_means,
    prompts_needed,
    sign_flip_p,
)

LOSSES = st.lists(st.integers(-3, 3) | st.floats(-3, 3), min_size=1, max_size=12)


def test_seeds_become_one_value_per_prompt():
    assert prompt_means({"b": [1, 2, 6], "a": [5.0]}) == {"b": 3.0, "a": 5.0}


def test_seeds_taken_as_prompts_would_make_the_interval_too_narrow():
    """8 seeds of each of 12 prompts that differ far more than seeds do."""
    rng = np.random.default_rng(0)
    nested = {str(p): rng.normal(rng.normal(0, 5), 0.1, 8) for p in range(12)}
    wrong = bca_interval(np.concatenate(list(nested.values())))
    right = bca_interval(list(prompt_means(nested).values()))
    assert np.ptp(right) > 2 * np.ptp(wrong)


def test_jackknife_of_the_mean_is_the_standard_error():
    values = np.random.default_rng(0).exponential(1.0, 20)
    expected = values.std(ddof=1) / math.sqrt(20)
    assert jackknife(values) == pytest.approx((values.mean(), expected), rel=1e-12)
    slow = jackknife(values, lambda x: math.fsum(x) / len(x))
    assert slow == pytest.approx((values.mean(), expected), rel=1e-12)
    table = values.reshape(5, 4)  # 5 units: the 4 values of one are left out together
    assert jackknife(table) == pytest.approx(jackknife(table, lambda x: float(x.mean())), rel=1e-12)


def test_jackknife_of_a_variance_has_a_closed_form():
    """Efron and Stein: from the fourth moment, for the variance over n - 1."""
    x = np.random.default_rng(1).normal(size=15)
    n, d = 15, (x - x.mean()) ** 2
    expected = n / (n - 2) * math.sqrt(d.var() / (n - 1))
    found = jackknife(x, lambda x: x.var(ddof=1))
    assert found == pytest.approx((x.var(ddof=1), expected), rel=1e-12)


def test_jackknife_leaves_out_a_unit_with_all_that_belongs_to_it():
    pairs = np.random.default_rng(2).normal(size=(9, 2, 4))
    shapes = set()

    def gap(some):
        shapes.add(some.shape)
        return ((some[:, 0] - some[:, 1]).mean(0) ** 2).sum()

    estimate, error = jackknife(pairs, gap)
    left_out = [gap(np.delete(pairs, i, 0)) for i in range(9)]
    assert shapes == {(9, 2, 4), (8, 2, 4)}
    assert estimate == gap(pairs)
    assert error == pytest.approx(math.sqrt(8 / 9 * np.sum((left_out - np.mean(left_out)) ** 2)))


def test_jackknife_of_one_unit_has_no_error():
    assert jackknife([3.0]) == (3.0, None)
    assert jackknife(np.ones((4, 2))) == (1.0, 0.0)


def slow_flips(values, alternative):
    """All signs by a loop in fractions: no rounding, so ties are ties."""
    values = [Fraction(value) for value in values]
    measure = {"two-sided": abs, "greater": lambda x: x, "less": lambda x: -x}[alternative]
    seen = measure(sum(values))
    flips = itertools.product((-1, 1), repeat=len(values))
    return np.mean(
        [measure(sum(s * v for s, v in zip(f, values, strict=True))) >= seen for f in flips]
    )


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.integers(-4, 4), min_size=1, max_size=8))
def test_few_flips_are_exact_also_with_ties(values, alternative):
    # Tenths do not add up exactly: what is equal in integers rounds apart here.
    found = sign_flip_p([value / 10 for value in values], alternative)
    assert found == slow_flips(values, alternative)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_flips_agree_with_scipy(alternative):
    values = np.random.default_rng(3).normal(0.4, 1.0, 11)
    expected = permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative=alternative
    )
    assert sign_flip_p(values, alternative) == pytest.approx(expected.pvalue, rel=1e-12)


def test_many_flips_come_near_the_t_test_and_to_the_smallest_p():
    values = np.random.default_rng(4).normal(0.25, 1.0, 80)
    t = values.mean() / (values.std(ddof=1) / math.sqrt(80))
    assert sign_flip_p(values, "greater") == pytest.approx(student.sf(t, 79), abs=0.01)
    assert sign_flip_p([1.0] * 40, permutations=999) == 1 / 1000
    assert sign_flip_p(values, seed=1) == sign_flip_p(values, seed=1) != sign_flip_p(values, seed=2)


@pytest.mark.parametrize("n", [1, 15, 16, 40])
@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_no_difference_has_a_p_value_of_one(n, alternative):
    assert sign_flip_p([0.0] * n, alternative) == 1.0
    assert sign_flip_p([]) is None


@pytest.mark.filterwarnings("error")
@settings(max_examples=150, deadline=None)
@given(LOSSES, st.floats(-3, 3), st.floats(0.5, 0.99))
@example([0.0, 5e-324], 0.0, 0.5)  # a margin that is 1e311 spans away
def test_verdict_bounds_and_confidence_say_the_same(losses, margin, level):
    found = non_inferiority(losses, margin, level, resamples=300)
    confidence = confidence_below(losses, margin, resamples=300)
    assert found.p == 1 - confidence
    assert (found.verdict == "not worse") == (confidence >= level)
    assert (found.upper is None) == (found.lower is None) == (ceiling(len(losses)) < level)
    if found.upper is None:
        assert found.verdict == "unclear"
        return
    assert min(losses) <= found.lower <= max(losses) and min(losses) <= found.upper <= max(losses)
    if abs(found.upper - margin) > 1e-9:
        assert (found.verdict == "not worse") == (found.upper <= margin)
    if abs(found.lower - margin) > 1e-9 and found.lower <= found.upper:
        assert (found.verdict == "worse") == (found.lower > margin)


@pytest.mark.parametrize("n", [1, 2, 4, 5, 9])
def test_identical_losses_prove_as_much_as_their_number(n):
    below, above = non_inferiority([0.01] * n, 0.02), non_inferiority([0.03] * n, 0.02)
    assert (below.verdict, above.verdict) == (
        ("not worse", "worse") if n >= 5 else ("unclear", "unclear")
    )
    assert (below.p, above.p) == (0.5**n, 1.0)
    assert (below.upper, below.lower) == ((0.01, 0.01) if n >= 5 else (None, None))
    # 0.98 - 0.96 rounds to a little more than 0.02, and is no more than that.
    assert non_inferiority([0.98 - 0.96] * n, 0.02).verdict == below.verdict


def test_verdicts_turn_with_the_losses():
    losses = np.random.default_rng(5).normal(0.1, 0.1, 20)
    words = {}
    for margin in (0.0, 0.1, 0.2):
        own, turned = non_inferiority(losses, margin), non_inferiority(-losses, -margin)
        assert (own.lower, own.upper) == (-turned.upper, -turned.lower)
        words[margin] = own.verdict, turned.verdict
    assert words == {
        0.0: ("worse", "not worse"),
        0.1: ("unclear", "unclear"),
        0.2: ("not worse", "worse"),
    }
    assert non_inferiority([], 0.1) is None


def test_a_lower_bound_at_the_margin_is_not_beyond_it():
    found = non_inferiority([0.0] * 7 + [1.0], 0.0)
    assert found.lower == 0.0 < found.upper and found.verdict == "unclear"


def test_bounds_of_many_normal_losses_are_those_of_the_t_test():
    losses = np.random.default_rng(6).normal(0.0, 1.0, 300)
    half = student.ppf(0.95, 299) * losses.std(ddof=1) / math.sqrt(300)
    found = non_inferiority(losses, 0.5)
    expected = (losses.mean() - half, losses.mean() + half)
    assert (found.lower, found.upper) == pytest.approx(expected, abs=0.1 * half)


def test_holm_by_hand_and_with_gaps():
    # Sorted: 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1; never less than the one before.
    found = holm([0.01, None, 0.04, 0.03, 0.005, None])
    expected = [0.03, None, 0.06, 0.06, 0.02, None]
    assert [p is None for p in found] == [p is None for p in expected]
    assert [p for p in found if p] == pytest.approx([p for p in expected if p], rel=1e-12)
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([None]) == [None] and holm([]) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_holm_rejects_what_stepping_down_rejects(p_values, alpha):
    adjusted, rejected = holm(p_values), set()
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if (len(p_values) - rank) * p_values[place] > alpha:
            break
        rejected.add(place)
    assert {place for place, p in enumerate(adjusted) if p <= alpha} == rejected


def test_effect_size_is_t_over_the_root_of_n():
    values = np.random.default_rng(7).normal(0.5, 1.0, 12)
    t = values.mean() / (values.std(ddof=1) / math.sqrt(12))
    assert effect_size(values) == pytest.approx(t / math.sqrt(12), rel=1e-12)
    assert effect_size([0.1, 0.1, 0.1]) is effect_size([1.0]) is effect_size([]) is None


def power_of(n, shift, level):
    return nct.sf(student.ppf(level, n - 1), n - 1, shift * math.sqrt(n))


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("power", [0.8, 0.9])
@pytest.mark.parametrize("margin", [0.1, 0.4, 0.7, 1.1])
def test_prompts_needed_is_the_smallest_number_with_that_power(margin, power, level):
    pilot = np.array([-1.0, 1.0] * 8) * math.sqrt(15 / 16)  # mean 0, deviation 1
    n = prompts_needed(pilot, margin, power, level)
    assert power_of(n, margin, level) >= power > power_of(n - 1, margin, level)
    assert prompts_needed(pilot * 3 + 2, margin * 3 + 2, power, level) == n


@pytest.mark.parametrize("n", [5, 16, 64])
def test_detectable_is_the_other_side_of_prompts_needed(n):
    losses = np.random.default_rng(n).normal(0.3, 2.0, n)
    gap = detectable(losses)
    assert power_of(n, gap / losses.std(ddof=1), 0.95) == pytest.approx(0.8, abs=1e-6)
    assert prompts_needed(losses, losses.mean() + 1.0001 * gap) == n
    if n > 5:
        assert prompts_needed(losses, losses.mean() + 0.97 * gap) > n


@pytest.mark.parametrize("kind", ["needed", "detectable"])
def test_planned_power_is_reached_by_the_test_itself(kind):
    """800 runs: a standard error of 1.4 %."""
    pilot = np.array([-1.0, 1.0] * 8) * math.sqrt(15 / 16)
    margin = 0.5 if kind == "needed" else detectable(pilot)
    n = prompts_needed(pilot, margin) if kind == "needed" else len(pilot)
    rng = np.random.default_rng(8)
    runs = (non_inferiority(rng.normal(size=n), margin, resamples=1000) for _ in range(800))
    assert 0.76 < np.mean([run.verdict == "not worse" for run in runs]) < 0.86


def test_plans_that_cannot_be_made():
    assert prompts_needed([0.03, 0.05, 0.04], 0.02) is None  # beyond
    assert prompts_needed([0.01, 0.03], 0.02) is None  # at the margin
    assert prompts_needed([0.01], 0.02) is None  # no spread known
    assert prompts_needed([0.01] * 3, 0.02) == 5 == prompts_needed([0.02] * 3, 0.02)
    assert prompts_needed([0.01] * 3, 0.02, level=0.99) == 7
    assert prompts_needed([0.0, 1e-3, -1e-3], 1.0) == 5
    far = 2 * (1.644854 + 0.841621) ** 2 * 1e10  # normal quantiles, for a spread of √2
    assert prompts_needed([-1.0, 1.0], 1e-5) == pytest.approx(far, rel=1e-4)
    assert detectable([0.0, 0.1, 0.2, 0.3]) is None
    assert detectable([0.1] * 6) == 0.0


@pytest.mark.parametrize(
    ("call", "given", "remedy"),
    [
        (lambda: prompt_means({"a": [1.0], "b": []}), "'b'", "Leave"),
        (lambda: jackknife([]), "0 units", "one unit or more"),
        (lambda: jackknife([1.0, 2.0], lambda x: math.nan), "1 of 1", "Leave out"),
        (lambda: sign_flip_p([1.0, math.nan]), "1 of 2", "Leave out"),
        (lambda: sign_flip_p([1.0], "more"), "'more'", "'greater'"),
        (lambda: non_inferiority([1.0], math.nan), "nan", "0.02"),
        (lambda: non_inferiority([1.0], 0.1, level=95), "95", "0.95"),
        (lambda: holm([0.5, 1.5]), "1.5", "0 to 1"),
        (lambda: holm([math.nan]), "nan", "0 to 1"),
        (lambda: prompts_needed([0.0, 1.0], math.inf), "inf", "0.02"),
        (lambda: prompts_needed([0.0, 1.0], 0.9, power=1.0), "1.0", "0.8"),
        (lambda: detectable([0.0, 1.0] * 3, power=0.01), "0.01", "0.8"),
    ],
)
def test_errors_say_what_was_given_and_what_would_work(call, given, remedy):
    with pytest.raises(ValueError) as error:
        call()
    assert given in str(error.value)
    assert remedy in str(error.value)
