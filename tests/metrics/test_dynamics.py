"""Flow metrics on known flows, and smoothness, against VBench's rules written out in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_kv.metrics.backbones import WeightsUnavailable
from lightning_kv.metrics.backbones.interpolators import AMT, LinearMidpoint
from lightning_kv.metrics.base import read_clip
from lightning_kv.metrics.dynamics import (
    DynamicDegree,
    FlowMagnitude,
    MotionSmoothness,
)
from lightning_kv.metrics.functional.dynamics import (
    dynamic_rule,
    is_dynamic,
    mean_motion,
    motion_score,
    sampling_interval,
)


class Known(nn.Module):
    """A flow that is known: what the red and green of both frames differ by, times 40 pixels."""

    name = "known"

    def forward(self, first, second):
        assert not self.training
        return 40 * (second - first)[:, :2]


def random_frames(frames: int, height: int = 12, width: int = 16) -> torch.Tensor:
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(frames))


def levels(*values: float, side: int = 16) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, side, side)


def test_the_rule_has_the_published_anchor():
    assert sampling_interval(16) == 2
    assert len(range(0, 81, 2)) == 41
    assert dynamic_rule(41, min(480, 832)) == (11.25, 10)


@pytest.mark.parametrize(
    ("frames", "needed"),
    [(2, 0), (6, 2), (10, 2), (14, 4), (16, 4), (18, 4), (22, 6), (26, 6), (41, 10)],
)
def test_halves_of_needed_steps_go_to_the_even_number(frames, needed):
    # 2, 6, 10 ... frames are an odd number of halves: 0.5, 1.5, 2.5 ...
    assert dynamic_rule(frames, 256) == (6.0, needed)


def test_a_clip_moves_if_enough_steps_exceed_the_threshold():
    assert is_dynamic([11.26] * 10 + [0.0] * 30, 480)
    assert not is_dynamic([11.26] * 9 + [0.0] * 31, 480)
    assert not is_dynamic([11.25] * 40, 480)
    assert not is_dynamic([], 480)


def test_scores_are_the_longest_vectors():
    flow = torch.randn(2, 2, 13, 17, generator=torch.Generator().manual_seed(0)) * 9
    for one, top, mean in zip(flow.numpy(), motion_score(flow), mean_motion(flow), strict=True):
        lengths = np.sqrt(np.square(one[0].astype(np.float64)) + np.square(one[1]))
        longest = np.sort(lengths.ravel())[::-1][: int(13 * 17 * 0.05)]
        assert top.item() == pytest.approx(longest.mean(), rel=1e-6)
        assert mean.item() == pytest.approx(lengths.mean(), rel=1e-6)


def vbench_scores(frames: torch.Tensor, fps: float) -> list[float]:
    """Scores of the steps, as VBench's loop goes, for the flow of ``Known``."""
    kept = [frame.double().numpy() for frame in frames][:: max(1, round(fps / 8))]
    scores = []
    for first, second in itertools.pairwise(kept):
        u, v = (40 * (second - first))[:2]
        radius = np.sqrt(u**2 + v**2).ravel()
        scores.append(np.sort(radius)[::-1][: int(len(radius) * 0.05)].mean())
    return scores


@pytest.mark.parametrize("fps", [6.0, 8.0, 16.0, 20.0, 24.0, 30.0])
def test_steps_are_those_of_vbench(fps):
    frames = random_frames(19)
    metric = DynamicDegree(Known())
    curve = metric.curve(frames, fps=fps)
    interval = sampling_interval(fps)
    counted = [i for i in range(19) if not curve[i].isnan()]
    assert counted == list(range(interval, 19, interval))
    expected = vbench_scores(frames, fps)
    assert (curve[counted] * 12 / 256).tolist() == pytest.approx(expected, rel=1e-5)
    assert metric.value(curve) == float(is_dynamic(expected, 12))


def test_the_degree_is_the_share_of_clips_that_move():
    # A step of 0.1 in red and green is 4 sqrt(2) = 5.66 px; the threshold at 16 px is 0.375.
    metric = DynamicDegree(Known())
    still, moving = levels(*[0.5] * 9), levels(*[0.5, 0.6] * 4, 0.5)
    for pixels in (still, moving, moving):
        metric.update(pixels[None], fps=8.0)
    assert metric.compute().item() == pytest.approx(2 / 3)
    assert metric.name == "dynamic_degree/known"


def test_the_context_does_not_count():
    # All motion lies in the context.
    pixels = levels(*[0.2, 0.8] * 4, *[0.8] * 8)
    metric = DynamicDegree(Known())
    curve = metric.curve(pixels, fps=8.0)
    assert metric.value(curve) == 1.0
    curve[:8] = torch.nan
    assert metric.add(curve) == 0.0
    curve[:] = torch.nan
    assert metric.add(curve) is None and metric.compute() == 0


def test_magnitude_is_in_pixels_of_the_original_size():
    curve = FlowMagnitude(Known()).curve(levels(0.5, 0.6, 0.5), fps=8.0)
    assert curve[0].isnan()
    assert curve[1:].tolist() == pytest.approx([4 * 2**0.5] * 2, rel=1e-5)


