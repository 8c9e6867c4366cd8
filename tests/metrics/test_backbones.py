import gc
import hashlib
import importlib
import json
import math
import os
import pickle
import socket
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_kv.metrics.backbones import (
    BACKBONES,
    Backbone,
    RandomBackbone,
    WeightsUnavailable,
    Wrapped,
    backbone,
    vits,
)
from lightning_kv.metrics.backbones.weights import (
    WEIGHTS,
    checksum,
    load_state,
    locate,
    verified,
    weights_folder,
)

NONCOMMERCIAL = "musiq-spaq"


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """A machine without any weights, settings or network."""
    for name in list(os.environ):
        if name.startswith("LIGHTNING_KV_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LIGHTNING_KV_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def refused(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)


def put(path, content=b"weights"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def put_folder(path):
    put(path / "config.json", b"{}")
    return put(path / "model.safetensors").parent


class Counting(Backbone):
    name, num_features, recipe = "counting", 3, "mean colour"
    calls = 0

    def forward(self, frames):
        self.calls += 1
        return frames.mean((2, 3))


# Manifest


def test_trunks_are_those_of_torchvision():
    models = pytest.importorskip("torchvision.models")
    theirs = {
        "alexnet": models.AlexNet_Weights.IMAGENET1K_V1,
        "vgg16": models.VGG16_Weights.IMAGENET1K_V1,
        "squeezenet": models.SqueezeNet1_1_Weights.IMAGENET1K_V1,
        "raft-large": models.optical_flow.Raft_Large_Weights.C_T_V1,
    }
    for name, published in theirs.items():
        assert WEIGHTS[name].url == published.url
        assert published.url.endswith(f"{WEIGHTS[name].sha256}.pth")
        assert WEIGHTS[name].size / 1e6 == pytest.approx(published.meta["_file_size"], rel=1e-3)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=list(WEIGHTS))
def test_an_entry_says_what_a_person_must_know(weights):
    assert weights.noncommercial == ("-NC-" in weights.licence)
    assert not (weights.repo and weights.url)
    assert bool(weights.repo) == bool(weights.path)
    assert weights.is_folder or not weights.path or weights.path[0].endswith(weights.file)
    accept = [weights.licence]
    with pytest.raises(WeightsUnavailable) as error:
        locate(weights.name, accept=accept)
    for fact in (weights.file, weights.licence, weights.variable, f"METRIC/{weights.name}="):
        assert fact in str(error.value)
    assert ("lightning-kv fetch" in str(error.value)) == weights.fetchable


def test_every_network_with_weights_of_its_own_is_in_the_manifest():
    shipped = {"panorama-encoder", "linear-midpoint", "random-2dconv", "random-3dconv"}
    assert BACKBONES.keys() - WEIGHTS.keys() == shipped


def test_every_name_leads_to_a_backbone_of_that_name():
    for name, build in BACKBONES.items():
        if name not in ("random-2dconv", "random-3dconv"):
            kind = build.keywords["target"]
            module = importlib.import_module(f"lightning_kv.metrics.backbones.{kind[0]}")
            assert getattr(module, kind[1]).name == name


# Where weights lie


def test_places_are_tried_in_order(monkeypatch, tmp_path):
    hub = tmp_path / "hub" / "models--OpenGVLab--VideoMAE2"
    put(hub / "refs" / "main", b"abc")
    name, file = "videomae-ssv2", WEIGHTS["videomae-ssv2"].file
    found = [put(hub / "snapshots" / "abc" / "mae-g" / file)]
    assert locate(name) == found[-1]
    found.append(put(tmp_path / "torch" / "hub" / "checkpoints" / file))
    assert locate(name) == found[-1]
    found.append(put(tmp_path / "models" / "metrics" / name / "mae-g" / file))
    assert locate(name) == found[-1]
    found.append(put(tmp_path / "models" / "metrics" / name / file))
    assert locate(name) == found[-1]
    found.append(put(tmp_path / "elsewhere.pth"))
    monkeypatch.setenv("LIGHTNING_KV_VIDEOMAE_SSV2", str(found[-1]))
    assert locate(name) == found[-1]
    found.append(put(tmp_path / "given.pth"))
    assert locate(name, found[-1]) == found[-1]


def test_a_folder_counts_only_with_its_weights(tmp_path):
    folder = weights_folder("dino-vitb16")
    assert folder == tmp_path / "models" / "metrics" / "dino-vitb16"
    put(folder / "config.json", b"{}")
    with pytest.raises(WeightsUnavailable, match=r"327 MiB.*Apache-2\.0"):
        locate("dino-vitb16")
    put(folder / "pytorch_model.bin")
    assert locate("dino-vitb16") == folder


def test_a_wrong_path_is_not_passed_over(monkeypatch, tmp_path):
    put(weights_folder("i3d") / WEIGHTS["i3d"].file)
    with pytest.raises(WeightsUnavailable, match="as given"):
        locate("i3d", tmp_path / "nowhere.pt")
    monkeypatch.setenv("LIGHTNING_KV_I3D", str(tmp_path / "nowhere.pt"))
    with pytest.raises(WeightsUnavailable, match="set in LIGHTNING_KV_I3D"):
        locate("i3d")


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'dino-vitb16'"):
        locate("dino-vitb")


@pytest.mark.parametrize("licence", ["CC-BY-NC-SA-4.0", "cc-by-nc-sa-4.0"])
def test_a_licence_is_accepted_by_argument_or_environment(monkeypatch, tmp_path, licence):
    path = put(tmp_path / "musiq.pth")
    for accept in ((), ("MIT",), ("CC-BY-NC-4.0",)):
        with pytest.raises(WeightsUnavailable, match=r"CC-BY-NC-SA-4\.0, and nobody has accepted"):
            locate(NONCOMMERCIAL, path, accept)
    assert locate(NONCOMMERCIAL, path, [licence]) == path
    assert locate(NONCOMMERCIAL, path, licence) == path
    monkeypatch.setenv("LIGHTNING_KV_ACCEPT_LICENSE", f"MIT, {licence}")
    assert locate(NONCOMMERCIAL, path) == path


# What is in them


def test_checksum_is_that_of_all_bytes(tmp_path):
    content = bytes(range(256)) * 10_000  # more than one block
    path = put(tmp_path / "a.pt", content)
    assert checksum(path) == hashlib.sha256(content).hexdigest()
    folder = put_folder(tmp_path / "folder")
    put(folder / "pytorch_model.bin", b"the same weights in another format")
    assert checksum(folder) == hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(ValueError, match="holds no weights"):
        checksum(put(tmp_path / "empty" / "config.json").parent)


def test_another_file_under_a_published_name_is_refused(tmp_path):
    path = put(tmp_path / "alexnet.pth")
    with pytest.raises(ValueError, match=r"begins with [0-9a-f]{16}, the published one with 7be5"):
        verified(path, WEIGHTS["alexnet"])
    assert verified(path, WEIGHTS["i3d"]) == checksum(path)  # nothing is published


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def test_loading_runs_no_code(monkeypatch, tmp_path):
    monkeypatch.setenv("EVIL", str(tmp_path / "ran"))
    path = tmp_path / "evil.pt"
    torch.save({"weight": Evil()}, path)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_state(path)
    put(path, pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_state(path)
    assert not (tmp_path / "ran").exists()


def test_tensors_come_back(tmp_path):
    state = {"weight": torch.randn(3, 2), "bias": torch.randn(3)}
    torch.save(state, tmp_path / "a.pt")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        torch.testing.assert_close(load_state(tmp_path / name), state, rtol=0, atol=0)
        broken = tmp_path / f"broken-{name}"
        whole = (tmp_path / name).read_bytes()
        broken.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="cannot be read as weights"):
            load_state(broken)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_state(tmp_path / "nowhere.pt")


def test_torchscript_only_if_allowed(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.trace(nn.Linear(2, 1), torch.zeros(1, 2)).save(str(path))
    with pytest.raises(ValueError, match="loading TorchScript runs the code in it"):
        load_state(path)
    assert isinstance(load_state(path, allow_script=True), torch.jit.ScriptModule)
    torch.save({"a": torch.ones(1)}, path)
    assert load_state(path, allow_script=True)["a"].item() == 1


# Backbones


def test_a_backbone_stays_frozen():
    encoder = Wrapped(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 4), nn.Dropout(0.9)))
    assert not encoder.train().training and not encoder.module[2].training
    frames = torch.rand(2, 3, 64, 64)
    assert torch.equal(encoder.features(frames), encoder(frames))
    assert not encoder.features(frames).requires_grad


