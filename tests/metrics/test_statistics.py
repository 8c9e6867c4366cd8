"""Intervals against closed forms and against SciPy called by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri
from scipy.stats import binom
from scipy.stats import t as student

from lightning_kv.metrics.statistics import (
    bca_interval,
    ceiling,
    confidence_below,
    paired_interval,
)


def slow_bca(values, level, resamples, seed):
    """BCa of the mean from its textbook formulas, by loops, on the same resamples as SciPy."""
    data = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(data), (resamples, len(data)))
    means = sorted(math.fsum(data[i] for i in row) / len(data) for row in draws)
    mean = data.mean()
    below = sum(m < mean - 1e-12 for m in means)
    equal = sum(abs(m - mean) <= 1e-12 for m in means)
    z0 = ndtri((below + equal / 2) / resamples)
    jackknife = [np.delete(data, i).mean() for i in range(len(data))]
    spread = np.mean(jackknife) - np.array(jackknife)
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = z0 + ndtri(tail)
        ends.append(np.quantile(means, ndtr(z0 + z / (1 - acceleration * z))))
    return ends


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_bca_is_the_textbook_formula_on_skewed_data(level):
    values = np.random.default_rng(3).exponential(2.0, 12) + 5
    got = bca_interval(values.tolist(), level=level, resamples=600, seed=4)
    assert got == pytest.approx(slow_bca(values, level, 600, 4), rel=1e-9)


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
def test_confidence_of_two_kinds_of_clips_is_binomial(bad, most):
    """Of 12 clips some lose 1: a resampled set is below ``most / 12`` with few enough of these."""
    values, bound = [1.0] * bad + [0.0] * (12 - bad), most / 12
    share = binom.cdf(most, 12, bad / 12)
    got = confidence_below(values, bound, resamples=40_000)
    assert got == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 40_000))


def test_confidence_is_right_as_often_as_it_says():
    """Where the true mean is the bound, 95 % sure is wrong in about 5 % of all runs."""
    rng = np.random.default_rng(0)
    sure = [confidence_below(rng.normal(0.1, 1.0, 40), 0.1, 400) >= 0.95 for _ in range(800)]
    assert 0.03 < np.mean(sure) < 0.085


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
