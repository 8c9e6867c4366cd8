"""Metrics of sets: what they keep, merge, save and refuse, in one process and in two."""

from __future__ import annotations

import importlib.util
import io
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib
import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.wrappers import BootStrapper

from lightning_kv.metrics.backbones.base import RandomBackbone
from lightning_kv.metrics.functional.frechet import frechet_distance, frechet_error, null_distance
from lightning_kv.metrics.functional.kernel import JEDI, KVD, kernel_distance
from lightning_kv.metrics.sets import (
    FrechetVideoDistance,
    JEDi,
    VideoKernelDistance,
    check_comparable,
)
from lightning_kv.metrics.suite import set_metric
from lightning_kv.metrics.windows import WindowEncoder

matplotlib.use("Agg")
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

    name, num_features, clip_len, recipe = "colours", 6, 16, "mean colour of the ends"

    def forward(self, clips):
        assert not self.training
        ends = clips[:, [0, -1]].mean((3, 4)).flatten(1)
        return ends.squeeze(0)


def clips(n, seed=0, frames=16):
    return torch.rand(n, frames, 3, 4, 5, generator=torch.Generator().manual_seed(int(seed)))


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
@pytest.mark.slow
def test_two_processes_say_the_same_of_clips_to_rounding(two, share):
    one = ranks.clip_results(ALL)
    assert one.keys() == {"psnr", "recall", "named", "interval"} and 0 < one["recall"][0] < 1
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


@pytest.mark.parametrize("share", ["uneven", "empty"])
def test_clips_without_ids_all_count_in_any_order(two, share):
    metric = ranks.fill(FrechetVideoDistance(num_features=6), ALL, named=False)
    expected = asdict(metric.report())
    assert expected["n"] == 20 and expected["value"] == pytest.approx(made().compute().item())
    for rank in two:
        assert rank[f"unnamed-{share}"] == expected
    twice = ranks.fill(metric, ALL, named=False).report()
    assert (twice.n, twice.units) == (40, 40)


def test_windows_of_clips_of_prompts_do_not_depend_on_who_showed_them(two):
    one = ranks.windowed(ALL).report()
    assert (one.n, one.n_real, one.units, one.units_real) == (10, 10, 5, 5)
    assert (one.windows, one.windows_real) == (20, 20)
    for rank in two:
        for name in ("windowed", "turned"):
            assert rank[name] == asdict(one)
    assert one.value == pytest.approx(made().compute().item(), rel=1e-9)


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
    figure, axes = made().plot()
    assert axes.get_ylim()[0] <= 0
    matplotlib.pyplot.close(figure)
    assert made(compute_on_cpu=True).compute() == made().compute()


