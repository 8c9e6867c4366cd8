import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_kv.metrics.backbones import Backbone, WeightsUnavailable, backbone
from lightning_kv.metrics.base import clip_value, read_clip
from lightning_kv.metrics.consistency import (
    BackgroundConsistency,
    FeatureSimilarity,
    LagCoherence,
    SubjectConsistency,
)
from lightning_kv.metrics.functional import consistency, lag_coherence

GOLDEN = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])


class Pool(Backbone):
    """Signed features: colours against grey, in four places."""

    name, num_features, recipe = "pool", 12, "mean colours of four quarters"
    calls = 0

    def forward(self, frames):
        self.calls += 1
        return nn.functional.adaptive_avg_pool2d(frames - 0.5, 2).flatten(1)


def frames(count, seed=0):
    return torch.rand(count, 3, 6, 8, generator=torch.Generator().manual_seed(seed))


def cos(a, b):
    a, b = a.double(), b.double()
    return (sum(x * y for x, y in zip(a, b, strict=True)) / (a @ a).sqrt() / (b @ b).sqrt()).item()


def slow(features, anchor=0):
    """VBench's formula as it is written."""
    values = [float("nan")]
    for t in range(1, len(features)):
        previous, first = (cos(features[t], features[s]) for s in (t - 1, anchor))
        values.append((max(0, previous) + max(0, first)) / 2)
    return torch.tensor(values, dtype=torch.float64)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_the_anchor_of_the_specification():
    found = consistency(GOLDEN)
    assert clip_value(found.value) == pytest.approx(0.25, rel=1e-12)
    assert found.previous[1:].tolist() == pytest.approx([0, 0], abs=1e-12)
    assert found.first[1:].tolist() == pytest.approx([0, 1], abs=1e-12)


@given(seed=st.integers(0, 999), count=st.integers(1, 9), anchor=st.integers(0, 8))
@settings(max_examples=40, deadline=None)
def test_consistency_is_the_formula(seed, count, anchor):
    features = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    close(consistency(features, anchor % count).value, slow(features, anchor % count))


@pytest.mark.parametrize("broken", [0.0, torch.nan, torch.inf])
def test_a_feature_without_a_direction_is_refused(broken):
    features = GOLDEN.clone()
    features[1] = broken
    for measure in (consistency, lambda x: lag_coherence(x, 1)):
        with pytest.raises(ValueError, match="1 of 3 features have no direction"):
            measure(features)


def test_there_must_be_an_anchor_and_a_lag():
    with pytest.raises(ValueError, match="no frame 3"):
        consistency(GOLDEN, 3)
    with pytest.raises(ValueError, match="0 was given"):
        lag_coherence(GOLDEN, 0)
    with pytest.raises(ValueError, match="0 was given"):
        LagCoherence(Pool(), lag=0)


@given(seed=st.integers(0, 99), count=st.integers(1, 9), lag=st.integers(1, 10))
@settings(max_examples=40, deadline=None)
def test_lag_coherence_is_the_mean_over_all_pairs(seed, count, lag):
    features = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    pairs = [
        cos(features[s], features[t])
        for s, t in itertools.combinations(range(count), 2)
        if t - s == lag
    ]
    found = lag_coherence(features, lag)
    assert len(found) == count and int(found.isnan().sum()) == min(lag, count)
    value = clip_value(found)
    assert value == pytest.approx(sum(pairs) / len(pairs)) if pairs else value is None


METRICS = [
    SubjectConsistency(Pool()),
    LagCoherence(Pool(), lag=1),
    LagCoherence(Pool(), lag=5),
    FeatureSimilarity(Pool()),
]