def test_one_forward_for_metrics_that_show_the_same_block_and_its_reference():
    encoder = Counting()
    block, reference = torch.rand(2, 2, 3, 4, 4)
    for _ in range(3):
        assert torch.equal(encoder.features(block), block.mean((2, 3)))
        assert torch.equal(encoder.features(reference), reference.mean((2, 3)))
    assert encoder.calls == 2


def test_an_equal_tensor_is_another_block():
    encoder = Counting()
    for level in (0.0, 1.0, 0.0):
        block = torch.full((2, 3, 4, 4), level)  # may well lie where the last one was
        assert encoder.features(block).mean() == level
        del block
    assert encoder.calls == 3


def test_a_module_is_wrapped_under_its_own_name():
    class Own(nn.Module):
        name, num_features, recipe, clip_len = "own", 5, "what I trained", 4

        def forward(self, clips):
            return clips.mean((1, 3, 4)).repeat(1, 2)[:, :5]

    own = backbone(Own())
    assert (own.name, own.num_features, own.recipe) == ("own", 5, "what I trained")
    assert own.clip_len == 4 and not own.takes_frames and not own.comparable
    assert backbone(own) is own
    with pytest.raises(ValueError, match=r"gave \(2, 3, 4, 4\)"):
        Wrapped(nn.AdaptiveAvgPool2d(4))


