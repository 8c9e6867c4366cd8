"""Rank correlations of heads against SciPy, closed forms and data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap, multivariate_normal, spearmanr

from lightning_kv.stats.bootstrap import resample_counts
from lightning_kv.stats.reliability import (
    Correlation,
    Reliability,
    disattenuated,
    rank_correlation,
    share_off_median,
    spearman,
    split_half,
)


def noisy_pair(rng, prompts, heads, apart=0.3, noise=0.5, common=0.0):
    """Two measures that see the same prompts, and the true rank correlation of the heads."""
    own = rng.normal(0, 1, heads)
    other = own + rng.normal(0, apart, heads)
    first = rng.normal(size=(prompts, heads))
    second = np.sqrt(common) * first + np.sqrt(1 - common) * rng.normal(size=(prompts, heads))
    truth = spearmanr(own, other).statistic
    return np.exp(own + noise * first), np.exp(other + noise * second), truth


def test_rows_are_correlated_as_scipy_does_it_also_with_ties():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 4, (2, 9, 12)).astype(float)
    expected = [spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    assert spearman(first, second) == pytest.approx(expected, rel=1e-12)


def test_what_is_the_same_everywhere_has_no_rank_correlation():
    dust = np.full(6, 0.1) + 1e-17 * np.arange(6)
    rows = np.stack([np.ones(6), np.zeros(6), dust, np.arange(6.0)])
    assert np.isnan(spearman(rows, np.arange(6.0))).tolist() == [True, True, True, False]


def test_the_estimate_is_that_of_the_means_and_the_interval_resamples_whole_prompts():
    x, y, _ = noisy_pair(np.random.default_rng(1), 6, 20, common=0.5)
    found = rank_correlation(x, y, resamples=300, seed=3)
    assert found.estimate == pytest.approx(spearmanr(x.mean(0), y.mean(0)).statistic, rel=1e-12)
    draws = []
    for counts in resample_counts(6, 300, 3):
        rows = np.repeat(np.arange(6), counts.astype(int))
        draws.append(spearmanr(x[rows].mean(0), y[rows].mean(0)).statistic)
    # t with 5 degrees of freedom, 2.571 * sqrt(6 / 5) standard deviations: 0.24 % at each end
    assert found.low == pytest.approx(np.quantile(draws, 0.00243), abs=1e-3)
    assert found.high == pytest.approx(np.quantile(draws, 0.99757), abs=1e-3)
    assert found == rank_correlation(x, y, resamples=300, seed=3)


def test_measures_that_never_disagree_correlate_with_certainty():
    x = np.random.default_rng(2).exponential(size=(5, 1)) * np.arange(1.0, 9.0)
    assert rank_correlation(x, x**3).low == rank_correlation(x, x**3).high == 1.0
    assert rank_correlation(x, -x).estimate == -1.0


def test_what_is_missing_is_said_with_its_reason():
    x = np.arange(12.0).reshape(2, 6)
    few = rank_correlation(x, x)
    assert (few.estimate, few.low, few.high) == (1.0, None, None)
    assert "2 prompts of the 3" in few.why
    same = rank_correlation(np.ones((4, 6)), np.arange(24.0).reshape(4, 6))
    assert same.estimate is None and "same for all heads (6 heads)" in same.why
    # One prompt of four tells the heads apart: a third of all resamples are without it.
    once = np.zeros((4, 6))
    once[0] = np.arange(6)
    rare = rank_correlation(once, once)
    assert rare.estimate == 1.0 and rare.low is None
    share = int(rare.why.split()[1]) / 2000
    assert share == pytest.approx(0.75**4, abs=0.04)


@pytest.mark.parametrize("shape", [(3,), (3, 2, 2), (0, 4), (4, 0)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"Pass \[prompts, heads\]"):
        split_half(np.ones(shape))


def test_two_measures_need_the_same_prompts_and_heads():
    with pytest.raises(ValueError, match="cannot be compared"):
        rank_correlation(np.ones((4, 6)), np.ones((3, 6)))
    with pytest.raises(ValueError, match="finite"):
        rank_correlation(np.full((4, 6), np.nan), np.ones((4, 6)))


@pytest.mark.parametrize(("prompts", "common"), [(4, 0.0), (4, 0.7), (16, 0.7)])
def test_the_lower_bound_is_rarely_too_high(prompts, common):
    rng, below = np.random.default_rng(prompts), []
    for _ in range(60):
        x, y, truth = noisy_pair(rng, prompts, 48, common=common)
        below.append(rank_correlation(x, y, resamples=200).low <= truth)
    assert np.mean(below) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "common", "least"),
    [(p, c, 0.95) for p in (4, 8, 32) for c in (0.0, 0.7, 0.9)]
    + [(4, 1.0, 0.75), (8, 1.0, 0.92), (32, 1.0, 0.95)],
)
@pytest.mark.parametrize("heads", [16, 48])
def test_how_often_the_lower_bound_holds(heads, prompts, common, least):
    rng, below = np.random.default_rng(prompts + heads), []
    for _ in range(300):
        x, y, truth = noisy_pair(rng, prompts, heads, noise=0.6, common=common)
        below.append(rank_correlation(x, y, resamples=300).low <= truth)
    assert np.mean(below) >= least


@pytest.mark.slow
def test_bca_would_be_too_high_more_often():
    rng, bca, ours = np.random.default_rng(32), [], []
    for _ in range(150):
        x, y, truth = noisy_pair(rng, 32, 48, common=0.7)

        def of_means(rows, axis, x=x, y=y):
            return spearman(x[rows].mean(-2), y[rows].mean(-2))

        found = bootstrap((np.arange(32),), of_means, n_resamples=500, method="BCa", rng=rng)
        bca.append(found.confidence_interval.low > truth)
        ours.append(rank_correlation(x, y, resamples=500).low > truth)
    assert np.mean(ours) <= 0.025 < 0.06 < np.mean(bca) < 0.2


def test_spearman_brown_finds_the_reliability_of_all_prompts():
    """True parts and noise of known variance: the squared correlation with the truth."""
    rng = np.random.default_rng(4)
    for prompts in (8, 9, 3):
        truth, noise = rng.normal(size=4000), rng.normal(0, 1.5, (prompts, 4000))
        found = split_half(truth + noise, splits=100)
        signal = 1 / (1 + 1.5**2 / prompts)  # of Pearson's; ranks of normal data lie just below
        assert found.value == pytest.approx(signal, abs=0.03)
        assert found.half == prompts // 2


def test_the_halves_of_two_prompts_are_these():
    x = np.random.default_rng(5).normal(size=(2, 30))
    r = spearmanr(x[0], x[1]).statistic
    assert split_half(x).halves == pytest.approx(r, rel=1e-12)
    assert split_half(x).value == pytest.approx(max(2 * r / (1 + r), 0.0))


def test_heads_without_structure_have_no_reliability():
    found = split_half(np.random.default_rng(6).normal(size=(12, 500)))
    assert found.value < 0.25 and abs(found.halves) < 0.12
    against = split_half(np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
    assert (against.halves, against.value) == (-1.0, 0.0)


def test_what_has_no_halves_says_so():
    assert split_half([[1.0, 2.0]]).why == "1 prompt has no halves"
    assert "all heads are the same" in split_half(np.ones((4, 3))).why


def test_without_their_noise_two_measures_correlate_as_their_truths_do():
    rng, rho = np.random.default_rng(7), 0.8
    truths = multivariate_normal([0, 0], [[1, rho], [rho, 1]], seed=rng).rvs(4000).T
    x, y = (truth + rng.normal(0, s, (6, 4000)) for truth, s in zip(truths, (2, 1), strict=True))
    plain = rank_correlation(x, y, resamples=50)
    found = disattenuated(plain, split_half(x, 50), split_half(y, 50))
    assert plain.estimate < 0.7
    assert found == pytest.approx(6 / math.pi * math.asin(rho / 2), abs=0.03)


def test_without_a_reliability_nothing_is_corrected():
    known = Correlation(4, 9, 0.95, 0.5, 0.1, 0.9, "")
    full, none = Reliability(0.25, 0.1, 2, ""), Reliability(0.0, -0.1, 2, "")
    assert disattenuated(known, full, full) == 2.0
    assert disattenuated(known, full, none) is None
    assert disattenuated(known, full, Reliability(None, None, 0, "1 prompt")) is None
    assert disattenuated(Correlation(4, 9, 0.95, None, None, None, "same"), full, full) is None


def test_heads_off_the_median_are_counted():
    rng = np.random.default_rng(8)
    prompts = np.exp(rng.normal(0, 0.5, (12, 1)))  # what all heads share tells nothing apart
    same = prompts * np.exp(rng.normal(0, 0.2, (12, 200)))
    assert share_off_median(same) < 0.1
    apart = same * np.repeat([1.0, 8.0], [150, 50])
    assert 0.25 <= share_off_median(apart) < 0.4
    assert share_off_median(same[:2]) is None
    assert share_off_median(np.full((5, 9), 0.1)) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [6, 16, 32])
def test_without_structure_one_head_in_twenty_is_off_the_median(prompts):
    rng = np.random.default_rng(9)
    shares = [share_off_median(rng.normal(size=(prompts, 100)), resamples=500) for _ in range(60)]
    assert 0.03 < np.mean(shares) < 0.07
