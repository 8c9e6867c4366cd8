"""Ratios of means over prompts, gaps that are closed, and what a comparison says."""

import numpy as np
import pytest

from lightning_kv.stats.score_proof import Difference
from lightning_kv.stats.scorer_proof import (
    Quotient,
    gap_closed,
    mean_of_worst,
    prompts_that_show,
    quotient,
    state_of,
)


def test_a_quotient_is_that_of_the_means_and_its_interval_holds_the_truth():
    rng, held = np.random.default_rng(0), 0
    for _ in range(60):
        below = rng.uniform(1, 3, 16)
        above = 0.5 * below + rng.normal(0, 0.2, 16)
        found = quotient(above, below)
        assert found.value == pytest.approx(above.sum() / below.sum())
        assert found.low < found.value < found.high
        held += found.low <= 0.5 <= found.high
    assert 52 <= held <= 60


def test_what_has_no_quotient():
    assert quotient([], []) == Quotient(None)
    assert quotient([1.0, 2.0], [-1.0, 0.5]) == Quotient(None)
    assert quotient([1.0], [2.0]) == Quotient(0.5)
    assert quotient([1.0, 1.0, 1.0], [9.0, -1.0, 1.0]) == Quotient(1 / 3)  # some draws are below 0
    with pytest.raises(ValueError, match="there are 1 and 2 values"):
        quotient([1.0], [1.0, 2.0])


def test_a_gap_is_closed_alike_whichever_way_is_better():
    own, best, bound = [0.8, 0.9, 0.7], [0.5, 0.6, 0.7], [0.9, 1.0, 1.0]
    found = gap_closed(own, best, bound)
    assert found.value == pytest.approx(0.6 / 1.1)
    assert gap_closed(*(np.negative(side) for side in (own, best, bound))) == found
    assert gap_closed(best, best, bound).value == 0
    assert gap_closed(bound, best, bound) == Quotient(1, 1, 1)
    assert gap_closed([0.4, 0.5, 0.6], best, bound).value < 0


def test_states():
    def seen(gain):
        return Difference("a", "b", 8, gain, None, None, 0.01, 0.01)

    assert state_of(seen(0.1), 0.05, Quotient(0.5, 0.3, 0.6)) == "better"
    assert state_of(seen(-0.1), 0.05, Quotient(-0.5, -0.6, -0.3)) == "no better"
    assert state_of(seen(0.1), 0.06, Quotient(0.05, 0.01, 0.09)) == "no better"
    assert state_of(seen(0.1), 0.06, Quotient(0.05, 0.01, 0.11)) == "undecided"
    assert state_of(seen(0.1), 0.06, Quotient(None)) == "undecided"


def test_planned_prompts_show_it_four_times_in_five():
    from scipy.stats import ttest_1samp

    rng = np.random.default_rng(1)
    n = prompts_that_show(rng.normal(0, 1, 10_000) * 0.2 + 0.1, 7)
    assert n == pytest.approx(7.85 * 4 + 2, abs=2)
    draws = rng.normal(0.1, 0.2, (4000, n))
    assert np.mean(ttest_1samp(draws, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.03)
    assert prompts_that_show([0.3, 0.3], 7) == 7 and prompts_that_show([], 7) is None


def test_the_worst_are_the_highest_ratios():
    above, below = [1.0, 9.0, 4.0, 0.0, 5.0], [1.0, 3.0, 2.0, 1.0, 0.0]
    assert mean_of_worst(above, below, 0.05) == 3
    assert mean_of_worst(above, below, 0.5) == 2.5
    assert mean_of_worst([1.0], [0.0], 0.5) is None
