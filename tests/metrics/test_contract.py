"""Every metric as users of torchmetrics know it: update, forward, collections, wrappers, plots."""

from __future__ import annotations

import copy
import io
import math
import pickle

import matplotlib
import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.wrappers import BootStrapper, MetricTracker

from lightning_kv.metrics import (
    METRICS,
    MSSSIM,
    PSNR,
    SSIM,
    Brightness,
    FrechetVideoDistance,
    IdenticalFrames,
    LagCoherence,
    LatentMetric,
    PSNRMean,
    RetainedMass,
    Scene,
    SubjectConsistency,
    TemporalFlicker,
    VideoMetric,
    WorldMetric,
    functional,
)
from lightning_kv.metrics.backbones import RandomBackbone
from lightning_kv.metrics.perceptual import LPIPS

matplotlib.use("Agg")
SIZE, LARGE = (36, 40), (162, 164)  # pixels; MS-SSIM takes no less than the second


class Reader(RandomBackbone):
    """Reads texts too."""

    def text_features(self, texts):
        return torch.stack([torch.arange(32.0) - len(text) for text in texts])


class Flow(nn.Module):
    """What the frames differ by, as a motion."""

    def forward(self, first, second):
        return 40 * (second - first)[:, :2]


class Score(nn.Module):
    """A score of every frame."""

    def forward(self, frames):
        return frames.mean((1, 2, 3)).unsqueeze(1)


def head():
    linear = nn.Linear(32, 1)
    nn.init.constant_(linear.weight, 0.25)
    nn.init.zeros_(linear.bias)
    return linear


ARGUMENTS = {
    "lpips": lambda: (("squeeze",), {"trunk": "random"}),
    "text_alignment": lambda: ((Reader(),), {}),
    "dynamic_degree": lambda: ((Flow(),), {}),
    "flow_magnitude": lambda: ((Flow(),), {}),
    "motion_smoothness": lambda: (("linear-midpoint",), {}),
    "imaging_quality": lambda: ((Score(),), {}),
    "aesthetic_quality": lambda: ((RandomBackbone(), head()), {}),
    "lag_coherence": lambda: (("random-2dconv",), {"lag": 2}),
}
"""How the metrics that look through a network are made without weights."""


def made(name, **options):
    kind = METRICS[name]
    if name == "lpips":
        pytest.importorskip("lpips")
    default = (("random-2dconv",), {}) if hasattr(kind, "backbones") else ((), {})
    positional, named = ARGUMENTS.get(name, lambda: default)()
    return kind(*positional, **named, **options)


PIXELS = [name for name, kind in METRICS.items() if issubclass(kind, VideoMetric)]
LATENTS = [name for name, kind in METRICS.items() if issubclass(kind, LatentMetric)]
WORLDS = [name for name, kind in METRICS.items() if issubclass(kind, WorldMetric)]
ATTENTION = METRICS.keys() - {*PIXELS, *LATENTS, *WORLDS}


def videos(count=3, frames=5, size=SIZE, seed=0):
    """Pairs that are alike but for noise, as 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(30, 220, (count, frames, 3, *size), generator=generator)
    noise = torch.randint(-30, 31, target.shape, generator=generator)
    return (target + noise).byte(), target.byte()


def told(count=3):
    return {"prompts": ["a cat", "a red fox", "rain on a roof"][:count], "fps": 8.0}


def batch(name, count=3):
    """What ``update`` of a metric takes, by position and by name."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, count, 5, 1, 4, 4, generator=generator)
    if name in PIXELS:
        return videos(count, size=LARGE if name == "ms_ssim" else SIZE), told(count)
    if name in LATENTS:
        return (latents[0], latents[0] + 0.1 * latents[1]), {}
    if name in ATTENTION:
        return (torch.rand(count, 5, generator=generator),), {}
    scene = Scene(torch.arange(26.0).view(26, 1, 1).expand(26, 1, 3), torch.zeros(4, 1, 4), 4)
    latents = latents[0].round()
    latents[:, :, :, 3] = 0
    return (latents, torch.rand(count, 5, 3, 32, 32, generator=generator), scene), {}


def close(found, expected, rel=1e-9):
    found, expected = (torch.as_tensor(x, dtype=torch.float64).tolist() for x in (found, expected))
    assert found == pytest.approx(expected, rel=rel, abs=1e-12, nan_ok=True)


