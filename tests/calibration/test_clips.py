"""Clips and their means: own history and a video's, sites behind what is given, planted heads."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from lightning_kv.calibration.clips import ClipMeter, profile_of, profiled
from lightning_kv.calibration.reduction import mean_of, reduced, summary_of
from lightning_kv.calibration.sites import SiteSettings, losses, query_moments, sites_of
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.policies.registry import policy_from_dict, preset
from lightning_kv.rollout import rollout

TINY = WanConfig(
    dim=48,
    ffn_dim=48,
    layers=2,
    heads=2,
    channels=1,
    text_dim=10,
    text_len=7,
    latent_size=(2, 6),
    train_horizon=21,
    timesteps=(1000.0, 600.0),
)
SETTINGS = SiteSettings(reach=6, chunks=2, probes=3, rows=5, exact=(0, 2))


def encoder(prompts):
    rows = torch.randn(len(prompts), 3, 10, generator=torch.Generator().manual_seed(3))
    return 10 * rows.double()


@cache
def meter(**settings):
    torch.manual_seed(0)
    model = VideoModel(CausalWan(TINY).double().eval().requires_grad_(False), None, encoder)
    return ClipMeter(model, preset("sliding-window@6f"), replace(SETTINGS, **settings), 18)


@cache
def clip(key="a", validates=True):
    return replace(meter(), profiles=True).of_prompt(key, key, "x", validates=validates)


def test_a_clip_has_the_record_that_it_has_alone():
    again = replace(meter(), profiles=True)
    again.of_prompt("b", "b", "x", validates=False)
    found = again.of_prompt("a", "a", "x", validates=True)
    assert found.validates and found.sites.keys() == clip().sites.keys()
    for place, record in clip().sites.items():
        assert record.keys() == found.sites[place].keys()
        assert all(torch.equal(own, found.sites[place][name]) for name, own in record.items())
    other = again.of_prompt("c", "c", "x")
    assert not other.validates
    names = ("norm", "mass/mass", "query/mean")
    both = sorted(other.sites.keys() & clip().sites.keys())
    assert not any(torch.equal(other.sites[k][n], clip().sites[k][n]) for k in both for n in names)


def test_a_video_that_the_model_has_made_is_measured_as_its_own_clip():
    """History from given latents is history from made ones: both come from passes at t = 0."""
    own = meter()
    out = rollout(own.model, own.reference, "x", 18, keys=["a"], decode=False)
    found = replace(own, profiles=True).of_video("a", "a", "x", out.latents[0], validates=True)
    for place, record in clip().sites.items():
        for name, value in record.items():
            close = {"rtol": 1e-9, "atol": 1e-20} if name == "floor" else {}
            torch.testing.assert_close(found.sites[place][name], value, **close)
    assert found.profile["mass"].shape == clip().profile["mass"].shape


def test_chunks_that_are_given_are_no_sites():
    for key in map(str, range(40)):
        assert min(sites_of(key, 18, 3, SETTINGS)) >= 2
        assert sites_of(key, 18, 3, SETTINGS, given=12) == (4, 5)
    with pytest.raises(ValueError, match=r"18 latent frames, 15 of them given, has 1 chunk "):
        sites_of("a", 18, 3, SETTINGS, given=15)
    given = torch.zeros(12, 1, 2, 6, dtype=torch.float64)
    found = meter().of_prompt("a", "a", "x", given)
    assert {chunk for chunk, _ in found.sites} == {4, 5}


def test_a_sink_is_kept_by_every_head():
    sunk = policy_from_dict({"name": "x", "retain": {"part": "window", "sink": 3, "budget": "6f"}})
    own = replace(meter(sink=3, exact=()), reference=sunk)
    record = next(iter(own.of_prompt("a", "a", "x").sites.values()))
    assert record["gn/mass"].shape == (3, 2, 2, 4)  # 3, 4, 5 and 6 frames
    assert float(record["mass/mass"][..., -1].abs().max()) < 1e-12
    dropped = replace(own, reference=preset("sliding-window@6f"))
    with pytest.raises(ValueError, match=r"keep the first 3 frames.*dropped frame 0.*sink: 3"):
        dropped.of_prompt("b", "b", "x")


def test_a_step_that_the_sampler_does_not_have_is_said():
    first = replace(TINY, sampler="rolling")
    torch.manual_seed(0)
    model = VideoModel(CausalWan(first).double().eval().requires_grad_(False), None, encoder)
    own = replace(meter(), model=model)
    with pytest.raises(ValueError, match=r"sampler 'rolling' makes none|holds .* frames"):
        own.of_prompt("a", "a", "x")


def test_the_profile_is_that_of_the_full_cache():
    own = meter()
    full = rollout(
        own.model, preset("full"), "x", 18, keys=["a"], decode=False, record=("mass", "lags")
    )
    mass = full.tables["mass"][0].mass["cond"]
    assert profiled(mass, 3) == 6
    mass = mass[:3, ..., :9]
    torch.testing.assert_close(clip().profile["mass"], mass.double(), rtol=1e-5, atol=1e-6)
    made = profile_of(clip().profile, 3)
    assert made.starts == (0, 3, 6, 9) and made.logits.shape == (2, 2, 18)
    assert float(made.logits[..., 1:].abs().min()) > 0  # also of frames out of reach
    video = replace(own, profiles=True).of_video("a", "a", "x", full.latents[0])
    assert video.profile["logits"].shape == (2, 2, 7)


def test_moments_of_queries_are_those_of_numpy():
    own = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3))
    looked = SimpleNamespace(views=[SimpleNamespace(raw_query=own)] * 3)
    found, x = query_moments(looked), own.double().numpy()
    pairs = np.abs(x[..., 0::2] + 1j * x[..., 1::2])
    each = {"query/mean": x, "query/square": x**2, "query/length": pairs}
    assert found.keys() == each.keys()
    for name, values in each.items():
        for layer in found[name]:
            np.testing.assert_allclose(layer, values.mean(1), rtol=1e-12)


def test_means_are_those_of_numpy():
    found = summary_of(clip(), SETTINGS, 2)
    records = [clip().sites[place] for place in sorted(clip().sites)]
    assert len(records) == 4
    for name, metric, scorer in (
        ("mass/gn", "gn", "mass"),
        ("recency/output", "output", "recency"),
    ):
        own = torch.stack([losses(record, metric, scorer) for record in records])
        torch.testing.assert_close(found[name], own.mean(0))
    lags = torch.stack([record["lag/mass"] for record in records])
    torch.testing.assert_close(found["lag/mass"][:, :, 0], lags[0::2].mean(0))
    torch.testing.assert_close(found["lag/mass"][:, :, 1], lags[1::2].mean(0))
    assert found["lag/mass"].shape == (2, 2, 2, 6)
    assert float(lags.sum(-1).max()) < 1  # the rest is on the chunk itself
    torch.testing.assert_close(found["gram/gn"].diag(), found["mass/gn"][..., 2].flatten())
    assert float(found["floor"]) == max(float(record["floor"]) for record in records)
    assert not {"zero", "exact/mass"} & summary_of(clip("b", False), SETTINGS, 2).keys()


def test_prompts_are_means_of_their_clips_in_any_order():
    clips = [
        replace(clip(key, key == "a"), unit=unit) for key, unit in zip("acb", "xyx", strict=True)
    ]
    found = [reduced(own, SETTINGS, 2) for own in (clips, clips[::-1])]
    assert found[0].prompts == found[1].prompts == ("x", "y")
    for name in ("mass/gn", "query/mean"):
        assert torch.equal(*(own.stacked(name) for own in found))
        a, b, c = (summary_of(clip(key, key == "a"), SETTINGS, 2)[name] for key in "abc")
        assert torch.equal(found[0].stacked(name), torch.stack([mean_of([a, b]), c]))
    assert not found[0].has("zero")  # not of all clips
    curves = found[0].curves([])
    assert curves.shape == (2, 2) and curves.budgets == tuple(range(7))
    assert set(curves.curves) == {f"{s}/{m}" for s in SETTINGS.scorers for m in METRICS}
    assert set(curves.importance) == {"history"}
    assert float(curves.extra["query/var"].min()) > 0


METRICS = ("mass", "output", "gn")


def test_exact_curves_are_there_where_all_is_measured_exactly():
    own = meter(exact=tuple(range(7)), chunks=1, steps=(0,))
    clips = [own.of_prompt(key, key, "x", validates=True) for key in "ab"]
    curves = reduced(clips, own.settings, 2).curves(["a", "b"])
    assert {"mass/exact", "recency/exact"} <= curves.curves.keys()
    assert set(curves.importance) == {"history", "zero"}
    assert reduced(clips, own.settings, 2).curves(["a"]).curves.keys() == {
        f"{s}/{m}" for s in SETTINGS.scorers for m in METRICS
    }


def test_without_probes_curves_are_of_attention_alone():
    own = meter(probes=0, exact=())
    curves = reduced([own.of_prompt(key, key, "x") for key in "ab"], own.settings, 2)
    assert curves.metric == "output"
    made = curves.curves([])
    assert set(made.curves) == {f"{s}/{m}" for s in SETTINGS.scorers for m in ("mass", "output")}
    assert not made.importance and "gram/gn" not in made.extra


@pytest.mark.parametrize("seed", [1, 3])
def test_planted_heads_are_found(seed):
    """Heads that are alike but for a factor, log-normal, on what they write."""
    config = replace(TINY, dim=128, heads=8, latent_size=(4, 8), channels=4)
    torch.manual_seed(seed)
    network = CausalWan(config).double().eval().requires_grad_(False)
    size = torch.randn(2, 8, dtype=torch.float64).exp()
    for block, own in zip(network.blocks, size, strict=True):
        block.self_attn.o.weight.mul_(own.repeat_interleave(16) / 2)
    settings = SiteSettings(reach=6, chunks=2, scorers=("mass",), probes=4, exact=(0,))
    model = VideoModel(network, None, encoder)
    own = ClipMeter(model, preset("sliding-window@6f"), settings, 18)
    clips = [own.of_prompt(key, key, "x", validates=True) for key in "abcd"]
    found = reduced(clips, settings, 2)
    measured = found.mean("mass/gn")[..., 0], found.mean("exact/mass")[..., 0]
    for importance in measured:
        assert spearmanr(importance.flatten(), size.flatten()).statistic >= 0.95