def test_frames_per_second_must_be_known():
    for metric in (DynamicDegree(Known()), FlowMagnitude(Known())):
        with pytest.raises(ValueError, match="fps"):
            metric.curve(random_frames(3))
        with pytest.raises(ValueError, match=r"Pass update\(preds, fps=...\)"):
            metric.reader()


def vbench_smoothness(frames: torch.Tensor) -> float:
    """VBench's loop over a video, with the mean of both neighbours as the interpolated frame."""
    files = np.round(frames.numpy().astype(np.float64) * 255).astype(np.uint8)
    even, odd = files[0::2], files[1::2]
    between = [
        ((a.astype(np.float64) + b.astype(np.float64)) / 2).astype(np.uint8)
        for a, b in itertools.pairwise(even)
    ]
    steps = [
        np.abs(middle.astype(np.int16) - odd[i].astype(np.int16)).mean()
        for i, middle in enumerate(between)
    ]
    return (255.0 - np.mean(steps)) / 255.0


@pytest.mark.parametrize("frames", [3, 4, 8, 9, 17])
def test_smoothness_is_vbenchs(frames):
    pixels = random_frames(frames)
    metric = MotionSmoothness("linear-midpoint")
    metric.update(pixels[None])
    assert metric.compute().item() == pytest.approx(vbench_smoothness(pixels), rel=1e-9)


def test_a_triple_has_its_value_where_it_closes():
    curve = MotionSmoothness("linear-midpoint").curve(levels(0, 0.2, 0.4, 1, 0.4, 0))
    assert curve.isnan().tolist() == [True, True, False, True, False, True]
    assert curve[[2, 4]].tolist() == pytest.approx([1.0, 0.4])


def test_the_linear_midpoint_is_not_passed_off_as_vbenchs():
    metric = MotionSmoothness("linear-midpoint")
    assert metric.name == "motion_smoothness/linear-midpoint"
    assert not metric.backbone.comparable and "not the number of VBench" in metric.recipe
    assert isinstance(LinearMidpoint.load(), LinearMidpoint)


@pytest.mark.parametrize(
    "metric",
    [DynamicDegree(Known()), FlowMagnitude(Known()), MotionSmoothness("linear-midpoint")],
    ids=lambda metric: metric.name,
)
@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=7), fps=st.sampled_from([8.0, 16.0, 24])
)
def test_curves_do_not_depend_on_blocks(metric, sizes, fps):
    frames = random_frames(sum(sizes))
    blocks = [(block, None) for block in frames.split(sizes)]
    whole = read_clip({"": metric}, [(frames, None)], fps=fps)[""]
    split = read_clip({"": metric}, blocks, fps=fps)[""]
    # Flows are summed in float32 (8 eps), in an order that may depend on the size of a block.
    torch.testing.assert_close(split, whole, rtol=1e-6, atol=0, equal_nan=True)


class Middle(nn.Module):
    """Stands in for an exported interpolator: the mean, if it is shown sides it can take."""

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        if first.shape[2] % 16 != 0 or first.shape[3] % 16 != 0:
            raise ValueError("sides are no multiples of 16")
        return (first + second) / 2


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_an_exported_interpolator_is_padded_and_cropped(tmp_path):
    path = tmp_path / "amt-s.torchscript.pt"
    torch.jit.script(Middle()).save(str(path))
    first, second = random_frames(2, 18, 33).split(1)
    found = AMT.load(path)(first, second)
    torch.testing.assert_close(found, (first + second) / 2, rtol=0, atol=1e-6)
    metric = MotionSmoothness(given=path, accept=["CC-BY-NC-SA-4.0"])
    pixels = random_frames(9)
    metric.update(pixels[None])
    assert metric.compute().item() == pytest.approx(vbench_smoothness(pixels), rel=1e-9)
    assert metric.name == "motion_smoothness/amt-s" and len(metric.backbone.weights_sha256) == 64


def test_amt_asks_for_its_licence_and_for_an_exported_file(tmp_path, monkeypatch):
    monkeypatch.delenv("LIGHTNING_KV_ACCEPT_LICENSE", raising=False)
    path = tmp_path / "amt-s.pth"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(WeightsUnavailable, match=r"CC-BY-NC-SA-4\.0"):
        MotionSmoothness(given=path)
    with pytest.raises(ValueError, match=r"is no TorchScript.*Export the network"):
        MotionSmoothness(given=path, accept=["CC-BY-NC-SA-4.0"])


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="not defined on 'i3d'"):
        DynamicDegree("i3d")
    with pytest.raises(ValueError, match="not defined on 'linear-midpoint'"):
        FlowMagnitude("linear-midpoint")
    with pytest.raises(ValueError, match="No backbone 'rafd'"):
        DynamicDegree("rafd")
    with pytest.raises(ValueError, match=r"gave \(1, 3, 12, 16\) for two frames"):
        DynamicDegree(LinearMidpoint()).curve(random_frames(3), fps=8.0)


def test_modules_of_ones_own_are_frozen_and_carry_their_name():
    module = nn.Sequential(nn.Conv2d(3, 3, 1))
    module.forward = lambda first, second: module[0](first)
    metric = MotionSmoothness(module.train())
    assert metric.name == "motion_smoothness/sequential"
    assert not module.training and not any(p.requires_grad for p in module.parameters())