def test_the_report_says_what_is_needed_to_believe_it():
    result = made(features_name="i3d", frames=8).report()
    assert (result.name, result.n, result.n_real, result.status) == ("fvd/i3d", 20, 20, "ok")
    assert result.value == frechet_distance(GENERATED, REAL).item()
    assert result.null == null_distance(REAL, 20)
    assert result.standard_error == frechet_error(GENERATED, REAL)
    assert all(word in result.recipe for word in ("i3d", "clips of 8 frames", "unbiased"))
    few = made(rows=slice(0, 5)).report()
    assert few.status == "fewer units than features: biased, see the null distance"
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
            metric.update_features(side[part], bool(real), ids=ids[part], units=part // 4)
    result, alone = metric.report(), made(name).report()
    assert (result.n, result.n_real, result.units, result.units_real) == (20, 20, 5, 5)
    assert (alone.units, alone.units_real) == (20, 20)
    assert result.value == pytest.approx(alone.value, rel=1e-12)
    if metric.keep_features:
        assert result.standard_error == metric.error(GENERATED, REAL, ids // 4)
        assert result.standard_error != alone.standard_error
        assert result.null == metric.null(REAL, 5, ids // 4) and result.null != alone.null
    else:
        assert result.null is result.standard_error is None
    if name.startswith("fvd"):
        assert alone.status == "ok" and result.status.startswith("fewer units than features")


def test_the_recipe_says_how_the_features_were_made():
    backbone = Colours()
    shown, stored = FrechetVideoDistance(backbone), FrechetVideoDistance(num_features=6)
    assert backbone.recipe in shown.recipe and shown.recipe != stored.recipe
    facts = {"features_name": "colours", "features_recipe": WindowEncoder(backbone).recipe}
    assert FrechetVideoDistance(num_features=6, **facts).recipe == shown.recipe
    for name, mean in (("fvd/random-2dconv", True), ("jedi-u/random-3dconv", False)):
        encoder = RandomBackbone(2 + (not mean))
        recipe = set_metric(name, encoder, frames=8).recipe
        said = ("clips of 8 frames", encoder.recipe, "without overlap, context and remainder left")
        assert all(words in recipe for words in said)
        assert ("mean over the frames" in recipe) == mean
        stored = {"num_features": encoder.num_features, "features_name": encoder.name}
        stored |= {"features_recipe": WindowEncoder(encoder).recipe, "frames": 8}
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
    metric = made(name, reset_real_features=False)
    whole = metric.compute()
    metric.reset()
    with pytest.raises(ValueError, match="has 0 generated clips"):
        metric.compute()
    metric.update_features(GENERATED, real=False)
    assert metric.compute().item() == pytest.approx(whole.item(), rel=1e-12)
    metric = made(name)
    metric.reset()
    metric.update_features(GENERATED, real=False)
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
    metric.update_features(GENERATED[:1], real=False, ids=torch.tensor([1]), units=["another"])
    with pytest.raises(ValueError, match="came twice with different units, such as 1"):
        metric.compute()
    sums = made("fvd-moments")
    sums.update_features(GENERATED[:1], real=False, ids=torch.tensor([1]))
    with pytest.raises(ValueError, match="came twice, and sums cannot tell"):
        sums.compute()


@pytest.mark.parametrize("keep", [True, False])
def test_a_backbone_sees_windows_of_videos_in_odd_batches(keep):
    metric = FrechetVideoDistance(Colours().train(), keep_features=keep)
    found = []
    for real in (False, True):
        batch = clips(8, seed=int(real), frames=33)
        for part in batch.split([3, 4, 1]):
            metric.update(part, real)
        windows = batch[:, :32].unflatten(1, (2, 16)).flatten(0, 1)  # the last frame is left over
        found.append(windows[:, [0, -1]].mean((3, 4)).flatten(1))
    assert metric.compute().item() == pytest.approx(frechet_distance(*found).item(), rel=1e-5)
    result = metric.report()
    assert (result.name, result.n, result.units, result.windows) == ("fvd/colours", 8, 8, 16)
    assert metric.clone().report() == result


def test_videos_of_any_length_and_8_bits():
    metric, floats = FrechetVideoDistance(Colours()), FrechetVideoDistance(Colours())
    for real in (False, True):
        shown = [(255 * clip).byte() for clip in (clips(3, real)[0], *clips(2, real, 40))]
        metric.update(shown, real)
        floats.update([clip.float() / 255 for clip in shown], real)
    assert metric.report() == floats.report() and metric.report().windows == 5


def test_a_frame_backbone_gives_means_over_windows():
    metric = VideoKernelDistance("random-2dconv", frames=4)
    for real in (False, True):
        metric.update(clips(3, real)[:, :9], real)
    net = RandomBackbone(2)
    rows = [
        torch.stack([net(clip[at : at + 4]).mean(0) for clip in clips(3, real) for at in (0, 4)])
        for real in (0, 1)
    ]
    assert metric.compute().item() == pytest.approx(kernel_distance(*rows, KVD).item(), rel=1e-6)
    assert "clips of 4 frames" in metric.recipe and "mean over the frames" in metric.recipe


def test_the_backbone_moves_with_the_metric_is_shared_and_not_saved():
    metric = FrechetVideoDistance("random-3dconv")
    assert metric.backbone in list(metric.modules())
    assert not [key for key in metric.state_dict() if "backbone" in key]
    FrechetVideoDistance("random-3dconv").load_state_dict(metric.state_dict(), strict=True)
    assert metric.clone().backbone is metric.backbone
    copies = MetricCollection({"a": metric, "b": JEDi("random-3dconv")}).clone(prefix="x_")
    assert copies["x_a"].backbone is metric.backbone
    metric.to("meta")
    assert next(metric.backbone.parameters()).device.type == "meta" == metric.device.type


def test_metrics_in_one_collection_are_never_taken_for_one_another():
    made = {
        "fvd": FrechetVideoDistance(num_features=6),
        "ml": FrechetVideoDistance(num_features=6, covariance="ml"),
        "kvd": VideoKernelDistance(num_features=6),
        "jedi": JEDi(num_features=6),
        "long": FrechetVideoDistance(num_features=6, frames=32),
    }
    collection = MetricCollection({name: metric.clone() for name, metric in made.items()})
    videos = MetricCollection(
        {
            "short": FrechetVideoDistance("random-2dconv", frames=4),
            "long": FrechetVideoDistance("random-2dconv", frames=8),
            "other": FrechetVideoDistance(RandomBackbone(2, seed=1), frames=4),
        }
    )
    black = torch.zeros(2, 8, 3, 8, 8)
    videos.update(black, real=True)
    videos.update(clips(2)[:, :8], real=True)
    videos.update(black, real=False)
    videos.update(clips(2, 1)[:, :8], real=False)
    assert len(videos.compute_groups) == 3
    alone = FrechetVideoDistance("random-2dconv", frames=8)
    for real in (True, False):
        alone.update(black, real)
        alone.update(clips(2, not real)[:, :8], real)
    assert videos.compute()["long"] == alone.compute()
    for real, side in enumerate((GENERATED, REAL)):
        for metric in (*made.values(), *collection.values()):
            metric.update_features(side, bool(real))
    assert collection.compute() == {name: metric.compute() for name, metric in made.items()}


def test_a_bootstrapper_is_refused():
    boot = BootStrapper(FrechetVideoDistance("random-3dconv"), num_bootstraps=2)
    with pytest.raises(ValueError, match=r"cannot resample 'fvd'.*Use report\(\)"):
        boot.update(clips(4), real=True)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (clips(2)[:, :8], "number 0 has 8 frames, and 'fvd/colours' looks at 16"),
        (clips(2)[:, :, :1], "The axes of a video are"),
        (clips(2).permute(0, 1, 3, 4, 2), "looks like channels last"),
        (clips(2) * 255, "out of range: .* to 25"),
        (clips(2) - 0.5, "out of range: .* from -0.4"),
        (clips(2) * torch.nan, "out of range: .* nan"),
        (clips(1)[0], "These are no videos"),
        (None, "videos is NoneType"),
        ([], "holds no video"),
    ],
)
def test_what_are_no_videos_is_refused(batch, words):
    metric = FrechetVideoDistance(Colours())
    with pytest.raises(ValueError, match=words):
        metric.update(batch, False)
    assert not metric.features_generated


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (torch.zeros(2, 5), "differ in width: 5 and 6"),
        (torch.zeros(2, 6).double(), r"float64. Pass features.float\(\)"),
        (torch.full((2, 6), torch.nan), "2 of 2 clips"),
        ([torch.zeros(2, 6), torch.zeros(6)], "no features of clips"),
        ([1.0], "no features of clips: float"),
    ],
)
def test_what_are_no_features_is_refused(rows, words):
    metric = FrechetVideoDistance(num_features=6)
    with pytest.raises(ValueError, match=words):
        metric.update_features(rows, False)
    assert not metric.features_generated