def whole(metric, pixels, reference):
    """The same from the features of all frames at once."""
    features, other = Pool()(pixels), Pool()(reference)
    if isinstance(metric, SubjectConsistency):
        return slow(features)
    if isinstance(metric, LagCoherence):
        return lag_coherence(features, metric.lag)
    return torch.tensor(
        [cos(a, b) for a, b in zip(features, other, strict=True)], dtype=torch.float64
    )


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_curves_do_not_depend_on_the_blocks(sizes, seed):
    pixels, reference = frames(sum(sizes), seed), frames(sum(sizes), seed + 100)
    blocks = list(zip(pixels.split(sizes), reference.split(sizes), strict=True))
    found = read_clip({str(i): metric for i, metric in enumerate(METRICS)}, blocks)
    for i, metric in enumerate(METRICS):
        wanted = whole(metric, pixels, reference)
        torch.testing.assert_close(found[str(i)], wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_metrics_on_one_backbone_cost_one_forward_per_block():
    shared = Pool()
    kinds = (SubjectConsistency, FeatureSimilarity, LagCoherence, BackgroundConsistency)
    metrics = {kind.name: kind(shared) for kind in kinds}
    pixels, reference = frames(16), frames(16, 1)
    read_clip(metrics, list(zip(pixels.split(4), reference.split(4), strict=True)))
    assert shared.calls == 8  # four blocks of the clip, four of the reference


def test_two_clips_do_not_mix():
    metric, pixels = SubjectConsistency(Pool()), frames(5)
    first = metric.curve(pixels)
    metric.curve(frames(5, 3))
    close(metric.curve(pixels), first)


def test_a_frozen_clip_is_fully_consistent_and_a_changing_one_is_not():
    frozen = frames(1).expand(6, -1, -1, -1)
    for kind in (SubjectConsistency, BackgroundConsistency, lambda b: LagCoherence(b, lag=2)):
        assert clip_value(kind(Pool()).curve(frozen)) == pytest.approx(1)
        assert clip_value(kind(Pool()).curve(frames(6))) < 0.9


def test_a_clip_that_equals_its_reference_is_as_similar_as_can_be():
    pixels = frames(4)
    metric = FeatureSimilarity(Pool())
    found = clip_value(metric.curve(pixels, pixels.clone()))
    assert found == pytest.approx(metric.identical, abs=1e-12)


def test_similarity_needs_a_reference():
    for call in (FeatureSimilarity(Pool()).curve, FeatureSimilarity(Pool()).update):
        with pytest.raises(ValueError, match=r"'semantic_similarity/pool'.*target is missing"):
            call(frames(2)[None] if call.__name__ == "update" else frames(2))


def test_means_over_clips_weigh_clips_alike():
    metric = SubjectConsistency(Pool())
    clips = [frames(count, count) for count in (2, 9)]
    metric.update(clips)
    wanted = [slow(Pool()(clip))[1:].mean().item() for clip in clips]
    assert metric.compute().item() == pytest.approx(sum(wanted) / 2, rel=1e-6)


def test_results_name_the_backbone_and_its_recipe():
    metric = SubjectConsistency(backbone="random-2dconv")
    assert metric.name == "subject_consistency/random-2dconv"
    assert metric.recipe.endswith(metric.backbone.recipe) and "meaningless" in metric.recipe
    assert SubjectConsistency.name == "subject_consistency"
    assert LagCoherence(Pool(), lag=7).name == "lag_coherence/pool"
    assert "7 pixel frames" in LagCoherence(Pool(), lag=7).recipe


def test_a_backbone_that_does_not_fit_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="not defined on 'clip-vit-b32'"):
        SubjectConsistency("clip-vit-b32")
    with pytest.raises(ValueError, match="not defined on 'i3d'"):
        SubjectConsistency("i3d=/somewhere")
    with pytest.raises(ValueError, match="takes clips of 8"):
        SubjectConsistency(backbone("random-3dconv"))
    monkeypatch.setenv("LIGHTNING_KV_MODELS", str(tmp_path))
    monkeypatch.setenv("LIGHTNING_KV_DINO_VITB16", str(tmp_path))
    with pytest.raises(WeightsUnavailable, match="lightning-kv fetch dino-vitb16"):
        SubjectConsistency()


def test_shards_merge_by_addition():
    clips = [frames(count, count) for count in (4, 5, 6)]
    metrics = [SubjectConsistency("random-2dconv") for _ in range(3)]
    for metric, shard in zip(metrics, (clips, clips[:1], clips[1:]), strict=True):
        metric.update(shard)
    metrics[1].merge_state(metrics[2])
    assert metrics[1].compute().item() == pytest.approx(metrics[0].compute().item(), rel=1e-12)
