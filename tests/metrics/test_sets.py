"""Metrics of sets: what they keep, merge, save and refuse, in one process and in two."""

from __future__ import annotations

import importlib.util
import io
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_kv.metrics.backbones.base import RandomBackbone
from lightning_kv.metrics.frechet import frechet_distance, frechet_error, null_distance
from lightning_kv.metrics.kernel import JEDI, KVD, kernel_distance
from lightning_kv.metrics.set_base import windows_recipe
from lightning_kv.metrics.sets import (
    FrechetVideoDistance,
    VideoKernelDistance,
    check_comparable,
)
from lightning_kv.metrics.suite import set_metric

SCRIPT = Path(__file__).with_name("ranks.py")
spec = importlib.util.spec_from_file_location("ranks", SCRIPT)
ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranks)

GENERATED, REAL = ranks.features()
ALL = slice(0, 20)


def made(name="fvd", rows=ALL, **options):
    kind, fixed = ranks.METRICS[name]
    return ranks.fill(kind(num_features=6, **fixed, **options), rows)


class Colours(nn.Module):
    """Mean colour of the first and the last frame; drops the batch axis of a single clip."""

    name, num_features, recipe = "colours", 6, "mean colour of the ends"

    def forward(self, clips):
        assert not self.training
        ends = clips[:, [0, -1]].mean((3, 4)).flatten(1)
        return ends.squeeze(0)


