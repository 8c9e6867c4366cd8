"""LPIPS against the package and torchmetrics on the same weights; which trunks it takes."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kv.metrics.backbones import lpips as networks
from lightning_kv.metrics.backbones.lpips import LPIPSNetwork, torchvision_trunk
from lightning_kv.metrics.backbones.manifest import WEIGHTS
from lightning_kv.metrics.backbones.weights import WeightsUnavailable, checksum
from lightning_kv.metrics.base import read_clip
from lightning_kv.metrics.perceptual import LPIPS, TRUNKS

lpips = pytest.importorskip("lpips", reason="the package lpips is not installed")
pytest.importorskip("torchvision", reason="the package torchvision is not installed")


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """A machine without any weights."""
    for name in ("ALEXNET", "VGG16", "SQUEEZENET", "ACCEPT_LICENSE"):
        monkeypatch.delenv(f"LIGHTNING_KV_{name}", raising=False)
    monkeypatch.setenv("LIGHTNING_KV_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture
def unpublished(monkeypatch):
    """Weights that were made here pass for the published ones."""
    for name, _ in TRUNKS.values():
        entry = WEIGHTS[name]
        monkeypatch.setitem(WEIGHTS, name, type(entry)(**{**vars(entry), "sha256": ""}))


def trunk_of(net, seed=5):
    trunk = torchvision_trunk(net)
    generator = torch.Generator().manual_seed(seed)
    for value in trunk.features.parameters():
        fan = value[0].numel() if value.ndim > 1 else 100
        value.data = torch.randn(value.shape, generator=generator) * (2 / fan) ** 0.5
    return trunk


def package(net, trunk):
    """The package as it is meant to be used, each slice given its own layers by hand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    for index in range(1, model.net.N_slices + 1):
        for name, layer in getattr(model.net, f"slice{index}").named_children():
            layer.load_state_dict(trunk.features[int(name)].state_dict())
    return model


