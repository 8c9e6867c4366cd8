"""Chunks of a clip under every way to read: a clip of the model's own, and the same as a video."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny_network import TINY, encoder

from lightning_kv.calibration.chunk_meter import ChunkMeter
from lightning_kv.calibration.sites import SiteSettings
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan
from lightning_kv.policies.registry import policy_from_dict, preset
from lightning_kv.rollout import rollout

SETTINGS = SiteSettings(reach=6, scorers=("mass",), chunks=2, steps=(0,), probes=0)


def reading(budget):
    return policy_from_dict({"name": "r", "select": {"part": "top-attention", "budget": budget}})


@pytest.fixture(scope="module")
def meter():
    torch.manual_seed(0)
    model = VideoModel(CausalWan(TINY).double().eval().requires_grad_(False), None, encoder)
    ways = {f"uniform@{n}f": reading(f"{n}f").select for n in (1, 3, 6)}
    return ChunkMeter(model, preset("sliding-window@6f"), SETTINGS, 18, ways=ways)


def test_a_clip_has_its_errors_at_its_sites(meter):
    found, seen = meter.of_prompt("a", "u", "x"), []
    again = meter.of_prompt("a", "u", "x", progress=seen.append)
    assert sum(seen) == pytest.approx(1) and found.unit == "u" and not found.validates
    assert len(found.sites) == 2 and all(step == 0 and chunk >= 2 for chunk, step in found.sites)
    for place, site in found.sites.items():
        assert list(site) == ["uniform@1f", "uniform@3f", "uniform@6f"]
        few, some, every = map(float, site.values())
        assert few > some > 1e-6 and every < 1e-12  # all that there is
        assert site == again.sites[place]
    other = meter.of_prompt("b", "u", "x")
    both = [site["uniform@1f"] for record in (found, other) for site in record.sites.values()]
    assert len({float(x) for x in both}) == 4


def test_a_video_that_the_model_has_made_is_its_own_clip(meter):
    own = meter.of_prompt("a", "a", "x")
    out = rollout(meter.model, meter.reference, "x", 18, keys=["a"], decode=False)
    video = meter.of_video("a", "a", "x", out.latents[0])
    assert video.sites.keys() == own.sites.keys()
    for place, site in own.sites.items():
        for name in ("uniform@1f", "uniform@3f"):
            torch.testing.assert_close(video.sites[place][name], site[name], rtol=1e-9, atol=0)


def test_errors_that_are_no_numbers_are_said(meter, monkeypatch):
    monkeypatch.setattr(
        "lightning_kv.calibration.chunk_meter.chunk_losses", lambda *_: {"own": float("nan")}
    )
    with pytest.raises(ValueError, match=r"clip 'a' in chunk \d are not finite under own"):
        meter.of_prompt("a", "a", "x")
