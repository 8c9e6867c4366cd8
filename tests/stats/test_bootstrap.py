"""Intervals against closed forms and against SciPy called by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, bootstrap, norm
from scipy.stats import t as student

from lightning_kv.stats.bootstrap import (
    MeanConfidence,
    bca_interval,
    ceiling,
    confidence_below,
    expanded_interval,
    paired_interval,
    resample_counts,
)


def slow_upper(values, level, resamples, seed):
    """The upper end by the textbook formulas, by loops, on the same resamples as SciPy takes."""
    data = np.asarray(values, dtype=float)
    n = len(data)
    draws = np.random.default_rng(seed).integers(0, n, (resamples, n))
    means = sorted(math.fsum(data[i] for i in row) / n for row in draws)
    mean = data.mean()
    below = sum(m < mean - 1e-12 for m in means)
    equal = sum(abs(m - mean) <= 1e-12 for m in means)
    z0 = norm.ppf((below + equal / 2) / resamples)
    jackknife = [np.delete(data, i).mean() for i in range(n)]
    spread = np.mean(jackknife) - np.array(jackknife)
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    z = z0 + math.sqrt(n / (n - 1)) * student.ppf(level, n - 1)
    share = norm.cdf(z0 + z / (1 - acceleration * z))
    return next(m for count, m in enumerate(means, 1) if count >= share * resamples)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_bca_is_the_textbook_formula_on_skewed_data(level):
    values = np.random.default_rng(3).exponential(2.0, 12) + 5
    low, high = bca_interval(values.tolist(), level=level, resamples=600, seed=4)
    assert high == pytest.approx(slow_upper(values, (1 + level) / 2, 600, 4), rel=1e-9)
    assert low == pytest.approx(-slow_upper(-values, (1 + level) / 2, 600, 4), rel=1e-9)


@pytest.mark.parametrize("n", [6, 16, 50])
def test_bca_is_that_of_scipy_at_the_widened_level(n):
    values = np.random.default_rng(n).exponential(1.0, n)
    wide = 2 * norm.cdf(math.sqrt(n / (n - 1)) * student.ppf(0.975, n - 1)) - 1
    expected = bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=wide, rng=np.random.default_rng(0)
    ).confidence_interval
    found = bca_interval(values, resamples=20_000)
    assert found == pytest.approx(tuple(expected), abs=0.01 * values.std())


def test_intervals_of_few_normal_values_hold_the_mean_as_often_as_they_say():
    """Plain BCa does so in 88 % of all sets of 8, which is 10 standard errors below."""
    rng = np.random.default_rng(0)
    found = [bca_interval(rng.normal(size=8), resamples=500) for _ in range(1500)]
    assert 0.92 < np.mean([low <= 0 <= high for low, high in found]) < 0.96


def test_resamples_with_the_mean_of_the_data_count_half_though_they_round_apart():
    """Symmetric data have no bias and no acceleration, so what lies at the mean is half sure."""
    values = np.arange(10) / 7
    counts = resample_counts(10, 999, 0)
    sums = counts @ np.arange(10)  # exact
    bias = norm.ppf((sums < 45).mean() / 2 + (sums <= 45).mean() / 2)
    z = norm.ppf((sums <= 50).mean()) - 2 * bias
    expected = student.cdf(z * math.sqrt(9 / 10), 9)
    assert confidence_below(values, 5 / 7, resamples=999) == pytest.approx(expected, rel=1e-9)


def test_bca_of_many_normal_values_is_near_the_t_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    half = student.ppf(0.975, 399) * values.std(ddof=1) / math.sqrt(400)
    expected = (values.mean() - half, values.mean() + half)
    assert bca_interval(values) == pytest.approx(expected, abs=0.1 * half)


def test_bca_leans_towards_the_long_tail():
    low, high = bca_interval([0.0] * 9 + [1.0] * 3 + [8.0])
    mean = 11 / 13
    assert high - mean > 1.3 * (mean - low)


def test_seed_decides_the_interval():
    values = [1.0, 2.0, 4.0, 8.0, 9.5]
    assert bca_interval(values, seed=1) == bca_interval(values, seed=1)
    assert bca_interval(values, seed=1, resamples=99) != bca_interval(values, seed=2, resamples=99)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "values", [[0.0, 1e-200], [0.1, 0.1, 0.1, math.nextafter(0.1, 1)], [100.0, 99.99999999999999]]
)
def test_values_that_differ_by_rounding_have_an_interval(values):
    low, high = bca_interval(values)
    assert min(values) <= low <= high <= max(values)


def test_turned_data_have_the_turned_interval():
    values = np.random.default_rng(5).exponential(1.0, 9)
    low, high = bca_interval(values)
    assert bca_interval(-values) == pytest.approx((-high, -low), rel=1e-12)


def test_resamples_draw_as_many_clips_as_there_are():
    counts = resample_counts(5, 4000, 1)
    assert (counts.sum(1) == 5).all() and counts.min() == 0
    assert counts.mean(0) == pytest.approx([1.0] * 5, abs=0.06)
    assert counts.var(0) == pytest.approx([0.8] * 5, abs=0.08)  # binomial(5, 1/5)


def test_degenerate_data():
    assert bca_interval([0.1, 0.1, 0.1]) == (0.1, 0.1)
    assert bca_interval([3.0]) is None
    assert bca_interval([]) is None
    assert paired_interval([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=9), st.floats(-5, 5))
def test_bca_is_finite_inside_the_data_and_moves_with_it(values, shift):
    low, high = bca_interval(values, resamples=200)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    if np.ptp(values) > 1e-3:
        moved = bca_interval([value + shift for value in values], resamples=200)
        assert moved == pytest.approx((low + shift, high + shift), abs=0.02 * np.ptp(values) + 1e-9)


def test_paired_interval_sees_through_a_common_spread():
    clips = np.random.default_rng(1).normal(0.0, 10.0, 30)
    noise = np.random.default_rng(2).normal(0.0, 0.1, 30)
    low, high = paired_interval(clips + 1.0 + noise, clips)
    assert 0.9 < low < 1.0 + noise.mean() < high < 1.1
    assert paired_interval(clips + 1.0 + noise, clips) == bca_interval(clips + 1.0 + noise - clips)


@pytest.mark.parametrize(("bad", "most"), [(1, 0), (1, 2), (3, 3), (6, 6), (6, 8)])
def test_confidence_of_two_kinds_of_clips_has_a_closed_form(bad, most):
    """Of 12 clips some lose 1, so the losses of a resampled set are binomial."""
    share, p = binom(12, bad / 12), bad / 12
    z0 = norm.ppf(share.cdf(bad) - share.pmf(bad) / 2)
    acceleration = (1 - 2 * p) / math.sqrt(p * (1 - p) * 12) / 6  # skewness ÷ 6 √n
    z = norm.ppf(share.cdf(most)) - z0
    z = z / (1 + acceleration * z) - z0
    expected = student.cdf(z * math.sqrt(11 / 12), 11)
    values = [1.0] * bad + [0.0] * (12 - bad)
    found = confidence_below(values, most / 12, resamples=40_000)
    assert found == pytest.approx(expected, abs=0.01)


@pytest.mark.filterwarnings("error")
@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-9, 9) | st.floats(-9, 9), min_size=1, max_size=9),
    st.floats(-10, 10),
    st.floats(0.01, 0.99),
)
def test_level_and_bound_are_each_others_inverse(values, bound, level):
    one = MeanConfidence(np.array(values, float), 300, 0)
    upper = one.upper(level)
    assert min(values) <= upper <= max(values)
    if abs(upper - bound) > 1e-9:
        assert (upper <= bound) == (one.below(bound) >= level)
    assert one.below(upper) >= level - 1e-9


def test_confidence_is_right_as_often_as_it_says():
    """Where the true mean is the bound, 95 % sure is wrong in about 5 % of all runs."""
    rng = np.random.default_rng(0)
    sure = [confidence_below(rng.normal(0.1, 1.0, 40), 0.1, 400) >= 0.95 for _ in range(800)]
    assert 0.03 < np.mean(sure) < 0.075


@pytest.mark.parametrize("n", [1, 2, 4, 5, 9])
def test_few_clips_are_no_proof(n):
    assert confidence_below([0.0] * n, 0.02) == 1 - 0.5**n
    assert confidence_below([1.0] * n, 0.02) == 0
    assert (ceiling(n) >= 0.95) == (n >= 5)


def test_confidence_without_clips_is_none():
    assert confidence_below([], 0.1) is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9), st.floats(-5, 5), st.floats(0, 2))
def test_a_wider_bound_is_never_less_sure(values, bound, more):
    first, second = (confidence_below(values, x, 200) for x in (bound, bound + more))
    assert 0 <= first <= second <= ceiling(len(values))
    if max(values) <= bound:
        assert first == ceiling(len(values))


@pytest.mark.parametrize(
    ("call", "given", "remedy"),
    [
        (lambda: bca_interval([1.0, math.nan]), "1 of 2", "Leave out"),
        (lambda: bca_interval([1.0, 2.0], level=95), "95", "between 0 and 1"),
        (lambda: paired_interval([1.0, 2.0], [1.0]), "2 and 1", "same clips"),
        (lambda: confidence_below([1.0, math.inf], 0.1), "1 of 2", "Leave out"),
    ],
)
def test_errors_say_what_was_given_and_what_would_work(call, given, remedy):
    with pytest.raises(ValueError) as error:
        call()
    assert given in str(error.value)
    assert remedy in str(error.value)


def test_the_expanded_interval_of_means_has_the_width_of_student_s():
    """Hesterberg's point: the percentile bootstrap of normal data, but for the quantile of t."""
    values = np.random.default_rng(7).normal(size=(12, 2))
    draws = resample_counts(12, 40_000, 0) @ values / 12
    half = student.ppf(0.975, 11) * values.std(0, ddof=1) / math.sqrt(12)
    low, high = expanded_interval(draws, 12)
    assert (high - low) / 2 == pytest.approx(half, rel=0.04)
    assert low.shape == (2,)


def test_the_expanded_interval_refuses_one_unit():
    with pytest.raises(ValueError, match="needs 2 units"):
        expanded_interval([1.0, 2.0], 1)
