"""Names of metrics, what they need, and what is missing for them."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import MetricCollection
from torchmetrics.image import PeakSignalNoiseRatio

import lightning_kv.metrics as package
from lightning_kv.metrics import (
    LPIPS,
    METRICS,
    PSNR,
    SETS,
    Choice,
    FrechetVideoDistance,
    SubjectConsistency,
    Suite,
    VideoMetric,
    metric_by_name,
)
from lightning_kv.metrics.backbones import BACKBONES, RandomBackbone
from lightning_kv.metrics.suite import (
    ENCODERS,
    OWN,
    USUAL,
    able,
    explained,
    networks,
    set_metric,
)
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
def test_any_other_word_is_refused_with_what_would_work(text):
    try:
        found = Choice.parse(text)
    except ValueError as error:
        assert (
            "Known: psnr" in str(error)
            or "network" in str(error)
            or "Write one of" in str(error)
            or ":" in text
        )
    else:
        assert found.base in {*METRICS, *SETS}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pnsr", r"No metric 'pnsr'\. Did you mean 'psnr'\?"),
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
        low, high = metric.plot_lower_bound, metric.plot_upper_bound
        assert low is None or high is None or low < high
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
    known = MetricInfo.__dataclass_fields__.keys() | {"bounds"}
    assert all(each.keys() <= known for each in suite.facts().values())
    facts = {name: SimpleNamespace(**each) for name, each in suite.facts().items()}
    assert facts["psnr"].bounds == [0.0, 100.0] and facts["fvd/random-3dconv"].bounds == [0.0, None]
    assert facts["kvd/random-2dconv"].bounds == [None, None]
    json.dumps(suite.facts(), allow_nan=False)
    assert list(facts) == list(suite.choices) and list(suite.missing) == ["lpips/alex"]
    assert facts["psnr"].against_reference and not facts["psnr"].sets
    assert facts["lpips/alex"].bounds == [0.0, None]
    assert facts["brightness"].higher_is_better is None
    assert (facts["fvd/random-3dconv"].encoder, facts["fvd/random-3dconv"].frames) == (
        "random-3dconv",
        8,
    )
    assert facts["kvd/random-2dconv"].frames == 16 and facts["kvd/random-2dconv"].sets
    assert facts["lpips/alex"].undefined.startswith("unavailable: The weights")
    assert facts["lpips/alex"].recipe == ""
    assert list(suite.clip_metrics()) == ["psnr", "brightness"]
    assert all(isinstance(metric, VideoMetric) for metric in suite.clip_metrics().values())
    assert sorted(suite.encoders()) == ["random-2dconv", "random-3dconv"]
    assert suite.recipes()["lpips/alex"].startswith("unavailable")
    recipe = set_metric(
        "fvd/random-3dconv", suite.encoders()["random-3dconv"].backbone, frames=8
    ).recipe
    assert suite.recipes()["fvd/random-3dconv"] == recipe


def test_metrics_are_fresh_for_every_policy():
    suite = Suite(["psnr"], ALL)
    first, second = (suite.clip_metrics()["psnr"] for _ in range(2))
    first.add(torch.tensor([30.0]))
    assert (len(first.values), len(second.values)) == (1, 0)


@pytest.mark.parametrize(
    ("names", "known", "said"),
    [
        ([], ALL, "No metric is named: 0"),
        (["psnr", "psnr"], ALL, "named twice: psnr, psnr"),
        (["fvd", "fvd/i3d"], ALL, "named twice"),
        (
            ["recall"],
            {"pixels"},
            "'recall' cannot be computed here: it needs latents and the pano",
        ),
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


def test_every_class_is_importable_from_the_package():
    for kind in {*METRICS.values(), *SETS.values()}:
        assert getattr(package, kind.__name__) is kind and kind.__name__ in package.__all__
    assert package.functional.psnr and "functional" in package.__all__


GLOW = """
from lightning_kv.metrics import FrechetVideoDistance, VideoMetric

class Glow(VideoMetric):
    unit, higher_is_better, recipe = "share", True, "mean of all pixels"
    plot_lower_bound = 0.0

    def frame_values(self, preds, target=None):
        return preds.double().mean((1, 2, 3))

class Taken(Glow):
    name = "psnr"

class Spoken(Glow):
    name = "a b"

class Picky(Glow):
    def __init__(self, radius):
        super().__init__()

class Silent(VideoMetric):
    higher_is_better = True

class Other:
    pass

class Twice(FrechetVideoDistance):
    name = "twice"

    def __init__(self, backbone="random-3dconv", **kwargs):
        super().__init__(backbone, **kwargs)

    def value(self, generated, real):
        return 2 * super().value(generated, real)