def test_random_backbones_are_the_same_every_time_and_leave_the_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    frames, clips = RandomBackbone(2), RandomBackbone(3)
    assert torch.equal(before, torch.get_rng_state())
    block = torch.rand(3, 3, 17, 16)
    assert torch.equal(frames(block), RandomBackbone(2)(block))
    assert not torch.equal(frames(block), RandomBackbone(2, seed=1)(block))
    assert clips(torch.rand(1, 8, 3, 16, 16)).shape == (1, clips.num_features)
    assert "meaningless" in frames.recipe and not frames.comparable
    with pytest.raises(ValueError, match="in 4 dimensions"):
        RandomBackbone(4)


# The resolver


def test_networks_are_shared_while_they_are_used():
    first = backbone("random-2dconv")
    assert backbone("random-2dconv") is first and backbone("random-3dconv") is not first
    first.mark = True
    del first
    gc.collect()
    assert not hasattr(backbone("random-2dconv"), "mark")


def test_random_is_never_what_one_gets_for_missing_weights():
    for name in BACKBONES.keys() & WEIGHTS.keys():
        with pytest.raises(WeightsUnavailable):
            backbone(name, accept=[WEIGHTS[name].licence])


def test_a_licence_is_asked_for_even_if_the_network_is_there(monkeypatch, tmp_path):
    path = put(tmp_path / "musiq.pth")
    monkeypatch.setitem(BACKBONES, NONCOMMERCIAL, lambda path: RandomBackbone(2))
    held = backbone(NONCOMMERCIAL, path, "cc-by-nc-sa-4.0")
    assert backbone(NONCOMMERCIAL, path, "cc-by-nc-sa-4.0") is held
    with pytest.raises(WeightsUnavailable, match="nobody has accepted"):
        backbone(NONCOMMERCIAL, path)


def test_names_paths_and_both(monkeypatch, tmp_path):
    seen = []

    def build(path):
        seen.append(path)
        return RandomBackbone(2)

    monkeypatch.setitem(BACKBONES, "dino-vitb16", build)
    folder = put_folder(tmp_path / "dino-vitb16")
    other = put_folder(tmp_path / "mine")
    held = [
        backbone(folder),
        backbone("dino-vitb16", folder),
        backbone(f"dino-vitb16={folder}"),
        backbone(f"dino-vitb16={other}"),
    ]
    assert seen == [folder, other]
    assert held[0] is held[1] is held[2]
    with pytest.raises(ValueError, match="does not say whose weights it is"):
        backbone(other)
    with pytest.raises(ValueError, match="Did you mean 'dino-vitb16'"):
        backbone("dino-vit16")
    with pytest.raises(WeightsUnavailable, match=r"config\.json"):
        backbone(f"dino-vitb16={tmp_path / 'nowhere'}")


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(WeightsUnavailable, match=r"needs the package transformers.*\[wan\]"):
        backbone("dino-vitb16", put_folder(tmp_path / "dino"))


