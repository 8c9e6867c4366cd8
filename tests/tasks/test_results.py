"""From rollouts to the numbers of a record."""

import pytest
import torch
from torch import nn

from lightning_kv.metrics import Clip
from lightning_kv.metrics.suite import metric_by_name
from lightning_kv.tasks.results import measure


def test_a_metric_that_cannot_judge_a_clip_costs_itself_alone():
    frames = torch.full((3, 3, 64, 64), 0.5)
    clip = Clip(pixels=frames, reference_pixels=frames - 0.1)
    metrics = nn.ModuleDict(metric_by_name(["ms_ssim", "psnr", "latent_mse"]))
    problems = {}
    values, curves = measure(metrics, clip, problems)
    assert list(problems) == ["ms_ssim"] and "too small for MS-SSIM" in problems["ms_ssim"]
    assert values == {"ms_ssim": None, "psnr": pytest.approx(20, abs=1e-4), "latent_mse": None}
    assert (curves["ms_ssim"], len(curves["psnr"]), curves["latent_mse"]) == ([], 3, [])
    assert metrics["psnr"].clips == 1 and metrics["ms_ssim"].clips == 0
    with pytest.raises(ValueError, match="too small for MS-SSIM"):
        measure(metrics, clip)