number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A package of somebody else's in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    known = dict(OWN)
    (tmp_path / "mine_of_test").mkdir()
    (tmp_path / "mine_of_test" / "glow.py").write_text(GLOW)
    (tmp_path / "mine_of_test" / "broken.py").write_text("1 / 0")
    yield tmp_path / "mine_of_test" / "glow.py"
    OWN.clear()
    OWN.update(known)
    for name in [name for name in sys.modules if name.startswith("mine_of_test")]:
        del sys.modules[name]


def test_a_metric_of_another_package_is_named_by_its_address(mine):
    choice = Choice.parse("mine_of_test.glow:Glow")
    assert (choice.name, choice.needs, choice.of_sets) == ("glow", {"pixels"}, False)
    suite = Suite(["psnr", "mine_of_test.glow:Glow"], ALL)
    assert list(suite.choices) == ["psnr", "glow"] and not suite.missing
    metric = suite.clip_metrics()["glow"]
    metric.update(torch.full((1, 2, 3, 4, 4), 0.5))
    assert metric.compute() == 0.5 and metric is not suite.clip_metrics()["glow"]
    facts = suite.facts()["glow"]
    assert (facts["unit"], facts["bounds"], facts["recipe"]) == (
        "share",
        [0.0, None],
        "mean of all pixels",
    )
    before = suite.recipes()
    assert before["glow"].startswith("mean of all pixels source ")
    mine.write_text(GLOW + "# another version\n")
    after = suite.recipes()
    assert after["psnr"] == before["psnr"] and after["glow"] != before["glow"]
    with pytest.raises(ValueError, match="named twice"):
        Suite(["mine_of_test.glow:Glow", "mine_of_test.glow:Glow"], ALL)


def test_a_metric_of_sets_of_another_package(mine):
    suite = Suite(["mine_of_test.glow:Twice"], {"pixels"})
    assert list(suite.encoders()) == ["random-3dconv"]
    facts = suite.facts()["twice"]
    assert facts["sets"] and (facts["encoder"], facts["frames"]) == ("random-3dconv", 8)
    rows = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    own = set_metric("twice", num_features=4, features_name="random-3dconv", frames=8)
    plain = FrechetVideoDistance(num_features=4)
    for metric in (own, plain):
        for real, side in enumerate(rows):
            metric.update_features(side, bool(real))
    assert own.compute() == 2 * plain.compute() and own.report().name == "twice/random-3dconv"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("mine_of_test/glow.py:Glow", "metric 'mine_of_test/glow.py:Glow' is no address"),
        ("mine_of_test.nothing:Glow", "cannot be imported: ModuleNotFoundError"),
        ("mine_of_test.broken:Glow", "cannot be imported: ZeroDivisionError"),
        ("mine_of_test.glow:Gloww", "is no metric of clips or of sets: it is nothing. Give"),
        ("mine_of_test.glow:number", "it is 'int'. Give a class that derives from VideoMetric"),
        ("mine_of_test.glow:Other", "it is the class Other, which derives from object"),
        ("lightning_kv.metrics:VideoMetric", "it is the base class VideoMetric itself"),
        ("lightning_kv.metrics:ClipMetric", "it is the class ClipMetric, which derives from"),
        ("torchmetrics.image:PeakSignalNoiseRatio", "which derives from Metric"),
        ("mine_of_test.glow:Taken", "is called 'psnr', and so is lightning_kv.metrics.fidelity"),
        ("mine_of_test.glow:Silent", "the class Silent writes neither frame_values nor reader"),
        ("mine_of_test.glow:Spoken", "is 'a b'. Give it a `name` of letters"),
        ("mine_of_test.glow:Picky", "cannot be made without arguments: .*radius"),
    ],
)
def test_an_address_that_leads_to_no_metric(mine, address, said):
    with pytest.raises(ValueError, match=said):
        Suite([address], ALL)


def test_metrics_themselves_can_be_given():
    psnr, subject = PSNR(curves=True), SubjectConsistency("random-2dconv")
    psnr.add(torch.tensor([30.0]))
    fvd = FrechetVideoDistance("random-3dconv", covariance="ml")
    suite = Suite([psnr, subject, fvd, "ssim"], ALL)
    names = ["psnr", "subject_consistency/random-2dconv", "fvd/random-3dconv", "ssim"]
    assert list(suite.choices) == names and list(suite.encoders()) == ["random-3dconv"]
    fresh = suite.clip_metrics()
    assert fresh["psnr"].curves == [] and len(psnr.values) == 1
    assert fresh[names[1]].backbone is subject.backbone
    assert "ml covariance" in suite.facts()["fvd/random-3dconv"]["recipe"]
    rows = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    metric = set_metric("fvd/random-3dconv", num_features=4, features_name="random-3dconv")
    plain = FrechetVideoDistance(num_features=4, covariance="ml")
    for each in (metric, plain):
        for real, side in enumerate(rows):
            each.update_features(side, bool(real))
    assert metric.compute() == plain.compute() and metric.backbone is None
    with pytest.raises(ValueError, match="'fvd/given' has no backbone"):
        Suite([FrechetVideoDistance(num_features=4)], ALL)