def test_the_first_thing_a_user_writes():
    preds, target = torch.full((2, 4, 3, 16, 16), 0.5), torch.full((2, 4, 3, 16, 16), 0.45)
    metric = PSNR()
    metric.update(preds, target)
    assert metric.compute().item() == pytest.approx(-10 * math.log10(0.05**2), abs=1e-4)
    metric = PSNR()
    half = (128 * torch.ones(1, 2, 3, 16, 16)).byte()
    metric.update(half, half - 12)
    assert metric.compute().item() == pytest.approx(20 * math.log10(255 / 12), abs=1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_forward_is_the_value_of_the_batch_and_compute_that_of_all(name):
    arguments, named = batch(name)
    metric, alone = made(name), made(name)
    alone.update(*arguments, **named)
    first = metric(*arguments, **named)
    close(first, alone.compute())
    assert first.dtype == torch.float64 and first.ndim == 0
    close(metric(*arguments, **named), first)
    close(metric.compute(), first)
    metric.reset()
    metric.update(*arguments, **named)
    close(metric.compute(), first)
    if name in PIXELS:
        floats = made(name)
        floats.update(*(pixels.float() / 255 for pixels in arguments), **named)
        close(floats.compute(), first)


@pytest.mark.parametrize("name", METRICS)
def test_what_is_saved_copied_and_merged_says_the_same(name):
    arguments, named = batch(name)
    metric = made(name)
    metric.update(*arguments, **named)
    expected = metric.compute()
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    file.seek(0)
    assert len(file.getvalue()) < 20000, "networks are not saved"
    loaded = made(name)
    loaded.load_state_dict(torch.load(file), strict=True)
    close(loaded.compute(), expected)
    for copied in (metric.clone(), copy.deepcopy(metric)):
        close(copied.compute(), expected)
        for network, other in zip(metric.children(), copied.children(), strict=True):
            assert isinstance(network, nn.Linear) or network is other
    merged, empty = made(name), made(name)
    merged.merge_state(metric)
    merged.merge_state(empty)
    close(merged.compute(), expected)
    close(empty.compute(), math.nan)
    if name not in ("text_alignment", "imaging_quality"):  # whose networks are this test's own
        close(pickle.loads(pickle.dumps(metric)).compute(), expected)


@pytest.mark.parametrize("name", METRICS)
def test_a_plot_is_drawn(name):
    arguments, named = batch(name)
    metric = made(name)
    metric.update(*arguments, **named)
    figure, axes = metric.plot()
    low, high = axes.get_ylim()
    assert metric.plot_lower_bound is None or low <= metric.plot_lower_bound
    assert metric.plot_upper_bound is None or high >= metric.plot_upper_bound
    metric.plot([metric.compute(), metric.compute()], ax=axes)
    matplotlib.pyplot.close(figure)


def one_by_one(measure):
    return lambda metric, preds, target: measure(preds, target)


def of_features(measure):
    return lambda metric, preds, target: measure(metric.backbone(preds))


def of_flow(measure, scale=1.0):
    def twin(metric, preds, target):
        flow = metric.backbone(preds[:-1], preds[1:])
        return torch.cat([torch.full((1,), torch.nan).double(), scale * measure(flow)])

    return twin


def of_frames(measure):
    return lambda metric, preds, target: measure(preds)


TWINS = {
    "psnr": one_by_one(functional.psnr),
    "psnr_mean": one_by_one(functional.psnr),
    "identical_frames": one_by_one(functional.identical_frames),
    "ssim": one_by_one(functional.ssim),
    "ms_ssim": one_by_one(functional.ms_ssim),
    "lpips": lambda metric, preds, target: functional.lpips(preds, target, metric.backbone),
    "temporal_flicker": of_frames(functional.flicker),
    "frame_change": of_frames(functional.frame_change),
    "sharpness": of_frames(functional.sharpness),
    "brightness": of_frames(functional.brightness),
    "contrast": of_frames(functional.contrast),
    "colourfulness": of_frames(functional.colourfulness),
    "saturation": of_frames(functional.saturation),
    "subject_consistency": of_features(lambda x: functional.consistency(x).value),
    "background_consistency": of_features(lambda x: functional.consistency(x).value),
    "lag_coherence": of_features(lambda x: functional.lag_coherence(x, lag=2)),
    "semantic_similarity": lambda metric, preds, target: functional.similarity(
        metric.backbone(preds), metric.backbone(target)
    ),
    "text_alignment": lambda metric, preds, target: functional.similarity(
        metric.backbone(preds), metric.backbone.text_features(["a cat"])[0]
    ),
    "dynamic_degree": of_flow(functional.motion_score, 256 / min(SIZE)),
    "flow_magnitude": of_flow(functional.mean_motion),
    "motion_smoothness": lambda metric, preds, target: functional.motion_smoothness(
        preds, metric.backbone
    ),
    "imaging_quality": lambda metric, preds, target: metric.backbone(preds).double().squeeze(1),
    "aesthetic_quality": lambda metric, preds, target: (
        metric.head(nn.functional.normalize(metric.backbone(preds))).double().squeeze(1) / 10
    ),
}
"""What the curve of every metric of pixels is, by its function."""


@pytest.mark.parametrize("name", PIXELS)
def test_the_function_says_what_the_class_says(name):
    assert TWINS.keys() == set(PIXELS)
    metric = made(name, curves=True)
    size = LARGE if name == "ms_ssim" else SIZE
    preds, target = (x[0].float() / 255 for x in videos(1, 11, size))
    metric.update(preds[None], target[None], prompts=["a cat"], fps=8.0)
    close(metric.curves[0], TWINS[name](metric, preds, target), rel=1e-5)


@pytest.mark.parametrize("name", [*LATENTS, *WORLDS])
def test_the_function_of_what_is_not_pixels_says_what_the_class_says(name):
    arguments, _ = batch(name, 1)
    metric = made(name, curves=True)
    options = {} if name in LATENTS else {"given": 2}
    metric.update(*arguments, **options)
    first, second = arguments[0][0], arguments[1][0]
    expected = {
        "divergence_onset": lambda: functional.divergence(first, second),
        "revisit_error": lambda: functional.revisit_error(first, second, arguments[2], 2),
        "recall": lambda: functional.recall(first, arguments[2], 2),
        "recall_far": lambda: functional.recall(first, arguments[2], 2, least_gap=9),
        "ruler_error": lambda: functional.ruler_error(first, arguments[2], 2),
        "camera_rule": lambda: functional.camera_kept(first, arguments[2], 2),
    }.get(name, lambda: getattr(functional, name)(first, second))()
    if expected.isnan().all():
        assert metric.compute().isnan() and metric.curves == []
        return
    close(metric.curves[0], expected)
    assert name in LATENTS or expected[:2].isnan().all()


@pytest.mark.parametrize("equal", [False, True])
def test_one_collection_of_all_says_what_each_says_alone(equal):
    pytest.importorskip("lpips")
    metrics = {name: made(name) for name in PIXELS}
    metrics |= {"other_lag": LagCoherence("random-2dconv", lag=3)}
    collection = MetricCollection({name: metric.clone() for name, metric in metrics.items()})
    batches = [videos(2, 3, LARGE, seed=2), videos(1, 2, LARGE, seed=3)]
    if equal:  # where many metrics have the same first value
        still = batches[0][0][:, :1].expand(-1, 3, -1, -1, -1)
        batches[0] = (still, still)
    for preds, target in batches:
        collection.update(preds, target, **told(len(preds)))
        for metric in metrics.values():
            metric.update(preds, target, **told(len(preds)))
    assert len(collection.compute_groups) == len(metrics)
    found = collection.compute()
    for name, metric in metrics.items():
        close(found[name], metric.compute())
    one = MetricCollection([PSNR(), SSIM(), Brightness()], prefix="val_")
    assert one(*videos(1), fps=8).keys() == {"val_PSNR", "val_SSIM", "val_Brightness"}


@pytest.mark.parametrize("name", [name for name in PIXELS if name != "ms_ssim"])
def test_videos_of_other_lengths_and_sizes_in_one_batch(name):
    long, short = videos(1, 9, (40, 48)), videos(1, 5, (32, 34), seed=1)
    metric, alone = made(name), [made(name), made(name)]
    metric.update(*([a[0], b[0]] for a, b in zip(long, short, strict=True)), **told(2))
    for each, pair, prompt in zip(alone, (long, short), told(2)["prompts"], strict=True):
        each.update(*pair, prompts=[prompt], fps=8.0)
    expected = [each.compute().item() for each in alone]
    expected = [value for value in expected if value == value]
    close(metric.compute(), sum(expected) / len(expected))


def test_several_samples_of_a_prompt_are_one_value():
    preds, target = (x.float() / 255 for x in videos(6, 2, (16, 16)))
    metric = PSNR()
    metric.update(preds, target, prompts=["a cat"] * 6)
    six = metric.compute()
    assert (
        metric.unit_values().tolist() == pytest.approx([six.item()]) and metric.interval() is None
    )
    metric.update(preds[:1] * 0, target[:1], prompts=["a dog"])
    alone = PSNR()
    alone.update(preds[:1] * 0, target[:1])
    close(metric.compute(), (six + alone.compute()) / 2)


def test_a_tracker_knows_the_best():
    tracker = MetricTracker(PSNR())
    preds, target = (x.float() / 255 for x in videos(1, 2, (16, 16)))
    for share in (0.5, 0.9, 0.7):
        tracker.increment()
        tracker.update(share * preds + (1 - share) * target, target)
    best, step = tracker.best_metric(return_step=True)
    assert step == 0 and best == pytest.approx(tracker.compute_all()[0].item())
    several = MetricTracker(MetricCollection([PSNRMean(), SSIM()]))
    for share in (0.9, 0.2):
        several.increment()
        several.update(share * preds + (1 - share) * target, target)
    assert several.best_metric(return_step=True)[1] == {"PSNRMean": 1, "SSIM": 1}


def test_a_bootstrapper_draws_videos_as_its_slow_twin_does():
    preds, target = (x.float() / 255 for x in videos(7, 2, (16, 16)))
    values = []
    for pair in zip(preds.split(1), target.split(1), strict=True):
        metric = PSNR()
        metric.update(*pair)
        values.append(metric.compute())
    boot = BootStrapper(
        PSNR(), num_bootstraps=6, raw=True, std=False, sampling_strategy="multinomial"
    )
    torch.manual_seed(5)
    boot.update(preds, target)
    torch.manual_seed(5)
    drawn = [torch.multinomial(torch.ones(7), 7, replacement=True) for _ in range(6)]
    close(boot.compute()["raw"], [torch.stack(values)[rows].mean().item() for rows in drawn])
    for labels in ({"ids": torch.arange(7)}, {"units": ["a"] * 7}, {"prompts": ["a"] * 7}):
        with pytest.raises(ValueError, match=r"draws the videos of 'psnr' again.*interval\(\)"):
            boot.update(preds, target, **labels)
    boot = BootStrapper(RetainedMass(), num_bootstraps=2)
    with pytest.raises(ValueError, match="not what belongs to them: units"):
        boot.update(torch.rand(4, 3), units=torch.zeros(4).long())


PREDS = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("arguments", "wrong", "given", "works"),
    [
        ((PREDS[0, 0], PREDS[0, 0]), "no videos", "(3, 16, 16)", "[videos, frames, 3, height"),
        ((PREDS[0], PREDS[0]), "no videos", "(3, 3, 16, 16)", "list of videos"),
        ((PREDS.permute(0, 1, 3, 4, 2), PREDS), "axes", "(3, 16, 16, 3)", "permute(0, 3, 1, 2)"),
        ((PREDS.transpose(1, 2)[:, :, :2], PREDS), "axes", "(3, 2, 16, 16)", "transpose(0, 1)"),
        ((PREDS[:, :, :1], PREDS), "axes", "(3, 1, 16, 16)", "RGB"),
        ((PREDS, PREDS[:, :, :, :8]), "cannot be compared", "(3, 3, 8, 16)", "same size"),
        ((PREDS, PREDS[:, :2]), "cannot be compared", "(2, 3, 16, 16)", "number of frames"),
        ((PREDS, PREDS[:1]), "one with one", "2 in preds, 1 in target", "as many"),
        ((PREDS, [*PREDS, PREDS[0]]), "one with one", "3 in target", "as many"),
        ((PREDS,), "compares two videos", "target is missing", "leave the metric out"),
        ((PREDS * 255, PREDS), "out of range", "to 25", "divide 8-bit"),
        ((PREDS - 0.5, PREDS), "out of range", "from -0.", "[0, 1]"),
        ((PREDS / 0, PREDS), "out of range", "inf", "[0, 1]"),
        (((300 * PREDS).short(), PREDS), "out of range", "torch.int16", "Pass uint8"),
        ((PREDS > 0.5, PREDS), "out of range", "torch.bool", "Pass uint8"),
        ((PREDS, "video.mp4"), "no videos", "target is str", "Pass a tensor"),
        (([PREDS[0], PREDS[0, 0]], PREDS), "no video", "number 1 of preds is (3, 16, 16)", "Pass"),
        (([], []), "holds no video", "0 were given", "one or more"),
        ((PREDS[:, :0], PREDS[:, :0]), "no video", "(0, 3, 16, 16)", "Pass [frames"),
    ],
)
def test_bad_input_is_refused_in_three_parts_and_leaves_nothing_behind(
    arguments, wrong, given, works
):
    metric = PSNR()
    with pytest.raises(ValueError) as error:
        metric.update(*arguments)
    for words in (wrong, given, works):
        assert words in str(error.value)
    assert not metric.values


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"ids": [1]}, "ids do not fit 2 videos: 1 of them"),
        ({"units": torch.zeros(2)}, "units do not fit 2 videos: torch.float32"),
        ({"units": "ab"}, "units do not fit 2 videos: 'ab'"),
        ({"prompts": [None, "a"]}, "prompts do not fit"),
        ({"fps": [8.0]}, r"fps does not fit 2 videos: \[8.0\]"),
        ({"fps": 0}, "fps does not fit 2 videos: 0"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, said):
    metric = IdenticalFrames()
    with pytest.raises(ValueError, match=said):
        metric.update(PREDS, PREDS, **labels)
    assert not metric.values


