"""Ratios of losses against loops by hand, SciPy, planned effects and no effect."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import permutation_test, wilcoxon

from lightning_kv.stats.bootstrap import bca_interval
from lightning_kv.stats.comparison import compare, prompts_planned


def losses_of(values):
    """By condition and prompt, from arrays [prompts] or [prompts, seeds] by condition."""
    return {
        name: {f"p{place:02d}": np.asarray(row).tolist() for place, row in enumerate(rows)}
        for name, rows in values.items()
    }


def drawn(rng, prompts, change, spread, seeds=1):
    """Prompts whose losses differ a hundredfold, and a condition that changes each a little."""
    base = rng.lognormal(0, 2, (prompts, 1)) * rng.lognormal(0, 0.3, (prompts, seeds))
    effect = rng.normal(change, spread, (prompts, 1))
    return losses_of({"optimal": base * np.exp(effect), "uniform": base})


def test_the_figures_are_those_of_loops_by_hand():
    rng = np.random.default_rng(0)
    own, other = rng.lognormal(0, 1, (2, 11, 3))
    found = compare(losses_of({"a": own, "b": other}), "a", "b")
    d = [
        np.mean([math.log(x / y) for x, y in zip(*pair, strict=True)])
        for pair in zip(own, other, strict=True)
    ]
    assert found.change == pytest.approx(np.mean(d), rel=1e-9)
    assert found.ratio == pytest.approx(math.exp(np.mean(d)), rel=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(np.exp(bca_interval(d))), rel=1e-9)
    flips = permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert found.p == pytest.approx(flips.pvalue, rel=1e-9)
    assert found.wilcoxon == pytest.approx(wilcoxon(d).pvalue, rel=1e-9)
    assert found.spread == pytest.approx(np.std(d, ddof=1), rel=1e-9)
    assert found.effect == pytest.approx(np.mean(d) / np.std(d, ddof=1), rel=1e-9)
    assert found.needed == math.ceil(7.849 * found.spread**2 / math.log(0.9) ** 2)


def test_seeds_of_a_prompt_are_one_value():
    """8 seeds do not make 5 prompts 40: p cannot fall below 2 / 2^5."""
    found = compare(drawn(np.random.default_rng(1), 5, -1.0, 0.1, seeds=8), "optimal", "uniform")
    assert found.prompts == 5 and found.p == 2 / 2**5


def test_one_wild_seed_counts_no_more_than_the_others():
    own = [[1.0, 1.0, 1000.0]] * 6
    other = [[2.0, 2.0, 1000.0]] * 6
    found = compare(losses_of({"a": own, "b": other}), "a", "b")
    assert found.ratio == pytest.approx(0.5 ** (2 / 3))  # not the 0.998 of the sums


def test_the_order_of_the_two_turns_everything_round():
    losses = drawn(np.random.default_rng(2), 20, -0.1, 0.3)
    there, back = compare(losses, "optimal", "uniform"), compare(losses, "uniform", "optimal")
    assert there.ratio == pytest.approx(1 / back.ratio)
    assert there.low == pytest.approx(1 / back.high, rel=1e-9)
    assert (there.p, there.wilcoxon) == (back.p, back.wilcoxon)


def test_only_prompts_of_both_count_and_the_others_are_named():
    losses = {"a": {"x": 1.0, "y": 2.0, "z": 9.0}, "b": {"y": 4.0, "x": 2.0, "w": 0.1}}
    found = compare(losses, "a", "b")
    assert (found.prompts, found.left_out) == (2, ("w", "z"))
    assert found.ratio == pytest.approx(0.5)


def test_no_difference_is_none():
    same = {"x": 0.1 + 0.2, "y": 1.0, "z": 2.0}
    found = compare({"a": same, "b": same | {"x": 0.3}}, "a", "b")
    assert (found.change, found.ratio, found.low, found.high) == (0.0, 1.0, 1.0, 1.0)
    assert (found.p, found.wilcoxon, found.effect, found.needed) == (1.0, 1.0, None, None)


def test_one_prompt_has_no_interval():
    found = compare({"a": {"x": 1.0}, "b": {"x": 2.0}}, "a", "b")
    assert (found.low, found.high, found.effect, found.detectable) == (None,) * 4
    assert found.p == 1.0


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({"a": {"x": 1.0}}, "nothing of 'b', only of a"),
        ({"a": {"x": 1.0}, "b": {"y": 1.0}}, "share none"),
        ({"a": {"x": [1.0, 2.0]}, "b": {"x": 1.0}}, "'x' has 2 under 'a' and 1 under 'b'"),
        ({"a": {"x": 0.0}, "b": {"x": 1.0}}, "that of 'a' on 'x' is 0"),
        ({"a": {"x": 1.0}, "b": {"x": math.nan}}, "finite"),
        ({"a": {"x": []}, "b": {"x": []}}, "prompts have none, such as 'x'"),
    ],
)
def test_bad_input_is_refused(losses, said):
    with pytest.raises(ValueError, match=said):
        compare(losses, "a", "b")


def test_the_plan_is_the_closed_form():
    assert prompts_planned(0.15, 0.10) == prompts_planned(0.15, -0.10) == 18
    assert prompts_planned(0.3, 0.1) == math.ceil(7.849 * 9)
    assert prompts_planned(0.0, 0.1) == 1
    with pytest.raises(ValueError, match="change other than 0"):
        prompts_planned(0.1, 0.0)


@pytest.mark.parametrize("change", [0.0, math.log(0.9)])
def test_nothing_is_seen_where_nothing_is_and_a_planned_effect_is(change):
    """At the spread and number of prompts of the plan; 300 data sets, so ±2.5 % and ±5 %."""
    rng, seen = np.random.default_rng(3), []
    prompts = prompts_planned(0.15, math.log(0.9))
    for _ in range(300):
        seen.append(compare(drawn(rng, prompts, change, 0.15), "optimal", "uniform").p <= 0.05)
    assert np.mean(seen) == pytest.approx(0.78 if change else 0.05, abs=0.08 if change else 0.04)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [8, 16, 32])
def test_the_interval_holds_the_true_ratio(prompts):
    rng, hits = np.random.default_rng(4), []
    for _ in range(500):
        found = compare(drawn(rng, prompts, -0.2, 0.3, seeds=2), "optimal", "uniform")
        hits.append(found.low <= math.exp(-0.2) <= found.high)
    assert 0.92 < np.mean(hits) < 0.98