@pytest.mark.parametrize("real", [None, 1, "yes", torch.tensor(True), clips(2)])
def test_real_is_yes_or_no(real):
    for metric in (FrechetVideoDistance(Colours()), MetricCollection([JEDi(Colours())])):
        with pytest.raises(ValueError, match=r"real is .*\. Call update\(videos, real=False\)"):
            metric.update(clips(2), real)


def test_a_window_is_as_long_as_the_backbone_says():
    with pytest.raises(ValueError, match="cannot have 8 frames: 'colours' takes clips of 16"):
        FrechetVideoDistance(Colours(), frames=8)
    with pytest.raises(ValueError, match="cannot have 0 frames"):
        FrechetVideoDistance(num_features=6, frames=0)
    with pytest.raises(ValueError, match="needs an attribute clip_len"):
        FrechetVideoDistance(nn.Sequential(nn.Conv3d(3, 4, 3), nn.Flatten()))


@pytest.mark.parametrize("ids", [torch.arange(3), torch.arange(2.0), torch.arange(4).view(2, 2)])
def test_ids_must_fit(ids):
    with pytest.raises(ValueError, match="ids do not fit 2"):
        FrechetVideoDistance(num_features=6).update_features(REAL[:2], True, ids=ids)
    with pytest.raises(ValueError, match="units do not fit 2"):
        FrechetVideoDistance(num_features=6).update_features(REAL[:2], True, units=ids)


def test_what_makes_no_metric_is_refused():
    for options in ({}, {"backbone": Colours(), "num_features": 6}):
        with pytest.raises(ValueError, match="Where do features come from"):
            FrechetVideoDistance(**options)
    with pytest.raises(ValueError, match="has no backbone"):
        FrechetVideoDistance(num_features=6).update(clips(2), True)
    with pytest.raises(ValueError, match="no covariance 'biased'"):
        FrechetVideoDistance(num_features=6, covariance="biased")
    with pytest.raises(ValueError, match="no kernel distance 'mmd'"):
        VideoKernelDistance(num_features=6, form="mmd")
    with pytest.raises(ValueError, match="no form 'kvd' of JEDi"):
        JEDi(num_features=6, form="kvd")
    with pytest.raises(ValueError, match="cannot be computed from moments"):
        VideoKernelDistance(num_features=6, form="kvd", keep_features=False)
    with pytest.raises(ValueError, match="One batch has no 'fvd'"):
        made()(REAL, True)


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
