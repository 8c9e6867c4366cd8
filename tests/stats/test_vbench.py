import pytest

from lightning_kv.stats.vbench import SCALES, vbench_quality

SCORES = {
    "subject_consistency": 0.95,
    "background_consistency": 0.95,
    "temporal_flickering": 0.98,
    "motion_smoothness": 0.98,
    "dynamic_degree": 0.6,
    "aesthetic_quality": 0.6,
    "imaging_quality": 0.7,
}
SIX = {name: score for name, score in SCORES.items() if name != "temporal_flickering"}


def test_the_anchors_of_the_specification():
    assert vbench_quality(SCORES) == pytest.approx(0.8245764893613621, abs=1e-15)
    assert vbench_quality(SIX, flickering=False) == pytest.approx(0.8024907570153126, abs=1e-15)


@pytest.mark.parametrize("name", SCALES)
def test_a_missing_dimension_is_not_zero(name):
    with pytest.raises(ValueError, match=f"7 dimensions: {name} missing, none too many"):
        vbench_quality({key: score for key, score in SCORES.items() if key != name})


def test_the_six_are_not_taken_for_the_seven():
    with pytest.raises(ValueError, match="temporal_flickering too many"):
        vbench_quality(SCORES, flickering=False)
    with pytest.raises(ValueError, match="style too many"):
        vbench_quality(SCORES | {"style": 0.5})


@pytest.mark.parametrize("value", [70.0, -0.1, float("nan")])
def test_a_score_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match="imaging_quality"):
        vbench_quality(SCORES | {"imaging_quality": value})


def test_motion_counts_twice_as_little():
    gains = {
        name: vbench_quality(SCORES | {name: SCORES[name] + 0.01}) - vbench_quality(SCORES)
        for name in ("dynamic_degree", "aesthetic_quality")
    }
    assert gains["dynamic_degree"] == pytest.approx(gains["aesthetic_quality"] / 2)
