"""Curves of attention as metrics."""

import pytest
import torch

from lightning_kv.metrics import metric_by_name


@pytest.mark.parametrize("name", ["retained_mass", "attention_error"])
def test_the_curve_is_taken_as_it_is(name):
    (metric,) = metric_by_name([name]).values()
    values = torch.tensor([torch.nan, torch.nan, 1.25, 0.25])
    found = metric.curve(values)
    assert found.dtype == torch.float64
    assert found.isnan().tolist() == [True, True, False, False]
    assert metric.value(found) == 0.75, "shares above 1 are not cut off"
    metric.update(values[None])
    assert metric.compute() == 0.75 and not metric.against_reference()
    metric.update([torch.ones(1), torch.full((5,), torch.nan)])
    assert metric.compute() == 0.875


@pytest.mark.parametrize("curves", [None, torch.zeros(4), torch.zeros(1, 4).long(), [[0.5]]])
def test_what_are_no_curves_is_refused(curves):
    (metric,) = metric_by_name(["retained_mass"]).values()
    with pytest.raises(ValueError, match="'retained_mass' takes curves of clips"):
        metric.update(curves)
