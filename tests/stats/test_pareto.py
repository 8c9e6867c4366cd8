"""Fronts against loops and grids, curves against closed forms."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import trapezoid
from scipy.interpolate import pchip_interpolate

from lightning_kv.stats.pareto import front, front_probability, quality_gap

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=9)


def named(points):
    return {str(place): tuple(map(float, point)) for place, point in enumerate(points)}


@settings(max_examples=150, deadline=None)
@given(POINTS, st.booleans())
def test_front_is_what_nothing_beats(points, higher):
    points, sign = named(points), 1 if higher else -1
    expected = {
        name
        for name, (q, c) in points.items()
        if not any(
            sign * other >= sign * q and cost <= c and (other != q or cost != c)
            for other, cost in points.values()
        )
    }
    found = front(points, higher)
    assert set(found) == expected and len(found) == len(expected)
    assert [points[name][1] for name in found] == sorted(points[name][1] for name in found)


def test_ties_stay_and_rounding_makes_no_winner():
    twins = {"a": (0.3, 1.0), "b": (0.1 + 0.2, 1.0), "c": (0.3, 2.0)}
    assert front(twins) == ["a", "b"]
    assert front({}) == []


def test_probability_has_a_closed_form_for_two_policies():
    """``full`` leads on 1 of 8 prompts, by little; the dear one needs a resample that has it."""
    prompts = "abcdefgh"
    cheap = dict.fromkeys(prompts, 0.5)
    dear = cheap | {"a": 0.6}
    found = front_probability({"cheap": cheap, "dear": dear}, {"cheap": 1, "dear": 2}, True, 20_000)
    assert found["cheap"] == 1.0
    assert found["dear"] == pytest.approx(1 - (7 / 8) ** 8, abs=0.015)


def slow_probability(values, costs, higher, resamples, seed):
    """By loops, one resample at a time, on the shared prompts alone."""
    shared = sorted(set.intersection(*(set(own) for own in values.values())))
    draws = np.random.default_rng(seed).integers(0, len(shared), (resamples, len(shared)))
    counts = dict.fromkeys(values, 0)
    for row in draws:
        drawn = [shared[i] for i in row]
        points = {
            name: (
                math.fsum(own[p] for p in drawn) / len(drawn),
                math.fsum(
                    costs[name][p] if isinstance(costs[name], dict) else costs[name] for p in drawn
                )
                / len(drawn),
            )
            for name, own in values.items()
        }
        for name in front(points, higher):
            counts[name] += 1
    return {name: count / resamples for name, count in counts.items()}


@pytest.mark.parametrize("higher", [True, False])
def test_probability_is_that_of_a_loop_over_resamples(higher):
    rng = np.random.default_rng(0)
    base = rng.normal(size=7)
    values = {n: dict(zip("abcdefg", base + rng.normal(0, 0.5, 7), strict=True)) for n in "uvwx"}
    values["twin"] = dict(values["u"])
    del values["v"]["c"]
    values["w"]["only here"] = 99.0
    costs = {n: dict(zip("abdefg", rng.random(6), strict=True)) for n in "uvw"} | {"x": 0.5}
    costs["twin"] = dict(costs["u"])
    expected = slow_probability(values, costs, higher, 300, 4)
    found = front_probability(values, costs, higher, 300, 4)
    assert found == pytest.approx(expected, abs=1e-12)
    assert found["u"] == found["twin"] and 0.0 < found["w"] < 1.0


def test_what_prompts_have_in_common_drops_out():
    """The dear policy is better by a little on every prompt, and prompts differ by a lot."""
    prompts = np.random.default_rng(1).normal(0, 10, 20)
    cheap = {str(i): value for i, value in enumerate(prompts)}
    dear = {key: value + 0.01 for key, value in cheap.items()}
    found = front_probability({"cheap": cheap, "dear": dear}, {"cheap": 1.0, "dear": 2.0})
    assert found == {"cheap": 1.0, "dear": 1.0}


def test_many_policies_take_less_than_a_second():
    rng = np.random.default_rng(2)
    values = {str(i): {str(p): float(rng.normal()) for p in range(64)} for i in range(20)}
    costs = {name: {p: float(rng.random()) for p in own} for name, own in values.items()}
    start = time.perf_counter()
    front_probability(values, costs)
    assert time.perf_counter() - start < 1


def test_gap_of_curves_with_closed_forms():
    costs = np.array([1.0, 2.0, 8.0, 16.0])
    line = [(2 * math.log(c), c) for c in costs]
    assert quality_gap([(q + 0.3, c) for q, c in line], line) == pytest.approx(0.3, rel=1e-12)
    # Two straight lines over the log, 0.5 log c apart, from 2 to 8: 0.5 times the middle's log.
    steeper = [(2.5 * math.log(c), c) for c in (2.0, 4.0, 8.0)]
    assert quality_gap(steeper, line) == pytest.approx(0.5 * math.log(4), rel=1e-12)
    assert quality_gap(line, steeper) == -quality_gap(steeper, line)
    assert quality_gap([*reversed(line)], steeper) == quality_gap(line, steeper)


def test_gap_of_a_bent_curve_is_that_of_many_small_steps():
    own, other = [(0.1, 1.0), (0.7, 3.0), (0.9, 30.0)], [(0.2, 2.0), (0.5, 5.0), (0.95, 20.0)]
    x = np.linspace(math.log(2), math.log(20), 40_001)
    curves = (
        pchip_interpolate(np.log([c for _, c in some]), [q for q, _ in some], x)
        for some in (own, other)
    )
    first, second = (trapezoid(y, x) / (x[-1] - x[0]) for y in curves)
    assert quality_gap(own, other) == pytest.approx(first - second, abs=1e-8)


def test_curves_without_a_common_cost_have_no_gap():
    left, right = [(0.1, 1.0), (0.2, 2.0)], [(0.3, 2.0), (0.4, 4.0)]
    assert quality_gap(left, right) is None
    assert quality_gap(left, [(q, c + 1) for q, c in right]) is None


@pytest.mark.parametrize(
    ("call", "given", "remedy"),
    [
        (lambda: front({"a": (math.nan, 1.0)}), "1 of 2", "Leave out"),
        (lambda: front_probability({"a": {"x": 1.0}, "b": {"y": 1.0}}, {}), "2 policies", "same"),
        (lambda: front_probability({"a": {"x": 1.0}}, {}), "0 of 1", "one number"),
        (
            lambda: front_probability({"a": {"x": 1.0, "y": 2.0}}, {"a": {"x": 1.0}}),
            "1 of 2",
            "each prompt",
        ),
        (lambda: quality_gap([(1.0, 2.0)], [(1.0, 2.0)]), "[2.0]", "two or more"),
        (lambda: quality_gap([(1.0, 2.0), (2.0, 2.0)], []), "[2.0, 2.0]", "keep the best"),
        (lambda: quality_gap([(1.0, 0.0), (2.0, 2.0)], []), "[0.0, 2.0]", "above 0"),
    ],
)
def test_errors_say_what_was_given_and_what_would_work(call, given, remedy):
    with pytest.raises(ValueError) as error:
        call()
    assert given in str(error.value)
    assert remedy in str(error.value)