# Image transformers, tiny and random


def tiny_vit(folder, kind="ViT", **changes):
    transformers = pytest.importorskip("transformers", reason="the extra [wan] is not installed")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        **changes,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture
def tiny_sizes(monkeypatch):
    for kind in (vits.DINO, vits.DINOv2, vits.CLIPB32, vits.CLIPL14):
        monkeypatch.setattr(kind, "published_size", (32, 2, 8))
        monkeypatch.setattr(kind, "side", 32)


def as_vbench(frames, side, cubic=False):
    """What torchvision makes of 8-bit frames, in [0, 1]."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    mode = functional.InterpolationMode.BICUBIC if cubic else functional.InterpolationMode.BILINEAR
    whole = (frames * 255).round().to(torch.uint8)
    return functional.resize(whole, side, mode, antialias=False).float() / 255


def standardised(frames, mean, deviation):
    functional = pytest.importorskip("torchvision.transforms.functional")
    return functional.normalize(frames, mean, deviation)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(17, 70),
    width=st.integers(17, 70),
    cubic=st.booleans(),
    seed=st.integers(0, 99),
)
def test_frames_are_resized_as_torchvision_does(height, width, cubic, seed):
    functional = pytest.importorskip("torchvision.transforms.functional")
    frames = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    found = vits.resized(frames, 24, "bicubic" if cubic else "bilinear")
    wanted = as_vbench(frames, 24, cubic) * 255
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    cut = vits.centred(found, 24)
    torch.testing.assert_close(
        cut, functional.center_crop(found, [24, 24]), rtol=0, atol=0, equal_nan=True
    )


def cubic(distance, a=-0.75):
    """Keys' kernel."""
    x = abs(distance)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize("rows, columns", [(4, 7), (6, 4), (2, 3)])
def test_positions_are_interpolated_by_the_ratio_of_the_authors(rows, columns):
    grid, table = 4, torch.randn(1, 17, 2, dtype=torch.float64)
    found = vits.interpolated(table, rows, columns)[0, 1:].view(rows, columns, 2)
    source = table[0, 1:].view(grid, grid, 2)
    for r in range(rows):
        for c in range(columns):
            y = (r + 0.5) * grid / (rows + 0.1) - 0.5
            x = (c + 0.5) * grid / (columns + 0.1) - 0.5
            total = torch.zeros(2, dtype=torch.float64)
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    near = source[min(max(i, 0), grid - 1), min(max(j, 0), grid - 1)]
                    total += cubic(y - i) * cubic(x - j) * near
            torch.testing.assert_close(found[r, c], total)
    assert vits.interpolated(table, grid, grid) is table


@pytest.mark.parametrize("kind, name", [("ViT", "dino-vitb16"), ("Dinov2", "dinov2-vitb14")])
def test_dino_is_the_class_token(tmp_path, tiny_sizes, kind, name):
    model = tiny_vit(tmp_path, kind)
    encoder = backbone(name, tmp_path)
    frames = torch.rand(2, 3, 47, 47)
    pixels = standardised(as_vbench(frames, 32), *vits.IMAGENET)
    wanted = model(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(frames), wanted)
    assert encoder.num_features == 32
    assert encoder.weights_sha256 == checksum(tmp_path / "model.safetensors")
    # Neither cut nor squashed: the far end of a wide frame counts, and so does its place.
    wide = torch.rand(1, 3, 32, 64)
    ends = wide.clone()
    ends[..., 56:] = 0.5
    assert (encoder(wide) - encoder(ends)).abs().max() > 1e-3
    assert encoder(torch.rand(1, 3, 64, 33)).shape == (1, 32)


