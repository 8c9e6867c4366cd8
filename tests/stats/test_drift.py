"""Every definition of drift against closed forms, loops, simulation and the digits of papers."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kv.stats.drift import NAMES, drift
from lightning_kv.stats.drift_definitions import (
    NotComputable,
    equal_parts,
    prefix_curve,
    quality_drift,
    start_end,
    start_end_corrected,
    theil_sen,
    time_to_fraction,
    vde,
    windowed_minimum,
)

SCORES = st.lists(st.none() | st.just(math.nan) | st.floats(0.01, 100), min_size=0, max_size=60)


def counted(curve):
    return [x for x in curve if x is not None and not math.isnan(x)]


@settings(max_examples=60, deadline=None)
@given(curve=SCORES)
def test_start_end_is_the_difference_of_the_outer_15_per_cent(curve):
    values = counted(curve)
    if len(values) < 2:
        with pytest.raises(NotComputable, match="two values"):
            start_end(curve)
        return
    width = max(1, (15 * len(values)) // 100)
    expected = statistics.fmean(values[:width]) - statistics.fmean(values[-width:])
    assert start_end(curve) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert drift(curve, 4).start_end_abs == pytest.approx(abs(expected), rel=1e-9, abs=1e-9)


def test_the_start_of_81_values_is_12():
    curve = np.arange(81.0)
    assert start_end(curve) == np.arange(12).mean() - np.arange(69, 81).mean()


def test_without_drift_the_absolute_contrast_is_1_13_deviations_and_the_corrected_one_zero():
    noise = np.random.default_rng(0).normal(0.5, 0.2, (4000, 100))
    deviation = 0.2 / math.sqrt(15)
    absolute = statistics.fmean(abs(start_end(row)) for row in noise)
    corrected = statistics.fmean(start_end_corrected(row) for row in noise)
    assert absolute == pytest.approx(1.1284 * deviation, rel=0.03)
    assert abs(corrected) < 0.05 * deviation  # a clip's own estimate of the noise is a bit small


def test_the_corrected_contrast_of_a_real_drop_is_nearly_the_drop():
    curve = [1.0, 1.1] * 10 + [0.5] * 20
    variance = (statistics.variance(curve[:6]) + statistics.variance(curve[-6:])) / 2 / 6
    floor = 2 * math.sqrt(variance) / math.sqrt(math.pi)
    assert start_end_corrected(curve) == pytest.approx(0.55 - floor, rel=1e-12)
    with pytest.raises(NotComputable, match="at least 14 values"):
        start_end_corrected(curve[:13])
    assert start_end_corrected([1.0] * 14) == 0


def test_quality_drift_takes_five_seconds_from_either_end():
    curve = [1.0] * 20 + [0.7] * 7 + [0.4] * 20
    assert quality_drift(curve, fps=4) == pytest.approx(0.6)
    assert quality_drift(curve[::-1], fps=4) == pytest.approx(-0.6)
    assert quality_drift([None, *curve, math.nan], fps=4) == pytest.approx(0.6)
    with pytest.raises(NotComputable, match="at least 10 s"):
        quality_drift([1.0] * 39, fps=4)
    assert quality_drift([1.0] * 40, fps=4) == 0


@settings(max_examples=30, deadline=None)
@given(curve=SCORES, fps=st.sampled_from([0.5, 4.0, 16.0]))
def test_the_slope_is_the_median_of_all_slopes(curve, fps):
    points = [(t / fps, x) for t, x in enumerate(curve) if x is not None and not math.isnan(x)]
    if len(points) < 3:
        with pytest.raises(NotComputable):
            theil_sen(curve, fps)
        return
    slopes = [(y - x) / (t - s) for i, (s, x) in enumerate(points) for t, y in points[i + 1 :]]
    slope, low, high = theil_sen(curve, fps)
    assert slope == pytest.approx(statistics.median(slopes), rel=1e-9, abs=1e-9)
    assert low <= slope + 1e-9
    assert slope <= high + 1e-9


def test_the_interval_of_the_slope_covers_it_and_one_bad_frame_moves_nothing():
    generator = np.random.default_rng(1)
    times = np.arange(40) / 4
    hits = 0
    for _ in range(300):
        _, low, high = theil_sen(1 - 0.05 * times + generator.normal(0, 0.1, 40), fps=4)
        hits += low <= -0.05 <= high
    assert 0.91 <= hits / 300 <= 0.985
    curve = 1 - 0.05 * times
    curve[-1] = -1000
    assert theil_sen(curve, fps=4)[0] == pytest.approx(-0.05)


@settings(max_examples=40, deadline=None)
@given(curve=SCORES, width=st.integers(1, 9))
def test_the_windowed_minimum_is_the_lowest_mean_of_a_window(curve, width):
    values = counted(curve)
    if len(values) < width:
        with pytest.raises(NotComputable, match="no window"):
            windowed_minimum(curve, fps=2, seconds=width / 2)
        return
    means = [statistics.fmean(values[i : i + width]) for i in range(len(values) - width + 1)]
    found = windowed_minimum(curve, fps=2, seconds=width / 2)
    assert found == pytest.approx(min(means), rel=1e-9)


def test_the_time_to_a_fraction_counts_from_the_first_value():
    curve = [None, None, 1.0, 1.0, None, 0.91, 0.89, 1.0, 0.2]
    assert time_to_fraction(curve, fps=2) == 2.0
    assert time_to_fraction(curve, fps=2, fraction=0.5) == 3.0
    with pytest.raises(NotComputable, match=r"never falls below 0\.1"):
        time_to_fraction(curve, fps=2, fraction=0.1)
    with pytest.raises(NotComputable, match="starts positive"):
        time_to_fraction([0.0, -1.0], fps=2)


@pytest.mark.parametrize(
    ("parts", "linear", "log", "late"),
    [
        ((1, 0.9, 0.8), 0.4, 0.06931471805599451, 0.5 / 3),
        ((1,) * 9 + (0.5,), 0.5, 0.0, 4.5 / 45),  # a late collapse ...
        ((1, 0.5) + (1,) * 8, 4.5, 0.5 * math.log(9), 0.5 / 45),  # ... and an early dip
        ((2, 4), 1.0, 0.0, 1.0),
        ((3.0,) * 10, 0.0, 0.0, 0.0),
    ],
)
def test_the_drift_error_has_the_digits_of_its_definitions(parts, linear, log, late):
    found = [vde(parts, weights) for weights in ("linear", "log", "late")]
    assert found == pytest.approx([linear, log, late], rel=1e-12, abs=1e-15)


def test_the_drift_error_needs_a_positive_start_and_known_weights():
    for parts in ([0.0, 1.0], [-1.0, 1.0], [1.0], []):
        with pytest.raises(NotComputable, match="the first positive"):
            vde(parts)
    with pytest.raises(ValueError, match="no weights 'square'") as error:
        vde([1, 2], "square")
    assert not isinstance(error.value, NotComputable)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(10, 60))
def test_equal_parts_hold_every_value_once(length):
    values = np.random.default_rng(length).random(length).tolist()
    sizes = [length // 10 + (index < length % 10) for index in range(10)]
    ends = np.cumsum(sizes)
    expected = [
        statistics.fmean(values[end - size : end]) for end, size in zip(ends, sizes, strict=True)
    ]
    assert equal_parts([None, *values]) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(NotComputable, match="10 parts"):
        equal_parts(values[:9])


def test_prefixes_dilute_the_end():
    curve = [0.7] * 90 + [0.3] * 10
    assert prefix_curve(curve, step=45) == pytest.approx([0.7, 0.7, 0.66])
    assert prefix_curve(curve) == pytest.approx([0.7, 0.66])
    assert prefix_curve([None, 0.5]) == [0.5]
    with pytest.raises(NotComputable):
        prefix_curve([None])


def test_drift_holds_every_definition_and_says_why_one_is_missing():
    curve = [None, *np.linspace(1, 0.5, 50).tolist()]
    found = drift(curve, fps=4)
    values = curve[1:]
    expected = {
        "start_end": start_end(values),
        "start_end_abs": abs(start_end(values)),
        "start_end_corrected": start_end_corrected(values),
        "quality_drift": quality_drift(values, 4),
        "slope": -0.5 / 49 * 4,
        "slope_low": -0.5 / 49 * 4,
        "slope_high": -0.5 / 49 * 4,
        "windowed_minimum": statistics.fmean(values[-4:]),
        "time_to_fraction": next(i for i, x in enumerate(values) if x < 0.9 * np.mean(values[:7]))
        / 4,
        "vde_linear": vde(equal_parts(values), "linear"),
        "vde_log": vde(equal_parts(values), "log"),
        "vde_late": vde(equal_parts(values), "late"),
        "terminal": 0.75,
    }
    assert found.to_dict() == pytest.approx(expected, rel=1e-9)
    assert tuple(expected) == NAMES
    assert found.reasons == {}

    nothing = drift([None, math.nan], fps=4)
    assert set(nothing.to_dict().values()) == {None}
    assert set(nothing.reasons) == set(NAMES)
    short = drift([1.0, 0.9, 0.8], fps=4)
    assert short.start_end == pytest.approx(0.2)
    assert short.quality_drift is None and "two windows of 5 s" in short.reasons["quality_drift"]
    assert {name for name, value in short.to_dict().items() if value is None} == set(short.reasons)


@settings(max_examples=30, deadline=None)
@given(curve=SCORES)
def test_lists_arrays_and_tensors_have_the_same_drift(curve):
    numbers = [math.nan if x is None else x for x in curve]
    expected = drift(curve, 4)
    assert drift(np.array(numbers), 4) == expected
    assert drift(torch.tensor(numbers, dtype=torch.float64), 4) == expected


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf])
def test_a_rate_must_be_positive(fps):
    with pytest.raises(ValueError, match="Pass a positive rate"):
        drift([1.0, 2.0], fps)


def test_an_infinite_value_is_refused_and_not_left_out():
    with pytest.raises(ValueError, match="value 1 is infinite"):
        drift([1.0, math.inf, 2.0], 4)
