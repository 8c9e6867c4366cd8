"""A metric's number does not depend on the precision of what holds it, nor of who calls it."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

sys.path.insert(0, str(Path(__file__).parent))
from test_contract import LARGE, PIXELS, batch, made, told, videos

from lightning_kv.metrics import METRICS, FrechetVideoDistance, JEDi, VideoMetric
from lightning_kv.metrics.backbones import RandomBackbone, Wrapped, backbone
from lightning_kv.metrics.windows import WindowEncoder

CHANGES = {
    "half": lambda module: module.half(),
    "to bfloat16": lambda module: module.to(torch.bfloat16),
    "double": lambda module: module.double(),
    "type": lambda module: module.type(torch.float16),
}
"""How a Trainer, or somebody, changes the precision of a module and all that is in it."""


def holding(metric):
    """A module of somebody's own, with a layer and a metric."""
    module = nn.Module()
    module.layer, module.metric = nn.Linear(1, 1), metric
    return module


def kinds(metric):
    """Dtypes of the states and of the networks."""
    states = []
    for value in metric.metric_state.values():
        states += value if isinstance(value, list) else [value]
    return [x.dtype for x in (*states, *metric.parameters(), *metric.buffers())]


@contextmanager
def precision(kind):
    """What a Trainer does around a step: "bf16-true" and "bf16-mixed" at once."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", METRICS)
def test_the_precision_of_what_holds_a_metric_does_not_matter(name, change):
    arguments, named = batch(name)
    plain, metric = made(name), made(name)
    module = holding(metric)
    metric.update(*arguments, **named)
    before = kinds(metric)
    CHANGES[change](module)
    assert module.layer.weight.dtype != torch.float32, "the module's own layers do change"
    assert kinds(metric) == before
    metric.update(*arguments, **named)
    for _ in range(2):
        plain.update(*arguments, **named)
    assert torch.equal(metric.unit_values(), plain.unit_values())
    assert metric.compute().dtype == torch.float64


@pytest.mark.parametrize("name", METRICS)
def test_the_precision_of_a_step_does_not_matter(name):
    arguments, named = batch(name)
    plain, metric = made(name), made(name)
    plain.update(*arguments, **named)
    with precision(torch.bfloat16):
        metric.update(*arguments, **named)
        made_there = made(name)
        made_there.update(*arguments, **named)
    assert torch.equal(metric.unit_values(), plain.unit_values())
    if name != "aesthetic_quality":  # whose head is of this test's making
        assert torch.equal(made_there.unit_values(), plain.unit_values())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", PIXELS)
def test_videos_of_any_floats_are_looked_at(name, kind):
    pair = videos(2, 3, LARGE if name == "ms_ssim" else (36, 40))
    narrow = [(clip / 255).to(kind) for clip in pair]
    metric, wide = made(name), made(name)
    metric.update(*narrow, **told(2))
    wide.update(*(clip.float() for clip in narrow), **told(2))
    assert torch.allclose(metric.unit_values(), wide.unit_values(), rtol=1e-5, atol=1e-7)


def test_one_metric_changes_no_network_of_another():
    encoder = RandomBackbone()
    one, other = METRICS["subject_consistency"](encoder), METRICS["lag_coherence"](encoder, lag=1)
    clip = videos(1)[0]
    expected = other(clip)
    for change in CHANGES.values():
        change(nn.ModuleDict({"one": one}))
    MetricCollection([one]).set_dtype(torch.float16)
    one.set_dtype(torch.float16)
    assert encoder.net[0].weight.dtype == torch.float32
    other.reset()
    assert torch.equal(other(clip), expected)


def test_a_network_moves_and_keeps_its_dtype():
    for network in (RandomBackbone(2), RandomBackbone(3)):
        moved = network.to("meta", torch.float16)
        assert moved is network
        assert {(p.device.type, p.dtype) for p in network.parameters()} == {("meta", torch.float32)}
    lpips = pytest.importorskip("lightning_kv.metrics.backbones.lpips")
    pytest.importorskip("lpips")
    trunk = lpips.LPIPSNetwork("squeeze").half()
    assert {p.dtype for p in trunk.parameters()} == {torch.float32}


def test_somebodys_network_is_asked_in_its_own_dtype():
    class Asked(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.layer = nn.Linear(3, 2).to(kind)

        def forward(self, frames):
            self.given = frames.dtype
            return self.layer(frames.mean((2, 3)))

    for kind in (torch.float64, torch.float32, torch.bfloat16):
        network = Wrapped(Asked(kind))
        for shown in (torch.float16, torch.float32, torch.float64):
            assert network(torch.ones(1, 3, 4, 4, dtype=shown)).dtype == kind
            assert network.module.given == kind
    assert Wrapped(nn.Flatten())(torch.ones(1, 3, 4, 4).half()).dtype == torch.float32


def test_a_network_of_a_metric_that_is_no_backbone_keeps_its_dtype():
    class Own(VideoMetric):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(3, 1, 1)

        def frame_values(self, preds, target=None):
            return self.net(preds).mean((1, 2, 3))

    metric, clip = Own(), videos(1)[0]
    expected = metric(clip)
    holding(metric).half()
    metric.reset()
    assert torch.equal(metric(clip), expected)


@pytest.mark.parametrize("kind", [FrechetVideoDistance, JEDi])
@pytest.mark.parametrize("keep", [True, False])
def test_sets_keep_their_features_and_sums(kind, keep):
    encoder = RandomBackbone(3, num_features=4)
    plain, metric = (kind(encoder, keep_features=keep) for _ in range(2))
    module = holding(metric)
    sets = [(videos(4, 8, (16, 16), seed)[seed % 2], bool(seed % 2)) for seed in range(4)]
    for clips, real in sets:
        plain.update(clips, real=real)
        with precision(torch.bfloat16):
            metric.update(clips, real=real)
        for change in CHANGES.values():
            change(module)
    assert torch.equal(metric.compute(), plain.compute())
    assert kinds(metric) == kinds(plain)


@pytest.mark.parametrize("name", ["random-2dconv", "random-3dconv", "panorama-encoder"])
def test_windows_look_in_the_precision_of_the_network(name):
    frames = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for kind in (None, torch.bfloat16):
        windows = WindowEncoder(backbone(name)).windows()
        if kind is None:
            windows.add(frames)
        else:
            windows.backbone.to(kind)
            with precision(kind):
                windows.add(frames)
        found.append(windows.features())
    assert found[0].dtype == torch.float32 and torch.equal(*found)