def test_dino_looks_at_wide_frames_with_the_positions_of_its_authors(tmp_path, tiny_sizes):
    model = tiny_vit(tmp_path)
    frames = torch.rand(2, 3, 32, 56)
    table = vits.interpolated(model.embeddings.position_embeddings, 4, 7)
    model.embeddings.interpolate_pos_encoding = lambda *_: table
    pixels = standardised(as_vbench(frames, 32), *vits.IMAGENET)
    wanted = model(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    torch.testing.assert_close(backbone("dino-vitb16", tmp_path)(frames), wanted)


def tiny_clip(folder):
    """A CLIP that reads single letters; its tokenizer is beside it."""
    transformers = pytest.importorskip("transformers", reason="the extra [wan] is not installed")
    letters = [*"abcdefgh", *(f"{letter}</w>" for letter in "abcdefgh")]
    vocabulary = [*letters, "<|startoftext|>", "<|endoftext|>"]
    put(folder / "vocab.json", json.dumps({t: i for i, t in enumerate(vocabulary)}).encode())
    put(folder / "merges.txt", b"#version: 0.2\n")
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    tokens = {"bos_token_id": 16, "eos_token_id": 17, "pad_token_id": 17, "vocab_size": 18}
    config = transformers.CLIPConfig(
        text_config=size | tokens, vision_config=size | {"image_size": 32, "patch_size": 8}
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ["clip-vit-b32", "clip-vit-l14"])
def test_clip_is_that_of_transformers(tmp_path, tiny_sizes, name):
    functional = pytest.importorskip("torchvision.transforms.functional")
    model = tiny_clip(tmp_path)
    encoder = backbone(name, tmp_path)
    frames = torch.rand(3, 3, 45, 61)
    square = functional.center_crop(as_vbench(frames, 32, cubic=True), [32, 32])
    pixels = standardised(square, *vits.OPENAI)
    ids = torch.tensor([[16, 0, 1, 10, 17]])  # "ab c": a, b, c at the end of words
    ids[0, 2] = 9
    theirs = model(input_ids=ids, pixel_values=pixels)
    cosines = theirs.logits_per_image / model.logit_scale.exp()
    image, text = encoder(frames), encoder.text_features(["ab c"])
    ours = nn.functional.normalize(image, dim=1) @ nn.functional.normalize(text, dim=1).T
    torch.testing.assert_close(ours, cosines)
    assert encoder.num_features == image.shape[1] == text.shape[1]


def test_a_long_prompt_is_cut_and_one_without_tokenizer_refused(tmp_path, tiny_sizes):
    tiny_clip(tmp_path)
    encoder = backbone("clip-vit-b32", tmp_path)
    short, long = (encoder.text_features([" ".join("ab" * n)]) for n in (38, 100))
    assert torch.equal(encoder.text_features([" ".join("ab" * 60)]), long)
    assert not torch.equal(short, encoder.text_features([" ".join("ab" * 20)]))
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).unlink()
    with pytest.raises(WeightsUnavailable, match="of 18 tokens"):
        encoder.text_features(["ab"])


def test_a_missing_tensor_is_never_made_up(tmp_path, tiny_sizes):
    tiny_vit(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state[next(name for name in state if "layernorm_after" in name)]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors are missing"):
        backbone("dino-vitb16", tmp_path)


def test_another_network_under_a_published_name_is_refused(tmp_path):
    tiny_vit(tmp_path / "small")
    with pytest.raises(ValueError, match=r"is not 'dino-vitb16'.*\(32, 2, 8\)"):
        backbone("dino-vitb16", tmp_path / "small")
    tiny_clip(tmp_path / "clip")
    with pytest.raises(ValueError, match="it holds a 'clip'"):
        backbone("dino-vitb16", tmp_path / "clip")


def test_a_broken_folder_is_refused(tmp_path, tiny_sizes):
    tiny_vit(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as 'dino-vitb16'"):
        backbone("dino-vitb16", tmp_path)
    put(tmp_path / "config.json", b"{")
    with pytest.raises(ValueError, match="cannot be read as 'dino-vitb16'"):
        backbone("dino-vitb16", tmp_path)
