"""Divergence on synthetic growth, and its calibration."""

import numpy as np
import pytest

from lightning_kv.stats.divergence import calibrated_divergence, divergence_onset, growth_rate


def test_calibration_puts_the_floor_at_0_and_the_ceiling_at_1():
    floor, ceiling = np.array([0.0, 0.1, 0.2]), np.array([0.0, 1.1, 2.2])
    for curve, expected in ((floor, 0.0), (ceiling, 1.0), ((floor + ceiling) / 2, 0.5)):
        found = calibrated_divergence(curve, floor, ceiling)
        assert np.isnan(found).tolist() == [True, False, False]  # the first frame was given
        assert found[1:].tolist() == pytest.approx([expected] * 2, abs=1e-6)
    assert np.isnan(calibrated_divergence([None, 3.0], [0.0, 0.0], [1.0, 2.0])[0])
    assert np.isnan(calibrated_divergence([0.5], [1.0], [0.2])).all()
    with pytest.raises(ValueError, match=r"2, 1, 2 frames.*same number"):
        calibrated_divergence([0.0, 1.0], [0.0], [1.0, 1.0])


def test_the_onset_is_the_first_frame_above_the_threshold():
    curve = [None, 0.0, 0.1, 0.100001, 0.0, 0.9]
    assert divergence_onset(curve, rate=2) == 1.5
    assert divergence_onset(curve, rate=2, threshold=0.5) == 2.5
    assert divergence_onset(curve, rate=2, threshold=1) is None
    with pytest.raises(ValueError, match="positive rate"):
        divergence_onset(curve, rate=0)


@pytest.mark.parametrize("rate", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("exponent", [0.7, 3.0, -0.2])
def test_the_growth_rate_is_the_exponent(rate, exponent):
    times = np.arange(20) / rate
    curve = 1e-4 * np.exp(exponent * times)
    found = growth_rate(curve, rate)
    assert found is None if exponent < 0 else found == pytest.approx(exponent, rel=1e-9)


def test_growth_is_measured_before_saturation_and_over_frames_that_differ():
    times = np.arange(40) / 4
    curve = np.minimum(1e-3 * np.exp(2 * times), 1.0)
    padded = [None, 0.0, 0.0, *curve]
    below = curve[: int((curve >= 0.5).argmax()) + 1]
    expected = np.polyfit(times[: len(below)], np.log(below), 1)[0]
    assert growth_rate(padded, rate=4) == pytest.approx(expected, rel=1e-9)
    assert abs(np.polyfit(times, np.log(curve), 1)[0] - 2) > 1  # what saturation would have done
    assert growth_rate([0.0, None, 0.0], rate=4) is None
    assert growth_rate([0.0, 1.0, 0.9], rate=4) is None
    with pytest.raises(ValueError, match="above 0"):
        growth_rate([1.0, 2.0], rate=4, saturated=0)