def clips(n, seed=0):
    return torch.rand(n, 16, 3, 4, 5, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes say."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, SCRIPT, folder], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("share", ["uneven", "empty"])
def test_two_processes_say_the_same_of_clips_to_rounding(two, share):
    one = ranks.clip_results(ALL)
    assert one.keys() == {"psnr", "recall"} and 0 < one["recall"][0] < 1
    for rank in two:
        for name, expected in one.items():
            found = rank[f"clips-{share}"][name]
            assert found == pytest.approx(expected, rel=1e-12, nan_ok=True), name
            assert not all(math.isnan(value) for value in found)


@pytest.mark.parametrize("share", ["uneven", "empty"])
@pytest.mark.parametrize("name", ranks.METRICS)
def test_two_processes_say_what_one_says_to_the_last_digit(two, name, share):
    one = ranks.results(ALL)[name]
    for rank in two:
        assert rank[share][name] == one
    assert one["kept"]
    assert bool(one["sums"]) == name.endswith("moments")


def test_a_clip_that_a_padding_sampler_repeats_counts_once(two):
    for rank in two:
        assert rank["padded"] == made().compute().item()


def test_the_values_are_those_of_the_functions():
    assert made().compute() == frechet_distance(GENERATED, REAL)
    assert made("jedi").compute() == kernel_distance(GENERATED, REAL, JEDI, "v")
    assert made("jedi-u").compute() == kernel_distance(GENERATED, REAL, JEDI, "u")
    assert made("kvd").compute() == kernel_distance(GENERATED, REAL, KVD, "u")
    assert made("fvd-moments").compute().item() == pytest.approx(made().compute().item())
    assert made("jedi-moments").compute().item() == pytest.approx(made("jedi").compute().item())
    ml = made(covariance="ml")
    assert ml.compute() == frechet_distance(GENERATED, REAL, "ml")
    assert made().compute().dtype == torch.float64


def test_the_report_says_what_is_needed_to_believe_it():
    result = made(features_name="i3d", frames=8).report()
    assert (result.name, result.n, result.n_real, result.status) == ("fvd/i3d", 20, 20, "ok")
    assert result.value == frechet_distance(GENERATED, REAL).item()
    assert result.null == null_distance(REAL, 20)
    assert result.standard_error == frechet_error(GENERATED, REAL)
    assert all(word in result.recipe for word in ("i3d", "clips of 8 frames", "unbiased"))
    few = made(rows=slice(0, 5)).report()
    assert few.status == "fewer prompts than features: biased, see the null distance"
    summed = made("fvd-moments").report()
    assert (summed.null, summed.standard_error) == (None, None)
    nulls = [made(name).report().null for name in ("jedi", "jedi-moments", "jedi-u", "kvd")]
    assert nulls[0] == pytest.approx(nulls[1], rel=1e-12) and nulls[0] > 0
    assert nulls[2:] == [0.0, 0.0]
    assert "estimator v" in made("jedi").recipe and "estimator u" in made("jedi-u").recipe


@pytest.mark.parametrize("name", ranks.METRICS)
def test_clips_of_one_prompt_count_as_one(name):
    kind, fixed = ranks.METRICS[name]
    metric, ids = kind(num_features=6, **fixed), torch.arange(20)
    mixed = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for real, side in enumerate((GENERATED, REAL)):
        for part in mixed.split(7):
            metric.update_features(side[part], bool(real), ids[part], groups=part // 4)
    result, alone = metric.report(), made(name).report()
    assert (result.n, result.n_real, result.prompts, result.prompts_real) == (20, 20, 5, 5)
    assert (alone.prompts, alone.prompts_real) == (20, 20)
    assert result.value == pytest.approx(alone.value, rel=1e-12)
    if metric.keep_features:
        assert result.standard_error == metric.error(GENERATED, REAL, ids // 4)
        assert result.standard_error != alone.standard_error
        assert result.null == metric.null(REAL, 5, ids // 4) and result.null != alone.null
    else:
        assert result.null is result.standard_error is None
    if name.startswith("fvd"):
        assert alone.status == "ok" and result.status.startswith("fewer prompts than features")


def test_the_recipe_says_how_the_features_were_made():
    backbone = Colours()
    shown, stored = FrechetVideoDistance(backbone), FrechetVideoDistance(num_features=6)
    assert backbone.recipe in shown.recipe and shown.recipe != stored.recipe
    facts = {"features_name": "colours", "features_recipe": backbone.recipe}
    assert FrechetVideoDistance(num_features=6, **facts).recipe == shown.recipe
    for name, mean in (("fvd/random-2dconv", True), ("jedi-u/random-3dconv", False)):
        encoder = RandomBackbone(2 + (not mean))
        recipe = set_metric(name, encoder, frames=8).recipe
        said = ("clips of 8 frames", encoder.recipe, "without overlap, context and remainder left")
        assert all(words in recipe for words in said)
        assert ("mean over the frames" in recipe) == mean
        stored = {"num_features": encoder.num_features, "features_name": encoder.name}
        stored |= {"features_recipe": windows_recipe(encoder), "frames": 8}
        assert set_metric(name, **stored).recipe == recipe
    one, other = (made(features_recipe=size).report() for size in ("32 pixels", "64 pixels"))
    with pytest.raises(ValueError, match="different recipes"):
        check_comparable(one, other)


@pytest.mark.parametrize("name", ranks.METRICS)
def test_states_are_saved_loaded_and_merged(name, recwarn):
    kind, fixed = ranks.METRICS[name]
    whole = made(name).compute()
    file = io.BytesIO()
    torch.save(made(name).state_dict(), file)
    file.seek(0)
    loaded = kind(num_features=6, **fixed)
    loaded.load_state_dict(torch.load(file))
    assert loaded.compute() == whole
    merged = kind(num_features=6, **fixed)
    for rows in (slice(11, 20), slice(0, 11)):
        merged.merge_state(made(name, rows))
    assert merged.compute() == whole
    loaded.reset()
    assert made(name).compute() == whole
    assert not [w for w in recwarn if "before the ``update``" in str(w.message)]


def test_a_value_is_not_remembered_when_clips_are_merged_or_loaded():
    first, second = made(rows=slice(0, 10)), made(rows=slice(10, 20))
    first.compute()
    first.merge_state(second)
    assert first.compute() == made().compute()
    second.compute()
    second.load_state_dict(made().state_dict())
    assert second.compute() == made().compute()


def test_clips_of_another_recipe_are_refused():
    one, other = made(), made(covariance="ml")
    with pytest.raises(ValueError, match="cannot be counted"):
        one.merge_state(other)
    with pytest.raises(ValueError, match="cannot be counted"):
        one.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="has 0 generated clips"):
        one.compute()
    results = [made().report(), made().report(), other.report()]
    check_comparable(*results[:2])
    with pytest.raises(ValueError, match="different recipes"):
        check_comparable(*results)
    check_comparable(results[0], replace(results[0], value=3.0))


@pytest.mark.parametrize("name", ["fvd", "fvd-moments"])
def test_reset_may_keep_the_real_clips(name):
    metric = made(name)
    whole = metric.compute()
    metric.reset(reset_real=False)
    with pytest.raises(ValueError, match="has 0 generated clips"):
        metric.compute()
    metric.update_features(GENERATED, real=False, ids=torch.arange(20))
    assert metric.compute() == whole
    metric.reset()
    metric.update_features(GENERATED, real=False, ids=torch.arange(20))
    with pytest.raises(ValueError, match="has 0 real clips"):
        metric.compute()


def test_the_order_of_clips_changes_nothing():
    metric = FrechetVideoDistance(num_features=6)
    mixed = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for part in mixed.split(7):
        metric.update_features(GENERATED[part], real=False, ids=part)
        metric.update_features(REAL[part], real=True, ids=part)
    assert metric.report() == replace(made().report())


def test_an_id_counts_once_or_is_refused():
    metric = made()
    nearly = GENERATED[:1] * (1 + 1e-5)
    metric.update_features(nearly, real=False, ids=torch.tensor([1]))
    assert metric.report() == made().report()
    metric.update_features(GENERATED[1:2], real=False, ids=torch.tensor([1]))
    with pytest.raises(ValueError, match="came twice with different features, such as 1"):
        metric.compute()
    metric = made()
    group = torch.tensor([99])
    metric.update_features(GENERATED[:1], real=False, ids=torch.tensor([1]), groups=group)
    with pytest.raises(ValueError, match="came twice with different groups, such as 1"):
        metric.compute()
    sums = made("fvd-moments")
    sums.update_features(GENERATED[:1], real=False, ids=torch.tensor([1]))
    with pytest.raises(ValueError, match="came twice, and sums cannot tell"):
        sums.compute()


@pytest.mark.parametrize("keep", [True, False])
def test_a_backbone_sees_single_clips_and_odd_batches(keep):
    backbone = Colours().train()
    metric = FrechetVideoDistance(backbone, keep_features=keep)
    for real in (False, True):
        batch = clips(8, seed=int(real))
        for ids in torch.arange(8).split([3, 4, 1]):
            metric.update(batch[ids], real, ids)
    found = [clips(8, seed)[:, [0, -1]].mean((3, 4)).flatten(1) for seed in (0, 1)]
    assert metric.compute().item() == pytest.approx(frechet_distance(*found).item(), rel=1e-5)
    assert metric.report().name == "fvd/colours"
    assert not [key for key in metric.state_dict() if "backbone" in key]
    assert metric.clone().report() == metric.report()


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (clips(2)[:, :8], "no clips of 16 frames"),
        (clips(2)[:, :, :1], "no clips of 16 frames"),
        ((clips(2) * 255).byte(), "no clips of 16 frames"),
        (clips(2) * 255, "go from 0.*to 255"),
        (clips(2) - 0.5, "go from -0.5"),
        (clips(2) * torch.nan, "2 of 2 clips"),
        (torch.zeros(2, 5), "differ in width: 5 and 6"),
        (torch.zeros(2, 6).double(), r"float64. Pass features.float\(\)"),
    ],
)
def test_what_is_no_batch_is_refused(batch, words):
    metric = FrechetVideoDistance(Colours())
    with pytest.raises(ValueError, match=words):
        metric.update(batch, False, torch.arange(2))


@pytest.mark.parametrize("ids", [torch.arange(3), torch.arange(2.0), torch.arange(4).view(2, 2)])
def test_ids_must_fit(ids):
    with pytest.raises(ValueError, match="ids do not fit 2 clips"):
        FrechetVideoDistance(num_features=6).update_features(REAL[:2], True, ids)
    with pytest.raises(ValueError, match="groups do not fit 2 clips"):
        FrechetVideoDistance(num_features=6).update_features(
            REAL[:2], True, torch.arange(2), groups=ids
        )


def test_what_makes_no_metric_is_refused():
    for options in ({}, {"backbone": Colours(), "num_features": 6}):
        with pytest.raises(ValueError, match="Where do features come from"):
            FrechetVideoDistance(**options)
    with pytest.raises(ValueError, match="has no backbone"):
        FrechetVideoDistance(num_features=6).update(clips(2), True, torch.arange(2))
    with pytest.raises(ValueError, match="no covariance 'biased'"):
        FrechetVideoDistance(num_features=6, covariance="biased")
    with pytest.raises(ValueError, match="no kernel distance 'mmd'"):
        VideoKernelDistance(num_features=6, form="mmd")
    with pytest.raises(ValueError, match="cannot be computed from moments"):
        VideoKernelDistance(num_features=6, form="kvd", keep_features=False)
    with pytest.raises(ValueError, match="One batch has no 'fvd'"):
        made()(REAL, True, torch.arange(20))


def test_one_clip_is_no_set():
    metric = FrechetVideoDistance(num_features=6)
    metric.update_features(REAL, real=True, ids=torch.arange(20))
    metric.update_features(GENERATED[:1], real=False, ids=torch.tensor([0]))
    metric.update_features(GENERATED[:1], real=False, ids=torch.tensor([0]))
    with pytest.raises(ValueError, match="has 1 generated clips"):
        metric.report()
    metric.update_features(GENERATED[1:2], real=False, ids=torch.tensor([1]))
    assert math.isfinite(metric.report().value)
    assert metric.report().standard_error is None