def random_pair(frames=3, size=(64, 48), seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, error = torch.rand(2, frames, 3, *size, generator=generator)
    return a, (a + 0.4 * (error - 0.5)).clamp(0, 1)


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_every_frame_is_that_of_the_package(net):
    trunk = trunk_of(net)
    a, b = random_pair(frames=10)
    metric, model = LPIPS(net, trunk=trunk), package(net, trunk)
    with torch.no_grad():
        expected = [
            model(x[None], y[None], normalize=True).item() for x, y in zip(a, b, strict=True)
        ]
    curve = metric.curve(a, b)
    assert curve.dtype == torch.float64
    assert curve.tolist() == pytest.approx(expected, rel=1e-5)
    assert min(expected) > 1e-3
    assert metric.curve(a, a).tolist() == [0.0] * 10


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_every_frame_is_that_of_torchmetrics(net):
    from torchmetrics.functional.image.lpips import _LPIPS

    trunk = trunk_of(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _LPIPS(pretrained=True, net=net, pnet_rand=True)
    for part in (getattr(model.net, name) for name, _ in model.net.named_children()):
        modules = part if isinstance(part, torch.nn.ModuleList) else [part]
        for module in modules:
            for name, layer in module.named_children():
                if name.isdigit():
                    layer.load_state_dict(trunk.features[int(name)].state_dict())
    a, b = random_pair()
    with torch.no_grad():
        expected = model(a, b, normalize=True).flatten().tolist()
    found = LPIPSNetwork(net, trunk)(a, b).tolist()
    assert found == pytest.approx(expected, rel=1e-5)


@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_a_curve_does_not_depend_on_how_a_clip_is_cut(cuts):
    metric = {"": LPIPS("squeeze", trunk="random")}
    a, b = random_pair(sum(cuts), size=(40, 40))
    blocks = list(zip(a.split(cuts), b.split(cuts), strict=True))
    whole = read_clip(metric, [(a, b)])[""]
    assert read_clip(metric, blocks)[""].tolist() == pytest.approx(whole.tolist(), rel=1e-5)


def test_a_published_file_is_found_named_and_shared(unpublished, monkeypatch, tmp_path):
    trunk, path = trunk_of("squeeze"), tmp_path / "squeezenet.pth"
    torch.save(trunk.state_dict(), path)
    given = LPIPS("squeeze", given=path)
    assert given.name == "lpips/squeeze"
    assert given.backbone.comparable
    assert given.backbone.weights_sha256 == checksum(path)
    assert "squeezenet1_1 of torchvision" in given.recipe
    a, b = random_pair()
    expected = LPIPSNetwork("squeeze", trunk)(a, b)
    assert torch.equal(given.backbone(a, b), expected)
    assert LPIPS("squeeze", given=path).backbone is given.backbone

    monkeypatch.setenv("LIGHTNING_KV_SQUEEZENET", str(path))
    assert LPIPS("squeeze").backbone is given.backbone
    monkeypatch.delenv("LIGHTNING_KV_SQUEEZENET")
    cache = tmp_path / "torch" / "hub" / "checkpoints" / WEIGHTS["squeezenet"].file
    cache.parent.mkdir(parents=True)
    path.rename(cache)
    assert torch.equal(LPIPS("squeeze").backbone(a, b), expected)


@pytest.mark.parametrize("net", TRUNKS)
def test_a_missing_trunk_says_what_to_type_and_nothing_is_downloaded(net, monkeypatch):
    def network(*args, **kwargs):
        raise RuntimeError("the network was asked")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", network)
    monkeypatch.setattr(torch.hub, "download_url_to_file", network)
    with pytest.raises(WeightsUnavailable) as error:
        LPIPS(net)
    entry = WEIGHTS[TRUNKS[net][0]]
    for part in (entry.file, f"lightning-kv fetch {entry.name}", entry.variable, "BSD-3-Clause"):
        assert part in str(error.value)


def test_files_with_missing_or_unknown_parameters_are_refused(unpublished, tmp_path):
    state = trunk_of("squeeze").state_dict()
    first = next(iter(state))
    variants = {
        "missing": {name: value for name, value in state.items() if name != first},
        "unexpected": {**state, "features.99.weight": torch.zeros(1)},
        "other": trunk_of("alex").state_dict(),
        "shape": {**state, first: state[first][:, :1]},
        "heads": torch.load(f"{lpips.__path__[0]}/weights/v0.1/squeeze.pth", map_location="cpu"),
    }
    for name, held in variants.items():
        path = tmp_path / f"{name}.pth"
        torch.save(held, path)
        with pytest.raises(ValueError, match="does not fit"):
            LPIPS("squeeze", given=path)


def test_a_file_that_is_not_the_published_one_is_refused(tmp_path):
    path = tmp_path / WEIGHTS["squeezenet"].file
    torch.save(trunk_of("squeeze").state_dict(), path)
    with pytest.raises(ValueError, match="is not the published 'squeezenet'"):
        LPIPS("squeeze", given=path)


def test_a_module_that_is_another_network_is_refused():
    squeeze = trunk_of("squeeze")
    with pytest.raises(ValueError, match=r"SqueezeNet is not the trunk.*10 parameters"):
        LPIPS("alex", trunk=squeeze)
    squeeze.features[12] = torch.nn.Identity()
    with pytest.raises(ValueError, match="44 fit, and 0 are left over"):
        LPIPS("squeeze", trunk=squeeze)


def test_a_trunk_of_ones_own_and_a_random_one_have_their_own_names():
    own, random = LPIPS("squeeze", trunk=trunk_of("squeeze")), LPIPS("squeeze", trunk="random")
    assert own.name == "lpips/squeeze-squeezenet"
    assert random.name == "lpips/squeeze-random"
    assert "UNTRAINED" in random.recipe
    for metric in (own, random):
        assert not metric.backbone.comparable
        assert metric.backbone.weights_sha256 is None
    a, b = random_pair()
    again = LPIPS("squeeze", trunk="random")
    assert torch.equal(random.backbone(a, b), again.backbone(a, b))
    assert not torch.equal(random.backbone(a, b), own.backbone(a, b))


def test_building_prints_nothing_warns_of_nothing_and_draws_no_numbers(capfd):
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric = LPIPS("squeeze", trunk="random")
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")
    assert not metric.train().backbone.net.training
    assert not any(value.requires_grad for value in metric.parameters())


@pytest.mark.parametrize(
    ("call", "given"),
    [
        (lambda: LPIPS("resnet"), "'resnet'.*alex, vgg, squeeze"),
        (lambda: LPIPS("squeeze", trunk="trained"), "'trained'"),
        (lambda: LPIPS("squeeze", given="x.pth", trunk="random"), "x.pth"),
    ],
)
def test_unclear_trunks_are_refused(call, given):
    with pytest.raises(ValueError, match=given):
        call()


def test_pixels_out_of_range_and_tiny_frames_are_refused():
    metric = LPIPS("squeeze", trunk="random")
    a, b = random_pair()
    for pair, words in (((2 * a - 1, b), "from -"), ((a[..., :31], b[..., :31]), "at least 32")):
        with pytest.raises(ValueError, match=words):
            read_clip({"": metric}, [pair])


def test_a_missing_package_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(WeightsUnavailable, match="pip install lpips"):
        networks.LPIPSNetwork("squeeze")