@pytest.mark.parametrize(
    "name", [name for name, kind in METRICS.items() if kind.against_reference()]
)
def test_a_clip_that_equals_its_target_has_the_value_that_is_said_of_it(name):
    found = []
    for seed, frames in ((0, 3), (1, 5)):
        metric = made(name)
        if name in PIXELS:
            clips = videos(2, frames, LARGE, seed)[0]
        else:
            generator = torch.Generator().manual_seed(seed)
            clips = torch.randn(2, frames, 1, 4, 4, generator=generator)
        metric.update(clips, clips)
        found.append(metric.compute().item())
    if METRICS[name].identical is None:
        assert found == [3.0, 5.0], "not one number: all of its frames"
        assert name == "divergence_onset"
    else:
        assert found == pytest.approx([METRICS[name].identical] * 2, abs=1e-6)


def test_a_plain_lightning_module_of_a_user():
    """The loop that somebody who trains a model of their own writes."""
    pytest.importorskip("lpips")
    from lightning.pytorch import LightningModule, Trainer

    class Mine(LightningModule):
        def __init__(self):
            super().__init__()
            self.pairs = MetricCollection([PSNR(), LPIPS("squeeze", trunk="random")])
            self.subject = SubjectConsistency("random-2dconv")
            self.fvd = FrechetVideoDistance("random-3dconv")

        def test_step(self, batch, index):
            target, name = batch
            preds = (target + 0.1).clamp(0, 1)
            self.pairs.update(preds, target, prompts=name)
            self.subject.update(preds, prompts=name)
            self.fvd.update(preds, real=False)
            self.fvd.update(target, real=True)
            self.log("subject", self.subject)
            self.log("fvd", self.fvd)

        def on_test_epoch_end(self):
            self.log_dict(self.pairs.compute())

    data = [(video, f"prompt {n // 2}") for n, video in enumerate(torch.rand(4, 9, 3, 32, 32))]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    module, trainer = Mine(), Trainer(accelerator="cpu", barebones=False, **quiet)
    (found,) = trainer.test(module, torch.utils.data.DataLoader(data, batch_size=2), verbose=False)
    assert found.keys() == {"PSNR", "LPIPS", "subject", "fvd"}
    assert 20 < found["PSNR"] < 25 and 0 < found["LPIPS"] < 2 and found["fvd"] > 0
    assert not [key for key in module.state_dict() if "backbone" in key]
    assert MSSSIM.paired and not TemporalFlicker.paired
