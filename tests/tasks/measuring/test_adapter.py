"""What a rollout knows, brought to the metrics."""

import pytest
import torch

from lightning_kv.metrics import PSNR, ClipMetric, VideoKernelDistance, metric_by_name
from lightning_kv.metrics.backbones.base import RandomBackbone
from lightning_kv.metrics.suite import Suite
from lightning_kv.tasks.measuring.adapter import Clip, features, measure


def test_a_metric_that_cannot_judge_a_clip_costs_itself_alone():
    frames = torch.full((3, 3, 64, 64), 0.5)
    clip = Clip(pixels=frames, reference_pixels=frames - 0.1)
    found = measure(metric_by_name(["ms_ssim", "psnr", "latent_mse"]), clip)
    assert list(found.problems) == ["ms_ssim"] and "too small for MS-SSIM" in str(found.problems)
    assert found.values == {"ms_ssim": None, "psnr": pytest.approx(20), "latent_mse": None}
    assert list(found.curves) == ["psnr"] and len(found.curves["psnr"]) == 3


@pytest.mark.parametrize("per_latent", [1, 4])
@pytest.mark.parametrize("context", [0, 2])
def test_pixel_frames_become_latent_frames_and_given_ones_do_not_count(per_latent, context):
    """One pixel frame for the first latent frame and several for each other: VAEs do so."""
    latents = 5
    count = 1 + (latents - 1) * per_latent
    errors = torch.linspace(0.01, 0.3, count)
    black = torch.zeros(count, 3, 32, 32)
    clip = Clip(
        torch.zeros(latents, 16, 4, 4),
        black + errors.view(-1, 1, 1, 1),
        reference_pixels=black,
        context=context,
    )
    found = measure(metric_by_name(["psnr", "frame_change"]), clip)
    mse = errors.double().square()
    groups = [mse[:1], *mse[1:].split(per_latent)]
    pooled = torch.stack([group.mean() for group in groups])
    curve = found.curves["psnr"]
    assert curve[:context].isnan().all() and not curve[context:].isnan().any()
    assert torch.allclose(curve[context:], -10 * pooled.log10()[context:], atol=1e-5)
    assert found.values["psnr"] == pytest.approx(-10 * pooled[context:].mean().log10().item())
    assert clip.given_pixels == (0 if not context else 1 + (context - 1) * per_latent)


def test_a_metric_of_no_known_kind_is_refused():
    class Odd(ClipMetric):
        needs = ("latents",)

        def update(self):
            """Nothing."""

    with pytest.raises(ValueError, match=r"'odd' is a Odd.*Derive it from VideoMetric"):
        _ = measure({"odd": Odd()}, Clip(torch.zeros(2, 1, 4, 4))).values
        raise ValueError(*measure({"odd": Odd()}, Clip(torch.zeros(2, 1, 4, 4))).problems.values())


def test_nothing_is_added_by_measuring():
    frames = torch.full((3, 3, 32, 32), 0.5)
    metric = PSNR()
    measure({"psnr": metric}, Clip(pixels=frames, reference_pixels=frames))
    assert metric.unit_values().numel() == 0


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({}, "shows nothing"),
        ({"latents": torch.zeros(3, 1, 4, 4), "pixels": torch.zeros(4, 3, 8, 8)}, "differ"),
        ({"pixels": torch.full((2, 3, 8, 8), torch.nan)}, "must be finite"),
        ({"pixels": torch.zeros(2, 3, 8, 8), "context": 3}, "does not fit"),
    ],
)
def test_a_clip_that_cannot_be_is_refused(parts, said):
    with pytest.raises(ValueError, match=said):
        Clip(**parts)


def test_windows_have_the_length_that_each_metric_was_made_with():
    look = RandomBackbone(2)
    made = [VideoKernelDistance(look, frames=n) for n in (4, 7, 16)]
    suite = Suite(made, {"pixels"})
    names = ["kvd/random-2dconv:4f", "kvd/random-2dconv:7f", "kvd/random-2dconv"]
    assert [*suite.choices] == names == [f"kvd/{metric.features_name}" for metric in made]
    pixels = torch.rand(21, 3, 16, 16)
    found = features(pixels, suite.encoders(), given=2)
    for name, length, count in zip(names, (4, 7, 16), (4, 2, 1), strict=True):
        starts = [2 + length * place for place in range(count)]
        means = [look(pixels[start : start + length]).mean(0) for start in starts]
        assert torch.allclose(found[suite.encoder_of(name)], torch.stack(means), atol=1e-6)
        assert suite.facts()[name]["frames"] == length
        assert suite.set_metrics()[name].recipe.count(f"clips of {length} frames") == 1
