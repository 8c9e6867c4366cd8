"""Curves of attention as metrics."""

import pytest
import torch

from lightning_kv.metrics import Clip, metric_by_name


@pytest.mark.parametrize("name", ["retained_mass", "attention_error"])
def test_the_curve_is_taken_as_it_is(name):
    (metric,) = metric_by_name([name]).values()
    curves = {name: torch.tensor([0.5, torch.nan, 1.25, 0.25]), "other": torch.zeros(4)}
    clip = Clip(torch.zeros(4, 16, 2, 2), context=1, attention=curves)
    found = metric.curve(clip)
    assert found.dtype == torch.float64
    assert found.isnan().tolist() == [True, True, False, False]
    assert metric.value(found) == 0.75, "shares above 1 are not cut off"
    metric.update(clip)
    assert metric.compute() == 0.75 and not metric.against_reference()


def test_without_a_probe_there_is_no_value():
    (metric,) = metric_by_name(["retained_mass"]).values()
    with pytest.raises(ValueError, match="without attention"):
        metric.curve(Clip(torch.zeros(4, 16, 2, 2)))
    nothing = {"retained_mass": torch.full((4,), torch.nan)}
    metric.update(Clip(torch.zeros(4, 16, 2, 2), attention=nothing))
    assert metric.clips == 0
