"""Names of metrics, what they need, and what is missing for them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_kv.metrics import METRICS, SETS, Choice, Suite, metric_by_name
from lightning_kv.metrics.backbones import BACKBONES
from lightning_kv.metrics.base import PixelMetric
from lightning_kv.metrics.suite import ENCODERS, USUAL, able, explained, networks, set_metric
from lightning_kv.runs.summary import MetricInfo

FREE = [name for name in METRICS if not networks(name)]
ALL = {"latents", "pixels", "reference_pixels", "reference_latents"}
ALL |= {"scene", "attention", "fps", "prompt"}
NAMES = [
    *FREE,
    *(f"{base}/{net}" for base in METRICS for net in networks(base)),
    *(f"{base}/{net}" for base in SETS for net in {*ENCODERS[base], *BACKBONES}),
]
paths = st.text(min_size=1).filter(lambda text: text.strip())


@given(st.sampled_from(NAMES), st.none() | paths)
def test_a_name_comes_back(name, path):
    if path is not None and "/" not in name:
        with pytest.raises(ValueError, match="needs no network"):
            Choice.parse(f"{name}={path}")
        return
    choice = Choice.parse(name if path is None else f"{name}={path}")
    assert (choice.name, choice.given) == (name, path)
    assert Choice.parse(choice.name) == Choice(choice.base, choice.network)
    assert choice.of_sets == (choice.base in SETS)


@pytest.mark.parametrize("base", [*METRICS, *SETS])
def test_without_a_network_it_is_the_default_one(base):
    default = networks(base)[:1]
    assert Choice.parse(base).name == "/".join([base, *default])


@given(st.text(max_size=12))
def test_any_other_word_is_refused_with_a_guess(text):
    try:
        found = Choice.parse(text)
    except ValueError as error:
        assert (
            "Did you mean" in str(error) or "network" in str(error) or "Write one of" in str(error)
        )
    else:
        assert found.base in {*METRICS, *SETS}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pnsr", r"There is no metric 'pnsr'\. Did you mean 'psnr'\?"),
        ("fvd/nothing", r"'fvd' is not defined on 'nothing'\. Write one of fvd/i3d"),
        ("lpips/i3d", "'lpips' is not defined on 'i3d'"),
        ("psnr/vgg", "'psnr' needs no network"),
    ],
)
def test_errors(text, said):
    with pytest.raises(ValueError, match=said):
        Choice.parse(text)


def test_every_metric_says_what_it_is():
    metrics = metric_by_name(FREE)
    assert len({metric.recipe for metric in metrics.values()}) == len(FREE)
    for name, metric in metrics.items():
        assert metric.name == name and isinstance(metric.unit, str) and metric.recipe
        assert metric.higher_is_better in (True, False, None)
        assert set(metric.needs) <= ALL
        assert Choice.parse(name).needs == set(metric.needs)
        if metric.identical is not None:
            assert type(metric).against_reference()
    for name in METRICS.keys() - set(FREE):
        assert METRICS[name].name == name and networks(name)
    assert METRICS.keys().isdisjoint(SETS) and ENCODERS.keys() == SETS.keys()


def test_the_usual_ones_need_no_weights_and_tell_policies_apart():
    suite = Suite(None, ALL)
    assert tuple(suite.choices) == USUAL and not suite.missing and set(USUAL) <= set(FREE)
    for known in ({"pixels"}, {"reference_latents"}, {"pixels", "scene"}, set()):
        assert all(choice.needs <= known for choice in Suite(None, known).choices.values())
    assert tuple(Suite(None, ALL - {"scene"}).choices) == tuple(
        name for name in USUAL if "scene" not in METRICS[name].needs
    )


def test_facts_fit_a_summary(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_KV_MODELS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    suite = Suite(["psnr", "brightness", "fvd/random-3dconv", "kvd/random-2dconv", "lpips"], ALL)
    facts = {name: MetricInfo(**each) for name, each in suite.facts().items()}
    json.dumps(suite.facts(), allow_nan=False)
    assert list(facts) == list(suite.choices) and list(suite.missing) == ["lpips/alex"]
    assert facts["psnr"].against_reference and not facts["psnr"].sets
    assert facts["brightness"].higher_is_better is None
    assert (facts["fvd/random-3dconv"].encoder, facts["fvd/random-3dconv"].frames) == (
        "random-3dconv",
        8,
    )
    assert facts["kvd/random-2dconv"].frames == 16 and facts["kvd/random-2dconv"].sets
    assert facts["lpips/alex"].undefined.startswith("unavailable: The weights")
    assert facts["lpips/alex"].recipe == ""
    assert list(suite.clip_metrics()) == ["psnr", "brightness"]
    assert all(isinstance(metric, PixelMetric) for metric in suite.clip_metrics().values())
    assert sorted(suite.encoders()) == ["random-2dconv", "random-3dconv"]
    assert suite.recipes()["lpips/alex"].startswith("unavailable")
    recipe = set_metric("fvd/random-3dconv", suite.encoders()["random-3dconv"], frames=8).recipe
    assert suite.recipes()["fvd/random-3dconv"] == recipe


def test_metrics_are_fresh_for_every_policy():
    suite = Suite(["psnr"], ALL)
    first, second = (suite.clip_metrics()["psnr"] for _ in range(2))
    first.update(None, curve=first.total.new_tensor([30.0]))
    assert (first.clips, second.clips) == (1, 0)


@pytest.mark.parametrize(
    ("names", "known", "said"),
    [
        ([], ALL, "No metric is named: 0"),
        (["psnr", "psnr"], ALL, "named twice: psnr, psnr"),
        (["fvd", "fvd/i3d"], ALL, "named twice"),
        (["recall"], {"pixels"}, "'recall' cannot be computed here: it needs the panorama world"),
        (["psnr"], {"pixels"}, "it needs pixels of a reference"),
        (["retained_mass"], {"pixels"}, "it needs a rollout"),
    ],
)
def test_what_a_run_cannot_give(names, known, said):
    with pytest.raises(ValueError, match=said):
        Suite(names, known)


def test_what_can_be_computed_can_be_computed():
    for known in ({"pixels"}, {"reference_latents", "attention"}, ALL):
        for name in able(known):
            assert Choice.parse(name).needs <= known
    assert {*METRICS, *SETS} - set(able(ALL)) == set()
    assert all(explained(need) for need in ALL)


def test_metrics_of_sets_have_no_value_for_a_clip():
    with pytest.raises(ValueError, match="fvd/i3d compares sets of clips"):
        metric_by_name(["psnr", "fvd"])