class Shine(VideoMetric):
    """A metric of somebody's own that can be made without arguments."""

    def frame_values(self, preds, target=None):
        return preds.double().mean((1, 2, 3))


@pytest.fixture
def own():
    known = dict(OWN)
    yield
    OWN.clear()
    OWN.update(known)


def test_a_class_is_a_metric_as_its_address_is(own, monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_KV_MODELS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    suite = Suite([PSNR, Shine, "ssim", FrechetVideoDistance, LPIPS], ALL)
    assert list(suite.choices) == ["psnr", "shine", "ssim", "fvd/i3d", "lpips/alex"]
    named = Suite(["psnr", "ssim"], ALL).facts()
    assert {name: suite.facts()[name] for name in named} == named, "one of ours is as its name says"
    metric = suite.clip_metrics()["shine"]
    metric.update(torch.full((1, 2, 3, 4, 4), 0.5))
    assert metric.compute() == 0.5

    class Picky(Shine):
        def __init__(self, radius):
            super().__init__()

    with pytest.raises(ValueError, match=r"Picky cannot be made without arguments: .*radius"):
        Suite([Picky], ALL)


def test_one_text_is_a_list_as_on_the_command_line():
    for text in ("psnr,recall", "[psnr,recall]", " [psnr, recall] "):
        assert list(Suite(text, ALL).choices) == ["psnr", "recall"]
    assert list(Suite("psnr", ALL).choices) == list(metric_by_name("psnr")) == ["psnr"]
    for names in (("psnr",), iter(["psnr"]), {"psnr": 1}.keys()):
        assert list(Suite(names, ALL).choices) == ["psnr"]
    for nothing in ("", "[]"):
        with pytest.raises(ValueError, match="No metric is named: 0"):
            Suite(nothing, ALL)


@pytest.mark.parametrize(
    ("metrics", "given", "works"),
    [
        (lambda: PSNR(), "this is a metric PSNR of lightning_kv", "Pass it in a list"),
        (lambda: PSNR, "the class PSNR", "Pass it in a list"),
        (
            lambda: MetricCollection([PSNR()]),
            "a MetricCollection",
            r"list\(collection.values\(\)\)",
        ),
        (lambda: {"psnr": PSNR()}, "'dict'", r"list\(metrics.values\(\)\)"),
        (lambda: 3, "'int'", "Pass a list, such as metrics="),
        (lambda: [3], "it is 'int'", "derives from VideoMetric"),
        (lambda: [None], "it is nothing", "derives from VideoMetric"),
        (
            lambda: [PeakSignalNoiseRatio(1.0)],
            "PeakSignalNoiseRatio of torchmetrics",
            "VideoMetric",
        ),
        (lambda: [PeakSignalNoiseRatio], "class PeakSignalNoiseRatio, which", "VideoMetric"),
        (lambda: [MetricCollection([PSNR()])], "it is a MetricCollection", "VideoMetric"),
        (lambda: [VideoMetric], "the base class VideoMetric itself", "VideoMetric"),
        (lambda: [[PSNR()]], "it is 'list'", "VideoMetric"),
    ],
)
def test_what_is_no_list_of_metrics_is_refused_in_words(metrics, given, works):
    with pytest.raises(ValueError, match=f"{given}.*{works}"):
        Suite(metrics(), ALL)


@pytest.mark.parametrize(
    "taken", ["train", "keys", "forward", "update", "prefix", "training", "a.b"]
)
def test_a_name_that_a_collection_cannot_have_is_refused(own, taken):
    with pytest.raises(KeyError):
        MetricCollection({taken: PSNR()})
    kind = type("Glow", (Shine,), {"name": taken})
    named = Shine()
    named.name = taken
    for metric in (kind, kind(), named):
        with pytest.raises(ValueError, match=r"key in .*Give it a(nother)? `name`"):
            Suite([metric], ALL)
    assert taken not in OWN
    encoder = RandomBackbone(3)
    encoder.name = taken
    with pytest.raises(ValueError, match=r"features of .*Give them another `name`"):
        Suite([FrechetVideoDistance(encoder)], ALL)


def test_every_name_of_ours_can_be_a_key():
    metrics = {Choice.parse(name).name: PSNR() for name in [*METRICS, *SETS]}
    assert len(MetricCollection(metrics, compute_groups=False)) == len(METRICS) + len(SETS)
